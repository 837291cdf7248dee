"""Where the matrices of a checkpoint go: each into a layout, in memory or in a block that is elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgezo.machine.limits import tiles
from edgezo.network.loader import block_number
from edgezo.weights.layouts import DENSE_DTYPES, Int8, Layout, Rows, place, vacant
from edgezo.zo.axes import ROUNDINGS

if TYPE_CHECKING:
    from torch import Tensor

    from edgezo.weights.home import Make, Medium
    from edgezo.weights.store import WeightStore
    from edgezo.weights.tensor_source import TensorSource


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix of the checkpoint, and what decides its layout."""

    source: TensorSource
    name: str  # in the checkpoint
    precision: str
    rounding: str
    trained: bool
    table: bool  # an embedding
    transpose: bool  # GPT-2's Conv1D

    @property
    def options(self) -> dict[str, Any]:
        return {"table": self.table, "rounding": self.rounding, "trained": self.trained}

    def rows(self) -> Rows:
        """The checkpoint's values: rows of a table as they are asked for, any other matrix whole."""
        return StoredRows(self.source, self.name) if self.table else self._read()

    def start_rows(self) -> Rows:
        """The checkpoint's values, read as they are asked for; of GPT-2's Conv1D whole."""
        return self._read() if self.transpose else StoredRows(self.source, self.name)

    def make(self, rows: slice | None = None) -> Layout:
        """The layout with its bytes, of all rows or of some."""
        # A dense store is read in its dtype, piece by piece; codes are made from the checkpoint's values.
        dtype = DENSE_DTYPES.get(self.precision)
        if dtype is None and self.table and rows is None:
            # The largest tensor is never whole beside its codes.
            plane = self.trained and ROUNDINGS[self.rounding].plane
            return Int8.quantise(self.rows(), plane=plane)
        return place(self._read(dtype, rows), self.precision, **self.options)

    def pieces(self) -> Iterator[tuple[slice, Layout]]:
        """The layout with its bytes, a tile of rows at a time, or all of it where rows cannot be made one by one."""
        shape = self.source.shape(self.name)
        alone = not self.transpose and self.source.by_rows(self.name)
        if not alone or self.precision == "int4":
            yield slice(0, shape[self.transpose]), self.make()
            return
        for rows in tiles(*shape):
            yield rows, self.make(rows)

    def make_rows(self, rows: Sequence[int]) -> Layout:
        """The layout of some rows of a table, in this order, with their bytes."""
        values = torch.cat([self._read(None, slice(row, row + 1)) for row in rows])
        return place(values, self.precision, **self.options)

    def vacant(self) -> Layout:
        """The layout without its bytes."""
        rows, cols = self.source.shape(self.name)
        shape = (cols, rows) if self.transpose else (rows, cols)
        return vacant(shape, self.precision, **self.options)

    def _read(self, dtype: torch.dtype | None = None, rows: slice | None = None) -> Tensor:
        weight = self.source.read(self.name, dtype, rows)
        return weight.T.contiguous() if self.transpose else weight


@dataclass(frozen=True)
class StoredRows:
    """A matrix of a checkpoint, of which rows are read when they are asked for."""

    source: TensorSource
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.name)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.source.read(self.name, None, rows)


class BlocksElsewhere:
    """The last blocks of a model, which get a home on ``medium``, put together one block at a time."""

    def __init__(self, store: WeightStore, medium: Medium, blocks_name: str):
        from edgezo.weights.residency import Residency  # imports accelerate, which costs memory

        self.store, self.medium, self.first = store, medium, medium.resident_blocks
        self.blocks_name = blocks_name
        self.residency = store.residency = Residency(medium, store.catch_up)
        # The block that is being put together, and its matrices.
        self._index = -1
        self._layouts: dict[str, Layout] = {}
        self._make: dict[str, Make] = {}

    def block_of(self, name: str) -> int:
        """The block that a parameter or module belongs to, if that block goes elsewhere; else -1."""
        number = block_number(name, self.blocks_name)
        return -1 if number is None or number < self.first else number

    def layout(self, name: str, stored: StoredMatrix) -> Layout | None:
        """The layout of a matrix that goes elsewhere, vacant if it is a block's; None if it stays in memory."""
        if stored.table:
            return self.medium.table(stored.vacant(), stored.make)
        if self.block_of(name) < 0:
            return None
        self._layouts[name], self._make[name] = stored.vacant(), stored.pieces
        return self._layouts[name]

    def enter(self, index: int) -> None:
        """Begin with block ``index`` (-1: none). The block that was put together before it goes to its home."""
        if index != self._index and self._layouts:
            trainables = self.store.trainables
            trained = [trainables[name] for name in self._layouts if name in trainables]
            for trainable in trained:
                trainable.away = True
            self.residency.block(self._layouts, self._make, trained=bool(trained))
            self._layouts, self._make = {}, {}
        self._index = index
