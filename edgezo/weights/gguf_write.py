"""Writing a GGUF file with the ``gguf`` package: its metadata, then one tensor after the other, some rows at a time.

The inverse of gguf_file.py: what llama.cpp's converter changes in tensors is done here (``arranged``), and the names of
architectures and tensors are those of gguf_config.py. The package encodes rows, and writes what stands before the
tensors; it takes tensors whole only, so that their bytes are written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize
from torch import Tensor

from edgezo.weights.gguf_config import Architecture, architectures
from edgezo.weights.gguf_header import PLAIN_DTYPES, GgufArray, GgufHeader
from edgezo.weights.safetensors_file import as_bytes

# Types that the package encodes rows in, by the names of --dtype.
ENCODED = {
    "fp32": GGMLQuantizationType.F32,
    "fp16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
# What llama.cpp calls a file whose matrices are of this type.
FILE_TYPES = {
    "fp32": gguf.LlamaFileType.ALL_F32,
    "fp16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ENCODED_ELEMENTS = 1 << 19  # numbers that are encoded at a time
_WRITABLE = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
)


class Entry(NamedTuple):
    """A value of the metadata."""

    value: Any
    type: GGUFValueType
    of: GGUFValueType | None = None  # the type of the elements of an array


class GgufOut(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]  # in torch order
    type: GGMLQuantizationType
    pieces: Callable[[], Iterable[Tensor | bytes]]  # whole rows, fp32; or bytes as they are stored

    @property
    def size_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


def text(value: str) -> Entry:
    return Entry(value, GGUFValueType.STRING)


def texts(values: list[str]) -> Entry:
    return Entry(values, GGUFValueType.ARRAY, GGUFValueType.STRING)


def number(value: int | float) -> Entry:
    """An unsigned integer, a float or a truth value, as llama.cpp's converter stores it."""
    if isinstance(value, bool):
        return Entry(value, GGUFValueType.BOOL)
    kind = GGUFValueType.UINT32 if isinstance(value, int) else GGUFValueType.FLOAT32
    return Entry(value, kind)


def numbers(values: list[int] | list[float] | list[bool], of: GGUFValueType) -> Entry:
    return Entry(values, GGUFValueType.ARRAY, of)


def entries_of(header: GgufHeader, left_out: tuple[str, ...]) -> dict[str, Entry]:
    """The metadata of a file that begin with none of ``left_out``, to be written again."""
    entries = {}
    for key, value in header.metadata.items():
        if key.startswith(left_out):
            continue
        raw = header.entry(key)
        at = 8 + len(key.encode())
        kind = GGUFValueType(int.from_bytes(raw[at : at + 4], "little"))
        of = None
        if kind is GGUFValueType.ARRAY:
            of = GGUFValueType(int.from_bytes(raw[at + 4 : at + 8], "little"))
            if isinstance(value, GgufArray):
                value = header.texts(key) if of is GGUFValueType.STRING else header.numbers(key)
        entries[key] = Entry(value, kind, of)
    return entries


def stem_of(arch: Architecture, name: str) -> str | None:
    """The GGUF name of a Hugging Face parameter; None where the architecture has no place for it."""
    module, _, end = name.rpartition(".")
    for stem, pattern in arch.names.items():
        if "{}" not in pattern:
            if module == pattern:
                return f"{stem}.{end}"
            continue
        before, _, after = pattern.partition("{}")
        block = module[len(before) : len(module) - len(after)]
        if block.isdecimal() and module == pattern.format(block):
            return f"blk.{block}.{stem}.{end}"
    return None


def architecture_for(model_type: str) -> tuple[str, Architecture] | None:
    """llama.cpp's name and the table of a model type of transformers; None where there is no such architecture."""
    wanted = {"mistral": "llama"}.get(model_type, model_type)
    return next(((n, a) for n, a in architectures().items() if a.model_type == wanted), None)


def in_heads(pieces: Iterable[Tensor], rows_of_head: int) -> Iterator[Tensor]:
    """Rows of q or k (or of the factors beside them) as they are stored: those of each head interleaved.

    ``pieces`` are consecutive rows (n, cols) or values (n,). (head, 2, dim/2) becomes (head, dim/2, 2).
    """
    rest: Tensor | None = None
    for piece in pieces:
        piece = piece if rest is None else torch.cat([rest, piece])
        whole = len(piece) // rows_of_head * rows_of_head
        rest = piece[whole:]
        if whole:
            split = piece[:whole].view(-1, 2, rows_of_head // 2, *piece.shape[1:])
            yield split.transpose(1, 2).reshape(whole, *piece.shape[1:])


def type_for(
    wanted: GGMLQuantizationType, shape: tuple[int, ...]
) -> tuple[GGMLQuantizationType, bool]:
    """The type that a changed matrix is stored in, and whether it is the wanted one.

    A type that the package cannot encode becomes Q8_0, and blocks that do not divide a row F16.
    """
    for kind in (wanted, GGMLQuantizationType.Q8_0):
        if kind in _WRITABLE and shape[-1] % GGML_QUANT_SIZES[kind][0] == 0:
            return kind, kind == wanted
    return GGMLQuantizationType.F16, False


def write_gguf(
    path: Path, architecture: str, entries: Mapping[str, Entry], tensors: Iterable[GgufOut]
) -> None:
    """Write a new GGUF file. Raises OSError."""
    tensors = list(tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, entry in entries.items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, entry.value, entry.type, entry.of)
    for tensor in tensors:
        kind = np.dtype(np.float32)  # with it the shape is taken in elements
        writer.add_tensor_info(
            tensor.name, tensor.shape, kind, tensor.size_bytes, raw_dtype=tensor.type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for tensor in tensors:
            start = file.tell()
            for piece in tensor.pieces():
                file.writelines([piece] if isinstance(piece, bytes) else _parts(piece, tensor.type))
            size = file.tell() - start
            if size != tensor.size_bytes:
                raise ValueError(f"{tensor.name} has {size} bytes, not {tensor.size_bytes}")
            writer.write_padding(file, size)
    finally:
        writer.close()


def _parts(rows: Tensor, kind: GGMLQuantizationType) -> Iterator[bytes | memoryview]:
    """``encoded``, a few rows at a time where the package encodes them: it makes several copies."""
    if kind in PLAIN_DTYPES:
        yield encoded(rows, kind)
        return
    cols = rows.shape[-1] if rows.dim() > 1 else 1
    for part in rows.split(max(1, _ENCODED_ELEMENTS // cols)):
        yield encoded(part, kind)


def encoded(rows: Tensor, kind: GGMLQuantizationType) -> bytes | memoryview:
    """Rows (n, cols) or values (n,) as they are stored in ``kind``."""
    if kind in PLAIN_DTYPES:
        return as_bytes(rows.to(PLAIN_DTYPES[kind]).contiguous())
    return bytes(quantize(rows.float().contiguous().numpy(), kind).tobytes())
