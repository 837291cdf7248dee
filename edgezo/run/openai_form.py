"""OpenAI's form: what a program may ask of ``edgezo serve``, and the JSON that it gets.

pydantic reads requests (``pip install 'edgezo[serve]'``). What would change an answer and is not done here is refused;
what changes nothing is passed over.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgezo.errors import DoesNotFit, UsageError

_Text = Annotated[str, Field(min_length=1)]
_One: TypeAlias = Literal[1] | None
_No: TypeAlias = Literal[False] | None


class Refused(Exception):
    """Why a request is not answered, with the status of HTTP."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @staticmethod
    def of(problem: Exception) -> Refused:
        """What a program is told of one of edgezo's errors."""
        if isinstance(problem, Refused):
            return problem
        if isinstance(problem, UsageError):
            return Refused(400, str(problem))
        return Refused(
            503, str(problem), code="memory" if isinstance(problem, DoesNotFit) else None
        )


class ContentPart(BaseModel):
    """A part of a turn."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]

    def plain(self) -> dict[str, str]:
        """The turn as chat templates have it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool | None = None


class Question(BaseModel):
    """What both kinds of requests have. Names below ``stream_options`` ask for what is not done here."""

    model_config = ConfigDict(strict=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Text | list[_Text] | None = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: _One = None
    best_of: _One = None
    echo: _No = None
    suffix: Literal[""] | None = None
    logprobs: _No = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def questions(self) -> list[Any]:
        """What is answered, each with an answer of its own."""
        raise NotImplementedError


class CompletionQuestion(Question):
    """The body of ``/v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]

    @property
    def questions(self) -> list[Any]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ChatQuestion(Question):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096)]

    @property
    def questions(self) -> list[Any]:
        return [[turn.plain() for turn in self.messages]]


def read(body: bytes, kind: type[Question]) -> Question:
    """A request. Raises Refused for what is none, or asks for something that is not done here."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as problem:
        first = problem.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        raise Refused(400, f"{name or 'the body'}: {first['msg']}", param) from None


# ---------------------------------------------------------------------------------------------
# Answers


class AnswerPart(NamedTuple):
    """A part of the answer to one of the questions of a request."""

    place: int  # of the question
    text: str
    reason: str | None = None  # why it is the last one: "stop" or "length"
    prediction: Mapping[str, Any] | None = None  # of a run that tells labels apart


class Reply:
    """The JSON of an answer, whole or in parts, by the model ``name``."""

    def __init__(self, question: Question, name: str) -> None:
        self.chat = isinstance(question, ChatQuestion)
        self.count = len(question.questions)
        self.name, self.created = name, int(time.time())
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.kind = "chat.completion" if self.chat else "text_completion"

    def whole(self, parts: Iterable[AnswerPart], usage: Mapping[str, int]) -> dict[str, Any]:
        """All of it in one object."""
        texts, last = [""] * self.count, dict[int, AnswerPart]()
        for part in parts:
            texts[part.place] += part.text
            last[part.place] = part
        choices = []
        for index, text in enumerate(texts):
            message = {"role": "assistant", "content": text}
            content = {"message": message} if self.chat else {"text": text}
            choices.append(_choice(last[index], content))
        return {**self._around(self.kind, choices), "usage": dict(usage)}

    def part(self, part: AnswerPart) -> dict[str, Any]:
        """A part of a stream."""
        delta = {"role": "assistant", "content": part.text}
        content = {"delta": delta} if self.chat else {"text": part.text}
        return self._around(self._part_kind, [_choice(part, content)])

    def end(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The part of a stream that counts tokens."""
        return {**self._around(self._part_kind, []), "usage": dict(usage)}

    @property
    def _part_kind(self) -> str:
        return self.kind + (".chunk" if self.chat else "")

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.name}
        return {**about, "choices": choices}


def _choice(part: AnswerPart, content: Mapping[str, Any]) -> dict[str, Any]:
    """One answer; of a run that tells labels apart with the prediction, in a field of edgezo's."""
    prediction = {} if part.prediction is None else {"edgezo": dict(part.prediction)}
    choice = {"index": part.place, **content, "logprobs": None, "finish_reason": part.reason}
    return {**choice, **prediction}


def model_entry(name: str, created: int) -> dict[str, Any]:
    """A model in the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "edgezo"}
