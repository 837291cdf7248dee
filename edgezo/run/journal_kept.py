"""Files beside a journal that keep what a resume takes from its end, so that nothing in it is ever lost.

journal-cut-STEP.bin   the bytes of a record that was not finished, or is damaged; numbered where there is one already
journal-again.bin      whole records of steps that are computed again, from the last snapshot on: the step sizes of a
                       run of a given time stand nowhere else. Removed when as many steps have been computed again

Both hold bytes as they were in the journal, and are written whole before the journal changes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_write
from edgezo.run.journal_record import HEAD_BYTES, StepRecord, read_head


class DroppedRecord(NamedTuple):
    """A record that is to be computed again."""

    step_size: float
    data: bytes


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of a regular file. Raises OSError; for a pipe or a device too, and at once."""
    fd = os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is not a regular file")
    return fd


def keep_cut(journal: Path, step: int, data: bytes) -> Path:
    """Write the end that is about to be cut off a journal beside it; returns the file. Raises EdgezoError.

    A file with these bytes is there already where a process was killed before it cut.
    """
    number = 1
    while True:
        more = f"-{number}" if number > 1 else ""
        path = journal.with_name(f"{journal.stem}-cut-{step}{more}.bin")
        if not os.path.lexists(path):
            atomic_write(path, data)
            return path
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return path
        number += 1


def write_again(journal: Path, dropped: Mapping[int, DroppedRecord]) -> None:
    """Keep records that are to be computed again. Raises EdgezoError."""
    atomic_write(_again(journal), b"".join(dropped[step].data for step in sorted(dropped)))


def remove_again(journal: Path) -> None:
    """Forget the records that have been computed again."""
    _again(journal).unlink(missing_ok=True)


def read_again(
    journal: Path, crc: int, decode: Callable[[bytes], StepRecord | None]
) -> dict[int, DroppedRecord]:
    """The records that a resume has dropped and that may not be computed again yet, by step.

    ``decode`` reads a record of the journal: None, or ValueError, where it is none. Raises EdgezoError for a file that
    is damaged or belongs to another journal.
    """
    path = _again(journal)
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            data = file.read()
        return dict(_dropped_in(data, crc, decode))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise EdgezoError(
            f"{path} cannot be used: {why}. It holds the step sizes of steps that are computed again from the last "
            "snapshot on. Restore it from a copy; or remove it, and they follow the schedule."
        ) from problem


def _dropped_in(
    data: bytes, crc: int, decode: Callable[[bytes], StepRecord | None]
) -> Iterator[tuple[int, DroppedRecord]]:
    """The records of the file by step. Raises ValueError where they are damaged or not in order."""
    at, last = 0, -1
    while at < len(data):
        head = read_head(data[at : at + HEAD_BYTES], crc)
        piece = data[at : at + head.length] if head is not None else b""
        record = decode(piece)
        if record is None or record.step <= last:
            raise ValueError(f"it is damaged at byte {at}")
        yield record.step, DroppedRecord(record.step_size, piece)
        at, last = at + len(piece), record.step


def _again(journal: Path) -> Path:
    return journal.with_name(f"{journal.stem}-again.bin")
