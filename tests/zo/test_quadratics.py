"""Every preset descends a quadratic at the rate that its formula predicts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import reference
import torch
import torch.nn.functional as F
from preset_trials import compared, finetuner_scales, presets, probed_of_quantized, with_pull
from torch import Tensor

from edgezo.plan.request import make_config
from edgezo.run.echo import echo_of_step
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import recipe_of
from edgezo.weights.layouts import Dense
from edgezo.weights.store import WeightStore
from edgezo.zo import masks, rules
from edgezo.zo.axes import CREDITS, PER_WEIGHT, step_meaning
from edgezo.zo.credit import Estimator
from edgezo.zo.directions import DIRECTION_KINDS, on_grid, orthonormal
from edgezo.zo.noise import Key
from edgezo.zo.presets import PRESETS

ROWS, COLS, BLOCKS, GROUP = 5, 8, 4, 6
KAPPA_RATE, SLOPE_RATE, DESCENT = 1.0, 0.004, 20


def descend(name: str, seed: int) -> tuple[float, float, int]:
    """(|theta|^2 at the end, at the start, number of values) for l(theta) = |theta|^2/2 as the loss of every example.

    Four matrices in four blocks; the losses come from the reference's own directions. Of a sparse mask only what it
    leaves counts.
    """
    request = {"model": "m", "task": "t", "estimator": name, "precision": "fp32"}
    request |= {"finetuner": "f"} if PRESETS[name].mask == "block" else {}
    cfg = make_config(request)
    estimator = Estimator.of(cfg)
    rate = SLOPE_RATE if cfg.credit in ("raw", "mean", "clipped", "svrg") else KAPPA_RATE
    rate = (
        0.01
        if step_meaning(cfg.credit, cfg.rule) == PER_WEIGHT
        else rate / 10
        if cfg.credit == "svrg"
        else rate
    )
    cfg = replace(cfg, step=rate, sigma=1e-3, seed=seed, batch_size=GROUP)
    records: dict[int, StepRecord] = {}
    directions = DIRECTION_KINDS[cfg.directions]._replace(rank=4, refresh=20)
    mask = masks.mask_of(cfg.mask, cfg.keep, cfg.sigma)
    store = WeightStore(seed, 8, directions, mask=mask, rule=rules.UPDATE_RULES[cfg.rule])
    store.vote_size = cfg.sigma
    generator = torch.Generator().manual_seed(seed)
    for block in range(BLOCKS):
        store.train(f"h.{block}.w", Dense(torch.randn(ROWS, COLS, generator=generator)))
    store.anchored = cfg.anchored
    store.prepare()
    trainables = list(store.trainables.values())
    whole = math.inf
    moving = [r.values.abs() < (whole if r.threshold is None else r.threshold) for r in trainables]
    inputs = torch.eye(COLS)
    if directions.guided:  # all inputs are the same: the loss is |W v|^2/2, of one value a row
        v = on_grid(F.normalize(torch.randn(1, COLS, generator=generator))).expand(GROUP, -1)
        for r in trainables:
            if directions.factored:
                r.guides = dict(enumerate(v))
            else:
                r.basis = orthonormal(torch.randn(COLS, 4, generator=generator) * 0.5)
                r.basis = orthonormal(torch.cat([v[:1].T, r.basis.T[:, :3]], 1))
        moving, inputs = [m[:, :1] for m in moving], v[:1].T
    guides = reference.probed_guides(store)

    def square() -> float:
        parts = [r.values @ inputs for r in trainables]
        return sum(float(p[m].square().sum()) for p, m in zip(parts, moving, strict=True))

    masked = probed_of_quantized if cfg.mask == "quantized" else reference.masked
    many, start = CREDITS[cfg.credit].per_example, square()
    sides, pull, carried = len(estimator.evaluations), 0.0, None
    anchor: list[Tensor] = []
    losses = np.empty((2 * sides, GROUP if many else 1))
    number = max(losses.shape[1], *((e.candidate or 0) + 1 for e in estimator.evaluations), 1)
    for step in range(DESCENT):
        key, at = Key(seed, step), [r.values.double() for r in trainables]
        scales = finetuner_scales(cfg, store, step)
        echo = echo_of_step(cfg, store, step, records.__getitem__)
        store.echo = tuple(echo.tolist())
        along = [
            [masked(store, r, key, slot, a) for r, a in zip(trainables, at, strict=True)]
            for slot in range(number)
        ]
        anchor = at if cfg.is_anchor(step) else anchor
        evaluated = [(at, e) for e in estimator.evaluations]
        if compared(cfg, step):
            evaluated += [(anchor, e) for e in estimator.evaluations]
        for side, (place, e) in enumerate(evaluated):
            for slot in range(losses.shape[1]):
                d = along[slot if e.candidate is None else e.candidate]
                parts = [a + e.sign * cfg.sigma * b for a, b in zip(place, d, strict=True)]
                losses[side, slot] = (
                    sum(float((p @ inputs.double()).square().sum()) for p in parts) / 2
                )
        evaluated_losses = losses[: len(evaluated)]
        credit = carried = estimator.recorded(evaluated_losses, cfg.sigma, step, carried)
        carried = carried[len(carried) - cfg.carried :]
        pull = float(credit.mean()) if cfg.is_anchor(step) else pull
        credit = np.append(with_pull(cfg, step, credit, pull), echo).astype(np.float32)
        record = StepRecord(step, cfg.sigma, cfg.step, False, evaluated_losses, credit, (), scales)
        records[step] = record
        store.apply([recipe_of(cfg, record)._replace(guides=guides)])
    return square(), start, sum(int(m.sum()) for m in moving)


def predicted(name: str, start: float, values: int, tries: int = 300) -> float:
    """The mean of |theta|^2 at the end, if each D.theta/|theta| is N(0,1) and the rest of D only adds noise.

    An isotropic quadratic knows nothing but the radius: r^2 <- (r - sum_i c_i x_i)^2 + (d - 1) sum_i c_i^2.
    """
    rng, entry, sigma = np.random.default_rng(0), PRESETS[name], 1e-3
    shares = BLOCKS if entry.mask == "layers" else 1  # one block of the four moves
    d, r2 = values // shares, np.full(tries, start)
    group = {"mean": 1, "clipped": 1, "candidates": 8}.get(entry.credit, GROUP)
    for _ in range(DESCENT):
        r = np.sqrt(r2 / shares)
        x = rng.standard_normal((tries, group))
        spread = x.std(1, keepdims=True) if group > 1 else 1.0
        centre = x.mean(1, keepdims=True) if entry.credit in ("one-sided", "centred") else 0.0
        if entry.credit in ("mean", "clipped", "raw"):
            c = SLOPE_RATE * x * r[:, None] / group
        elif entry.credit == "uniform":
            c = KAPPA_RATE * sigma * np.ones_like(x)
        else:
            c = KAPPA_RATE * sigma * (x - centre) / spread
        r2 += (r - (c * x).sum(1)) ** 2 + (d - 1) * (c**2).sum(1) - r**2
    return float(r2.mean())


# Rows whose pace no radius tells: what they keep from step to step turns their steps.
OTHER_PACE = {
    "mezo-svrg": 0.99,
    "mezo-adam": 0.985,
    "lozo-m": 0.95,
    "zo-adamu": 0.95,
    "replayed-momentum": 0.99,
    "replayed-adam": 0.985,
    "adamezo": 0.985,
    "meazo": 0.985,
    "bszo": 0.985,
    "vote": 1.0,
    "zo-muon": 0.99,
    "zo-dap": 0.97,
    "dap-grzo": 0.99,
    "conmezo": 0.97,
}


@presets
def test_a_quadratic_is_descended_at_the_predicted_rate(name: str) -> None:
    tries = 3 if name in OTHER_PACE else 4
    ends, starts, values = (
        np.array(a) for a in zip(*(descend(name, s) for s in range(tries)), strict=True)
    )
    remaining = ends / starts
    if name in OTHER_PACE:
        assert remaining.mean() < OTHER_PACE[name]
        return
    wanted = predicted(name, starts.mean(), int(values.mean())) / starts.mean()
    error = 4 * remaining.std() / math.sqrt(tries) + 0.1 * abs(1 - wanted)
    assert abs(remaining.mean() - wanted) < error
    assert (wanted < 0.99) == (name != "grzo-uniform")
    assert (remaining.mean() < 0.99) == (name != "grzo-uniform")
