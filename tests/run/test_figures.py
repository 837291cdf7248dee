"""Standard errors of an evaluation's figures."""

from __future__ import annotations

import math

import pytest

from edgezo.run.figures import standard_error


@pytest.mark.parametrize(
    ("metric", "losses", "value", "wanted"),
    [
        ("loss", [1.0, 3.0], 2.0, 1.0),
        ("loss", [2.0, 2.0, 2.0], 2.0, 0.0),
        ("loss", [2.0], 2.0, None),  # one row tells nothing
        ("accuracy", [1.0], 1.0, math.sqrt(0.6 * 0.4 / 5)),
        ("f1", [1.0, 1.0], 0.5, None),
        ("loss", [], math.nan, None),
    ],
)
def test_a_sample_has_the_error_of_its_mean(
    metric: str, losses: list[float], value: float, wanted: float | None
) -> None:
    figures = {"metric": metric, "value": value, "n": len(losses)}
    found = standard_error(figures, sum(losses), sum(x * x for x in losses))
    if wanted is None:
        assert found == {}
    else:
        assert found["standard_error"] == pytest.approx(wanted)
