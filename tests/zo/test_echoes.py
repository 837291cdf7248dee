"""Directions that lean on past steps' estimate keep what their papers ask of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from preset_trials import SEED, Maker, Trial

from edgezo.errors import UsageError
from edgezo.zo.axes import ECHO_DEPTH
from edgezo.zo.echoes import ANGLE, PastStep, estimate, signs_of
from edgezo.zo.noise import Key

STEPS = 4


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("model"))


def flat(trial: Trial, step: int, kind: str, slot: int = 0) -> np.ndarray:
    """A plain direction over everything that is trained, float64."""
    targets = [t.target for t in trial.model.store.trainables.values()]
    parts = [reference.direction(kind, Key(SEED, step), t, slot).numpy().ravel() for t in targets]
    return np.concatenate(parts)


def taken(trial: Trial, step: int, slot: int = 0) -> np.ndarray:
    """The direction that a step took, over everything that is trained."""
    names = trial.model.store.trainables
    return np.concatenate([trial.directions(step, name)[slot].numpy().ravel() for name in names])


def slope(trial: Trial, step: int) -> float:
    record = trial.records[step]
    return float(record.credit[: -trial.cfg.carried].mean())


@pytest.mark.parametrize(("name", "kept"), [("zo-dap", 1.0), ("conmezo", 0.9)])
def test_a_direction_leans_on_the_estimate_of_the_last_steps(
    name: str, kept: float, maker: Maker
) -> None:
    trial, moved = maker.trial(name), []
    for step in range(STEPS):
        losses = trial.losses(step)
        moved.append(taken(trial, step))
        if step:
            # The twin adds up whole vectors. Four steps and a depth of four leave nothing out.
            g = sum(
                kept ** (back - 1) * slope(trial, step - back) * moved[step - back]
                for back in range(1, step + 1)
            )
            z, u = flat(trial, step, "shared"), g / np.linalg.norm(g)
            if name == "zo-dap":
                s = signs_of(Key(SEED, step), 1)[0]
                wanted = z + (s - z @ u) * u
                assert moved[step] @ u == pytest.approx(s, rel=1e-3)  # (v.g)^2 = |g|^2
            else:
                wanted = math.sin(ANGLE) * z + math.cos(ANGLE) * math.sqrt(len(z)) * u
            np.testing.assert_allclose(moved[step], wanted, atol=2e-3)
        trial.model.store.apply([trial.recipe(step, losses)])


def test_the_direction_of_each_example_is_aligned_with_the_last_groups_estimate(
    maker: Maker,
) -> None:
    trial = maker.trial("dap-grzo")
    for step in range(STEPS):
        losses = trial.losses(step)
        if step:
            a = trial.records[step - 1].credit[:4].astype(np.float64)
            g = sum(x * flat(trial, step - 1, "signs", slot) for slot, x in enumerate(a))
            u, signs = g / np.linalg.norm(g), signs_of(Key(SEED, step), 4)
            for slot in range(4):
                d = flat(trial, step, "signs", slot)
                wanted = d + (signs[slot] - d @ u) * u
                np.testing.assert_allclose(taken(trial, step, slot), wanted, atol=1e-4)
                assert taken(trial, step, slot) @ u == pytest.approx(signs[slot], rel=1e-3)
        trial.model.store.apply([trial.recipe(step, losses)])


def test_an_estimate_forgets_noise_that_is_too_long_ago() -> None:
    weights = np.array([1.0, 10.0, 100.0, 1e3, 1e4], np.float32)
    steps = [PastStep(2.0, weights), PastStep(3.0, weights)]
    assert estimate(steps, 0.5).tolist() == [2.0, 21.5, 215.0, 2150.0]
    assert len(estimate([], 1.0)) == ECHO_DEPTH


@pytest.mark.parametrize("name", ["zo-dap", "dap-grzo", "conmezo"])
def test_full_weights_are_refused(name: str, maker: Maker) -> None:
    with pytest.raises(UsageError, match="past steps"):
        maker.config(name, train="full")
