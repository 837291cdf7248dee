"""Decay pulls weights towards 0, or towards what the base has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from preset_trials import Maker

from edgezo.zo.noise import exact_grid
from edgezo.zo.recipe import Recipe

DECAY = 0.25


@pytest.mark.parametrize(("train", "precision"), [("full", "bf16"), ("lowrank+norms", "fp32")])
def test_weights_shrink_towards_those_of_the_base(
    train: str, precision: str, tmp_path: Path
) -> None:
    maker = Maker(tmp_path)
    changes = {"train": train, "weight_decay": DECAY, "weight_decay_to": "base"}
    trial = maker.trial("grzo", precision, **changes)
    base, store = trial.values(), trial.model.store
    for step in range(3):
        c = exact_grid(np.random.default_rng(step).standard_normal(4) * 0.05)
        trial.losses(step)
        recipe = Recipe(step, c, DECAY, trial.model.take_touched(4))
        before = trial.values()
        store.apply([recipe])
        after = trial.values()
        for name, trainable in store.trainables.items():
            rows = [used.get(name, torch.arange(trainable.target.rows)) for used in trial.used]
            moved = torch.zeros(trainable.target.rows, 1, dtype=torch.bool)
            moved[torch.cat(rows)] = True
            kept = base[name] + (1 - DECAY) * (before[name] - base[name])
            wanted = torch.where(moved, kept, before[name])
            wanted = wanted + reference.update(store, recipe, name, rows)
            spare = 1e-6 if precision == "fp32" else 1e-3  # half a step of the plane below bf16
            assert bool(((after[name] - wanted).abs() <= spare * (1 + wanted.abs())).all()), name
    assert any(((after[n] - base[n]).abs().max() > 0.01) for n in base)
