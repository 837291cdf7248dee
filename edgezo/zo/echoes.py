"""Directions that lean on an estimate of the gradient which past steps have made, from their records and seeds alone.

A step's direction is made of fresh noise and of the noise of steps before it, each times a number of the step's record:

    aligned          v   = z + ((s |g| - g.z)/|g|^2) g,   z of N(0,1), s = +-1, g the sum of c_k v_k over the last steps
                     DAP, arXiv 2510.19975: of all v with E[v v^T] = I, those with |v.g| = |g| have the least variance
    cone             v   = sin(angle) z + cos(angle) sqrt(d) m/|m|,  m the moving average of c_k v_k
                     ConMeZO, arXiv 2511.02757
    aligned-signs    v_i = D_i + ((s_i |g| - g.D_i)/|g|^2) g,  D_i = r_i s_i^T, g = sum_j a_j D_j of the last step
                     ours: the same alignment for GRZO's directions and credit

c_k is the slope that step k has measured along v_k. So g is a linear combination of noise, and its coefficients are a
few numbers: nothing as large as the weights is kept. Noise of more than ``ECHO_DEPTH`` steps ago is left out of g;
``aligned-signs`` leaves out what the last step's directions leant on themselves. The release of DAP draws a batch for
g; here g costs no forward. ConMeZO warms its angle up, and keeps more of its average; both are simpler here.

The dot products are exact, for whole numbers are summed (weights/inner_products.py): a resume makes the same record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgezo.zo import noise
from edgezo.zo.axes import ECHO_DEPTH as DEPTH
from edgezo.zo.noise import Key, exact_grid

ANGLE = 1.35  # of the cone, in radians
KEPT = 0.9  # of ConMeZO's moving average, from step to step
_ALIGNMENT_NOISE = noise.tensor_id("alignment")


class PastStep(NamedTuple):
    """What the estimate needs of a past step."""

    slope: float  # c, in any unit that all steps share
    echo: (
        np.ndarray
    )  # (1 + DEPTH,): its direction as weights of its noise and of that of the steps before it


def signs_of(key: Key, count: int) -> np.ndarray:
    """s of so many directions, (count,) of +-1."""
    drawn = noise.signs(key, _ALIGNMENT_NOISE, noise.CHOICE, slice(0, 1), count)[0]
    return drawn.numpy().astype(np.float64)


def estimate(past: Sequence[PastStep], kept: float) -> np.ndarray:
    """Coefficients (DEPTH,) of g = sum_k kept^(k-1) c_k v_k in the noise of the last steps, the last one first."""
    coefficients = np.zeros(DEPTH)
    for back, step in enumerate(past[:DEPTH], 1):
        weights = step.echo[: DEPTH - back + 1].astype(np.float64)
        coefficients[back - 1 :] += kept ** (back - 1) * step.slope * weights
    return coefficients


def aligned(past: Sequence[PastStep], products: np.ndarray, key: Key) -> np.ndarray:
    """Weights (1 + DEPTH,) fp32 of an aligned direction; ``products``: the Gram matrix of noise, this step's first."""
    g = estimate(past, 1.0)
    square = float(g @ products[1:, 1:] @ g)
    if not square > 0:
        return fresh()
    lean = (float(signs_of(key, 1)[0]) * math.sqrt(square) - float(products[0, 1:] @ g)) / square
    return _finite(np.concatenate(([1.0], lean * g)))


def cone(past: Sequence[PastStep], products: np.ndarray, values: int) -> np.ndarray:
    """Weights (1 + DEPTH,) fp32 of a direction in the cone around the moving average; ``values``: d."""
    m = estimate(past, KEPT)
    square = float(m @ products[1:, 1:] @ m)
    if not square > 0:
        return fresh()
    lean = math.cos(ANGLE) * math.sqrt(values / square)
    return _finite(np.concatenate(([math.sin(ANGLE)], lean * m)))


def aligned_signs(
    credit: np.ndarray, across: np.ndarray, among: np.ndarray, key: Key
) -> np.ndarray:
    """(2B,) fp32: how far each D_i leans on g, then g's coefficients a_j (B,) on the exact grid.

    ``credit`` (B,): that of the last step. ``across`` (B, B): D_i . D_j of this step and the last one, ``among`` (B, B)
    of the last one alone.
    """
    g = exact_grid(credit).astype(np.float64)
    square = float(g @ among @ g)
    if not square > 0:
        return np.zeros(2 * len(credit), np.float32)
    lean = (signs_of(key, len(credit)) * math.sqrt(square) - across @ g) / square
    return np.concatenate((lean, g)).astype(np.float32)


def fresh() -> np.ndarray:
    """Weights of a direction that is fresh noise alone."""
    return np.eye(1, 1 + DEPTH, dtype=np.float32)[0]


def _finite(weights: np.ndarray) -> np.ndarray:
    return weights.astype(np.float32) if np.isfinite(weights).all() else fresh()
