"""States of rows at a model's cut, kept on disk, as numpy arrays. kept_states.py has the format, and tensors."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgezo.data.batches import PackedRows
from edgezo.errors import EdgezoError
from edgezo.machine.files import write_error
from edgezo.machine.kernel_library import crc32
from edgezo.machine.open_files import locked, make_folder, open_inside, unlink_inside

KEPT_MAGIC = b"\x89EZK\r\n\x1a\n"
KEPT_VERSION = 1
_KEPT_HEAD = struct.Struct("<8sII32s")
_SUM = struct.Struct("<I")
_KEPT_ROW = struct.Struct("<16sII")  # digest, tokens, CRC of the data
_KEPT_ROW_BYTES = _KEPT_ROW.size + _SUM.size
KEPT_HEAD_BYTES = _KEPT_HEAD.size + _SUM.size
CODES, SCALE_BYTES = 127, 4  # of int8 states


class FormOfStates(Protocol):
    """How a state is kept."""

    @property
    def name(self) -> str: ...

    def row_bytes(self, tokens: int, hidden: int) -> int:
        """Bytes of the states of so many tokens."""
        ...

    def pack(self, states: Any) -> np.ndarray:
        """States (n, hidden) as bytes, flat uint8."""
        ...


class PlainStateForm(NamedTuple):
    """How a state is kept, from and to fp32 arrays."""

    name: str
    value_bytes: int
    scaled: bool = False  # codes, with a scale for each token

    def row_bytes(self, tokens: int, hidden: int) -> int:
        """Bytes of the states of so many tokens."""
        return tokens * (hidden * self.value_bytes + (SCALE_BYTES if self.scaled else 0))

    def pack(self, states: np.ndarray) -> np.ndarray:
        """States (n, hidden) fp32 as bytes, flat uint8."""
        if self.scaled:
            scale = np.abs(states).max(1, keepdims=True) / np.float32(CODES)
            codes = np.round(states / np.maximum(scale, np.finfo(np.float32).tiny))
            return np.concatenate([_flat(codes.astype(np.int8)), _flat(scale)])
        if self.value_bytes == 4:
            return _flat(states)
        bits = np.ascontiguousarray(states).view(np.uint32)
        # To the nearest bf16, of two to the even one.
        return _flat(((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16))

    def unpack(self, raw: bytearray, tokens: int, hidden: int) -> np.ndarray:
        """The states (tokens, hidden) fp32 that ``raw`` holds."""
        count = tokens * hidden
        if self.scaled:
            codes = np.frombuffer(raw, np.int8, count).reshape(tokens, hidden)
            scale = np.frombuffer(raw, np.float32, tokens, count)
            return np.asarray(codes * scale[:, None], np.float32)
        if self.value_bytes == 4:
            return np.frombuffer(raw, np.float32, count).reshape(tokens, hidden)
        bits = np.frombuffer(raw, np.uint16, count).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tokens, hidden)


def _flat(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


PLAIN_STATE_FORMS = {
    form.name: form
    for form in (
        PlainStateForm("fp32", 4),
        PlainStateForm("bf16", 2),
        PlainStateForm("int8", 1, scaled=True),
    )
}


def digest_of(ids: np.ndarray, parents: Sequence[int] = ()) -> bytes:
    """What a row is known by: a digest of its tokens, and of their ``parents`` where it is a tree, 16 bytes."""
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=16)
    if len(parents):
        digest.update(np.array(parents, "<i4").tobytes())
    return digest.digest()


def row_digests(batch: PackedRows) -> list[bytes]:
    """The digests of a batch's rows."""
    digests, start = [], 0
    for length, tree in zip(batch.lengths, batch.trees, strict=True):
        parents = () if tree is None else tree.parents
        digests.append(digest_of(batch.ids[start : start + length], parents))
        start += length
    return digests


@dataclass
class PlainStatesFile:
    """One file of states. Raises EdgezoError, never OSError, where the disk refuses."""

    path: Path
    hidden: int
    form: FormOfStates
    identity: str
    damaged: int = field(default=0, init=False)  # rows that ``open`` has found changed
    _fd: int = field(default=-1, init=False)
    _begin: int = field(default=0, init=False)  # where the rows of this process begin,
    _end: int = field(default=0, init=False)  # and where the next one does
    # Of all rows: the first 8 bytes of the digest, and where the row begins.
    _keys: array[int] = field(default_factory=lambda: array("Q"), init=False)
    _places: array[int] = field(default_factory=lambda: array("Q"), init=False)
    _sorted: tuple[np.ndarray, np.ndarray] = field(init=False)

    # -- opening ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the file, or make it, and read every row that it holds: what is damaged is as if it were not there.

        Raises EdgezoError where another process writes it, where it is a link, or the disk refuses.
        """
        try:
            make_folder(self.path.parent)
            self._fd = open_inside(self.path, os.O_RDWR | os.O_CREAT, levels=2, mode=0o600)
            if not locked(self._fd):
                raise EdgezoError(
                    f"another run is computing the states in {self.path}.\n"
                    "Begin again when it has done that, or give --states none."
                )
            if os.pread(self._fd, KEPT_HEAD_BYTES, 0) != self._head:
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, self._head, 0)
            self._scan()
            self._sort()
        except OSError as problem:
            raise write_error(self.path, "states of rows", problem) from problem

    @property
    def _head(self) -> bytes:
        digest = hashlib.sha256(f"{self.identity} {self.form.name}".encode()).digest()
        fixed = _KEPT_HEAD.pack(KEPT_MAGIC, KEPT_VERSION, self.hidden, digest)
        return fixed + _SUM.pack(zlib.crc32(fixed))

    def _scan(self) -> None:
        """Take in all rows from the first one on, and cut the file after the last that can be told."""
        size, self._end = os.fstat(self._fd).st_size, KEPT_HEAD_BYTES
        while (row := self._row_at(self._end)) is not None:
            digest, tokens, crc = row
            length = self.form.row_bytes(tokens, self.hidden)
            if self._end + _KEPT_ROW_BYTES + length > size:
                break
            data = os.pread(self._fd, length, self._end + _KEPT_ROW_BYTES)
            if crc32(memoryview(data)) == crc:
                self._add(digest, self._end)
            else:
                self.damaged += 1
            self._end += _KEPT_ROW_BYTES + length
        self.damaged += self._end < size
        os.ftruncate(self._fd, self._end)
        self._begin = self._end

    def _row_at(self, place: int) -> tuple[bytes, int, int] | None:
        """Digest, tokens and CRC of the row that begins there; None where there is none."""
        raw = os.pread(self._fd, _KEPT_ROW_BYTES, place)
        if (
            len(raw) < _KEPT_ROW_BYTES
            or _SUM.pack(zlib.crc32(raw[: _KEPT_ROW.size])) != raw[_KEPT_ROW.size :]
        ):
            return None
        return _KEPT_ROW.unpack(raw[: _KEPT_ROW.size])

    def _add(self, digest: bytes, place: int) -> None:
        self._keys.append(int.from_bytes(digest[:8], "little"))
        self._places.append(place)

    # -- writing ------------------------------------------------------------------------------------------

    def append(self, digests: Sequence[bytes], states: Sequence[Any]) -> None:
        """Add rows, each with its states (n, hidden). They are found after ``finish``.

        Raises EdgezoError where the disk is full; then nothing is left of what this process has added.
        """
        begin, rows, places = self._end, bytearray(), []
        for digest, of_row in zip(digests, states, strict=True):
            data = self.form.pack(of_row)
            fixed = _KEPT_ROW.pack(digest, len(of_row), crc32(data))
            places.append(begin + len(rows))
            rows += fixed + _SUM.pack(zlib.crc32(fixed)) + data.tobytes()
        written = 0
        try:
            while written < len(rows):
                written += os.pwrite(self._fd, memoryview(rows)[written:], begin + written)
        except OSError as problem:
            os.ftruncate(self._fd, self._begin)
            self._end = self._begin
            raise write_error(self.path, f"{len(rows):,} bytes of states", problem) from problem
        self._end = begin + len(rows)
        for digest, place in zip(digests, places, strict=True):
            self._add(digest, place)

    def finish(self) -> None:
        """Make what was added durable, and let other processes open the file."""
        self._sort()
        try:
            os.fsync(self._fd)
            os.utime(self._fd)  # files that were used long ago are removed first
            reading = open_inside(self.path, os.O_RDONLY, levels=2)
        except OSError as problem:
            raise write_error(self.path, "states of rows", problem) from problem
        os.close(self._fd)
        self._fd = reading

    def close(self) -> None:
        """Close the file, and remove it if it has no rows."""
        if self._fd >= 0:
            if self._end <= KEPT_HEAD_BYTES:
                with suppress(OSError):
                    unlink_inside(self.path.parent, self.path.name)
            os.close(self._fd)
            self._fd = -1

    # -- reading ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def size_bytes(self) -> int:
        return self._end

    def holds(self, digest: bytes) -> bool:
        """Whether the states of a row were here when the file was opened, or at ``finish``."""
        return self._place(digest) is not None

    def _sort(self) -> None:
        keys, places = (np.array(values, np.uint64) for values in (self._keys, self._places))
        order = np.argsort(keys, kind="stable")  # of rows that are alike the first one counts
        self._sorted = keys[order], places[order]

    def _place(self, digest: bytes) -> int | None:
        keys, places = self._sorted
        key = np.uint64(int.from_bytes(digest[:8], "little"))
        at = int(np.searchsorted(keys, key))
        return int(places[at]) if at < len(keys) and keys[at] == key else None

    def read_raw(self, digest: bytes, tokens: int) -> bytearray | None:
        """The data of a row of so many tokens; None where it is not here.

        Raises EdgezoError where they are not as they were written.
        """
        place = self._place(digest)
        if place is None:
            return None
        length = self.form.row_bytes(tokens, self.hidden)
        raw = bytearray(_KEPT_ROW_BYTES + length)
        try:
            read = os.preadv(self._fd, [raw], place)
        except OSError as problem:
            raise self._changed(str(problem)) from problem
        written, kept, crc = _KEPT_ROW.unpack(bytes(raw[: _KEPT_ROW.size]))
        data = raw[_KEPT_ROW_BYTES:]
        whole = read == len(raw) and (written, kept) == (digest, tokens)
        if not whole or crc32(memoryview(data)) != crc:
            raise self._changed("their checksum does not fit")
        return data

    def _changed(self, why: str) -> EdgezoError:
        return EdgezoError(
            f"states of a row in {self.path} have changed since the run began ({why}).\n"
            "Go on with --resume, which computes them again."
        )
