"""Fleets of 10 to 1,000,000 devices on paper: edgezo's directions, credits and records, with a model small enough.

    python benchmarks/fleet.py credit      [--steps 200] [--seeds 3]      accuracy by credit and group size
    python benchmarks/fleet.py staleness                                  by how old the weights are
    python benchmarks/fleet.py drop-out                                   by how many losses never come
    python benchmarks/fleet.py lies                                       by who lies, and what the median bounds
    python benchmarks/fleet.py noise                                      by noise that hides rows
    python benchmarks/fleet.py population  [--each 1]                     seconds a step, bytes of a device and day

The model is tanh(W1 x), then softmax(W2 h): 16 inputs, 32 hidden values, 8 classes of overlapping clouds; 768 weights.
Each device has rows mostly of one class. Directions are ``signs`` (edgezo/zo/directions.py), credits and coefficients
those of edgezo/zo/credit.py; what the median leaves out is what a server leaves out (edgezo/run/fleet_messages.py).

Devices: speed log-normal (the slowest 5 % are 10 times slower than the fastest 5 %); 5 to 20 % of all are there,
by the hour of the day, and 8 % of those asked never answer: what Bonawitz et al. report (arXiv 1902.01046: drop-out
6 to 10 %, 4 times as many devices at night as by day). A step asks 1.3 times the devices that it needs, as there, and
waits until it has enough answers.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from edgezo.run.fleet_messages import outlying
from edgezo.run.journal_record import FIXED_BYTES
from edgezo.zo.credit import Estimator, compose, schedule
from edgezo.zo.directions import DIRECTION_KINDS, Target
from edgezo.zo.noise import Key

INPUTS, HIDDEN, CLASSES = 16, 32, 8
FIRST, SECOND = Target("w1", HIDDEN, INPUTS, False), Target("w2", CLASSES, HIDDEN, False)
SIGNS = DIRECTION_KINDS["signs"]
SIGMA = 3e-3
MAIN_CLASS = 0.7  # share of a device's rows that are of its own class
ORDER_BYTES, REPORT_BYTES = 28, 36  # heads of messages (fleet_messages.py)


@dataclass(frozen=True)
class Trial:
    """One setting of a run."""

    batch: int = 64
    credit: str = "group"
    step: float = 0.1  # kappa, or a learning rate
    stale: int = (
        0  # steps that the losses of the slowest device are behind; others are behind by less
    )
    drop: float = 0.0  # share of losses that never come
    liars: float = 0.0  # share of losses that are lies
    lie: str = "flipped"
    bound: float | None = None  # --most_times_median of the server
    noise: float = 0.0  # of each loss, in standard deviations of the difference between sides


LIES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "flipped": lambda losses, draw: losses[::-1],
    "huge": lambda losses, draw: np.stack([np.full(losses.shape[1], 1e6), 0 * losses[1]]),
    "8 times, flipped": lambda losses, draw: (
        losses.mean(axis=0) - 8 * (losses - losses.mean(axis=0))
    ),
}


class World:
    """Rows, and what is right about them."""

    def __init__(self, seed: int):
        self.draw = np.random.default_rng([seed, 1])
        self.centres = np.random.default_rng(7).normal(size=(CLASSES, INPUTS)) * 0.9
        self.tested = self.rows(2000, main=None)

    def rows(self, n: int, main: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(n, INPUTS) fp32 and classes (n,) of devices whose own classes are ``main`` (n,)."""
        label = self.draw.integers(0, CLASSES, n)
        if main is not None:
            label = np.where(self.draw.random(n) < MAIN_CLASS, main, label)
        x = self.centres[label] + self.draw.normal(size=(n, INPUTS))
        return x.astype(np.float32), label


def losses_of(
    weights: tuple[np.ndarray, np.ndarray],
    x: np.ndarray,
    label: np.ndarray,
    key: Key | None,
    slots: Sequence[int],
) -> np.ndarray:
    """Losses (2, B) along each example's direction, or (1, B) without a key."""
    w1, w2 = weights
    sides = (SIGMA, -SIGMA) if key is not None else (0.0,)
    losses = []
    if key is not None:
        r1, s1, r2, s2 = (
            part.numpy().astype(np.float32)
            for target in (FIRST, SECOND)
            for part in (SIGNS.row_signs(key, target, slots), SIGNS.col_signs(key, target, slots))
        )
    for side in sides:
        h = x @ w1.T
        if key is not None:
            h += side * r1 * (s1 * x).sum(axis=1, keepdims=True)
        h = np.tanh(h)
        z = h @ w2.T
        if key is not None:
            z += side * r2 * (s2 * h).sum(axis=1, keepdims=True)
        top = z.max(axis=1)
        log_sum = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
        losses.append(log_sum - z[np.arange(len(x)), label])
    return np.stack(losses)


def moved(
    weights: tuple[np.ndarray, np.ndarray], key: Key, coefficients: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weights after an update."""
    c = torch.from_numpy(coefficients)
    w1, w2 = (
        w - SIGNS.weighted_sum(key, target, c, slice(0, target.rows)).numpy()
        for w, target in zip(weights, (FIRST, SECOND), strict=True)
    )
    return w1, w2


def run(trial: Trial, steps: int, seed: int) -> float:
    """Accuracy on fresh rows of all classes after so many steps; NaN where weights are no longer finite."""
    world = World(seed)
    estimator: Estimator = compose(trial.credit, "none", "sgd", 0)
    start = np.random.default_rng([seed, 2])
    weights = (
        (start.normal(size=(HIDDEN, INPUTS)) / math.sqrt(INPUTS)).astype(np.float32),
        (start.normal(size=(CLASSES, HIDDEN)) / math.sqrt(HIDDEN)).astype(np.float32),
    )
    past = deque([weights], maxlen=trial.stale + 1)
    shared = trial.credit == "mean"
    for step in range(steps):
        key = Key(seed, step)
        x, label = world.rows(trial.batch, world.draw.integers(0, CLASSES, trial.batch))
        behind = world.draw.integers(0, trial.stale + 1, trial.batch)
        losses = np.empty((2, trial.batch))
        for late in np.unique(behind):
            at = np.flatnonzero(behind == late)
            slots = [0] * len(at) if shared else at.tolist()
            old = past[-1 - min(int(late), len(past) - 1)]
            losses[:, at] = losses_of(old, x[at], label[at], key, slots)
        if trial.noise:
            spread = np.std(losses[0] - losses[1])
            losses += world.draw.normal(size=losses.shape) * trial.noise * spread / math.sqrt(2)
        lying = np.flatnonzero(world.draw.random(trial.batch) < trial.liars)
        if len(lying):
            losses[:, lying] = LIES[trial.lie](losses[:, lying], world.draw)
        losses[:, world.draw.random(trial.batch) < trial.drop] = np.nan
        losses = losses[: len(estimator.evaluations)].astype(np.float32)
        if trial.bound is not None:
            losses[:, outlying(losses, trial.bound)] = np.nan
        credit = estimator.credit(losses)
        if credit.any():
            size = trial.step * schedule("linear", step / steps)
            coefficients = estimator.coefficients(credit, size, SIGMA)
            if shared:
                coefficients = coefficients.sum(keepdims=True)
            weights = moved(weights, key, coefficients)
        past.append(weights)
    if not all(np.isfinite(w).all() for w in weights):
        return math.nan
    x, label = world.tested
    h = np.tanh(x @ weights[0].T)
    return float(((h @ weights[1].T).argmax(axis=1) == label).mean())


def shown(name: str, trial: Trial, steps: int, seeds: int) -> float:
    """Print a line with the mean accuracy and its spread."""
    ends = [run(trial, steps, seed) for seed in range(seeds)]
    print(f"| {name} | {np.mean(ends):.3f} | {min(ends):.3f} to {max(ends):.3f} |", flush=True)
    return float(np.mean(ends))


def best_step(trial: Trial, grid: Sequence[float], steps: int, seeds: int) -> Trial:
    """The trial with the best step size of a grid, by the mean over seeds other than those that are shown."""
    scored = [
        (float(np.mean([run(replace(trial, step=s), steps, 100 + i) for i in range(seeds)])), s)
        for s in grid
    ]
    return replace(trial, step=max(scored)[1])


KAPPAS = (0.1, 0.3, 1.0, 3.0)
RATES = (0.03, 0.1, 0.3, 1.0)


def by_credit(steps: int, seeds: int) -> None:
    """Credits and group sizes, each with the best step of a grid."""
    for credit, grid in (("group", KAPPAS), ("raw", RATES), ("mean", RATES), ("one-sided", KAPPAS)):
        for batch in (8, 64, 256) if credit == "group" else (64,):
            trial = best_step(Trial(batch=batch, credit=credit), grid, steps, 1)
            shown(f"{credit}, B {batch}, step {trial.step:g}", trial, steps, seeds)


GROUP = Trial(step=1.0)  # the best step at B 64


def by_staleness(steps: int, seeds: int) -> None:
    """Losses of weights 0 to s steps ago."""
    for stale in (0, 2, 8, 32, 128):
        for share in (1, 4):
            trial = replace(GROUP, stale=stale, step=GROUP.step / share)
            shown(f"s {stale}, step {trial.step:g}", trial, steps, seeds)


def by_drop(steps: int, seeds: int) -> None:
    """Losses that never come."""
    for drop in (0.0, 0.08, 0.3, 0.6, 0.9):
        shown(f"{drop:.0%}", replace(GROUP, drop=drop), steps, seeds)


def by_lies(steps: int, seeds: int) -> None:
    """Devices that lie, and a bound by the median; without liars last."""
    for lie in LIES:
        for liars in (0.1, 0.3):
            for bound in (None, 10.0, 3.0):
                name = f"{lie}, {liars:.0%}" + (f", median x {bound:g}" if bound else "")
                shown(name, replace(GROUP, liars=liars, lie=lie, bound=bound), steps, seeds)
    for bound in (3.0, 10.0):
        shown(f"none, median x {bound:g}", replace(GROUP, bound=bound), steps, seeds)


def by_noise(steps: int, seeds: int) -> None:
    """Noise on each difference of losses, in its standard deviations."""
    for batch in (64, 256):
        for noise in (0.0, 1.0, 3.0, 10.0):
            for share in (1, 4) if noise >= 3 else (1,):
                step = GROUP.step * (64 / batch) ** 0.5 / share
                trial = replace(GROUP, batch=batch, noise=noise, step=step)
                shown(f"B {batch}, noise {noise:g}, step {step:g}", trial, steps, seeds)


TABLES = {
    "credit": by_credit,
    "staleness": by_staleness,
    "drop-out": by_drop,
    "lies": by_lies,
    "noise": by_noise,
}


FORWARD_S = 1.0  # of a plain forward over one example, on a device of median speed
REPLAYED_S = 60.0  # steps that it replays a second
TRAINED_BYTES = (
    3.4e6  # low-rank factors of a 135M model; beyond so many bytes of records they are sent instead
)
LINK_BYTES_S = 1e6  # 8 Mbit/s
GONE, PATIENCE_S, MOST_DEVICES = 0.08, 60.0, 64
COLUMNS = (
    *("devices", "there", "asked", "group", "s a step", "steps a day", "left out"),
    *("lacks records", "catches up in s", "MB a day, follows", "MB a day, when asked"),
)


def population(each: int, steps: int, seed: int) -> None:
    """Seconds a step, and what a device receives and sends, by the size of the fleet."""
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for devices in (10, 100, 1000, 10_000, 100_000, 1_000_000):
        print("| " + " | ".join(map(str, of_fleet(devices, each, steps, seed))) + " |", flush=True)


def of_fleet(devices: int, each: int, steps: int, seed: int) -> list[object]:
    """A row of the table."""
    draw = np.random.default_rng([seed, devices])
    speed, zone = np.exp(draw.normal(0, 0.7, devices)), draw.random(devices)
    seconds, lost, there, behind, groups, asks = [], [], [], [], [], []
    clock_s = 0.0
    while len(seconds) < steps:
        share = 0.125 + 0.075 * np.cos(2 * np.pi * (clock_s / 86_400 + zone))
        if devices <= 100:  # machines of one owner
            share = np.full(devices, 0.9)
        here = np.flatnonzero(draw.random(devices) < share)
        need = max(1, min(MOST_DEVICES, int(len(here) / 1.3)))
        asked = draw.choice(here, min(len(here), math.ceil(1.3 * need)), replace=False)
        # Steps since a device was asked last: all devices are asked alike often.
        lacking = draw.exponential(devices / len(asked), len(asked))
        record = FIXED_BYTES + 12 * need * each
        by_records = lacking * record < TRAINED_BYTES
        behind_s = np.minimum(lacking * record, TRAINED_BYTES) / LINK_BYTES_S
        behind_s += np.where(by_records, lacking / REPLAYED_S / speed[asked], 0.0)
        answer_s = (
            draw.uniform(0.1, 0.6, len(asked)) + 2 * each * FORWARD_S / speed[asked] + behind_s
        )
        answer_s[draw.random(len(asked)) < GONE] = np.inf
        step_s = min(PATIENCE_S, np.sort(answer_s)[need - 1])
        seconds.append(step_s)
        lost.append(max(0, need - int((answer_s <= step_s).sum())) / need)
        there.append(len(here))
        behind.append((np.median(lacking), np.median(behind_s)))
        groups.append(need * each)
        asks.append(len(asked))
        clock_s += 86_400 / steps  # steps of one day are looked at, evenly
    a_day, group = 86_400 / float(np.mean(seconds)), float(np.mean(groups))
    record = FIXED_BYTES + 12 * group
    times = float(np.mean(asks)) / devices * a_day  # that a device is asked in a day
    message = ORDER_BYTES + REPORT_BYTES + 16 * each
    lacked = min(record * a_day / times, TRAINED_BYTES)
    return [
        *(f"{devices:,}", int(np.mean(there)), int(np.mean(asks)), int(group)),
        *(f"{np.mean(seconds):.1f}", f"{a_day:,.0f}", f"{np.mean(lost):.1%}"),
        *(f"{np.mean([b[0] for b in behind]):,.0f}", f"{np.mean([b[1] for b in behind]):.1f}"),
        *(f"{(record + 4) * a_day / 1e6:.1f}", f"{times * (message + lacked) / 1e6:.2f}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*TABLES, "population"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", type=int, default=1, help="examples of a device in a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "population":
        population(args.each, args.steps, args.seed)
        return
    print("| | accuracy | |\n|---|---|---|", flush=True)
    TABLES[args.what](args.steps, args.seeds)


if __name__ == "__main__":
    main()
