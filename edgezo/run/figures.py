"""Figures of an evaluation: accuracy, mean loss, and what a judge makes of written answers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from edgezo.data.batches import collate, evaluation_batches
from edgezo.data.dataset import Dataset
from edgezo.machine.profiler import phase
from edgezo.network.model import Model
from edgezo.run.objective import Judge
from edgezo.run.row_figures import EvaluatedRows, figures_of, standard_error


class Divided(Protocol):
    """The processes that share the batches of an evaluation (ranks.py)."""

    def has_batch(self, number: int) -> bool:
        """Whether this process evaluates a batch."""
        ...

    def merge_rows(self, batches: Sequence[Sequence[int]], values: np.ndarray) -> None:
        """Fill ``values`` (rows, k) fp64 with the rows of the other processes."""
        ...


def evaluate_model(model: Model, dataset: Dataset, judge: Judge | None = None) -> dict[str, Any]:
    """The figures of ``evaluate_rows``."""
    return evaluate_rows(model, dataset, judge).figures


@phase("eval")
def evaluate_rows(
    model: Model,
    dataset: Dataset,
    judge: Judge | None = None,
    shown: Callable[[int], None] = lambda rows: None,
    divided: Divided | None = None,
) -> EvaluatedRows:
    """Evaluate the validation rows: accuracy where rows have a right answer, else the mean loss.

    With a judge the first of its figures is the metric, and the others stand beside it under their names. ``shown``
    is called after each batch with the rows so far. ``divided``: the processes that share the batches.
    """
    examples = model.reads(dataset.validation)
    batches, rows = evaluation_batches(examples), 0
    of_rows, chosen = array("f", bytes(4 * len(examples))), [0] * len(examples)
    for number, batch in enumerate(batches):
        rows += len(batch)
        if divided is None or divided.has_batch(number):
            packed = collate([examples[i] for i in batch], range(len(batch)))
            losses, predicted = model.losses(packed)
            for i, option, loss in zip(
                batch, predicted[0].tolist(), losses[0].tolist(), strict=True
            ):
                chosen[i], of_rows[i] = option, loss
        shown(rows)
    if divided is not None:
        both = np.stack([np.array(of_rows, np.float64), np.array(chosen, np.float64)], axis=1)
        divided.merge_rows(batches, both)
        of_rows, chosen = array("f", both[:, 0]), both[:, 1].astype(int).tolist()
    labels = [example.label for example in examples]
    right = sum(option == label for option, label in zip(chosen, labels, strict=True))
    sums = [np.array([of_rows[i] for i in batch], np.float64) for batch in batches]
    total_loss = sum((float(losses.sum()) for losses in sums), 0.0)
    squares = sum((float(np.square(losses).sum()) for losses in sums), 0.0)
    texts = judge.texts(model, chosen) if judge is not None else []
    figures = figures_of(dataset, total_loss, right, judge, texts)
    figures |= standard_error(figures, total_loss, squares)
    return EvaluatedRows(figures, chosen, labels, of_rows, texts)
