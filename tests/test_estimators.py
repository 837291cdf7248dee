"""Credit is the paper's formula where that is defined, and harmless everywhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgezo.config import DEFAULT_DIRECTIONS, DEFAULT_STEP
from edgezo.estimators import CREDIT_CLIP, ESTIMATORS, group_credit, mean_credit, schedule

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


@given(any_pairs)
def test_no_losses_give_a_credit_that_is_not_finite_or_above_the_clip(pair):
    losses = np.array(pair, np.float32)
    bad = ~np.isfinite(losses).all(axis=0)
    for name, estimator in ESTIMATORS.items():
        with np.errstate(over="ignore"):
            credit = estimator.credit(losses)
            found = estimator.coefficients(credit, estimator.step, estimator.sigma)
        assert np.isfinite(found).all(), name
        assert not credit[bad].any(), name
    assert np.abs(group_credit(losses)).max() <= CREDIT_CLIP


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
    mezo, sigma, lr = ESTIMATORS["mezo"], 1e-3, 1e-4
    found = mezo.coefficients(mean_credit(losses), lr, sigma).sum()
    delta = float((losses[0].astype(np.float64) - losses[1]).mean())
    assert found == pytest.approx(lr * delta / (2 * sigma), rel=1e-3)


def test_grzo_moves_each_direction_by_a_fraction_of_the_probe():
    grzo = ESTIMATORS["grzo"]
    found = grzo.coefficients(np.array([1.0, -2.0], np.float32), 0.05, 2e-3)
    np.testing.assert_allclose(found, [1e-4, -2e-4], rtol=2e-5)


def test_the_linear_schedule_ends_at_zero_and_the_constant_one_does_not_move():
    assert [schedule("linear", p) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert schedule("constant", 0.9) == 1.0


def test_configuration_defaults_are_the_estimators_own():
    for name, estimator in ESTIMATORS.items():
        assert DEFAULT_STEP[name] == estimator.step
        assert DEFAULT_DIRECTIONS[name] == estimator.directions[0]
