"""Chats that messengers export become texts: a line of each message, with the name of whoever wrote it.

    WhatsApp    lines of text, as ``31.12.20, 21:15 - Ann: hi`` or ``[31.12.20, 21:15:03] Ann: hi``
    Telegram    result.json: {"messages": [{"from", "date", "text"}]}, or {"chats": {"list": [{"messages"}, ...]}}
    Discord     {"messages": [{"author": {"name"}, "timestamp", "content"}]}

Nothing of an export says whose messages are to be learned, so all are, unless a speaker is named. A row ends with a
day, once it has some length.
Chats with an assistant (ChatGPT, Claude) say so, and are conversations: turns.py reads these.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

from edgezo.data.json_array import JsonArray
from edgezo.data.row_files import Record
from edgezo.machine.foreign import clip, parse_json
from edgezo.machine.process_memory import Guard

_ROW_CHARS = 1000  # a row with so many ends with its day
_NAME_CHARS = 80
_LINE_CHARS = 1 << 16
# The beginning of an export as JSON: the words of Telegram, or a list of messages, each with a number and a type.
_EXPORT = re.compile(
    rb'\A(?:\xef\xbb\xbf)?\s*\{(?:\s*"about"\s*:\s*"Here is the data you requested|'
    rb'.*?"messages"\s*:\s*\[\s*\{\s*"id"\s*:[^,{}\[\]]{1,40},\s*"type"\s*:\s*")',
    re.DOTALL,
)
_STAMP = re.compile(
    r"[\u200e\u200f]*\[?(\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),?[ \u202f\u00a0]\d{1,2}[:.]\d{2}(?:[:.]\d{2})?"
    r"(?:[ \u202f\u00a0]?[AaPp]\.?[ ]?[Mm]\.?)?(?:\][ ]|[ ]-[ ])"
)
_SAID = re.compile(rf"([^:\n]{{1,{_NAME_CHARS}}}): (.*)", re.DOTALL)
# What stands in place of a picture or a file.
_LEFT_OUT = re.compile(r"[\u200e\u200f]*<?(attached: .*|[^\n]{1,30} omitted)>?\s*")


class Message(NamedTuple):
    """What somebody wrote."""

    day: str
    who: str
    text: str


def rows(messages: Iterator[Message], name: str, most: int) -> Iterator[Record]:
    """Rows with ``text`` of consecutive messages, each of at most ``most`` characters."""
    for number, group in enumerate(_groups(messages, most), 1):
        text = "\n".join(f"{message.who}: {message.text.strip()}"[:most] for message in group)
        yield Record(f"{name}, part {number}", {"text": text})


def conversations(
    messages: Iterator[Message], name: str, most: int, speaker: str, names: Counter[str]
) -> Iterator[Record]:
    """Rows with ``messages`` of a chat, in which ``speaker`` is the assistant and all others are the user.

    Parts without an answer of the speaker's are left out. ``names`` counts the messages of each who wrote some.
    """
    for number, group in enumerate(_groups(messages, most), 1):
        names.update(message.who for message in group)
        others = {message.who for message in group} - {speaker}
        turns = list[dict[str, str]]()
        for message in group:
            role = "assistant" if message.who == speaker else "user"
            text = message.text.strip()
            if role == "user" and len(others) > 1:
                text = f"{message.who}: {text}"
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += f"\n{text}"
            elif turns or role == "user":  # an answer needs something that it answers
                turns.append({"role": role, "content": text})
        if len(turns) > 1:
            yield Record(f"{name}, part {number}", {"messages": turns})


def _groups(messages: Iterator[Message], most: int) -> Iterator[list[Message]]:
    """Consecutive messages of about ``most`` characters, or of whole days."""
    group, chars, day = list[Message](), 0, ""
    for message in messages:
        size = min(most, len(message.who) + 2 + len(message.text.strip()))
        if group and (chars + size > most or (message.day != day and chars >= _ROW_CHARS)):
            yield group
            group, chars = [], 0
        group.append(message)
        chars, day = chars + size + 1, message.day
    if group:
        yield group


# ---------------------------------------------------------------------------------------------
# WhatsApp


def is_whatsapp(start: str) -> bool:
    """Whether a text that begins so is a chat: its first line has a time, and one more of the next ones."""
    lines = [line for line in start.splitlines() if line.strip()][:20]
    return (
        bool(lines)
        and bool(_STAMP.match(lines[0]))
        and sum(map(bool, map(_STAMP.match, lines))) > 1
    )


def of_whatsapp(file: IO[str]) -> Iterator[Message]:
    """The messages of a chat; what the program itself says, and pictures, are left out."""
    day, waiting = "", ""
    while line := file.readline(_LINE_CHARS):
        stamp = _STAMP.match(line)
        if stamp is None:  # a message goes on
            waiting += line if len(waiting) < _LINE_CHARS else ""
            continue
        yield from _said(day, waiting)
        day, waiting = stamp[1], line[stamp.end() :]
    yield from _said(day, waiting)


def _said(day: str, text: str) -> Iterator[Message]:
    turn = _SAID.match(text)
    if turn is not None and not _LEFT_OUT.fullmatch(turn[2]) and turn[2].strip():
        yield Message(day, turn[1], turn[2].replace("\u200e", ""))


# ---------------------------------------------------------------------------------------------
# JSON


def is_export(start: bytes) -> bool:
    """Whether a file that begins so is the export of a chat as one JSON object."""
    return _EXPORT.match(start) is not None


def of_json(file: IO[str], name: str, guard: Guard) -> Iterator[Message]:
    """The messages of an export, parsed one by one. Raises ValueError where it is none."""
    buffer = JsonArray(file, name, guard)
    if not buffer.enter(lists=("messages", "list"), objects=("chats",)):
        raise ValueError("it has no list of messages")
    for text in buffer.items():
        element = parse_json(text)
        chat = element.get("messages") if isinstance(element, dict) else None
        for message in chat if isinstance(chat, list) else [element]:
            yield from _message_of(message)


def _message_of(value: Any) -> Iterator[Message]:
    """The message that an element of an export is, if it has text."""
    if not isinstance(value, Mapping):
        return
    author = value.get("author")
    who = author.get("name") if isinstance(author, Mapping) else value.get("from")
    content = value.get("content") if isinstance(author, Mapping) else value.get("text")
    if isinstance(content, list):  # plain and marked pieces
        content = "".join(
            piece if isinstance(piece, str) else str(piece.get("text", ""))
            for piece in content
            if isinstance(piece, str | Mapping)
        )
    if isinstance(who, str) and isinstance(content, str) and content.strip():
        day = str(value.get("date", value.get("timestamp", "")))[:10]
        yield Message(day, clip(who, _NAME_CHARS), content)
