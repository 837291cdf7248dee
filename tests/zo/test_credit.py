"""Credit is the paper's formula where that is defined, and finite and small everywhere else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgezo.zo.axes import CREDITS
from edgezo.zo.credit import (
    CREDIT_CLIP,
    SLOPE_CLIP,
    candidate_credit,
    compose,
    difference_credit,
    group_credit,
    one_sided_credit,
    preset,
    prompt_credit,
    schedule,
    uniform_credit,
    vote_credit,
)
from edgezo.zo.presets import PRESETS
from edgezo.zo.rules import votes_needed

values = st.floats(-100, 100, width=32)
pairs = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        st.lists(values, min_size=n, max_size=n), st.lists(values, min_size=n, max_size=n)
    )
)
anything = st.floats(width=32)
any_pairs = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(anything, min_size=n, max_size=n), st.lists(anything, min_size=n, max_size=n)
    )
)


def test_group_credit_is_delta_over_its_standard_deviation_without_centring():
    rng = np.random.default_rng(0)
    losses = rng.normal(1.0, 0.2, (2, 16)).astype(np.float32)
    losses[0] += 0.3  # a common difference must stay in the credit
    delta = losses[0].astype(np.float64) - losses[1]
    np.testing.assert_allclose(group_credit(losses), delta / delta.std(), rtol=1e-6)
    assert group_credit(losses).mean() > 0.5


@given(pairs, st.floats(0.01, 100))
def test_group_credit_does_not_depend_on_the_losses_scale(pair, scale):
    losses = np.array(pair, np.float64)
    np.testing.assert_allclose(
        group_credit(losses), group_credit(losses * scale), rtol=1e-4, atol=1e-5
    )


@given(any_pairs, st.sampled_from(sorted(CREDITS)))
def test_no_losses_give_a_credit_that_is_not_finite_or_above_the_clip(pair, name):
    chosen = compose(name, "none", "sgd", candidates=1)
    losses = np.array(pair, np.float32)[: len(chosen.evaluations)]
    bad = ~np.isfinite(losses).all(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        credit = chosen.credit(losses)
        coefficients = chosen.coefficients(credit, 0.1, 2e-3)
    assert np.isfinite(coefficients).all()
    assert len(credit) == (1 if CREDITS[name].tries else losses.shape[1])
    if CREDITS[name].tries:
        assert bad.all() <= (not credit.any())
    else:
        assert not credit[bad].any()
    if name in ("group", "one-sided", "candidates"):
        assert np.abs(credit).max() <= CREDIT_CLIP


@pytest.mark.parametrize(
    ("losses", "credit"),
    [
        ([[1.5], [1.0]], [1.0]),  # a group of one has no spread: its sign
        ([[1.0], [1.5]], [-1.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0]),  # no difference
        ([[2.0, 2.0], [1.0, 1.0]], [8.0, 8.0]),  # equal differences: floored spread, clipped
        ([[np.nan, 2.0], [1.0, 1.0]], [0.0, 1.0]),
        ([[np.nan, np.inf], [1.0, 1.0]], [0.0, 0.0]),
    ],
)
def test_degenerate_groups_have_a_defined_credit(losses, credit):
    np.testing.assert_allclose(group_credit(np.array(losses, np.float32)), credit, rtol=1e-6)


def test_mezo_moves_by_the_learning_rate_times_the_directional_derivative():
    rng = np.random.default_rng(1)
    losses = rng.normal(1.0, 0.2, (2, 16)).astype(np.float32)
    mezo, sigma, lr = preset("mezo"), 1e-3, 1e-4
    coefficient = mezo.coefficients(difference_credit(losses), lr, sigma).sum()
    delta = float((losses[0].astype(np.float64) - losses[1]).mean())
    assert coefficient == pytest.approx(lr * delta / (2 * sigma), rel=1e-3)


def test_raw_credit_moves_each_direction_by_its_own_derivative():
    rng = np.random.default_rng(1)
    losses = rng.normal(1.0, 0.2, (2, 4)).astype(np.float32)
    sigma, lr = 1e-3, 1e-4
    coefficients = preset("grzo-raw").coefficients(difference_credit(losses), lr, sigma)
    np.testing.assert_allclose(
        coefficients, lr * (losses[0] - losses[1]) / (2 * sigma * 4), rtol=1e-3
    )


def test_one_sided_credit_is_the_losses_standard_score():
    losses = np.array([[1.0, 2.0, 4.0, np.nan]], np.float32)
    known = losses[0, :3].astype(np.float64)
    wanted = [*((known - known.mean()) / known.std()), 0.0]
    np.testing.assert_allclose(one_sided_credit(losses), wanted, rtol=1e-6)
    assert not one_sided_credit(np.array([[3.0]], np.float32)).any()
    assert uniform_credit(losses).tolist() == [1, 1, 1, 0]


def test_a_row_is_compared_with_its_own_samples_alone():
    rng = np.random.default_rng(4)
    losses = rng.normal(1.0, 0.2, (2, 6)).astype(np.float32)
    losses[:, 3:] = 100 + 7 * losses[:, :3]  # the same row as the first one, but harder and wider
    losses[0, 5] = np.nan
    credit = prompt_credit(losses, samples=3)
    first = losses[:, :3].astype(np.float64)
    wanted = (first[0] - first[1]) / first.std()
    np.testing.assert_allclose(credit[:3], wanted, rtol=1e-5)
    z = (first - first.mean()) / first.std()  # z-scores of both sides, one less the other
    np.testing.assert_allclose(credit[:3], z[0] - z[1], rtol=1e-5)
    two = losses[:, 3:5].astype(np.float64)
    np.testing.assert_allclose(credit[3:5], (two[0] - two[1]) / two.std(), rtol=1e-5)
    assert credit[5] == 0
    assert not prompt_credit(np.ones((2, 4), np.float32), samples=2).any()


def test_an_example_votes_for_the_side_of_its_direction_that_is_better():
    losses = np.array([[1.0, 2.0, 3.0, np.inf], [2.0, 1.0, 3.0, 1.0]], np.float32)
    assert vote_credit(losses).tolist() == [-1, 1, 0, 0]
    assert votes_needed(1.0, 16) == 0 and votes_needed(0.0, 16) == math.inf
    assert votes_needed(0.05, 16) == pytest.approx(1.96 * 4, rel=1e-3)


def test_candidates_are_weighed_by_the_batchs_loss_over_their_spread():
    rng = np.random.default_rng(2)
    losses = rng.normal(1.0, 0.2, (6, 7)).astype(np.float32)
    means = losses.astype(np.float64).mean(1)
    wanted = (means[1:] - means[0]) / means[1:].std()
    np.testing.assert_allclose(candidate_credit(losses), wanted, rtol=1e-6)
    losses[2, 3] = np.inf
    assert candidate_credit(losses)[1] == 0 and np.isfinite(candidate_credit(losses)).all()
    losses[0, 3] = np.nan  # an example that the model itself fails on does not count
    assert candidate_credit(losses)[1] != 0
    assert not candidate_credit(np.full((3, 2), np.nan, np.float32)).any()


def test_a_clipped_slope_is_the_limit_times_the_rate():
    chosen = compose("clipped", "none", "sgd", 8)
    steep, flat = np.array([10.0, 30.0], np.float32), np.array([1e-3, -2e-3], np.float32)
    assert chosen.coefficients(steep, 0.5, 1e-3).sum() == pytest.approx(0.5 * SLOPE_CLIP, rel=1e-4)
    plain = preset("mezo").coefficients(flat, 0.5, 1e-3)
    np.testing.assert_array_equal(chosen.coefficients(flat, 0.5, 1e-3), plain)


def test_curvature_is_the_second_difference_over_the_probe():
    chosen = compose("mean", "hessian", "sgd", 8)
    assert [e.sign for e in chosen.evaluations] == [1, -1, 0]
    losses = np.array([[1.2, 2.5], [1.0, 2.1], [0.9, 2.2]], np.float32)
    wanted = abs(1.85 + 1.55 - 2 * 1.55) / (2 * 0.1**2)
    assert chosen.curvature(losses, 0.1) == pytest.approx(wanted, rel=1e-4)
    assert chosen.curvature(np.full((3, 2), np.nan), 0.1) == 0.0
    assert preset("mezo").curvature(losses[:2], 0.1) == 0.0


def test_a_rule_with_a_rate_takes_the_estimate_at_rate_one():
    credit = np.array([1.0, -2.0], np.float32)
    plain, rated = (compose("mean", "none", rule, 8) for rule in ("sgd", "momentum"))
    for step in (0.1, 0.7):
        coefficients = rated.coefficients(credit, step, 1e-3)
        np.testing.assert_array_equal(coefficients, plain.coefficients(credit, 1.0, 1e-3))


def test_grzo_moves_each_direction_by_a_fraction_of_the_probe():
    grzo = preset("grzo")
    coefficients = grzo.coefficients(np.array([1.0, -2.0], np.float32), 0.05, 2e-3)
    np.testing.assert_allclose(coefficients, [1e-4, -2e-4], rtol=2e-5)


def test_the_linear_schedule_ends_at_zero_and_the_constant_one_does_not_move():
    assert [schedule("linear", p) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert schedule("constant", 0.9) == 1.0


def test_the_table_names_what_there_is():
    from edgezo.zo import axes, directions, masks, rules

    assert set(axes.DIRECTIONS) == set(directions.DIRECTION_KINDS)
    assert set(axes.RULES) == set(rules.UPDATE_RULES)
    for name, mask in axes.MASKS.items():
        assert masks.mask_of(name, 0.5, 2e-3).name == name
        assert len(masks.mask_of(name, 0.5, 2e-3).states) == mask.state
    for name, rule in axes.RULES.items():
        kept = 0 if rule.looks_back else len(rules.UPDATE_RULES[name].states)
        assert kept == rule.state
    for name, credit in axes.CREDITS.items():
        for mask in axes.MASKS:
            evaluations = compose(name, mask, "sgd", 5).evaluations
            assert len(evaluations) == axes.forwards(name, mask, 5)
        assert {e.sign for e in compose(name, "none", "sgd", 5).evaluations} >= {1}
        assert credit.step
    assert all(name == preset_entry.name for name, preset_entry in PRESETS.items())
