"""int8 codes that are trained (``--rounding anchored``), re-quantised from base and journal before rounding adds up.

Every step rounds stochastically to the codes' grid. That has no bias, but a step of u moves a weight of scale s by a
whole s with probability |u|/s: a random walk of variance |u|*s a step, soon wider than the grid. So now and then the
codes are made anew. Each tile of the base is read in fp32, the updates of all steps so far are applied to it from
their recipes, with no rounding between them, and it is quantised again, scales included:

    codes after it = quantise(what fp32 weights would be after the same journal), bit for bit

To re-quantise after t steps takes t update sweeps and no forward. It is due every ``FIRST_STEPS`` steps at first, later
whenever the run is a quarter longer, and once at the end of a run: about 6 sweeps a step in all, however long the run
is. When it is due is a function of the step alone: a resume and a replay re-quantise after the same steps, and need
nothing of what was rounded before the last time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edgezo.weights.tile import Tile, membership, rows_by_direction, union_of
from edgezo.weights.trainable import Trainable
from edgezo.zo.recipe import Recipe

FIRST_STEPS = 16  # at first codes are re-quantised every so many steps
GROWTH = 4  # later after a GROWTH-th of the steps so far


def last_requantised(stop: int) -> int:
    """After which step count, at most ``stop``, codes were last re-quantised; 0: they are the base's."""
    steps = 0
    while (following := steps + max(FIRST_STEPS, steps // GROWTH)) <= stop:
        steps = following
    return steps


def requantise_due(steps: int) -> bool:
    """Whether codes are re-quantised after ``steps`` steps."""
    return steps > 0 and last_requantised(steps) == steps


def split_where_due(recipes: Sequence[Recipe]) -> Iterator[Sequence[Recipe]]:
    """Consecutive recipes in runs: codes are re-quantised after each run, but for the last one perhaps."""
    start = 0
    for count, recipe in enumerate(recipes, 1):
        if requantise_due(recipe.step + 1) or count == len(recipes):
            yield recipes[start:count]
            start = count


class ReplaysSteps(Protocol):
    """What re-quantising asks of the weight store (store.py)."""

    device: torch.device

    def past(self, first: int, stop: int) -> Iterator[list[Recipe]]: ...

    def advance(self, tile: Tile, theta: Tensor) -> bool: ...


class ReplayedMatrix:
    """A trained matrix as fp32 weights would be after the steps before ``stop``. Its rows are made when asked for."""

    def __init__(self, store: ReplaysSteps, trainable: Trainable, stop: int):
        assert trainable.open_base is not None
        self.store, self.trainable, self.stop = store, trainable, stop
        self.base = trainable.open_base()
        self.shape = trainable.layout.shape

    def __getitem__(self, rows: slice) -> Tensor:
        """(n, cols) fp32, freshly owned."""
        theta = self.base[rows].to(self.store.device, torch.float32, copy=True)
        for recipes in self.store.past(0, self.stop):
            for recipe in recipes:
                if recipe.decay or np.any(recipe.coefficients):
                    self._advance(recipe, rows, theta)
        return theta

    def _advance(self, recipe: Recipe, rows: slice, theta: Tensor) -> None:
        """Take ``theta``, the ``rows`` of the matrix, through one step, in place."""
        store, trainable = self.store, self.trainable
        c = torch.from_numpy(recipe.coefficients).to(store.device)
        if trainable.touched_offset is None and trainable.fixed_rows is None:
            store.advance(Tile(trainable, recipe, c, rows), theta)
            return
        by_direction, member = None, None
        if trainable.touched_offset is not None:
            by_direction = rows_by_direction(trainable, recipe)
            moved = union_of(by_direction)
        else:
            assert trainable.fixed_rows is not None
            moved = trainable.fixed_rows.cpu().numpy()
        moved = moved[(moved >= rows.start) & (moved < rows.stop)].astype(np.int64)
        if not len(moved):
            return
        if by_direction is not None:
            member = membership(by_direction, moved, store.device)
        numbers = torch.from_numpy(moved).to(store.device)
        places = numbers - rows.start
        some = theta[places]
        store.advance(Tile(trainable, recipe, c, numbers, member), some)
        theta[places] = some
