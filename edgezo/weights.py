"""The weight store: every matrix of the model in its layout, what is trained beside them, and the one mutator.

Nothing but ``WeightStore.apply`` changes a weight. What is trained is a flat table of ``Trainable`` rows, whatever
its kind, so an update is one loop:

    lowrank   A (d_out, rank) fp32 beside a linear, y += A (V x), V = +-1/sqrt(rank) fixed by the seed
    full      the matrix itself (dense layouts), biases and norms as vectors
    norms     norm weights and all biases, fp32 vectors
    scales    one relative gain g per output row of a linear, y = (1 + g) * (W x); folds into quantisation scales
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgezo import noise
from edgezo.directions import Directions, Target
from edgezo.errors import EdgezoError
from edgezo.estimators import Recipe
from edgezo.layouts import CPU, Dense, Layout, tiles
from edgezo.noise import Key

RECIPES_AT_ONCE = 64  # one sweep over the weights for so many past steps

if TYPE_CHECKING:
    from edgezo.overlay import DiskTable
    from edgezo.residency import Residency


@dataclass
class Trainable:
    """One trained tensor: where it lies and which of its rows an update may move."""

    target: Target
    layout: Dense | DiskTable  # a vector is a (rows, 1) matrix
    touched_offset: int | None = (
        None  # rows named by the recipe, numbered from here; None: not by example
    )
    fixed_rows: Tensor | None = (
        None  # only these rows are ever probed (label words of an untied head)
    )
    away: bool = False  # in a block that is elsewhere: updated when it is next bound

    @property
    def values(self) -> Tensor:
        """A vector or factor, which always stays in memory: (rows, cols), the tensor itself."""
        assert isinstance(self.layout, Dense)
        return self.layout.values


@dataclass
class WeightStore:
    """All weights of a model. ``layouts`` holds matrices by parameter name, ``vectors`` the frozen 1-D tensors."""

    seed: int
    rank: int
    directions: Directions
    device: torch.device = CPU
    layouts: dict[str, Layout] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    trainables: dict[str, Trainable] = field(default_factory=dict)
    residency: Residency | None = None  # where there are blocks elsewhere
    # The recipes of steps [first, stop), for a replay and for blocks elsewhere that lack them.
    history: Callable[[int, int], Iterable[Recipe]] | None = None

    def train(
        self,
        name: str,
        layout: Dense | DiskTable,
        *,
        vector: bool = False,
        touched_offset: int | None = None,
        fixed_rows: Tensor | None = None,
    ) -> Trainable:
        """Register ``layout`` as trained under ``name`` and return its row."""
        target = Target(name, layout.shape[0], layout.shape[1], vector)
        row = Trainable(target, layout, touched_offset, fixed_rows)
        self.trainables[name] = row
        return row

    def train_vector(self, name: str, start: Tensor) -> Trainable:
        """Register a 1-D tensor, trained in fp32 from ``start`` (n,)."""
        return self.train(
            name, Dense(start.to(self.device, torch.float32, copy=True).reshape(-1, 1)), vector=True
        )

    def basis(self, name: str, cols: int) -> Tensor:
        """V of a low-rank factor, (rank, cols) fp32 on the CPU: signs over sqrt(rank), a function of the seed alone.

        With this scale sigma * r t^T V has the same Frobenius norm as the full-weight direction sigma * r s^T.
        """
        key, tensor = Key(self.seed, 0), noise.tensor_id(name)
        signs = noise.signs(key, tensor, noise.BASIS, slice(0, self.rank), cols)
        return signs.float() / self.rank**0.5

    @torch.no_grad()
    def apply(self, recipes: Sequence[Recipe]) -> None:
        """Apply consecutive steps' updates, tile by tile; several at once give the same bits as one by one.

        A block that is elsewhere takes them when it is next bound, from ``history``.
        """
        here = [row for row in self.trainables.values() if not row.away]
        self._apply_to(here, recipes)
        if self.residency is not None and recipes:
            self.residency.target = recipes[-1].step + 1

    def catch_up(self, names: Sequence[str], first: int) -> None:
        """Apply the updates from step ``first`` on to matrices of a block that has just been bound."""
        assert self.residency is not None
        rows = [self.trainables[name] for name in names]
        for recipes in self.past(first, self.residency.target):
            self._apply_to(rows, recipes)

    def past(self, first: int, stop: int) -> Iterator[list[Recipe]]:
        """The recipes of steps [first, stop), as many at once as one sweep over the weights takes."""
        assert self.history is not None
        recipes = iter(self.history(first, stop))
        while some := list(islice(recipes, RECIPES_AT_ONCE)):
            yield some

    def _apply_to(self, rows: Sequence[Trainable], recipes: Sequence[Recipe]) -> None:
        live = [r for r in recipes if r.decay or np.any(r.coefficients)]
        coefficients = [torch.from_numpy(r.coefficients).to(self.device) for r in live]
        for row in rows if live else ():
            if row.touched_offset is not None:
                for recipe, c in zip(live, coefficients, strict=True):
                    self._apply_touched(row, recipe, c)
                continue
            for part in _row_sets(row):
                values = row.layout.read(part)
                for recipe, c in zip(live, coefficients, strict=True):
                    values = self._move(row, recipe, c, part, values)
                row.layout.write(part, values)

    def _move(
        self,
        row: Trainable,
        recipe: Recipe,
        coefficients: Tensor,
        rows: slice | Tensor,
        values: Tensor,
        member: Tensor | None = None,
    ) -> Tensor:
        key = Key(self.seed, recipe.step)
        if recipe.decay:
            values.mul_(1.0 - recipe.decay)
        values.sub_(self.directions.weighted_sum(key, row.target, coefficients, rows, member))
        return row.layout.snap(values, key, row.target.id, rows)

    def _apply_touched(self, row: Trainable, recipe: Recipe, coefficients: Tensor) -> None:
        """Embedding tables: example i moves only the rows that it used."""
        assert row.touched_offset is not None
        start, stop = row.touched_offset, row.touched_offset + row.target.rows
        own = [ids[(ids >= start) & (ids < stop)] - start for ids in recipe.touched]
        union = np.unique(np.concatenate(own)) if own else np.empty(0, np.int64)
        for tile in tiles(len(union), row.target.cols):
            rows = union[tile]
            member = torch.from_numpy(np.stack([np.isin(rows, ids) for ids in own])).float()
            member = member.to(self.device)
            index = torch.from_numpy(rows.astype(np.int64)).to(self.device)
            values = row.layout.read(index)
            values = self._move(row, recipe, coefficients, index, values, member)
            row.layout.write(index, values)

    def nbytes(self) -> int:
        held = {id(layout): layout.nbytes() for layout in self.layouts.values()}
        held |= {id(row.layout): row.layout.nbytes() for row in self.trainables.values()}
        return sum(held.values()) + sum(t.nbytes for t in self.vectors.values())

    def saved(self) -> list[Saved]:
        """Everything that training has changed (low-order planes included), wherever its bytes are."""
        return [
            Saved(
                row.target.name + suffix,
                tuple(tensor.shape),
                tensor.dtype,
                functools.partial(self._pieces, row, suffix),
            )
            for row in self.trainables.values()
            for suffix, tensor in row.layout.tensors().items()
        ]

    def _pieces(self, row: Trainable, suffix: str) -> Iterator[Tensor]:
        if row.away:
            assert self.residency is not None
            self.residency.bind_owner(row.target.name)
        for rows in tiles(*row.layout.shape):
            yield row.layout.raw(rows)[suffix]

    def trained_tensors(self) -> dict[str, Tensor]:
        """The same in memory, by name; not for blocks elsewhere."""
        return {
            row.target.name + suffix: tensor
            for row in self.trainables.values()
            for suffix, tensor in row.layout.tensors().items()
        }

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Take the values that ``trained_tensors`` gave in another process. Raises EdgezoError on any mismatch."""
        own = self.trained_tensors()
        for name, held in own.items():
            given = tensors.get(name)
            if given is None or given.shape != held.shape or given.dtype != held.dtype:
                found = "missing" if given is None else f"{tuple(given.shape)} {given.dtype}"
                raise EdgezoError(
                    f"the trained tensor {name} should be {tuple(held.shape)} {held.dtype}, but it is {found}.\n"
                    "The file belongs to another model, precision or --train choice."
                )
            held.copy_(given)


def _row_sets(row: Trainable) -> Iterable[slice | Tensor]:
    if row.fixed_rows is not None:
        return [row.fixed_rows]
    return tiles(row.target.rows, row.target.cols)


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


def saved_sha256(saved: Iterable[Saved]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in name order: equal exactly when every bit is equal."""
    digest = hashlib.sha256()
    for tensor in sorted(saved, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}\n".encode())
        for piece in tensor.bytes():
            digest.update(piece)
    return digest.hexdigest()
