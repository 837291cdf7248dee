"""Where in a rendered conversation the assistant's turns are: what each writes behind its header, up to its end.

A template is a program, so nothing of its text is taken for granted: it is rendered several times, and the texts are
compared. With only the turns before one, and a prompt for the next, it shows the header of an answer. With another
content in a turn, it shows where the content stands, and what the template writes behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text

# Contents that stand in for a turn's own: their first characters differ, and so do their last.
MARKERS = ("Quartz", "jigsaw")
# Keys of a turn beside which a template writes the content alone.
PLAIN_KEYS = {"role", "content"}


class Spans(NamedTuple):
    """The places of the assistant's turns, (start, stop) in characters, and the turns that have none, by why."""

    places: tuple[tuple[int, int], ...]
    rewritten: int = 0  # written in another way once more turns follow
    unwritten: int = 0  # the template writes nothing of their tool calls

    @property
    def stop(self) -> int:
        """The end of the last turn; 0 where there is none."""
        return max((stop for _, stop in self.places), default=0)


class _Alone(NamedTuple):
    """A turn in the text that ends with it."""

    text: str
    start: int  # of what the model writes, behind the header
    content: int  # where the content begins
    body: int  # the end of content and tool calls
    stop: int  # the end of the turn: its end token included


def spans(
    messages: Sequence[Message],
    text: str,
    render: Render,
    tokens: Sequence[str] = (),
    learned: Iterable[int] | None = None,
) -> Spans:
    """The places in ``text``, the rendered messages, of the assistant's turns.

    ``tokens``: the texts of the tokenizer's added tokens, one of which usually ends a turn; ``learned``: the turns that
    are looked for; all of the assistant's without it.
    """
    of_assistant = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    turns, places = _Turns(messages, text, render, tokens), list[tuple[int, int]]()
    rewritten = unwritten = 0
    for index in of_assistant if learned is None else learned:
        if not turns.writes_calls(index):
            unwritten += 1
        elif place := turns.place(index):
            places.append(place)
        else:
            rewritten += 1
    return Spans(tuple(places), rewritten, unwritten)


class _Turns:
    """The turns of one conversation."""

    def __init__(
        self, messages: Sequence[Message], text: str, render: Render, tokens: Sequence[str]
    ):
        self.messages, self.text, self.tokens = list(messages), text, tokens
        self.render = render

    def place(self, index: int) -> tuple[int, int] | None:
        """(start, stop) of a turn in the text; None where the text has it in another way than as the last turn."""
        last = index == len(self.messages) - 1
        after = self.text if last else self._try(self.messages[: index + 1])
        if after is None:
            return None
        prompt = self._try(self.messages[:index], add_generation_prompt=True) if index else None
        alone = self._plain(index, after, prompt) or self._marked(index, after, prompt)
        if alone is None or alone.start >= alone.body:
            return None
        for stop in (
            alone.stop,
            alone.body,
        ):  # where more turns follow, a template may leave out the end
            if self.text.startswith(after[:stop]):
                return alone.start, stop
        return self._elsewhere(index, alone)

    def writes_calls(self, index: int) -> bool:
        """Whether the tool calls of a turn, if it has any, leave a trace in the text."""
        turn = self.messages[index]
        if not turn.get("tool_calls"):
            return True
        text = self._try([*self.messages[:index], renamed(turn)])
        return text is not None and MARKERS[0] in text

    def _try(self, messages: Sequence[Message], **options: Any) -> str | None:
        """The text of messages; None where there are none, or the template refuses them."""
        return text_of(self.render, list(messages), **options) if messages else None

    # -- a turn in the text that ends with it -------------------------------------------------------------

    def _plain(self, index: int, after: str, prompt: str | None) -> _Alone | None:
        """A turn whose content follows the prompt for it as it is; None for others."""
        turn = self.messages[index]
        content = turn.get("content", "").strip()
        if prompt is None or not content or set(turn) > PLAIN_KEYS or not after.startswith(prompt):
            return None
        begin = len(prompt)
        while begin < len(after) and after[begin].isspace():
            begin += 1
        if not after.startswith(content, begin):
            return None
        body = begin + len(content)
        return _Alone(after, len(prompt), begin, body, body + self._end(after[body:]))

    def _marked(self, index: int, after: str, prompt: str | None) -> _Alone | None:
        """A turn in ``after``, found by other contents in its place; None where the template does not write them."""
        before = self.messages[:index]
        one, two = (self._try([*before, _turn(marker)]) for marker in MARKERS)
        if one is None or two is None or MARKERS[0] not in one or MARKERS[1] not in two:
            return None
        head = one[: _same_start(one, two)]
        tail = one[len(one) - _same_end(one, two) :]
        content = _same_start(after, head)
        body = max(content, len(after) - _same_end(after, tail))
        start = self._start(index, after, prompt, one, content)
        return _Alone(after, start, content, body, body + self._end(after[body:]))

    def _start(self, index: int, after: str, prompt: str | None, one: str, content: int) -> int:
        """Where what the model writes begins: behind what the prompt for the turn and the text share.

        ``one`` is the text with a marker in place of the turn; the content begins at ``content``.
        """
        if prompt is None:
            header = self._header_of_first()
        else:
            context = _same_start(prompt, self._try(self.messages[:index]) or "")
            header = prompt[context:]
            if header and after.startswith(prompt):
                return len(prompt)
            if header and context < _same_start(prompt, one[:content]):
                return content  # the text parts from the prompt within the header, as where the prompt adds <think>
        # The turns before this one are written in another way here, or there are none: look for the header itself.
        lower = self._end_of_previous(index, one)
        if lower is None or not header:
            return content
        at = after.rfind(header, lower, content)
        return content if at < 0 else at + len(header)

    def _header_of_first(self) -> str:
        """What the template writes to let an answer begin, by a conversation of one question."""
        question = [{"role": "user", "content": MARKERS[0]}]
        prompt = self._try(question, add_generation_prompt=True) or ""
        return prompt[_same_start(prompt, self._try(question) or "") :]

    def _end_of_previous(self, index: int, one: str) -> int | None:
        """Where in ``one`` the content of the turn before ends; 0 for the first turn, None where it cannot be told."""
        if index == 0:
            return 0
        changed = {**self.messages[index - 1], "content": MARKERS[1]}
        other = self._try([*self.messages[: index - 1], changed, _turn(MARKERS[0])])
        return None if other is None else len(one) - _same_end(one, other)

    def _end(self, tail: str) -> int:
        """How long the end of a turn is in what follows its content: up to the first added token, else all of it."""
        there = [(tail.index(token), -len(token)) for token in self.tokens if token in tail]
        if not there:
            return len(tail.rstrip())
        at, minus_size = min(there)
        return at - minus_size

    # -- a turn in the whole text -------------------------------------------------------------------------

    def _elsewhere(self, index: int, alone: _Alone) -> tuple[int, int] | None:
        """The place of a turn where the text before it is another than when it was the last one."""
        before, later = self.messages[:index], self.messages[index + 1 :]
        one, two = (self._try([*before, _turn(marker), *later]) for marker in MARKERS)
        if one is None or two is None:
            return None
        content = _same_start(self.text, one[: _same_start(one, two)])
        start = content - (alone.content - alone.start)
        for stop in (alone.stop, alone.body):
            written = alone.text[alone.start : stop]
            if start >= 0 and self.text.startswith(written, start):
                return start, start + len(written)
        return None


def _turn(content: str) -> Message:
    return {"role": "assistant", "content": content}


def text_of(render: Render, messages: Sequence[Message], **options: Any) -> str | None:
    """The text of messages; None where the template refuses them."""
    try:
        return str(render(messages, **options))
    except MemoryError:
        raise
    except Exception:  # a template is a program, which can fail in any way
        return None


def renamed(turn: Message) -> Message:
    """A turn with tool calls to functions of another name; any other turn as it is."""
    if not turn.get("tool_calls"):
        return turn
    calls = [
        {**call, "function": {**call["function"], "name": MARKERS[0]}}
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def _same_start(one: str, two: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _same_end(one: str, two: str) -> int:
    """How many characters two texts end with in common."""
    return _same_start(one[::-1], two[::-1])
