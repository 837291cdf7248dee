"""``--step auto``: sigma and step from what a few probes show, looked at again while the run goes on.

At the start, along K directions that all rows of a batch share, with d = (l+ - l-)/2 at three sizes of the probe:

    sigma   stays the preset's while d is proportional to it. Rounding (nu) and third derivatives (tau) are told apart
            between a quarter of it, itself and four times it; where they make more than LEAST_ERROR of the variance
            of d, sigma becomes the one that makes it least.
    step    moves a weight as far as GRZO's preset does, by MOVES sigma*sqrt(B). Group credit does so by itself, for its
            credits have unit variance. A learning rate of MeZO's that does is MOVES sigma*sqrt(B) over the root mean
            square of its slopes, so that it need not be searched for with every model and task.

Then every CHECK_EVERY steps, on CHECK_BATCHES batches of rows kept for it, by plain forwards: where their losses have
fallen by more than the standard error of that difference, the step grows by FASTER; where they have risen by more, it
is halved. The same rows are compared, so a change shows long before a mean over different rows tells it. The best step
by one probe, G/(s C) with the squared gradient G, the spread s and the curvature C, cannot be had from few probes: on
language tasks C of 256 evaluations has an error as large as itself (benchmarks/LOG.md, 2026-11-23).

A run whose rows have not improved after PATIENCE checks, or whose probes show nothing at all, is warned with the cause.
Nothing else changes but sigma and step, which every record of the journal holds; metrics.jsonl holds what was measured,
so that a resume goes on with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgezo.data.batches import Example, collate, micro_batches
from edgezo.machine.profiler import phase
from edgezo.plan.fields import LOSS
from edgezo.zo.noise import Key, tensor_id

if TYPE_CHECKING:
    from edgezo.run.step import Steps

DIRECTIONS = 4
LADDER = (0.25, 1.0, 4.0)  # of the preset's sigma
LEAST_ERROR = 0.1
FURTHEST_SIGMA = 8.0
MOVES = 0.1
CHECK_EVERY = 25  # steps
CHECK_BATCHES = 3
FASTER, SLOWER = 1.5, 0.5
FURTHEST = 8.0  # from where the step began, either way
PATIENCE = 4  # checks
LEARNED_LOSS = 1e-3
SEED = tensor_id("pace")  # no step moves along the directions that are measured
FAR = 1 << 31  # the step whose batches are the rows that are looked at again


@dataclass(frozen=True)
class Pace:
    """What a run steps with from ``at`` on."""

    at: int
    sigma: float
    factor: float  # of the preset's step
    began: float  # the same at the start
    losses: tuple[float, ...] = ()  # of the rows that are looked at again
    idle: int = 0  # checks since those last improved
    took_s: float = 0.0
    why: str = ""  # a warning

    @staticmethod
    def of(at: int, said: dict[str, Any]) -> Pace:
        # JSON has no NaN.
        losses = (float("nan") if loss is None else loss for loss in said["losses"])
        return Pace(at, **{**said, "losses": tuple(losses)})

    def to_dict(self) -> dict[str, Any]:
        found = {name: value for name, value in asdict(self).items() if name != "at"}
        return {**found, "losses": list(self.losses)}


def best_sigma(slopes: np.ndarray) -> tuple[float, float]:
    """(how many times the preset's sigma, share of a difference's variance that is error there).

    ``slopes``: d over sigma at every rung of LADDER, (3, n).
    """
    size = float((slopes[1] ** 2).mean())
    if not np.isfinite(size) or size == 0.0:
        return 1.0, float("inf")
    below = float(((slopes[1] - slopes[0]) ** 2).mean()) / size
    above = float(((slopes[2] - slopes[1]) ** 2).mean()) / size
    # below = 17 nu + (15/16)^2 tau, above = (17/16) nu + 15^2 tau, in variances at the preset's sigma
    system = np.array([[17.0, (15 / 16) ** 2], [17 / 16, 225.0]])
    nu, tau = np.maximum(np.linalg.solve(system, [below, above]), 0.0)
    if nu + tau <= LEAST_ERROR:
        return 1.0, float(nu + tau)
    times = (nu / (2 * tau)) ** (1 / 6) if tau > 0 else FURTHEST_SIGMA
    times = float(np.clip(times, 1 / FURTHEST_SIGMA, FURTHEST_SIGMA))
    return times, float(nu / times**2 + tau * times**4)


def rate_of(slopes: np.ndarray, sigma: float, batch_size: int) -> float:
    """MeZO's learning rate that moves as far as MOVES says; ``slopes`` (K,) of a batch along its directions."""
    return float(MOVES * sigma * batch_size**0.5 / np.sqrt(np.mean(slopes**2)))


def look_again(last: Pace, losses: np.ndarray) -> tuple[float, int]:
    """(factor, checks without improvement) from what the same rows lost then and now."""
    change = losses - np.array(last.losses)
    change = change[np.isfinite(change)]
    if len(change) < 2:
        return last.factor * SLOWER, last.idle + 1
    error = float(change.std(ddof=1)) / len(change) ** 0.5
    factor, idle = last.factor, last.idle + 1
    if change.mean() < -error:
        factor, idle = factor * FASTER, 0
    elif change.mean() > error:
        factor *= SLOWER
    return float(np.clip(factor, last.began / FURTHEST, last.began * FURTHEST)), idle


@dataclass
class Pacer:
    """Measures for one run."""

    steps: Steps

    def due(self, step: int) -> bool:
        last = self.steps.pace
        return last is None or (step % CHECK_EVERY == 0 and step > last.at)

    def measure(self, step: int) -> Pace:
        """The pace from ``step`` on."""
        begun_s = time.monotonic()
        last = self.steps.pace
        kept = [e for at in range(CHECK_BATCHES) for e in self.steps.batch(FAR + at)]
        losses = self._losses(kept)[0]
        if last is None:
            sigma, factor, why = self._begin(step, losses)
            began, idle = factor, 0
        else:
            (factor, idle), why = look_again(last, losses), ""
            sigma, began = last.sigma, last.began
            if idle == PATIENCE:
                why = (
                    f"losses of {len(kept)} rows have not fallen in {PATIENCE * CHECK_EVERY} steps by more than their "
                    "error. Give more steps or a larger --batch-size, or --train another part."
                )
        told = tuple(map(float, losses))
        return Pace(step, sigma, factor, began, told, idle, time.monotonic() - begun_s, why)

    def _begin(self, step: int, plain: np.ndarray) -> tuple[float, float, str]:
        """(sigma, factor, warning) from the rows of a batch."""
        cfg = self.steps.cfg
        assert cfg.batch_size is not None
        rows = self.steps.batch(step)
        slopes = np.stack([self._slopes(rows, cfg.sigma * rung) for rung in LADDER])  # (3, K, B)
        finite = np.isfinite(slopes).all(axis=(0, 1))
        slopes = slopes[:, :, finite]
        times, error = 1.0, 0.0
        if cfg.objective == LOSS and finite.any():  # scores are steps, not slopes
            times, error = best_sigma(slopes.reshape(len(LADDER), -1))
        if why := no_signal(slopes, float(np.nanmean(plain)), error, self.steps):
            return cfg.sigma, 1.0, why
        sigma = cfg.sigma * times
        if cfg.credit == "mean":
            return sigma, rate_of(slopes[1].mean(axis=1), cfg.sigma, cfg.batch_size) / cfg.step, ""
        return sigma, 1 / times, ""  # weights move as far with another probe

    def _slopes(self, rows: Sequence[Example], sigma: float) -> np.ndarray:
        """d over sigma, (K, R)."""
        found = np.stack([self._losses(rows, k, sigma) for k in range(DIRECTIONS)])
        return (found[:, 0] - found[:, 1]) / (2 * sigma)

    def _losses(
        self, rows: Sequence[Example], k: int | None = None, sigma: float = 0
    ) -> np.ndarray:
        """Losses (sides, R) fp64, plain or along direction k for all rows."""
        steps, model = self.steps, self.steps.model
        cfg = steps.cfg
        assert cfg.micro_batch is not None
        losses = np.full((1 if k is None else 2, len(rows)), np.nan)
        key = None if k is None else Key(cfg.seed ^ SEED, k)
        for part in micro_batches(rows, cfg.micro_batch, steps.most_tokens):
            examples = [rows[i] for i in part]
            batch = collate(examples, [0] * len(part))  # one slot: one direction for all
            steps.check_room("the next micro-batch")
            with phase("forward"), steps.memory.short("a micro-batch"):
                losses[:, part] = steps.losses(batch, examples, key, sigma).numpy()
        model.take_touched(1)
        return losses


def no_signal(slopes: np.ndarray, loss: float, error: float, steps: Steps) -> str:
    """Why probes tell nothing, and what to do about it; "" where they do."""
    cfg = steps.cfg
    if not slopes.size:
        return "no loss of the batch is finite. Look at the rows with --show-batch, or give a smaller --sigma."
    if not slopes[1].any():
        if cfg.objective != LOSS:
            return (
                f"--objective {cfg.objective} is the same on both sides of every probe: no prediction changes at "
                f"sigma {cfg.sigma:g}. Give a larger --sigma, or an objective that more predictions meet."
            )
        return (
            f"no loss differs between both sides of a probe: sigma {cfg.sigma:g} is lost in the rounding of "
            f"{cfg.precision} weights. Give a larger --sigma."
        )
    if abs(loss) < LEARNED_LOSS and cfg.objective == LOSS:
        return f"the loss is {loss:.1e} already: there is nothing left to learn."
    if error > 1.0:
        return (
            "differences of losses do not grow with sigma: they are rounding, or sigma reaches beyond where the loss "
            "is smooth. Give a higher --precision or another --sigma."
        )
    return ""
