"""--step auto: the step that promises most, the sigma at which differences are slopes, and runs with both."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from edgezo.config import make_config
from edgezo.errors import UsageError
from edgezo.estimators import group_credit
from edgezo.pace import LADDER, Signal, best_sigma, best_step

D, ROWS, SIGMA = 300, 16, 1e-3


class Quadratic:
    """Losses (theta - x)^T A (theta - x)/2 of rows x ~ N(1, 4), at theta = 0, and steps along random signs."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.a = self.rng.uniform(0.1, 3.0, D)

    def rows(self, n):
        return self.rng.standard_normal((n, D)) * 2.0 + 1.0

    def loss(self, theta, x):
        """Of every row at every theta (..., D)."""
        return ((theta[..., None, :] - x) ** 2 * self.a).sum(-1) / 2

    def signs(self, *shape):
        return self.rng.integers(0, 2, (*shape, D)) * 2.0 - 1

    def signal(self, directions, rows):
        z, x = SIGMA * self.signs(directions), self.rows(rows)
        both = np.stack([self.loss(z, x), self.loss(-z, x)], 1)
        return Signal.of(both, self.loss(np.zeros(D), x))

    def after(self, credit, steps, tries=600):
        """What one step of each size, by ROWS rows, changes the expected loss by."""
        found = np.zeros(len(steps))
        for _ in range(tries):
            x = self.rows(ROWS)
            if credit == "group":
                z = SIGMA * self.signs(ROWS)
                delta = np.diag(self.loss(z, x)) - np.diag(self.loss(-z, x))
                move = group_credit(np.stack([delta, 0 * delta])) @ z
            else:
                z = self.signs()
                delta = self.loss(SIGMA * z, x) - self.loss(-SIGMA * z, x)
                move = delta.mean() / (2 * SIGMA) * z
            theta = -np.asarray(steps)[:, None] * move
            found += (((theta - 1) ** 2 - 1) * self.a).sum(1) / 2
        return found / tries


@pytest.mark.parametrize("credit", ["group", "mean"])
def test_the_step_is_the_one_that_lowers_a_quadratic_most(credit):
    problem = Quadratic()
    told = best_step(problem.signal(400, 200), credit, ROWS, SIGMA)
    times = np.array([0.5, 1.0, 1.5, 2.0])
    after = problem.after(credit, told * times)
    bend, slope = np.linalg.lstsq(np.stack([times**2, times], 1), after)[0]
    assert after[1] < 0
    assert 0.75 < -slope / (2 * bend) < 1.35  # the least of the parabola, in steps as told


def test_the_signal_of_a_quadratic_is_its_gradient_and_trace():
    problem = Quadratic(1)
    found = problem.signal(1500, 200)
    common, each = (problem.a**2).sum(), (problem.a**2 * 5).sum()  # |g|^2 and E|g_i|^2
    assert abs(found.gradient / SIGMA**2 / common - 1) < 0.2
    assert abs(found.differences / SIGMA**2 / each - 1) < 0.1
    assert abs(found.curvature / SIGMA**2 / problem.a.sum() - 1) < 1e-3
    assert 0 < found.gradient_error < 0.1 * found.gradient


def test_rows_without_a_finite_loss_do_not_count():
    losses, plain = np.random.default_rng(0).random((3, 2, 5)), np.ones(5)
    wanted = Signal.of(losses[:, :, :4], plain[:4])
    losses[1, 0, 4] = np.inf
    assert Signal.of(losses, plain) == wanted
    nothing = Signal.of(np.full((3, 2, 5), np.nan), plain)
    assert best_step(nothing, "group", 16, 1e-3) is None
    assert best_step(Signal.of(np.ones((3, 2, 5)), plain), "group", 16, 1e-3) is None


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
    from edgezo.config import from_toml

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
    from edgezo import pace, steps

    monkeypatch.setattr(pace, "CHECK_EVERY", 4)
    said = {"train": train, "estimator": estimator, "steps": 10, "snapshot-every": 3}
    said = bench.arguments(**said, step="auto")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, summary = edgezo_json("finetune", *said, "--out", whole)
    assert code == 0
    taken, paces = steps_of(whole)
    assert [x["step"] for x in paces] == [0, 4, 8]
    first = paces[0]["pace"]
    assert taken[0]["step_size"] == pytest.approx(asked(estimator=estimator).step * first["factor"])
    for before, after in pairwise(paces):
        assert 0.5 <= after["pace"]["factor"] / before["pace"]["factor"] <= 2

    real = steps.Steps.step

    def killed(self, step, size):
        if step == 7:
            raise KeyboardInterrupt
        return real(self, step, size)

    with monkeypatch.context() as patch:
        patch.setattr(steps.Steps, "step", killed)
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
