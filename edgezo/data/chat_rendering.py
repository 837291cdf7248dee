"""Conversations rendered by a chat template: a process of its own, started by chat.py.

A template is a program of a model's authors, which may loop for ever or write without end. Here it may: the kernel
bounds the memory and the processor time of this process, whatever the template does in Python or in C, and the caller
only loses this process. A line of JSON with the template comes first; then each line is a conversation, answered by a
line with its text, where the assistant's turns are in it, and what of it the template writes nothing of.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from edgezo.data.chat_spans import MARKERS, Message, Render, renamed, spans, text_of
from edgezo.data.chat_template import RESERVED, JinjaTemplate
from edgezo.machine.children import address_space_bytes, limit_memory
from edgezo.machine.foreign import clip

# What a conversation may take: memory beside the libraries, and processor time (a usual one takes a millisecond); and
# for each of its characters, so that a long one has as much more as an honest template needs.
ROOM_BYTES, ROOM_TIMES = 256_000_000, 16
MOST_CPU_S, CHARS_A_S = 1.0, 10_000_000
MEAN_CPU_S = 0.05  # of all conversations so far
# Times that a turn may be rendered: a few texts are compared where the plain ones do not tell (chat_spans.py).
RENDERINGS = 4
# Characters that a template may write for each character of a conversation, and for none: a system prompt, and marks
# around each turn.
MOST_TIMES, MOST_MORE = 16, 1_000_000
# Keys of a turn that refer to others, or that are looked at by themselves.
REFERENCES = {"role", "content", "tool_calls", "tool_call_id", "id"}


def main() -> None:
    """Answer the conversations on standard input until it ends."""
    settings = json.loads(sys.stdin.readline())
    template = ChatTemplate(settings)
    size_bytes, begun_s, allowed_s = address_space_bytes(), time.process_time(), MOST_CPU_S
    _answer({})
    for line in sys.stdin:
        room_bytes = ROOM_BYTES + ROOM_TIMES * len(line)
        limit_memory(size_bytes + room_bytes)
        _count_cpu(most_cpu_s(len(line)))
        try:
            asked = json.loads(line)
            allowed_s += mean_cpu_s(len(line), len(asked["messages"]))
            answer = template.answer(asked, len(line))
        except MemoryError:
            answer = _over(f"it takes more than {room_bytes // 1_000_000}MB for one row")
        except Exception as error:  # a template is a program, which can fail in any way
            answer = {"error": clip(str(error) or type(error).__name__, 300)}
        if time.process_time() - begun_s > allowed_s:
            answer = _over(f"it takes more than {MEAN_CPU_S:g} s of processor time a row")
        _answer(answer)
        _count_cpu(0)


def _over(why: str) -> dict[str, Any]:
    """The answer that ends the rendering: the template goes beyond a bound."""
    return {"error": why, "over": True}


def most_cpu_s(size: int) -> float:
    """Processor time that a conversation of ``size`` characters may take, in seconds."""
    return MOST_CPU_S + RENDERINGS * size / CHARS_A_S


def mean_cpu_s(size: int, turns: int) -> float:
    """Processor time that conversations may take in the mean: each turn is found by rendering all turns before it."""
    return min(most_cpu_s(size), MEAN_CPU_S + RENDERINGS * size * turns / CHARS_A_S)


class ChatTemplate:
    """A chat template, and what a conversation's text is asked for beside the text."""

    def __init__(self, settings: dict[str, Any]):
        self._jinja = JinjaTemplate(settings["template"], settings["special_tokens"])
        self._tokens: Sequence[str] = settings.get("tokens", ())
        self._joint: str | None = None
        if settings.get("now"):
            self._jinja.now = datetime.datetime.fromisoformat(settings["now"])

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The text of messages. ``options``: tools, add_generation_prompt, and other variables of the template."""
        return self._jinja.render(messages, **options)

    def _joined(self, message: Message) -> Message:
        """The message with its content as one text: parts are joined as the template joins them."""
        parts = message.get("content")
        if not isinstance(parts, list):
            return message
        if self._joint is None:
            self._joint = self._read_joint()
        return {**message, "content": self._joint.join(parts)}

    def _read_joint(self) -> str:
        """What the template writes between two parts of a content; a new line where it does not read parts."""
        parts = [{"type": "text", "text": marker} for marker in MARKERS]
        text = text_of(self.render, [{"role": "user", "content": parts}])
        if text is None:  # it takes texts alone
            return "\n"
        _, first, rest = text.partition(MARKERS[0])
        joint, second, _ = rest.partition(MARKERS[1])
        written_out = (
            "'text'" in text or '"text"' in text
        )  # the list itself, as Python or JSON spells it
        return joint if first and second and not written_out else "\n"

    def answer(self, asked: dict[str, Any], size: int) -> dict[str, Any]:
        """The answer to a conversation that took ``size`` characters."""
        variables = {k: v for k, v in asked["variables"].items() if k not in RESERVED}

        def render(messages: Sequence[Message], **options: Any) -> str:
            return self.render(messages, **variables, **options)

        messages, text = _first_that_renders(list(map(self._joined, asked["messages"])), render)
        if len(text) > MOST_TIMES * size + MOST_MORE:
            raise ValueError(f"it writes {len(text):,} characters for a row of {size:,}")
        turns = spans(messages, text, render, self._tokens, asked["learned"])
        written = "".join(text.split())
        return {
            "text": text,
            "answer": messages[-1].get("content", "").strip(),
            "spans": turns.places,
            "ended": text[: turns.stop].endswith(tuple(self._tokens)),
            "rewritten": turns.rewritten,
            "unwritten": turns.unwritten,
            "unused": [
                *self._unused_variables(messages, text, asked["variables"]),
                *_unused_keys(messages, text, render),
            ],
            "shortened": sum(
                "".join(messages[i].get("content", "").split()) not in written
                for i in asked["learned"]
            ),
            "dated": self._jinja.dated,
        }

    def _unused_variables(
        self, messages: Sequence[Message], text: str, variables: dict[str, Any]
    ) -> Iterator[str]:
        """The variables of a row (tools, for example) without which the template writes the same."""
        for name in variables:
            without = {k: v for k, v in variables.items() if k not in {name, *RESERVED}}
            if name in RESERVED or text_of(self.render, messages, **without) == text:
                yield name


def _first_that_renders(
    messages: Sequence[Message], render: Render
) -> tuple[Sequence[Message], str]:
    """The messages as the template takes them, and their text. Raises what the template raises.

    Templates differ in what they take of a tool call: arguments as an object or as a text of JSON, and no content or
    an empty one. The first of these ways is taken in which every call is written, else the first that renders.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages, render(messages)
    rendered: list[tuple[Sequence[Message], str]] = []
    problem: Exception | None = None
    for way in _ways(messages):
        try:
            rendered.append((way, render(way)))
            called = render(list(map(renamed, way)))
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, which can fail in any way
            problem = problem or error
            continue
        calls = sum(len(message.get("tool_calls", ())) for message in way)
        if called.count(MARKERS[0]) >= calls:
            return rendered[-1]
    if not rendered and problem is not None:
        raise problem
    return rendered[0]


def _ways(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Messages with tool calls in the ways that templates may want them."""
    for as_text in (False, True):
        for empty in (None, ""):
            yield [_in_way(message, as_text, empty) for message in messages]


def _in_way(message: Message, as_text: bool, empty: str | None) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call, as_text)}}
        for call in message["tool_calls"]
    ]
    content = message.get("content") or empty
    rest = {k: v for k, v in message.items() if k != "content"}
    return {**rest, "tool_calls": calls} | ({} if content is None else {"content": content})


def _arguments(call: Message, as_text: bool) -> Any:
    """The arguments of a call, which chat.py has as an object wherever they are one."""
    arguments = call["function"].get("arguments", {})
    return json.dumps(arguments, ensure_ascii=False) if as_text else arguments


def _unused_keys(messages: Sequence[Message], text: str, render: Render) -> Iterator[str]:
    """The keys of turns without which the template writes the same."""
    for key in dict.fromkeys(key for message in messages for key in message):
        if key not in REFERENCES:
            without = [{k: v for k, v in m.items() if k != key} for m in messages]
            if text_of(render, without) == text:
                yield key


def _count_cpu(seconds: float) -> None:
    """Let the kernel end this process after so much processor time from now on; 0: not at all."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
