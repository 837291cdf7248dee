"""A model in memory answers the requests of programs: ``edgezo serve``.

Requests come from the thread of a server (cli/serve.py) and wait in a line. The thread that has loaded the model takes
one after the other, so that one answer at a time is in memory, and the cap holds.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from edgezo.data.asked_rows import LINE
from edgezo.errors import EdgezoError
from edgezo.machine.foreign import parse_json, reason
from edgezo.network.sampling import Sampler
from edgezo.run.openai_form import AnswerPart, Question, Refused
from edgezo.run.predictor import Predictor

MOST_WAITING = 32  # requests in the line


@dataclass
class Job:
    """A request in the line. Parts of its answer go to ``give``; a Refused ends it, and so does None."""

    question: Question
    give: Callable[[AnswerPart | Refused | None], None]
    gone: threading.Event = field(default_factory=threading.Event)  # nobody waits for the rest
    read_tokens: int = 0
    written_tokens: int = 0

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, by OpenAI's names."""
        total = self.read_tokens + self.written_tokens
        counts = {"prompt_tokens": self.read_tokens, "completion_tokens": self.written_tokens}
        return {**counts, "total_tokens": total}


class Desk:
    """The line of requests for one model, and who answers them."""

    def __init__(self, used: Predictor) -> None:
        self.used = used
        self.name = Path(used.target).name or used.target
        self.since = int(time.time())
        self.answered = 0
        self._line: SimpleQueue[Job | None] = SimpleQueue()  # a signal's handler may add to it
        self._closed = threading.Event()

    def add(self, job: Job) -> None:
        """Let a request wait. Raises Refused where the line is too long, or the server ends."""
        self._check_open()
        if self._line.qsize() >= MOST_WAITING:
            message = f"{MOST_WAITING} requests wait already: ask again later"
            raise Refused(429, message, code="busy")
        self._line.put(job)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Refused(503, "the server is ending")

    def close(self) -> None:
        """End ``work`` after the token that is being written. A signal's handler may call it."""
        self._closed.set()
        self._line.put(None)

    def work(self) -> None:
        """Answer one request after the other, until ``close``."""
        while (job := self._line.get()) is not None:
            try:
                self._answer(job)
            except BaseException as problem:  # a bug, or Ctrl-C: the program is not left waiting
                job.give(Refused(500, f"the server has failed ({type(problem).__name__})"))
                raise

    def _answer(self, job: Job) -> None:
        try:
            self._check_open()
            self.used.guard.check(item="the next request")
            for part in self._parts(job):
                self._check_open()
                if job.gone.is_set():
                    return
                job.give(part)
        except (EdgezoError, Refused) as problem:
            job.give(Refused.of(problem))
            return
        self.answered += 1
        job.give(None)

    def _parts(self, job: Job) -> Iterator[AnswerPart]:
        answer = self._label if self.used.classifies else self._text
        for index, asked in enumerate(job.question.questions):
            yield from answer(job, index, asked)

    def _label(self, job: Job, index: int, asked: Any) -> Iterator[AnswerPart]:
        """The label of a row: a text that fills the prompt's only field, or a JSON object; of a chat the last turn."""
        text = asked if isinstance(asked, str) else asked[-1]["content"]
        row: Mapping[str, Any] = {LINE: text}
        if text.lstrip().startswith("{"):
            try:
                row = parse_json(text)
            except ValueError as problem:
                raise Refused(400, f"a row that is no JSON object: {reason(problem)}") from None
        before = self.used.tokens
        (prediction,) = self.used.predict([row])
        del prediction["row"]
        job.read_tokens += self.used.tokens - before
        yield AnswerPart(index, str(prediction[self.used.asker.asks]), "stop", prediction)

    def _text(self, job: Job, index: int, asked: Any) -> Iterator[AnswerPart]:
        question = job.question
        seed = secrets.randbits(62) if question.seed is None else question.seed
        top_p = 1.0 if question.top_p is None else question.top_p
        sampler = Sampler.of(question.temperature or 0.0, top_p, seed)
        writing = self.used.write(asked, question.most, sampler, whole=True)
        job.read_tokens += len(writing.prompt)
        pieces = UpTo(writing, question.stops)
        for text in pieces:
            yield AnswerPart(index, text)
        job.written_tokens += len(writing.tokens)
        yield AnswerPart(index, "", "stop" if writing.ended or pieces.stopped else "length")


@dataclass
class UpTo:
    """Pieces of a text up to the first of ``stops``. What may be the beginning of a stop waits until that is known."""

    pieces: Iterable[str]
    stops: tuple[str, ...]
    stopped: bool = False

    def __iter__(self) -> Iterator[str]:
        kept = ""
        for piece in self.pieces:
            kept += piece
            places = [at for stop in self.stops if (at := kept.find(stop)) >= 0]
            if places:
                self.stopped = True
                kept = kept[: min(places)]
                break
            sure = len(kept) - max((_begun(kept, stop) for stop in self.stops), default=0)
            if sure:
                yield kept[:sure]
                kept = kept[sure:]
        if kept:
            yield kept


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
