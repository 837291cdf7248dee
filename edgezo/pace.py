"""``--step auto``: sigma and step from what a few probes show, looked at again while the run goes on.

Over R rows and K directions D_k that all rows share, with l0 the plain losses,

    d_kr = (l+ - l-)/2        c_kr = l+ + l- - 2 l0
    sigma^2 |g|^2     ~  G = mean_k (m_k^2 - v_k/R)        m_k, v_k mean and variance of d_kr over rows
    sigma^2 E|g_i|^2  ~  Q = mean d^2,    s = its root
    sigma^2 tr H      ~  C = mean c

the decrease that a step of size t promises, its first-order part less its curvature, is largest at

    group    t = G/(s C)              a_i of unit variance, each along its own direction (GRZO)
    mean     t = G sigma^2/((G + Q/B) C)     the mean slope of B rows along one direction (MeZO)

whatever sigma is. sigma stays as the preset has it while differences are proportional to it: between a quarter of it,
itself and four times it, rounding (nu) and third derivatives (tau) are told apart, and where they make more than
LEAST_ERROR of a difference's variance, sigma becomes the one that makes it least.

A measurement costs 12.5 steps at the start and 2.5 every CHECK_EVERY steps. It changes nothing but the run's sigma and
step, which every record of the journal holds; metrics.jsonl holds what was measured, so that a resume goes on with it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgezo.data import collate, micro_batches
from edgezo.noise import Key, tensor_id
from edgezo.profiler import phase

if TYPE_CHECKING:
    from edgezo.steps import Steps

DIRECTIONS, DIRECTIONS_AGAIN = 4, 2
CHECK_EVERY = 50  # steps
LADDER = (0.25, 1.0, 4.0)  # of the preset's sigma
LEAST_ERROR = 0.1
FURTHEST_SIGMA = 8.0
FURTHEST_STEP = 16.0  # from the preset's
FURTHEST_AGAIN = 2.0  # from the last measurement's
LEARNED_LOSS = 1e-3
SEED = tensor_id("pace")  # no step moves along the directions that are measured


@dataclass(frozen=True)
class Signal:
    """What probes at one sigma have shown."""

    gradient: float  # G
    gradient_error: float  # its standard error over directions
    differences: float  # Q
    curvature: float  # C
    curvature_error: float
    loss: float

    @staticmethod
    def of(losses: np.ndarray, plain: np.ndarray) -> Signal:
        """Of losses (K, 2, R) and (R,); rows with a loss that is not finite do not count."""
        finite = np.isfinite(losses).all(axis=(0, 1)) & np.isfinite(plain)
        losses, plain = losses[:, :, finite].astype(np.float64), plain[finite].astype(np.float64)
        count, rows = len(losses), losses.shape[2]
        if rows < 2:
            return Signal(0.0, 0.0, 0.0, 0.0, 0.0, float(plain.mean()) if rows else float("nan"))
        d = (losses[:, 0] - losses[:, 1]) / 2
        c = (losses[:, 0] + losses[:, 1] - 2 * plain).mean(axis=1)
        g = d.mean(axis=1) ** 2 - d.var(axis=1, ddof=1) / rows
        several = max(1, count - 1)
        return Signal(
            float(g.mean()),
            float(g.std() / several**0.5),
            float((d**2).mean()),
            float(c.mean()),
            float(c.std() / several**0.5),
            float(plain.mean()),
        )


@dataclass(frozen=True)
class Pace:
    """What a run steps with from ``at`` on."""

    at: int
    sigma: float
    factor: float  # of the preset's step
    took_s: float = 0.0
    why: str = ""  # a warning, where nothing could be told

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "at"}


def best_step(signal: Signal, credit: str, batch_size: int, sigma: float) -> float | None:
    """The step that promises most; None where gradient or curvature cannot be told from noise."""
    gradient, curvature = signal.gradient, signal.curvature
    if gradient <= signal.gradient_error or curvature <= signal.curvature_error:
        return None
    if credit == "mean":
        moved = gradient + signal.differences / batch_size
        return gradient * sigma**2 / (moved * curvature)
    return gradient / (signal.differences**0.5 * curvature)


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


@dataclass
class Pacer:
    """Measures for one run."""

    steps: Steps

    def due(self, step: int) -> bool:
        last = self.steps.pace
        return last is None or (step % CHECK_EVERY == 0 and step > last.at)

    def measure(self, step: int) -> Pace:
        """The pace from ``step`` on, from the rows of that step's batch."""
        begun_s = time.monotonic()
        cfg, last = self.steps.cfg, self.steps.pace
        assert cfg.batch_size is not None
        plain = self._losses(step, None, cfg.sigma)[0]
        if last is None:
            rungs = [self._probed(step, DIRECTIONS, cfg.sigma * rung) for rung in LADDER]
            slopes = [
                (found[:, 0] - found[:, 1]) / rung
                for found, rung in zip(rungs, LADDER, strict=True)
            ]
            times, error = best_sigma(np.stack([slope.reshape(-1) for slope in slopes]))
            sigma = cfg.sigma * times
            found = rungs[1] if times == 1.0 else self._probed(step, DIRECTIONS, sigma)
        else:
            sigma, error = last.sigma, 0.0
            found = self._probed(step, DIRECTIONS_AGAIN, sigma)
        signal = Signal.of(found, plain)
        wanted = best_step(signal, cfg.credit, cfg.batch_size, sigma)
        factor, why = (1.0 if last is None else last.factor), ""
        if wanted is None:
            why = no_signal(signal, error, self.steps)
        elif last is None:
            factor = float(np.clip(wanted / cfg.step, 1 / FURTHEST_STEP, FURTHEST_STEP))
        else:  # half way, for two directions tell little
            change = (wanted / cfg.step / last.factor) ** 0.5
            factor *= float(np.clip(change, 1 / FURTHEST_AGAIN, FURTHEST_AGAIN))
        return Pace(step, sigma, factor, time.monotonic() - begun_s, why)

    def _probed(self, step: int, count: int, sigma: float) -> np.ndarray:
        """Losses (count, 2, R) along so many directions."""
        return np.stack([self._losses(step, k, sigma) for k in range(count)])

    def _losses(self, step: int, k: int | None, sigma: float) -> np.ndarray:
        """Losses (sides, R) of the step's batch, along direction k for all rows or plain."""
        steps, model = self.steps, self.steps.model
        cfg = steps.cfg
        assert cfg.batch_size is not None and cfg.micro_batch is not None
        rows = steps.batch(step)
        losses = np.full((1 if k is None else 2, len(rows)), np.nan, np.float32)
        key = None if k is None else Key(cfg.seed ^ SEED, step * DIRECTIONS + k)
        for part in micro_batches(rows, cfg.micro_batch, steps.most_tokens):
            examples = [rows[i] for i in part]
            batch = collate(examples, [0] * len(part))  # one slot: one direction for all
            steps.check_room("the next micro-batch")
            with phase("forward"), steps.memory.short("a micro-batch"):
                losses[:, part] = steps.losses(batch, examples, key, sigma).numpy()
        model.take_touched(1)
        return losses


def no_signal(signal: Signal, error: float, steps: Steps) -> str:
    """Why no step can be told, and what to do about it."""
    cfg = steps.cfg
    if signal.differences == 0.0:
        if cfg.objective != "loss":
            return (
                f"--objective {cfg.objective} is the same on both sides of every probe: no prediction changes at "
                f"sigma {cfg.sigma:g}. Give a larger --sigma, or an objective that more predictions meet."
            )
        return (
            f"no loss differs between both sides of a probe: sigma {cfg.sigma:g} is lost in the rounding of "
            f"{cfg.precision} weights. Give a larger --sigma."
        )
    if abs(signal.loss) < LEARNED_LOSS and cfg.objective == "loss":
        return f"the loss is {signal.loss:.1e} already: there is nothing left to learn."
    if error > 1.0:
        return (
            "differences of losses do not grow with sigma: they are rounding, or sigma reaches beyond where the loss "
            "is smooth. Give a higher --precision or another --sigma."
        )
    if signal.gradient <= signal.gradient_error:
        return (
            f"examples disagree: their common gradient is not above its error over {cfg.batch_size} rows. "
            "Give a larger --batch-size, or expect progress after more steps."
        )
    return "the loss bends no way that could be measured, so nothing bounds the step."
