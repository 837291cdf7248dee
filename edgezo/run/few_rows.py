"""A new run with --for evaluates on no more rows than there is time for; either engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from edgezo.plan.evaluated import rows_in_time, with_fewer_rows

PlannedRun = TypeVar("PlannedRun")  # session.Planned, or onnx_session.OnnxPlanned


def settled_in_time(opened: Any, settle: Callable[[Any], PlannedRun]) -> PlannedRun:
    """The plan that ``settle`` makes of an opened request, or of one with fewer rows to evaluate on.

    ``opened`` is a session.Opened, or an onnx_session.OnnxOpened. Raises what ``settle`` raises.
    """
    planned: Any = settle(opened)
    rows = rows_in_time(planned.cfg, planned.plan)
    if rows is None:
        return planned
    cfg, fewer = replace(opened.cfg, eval_rows=rows), opened.dataset.evaluated_on(rows)
    again: Any = settle(replace(opened, cfg=cfg, dataset=fewer))
    shown = with_fewer_rows(again.plan, planned.plan, by_accuracy=fewer.classes > 0)
    return replace(again, plan=shown)
