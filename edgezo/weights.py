"""The weight store: every matrix of the model in its layout, what is trained beside them, and the one mutator.

Nothing but ``WeightStore.apply`` changes a weight. What is trained is a flat table of ``Trainable`` rows, whatever
its kind, so an update is one loop:

    lowrank   A (d_out, rank) fp32 beside a linear, y += A (V x), V = +-1/sqrt(rank) fixed by the seed
    full      the matrix itself (dense layouts), biases and norms as vectors
    norms     norm weights and all biases, fp32 vectors
    scales    one relative gain g per output row of a linear, y = (1 + g) * (W x); folds into quantisation scales
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgezo import noise
from edgezo.directions import Directions, Target
from edgezo.errors import EdgezoError
from edgezo.estimators import Recipe
from edgezo.layouts import Dense, Layout, tiles
from edgezo.noise import Key


@dataclass
class Trainable:
    """One trained tensor: where it lies and which of its rows an update may move."""

    target: Target
    layout: Dense  # a vector is a (rows, 1) matrix
    touched_offset: int | None = (
        None  # rows named by the recipe, numbered from here; None: not by example
    )
    fixed_rows: Tensor | None = (
        None  # only these rows are ever probed (label words of an untied head)
    )


@dataclass
class WeightStore:
    """All weights of a model. ``layouts`` holds matrices by parameter name, ``vectors`` the frozen 1-D tensors."""

    seed: int
    rank: int
    directions: Directions
    layouts: dict[str, Layout] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    trainables: dict[str, Trainable] = field(default_factory=dict)

    def train(
        self,
        name: str,
        layout: Dense,
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
        return self.train(name, Dense(start.float().reshape(-1, 1).clone()), vector=True)

    def basis(self, name: str, cols: int) -> Tensor:
        """V of a low-rank factor, (rank, cols) fp32: signs over sqrt(rank), a function of the seed alone.

        With this scale sigma * r t^T V has the same Frobenius norm as the full-weight direction sigma * r s^T.
        """
        key, tensor = Key(self.seed, 0), noise.tensor_id(name)
        signs = noise.signs(key, tensor, noise.BASIS, slice(0, self.rank), cols)
        return signs.float() / self.rank**0.5

    @torch.no_grad()
    def apply(self, recipes: Sequence[Recipe]) -> None:
        """Apply consecutive steps' updates, tile by tile; several at once give the same bits as one by one."""
        live = [r for r in recipes if r.decay or np.any(r.coefficients)]
        coefficients = [torch.from_numpy(r.coefficients) for r in live]
        for row in self.trainables.values() if live else ():
            if row.touched_offset is not None:
                for recipe, c in zip(live, coefficients, strict=True):
                    self._apply_touched(row, recipe, c)
                continue
            for rows in _row_sets(row):
                values = row.layout.read(rows)
                for recipe, c in zip(live, coefficients, strict=True):
                    values = self._move(row, recipe, c, rows, values)
                row.layout.write(rows, values)

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
            index = torch.from_numpy(rows.astype(np.int64))
            values = row.layout.read(index)
            values = self._move(row, recipe, coefficients, index, values, member)
            row.layout.write(index, values)

    def nbytes(self) -> int:
        held = {id(layout): layout.nbytes() for layout in self.layouts.values()}
        held |= {id(row.layout): row.layout.nbytes() for row in self.trainables.values()}
        return sum(held.values()) + sum(t.nbytes for t in self.vectors.values())

    def trained_tensors(self) -> dict[str, Tensor]:
        """Everything that training has changed, by name (low-order planes included)."""
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


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in name order: equal exactly when every bit is equal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
