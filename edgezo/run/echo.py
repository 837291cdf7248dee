"""What a step's directions take up of the steps before it (zo/echoes.py), from the records of the journal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgezo.plan.config import RunConfig
from edgezo.run.journal_record import StepRecord
from edgezo.weights import inner_products
from edgezo.weights.store import WeightStore
from edgezo.zo.axes import DIRECTIONS, ECHO_DEPTH
from edgezo.zo.echoes import PastStep, aligned, aligned_signs, cone, fresh
from edgezo.zo.noise import Key


def echo_of_step(
    cfg: RunConfig, store: WeightStore, step: int, record: Callable[[int], StepRecord]
) -> np.ndarray:
    """The numbers (n,) fp32 that make the directions of a step from noise.

    None where they are fresh noise alone, and where nothing is perturbed. ``record``: that of an earlier step of the
    run. Past steps of a run's parents are not looked at.
    """
    entry = DIRECTIONS[cfg.directions]
    if not entry.echoes or not cfg.probing:
        return np.empty(0, np.float32)
    key, targets = (
        Key(store.seed, cfg.since_base(step)),
        [t.target for t in store.trainables.values()],
    )
    if entry.per_example:
        count = cfg.carried // 2
        if not step:
            return np.zeros(2 * count, np.float32)
        last = Key(key.seed, key.step - 1)
        across, among = (
            inner_products.of_signs(targets, store.directions, keys, count)
            for keys in ((key, last), (last, last))
        )
        return aligned_signs(record(step - 1).credit[:count], across, among, key)
    if not step:
        return fresh()
    steps = [step - back for back in range(1, min(step, ECHO_DEPTH) + 1)]
    past = [_past_step(cfg, record(earlier)) for earlier in steps]
    noises = [key.step - back if back <= step else -1 for back in range(ECHO_DEPTH + 1)]
    products = inner_products.of_normals(targets, store.seed, noises)
    if cfg.directions == "aligned":
        return aligned(past, products, key)
    return cone(past, products, sum(target.rows * target.cols for target in targets))


def _past_step(cfg: RunConfig, record: StepRecord) -> PastStep:
    slopes, echo = record.credit[: -cfg.carried], record.credit[-cfg.carried :]
    return PastStep(float(slopes.mean(dtype=np.float64)) / record.sigma, echo)
