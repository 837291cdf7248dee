"""--step auto: the step that promises most, the sigma at which differences are slopes, and runs with both."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from edgezo.errors import UsageError
from edgezo.machine.files import to_json
from edgezo.plan.request import make_config
from edgezo.run.auto_step import (
    FASTER,
    FURTHEST,
    LADDER,
    MOVES,
    SLOWER,
    Pace,
    best_sigma,
    look_again,
    rate_of,
)
from edgezo.zo.credit import group_credit


def test_a_learning_rate_moves_as_far_as_group_credit_does():
    rng, n, batch, sigma = np.random.default_rng(0), 400, 16, 2e-3
    gradients = rng.standard_normal((batch, n)) + 0.3
    moved = []
    for _ in range(300):
        z = rng.integers(0, 2, (batch, n)) * 2.0 - 1
        delta = 2 * sigma * (z * gradients).sum(1)
        moved.append(MOVES * sigma * group_credit(np.stack([delta, 0 * delta])) @ z)
    z = rng.integers(0, 2, (300, n)) * 2.0 - 1
    slopes = z @ gradients.mean(0)
    told = rate_of(slopes[:200], sigma, batch) * slopes[:, None] * z
    assert np.std(told) == pytest.approx(np.std(moved), rel=0.15)
    # Twice the loss, half the rate.
    assert rate_of(2 * slopes, sigma, batch) == pytest.approx(rate_of(slopes, sigma, batch) / 2)


def test_the_step_follows_what_the_same_rows_lose():
    rng = np.random.default_rng(1)
    rows = rng.random(48) * 5  # far more between rows than any change
    last = Pace(25, 1e-3, 1.0, 1.0, tuple(rows), 2)
    noise = 0.05 * rng.standard_normal(48)
    assert look_again(last, rows + noise - 0.1) == (FASTER, 0)
    assert look_again(last, rows + noise + 0.1) == (SLOWER, 3)
    assert look_again(last, rows) == (1.0, 3)
    assert look_again(last, np.where(np.arange(48) < 3, np.nan, rows)) == (1.0, 3)
    assert look_again(last, np.full(48, np.inf)) == (SLOWER, 3)
    far = Pace(25, 1e-3, 1.9 * FURTHEST, 2.0, tuple(rows), 0)
    assert look_again(far, rows + noise - 0.1)[0] == 2 * FURTHEST


def test_a_pace_comes_back_from_the_log_with_losses_that_are_not_finite():
    pace = Pace(25, 1e-3, 1.0, 1.0, (0.5, float("nan"), 2.0))
    again = Pace.of(25, json.loads(to_json(pace.to_dict())))
    assert np.array_equal(again.losses, pace.losses, equal_nan=True)
    assert look_again(again, np.array([0.4, 0.3, 1.9])) == (FASTER, 0)


@pytest.mark.parametrize(
    "noise, cubic, least, most",
    [
        (1e-3, 1e-3, 1.0, 1.0),  # proportional: nothing to change
        (0.1, 1e-3, 1.0, 1.0),
        (1.0, 1e-3, 3.0, 8.0),  # rounding: larger
        (1e-3, 1.0, 0.125, 0.5),  # third derivatives: smaller
    ],
)
def test_sigma_grows_out_of_rounding_and_shrinks_to_where_losses_are_smooth(
    noise, cubic, least, most
):
    rng = np.random.default_rng(0)
    slope, third = rng.standard_normal(500), rng.standard_normal(500)
    slopes = [slope + noise * rng.standard_normal(500) / r + cubic * third * r**2 for r in LADDER]
    times, error = best_sigma(np.stack(slopes))
    assert least <= times <= most
    assert error < max(noise, cubic) ** 2 + 0.01


def test_no_difference_at_all_tells_no_sigma():
    assert best_sigma(np.zeros((3, 8))) == (1.0, float("inf"))


def asked(**said):
    return make_config({"model": "m", "data": "d", **said})


def test_auto_is_a_step_and_a_number_takes_its_place():
    cfg = asked(step="auto")
    assert cfg.step_auto and cfg.step == asked().step
    assert not make_config({"step": "0.2"}, {"model": "m", "data": "d", "step": "auto"}).step_auto
    above = make_config({"step": "auto"}, {"model": "m", "data": "d", "step": 0.2})
    assert above.step_auto and above.step == 0.2
    from edgezo.plan.request import from_toml

    assert from_toml(cfg.to_toml()) == cfg


@pytest.mark.parametrize(
    "said, word",
    [
        ({"estimator": "lora"}, "lora"),
        ({"estimator": "fzoo"}, "candidates"),
        ({"estimator": "mezo-adam"}, "adam"),
        ({"estimator": "hizoo"}, "hessian"),
        ({"estimator": "ag-grzo"}, "activation"),
        ({"train": "head"}, "perturbs nothing"),
        ({"sigma": "auto"}, "number"),
    ],
)
def test_what_auto_cannot_tell_is_refused(said, word):
    with pytest.raises(UsageError, match=word):
        asked(**{"step": "auto", **said})


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "step_size" in x], [x for x in lines if "pace" in x]


@pytest.mark.slow
@pytest.mark.parametrize("estimator, train", [("grzo", "lowrank+head"), ("mezo", "full")])
def test_a_run_steps_as_it_measured_and_a_resume_goes_on_so(
    bench, edgezo_json, tmp_path, monkeypatch, estimator, train
):
    from edgezo.run import auto_step
    from edgezo.run import step as steps

    monkeypatch.setattr(auto_step, "CHECK_EVERY", 4)
    said = {"train": train, "estimator": estimator, "steps": 10, "snapshot-every": 3}
    said = bench.arguments(**said, step="auto")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, summary = edgezo_json("finetune", *said, "--out", whole)
    assert code == 0
    taken, paces = steps_of(whole)
    assert [x["step"] for x in paces] == [0, 4, 8]
    first = paces[0]["pace"]
    assert taken[0]["step_size"] == pytest.approx(asked(estimator=estimator).step * first["factor"])
    for before, after in pairwise(x["pace"] for x in paces):
        assert after["factor"] / before["factor"] in (FASTER, 1.0, SLOWER)
        assert after["sigma"] == before["sigma"] and len(after["losses"]) == 12

    real = steps.Stepper.step

    def killed(self, step, *more):
        if step == 7:
            raise KeyboardInterrupt
        return real(self, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(steps.Stepper, "step", killed)
        assert edgezo_json("finetune", *said, "--out", cut)[0] != 0
    code, again = edgezo_json("finetune", "--resume", "--out", cut)
    assert code == 0 and again["trained_sha256"] == summary["trained_sha256"]
    assert [x["step_size"] for x in steps_of(cut)[0]] == [x["step_size"] for x in taken]
    code, _ = edgezo_json("replay", whole, "--out", tmp_path / "replayed")
    assert code == 0


def test_a_warning_names_why_there_is_no_signal(bench, edgezo, tmp_path):
    said = bench.arguments(steps=1, train="lowrank", step="auto", objective="accuracy", sigma=1e-9)
    code, _, err = edgezo("finetune", *said, "--out", tmp_path / "run")
    assert code == 0
    said = " ".join(err.split())
    assert "no signal" in said and "no prediction changes" in said and "larger --sigma" in said


def test_scores_are_steps_and_say_nothing_of_sigma(bench, edgezo_json, tmp_path, monkeypatch):
    from edgezo.run import auto_step

    monkeypatch.setattr(auto_step, "best_sigma", lambda slopes: (4.0, 9.0))
    for objective in ("accuracy", "loss"):
        run = tmp_path / objective
        said = {"steps": 1, "train": "lowrank", "step": "auto", "sigma": 0.5}
        said = bench.arguments(**said, objective=objective)
        assert edgezo_json("finetune", *said, "--out", run)[0] == 0
        (found,) = steps_of(run)[1]
        # Of the loss an error of 9 is a warning, and nothing changes.
        assert found["pace"]["sigma"] == 0.5
        assert ("do not grow" in found["pace"]["why"]) == (objective == "loss")
