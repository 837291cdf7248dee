"""Rows to predict, in groups as they come: from a file, or as lines on standard input, one JSON object or text each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from edgezo.data.row_files import Problems, Record, read_records
from edgezo.errors import UsageError
from edgezo.machine.foreign import parse_json, reason
from edgezo.machine.process_memory import Guard

LINE = ""  # the only field of a row that is a line of text and no object
GROUP_ROWS, GROUP_CHARS = 1024, 1 << 20  # rows that are predicted together, and their characters
_TAKEN_BYTES = 1 << 16
_STDIN = "standard input"


def of_file(path: Path, problems: Problems, guard: Guard) -> Iterator[list[Record]]:
    """The rows of a file, in groups. Raises UsageError for what is no file of rows."""
    if path.is_dir():
        raise UsageError(
            f"{path} is a directory, and predictions are made for one file of rows: give one of its files"
        )
    if not path.exists():
        raise UsageError(f"no such file: {path} (--data - reads lines from standard input)")
    group, chars = list[Record](), 0
    for record in read_records(path, problems, guard):
        group.append(record)
        chars += sum(len(value) for value in record.fields.values() if isinstance(value, str))
        if len(group) == GROUP_ROWS or chars > GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def of_lines(stream: BinaryIO, problems: Problems, guard: Guard) -> Iterator[list[Record]]:
    """The lines that have come, in groups: whoever writes one line and waits gets its prediction at once."""
    rest, number = b"", 0
    while piece := stream.read1(_TAKEN_BYTES):  # type: ignore[attr-defined]
        guard.check(4 * len(rest), _STDIN)
        *lines, rest = (rest + piece).split(b"\n")
        group = list(_records(lines, number, problems))
        number += len(lines)
        for start in range(0, len(group), GROUP_ROWS):
            yield group[start : start + GROUP_ROWS]
    if last := list(_records([rest], number, problems)):
        yield last


def of_texts(texts: Sequence[str], problems: Problems) -> Iterator[list[Record]]:
    """Texts of a command line, each a row: a text with line ends stays one."""
    for number, text in enumerate(texts, 1):
        yield [Record(f"text {number}", {LINE: text})]


def _records(lines: list[bytes], before: int, problems: Problems) -> Iterator[Record]:
    """The rows of lines that come after ``before`` others; after the first that is wrong, no more."""
    for number, raw in enumerate(lines, before + 1):
        where = f"{_STDIN}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
            if not line.strip():
                continue
            fields = parse_json(line) if line.lstrip().startswith("{") else {LINE: line}
        except ValueError as problem:
            problems.add(
                "a line that is neither text nor a JSON object", at=f"{where}: {reason(problem)}"
            )
            return
        yield Record(where, fields)
