"""Anchors: int8 weights that are trained, made anew from base and journal before rounding has added up.

Between two anchors every step rounds stochastically to the codes' grid. That has no bias, but a step of u moves a
weight of scale s by a whole s with probability |u|/s: a random walk of variance |u|*s a step, soon wider than the grid.
At an anchor the codes are forgotten. Each tile of the base is read in fp32, the updates of all steps so far are applied
to it from their recipes, with no rounding between them, and it is quantised anew, scales included:

    codes at an anchor = quantise(what fp32 weights would be after the same journal), bit for bit

An anchor at step t costs t update sweeps and no forward. The first come every ``FIRST_STEPS`` steps, later ones when
the run is a quarter longer, and one ends the run: about 6 sweeps a step in all, however long the run is. Where anchors
lie is a function of the step alone: a resume and a replay find the same ones, and need nothing of what was rounded
before the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edgezo.weights.trainable import Trainable
from edgezo.zo.recipe import Recipe

FIRST_STEPS = 16
GROWTH = 4  # the next anchor is a GROWTH-th of the steps so far away


def last(stop: int) -> int:
    """The last anchor at or before ``stop`` steps; 0: the base itself."""
    at = 0
    while (following := at + max(FIRST_STEPS, at // GROWTH)) <= stop:
        at = following
    return at


def due(steps: int) -> bool:
    """Whether there is an anchor after so many steps."""
    return steps > 0 and last(steps) == steps


def between(recipes: Sequence[Recipe]) -> Iterator[Sequence[Recipe]]:
    """The recipes in runs, each of which ends at an anchor or where they end."""
    start = 0
    for place, recipe in enumerate(recipes, 1):
        if due(recipe.step + 1) or place == len(recipes):
            yield recipes[start:place]
            start = place


class ReplaysSteps(Protocol):
    """What making codes anew asks of the weight store (store.py)."""

    device: torch.device

    def past(self, first: int, stop: int) -> Iterator[list[Recipe]]: ...

    def moved(
        self,
        row: Trainable,
        recipe: Recipe,
        coefficients: Tensor,
        rows: slice | Tensor,
        values: Tensor,
        member: Tensor | None = None,
    ) -> bool: ...

    def own_rows(self, row: Trainable, recipe: Recipe) -> list[np.ndarray]: ...

    def membership(self, own: list[np.ndarray], rows: np.ndarray) -> Tensor: ...


class Replayed:
    """A trained matrix as fp32 weights would be after the steps before ``stop``, made row by row when asked for."""

    def __init__(self, store: ReplaysSteps, row: Trainable, stop: int):
        assert row.base is not None
        self.store, self.row, self.stop = store, row, stop
        self.base = row.base()
        self.shape = row.layout.shape

    def __getitem__(self, rows: slice) -> Tensor:
        values = self.base[rows].to(self.store.device, torch.float32, copy=True)
        for recipes in self.store.past(0, self.stop):
            for recipe in recipes:
                if recipe.decay or np.any(recipe.coefficients):
                    self._move(recipe, rows, values)
        return values

    def _move(self, recipe: Recipe, rows: slice, values: Tensor) -> None:
        store, row = self.store, self.row
        c = torch.from_numpy(recipe.coefficients).to(store.device)
        if row.touched_offset is None and row.fixed_rows is None:
            store.moved(row, recipe, c, rows, values)
            return
        own, member = None, None
        if row.touched_offset is not None:
            own = store.own_rows(row, recipe)
            moved = np.unique(np.concatenate(own)) if own else np.empty(0, np.int64)
        else:
            assert row.fixed_rows is not None
            moved = row.fixed_rows.cpu().numpy()
        moved = moved[(moved >= rows.start) & (moved < rows.stop)].astype(np.int64)
        if not len(moved):
            return
        if own is not None:
            member = store.membership(own, moved)
        index = torch.from_numpy(moved).to(store.device)
        here = index - rows.start
        some = values[here]
        store.moved(row, recipe, c, index, some, member)
        values[here] = some
