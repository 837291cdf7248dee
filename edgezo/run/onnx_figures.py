"""Figures of an evaluation on the ONNX engine, as figures.py has them."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np

from edgezo.data.batches import evaluation_batches, packed_rows
from edgezo.data.dataset import Dataset
from edgezo.network.onnx_engine import OnnxModel
from edgezo.run.onnx_state import as_read
from edgezo.run.row_figures import EvaluatedRows, figures_of, standard_error


def evaluate_on_onnx(
    model: OnnxModel, dataset: Dataset, shown: Callable[[int], None] = lambda rows: None
) -> EvaluatedRows:
    """Evaluate the validation rows, as ``figures.evaluate_rows`` does."""
    examples = as_read(model, dataset.validation)
    batches, rows = evaluation_batches(examples), 0
    of_rows, chosen = array("f", bytes(4 * len(examples))), [0] * len(examples)
    for batch in batches:
        rows += len(batch)
        packed = packed_rows([examples[i] for i in batch], range(len(batch)))
        losses, predicted = model.losses(packed)
        for i, option, loss in zip(batch, predicted[0].tolist(), losses[0].tolist(), strict=True):
            chosen[i], of_rows[i] = option, loss
        shown(rows)
    labels = [example.label for example in examples]
    right = sum(option == label for option, label in zip(chosen, labels, strict=True))
    sums = [np.array([of_rows[i] for i in batch], np.float64) for batch in batches]
    total = sum((float(losses.sum()) for losses in sums), 0.0)
    squares = sum((float(np.square(losses).sum()) for losses in sums), 0.0)
    figures = figures_of(dataset, total, right, None, [])
    figures |= standard_error(figures, total, squares)
    return EvaluatedRows(figures, chosen, labels, of_rows, [])
