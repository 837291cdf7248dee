"""The tensors of a GGUF file under Hugging Face names, in the layout that the Hugging Face module has.

Blocks of low-bit numbers are what ``gguf.quants`` decodes, a bounded number of rows at a time, straight into the
output tensor. What llama.cpp's converter changes is undone per architecture (gguf_config.py): it interleaves the rows
of q and k (``llama``), stores Gemma's norm weights as w + 1, and transposes GPT-2's Conv1D.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import clip
from edgezo.weights.gguf_config import IGNORED_TENSORS, Architecture, architecture_of, head_count
from edgezo.weights.gguf_header import PLAIN_DTYPES, GgufTensor, read_header
from edgezo.weights.safetensors_file import (
    PIECE_ELEMENTS,
    check_finite,
    equal_ranges,
    read_into,
    spans,
)


@dataclass(frozen=True)
class _Arrangement:
    """How one tensor of the file differs from the Hugging Face tensor."""

    heads: int = 0  # the rows of q or k are interleaved in so many heads; 0: they are not
    plus_one: bool = False  # stored as w + 1
    transposed: bool = False


class GgufSource:
    """The tensors of a GGUF file, or of its parts (a ``TensorSource``): F32, F16 and BF16 as stored, blocks as fp32.

    ``piece_elements``: how many values are decoded at a time. Raises EdgezoError for a file that is damaged, or holds
    an architecture or a tensor that edgezo does not know.
    """

    def __init__(self, path: Path, piece_elements: int = PIECE_ELEMENTS):
        self.header = read_header(path)
        self._piece = piece_elements
        self._tensors: dict[str, GgufTensor] = {}
        self._arrangements: dict[str, _Arrangement] = {}
        arch = architecture_of(self.header)
        for tensor in self.header.tensors.values():
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
            stem = match[2] if match else ""
            if match is None or stem not in arch.names:
                if stem in IGNORED_TENSORS:
                    continue
                raise EdgezoError(
                    f"{path}: edgezo does not know the tensor {clip(tensor.name, 60)!r}. "
                    "Use the safetensors checkpoint of this model."
                )
            name = arch.names[stem].format(match[1]) + "." + match[3]
            self._tensors[name] = tensor
            self._arrangements[name] = self._arrangement(arch, stem, tensor)

    def _arrangement(self, arch: Architecture, stem: str, tensor: GgufTensor) -> _Arrangement:
        if arch.permuted and stem in ("attn_q", "attn_k"):
            heads = head_count(self.header, keys=stem == "attn_k")
            if heads < 1 or tensor.shape[0] % (2 * heads):
                raise EdgezoError(
                    f"{self.header.path}: {tensor.name} has {tensor.shape[0]} rows, which do not "
                    f"split into {heads} heads of even width."
                )
            return _Arrangement(heads=heads)
        return _Arrangement(
            plus_one=arch.norm_plus_one and stem.endswith("norm"),
            transposed=stem in arch.transposed and len(tensor.shape) == 2,
        )

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def files(self) -> list[Path]:
        return list(self.header.parts)

    def stored(self, name: str) -> GgufTensor:
        """Where and how the file holds a tensor."""
        return self._tensors[name]

    def by_rows(self, name: str) -> bool:
        """Whether some rows of a tensor can be read without the others."""
        arrangement = self._arrangements[name]
        return not (arrangement.transposed or arrangement.heads)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._tensors[name].shape
        return shape[::-1] if self._arrangements[name].transposed else shape

    def dtype(self, name: str) -> torch.dtype:
        return PLAIN_DTYPES.get(self._tensors[name].type, torch.float32)

    def stored_type(self, name: str) -> str:
        return self._tensors[name].type.name

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        """See ``TensorSource``. ValueError for some rows of a tensor that is not stored row by row."""
        tensor, shape = self._tensors[name], self.shape(name)
        arrangement = self._arrangements[name]
        if rows is not None:
            if arrangement.transposed or arrangement.heads:
                raise ValueError(f"{name} is not stored row by row")
            row_bytes, count = tensor.size_bytes // shape[0], rows.stop - rows.start
            offset = tensor.offset + rows.start * row_bytes
            shape = (count, *shape[1:])
            tensor = replace(tensor, shape=shape, offset=offset, size_bytes=count * row_bytes)
        out = torch.empty(shape, dtype=dtype or self.dtype(name))
        if arrangement.transposed:
            grid = out.T  # rows of the file are columns of the module
        else:
            grid = out.view(_grid(tensor))
        order = _deinterleaved(tensor.shape[0], arrangement.heads) if arrangement.heads else None
        for first, last, values in self._rows(tensor):
            if arrangement.plus_one:
                values = values.float() - 1.0
            place = slice(first, last) if order is None else order[first:last]
            grid[place] = values.to(out.dtype)
        check_finite(out, name, tensor.file)
        return out

    def same_bytes(self, first: str, second: str) -> bool:
        a, b = self._tensors[first], self._tensors[second]
        return (a.type, a.shape) == (b.type, b.shape) and equal_ranges(
            a.file, a.offset, b.file, b.offset, a.size_bytes
        )

    def _rows(self, tensor: GgufTensor) -> Iterator[tuple[int, int, Tensor]]:
        """``(first, last, values)`` over the rows; values is (last - first, columns), as stored or fp32."""
        total, columns = _grid(tensor)
        row_bytes = tensor.size_bytes // total
        raw = bytearray(row_bytes * min(total, max(1, self._piece // columns)))
        for first, last in spans(total, len(raw) // row_bytes):
            piece = memoryview(raw)[: (last - first) * row_bytes]
            offset = tensor.offset + first * row_bytes
            read_into(tensor.file, offset, piece, f"tensor {tensor.name!r}")
            if tensor.type in PLAIN_DTYPES:
                rows = torch.frombuffer(piece, dtype=PLAIN_DTYPES[tensor.type])
            else:
                blocks = np.frombuffer(piece, dtype=np.uint8).reshape(last - first, row_bytes)
                # fp16 scales of a damaged block overflow: check_finite reports the tensor.
                with np.errstate(all="ignore"):
                    rows = torch.from_numpy(dequantize(blocks, tensor.type))
            yield first, last, rows.view(last - first, columns)


def _grid(tensor: GgufTensor) -> tuple[int, int]:
    """(rows, columns) in which a tensor is read. A bias is one column: its rows are those of its matrix."""
    if len(tensor.shape) == 1 and tensor.name.endswith(".bias") and tensor.type in PLAIN_DTYPES:
        return tensor.shape[0], 1
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _deinterleaved(rows: int, heads: int) -> Tensor:
    """(rows,) int64: the Hugging Face row of each stored row.

    Stored as (head, dim/2, 2), wanted as (head, 2, dim/2).
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
