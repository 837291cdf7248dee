"""``--step auto``: sigma and step size from a few measured perturbations, checked again while the run goes on.

At the start K directions are measured, each shared by all rows of a batch, at three sizes of sigma. d = (l+ - l-)/2:

    sigma   stays the preset's as long as d is proportional to it. Rounding (variance nu) and third derivatives (tau)
            are told apart by a quarter of the preset's sigma, sigma itself and four times it. Where they make more
            than LEAST_ERROR of the variance of d, sigma becomes the value at which they make least.
    step    moves a weight as far as GRZO's preset does: by MOVES sigma*sqrt(B). Group credit does so by itself, since
            its credits have unit variance. For MeZO the learning rate that does it is MOVES sigma*sqrt(B) over the
            root mean square of the slopes, so it need not be searched for with every model and task.

Then, every CHECK_EVERY steps, plain forward passes run over CHECK_BATCHES batches of rows that are kept for this. Where
their losses have fallen by more than the standard error of the difference, the step grows by FASTER; where they have
risen by more, it is multiplied by SLOWER. The same rows are compared, so a change shows long before a mean over
different rows tells it. The best step by one perturbation, G/(s C) with the squared gradient G, the spread s and the
curvature C, cannot be measured with few perturbations: on language tasks C of 256 evaluations has an error as large as
itself (benchmarks/log/2026-11-23-can-a-few-perturbations-tell-the-best-step.md).

A run whose rows have not improved after PATIENCE checks, or whose perturbations show nothing at all, gets a warning
with the cause. Nothing but sigma and step changes. Every record of the journal holds both, and metrics.jsonl holds what
was measured, so that a resume goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from edgezo.data.batches import Example, collate, micro_batches
from edgezo.machine.clock import now_s
from edgezo.machine.profiler import phase
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.run.short_memory import MicroBatchFitter
from edgezo.run.state import RunState
from edgezo.run.step import Stepper, Stride
from edgezo.zo.noise import Key, tensor_id

MEASURED_DIRECTIONS = 4
LADDER = (0.25, 1.0, 4.0)  # sizes that are measured, in units of the preset's sigma
LEAST_ERROR = 0.1  # share of the variance of d
FURTHEST_SIGMA = 8.0  # times the preset's sigma, or one over it
MOVES = 0.1  # how far a step moves a weight, in units of sigma*sqrt(B)
CHECK_EVERY = 25  # steps
CHECK_BATCHES = 3
FASTER, SLOWER = 1.5, 0.5
FURTHEST = 8.0  # times the first step size, or one over it
PATIENCE = 4  # checks
LEARNED_LOSS = 1e-3  # below this mean loss there is nothing left to learn
SEED = tensor_id("pace")  # so that no step moves along the directions that are measured
FAR = 1 << 31  # number of the step whose batches are the rows that are checked


@dataclass(frozen=True)
class Pace:
    """The sigma and step size that a run goes on with from step ``at``."""

    at: int
    sigma: float
    factor: float  # of the preset's step size
    began: float  # the factor at the start of the run
    losses: tuple[float, ...] = ()  # of the rows that are checked
    idle: int = 0  # checks since their losses last fell
    took_s: float = 0.0
    why: str = ""  # a warning, or ""

    @staticmethod
    def of(at: int, line: dict[str, Any]) -> Pace:
        """The pace that ``to_dict`` gave; JSON has null for NaN."""
        losses = (float("nan") if loss is None else loss for loss in line["losses"])
        return Pace(at, **{**line, "losses": tuple(losses)})

    def to_dict(self) -> dict[str, Any]:
        """Every field but ``at``, for metrics.jsonl."""
        fields = {name: value for name, value in asdict(self).items() if name != "at"}
        return {**fields, "losses": list(self.losses)}


def best_sigma(slopes: np.ndarray) -> tuple[float, float]:
    """(factor of the preset's sigma, share of a difference's variance that is error at that sigma).

    ``slopes`` (3, n): d over sigma at each size of LADDER.
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
    """MeZO's learning rate that moves a weight by MOVES sigma*sqrt(B); ``slopes`` (K,): of a batch, by direction."""
    return float(MOVES * sigma * batch_size**0.5 / np.sqrt(np.mean(slopes**2)))


def look_again(last: Pace, losses: np.ndarray) -> tuple[float, int]:
    """(factor, checks without improvement) from the losses (n,) of the checked rows now and at the last check."""
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
class AutoStep:
    """How far the steps of one run go: as asked, or with --step auto as measured while the run goes on."""

    state: RunState
    stepper: Stepper
    fitter: MicroBatchFitter
    pace: Pace | None = None  # with --step auto, once it is measured

    def stride(self, step: int) -> Stride:
        """What ``step`` perturbs and moves by. With --step auto it is measured first, where it is time to."""
        if not self.state.cfg.step_auto:
            return Stride(self.state.cfg.sigma)
        pace = self.pace = self._pace_at(step)
        return Stride(pace.sigma, pace.factor)

    def _pace_at(self, step: int) -> Pace:
        state, last = self.state, self.pace
        if last is None and state.log.paces:  # of the process that a resume goes on from
            at = max(state.log.paces)
            last = self.pace = Pace.of(at, state.log.paces[at])
        if last is not None and not (step % CHECK_EVERY == 0 and step > last.at):
            return last
        pace = self.fitter.fitting(step, partial(self._measure, step))
        state.log_line({"step": step, "pace": pace.to_dict()})
        if pace.why:
            state.progress.note(f"warning: no signal for --step auto: {pace.why}")
        elif last is None:
            state.progress.note(
                f"step auto: {state.cfg.step * pace.factor:.3g} at sigma {pace.sigma:.3g}, from "
                f"{MEASURED_DIRECTIONS} directions in {pace.took_s:.0f} s; measured again every {CHECK_EVERY} steps"
            )
        return pace

    def _measure(self, step: int) -> Pace:
        """The pace from ``step`` on."""
        begun_s = now_s()
        last = self.pace
        kept = [e for at in range(CHECK_BATCHES) for e in self.stepper.batch(FAR + at)]
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
        of_rows = tuple(map(float, losses))
        return Pace(step, sigma, factor, began, of_rows, idle, now_s() - begun_s, why)

    def _begin(self, step: int, plain: np.ndarray) -> tuple[float, float, str]:
        """(sigma, factor, warning) from the rows of a batch; ``plain``: losses of the rows that are kept."""
        cfg = self.state.cfg
        rows = self.stepper.batch(step)
        slopes = np.stack([self._slopes(rows, cfg.sigma * rung) for rung in LADDER])  # (3, K, B)
        finite = np.isfinite(slopes).all(axis=(0, 1))
        slopes = slopes[:, :, finite]
        times, error = 1.0, 0.0
        if cfg.objective == LOSS and finite.any():  # scores are steps, not slopes
            times, error = best_sigma(slopes.reshape(len(LADDER), -1))
        if why := no_signal(slopes, float(np.nanmean(plain)), error, cfg):
            return cfg.sigma, 1.0, why
        sigma = cfg.sigma * times
        if cfg.credit == "mean":
            return sigma, rate_of(slopes[1].mean(axis=1), cfg.sigma, cfg.batch_size) / cfg.step, ""
        return sigma, 1 / times, ""  # weights move as far with another sigma

    def _slopes(self, rows: Sequence[Example], sigma: float) -> np.ndarray:
        """Differences of the two sides over 2*sigma along each direction, (K, R)."""
        losses = np.stack([self._losses(rows, k, sigma) for k in range(MEASURED_DIRECTIONS)])
        return (losses[:, 0] - losses[:, 1]) / (2 * sigma)

    def _losses(
        self, rows: Sequence[Example], k: int | None = None, sigma: float = 0
    ) -> np.ndarray:
        """Losses (sides, R) fp64, plain or along direction k, which all rows share."""
        stepper, cfg = self.stepper, self.state.cfg
        losses = np.full((1 if k is None else 2, len(rows)), np.nan)
        key = None if k is None else Key(cfg.seed ^ SEED, k)
        for part in micro_batches(rows, cfg.micro_batch, stepper.most_tokens):
            examples = [rows[i] for i in part]
            batch = collate(examples, [0] * len(part))  # one slot: one direction for all
            stepper.check_room("the next micro-batch")
            with phase("forward"), self.state.memory.short("a micro-batch"):
                losses[:, part] = stepper.losses(batch, examples, key, sigma).numpy()
        self.state.model.take_touched(1)
        return losses


def no_signal(slopes: np.ndarray, loss: float, error: float, cfg: RunConfig) -> str:
    """Why perturbations tell nothing, and what to do about it; "" where they do."""
    if not slopes.size:
        return "no loss of the batch is finite. Look at the rows with --show-batch, or give a smaller --sigma."
    if not slopes[1].any():
        if cfg.objective != LOSS:
            return (
                f"--objective {cfg.objective} is the same on both sides of every perturbation: no prediction changes "
                f"at sigma {cfg.sigma:g}. Give a larger --sigma, or an objective that more predictions meet."
            )
        return (
            f"no loss differs between the two sides of a perturbation: sigma {cfg.sigma:g} is lost in the rounding of "
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
