"""Chat templates are rendered in a process of their own (chat_rendering.py), which is bounded in memory and time."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import IO, Any, NamedTuple

from edgezo.data.chat_rendering import most_cpu_s
from edgezo.data.turns import Conversation
from edgezo.machine import children

# The libraries of the process, which renders on one core and asks no server.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class ChatText(NamedTuple):
    """A rendered conversation, where the assistant's turns are in it, and what the template did not write."""

    text: str
    spans: tuple[tuple[int, int], ...]
    answer: str = ""  # the content of the last turn
    ended: bool = True  # a token ends the last turn
    # Turns that have no span: written in another way once more turns follow; or without a trace of their tool calls.
    rewritten: int = 0
    unwritten: int = 0
    shortened: int = 0  # turns of which a part is left out
    unused: tuple[str, ...] = ()  # what makes no difference to the text: tools, keys of turns


class TemplateFails(Exception):
    """Why a template does not render a conversation. ``over``: it would render no other one either."""

    def __init__(self, why: str, over: bool = False):
        super().__init__(why)
        self.over = over


class ChatTemplates:
    """Renders conversations with a tokenizer's chat template. The process starts with the first one."""

    def __init__(self, tokenizer: Any, now: str | None = None):
        self._tokenizer, self._now = tokenizer, now  # the time that templates write, in ISO's form
        self.dated = False  # the template has asked for the time
        self._child: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def __enter__(self) -> ChatTemplates:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def render(self, asked: Conversation) -> ChatText:
        """The text of a conversation. Raises TemplateFails."""
        question = {
            "messages": asked.messages,
            "learned": asked.learned,
            "variables": asked.variables,
        }
        answer = self._ask(self._child or self._start(), question)
        if "error" in answer:
            raise TemplateFails(answer["error"], over="over" in answer)
        self.dated |= answer.pop("dated")
        spans = tuple((start, stop) for start, stop in answer.pop("spans"))
        return ChatText(spans=spans, unused=tuple(answer.pop("unused")), **answer)

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()
        if self._errors is not None:
            self._errors.close()

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        child = self._child = subprocess.Popen(
            children.command("edgezo.data.chat_rendering"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=children.environment(**_ENVIRONMENT),
        )
        settings = {
            "template": self._tokenizer.chat_template,
            "special_tokens": self._tokenizer.special_tokens_map,
            "tokens": self._marks(),
            "now": self._now,
        }
        self._ask(child, settings)
        return child

    def _marks(self) -> list[str]:
        """The texts of the tokens that may end a turn. Some tokenizers have white space among their added tokens."""
        added = {str(token) for token in self._tokenizer.added_tokens_decoder.values()}
        return sorted(text for text in added if text.strip())

    def _ask(self, child: subprocess.Popen[str], value: Any) -> dict[str, Any]:
        """The answer to one line. Raises TemplateFails where the process has ended over it."""
        assert child.stdin is not None and child.stdout is not None
        question, line = json.dumps(value) + "\n", ""
        with suppress(BrokenPipeError):
            child.stdin.write(question)
            child.stdin.flush()
            line = child.stdout.readline()
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise TemplateFails(self._why(child.wait(), len(question)), over=True)

    def _why(self, status: int, size: int) -> str:
        if hasattr(signal, "SIGPROF") and status == -signal.SIGPROF:
            return f"it takes more than {most_cpu_s(size):.1f} s of processor time for one row"
        assert self._errors is not None
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"the process that renders it ended with {status}"
