"""Figures of predicted classes, compared with counts by hand."""

from __future__ import annotations

import math

import pytest

from edgezo.data.classes import by_class, change, confusion, largest_class

RIGHT, PREDICTED = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]


def test_a_confusion_matrix_and_the_figures_of_each_class() -> None:
    counts = confusion(RIGHT, PREDICTED, 4)
    assert counts == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    figures = by_class(counts)
    assert figures[0] == (3, 3, 2 / 3, 2 / 3, 2 / 3)
    assert figures[1] == (2, 3, 1 / 3, 1 / 2, 2 / 5)
    assert figures[2] == (1, 0, 0.0, 0.0, 0.0) and figures[3].f1 == 0.0
    assert largest_class(RIGHT) == (0, 0.5)
    with pytest.raises(IndexError):
        confusion([-1], [0], 2)


def test_the_change_between_two_predictions_is_counted_row_by_row() -> None:
    result = change([0, 0, 1, 1], [0, 1, 0, 2], [1, 0, 1, 0])
    assert result[:4] == (2, 1, 1, 0.25)
    # With a row more of each kind: 3 gained and 2 lost of 6.
    assert result.standard_error == pytest.approx(math.sqrt((5 / 6 - 1 / 36) / 6))
    assert change([0], [1], [0]).standard_error > 0.4  # one row proves nothing
    with pytest.raises(ValueError, match="no rows"):
        change([], [], [])
