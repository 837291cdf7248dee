"""The header of a GGUF file, or of all its parts: its metadata, and the table of its tensors.

It is parsed here with bounded plain reads: the ``gguf`` package's reader makes one mapped array per vocabulary entry
(7 s and 170 MB for 49,152 tokens). Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A large model is published in parts, ``NAME-00001-of-00003.gguf``: the first has the metadata, each has some tensors.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import FAULTS, clip, reading, reason, refuse_stand_in
from edgezo.weights.file_kinds import GGUF_MAGIC, PART_NAME, file_advice

# How tensors may be stored: as numbers of a torch dtype, or in blocks that ``gguf.quants`` decodes to fp32.
PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
BLOCK_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
_READABLE = {int(kind): kind for kind in (*PLAIN_DTYPES, *BLOCK_TYPES)}

# Types of metadata values: numbers with their struct codes, strings and arrays.
_NUMBERS = dict(zip(range(8), ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"), strict=True))
_NUMBERS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
MOST_KEPT_VALUES = 1024  # of an array of numbers; no setting of a model has more
# The least that one entry takes in a file: a key and its type and value, a tensor, a text of an array.
_LEAST_VALUE_BYTES, _LEAST_TENSOR_BYTES, _LEAST_TEXT_BYTES = 13, 32, 8


_MOST_PARTS = 1000


@dataclass(frozen=True)
class GgufTensor:
    """One entry of a tensor table; ``shape`` is in torch order (slowest axis first)."""

    file: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    size_bytes: int


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata that is not kept: a vocabulary, its scores, its merges."""

    count: int
    start: int = field(default=0, compare=False)  # where its elements lie in the file
    end: int = field(default=0, compare=False)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table. Of an array of strings, and of a long one of numbers, only the place is kept."""

    path: Path  # the file with the metadata
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    entries: dict[str, tuple[int, int]]  # where a key with its type and value lies in the file
    parts: tuple[Path, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture; "" where the file has none."""
        return str(self.metadata.get("general.architecture", ""))

    def texts(self, key: str) -> list[str]:
        """The strings of an array of the metadata; [] where there is none."""
        array = self.metadata.get(key)
        if not isinstance(array, GgufArray):
            return []
        with reading(self.path), open(self.path, "rb") as stream:
            stream.seek(array.start)
            raw = stream.read(array.end - array.start)
            texts, at = [], 0
            for _ in range(array.count):
                (length,) = struct.unpack_from("<Q", raw, at)
                texts.append(raw[at + 8 : at + 8 + length].decode("utf-8"))
                at += 8 + length
        return texts

    def numbers(self, key: str) -> list[int]:
        """The numbers of an array of the metadata, however long; [] where there is none."""
        if not isinstance(self.metadata.get(key), GgufArray | list):
            return []
        raw = self.entry(key)
        at = 8 + len(key.encode()) + 4  # after the key with its length, and the type
        element, count = struct.unpack_from("<IQ", raw, at)
        if element not in _NUMBERS:
            return []
        return list(struct.unpack_from(f"<{count}{_NUMBERS[element][1]}", raw, at + 12))

    def entry(self, key: str) -> bytes:
        """The bytes of a key with its type and value."""
        start, end = self.entries[key]
        with reading(self.path), open(self.path, "rb") as stream:
            stream.seek(start)
            return stream.read(end - start)


class _Cursor:
    """Bounded reads of the header: no length in the file is believed before it is checked."""

    def __init__(self, stream: BinaryIO, path: Path):
        self._stream = stream
        self._path = path
        self.size = path.stat().st_size
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.fault(f"needs {count} more bytes")
        self.position += count
        return self._stream.read(count)

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def skip(self, count: int) -> None:
        """Pass over ``count`` bytes."""
        if count > self.size - self.position:
            raise self.fault(f"needs {count} more bytes")
        self._stream.seek(count, os.SEEK_CUR)
        self.position += count

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """EdgezoError where so many of ``what``, of at least ``least_bytes`` each, have no room in the file."""
        if count > (self.size - self.position) // least_bytes:
            raise self.fault(f"announces {count} {what}, more than have room")

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.fault(f"holds a value of unknown type {kind}")
        element, count = self.number("<I"), self.number("<Q")
        if element == _STRING:
            self.check_count(count, _LEAST_TEXT_BYTES, "texts")
            start = self.position
            for _ in range(count):
                self.take(self.number("<Q"))
            return GgufArray(count, start, self.position)
        if element not in _NUMBERS:
            raise self.fault(f"holds an array of unknown type {element}")
        layout = _NUMBERS[element]
        size = struct.calcsize(layout)
        self.check_count(count, size, "numbers")
        if count > MOST_KEPT_VALUES:
            start = self.position
            self.skip(count * size)
            return GgufArray(count, start, self.position)
        return list(struct.unpack(f"<{count}{layout[1]}", self.take(count * size)))

    def fault(self, what: str) -> EdgezoError:
        return EdgezoError(
            f"{self._path}: the GGUF header {what} at byte {self.position} of {self.size}. "
            "The file is damaged or incomplete: fetch it again."
        )


def read_header(path: Path) -> GgufHeader:
    """Parse and check the header of a GGUF file (version 2 or 3, little-endian), or of all its parts.

    Raises EdgezoError for another format, a damaged or truncated file, tensors stored in a type that is not read, and
    parts that are not there or do not belong together.
    """
    first = _read_part(path)
    number, count = (first.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
    if type(count) is not int or count < 2:
        return first
    parts = _parts(path, number, count)
    headers = [first if part == path else _read_part(part) for part in parts]
    tensors: dict[str, GgufTensor] = {}
    for place, header in enumerate(headers):
        if (header.metadata.get("split.no"), header.metadata.get("split.count")) != (place, count):
            raise EdgezoError(
                f"{header.path} is not part {place + 1} of {count}, as its name says. Fetch the parts again."
            )
        for name in tensors.keys() & header.tensors.keys():
            raise EdgezoError(
                f"{header.path} holds tensor {clip(name, 60)!r}, as an earlier part does."
            )
        tensors |= header.tensors
    total = headers[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise EdgezoError(
            f"the {count} parts of {parts[0]} hold {len(tensors)} tensors, not {total} as they say. "
            "Fetch the parts again."
        )
    return replace(headers[0], tensors=tensors, parts=tuple(parts))


def _parts(path: Path, number: Any, count: int) -> list[Path]:
    """The files of a model in ``count`` parts, by the name of one. Raises EdgezoError where some are not there."""
    name = PART_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count or count > _MOST_PARTS:
        raise EdgezoError(
            f"{path} is part {number} of {count} of a model (parts are counted from 0), but its name does not end in "
            f"-00001-of-{count:05}.gguf, by which the other parts are found.\n"
            "Give the parts their names back, or make one file of them: llama-gguf-split --merge FIRST-PART OUT."
        )
    parts = [path.with_name(f"{name['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise EdgezoError(
            f"{path} is one of {count} parts of a model, of which {len(missing)} are not beside it: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}.\nFetch them into {path.parent}."
        )
    return parts


def _read_part(path: Path) -> GgufHeader:
    with reading(path), open(path, "rb", buffering=1 << 18) as stream:
        cursor = _Cursor(stream, path)
        try:
            return _parse(cursor, path)
        except FAULTS as problem:
            raise cursor.fault(f"cannot be read ({reason(problem)})") from problem


def _parse(cursor: _Cursor, path: Path) -> GgufHeader:
    refuse_stand_in(path)
    if cursor.size and cursor.take(len(GGUF_MAGIC)) != GGUF_MAGIC:
        raise EdgezoError(f"{path} is not a GGUF file: {file_advice(path)}")
    version, tensor_count, value_count = (cursor.number(code) for code in ("<I", "<Q", "<Q"))
    if version not in (2, 3):
        raise EdgezoError(f"{path} is GGUF version {version}; edgezo reads versions 2 and 3.")
    metadata: dict[str, Any] = {}
    entries: dict[str, tuple[int, int]] = {}
    cursor.check_count(value_count, _LEAST_VALUE_BYTES, "values")
    for _ in range(value_count):
        start = cursor.position
        key = cursor.text()
        if key in metadata:
            raise cursor.fault(f"holds the key {clip(key, 60)!r} twice")
        metadata[key] = cursor.value(cursor.number("<I"))
        entries[key] = start, cursor.position
    table = []
    cursor.check_count(tensor_count, _LEAST_TENSOR_BYTES, "tensors")
    for _ in range(tensor_count):
        name, axes = cursor.text(), cursor.number("<I")
        if not 1 <= axes <= 4:
            raise cursor.fault(f"gives tensor {clip(name, 60)!r} {axes} axes")
        shape = tuple(reversed([cursor.number("<Q") for _ in range(axes)]))
        if (
            not 0 < min(shape) <= max(shape) <= 8 * cursor.size
        ):  # the least that a value takes is two bits
            raise cursor.fault(f"gives tensor {clip(name, 60)!r} the shape {list(shape)}")
        table.append((name, shape, cursor.number("<I"), cursor.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fault(f"gives an alignment of {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = _checked(cursor, path, table, start)
    return GgufHeader(path, metadata, tensors, entries, (path,))


def _checked(
    cursor: _Cursor, path: Path, table: list[tuple[str, tuple[int, ...], int, int]], start: int
) -> dict[str, GgufTensor]:
    """Tensors by name, from (name, shape, number of the type, offset after ``start``); none overlap, all are there."""
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in table:
        if name in tensors:
            raise cursor.fault(f"holds tensor {clip(name, 60)!r} twice")
        kind = _tensor_type(path, name, number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise cursor.fault(
                f"gives tensor {clip(name, 60)!r} rows of {shape[-1]}, no multiple of {block}"
            )
        size = math.prod(shape) // block * block_bytes
        tensors[name] = GgufTensor(path, name, kind, shape, start + offset, size)
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.size_bytes)):
        if tensor.offset < end:
            raise cursor.fault(f"lets tensor {clip(tensor.name, 60)!r} overlap another one")
        end = tensor.offset + tensor.size_bytes
        if end > cursor.size:
            raise EdgezoError(
                f"{path} has {cursor.size} bytes, tensor {clip(tensor.name, 60)!r} ends at byte {end}. "
                "The file is damaged or incomplete: fetch it again."
            )
    return tensors


def _tensor_type(path: Path, name: str, number: int) -> GGMLQuantizationType:
    if number in _READABLE:
        return _READABLE[number]
    try:
        stored_as = GGMLQuantizationType(number).name
    except ValueError:
        stored_as = f"number {number}"
    raise EdgezoError(
        f"{path}: tensor {clip(name, 60)!r} is stored as {stored_as}; edgezo reads "
        + ", ".join(kind.name for kind in _READABLE.values())
        + "."
    )
