"""Credit: how the losses of a step become an update. Pure functions, no state.

A step evaluates the batch along ``evaluations``; with two sides

    l+_i, l-_i   = L(theta + sigma*D_i ; x_i),  L(theta - sigma*D_i ; x_i)
    delta_i      = l+_i - l-_i
    theta       <- (1 - decay)*theta - rule(sum_i c_i D_i)

    group        c_i = kappa*sigma*delta_i/std_j(delta_j)   GRZO, two-sided (arXiv 2606.02857, section 3)
    centred      c_i = kappa*sigma*(delta_i - mean_j(delta_j))/std_j(delta_j)    EGGROLL (arXiv 2511.16652): z-scores
    by-prompt    c_i = kappa*sigma*delta_i/std(l of the same row's samples, both sides)
    vote         c_i = sign(delta_i), for the rule of that name    nano-egg, int8 EGGROLL (arXiv 2511.16652)
    raw          c_i = lr*delta_i/(2*sigma*B)               GRZO without dividing by the spread
    one-sided    c_i = kappa*sigma*(l+_i - mean_j(l+_j))/std_j(l+_j)
    uniform      c_i = kappa*sigma                          an ablation: a random walk that no loss guides
    mean         c   = lr*mean_i(delta_i)/(2*sigma)         MeZO (arXiv 2305.17333, algorithm 1), D_i shared
    svrg         c   = lr*mean_i(delta_i(theta) - delta_i(anchor))/(2*sigma), D_i shared, plus the estimate that was
                 made at the anchor, along the D of that step: MeZO-SVRG (arXiv 2404.08080, algorithm 1)
    clipped      as mean, with |c| at most lr*100           QZO (arXiv 2505.13430)
    candidates   c_j = kappa*sigma*(l_j - l_0)/std_k(l_k)   FZOO (arXiv 2506.09034), l_j of the batch along D_j
    scaled       c   = lr*mean_i(delta_i)/(2*sigma)/(sqrt(v) + 1e-8), v a running mean of the slope's square: MEAZO
                 (arXiv 2605.03869), one number for the whole model
    posterior    c_j = lr*y_j/(1 + n_j)/N, y_j = (l_j - l_0)/sigma, the mean of a Kalman filter over the N directions:
                 BSZO (arXiv 2601.01452)

c_i is the product of a credit a_i, which the functions below compute from the losses, and of a factor that is the same
for all examples (``coefficients``). The user sets one number, ``--step``: the learning rate lr, or kappa. With kappa an
example of credit 1 moves the weights by kappa*sigma*D_i. In the papers' symbols kappa is lr/(2*sigma^2*B) for GRZO and
lr/(sigma^2*N) for FZOO.

Losses that are not finite, groups of one example and groups without spread have defined results (see each function);
no input gives a NaN in an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from edgezo.zo.axes import CREDITS, forwards
from edgezo.zo.bits import exact_grid
from edgezo.zo.presets import PRESETS
from edgezo.zo.recipe import PLAIN, TWO_SIDED, Evaluation

CREDIT_CLIP = 8.0  # in standard deviations; a lone outlier in a group of 64 already stands at 7.9
LARGEST = 1e35  # the largest coefficient: a sum over a group stays finite in fp32
_LARGEST_SLOPE = 1e17  # whose square is finite in fp32
BETA2 = 0.999  # of the running mean of squared slopes: Adam's
# (credit (K,), sigma, steps made before, the carried number) -> (credit (K,) fp64, the number for the next step)
Carry = Callable[[np.ndarray, float, int, float], tuple[np.ndarray, float]]
SLOPE_CLIP = 100.0  # QZO's C: the largest directional derivative that counts


class Choices(Protocol):
    """The choices of a request that decide its estimator."""

    @property
    def credit(self) -> str: ...

    @property
    def mask(self) -> str: ...

    @property
    def rule(self) -> str: ...

    @property
    def candidates(self) -> int: ...

    @property
    def samples(self) -> int: ...


class Estimator(NamedTuple):
    """What a step evaluates, and how its losses become coefficients."""

    evaluations: tuple[Evaluation, ...]  # S of them
    credit: Callable[[np.ndarray], np.ndarray]  # (S, B) fp32 losses -> (K,) fp32 credit
    # (step, sigma, number of credits) -> the coefficient of one unit of credit
    scale: Callable[[float, float, int], float]
    rated: bool = False  # the rule multiplies by the step, so coefficients are those of step 1
    slope_clip: float | None = None  # the largest directional derivative that counts
    carry: Carry | None = (
        None  # what makes the credit of a record, where steps take up numbers of the one before
    )

    @staticmethod
    def of(chosen: Choices) -> Estimator:
        """The estimator of a request."""
        return compose(
            *(chosen.credit, chosen.mask, chosen.rule, chosen.candidates), samples=chosen.samples
        )

    def coefficients(self, credit: np.ndarray, step: float, sigma: float) -> np.ndarray:
        """c_i, (K,) fp32 on the exact grid (noise.exact_grid), of ``credit`` (K,)."""
        credit = np.asarray(credit, np.float64)
        if self.rated:
            step = 1.0
        if self.slope_clip is not None:
            slope = abs(float(np.sum(credit))) * self.scale(1.0, sigma, len(credit))
            credit = credit * min(1.0, self.slope_clip / slope) if slope else credit
        coefficients = credit * self.scale(step, sigma, len(credit))
        return exact_grid(np.clip(coefficients, -LARGEST, LARGEST))

    def recorded(
        self, losses: np.ndarray, sigma: float, steps: int, before: np.ndarray | None
    ) -> np.ndarray:
        """The credit (K + n,) fp32 of a record: of ``losses`` (S, B), then n numbers for the next step.

        ``before``: those of the step before, or None; ``steps``: so many were made before.
        """
        credit = self.credit(losses)
        if self.carry is None:
            return credit
        credit, carried = self.carry(
            credit, sigma, steps, 0.0 if before is None else float(before[0])
        )
        return np.append(credit, carried).astype(np.float32)

    def curvature(self, losses: np.ndarray, sigma: float) -> float:
        """|l+ + l- - 2 l0|/(2 sigma^2) of the batch's mean losses, ``losses`` (S, B): HiZOO (arXiv 2402.15173).

        0 where no plain forward was made or no example has finite losses.
        """
        if len(self.evaluations) != 3 or self.evaluations[2] != PLAIN:
            return 0.0
        losses = np.asarray(losses, np.float64)
        losses = losses[:, np.isfinite(losses).all(axis=0)]
        if not losses.shape[1]:
            return 0.0
        plus, minus, plain = losses.mean(axis=1)
        return float(abs(plus + minus - 2 * plain) / (2 * sigma**2))


def group_credit(losses: np.ndarray) -> np.ndarray:
    """delta_i over the group's standard deviation, no mean subtracted (GRZO); (2, B) losses -> (B,) fp32.

    Defined everywhere: an example with a non-finite loss gets credit 0 and does not count; a group of one example gets
    +-1, its sign, for there is no spread to measure; a spread below a tenth of the root mean square (examples that are
    all the same) is raised to that; no difference at all gives zeros; credits are clipped at ``CREDIT_CLIP``.
    """
    losses = np.asarray(losses, np.float64)
    finite = np.isfinite(losses).all(axis=0)
    credit = np.zeros(losses.shape[1])
    delta = losses[0, finite] - losses[1, finite]
    credit[finite] = _over_spread(delta, delta)
    return credit.astype(np.float32)


def centred_credit(losses: np.ndarray) -> np.ndarray:
    """Z-scores of delta_i over the group (EGGROLL's fitness, arXiv 2511.16652); (2, B) losses -> (B,) fp32.

    As ``group_credit``, but what all examples have in common is subtracted. So a group of one example, and one of equal
    differences, gives zeros.
    """
    losses = np.asarray(losses, np.float64)
    finite = np.isfinite(losses).all(axis=0)
    credit = np.zeros(losses.shape[1])
    delta = losses[0, finite] - losses[1, finite]
    if len(delta) > 1:
        centred = delta - delta.mean()
        credit[finite] = _over_spread(centred, centred)
    return credit.astype(np.float32)


def vote_credit(losses: np.ndarray) -> np.ndarray:
    """sign(delta_i): which side of its direction an example votes for; (2, B) losses -> (B,) fp32, not finite: 0."""
    return np.sign(difference_credit(losses))


def prompt_credit(losses: np.ndarray, samples: int = 1) -> np.ndarray:
    """z-scores of l+_i less those of l-_i among the 2 * ``samples`` losses of one row; (2, B) losses -> (B,) fp32.

    A row stands ``samples`` times in a batch, one after the other. Its mean cancels, and its spread divides: a row
    that is hard and one that is easy count alike, and one whose samples all score the same gives zeros (EGGROLL's
    fitness with groups of prompts, arXiv 2511.16652; GRPO's advantage). With one sample credits are signs, times 2.
    """
    losses = np.asarray(losses, np.float64)
    finite = np.isfinite(losses).all(axis=0)
    credit = np.zeros(losses.shape[1])
    for start in range(0, len(credit), samples):
        row = np.arange(start, min(start + samples, len(credit)))
        row = row[finite[row]]
        if len(row) and (spread := float(np.std(losses[:, row]))) > 0:
            credit[row] = (losses[0, row] - losses[1, row]) / spread
    return np.clip(credit, -CREDIT_CLIP, CREDIT_CLIP).astype(np.float32)


def _over_spread(differences: np.ndarray, spread_of: np.ndarray) -> np.ndarray:
    """``differences`` (n,) over the standard deviation of ``spread_of`` (n,), which has a floor; clipped."""
    rms = float(np.sqrt(np.mean(differences**2))) if differences.size else 0.0
    if rms == 0.0:
        return 0 * differences
    spread = rms if differences.size == 1 else max(float(np.std(spread_of)), rms / 10)
    return np.clip(differences / spread, -CREDIT_CLIP, CREDIT_CLIP)


def one_sided_credit(losses: np.ndarray) -> np.ndarray:
    """l+_i less the group's mean, over its standard deviation; (1, B) losses -> (B,) fp32.

    This is no finite difference: losses of examples differ by more than a probe changes them. A group of one example,
    or of equal losses, gives zeros; an example with a non-finite loss gets 0 and does not count.
    """
    plus = np.asarray(losses[0], np.float64)
    finite = np.isfinite(plus)
    credit = np.zeros(len(plus))
    if finite.sum() > 1:
        centred = plus[finite] - plus[finite].mean()
        credit[finite] = _over_spread(centred, centred)
    return credit.astype(np.float32)


def uniform_credit(losses: np.ndarray) -> np.ndarray:
    """1 for every example with a finite loss, else 0; (1, B) losses -> (B,) fp32."""
    return np.isfinite(losses[0]).astype(np.float32)


def difference_credit(losses: np.ndarray) -> np.ndarray:
    """delta_i, of non-finite losses 0; (2, B) losses -> (B,) fp32. ``scale`` divides by B where a mean is wanted."""
    losses = np.asarray(losses[:2], np.float64)
    finite = np.isfinite(losses).all(axis=0)
    delta = np.where(finite, losses[0], 0.0) - np.where(finite, losses[1], 0.0)
    return delta.astype(np.float32)


def svrg_credit(losses: np.ndarray) -> np.ndarray:
    """delta_i less delta_i at SVRG's anchor; (4, B) losses, the last two at the anchor -> (B,) fp32.

    (2, B) losses of the anchor's own step give ``difference_credit``.
    """
    credit = difference_credit(losses)
    if len(losses) == 4:
        at_anchor = difference_credit(losses[2:])
        finite = np.isfinite(losses).all(axis=0)
        credit = np.where(finite, credit - at_anchor, 0.0).astype(np.float32)
    return credit


def candidate_credit(losses: np.ndarray) -> np.ndarray:
    """(l_j - l_0)/std_k(l_k) of the batch's mean losses (FZOO); (1 + N, B) losses, plain first -> (N,) fp32.

    Examples without a finite plain loss do not count; a candidate whose loss is not finite on the others gets 0. A
    single candidate gets its sign; a spread below a tenth of the differences' root mean square is raised to that.
    """
    losses = np.asarray(losses, np.float64)
    counted = losses[:, np.isfinite(losses[0])]
    credit = np.zeros(len(losses) - 1)
    if counted.shape[1]:
        means = counted.mean(axis=1)
        finite = np.isfinite(means[1:])
        candidates = means[1:][finite]
        credit[finite] = _over_spread(candidates - means[0], candidates)
    return credit.astype(np.float32)


def mean_differences(losses: np.ndarray) -> np.ndarray:
    """l_j - l_0 of the batch's mean losses, (1 + N, B) losses, plain first -> (N,) fp32; not finite: 0."""
    losses = np.asarray(losses, np.float64)
    counted = losses[:, np.isfinite(losses[0])]
    credit = np.zeros(len(losses) - 1)
    if counted.shape[1]:
        differences = counted[1:].mean(axis=1) - counted[0].mean()
        credit = np.where(np.isfinite(differences), differences, 0.0)
    return np.clip(credit, -LARGEST, LARGEST).astype(np.float32)


def scale_by_slopes(
    delta: np.ndarray, sigma: float, steps: int, v: float
) -> tuple[np.ndarray, float]:
    """MEAZO (arXiv 2605.03869): delta_i (B,) over 2*sigma and the root of v, and the new v.

        v <- beta v + (1 - beta) mean_i(delta_i/(2 sigma))^2;  a_i = delta_i/(2 sigma)/(sqrt(v/(1 - beta^t)) + 1e-8)

    v is one number, and it is in the records. beta is Adam's.
    """
    slopes = np.asarray(delta, np.float64) / (2 * sigma)
    g = float(np.clip(slopes.mean(), -_LARGEST_SLOPE, _LARGEST_SLOPE))
    v = float(np.float32(BETA2 * v + (1 - BETA2) * g * g))
    scale = math.sqrt(v / (1 - BETA2 ** (steps + 1))) + 1e-8
    return np.clip(slopes / scale, -LARGEST, LARGEST), v


def filter_slopes(
    differences: np.ndarray, sigma: float, steps: int, noise: float
) -> tuple[np.ndarray, float]:
    """BSZO (arXiv 2601.01452): the posterior mean of the gradient in the span of N directions, and the new noise.

    The gradient's N coordinates are N(0, 1) before the step. Direction j observes its coordinate as y_j, with a noise
    whose variance is a running mean of the squared residuals; a Kalman filter takes one observation after the other:

        r = y_j - mean_j;  noise <- 0.9 noise + 0.1 r^2;  gain = var_j/(var_j + noise);  mean_j <- mean_j + gain r

    The directions are independent, so its covariance stays diagonal, and each is observed once. From the paper's
    abstract: the filter, the subspace, the residuals. The numbers 1, 0.9 and 0.1 and one observation each are ours.
    """
    means = np.zeros(len(differences))
    noise = noise if steps else 1.0
    for j, y in enumerate(np.asarray(differences, np.float64) / sigma):
        y = float(np.clip(y, -_LARGEST_SLOPE, _LARGEST_SLOPE))
        noise = 0.9 * noise + 0.1 * y * y
        means[j] = y / (1 + noise)
    return means, float(np.float32(noise))


def _of_probe(step: float, sigma: float, count: int) -> float:
    """``step`` is kappa, a fraction of the probe."""
    return step * sigma


def _of_slope(step: float, sigma: float, count: int) -> float:
    """``step`` is a learning rate on the mean directional derivative."""
    return step / (2 * sigma * count)


def _of_votes(step: float, sigma: float, count: int) -> float:
    """Votes are counted; ``step`` is a share that the rule takes."""
    return 1.0


def _of_estimate(step: float, sigma: float, count: int) -> float:
    """``step`` is a learning rate on a mean over directions, or over examples of one direction."""
    return step / count


_Scale = Callable[[float, float, int], float]
CARRIES: dict[str, Carry] = {"scaled": scale_by_slopes, "posterior": filter_slopes}
CREDIT_FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], _Scale]] = {
    "group": (group_credit, _of_probe),
    "centred": (centred_credit, _of_probe),
    "by-prompt": (prompt_credit, _of_probe),
    "vote": (vote_credit, _of_votes),
    "raw": (difference_credit, _of_slope),
    "one-sided": (one_sided_credit, _of_probe),
    "uniform": (uniform_credit, _of_probe),
    "mean": (difference_credit, _of_slope),
    "clipped": (difference_credit, _of_slope),
    "svrg": (svrg_credit, _of_slope),
    "candidates": (candidate_credit, _of_probe),
    "scaled": (difference_credit, _of_estimate),
    "posterior": (mean_differences, _of_estimate),
}


def compose(credit: str, mask: str, rule: str, candidates: int, *, samples: int = 1) -> Estimator:
    """The estimator of these choices.

    ``candidates``: how many directions a credit tries; ``samples``: how often a batch has each of its rows.
    """
    evaluations = list(TWO_SIDED[: forwards(credit, "none", 0)])
    if CREDITS[credit].tries:
        evaluations = [PLAIN, *(Evaluation(1, j) for j in range(candidates))]
    evaluations += [PLAIN] * (forwards(credit, mask, 0) - forwards(credit, "none", 0))
    function, scale = CREDIT_FUNCTIONS[credit]
    if CREDITS[credit].by_row:
        function = partial(prompt_credit, samples=samples)
    return Estimator(
        tuple(evaluations),
        function,
        scale,
        rated=rule != "sgd",
        slope_clip=SLOPE_CLIP if credit == "clipped" else None,
        carry=CARRIES.get(credit),
    )


def preset(name: str, candidates: int = 8) -> Estimator:
    """The estimator of a preset. Raises KeyError for a name that is not in the table."""
    entry = PRESETS[name]
    return compose(entry.credit, entry.mask, entry.rule, candidates)


def schedule(kind: str, progress: float) -> float:
    """Factor on the step size at ``progress`` in [0, 1) of a run: "linear" goes to 0, any other ``kind`` stays at 1.

    Normalised steps never shrink by themselves, which is why linear is the default.
    """
    return 1.0 - progress if kind == "linear" else 1.0
