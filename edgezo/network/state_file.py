"""The file of hidden states that a linear probe is fitted to, as numpy arrays."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgezo.machine.files import write_error
from edgezo.machine.open_files import open_inside

STATES_MAGIC = b"\x89EZS\r\n\x1a\n"
STATES_VERSION = 1
_STATES_HEAD = struct.Struct("<8sIII32s")
_CRC = struct.Struct("<I")


class DamagedRow(Exception):
    """A row of the file is not what was written."""

    def __init__(self, row: int):
        super().__init__(f"row {row}")
        self.row = row


@dataclass(frozen=True)
class PlainStateFile:
    """The states of each row in the order in which rows passed, and its label words' loss.

    ======  ==========================  =========================================================
    offset  type                        field
    ======  ==========================  =========================================================
    0       8 bytes                     magic ``89 45 5A 53 0D 0A 1A 0A``
    8       3 u32                       format version, 1; blocks; hidden
    20      32 bytes                    the run (directory.run_id)
    52      u32                         CRC of the bytes before
    56      rows                        for each block ``hidden`` fp16 and their CRC; the loss, fp32, and its CRC
    ======  ==========================  =========================================================

    The CRC of a piece begins with that in the head plus the piece's number, so that exchanged pieces and those of
    another run show. The file only grows: after a kill it has every row that was written whole, and the pass goes on
    after them, or before the first row that is damaged. A file of an earlier version is made anew.
    """

    path: Path
    blocks: int
    hidden: int
    of_run: str  # 64 hexadecimal digits

    @property
    def row_bytes(self) -> int:
        return self.blocks * (2 * self.hidden + _CRC.size) + 4 + _CRC.size

    @cached_property
    def head(self) -> bytes:
        """What the file begins with."""
        fixed = _STATES_HEAD.pack(
            STATES_MAGIC, STATES_VERSION, self.blocks, self.hidden, bytes.fromhex(self.of_run)
        )
        return fixed + _CRC.pack(zlib.crc32(fixed))

    def rows(self) -> int:
        """How many rows, from the first one on, are as they were written. Raises EdgezoError where it is a link."""
        row = 0
        try:
            with self._open() as file:
                whole = (os.fstat(file.fileno()).st_size - len(self.head)) // self.row_bytes
                if file.read(len(self.head)) != self.head:
                    return 0
                for row in range(whole):
                    for number in range(self.blocks + 1):
                        self._piece(file, row, number)
                return max(0, whole)
        except FileNotFoundError:
            return 0
        except DamagedRow:
            return row

    def written(self) -> int:
        """How many whole rows the file would hold by its size; 0 without a file."""
        try:
            return max(0, (self.path.lstat().st_size - len(self.head)) // self.row_bytes)
        except FileNotFoundError:
            return 0

    def keep(self, rows: int) -> None:
        """Cut the file after its first ``rows`` rows; without any it is made anew. Raises EdgezoError."""
        try:
            fd = open_inside(self.path, os.O_RDWR | os.O_CREAT)
            with os.fdopen(fd, "r+b", buffering=0) as file:
                if not rows:
                    file.truncate(0)
                    file.write(self.head)
                file.truncate(len(self.head) + rows * self.row_bytes)
        except OSError as problem:
            raise write_error(self.path, "states for the linear probe", problem) from problem

    def append_arrays(self, states: np.ndarray, losses: np.ndarray, first: int) -> None:
        """Add the states of rows ``first`` and later, (n, blocks, hidden) fp16, and their losses (n,) fp32.

        Raises EdgezoError where the disk is full.
        """
        data = bytearray()
        for row, (of_blocks, loss) in enumerate(zip(states, losses, strict=True)):
            for number, piece in enumerate((*of_blocks, loss)):
                raw = piece.tobytes()
                data += raw + self._crc(raw, first + row, number)
        try:
            with open(open_inside(self.path, os.O_WRONLY | os.O_APPEND), "ab") as file:
                file.write(data)
        except OSError as problem:
            raise write_error(self.path, "states for the linear probe", problem) from problem

    def block_array(self, number: int, rows: int) -> np.ndarray:
        """States of the first ``rows`` rows at one of the blocks, (rows, hidden) fp32. Raises DamagedRow."""
        states = np.empty((rows, self.hidden), np.float32)
        for row, piece in enumerate(self._pieces(number, rows)):
            states[row] = np.frombuffer(piece, np.float16)
        return states

    def losses_array(self, rows: int) -> np.ndarray:
        """Losses of the first ``rows`` rows, (rows,) fp32. Raises DamagedRow."""
        losses = np.empty(rows, np.float32)
        for row, piece in enumerate(self._pieces(self.blocks, rows)):
            losses[row] = np.frombuffer(piece, np.float32)[0]
        return losses

    def _open(self) -> BinaryIO:
        """Open the file for reading. Raises OSError, and EdgezoError where it is a link."""
        return os.fdopen(open_inside(self.path, os.O_RDONLY), "rb", buffering=0)

    def _pieces(self, number: int, rows: int) -> Iterator[bytes]:
        """A piece of each of the first ``rows`` rows, one at a time in memory: a block's states, or the loss."""
        try:
            file = self._open()
        except OSError as problem:
            raise DamagedRow(0) from problem
        with file:
            for row in range(rows):
                yield self._piece(file, row, number)

    def _piece(self, file: BinaryIO, row: int, number: int) -> bytes:
        """One piece, verified. Raises DamagedRow."""
        size = 2 * self.hidden if number < self.blocks else 4
        start = len(self.head) + row * self.row_bytes + number * (2 * self.hidden + _CRC.size)
        try:
            file.seek(start)
            raw = file.read(size + _CRC.size)
        except OSError as problem:
            raise DamagedRow(row) from problem
        if raw[size:] != self._crc(raw[:size], row, number):
            raise DamagedRow(row)
        return raw[:size]

    def _crc(self, raw: bytes, row: int, number: int) -> bytes:
        start = self._start + row * (self.blocks + 1) + number
        return _CRC.pack(zlib.crc32(raw, start & 0xFFFFFFFF))

    @cached_property
    def _start(self) -> int:
        """The CRC in the head. That of the head and its CRC would be the same number for every head."""
        return int(_CRC.unpack(self.head[-_CRC.size :])[0])
