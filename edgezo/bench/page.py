"""A study's result as a page of docs: a table for each round, time to accuracy, learning curves, what runs forget."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgezo.bench.memory import PAGE_BEGINS

Row = Mapping[str, Any]
CURVE_POINTS = 6  # of a learning curve, as a line of the table


def page(result: Mapping[str, Any]) -> str:
    """The result of ``bench_accuracy`` as markdown."""
    lines = [
        f"{PAGE_BEGINS}{result['model']}",
        "",
        "Medians over seeds on validation rows, with the least and the most. Step sizes were tuned for each method on "
        "rows held out of training. `accuracy.json` has every run.",
    ]
    if result["pending"]:
        lines += ["", f"**Not finished**: {result['pending']} runs or evaluations are left."]
    for name in result["rounds"]:
        lines += _round(result, name)
    lines += _forgetting(result["rows"])
    lines += _tuned(result["rows"], result["tuning"])
    return "\n".join(lines) + "\n"


def _round(result: Mapping[str, Any], name: str) -> list[str]:
    medians = [row for row in result["medians"] if row["round"] == name]
    methods, lines = _names(medians, "method"), ["", f"## {name}"]
    kinds = _kinds(medians)
    if not kinds:
        return [*lines, "", "No run of this round is finished."]
    by_place = {(row["method"], row["task"]): row for row in medians}
    for metric, tasks in kinds.items():
        means = {m: _mean([by_place[m, t].get("value") for t in tasks]) for m in methods}
        sign = 1 if metric == "loss" else -1
        ordered = sorted(methods, key=lambda m: (means[m] is None, sign * (means[m] or 0.0)))
        table = [
            [
                *(m, _trained(by_place, m, tasks), _number(means[m])),
                *(_cell(by_place[m, t]) for t in tasks),
                _peak(by_place, m, tasks),
            ]
            for m in ordered
        ]
        lines += ["", f"Metric: {metric}.", ""]
        lines += _table(["method", "trains", "mean", *tasks, "peak MB"], table)
        if means[ordered[0]] is not None:
            lines += ["", f"Best over these rows: `{ordered[0]}`."]
    tasks = _names(medians, "task")
    lines += _times(medians, methods, tasks)
    return lines + _curves([r for r in result["rows"] if r["round"] == name], methods, tasks)


def _kinds(medians: Sequence[Row]) -> dict[str, list[str]]:
    """The tasks of each metric: which kind of rows they have."""
    kinds: dict[str, list[str]] = {}
    for row in medians:
        if "metric" in row and row["task"] not in kinds.setdefault(row["metric"], []):
            kinds[row["metric"]].append(row["task"])
    return kinds


def _times(medians: Sequence[Row], methods: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Time to accuracy: median seconds of training until a learning curve is at a value."""
    goals = list(dict.fromkeys(k for row in medians for k in row if k.startswith("seconds_to_")))
    if not goals:
        return []
    heads = [f"{t} to {goal.removeprefix('seconds_to_')}" for t in tasks for goal in goals]
    place = {(row["method"], row["task"]): row for row in medians}
    table = [[m, *(_seconds(place[m, t], goal) for t in tasks for goal in goals)] for m in methods]
    return [
        "",
        "Seconds of training until a value is reached:",
        "",
        *_table(["method", *heads], table),
    ]


def _curves(rows: Sequence[Row], methods: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Learning curves: a run of the first seed for each method on each task."""
    table = []
    for method in methods:
        for task in tasks:
            runs = [r for r in rows if (r["method"], r["task"]) == (method, task)]
            curve = next((r["curve"] for r in runs if len(r.get("curve", [])) > 2), None)
            if curve:
                every = max(1, -(-len(curve) // CURVE_POINTS))
                points = [*curve[:-1:every], curve[-1]]
                shown = " ".join(f"{p['seconds']:.0f}s:{p['value']:.3f}" for p in points)
                table.append([method, task, shown])
    if not table:
        return []
    head = ["", "Learning curves (first seed; the chart beside this page has all):", ""]
    return [*head, *_table(["method", "task", "value after seconds"], table)]


def _forgetting(rows: Sequence[Row]) -> list[str]:
    """What each method forgets of rows that it never saw: the mean over its runs, and the worst."""
    known = [row for row in rows if row.get("untouched")]
    if not known:
        return []
    tasks = list(known[0]["untouched"])
    table = []
    for method in _names(known, "method"):
        cells = []
        for task in tasks:
            lost = [r["untouched"][task] for r in known if r["method"] == method]
            values = [one["lost"] for one in lost]
            cells += [_number(statistics.fmean(values), sign=True), _number(max(values), sign=True)]
        table.append([method, *cells])
    heads = [f"{task}, {what}" for task in tasks for what in ("mean", "worst")]
    bases = ", ".join(
        f"{task} {known[0]['untouched'][task]['metric']} {known[0]['untouched'][task]['before']:.4f}"
        for task in tasks
    )
    text = (
        f"Rows that no run trains on; the base has {bases}. What was lost after a run, above 0 where the model got "
        "worse. A linear probe answers its own task alone, and is left out."
    )
    return ["", "## Forgetting", "", text, "", *_table(["method", *heads], table)]


def _tuned(rows: Sequence[Row], tuning: Sequence[Row]) -> list[str]:
    """The point that each tuned method took."""
    tuned = {t["method"] for t in tuning}
    varied: dict[str, set[str]] = {}
    for row in tuning:
        for key, value in row["settings"].items():
            varied.setdefault(row["method"], set())
            others = [t["settings"].get(key) for t in tuning if t["method"] == row["method"]]
            if any(other != value for other in others):
                varied[row["method"]].add(key)
    lines = [
        f"- `{row['method']}` on {row['task']}: "
        + ", ".join(f"{key} {row['settings'][key]}" for key in sorted(varied[row["method"]]))
        + (" (ends its grid)" if row["at_edge"] else "")
        for row in rows
        if row["method"] in tuned
    ]
    return ["", "## Settings that tuning took", "", *dict.fromkeys(lines)] if lines else []


# ---------------------------------------------------------------------------------------------
# Cells


def _names(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def _cell(row: Row) -> str:
    if "value" not in row:
        return "failed" if row["failed"] else "not yet"
    return f"{row['value']:.3f} ({row['least']:.3f}-{row['most']:.3f})"


def _trained(by_place: Mapping[tuple[str, str], Row], method: str, tasks: Sequence[str]) -> str:
    """The parts that a method has trained: a readout or the head beside an estimator is named."""
    parts = [by_place[method, t].get("trained") for t in tasks]
    return " or ".join(dict.fromkeys(part for part in parts if part)) or "-"


def _peak(by_place: Mapping[tuple[str, str], Row], method: str, tasks: Sequence[str]) -> str:
    peaks = [by_place[method, t].get("peak_bytes") for t in tasks]
    known = [peak for peak in peaks if peak is not None]
    return f"{max(known) / 1e6:.0f}" if known else "-"


def _seconds(row: Row, goal: str) -> str:
    if "value" not in row:
        return "-"
    return "never" if row.get(goal) is None else f"{row[goal]:.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
