"""Figures of an evaluation, from its sums over the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from edgezo.data.dataset import Dataset


class JudgesTexts(Protocol):
    """What looks at predictions as texts (objective.py)."""

    @property
    def writes(self) -> bool: ...

    def figures(self, texts: Sequence[str]) -> dict[str, Any]:
        """The metric, and what stands beside it."""
        ...


class EvaluatedRows(NamedTuple):
    """The figures of an evaluation, and what they were made of: one value for each validation row."""

    figures: dict[str, Any]
    chosen: list[int]  # the predicted class or option; 0 where rows have none
    labels: list[int]  # the right one; -1 where there is none
    losses: Sequence[float]
    texts: list[str]  # predictions as text, where a judge looks at them; else []


def standard_error(figures: dict[str, Any], total: float, squares: float) -> dict[str, float]:
    """The standard error of an accuracy or a mean loss over a sample of rows; nothing for other metrics.

    ``total`` and ``squares`` are sums of losses and of their squares. That of an accuracy is after Agresti
    and Coull (1998), with two rows more that are right and two that are wrong: four right rows of four do not prove it.
    """
    n, value = figures["n"], figures["value"]
    # One row tells nothing of how far losses are apart.
    if n < (2 if figures["metric"] == "loss" else 1) or figures["metric"] not in (
        "accuracy",
        "loss",
    ):
        return {}
    if figures["metric"] == "accuracy":
        share = (value * n + 2) / (n + 4)
        return {"standard_error": math.sqrt(share * (1 - share) / (n + 4))}
    variance = max(squares / n - (total / n) ** 2, 0.0)
    return {"standard_error": math.sqrt(variance / (n - 1))}


def figures_of(
    dataset: Dataset, total_loss: float, right: int, judge: JudgesTexts | None, texts: Sequence[str]
) -> dict[str, Any]:
    """The figures of an evaluation, from its sums and, with a judge, from the predicted ``texts``."""
    n = len(dataset.validation)
    loss = total_loss / n if n else float("nan")
    figures = {"loss": loss}
    if dataset.kind in ("label", "choice"):
        figures = {"accuracy": right / n if n else 0.0}
    if judge is not None:
        of_judge = judge.figures(texts)
        replaces = judge.writes or dataset.report is not None
        figures = of_judge if replaces else {**figures, **of_judge}
    metric, value = next(iter(figures.items()))
    others = {k: v for k, v in figures.items() if k != metric or k == "objective"}
    return {"metric": metric, "value": value, "n": n, "loss": loss, **others}
