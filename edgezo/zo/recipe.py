"""What a step evaluates, and the few numbers that its update is rebuilt from."""

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
    # Per direction, sorted rows of the embedding tables it moves; one for all where candidates share the batch.
    touched: tuple[np.ndarray, ...] = ()
    rate: float = 1.0  # what a rule with a state of its own multiplies its result by
    curvature: float = 0.0  # |l+ + l- - 2 l0|/(2 sigma^2) of the batch, where it was measured
    scales: np.ndarray | None = None  # (n,) fp32 of mask block, of the trained tensors by name
    # The step before which the weights were the anchor; of another step: what its direction moves them by.
    anchor: int | None = None
    pull: float = 0.0
    # By trained tensor the v_i of its directions, (K, cols): only of directions that no seed has.
    guides: Mapping[str, Tensor] = MappingProxyType({})


class Evaluation(NamedTuple):
    """One of a step's forwards over the batch: theta + sign*sigma*D."""

    sign: int
    candidate: int | None = None  # which D for all examples; None: each its own


TWO_SIDED = (Evaluation(1), Evaluation(-1))


PLAIN = Evaluation(0)
