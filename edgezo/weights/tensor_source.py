"""A checkpoint, read one tensor at a time.

A source opens a checkpoint, checks its structure once, and then hands out single tensors in memory of their own, under
the names and in the layout of the Hugging Face module. It uses plain reads only: a mapped file counts towards the
resident memory that ``--max-mem`` bounds.

Formats: a directory with ``model.safetensors``, a sharded one with an index, and GGUF.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edgezo.weights.gguf_file import GgufSource
from edgezo.weights.safetensors_file import SafetensorsSource


class TensorSource(Protocol):
    """The tensors of one checkpoint by Hugging Face name."""

    @property
    def names(self) -> list[str]: ...

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order in which the content hash takes them."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that ``read`` gives; fp32 for a quantised GGUF tensor."""
        ...

    def stored_type(self, name: str) -> str:
        """The type in which the file holds the tensor, by the file format's name: "BF16", "Q4_1"."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor that ``read`` gives."""
        ...

    def by_rows(self, name: str) -> bool:
        """Whether some rows of a tensor can be read without the others."""
        ...

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        """The tensor, or some ``rows`` of it, freshly allocated, in its stored dtype or rounded to ``dtype``.

        It is converted in small pieces: nothing but the result is as large as the tensor. Raises EdgezoError where the
        file is cut short or the tensor holds NaN or Inf.
        """
        ...

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are stored with the same bytes, compared in bounded pieces."""
        ...


def open_tensors(path: Path, config: Any = None) -> TensorSource:
    """The checkpoint at ``path``: a GGUF file or a directory with safetensors.

    A GGUF needs no ``config``: its own metadata says how its tensors are laid out.
    """
    if path.is_file():
        return GgufSource(path)
    return SafetensorsSource(path)


def stored_types(source: TensorSource) -> dict[str, int]:
    """How many values a checkpoint stores in each type ("BF16", "Q4_1"), the most frequent type first."""
    counts: dict[str, int] = {}
    for name in source.names:
        kind = source.stored_type(name)
        counts[kind] = counts.get(kind, 0) + math.prod(source.shape(name))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
