"""One trained tensor: where its values lie, which of its rows may move, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgezo.weights.layouts import Dense, Rows, TrainedLayout
from edgezo.zo.directions import Target, orthonormal


@dataclass
class Trainable:
    """One trained tensor. A vector is a matrix of one column, (rows, 1)."""

    target: Target  # its name and shape, which its directions are drawn from
    layout: TrainedLayout  # its values
    # Embedding tables, in which an example moves only the rows that it used: the number of the table's first row in
    # `Recipe.touched`, which numbers the rows of all tables. None: every step moves every row.
    touched_offset: int | None = None
    # (k,) int64: only these rows are ever perturbed and updated (the label words of an untied head). None: all rows.
    fixed_rows: Tensor | None = None
    away: bool = False  # in a block that is not in memory: updated when the block is next bound
    every_row: bool = False  # a step moves rows too that no example used: momentum does
    least: float | None = None  # no value goes below this
    threshold: float | None = None  # mask `sparse`: only weights smaller in size than this move
    # Opens the checkpoint's matrix. Only of int8 codes that are re-quantised (requantise.py).
    open_base: Callable[[], Rows] | None = None
    # Opens the values that the base has, where weights shrink towards them (--weight-decay-to base); None: towards 0,
    # where what lies beside a matrix begins.
    open_start: Callable[[], Rows] | None = None
    # What directions are made from where seeds alone do not give them, else None. One of:
    guides: dict[int, Tensor] | None = None  # v_i (cols,) of the step being probed, by example slot
    basis: Tensor | None = None  # V^T (k, cols) of a direction for the whole batch, compute dtype
    # (cols, k) fp32: X^T (X V), summed over the inputs X of the step being probed. The next basis is made from it.
    sketch: Tensor | None = None
    # fp32 tensors of the rule, the mask and SVRG's anchor by name: (rows, cols), (rows, rank) or (rows, 1) each.
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def values(self) -> Tensor:
        """(rows, cols), the stored tensor itself: of a vector or a factor, which always stay in memory."""
        assert isinstance(self.layout, Dense)
        return self.layout.values

    def start(self, rows: slice | Tensor) -> Tensor | None:
        """What these rows shrink towards, (n, cols); None: 0."""
        if self.open_start is None:
            return None
        base = self.open_start()
        if isinstance(rows, slice):
            return base[rows]
        return torch.cat([base[slice(row, row + 1)] for row in rows.tolist()])

    def take_guides(self, *, turn_basis: bool) -> Tensor | None:
        """What the directions of this step were made from, which is forgotten here; None where seeds give them.

        (B, cols): v_i of all examples in the order of their slots. (k, cols): the basis of a direction for the whole
        batch. ``turn_basis`` turns it to the inputs of this step by one power iteration (AGZO, arXiv 2601.17261).
        """
        if self.basis is not None:
            basis = self.basis
            if turn_basis and self.sketch is not None and bool(self.sketch.isfinite().all()):
                self.basis = orthonormal(self.sketch).to(basis.dtype)
            self.sketch = None
            return basis
        if self.guides:
            by_slot = torch.stack([self.guides[slot] for slot in sorted(self.guides)])
            self.guides.clear()
            return by_slot
        return None
