"""Dot products of directions over all that is trained, summed exactly: no tile and no thread count changes a bit.

Signs are whole numbers. Normals are rounded to multiples of 2**-12, whose products fp64 adds without rounding up to
2**28 values; their dot product is then 1e-4 of a typical one away from that of the normals themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from edgezo.machine.limits import tiles
from edgezo.zo import noise
from edgezo.zo.directions import Directions, Target
from edgezo.zo.noise import Key

_NORMAL_STEPS = 2.0**12


def of_normals(targets: Iterable[Target], seed: int, steps: Sequence[int]) -> np.ndarray:
    """Gram matrix (n, n) fp64 of the shared noise U of these steps; a step below 0 has none, and gives zeros."""
    total = torch.zeros(len(steps), len(steps), dtype=torch.float64)
    for target in targets:
        for rows in tiles(target.rows, target.cols, 16 * len(steps)):
            drawn = torch.stack([_whole(target, Key(seed, step), rows) for step in steps])
            total += drawn @ drawn.T
    return (total / _NORMAL_STEPS**2).numpy()


def _whole(target: Target, key: Key, rows: slice) -> Tensor:
    """Rows of U in units of the grid, flat fp64."""
    if key.step < 0:
        return torch.zeros((rows.stop - rows.start) * target.cols, dtype=torch.float64)
    drawn = noise.normals(key, target.id, noise.DENSE, rows, target.cols)
    return drawn.mul_(_NORMAL_STEPS).round_().double().flatten()


def of_signs(
    targets: Iterable[Target], directions: Directions, keys: tuple[Key, Key], examples: int
) -> np.ndarray:
    """D_i . D_j (B, B) fp64 of D_i = r_i s_i^T at the one key and D_j at the other one."""
    slots, total = range(examples), np.zeros((examples, examples))
    for target in targets:
        here, there = (directions.row_signs(key, target, slots).double() for key in keys)
        product = here @ there.T
        if not target.vector:
            here, there = (directions.col_signs(key, target, slots).double() for key in keys)
            product *= here @ there.T
        total += product.numpy()
    return total
