"""Estimators: how two losses per example become an update. Pure functions, no state.

    l+_i, l-_i   = L(theta + sigma*D_i ; x_i),  L(theta - sigma*D_i ; x_i)
    delta_i      = l+_i - l-_i
    theta       <- (1 - decay)*theta - sum_i c_i D_i

    grzo   c_i = kappa*sigma*delta_i/std_j(delta_j)      GRZO, two-sided group credit (arXiv 2606.02857, section 3)
    mezo   c   = lr*mean_i(delta_i)/(2*sigma)            MeZO (arXiv 2305.17333, algorithm 1), D_i shared

``step`` is the user's one knob: kappa, the fraction of the probe sigma*D_i that an example of credit 1 moves the
weights by (kappa = lr/(2*sigma^2*B) in the paper's symbols), or MeZO's learning rate.

Losses that are not finite, groups of one and groups without spread have defined results (see ``group_credit``);
no input gives a NaN in an update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edgezo.noise import exact_grid

CREDIT_CLIP = 8.0  # standard deviations; a lone outlier in a group of 64 already stands at 7.9


class Recipe(NamedTuple):
    """One step's update: O(B) numbers from which every tensor's change can be rebuilt."""

    step: int
    coefficients: np.ndarray  # (B,) fp32 on the exact grid; zeros for a skipped step
    decay: float  # weights are first multiplied by (1 - decay)
    touched: tuple[np.ndarray, ...] = ()  # per example, sorted rows of the embedding tables it used


class Estimator(NamedTuple):
    """A row of the family: which credit, what ``step`` means, and the settings that work for it."""

    name: str
    credit: Callable[[np.ndarray], np.ndarray]  # (2, B) fp32 losses -> (B,) fp32 credit
    scale: Callable[
        [float, float, int], float
    ]  # (step, sigma, B) -> coefficient of one unit of credit
    directions: tuple[str, ...]  # the first is the default
    step: float
    sigma: float
    step_meaning: str

    def coefficients(self, credit: np.ndarray, step: float, sigma: float) -> np.ndarray:
        """c_i, (B,) fp32 on the exact grid."""
        return exact_grid(np.asarray(credit, np.float64) * self.scale(step, sigma, len(credit)))


def group_credit(losses: np.ndarray) -> np.ndarray:
    """delta_i over the group's standard deviation, no mean subtraction; (2, B) -> (B,) fp32.

    Defined everywhere: an example with a non-finite loss gets credit 0 and does not count; a group of one gets
    +-1 (the sign, there is no spread to measure); a spread below a tenth of the root mean square (identical
    examples) is raised to it; no difference at all gives zeros; credits are clipped at ``CREDIT_CLIP``.
    """
    losses = np.asarray(losses, np.float64)
    finite = np.isfinite(losses).all(axis=0)
    credit = np.zeros(losses.shape[1])
    delta = losses[0, finite] - losses[1, finite]
    rms = float(np.sqrt(np.mean(delta**2))) if delta.size else 0.0
    if rms > 0.0:
        spread = rms if delta.size == 1 else max(float(np.std(delta)), rms / 10)
        credit[finite] = np.clip(delta / spread, -CREDIT_CLIP, CREDIT_CLIP)
    return credit.astype(np.float32)


def mean_credit(losses: np.ndarray) -> np.ndarray:
    """delta_i itself; the mean over the batch is taken by ``scale``. Non-finite examples count as zero."""
    losses = np.asarray(losses, np.float64)
    finite = np.isfinite(losses).all(axis=0)
    delta = np.where(finite, losses[0], 0.0) - np.where(finite, losses[1], 0.0)
    return delta.astype(np.float32)


ESTIMATORS = {
    e.name: e
    for e in (
        Estimator(
            name="grzo",
            credit=group_credit,
            scale=lambda step, sigma, batch: step * sigma,
            directions=("signs", "rademacher", "gaussian"),
            step=0.1,
            sigma=2e-3,
            step_meaning="kappa: the fraction of the probe that one unit of credit moves the weights by",
        ),
        Estimator(
            name="mezo",
            credit=mean_credit,
            scale=lambda step, sigma, batch: step / (2 * sigma * batch),
            directions=("shared",),
            step=1e-4,
            sigma=2e-3,
            step_meaning="the learning rate of MeZO's update",
        ),
    )
}


def schedule(kind: str, progress: float) -> float:
    """Factor on the step at ``progress`` in [0, 1). Normalised steps never shrink by themselves: linear by default."""
    return 1.0 - progress if kind == "linear" else 1.0
