"""How many rows a run with --for evaluates on: as many as a quarter of its time has room for. Pure, as planner.py."""

from __future__ import annotations

import math
from dataclasses import replace

from edgezo.machine.clock import duration
from edgezo.plan.config import RunConfig
from edgezo.plan.plan import Decision, Plan

ROWS_EVALUATED = "eval_rows"  # the decision
EVALUATIONS_SHARE = 0.25  # of --for, for the evaluations before and after training
FEWEST_EVALUATED = 20  # rows, however slow the machine: fewer say nothing


def evaluations_s(plan: Plan) -> float:
    """Estimated seconds of the evaluations before and after training; of kept states, with the pass of their rows."""
    return 2 * (plan.evaluation_s or 0.0) + plan.evaluations * plan.pass_row_s


def rows_in_time(cfg: RunConfig, plan: Plan) -> int | None:
    """The rows that a new run is to evaluate on, where --for has no time for all that were read; None: all."""
    if cfg.eval_rows is None or cfg.for_s is None or plan.evaluations <= FEWEST_EVALUATED:
        return None
    share = evaluations_s(plan) / (EVALUATIONS_SHARE * cfg.for_s)
    return None if share <= 1 else max(FEWEST_EVALUATED, math.floor(plan.evaluations / share))


def with_fewer_rows(plan: Plan, all_rows: Plan, by_accuracy: bool) -> Plan:
    """The plan of a run that evaluates on fewer rows than ``all_rows`` does, with the decision and its reason."""
    rows, before = plan.evaluations, all_rows.evaluations
    reason = (
        f"of {before} that were read: two evaluations of all would take about {duration(evaluations_s(all_rows))}, "
        f"more than a quarter of --for. The standard error is {math.sqrt(before / rows):.1f} times that of all"
    )
    if by_accuracy:
        reason += f", of an accuracy up to {math.sqrt(0.25 / rows):.3f}"
    reason += f"; --eval-limit {before} takes all"
    return replace(plan, decisions=(*plan.decisions, Decision(ROWS_EVALUATED, rows, reason)))


def as_before(cfg: RunConfig, plan: Plan) -> Plan:
    """The plan of a resume, which evaluates on the rows that the run began with."""
    if cfg.eval_rows is None or plan.evaluations < cfg.eval_rows:
        return plan
    reason = "as many as --for had time for when the run began"
    return replace(
        plan, decisions=(*plan.decisions, Decision(ROWS_EVALUATED, cfg.eval_rows, reason))
    )
