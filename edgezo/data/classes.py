"""Figures of predicted classes: the confusion matrix, F1 of each class, and what the largest class alone would reach.

Pure functions of class numbers (standard library only). A class number is a place in the list of label names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class ClassFigures(NamedTuple):
    """How well one class is predicted; each share is 0 where it would be a division by 0."""

    rows: int  # rows whose right class it is
    predicted: int  # rows that are predicted to be of it
    precision: float
    recall: float
    f1: float


def confusion(right: Sequence[int], predicted: Sequence[int], classes: int) -> list[list[int]]:
    """Counts of rows, (classes, classes): a line for each right class, a column for each predicted one.

    Raises IndexError for a number that is no class.
    """
    counts = [[0] * classes for _ in range(classes)]
    for expected, given in zip(right, predicted, strict=True):
        if expected < 0 or given < 0:
            raise IndexError(f"{min(expected, given)} is the number of no class")
        counts[expected][given] += 1
    return counts


def by_class(counts: Sequence[Sequence[int]]) -> list[ClassFigures]:
    """Precision, recall and F1 of each class of a confusion matrix."""
    figures = []
    for number, line in enumerate(counts):
        rows, predicted = sum(line), sum(other[number] for other in counts)
        hits = line[number]
        f1 = 2 * hits / (rows + predicted) if rows + predicted else 0.0
        precision = hits / predicted if predicted else 0.0
        figures.append(ClassFigures(rows, predicted, precision, hits / rows if rows else 0.0, f1))
    return figures


def largest_class(right: Sequence[int]) -> tuple[int, float]:
    """(the class that most rows have, the accuracy of always predicting it). Raises IndexError without rows."""
    number, rows = Counter(right).most_common(1)[0]
    return number, rows / len(right)


class Change(NamedTuple):
    """What became of the rows between two evaluations of them."""

    gained: int  # rows that were wrong before and are right after
    lost: int  # rows that were right before and are wrong after
    other: int  # rows that are wrong both times, with another answer
    difference: float  # of the accuracies
    standard_error: float  # of that difference, over a sample of rows


def change(right: Sequence[int], before: Sequence[int], after: Sequence[int]) -> Change:
    """Compare two predictions of the same rows, row by row. Raises ValueError without rows."""
    triples = list(zip(right, before, after, strict=True))
    if not triples:
        raise ValueError("there are no rows to compare")
    gained = sum(b != r == a for r, b, a in triples)
    lost = sum(b == r != a for r, b, a in triples)
    other = sum(b != r != a and b != a for r, b, a in triples)
    difference = (gained - lost) / len(triples)
    # One row of each kind more, so that a few rows that all moved alike do not prove a difference.
    moved, n = gained + lost + 2, len(triples) + 2
    variance = (moved - (gained - lost) ** 2 / n) / n
    return Change(gained, lost, other, difference, math.sqrt(max(variance, 0.0) / n))
