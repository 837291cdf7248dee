"""Standard input, output and error of a command, in whatever state the command is started with them.

A standard stream may be closed, full, a pipe that nobody reads, or in an encoding that lacks most letters. None of that
may end a run in its middle, or let a file of the run take the number of a closed stream. So ``settle`` is called before
anything else is opened, and ``refusal`` when the command is over. Standard library only.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

_CLOSED = OSError(errno.EBADF, "it is closed")


class Output(io.FileIO):
    """A file whose writes do not fail: text that it refuses is dropped, and the first refusal is kept."""

    refusal: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # the other end has asked for writes that do not wait
            return written
        except OSError as problem:
            self.refusal = self.refusal or (_CLOSED if problem.errno == errno.EBADF else problem)
            return memoryview(data).nbytes


def settle() -> None:
    """Let the three standard streams be there, and let no write to them fail."""
    for number in range(3):  # upwards: a new file takes the lowest number that is free
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # a write to it is refused
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = _output(sys.stdout, 1), _output(sys.stderr, 2)


def _output(stream: TextIO | None, number: int) -> TextIO:
    """The stream over an ``Output``, with escapes for characters that its encoding lacks."""
    if stream is None:
        stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:  # a console of Windows, which takes characters, not bytes
        stream.reconfigure(errors="backslashreplace")
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(Output(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or number == 2,
        write_through=stream.write_through,
    )


def refusal() -> OSError | None:
    """Why a part of the result could not be printed; None where all of it was."""
    try:
        sys.stdout.flush()
    except OSError as problem:
        return problem
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.refusal if isinstance(raw, Output) else None
