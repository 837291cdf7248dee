"""Overlay files: decoder blocks and embedding tables of a model that does not fit into memory.

They are private copies in the layouts of the store, never the user's checkpoint, and hold nothing that base and
journal do not hold: a file that is damaged or half-written is made again from those. Each begins with one page:

======  ========  ======================================================================
offset  type      field
======  ========  ======================================================================
0       8 bytes   magic ``89 45 5A 4F 0D 0A 1A 0A``
8       u32       format version, 2
12      u32       1 if the data are whole, 0 while they are being written
16      u32       applied_step: the updates of steps 0 to applied_step - 1 are in the data
20      u32       CRC of the data
24      32 bytes  SHA-256 of what the file belongs to: run, tensor names, dtypes, shapes
56      u32       CRC of the bytes before
======  ========  ======================================================================

then the raw tensors, each from the start of a page. A write in place first marks the file as being written, so a
kill at any moment leaves a file that is whole or says that it is not; a power loss that reorders writes shows in
the CRC. CRC is ``zlib.crc32``, of the bytes in their order: exchanged and shifted sectors show as flipped bits do. In
format 1 it was that of the sums of the data's pages, as 64-bit words, in which exchanged words do not show; such a file
of an unfinished run is used by its resume, and has format 2 once it is written.

Reads and writes are plain, into memory that is used again: a mapped file would count as resident.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine import kernels
from edgezo.machine.files import write_error
from edgezo.machine.limits import PAGE_BYTES, QUANTISE_BYTES, tiles
from edgezo.machine.open_files import files_inside, make_folder, open_inside, unlink_inside
from edgezo.weights.home import Damaged, Traffic, parts_of
from edgezo.weights.layouts import Dense, Layout
from edgezo.weights.overlay_names import OVERLAY_MAGIC, OVERLAY_NAMES
from edgezo.zo.noise import Key

if TYPE_CHECKING:
    from edgezo.weights.home import Home, Make

OVERLAY_VERSION = 2
_HEAD_FIELDS = struct.Struct("<8sIIII32s")
_HEAD_CRC = struct.Struct("<I")


class OverlayFile:
    """One file, a ``Home``: a head page and the data. A disk that refuses raises EdgezoError, never OSError."""

    def __init__(self, path: Path, identity: str, layouts: Mapping[str, Layout], traffic: Traffic):
        self.path, self.name, self.traffic = path, str(path), traffic
        self.parts, self.data_bytes = parts_of(layouts)
        contents = [identity, [(p.owner, p.suffix, str(p.dtype), p.shape) for p in self.parts]]
        self._digest = hashlib.sha256(json.dumps(contents).encode()).digest()
        self._fd = -1
        self._version, self._crc = OVERLAY_VERSION, 0

    @property
    def size_bytes(self) -> int:
        return PAGE_BYTES + self.data_bytes

    def open(self) -> int | None:
        """Open for reading and writing, or make the file; its applied step if it is whole and belongs to this run.

        Raises EdgezoError where the file or its folder is a link, or the disk refuses.
        """
        try:
            self._fd = open_inside(self.path, os.O_RDWR | os.O_CREAT, levels=2, mode=0o600)
        except OSError as problem:
            raise write_error(self.path, self.path.name, problem) from problem
        try:
            if os.fstat(self._fd).st_size != self.size_bytes:
                return None
            head = _read(self._fd, bytearray(_HEAD_FIELDS.size + _HEAD_CRC.size), 0)
        except OSError:
            return None
        fixed, crc = bytes(head[: _HEAD_FIELDS.size]), bytes(head[_HEAD_FIELDS.size :])
        if crc != _HEAD_CRC.pack(zlib.crc32(fixed)):
            return None
        magic, self._version, whole, applied, self._crc, digest = _HEAD_FIELDS.unpack(fixed)
        known = magic == OVERLAY_MAGIC and 1 <= self._version <= OVERLAY_VERSION
        return int(applied) if known and whole == 1 and digest == self._digest else None

    def reserve(self) -> None:
        """Give the file its full size on disk now, so that no later write finds the disk full."""
        try:
            os.ftruncate(self._fd, 0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, self.size_bytes)
            else:
                os.ftruncate(self._fd, self.size_bytes)
        except OSError as problem:
            raise write_error(self.path, f"{self.size_bytes:,} bytes", problem) from problem

    def read(self, data: Tensor) -> None:
        """Fill ``data`` (flat uint8, at least data_bytes). Raises Damaged."""
        view = _bytes_of(data, self.data_bytes)
        try:
            _read(self._fd, view, PAGE_BYTES)
        except OSError as problem:
            raise Damaged(str(problem)) from problem
        crc = _crc_of_sums(view) if self._version == 1 else kernels.crc32(view)
        if crc != self._crc:
            raise Damaged("its checksum does not fit")

    def write(self, data: Tensor, applied: int) -> None:
        """Replace the data by ``data``, which has the updates of the first ``applied`` steps."""
        view = _bytes_of(data, self.data_bytes)
        self._version, self._crc = OVERLAY_VERSION, kernels.crc32(view)
        try:
            self.mark(whole=False, applied=0)
            _write(self._fd, view, PAGE_BYTES)
            self.mark(whole=True, applied=applied)
        except OSError as problem:
            raise write_error(self.path, f"{self.data_bytes:,} bytes", problem) from problem

    def mark(self, *, whole: bool, applied: int) -> None:
        """Write the head page. Raises OSError."""
        fixed = _HEAD_FIELDS.pack(
            OVERLAY_MAGIC, self._version, whole, applied, self._crc, self._digest
        )
        _write(self._fd, fixed + _HEAD_CRC.pack(zlib.crc32(fixed)), 0)

    def read_at(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` of the data, with no checksum. Raises Damaged where the file is too short."""
        try:
            _read(self._fd, view, PAGE_BYTES + offset)
        except OSError as problem:
            raise Damaged(str(problem)) from problem
        self.traffic.read_bytes += len(view)

    def write_at(self, view: memoryview, offset: int) -> None:
        """Write ``view`` at ``offset`` of the data, with no checksum."""
        try:
            _write(self._fd, view, PAGE_BYTES + offset)
        except OSError as problem:
            raise write_error(self.path, f"{len(view):,} bytes", problem) from problem
        self.traffic.written_bytes += len(view)

    def close(self) -> None:
        """Close the file. What was written stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _bytes_of(data: Tensor, nbytes: int) -> memoryview:
    return data.numpy().data[:nbytes]


def _crc_of_sums(view: memoryview) -> int:
    """The checksum of format 1: the CRC of the pages' sums of 64-bit words."""
    words = np.frombuffer(view, np.uint64).reshape(-1, PAGE_BYTES // 8)
    return zlib.crc32(np.add.reduce(words, axis=1).tobytes())


def _read(fd: int, into: bytearray | memoryview, offset: int) -> bytearray | memoryview:
    view, at = memoryview(into), 0
    while at < len(view):
        if hasattr(os, "preadv"):
            got = os.preadv(fd, [view[at:]], offset + at)
        else:  # Windows: one thread at a time reads a file, so its position may move
            os.lseek(fd, offset + at, os.SEEK_SET)
            piece = os.read(fd, min(len(view) - at, 1 << 24))
            got = len(piece)
            view[at : at + got] = piece
        if got == 0:
            raise OSError(f"it ends {len(view) - at:,} bytes too early")
        at += got
    return into


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        if hasattr(os, "pwrite"):
            at += os.pwrite(fd, view[at:], offset + at)
        else:
            os.lseek(fd, offset + at, os.SEEK_SET)
            at += os.write(fd, view[at : at + (1 << 24)])


@dataclass
class DiskMedium:
    """The overlay of one run: a directory with a file for each block that does not stay in memory.

    One thread does all reads and writes of blocks, in the order in which they were queued.
    """

    directory: Path
    identity: str  # names the run that the files must belong to
    resident_blocks: int = 0  # so many decoder layers, the first ones, stay in memory
    kind: str = "disk"
    traffic: Traffic = field(default_factory=Traffic)
    _files: list[OverlayFile] = field(default_factory=list)
    _tables: int = 0

    def __post_init__(self) -> None:
        try:
            make_folder(self.directory)
            for name in files_inside(self.directory, OVERLAY_NAMES):
                block = OVERLAY_NAMES.sub(r"\1", name)  # "" for a table
                if block and int(block) < self.resident_blocks:
                    # This layer stays in memory now: its file would be outdated by the time it is needed again.
                    unlink_inside(self.directory, name)
        except OSError as problem:
            raise write_error(self.directory, "the overlay", problem) from problem
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="overlay")

    def home(
        self, name: str, layouts: Mapping[str, Layout], make: Mapping[str, Make]
    ) -> OverlayFile:
        return self._file(name, layouts)

    def _file(self, name: str, layouts: Mapping[str, Layout]) -> OverlayFile:
        file = OverlayFile(self.directory / f"{name}.overlay", self.identity, layouts, self.traffic)
        self._files.append(file)
        return file

    def table(self, vacant: Layout, make: Callable[[slice], Layout]) -> DiskTable:
        file = self._file(f"table-{self._tables}", {"table": vacant})
        self._tables += 1
        file.open()
        on_disk = DiskTable(file, vacant)
        on_disk.fill(make)
        return on_disk

    def slot(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def read(self, home: Home, slot: Tensor) -> Future[None]:
        return self._thread.submit(home.read, slot)

    def write(self, home: Home, slot: Tensor, applied: int) -> Future[None]:
        return self._thread.submit(home.write, slot, applied)

    def close(self) -> None:
        """Wait for the copies that are queued and close the files."""
        self._thread.shutdown(wait=True)
        for file in self._files:
            file.close()


class DiskTable:
    """An embedding table on disk, a ``TrainedLayout``: rows are read and written as they are used.

    The file is made anew at every start, since its rows change in place, one by one. The CRC of each row is kept in
    memory, by its number: a row that changed on disk, or has another's place, is an error and never becomes a weight.
    """

    def __init__(self, file: OverlayFile, vacant: Layout):
        self.file, self._vacant = file, vacant
        self.shape = vacant.shape
        rows = self.shape[0]
        self._sums = {part.suffix: np.zeros(rows, np.uint32) for part in file.parts}

    def fill(self, make: Callable[[slice], Layout]) -> None:
        """Write the table, made some rows at a time. Raises EdgezoError where the disk has no room."""
        self.file.reserve()
        for tile in tiles(*self.shape, QUANTISE_BYTES):
            self._store(tile, make(tile).tensors())

    # -- Layout -------------------------------------------------------------------------------------------

    def expand(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        part, index = self._load(rows)
        return part.expand(index, out)

    def direct(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def nbytes(self) -> int:
        """Bytes that stay in memory: the checksums."""
        return sum(sums.nbytes for sums in self._sums.values())

    def tensors(self) -> dict[str, Tensor]:
        return self._vacant.tensors()

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        raise TypeError("the bytes of a table on disk cannot be replaced")

    # -- as a trained matrix (Dense) ----------------------------------------------------------------------

    def raw(self, rows: slice) -> dict[str, Tensor]:
        return self._load(rows)[0].tensors()

    def read(self, rows: slice | Tensor) -> Tensor:
        part, index = self._load(rows)
        assert isinstance(part, Dense)
        return part.read(index)

    def snap(self, values: Tensor, key: Key, tensor: int, rows: slice | Tensor) -> Tensor:
        assert isinstance(self._vacant, Dense)
        return self._vacant.snap(values, key, tensor, rows)

    def as_read(self, rows: slice | Tensor, values: Tensor) -> Tensor:
        assert isinstance(self._vacant, Dense)
        return self._vacant.as_read(rows, values)

    def grid_step(self, rows: slice | Tensor) -> Tensor | None:
        return None

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        part = self._empty(len(values))
        assert isinstance(part, Dense)
        part.write(slice(0, len(values)), values)
        self._store(rows, part.tensors())

    # -- rows ---------------------------------------------------------------------------------------------

    def _empty(self, rows: int) -> Layout:
        """A layout in memory for ``rows`` rows, with arbitrary values."""
        raw = {s: torch.empty(rows, *t.shape[1:], dtype=t.dtype) for s, t in self.tensors().items()}
        part: Layout = object.__new__(type(self._vacant))
        part.__dict__.update(self._vacant.__dict__)
        part.shape = (rows, self.shape[1])
        part.adopt(raw)
        return part

    def _load(self, rows: slice | Tensor) -> tuple[Layout, slice | Tensor]:
        """A layout in memory that holds ``rows``, and where in it they are. Raises EdgezoError where rows changed."""
        if isinstance(rows, slice):
            runs, count = [(rows.start, rows.stop)], rows.stop - rows.start
            index: slice | Tensor = slice(0, count)
        else:
            unique, index = torch.unique(rows, return_inverse=True)
            runs, count = _runs(unique.numpy()), len(unique)
        part = self._empty(count)
        for suffix, tensor in part.tensors().items():
            self._transfer(suffix, tensor, runs, write=False)
            wanted = np.concatenate([self._sums[suffix][a:b] for a, b in runs])
            if not np.array_equal(wanted, _row_sums(tensor)):
                raise self._damaged("some of its rows have changed")
        return part, index

    def _store(self, rows: slice | Tensor, raw: Mapping[str, Tensor]) -> None:
        """Write the raw tensors of ``rows``, and keep their checksums."""
        if isinstance(rows, slice):
            runs = [(rows.start, rows.stop)]
        else:  # unique, in any order
            rows, order = torch.sort(rows)
            runs = _runs(rows.numpy())
            raw = {suffix: tensor[order] for suffix, tensor in raw.items()}
        for suffix, tensor in raw.items():
            tensor = tensor.contiguous()
            self._transfer(suffix, tensor, runs, write=True)
            sums, at = _row_sums(tensor), 0
            for a, b in runs:
                self._sums[suffix][a:b] = sums[at : at + b - a]
                at += b - a

    def _transfer(
        self, suffix: str, tensor: Tensor, runs: list[tuple[int, int]], *, write: bool
    ) -> None:
        """Move the rows of ``runs`` between ``tensor`` and the file."""
        part = next(p for p in self.file.parts if p.suffix == suffix)
        stride, at = part.nbytes // self.shape[0], 0
        view = tensor.view(torch.uint8).numpy().reshape(-1).data
        for a, b in runs:
            piece = view[at : at + (b - a) * stride]
            at += len(piece)
            offset = part.offset + a * stride
            if write:
                self.file.write_at(piece, offset)
                continue
            try:
                self.file.read_at(piece, offset)
            except Damaged as problem:
                raise self._damaged(str(problem)) from problem

    def _damaged(self, why: str) -> EdgezoError:
        return EdgezoError(
            f"{self.file.path} was changed on disk while it was in use: {why}.\n"
            "It is a copy that is made again at every start, and nothing is lost: give the command again, "
            "with --resume where a run was going."
        )


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Sorted unique rows as [start, stop) runs."""
    if not len(rows):
        return []
    ends = np.flatnonzero(np.diff(rows) != 1)
    starts = [int(rows[0]), *(int(rows[i + 1]) for i in ends)]
    return list(zip(starts, [*(int(rows[i]) + 1 for i in ends), int(rows[-1]) + 1], strict=True))


def _row_sums(tensor: Tensor) -> np.ndarray:
    """(n,) uint32: the CRC of the bytes of each row."""
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return kernels.crc32_rows(flat.reshape(len(tensor), flat.size // max(1, len(tensor))))
