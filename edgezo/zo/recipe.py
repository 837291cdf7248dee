"""What a step evaluates, and the few numbers from which its update is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Recipe(NamedTuple):
    """One step's update: O(B) numbers from which every tensor's change can be rebuilt."""

    step: int
    coefficients: np.ndarray  # (K,) fp32 on the exact grid; zeros for a skipped step
    decay: float  # weights are first multiplied by (1 - decay)
    # For each direction the sorted rows of the embedding tables that it moves; one entry where candidates share the
    # batch.
    touched: tuple[np.ndarray, ...] = ()
    rate: float = 1.0  # learning rate, by which every rule but sgd multiplies its result
    curvature: float = 0.0  # |l+ + l- - 2 l0|/(2 sigma^2) of the batch; 0 where it was not measured
    scales: np.ndarray | None = None  # mask `block`: (n,) fp32, one for each trained tensor by name
    # SVRG: the step at whose start the weights were the anchor, and the coefficient of that step's direction.
    anchor: int | None = None
    pull: float = 0.0
    # Directions that take up past ones (echoes.py): (1 + DEPTH,) or (2B,) fp32; None: they are fresh noise.
    echo: np.ndarray | None = None
    # Guided directions only, which no seed gives again: v_i (K, cols), or V^T (k, cols), by trained tensor.
    guides: Mapping[str, Tensor] = MappingProxyType({})


class Evaluation(NamedTuple):
    """One of a step's forwards over the batch, at theta + sign*sigma*D."""

    sign: int  # 1, -1 or 0
    candidate: int | None = None  # the D that all examples take; None: example i takes D_i


TWO_SIDED = (Evaluation(1), Evaluation(-1))
PLAIN = Evaluation(0)
