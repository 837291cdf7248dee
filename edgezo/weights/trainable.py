"""One trained tensor, and the tensors that a file keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from edgezo.weights.layouts import Dense, Rows, TrainedLayout
from edgezo.zo.directions import Target


@dataclass
class Trainable:
    """One trained tensor: where it lies and which of its rows an update may move."""

    target: Target
    layout: TrainedLayout  # a vector is a (rows, 1) matrix
    touched_offset: int | None = (
        None  # rows named by the recipe, numbered from here; None: not by example
    )
    fixed_rows: Tensor | None = (
        None  # only these rows are ever probed (label words of an untied head)
    )
    away: bool = False  # in a block that is elsewhere: updated when it is next bound
    least: float | None = None  # no value goes below
    threshold: float | None = None  # of a sparse mask
    base: Callable[[], Rows] | None = None  # of codes that are anchored: the checkpoint's matrix
    # v_i by slot, of the step that is being probed; None where directions come from seeds alone.
    guides: dict[int, Tensor] | None = None
    basis: Tensor | None = None  # V^T (k, cols) of a shared direction, in the compute dtype
    sketch: Tensor | None = None  # (cols, k) fp32: what this step's inputs make of it
    # Of the rule, the mask and an anchor: (rows, cols) fp32 each, or (rows, rank) in a basis, or (rows, 1).
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def values(self) -> Tensor:
        """A vector or factor, which always stays in memory: (rows, cols), the tensor itself."""
        assert isinstance(self.layout, Dense)
        return self.layout.values


class Saved(NamedTuple):
    """One trained tensor to be hashed or written, a bounded piece of rows at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]

    @staticmethod
    def of(name: str, tensor: Tensor) -> Saved:
        return Saved(name, tuple(tensor.shape), tensor.dtype, lambda: [tensor])

    def bytes(self) -> Iterator[memoryview]:
        for piece in self.pieces():
            yield piece.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
