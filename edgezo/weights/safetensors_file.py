"""Safetensors checkpoints, one file or several with an index, read a piece at a time; and the plain reads for that."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import (
    FETCH_AGAIN,
    MOST_INDEX_BYTES,
    clip,
    parse_json,
    read_json,
    reading,
    refuse_stand_in,
)
from edgezo.weights.file_kinds import folder_advice, refuse_foreign_codes

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
# The limit of the safetensors library itself. A header has a colon in ten bytes at most: more would be no tensors, but
# many small values, which take thirty times their bytes when they are parsed.
_MAX_HEADER_BYTES = 100_000_000
_BYTES_A_FIELD, _FREE_BYTES = 10, 4096
_MOST_AXES = 8
PIECE_ELEMENTS = 1 << 18  # values that are converted at a time


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    size_bytes: int

    def at(self, rows: slice | None) -> _Entry:
        """Where these rows lie; None: all."""
        if rows is None:
            return self
        row_bytes, count = self.size_bytes // max(1, self.shape[0]), rows.stop - rows.start
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            offset=self.offset + rows.start * row_bytes,
            size_bytes=count * row_bytes,
        )


class SafetensorsSource:
    """The tensors (a ``TensorSource``) of ``model.safetensors``, or of the shards that its index names.

    Raises EdgezoError where a file is damaged or missing, and where there are only pickled weights.
    """

    def __init__(self, directory: Path):
        self._entries: dict[str, _Entry] = {}
        self._files = _weight_files(directory)
        for file in self._files:
            for name, entry in _read_safetensors_header(file).items():
                if name in self._entries:
                    other = self._entries[name].file.name
                    raise EdgezoError(
                        f"Tensor {clip(name, 60)!r} is in both {other} and {file.name}."
                    )
                self._entries[name] = entry
        refuse_foreign_codes(self._entries, directory)
        missing = sorted(_indexed_names(directory) - set(self._entries))
        if missing:
            raise EdgezoError(
                f"{directory} is incomplete: {len(missing)} tensors of its index are in no shard "
                f"({', '.join(clip(name, 60) for name in missing[:3])}{', ...' if len(missing) > 3 else ''}). "
                "Fetch it again."
            )

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def files(self) -> list[Path]:
        return self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def stored_type(self, name: str) -> str:
        return SAFETENSORS_NAMES[self._entries[name].dtype]

    def by_rows(self, name: str) -> bool:
        return True

    def nbytes(self, name: str) -> int:
        return self._entries[name].size_bytes

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        entry, what = self._entries[name].at(rows), f"tensor {name!r}"
        out = torch.empty(entry.shape, dtype=dtype or entry.dtype)
        if out.dtype == entry.dtype and entry.size_bytes:
            read_into(entry.file, entry.offset, as_bytes(out), what)
        elif entry.size_bytes:
            flat, width = out.view(-1), entry.dtype.itemsize
            raw = torch.empty(min(out.numel(), PIECE_ELEMENTS), dtype=entry.dtype)
            for first, last in spans(out.numel(), PIECE_ELEMENTS):
                piece = raw[: last - first]
                read_into(entry.file, entry.offset + first * width, as_bytes(piece), what)
                flat[first:last] = piece
        check_finite(out, name, entry.file)
        return out

    def same_bytes(self, first: str, second: str) -> bool:
        a, b = self._entries[first], self._entries[second]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        return equal_ranges(a.file, a.offset, b.file, b.offset, a.size_bytes)


def _weight_files(directory: Path) -> list[Path]:
    """The one file or the shards, all of them there. Raises EdgezoError."""
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    if (directory / "model.safetensors.index.json").is_file():
        shards = [directory / shard for shard in sorted(set(_index(directory).values()))]
        with reading(directory):
            absent = [clip(shard.name, 60) for shard in shards if not shard.is_file()]
        if absent:
            raise EdgezoError(
                f"{directory} lacks {len(absent)} of the {len(shards)} shards of its index "
                f"({', '.join(absent[:3])}). Fetch it again."
            )
        return shards
    raise EdgezoError(
        f"{directory} holds no model.safetensors and no safetensors index, and edgezo loads no pickled weights: "
        f"they can run code.{folder_advice(directory)}"
    )


def _index(directory: Path) -> dict[str, str]:
    """Tensor name -> shard, which lies in the same directory. Raises EdgezoError."""
    path = directory / "model.safetensors.index.json"
    index = read_json(path, MOST_INDEX_BYTES)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise EdgezoError(f"{path} is not a safetensors index: it has no weight_map of names.")
    for shard in names.values():
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise EdgezoError(f"{path} names a shard outside its directory: {clip(shard, 60)!r}.")
    return names


def _indexed_names(directory: Path) -> set[str]:
    if (directory / "model.safetensors").is_file():
        return set()
    return set(_index(directory))


def _read_safetensors_header(file: Path) -> dict[str, _Entry]:
    """The tensors of one file. Raises EdgezoError unless every byte after the header belongs to exactly one of them."""
    with reading(file), open(file, "rb") as stream:
        refuse_stand_in(file)
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise EdgezoError(f"{file} has {size} bytes, too few for safetensors. {FETCH_AGAIN}")
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise EdgezoError(
                f"{file} has {size} bytes but announces a header of {header_bytes}. {FETCH_AGAIN}"
            )
        raw = stream.read(header_bytes)
    with reading(f"{file}: the safetensors header"):
        fields = max(raw.count(b":"), raw.count(b"[") + raw.count(b"{"))
        if _BYTES_A_FIELD * fields > len(raw) + _FREE_BYTES:
            raise ValueError(
                f"it has {fields:,} fields in {len(raw):,} bytes, more than tensors need"
            )
        header = parse_json(raw.decode("utf-8"))
        header.pop("__metadata__", None)
        entries = {
            name: _safetensors_entry(file, name, fields, 8 + header_bytes, size)
            for name, fields in header.items()
        }
    end = 8 + header_bytes
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)
    ):
        if entry.offset != end:
            fault = "overlaps another tensor" if entry.offset < end else "leaves a hole before it"
            where = f"(byte {entry.offset}, not {end})"
            raise EdgezoError(f"{file}: tensor {clip(name, 60)!r} {fault} {where}. {FETCH_AGAIN}")
        end += entry.size_bytes
    if end != size:
        raise EdgezoError(
            f"{file} has {size} bytes, its header describes {end} "
            f"({abs(end - size)} {'missing' if end > size else 'too many'}). {FETCH_AGAIN}"
        )
    return entries


def _safetensors_entry(
    file: Path, name: str, fields: dict[str, Any], start: int, size: int
) -> _Entry:
    """The place of one tensor. ValueError unless all its numbers are within the file's ``size``."""
    what = f"tensor {clip(name, 60)!r}"
    dtype = _SAFETENSORS_DTYPES.get(str(fields["dtype"]))
    if dtype is None:
        raise EdgezoError(
            f"{file}: {what} is stored as {clip(str(fields['dtype']), 20)}, which edgezo does not read: "
            "it holds codes of a quantised model. Give its checkpoint in bf16, fp16 or fp32, which --precision "
            "quantises while it loads, or a GGUF file."
        )
    shape, offsets = fields["shape"], fields["data_offsets"]
    numbers = [*shape, *offsets]
    if len(offsets) != 2 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{what} has a shape or offset that is no whole number")
    if len(shape) > _MOST_AXES or max(numbers) > max(size, 1 << 31):
        raise ValueError(f"{what} has a shape or offset that is larger than the file")
    first, last = offsets
    if math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(
            f"{what} of shape {shape} and dtype {fields['dtype']} cannot have {last - first} bytes"
        )
    return _Entry(file, dtype, tuple(shape), start + first, last - first)


# ----------------------------------------------------------------------------- plain reads


def as_bytes(tensor: Tensor) -> memoryview:
    """A writable view of a contiguous tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_into(file: Path, offset: int, out: memoryview, what: str) -> None:
    """Fill ``out`` from ``offset`` of the file. Raises EdgezoError, which names ``what``, where the file ends early."""
    done = 0
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(offset)
            while done < len(out):
                got = stream.readinto(out[done:])
                if not got:
                    break
                done += got
    except (OSError, OverflowError) as problem:
        raise EdgezoError(f"{file}: {what} cannot be read ({problem}). {FETCH_AGAIN}") from problem
    if done < len(out):
        raise EdgezoError(
            f"{file}: {what} needs {len(out)} bytes from byte {offset}, the file gives {done}. "
            + FETCH_AGAIN
        )


def equal_ranges(file_a: Path, offset_a: int, file_b: Path, offset_b: int, size_bytes: int) -> bool:
    """Whether two ranges of files hold the same bytes. Takes the memory of two pieces of 1 MiB."""
    for start in range(0, size_bytes, 1 << 20):
        length = min(1 << 20, size_bytes - start)
        a, b = bytearray(length), bytearray(length)
        read_into(file_a, offset_a + start, memoryview(a), "a tensor")
        read_into(file_b, offset_b + start, memoryview(b), "a tensor")
        if a != b:
            return False
    return True


def spans(total: int, piece: int) -> Iterator[tuple[int, int]]:
    """``(first, last)`` of consecutive pieces that cover ``range(total)``."""
    for first in range(0, total, piece):
        yield first, min(first + piece, total)


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise EdgezoError if a floating-point tensor holds NaN or Inf. Takes one pass and no temporaries."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # both propagate NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise EdgezoError(
            f"{file}: tensor {name!r} holds values that are not finite as {tensor.dtype} "
            f"(smallest {low.item()}, largest {high.item()}). {FETCH_AGAIN}"
        )
