"""Tables and lines that a person reads: plans, verdicts, benchmarks, models, estimators. They only show results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgezo.machine.clock import duration, seconds
from edgezo.machine.files import to_json
from edgezo.machine.hardware import format_bytes
from edgezo.plan.calibration import RESERVE
from edgezo.run.progress import _has, peaks_line

if TYPE_CHECKING:
    from edgezo.network.cards import Card
    from edgezo.plan.plan import Plan


# ---------------------------------------------------------------------------------------------
# Tables


def plan_table(plan: Plan, largest: Plan | None = None, steps: int | None = None) -> RenderableType:
    """Planned memory item by item, its peak and reserves, decisions with their reasons, what is trained and frozen.

    ``largest`` is the plan of the largest model with a card that fits the same budget; ``steps`` are asked for.
    """
    items = Table(
        title=f"{plan.model}: planned memory", title_justify="left", box=None, pad_edge=False
    )
    items.add_column("item")
    items.add_column("size", justify="right", no_wrap=True)
    items.add_column("when", no_wrap=True)
    items.add_column("why", style="dim")
    reserves = [item for item in plan.items if item.phase == RESERVE]
    for item in plan.items:
        if item not in reserves:
            items.add_row(item.name, format_bytes(item.bytes), item.phase, item.reason)
    items.add_section()
    items.add_row(
        "peak",
        format_bytes(plan.planned_peak_bytes),
        "",
        "always + the largest phase (compute: all but load)",
    )
    for item in reserves:
        items.add_row(item.name, format_bytes(item.bytes), item.phase, item.reason)
    if reserves:
        items.add_row("needs", format_bytes(plan.needed_bytes), "", "the peak + reserves")
    items.add_row("cap", format_bytes(plan.max_mem_bytes), "", "--max-mem")
    smallest = f"the smallest budget that works ({plan.smallest_flags})"
    items.add_row("least", format_bytes(plan.smallest_bytes), "", smallest)
    if largest is not None:
        what = f"{largest.model} in {largest.precision}: the largest card that fits, for rows of --max-length tokens"
        items.add_row("largest", format_bytes(largest.planned_peak_bytes), "", what)
    basis = {
        "cpu": "this machine's clock and vector width",
        "cuda": "the GPU's figures (edgezo doctor)",
    }
    all_steps = f"; {steps:,} steps: about {duration(steps * plan.step_s)}" if steps else ""
    what = f"an estimate from {basis[plan.device]}{all_steps}"
    items.add_row("step", seconds(plan.step_s), "", what)
    if plan.evaluation_s is not None:
        what = f"{plan.evaluations:,} rows, scored by the head: an estimate as that of a step"
        items.add_row("evaluation", duration(plan.evaluation_s), "", what)

    decisions = Table(title="decisions", title_justify="left", box=None, pad_edge=False)
    decisions.add_column("what")
    decisions.add_column("value", no_wrap=True)
    decisions.add_column("why", style="dim")
    for d in plan.decisions:
        is_size = d.name.endswith("_bytes") and isinstance(d.value, int)
        value = format_bytes(int(d.value or 0)) if is_size else str(d.value)
        decisions.add_row(d.name.removesuffix("_bytes"), value, d.reason)

    groups = Table(box=None, pad_edge=False, show_header=False)
    groups.add_column("group", no_wrap=True)
    groups.add_column("members")
    groups.add_row("trained", "; ".join(plan.trained) or "nothing")
    groups.add_row("frozen", "; ".join(plan.frozen) or "nothing")
    return Group(items, Text(), decisions, Text(), groups)


def memory_table(result: Mapping[str, Any]) -> RenderableType:
    """Rows of ``edgezo bench memory``: peaks, and each as a multiple of GRZO's (signs, bf16) at the same sizes."""
    from edgezo.bench.memory import METHODS, train_peak_bytes

    table = Table(
        title=f"{result['model']}: peak memory", title_justify="left", box=None, pad_edge=False
    )
    for name in ("method", "B", "tokens", "loading", "training", "x grzo", "s a step"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    grzo_bytes = {
        (p["batch_size"], p["tokens"]): train_peak_bytes(p)
        for p in result["rows"]
        if p["method"] == "grzo" and "error" not in p
    }
    failed = []
    for p in result["rows"]:
        row = [METHODS[p["method"]].title, str(p["batch_size"]), str(p["tokens"])]
        if "error" in p:
            table.add_row(*row, "failed")
            failed.append(Text(f"{', '.join(row)}: {p['error']}"))
            continue
        peak, base = train_peak_bytes(p), grzo_bytes.get((p["batch_size"], p["tokens"]))
        ratio = f"{peak / base:.2f}" if base else ""
        if "stopped_s" in p:  # the peak until it was stopped
            at_least = f">= {ratio}" if ratio else ""
            table.add_row(*row, "", f">= {format_bytes(peak)}", at_least, "stopped")
            continue
        row += [format_bytes(p["load_peak_rss_bytes"]), format_bytes(peak)]
        table.add_row(*row, ratio, f"{p['step_s']:.2f}")
    return Group(table, *failed)


def alignment_table(result: Mapping[str, Any]) -> RenderableType:
    """Rows of ``edgezo bench alignment``; cosines times sqrt(d), which can be compared between sizes of models."""
    table = Table(
        title=f"{result['model']}: alignment", title_justify="left", box=None, pad_edge=False
    )
    for name in (
        "estimator",
        "B",
        "train",
        "d",
        "cos",
        "x sqrt(d)",
        "+-",
        "theory",
        "signal/noise",
    ):
        table.add_column(name, justify="left" if name in ("estimator", "train") else "right")
    for row in result["rows"]:
        scale = math.sqrt(row["coordinates"])
        theory, signal = row["cosine_theory"], row["signal_to_noise"]
        table.add_row(
            row["estimator"],
            str(row["batch_size"]),
            row["train"],
            f"{row['coordinates']:,.0f}",
            f"{row['cosine_mean']:.2e}",
            f"{row['cosine_mean'] * scale:.2f}",
            f"{row['cosine_error'] * scale:.2f}",
            "" if theory is None else f"{theory * scale:.2f}",
            "" if signal is None else f"{signal:.1f}",
        )
    return table


def speed_table(result: Mapping[str, Any]) -> RenderableType:
    """Rows of ``edgezo bench speed``: medians in seconds, and the shares that the forward reaches of the machine."""
    table = Table(
        title=f"{result['model']}: time of a step, {result['threads']} threads"
        + ("" if result["kernels"] else ", without C kernels"),
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    names = ("estimator", "store", "B", "tokens", "forward", "probe", "update", "step", "x")
    for name in (*names, "spread", "tokens/s", "MM", "BW"):
        where: Any = "left" if name == "estimator" else "right"
        table.add_column(name, justify=where, no_wrap=True)
    for row in result["rows"]:
        head = (row["estimator"], row["precision"], str(row["batch_size"]), str(row["tokens"]))
        rate = f"{row['tokens_per_s']:,.0f}"
        if row["ratio"] is None:  # a baseline
            table.add_row(*head, "", "", "", f"{row['step_s']:.3f}", "", "", rate)
            continue
        times = [f"{row[n]:.3f}" for n in ("forward_s", "perturbed_s", "update_s", "step_s")]
        spread = f"{row['ratio_least']:.2f}-{row['ratio_most']:.2f}"
        shares = [f"{row[n]:.0%}" for n in ("share_of_products", "share_of_bandwidth")]
        table.add_row(*head, *times, f"{row['ratio']:.3f}", spread, rate, *shares)
    noise = ", ".join(
        f"{result[name] / 1e9:.2f} G {what} a second"
        for name, what in (("sign_bits_per_s", "sign bits"), ("normals_per_s", "normals"))
    )
    copied = f"{result['copy_bytes_per_s'] / 1e9:.1f} GB/s"
    most = max(row.get("bookkeeping_share", 0.0) for row in result["rows"])  # baselines have none
    about = (
        "x: step/forward of the same round. MM: time of the forward's matrix products alone, as a share of the "
        f"forward. BW: bytes of weights a second, as a share of what a copy moves ({copied}).\nNoise: {noise}.\n"
        f"Journal, metrics, memory guard and progress add at most {most:.2%} to a step."
    )
    lines = [
        f"{fit['estimator']} {fit['precision']}: a step takes {fit['fixed_s']:.3f} s and, for each token that passes, "
        f"{fit['s_a_row'] * 1e3:.3f} ms (R^2 {fit['r2']:.4f} over {fit['sizes']} sizes)"
        for fit in result["fits"]
    ]
    return Group(table, Text("\n".join([about, *lines])))


def accuracy_table(result: Mapping[str, Any]) -> RenderableType:
    """``medians`` of ``edgezo bench accuracy``, a row for each method on each task, and the points that tuning took."""
    goals = [name for name in result["medians"][0] if name.startswith("seconds_to_")]
    table = Table(
        title=f"{result['model']}: validation rows", title_justify="left", box=None, pad_edge=False
    )
    heads = [
        "task",
        "method",
        "trains",
        "median",
        "least",
        "most",
        "seeds",
        "peak",
        "train s",
        "s a step",
    ]
    for name in (*heads, *(f"s to {goal.removeprefix('seconds_to_')}" for goal in goals)):
        table.add_column(name, justify="left" if name in heads[:3] else "right")
    for row in result["medians"]:
        task = row["task"] if len(result["rounds"]) == 1 else f"{row['task']}, {row['round']}"
        if "value" not in row:
            table.add_row(task, row["method"], "", "failed" if row["failed"] else "not yet")
            continue
        values = [f"{row[name]:.4f}" for name in ("value", "least", "most")]
        seeds = f"{row['seeds']}" + (f" (+{row['failed']} failed)" if row["failed"] else "")
        peak, times = format_bytes(row["peak_bytes"]), [f"{row['train_s']:.0f}"]
        times.append(f"{row['step_s']:.2f}")
        times += ["never" if row.get(goal) is None else f"{row[goal]:.0f}" for goal in goals]
        table.add_row(task, row["method"], row["trained"], *values, seeds, peak, *times)
    picked = [
        f"{row['method']} on {row['task']}: tuned to {to_json(row['settings'])}"
        + (", which ends its grid: widen the grid" if row["at_edge"] else "")
        for row in result["rows"]
        if any(t["method"] == row["method"] for t in result["tuning"])
    ]
    return Group(table, *(Text(line) for line in dict.fromkeys(picked)))


def verdict(summary: Mapping[str, Any]) -> RenderableType:
    """The end of a run: its metrics, the time of a step, and the memory that was planned and taken."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value")
    before, after = summary.get("eval_before"), summary.get("eval_after")
    if after:
        start = f"{before['value']:.4f} -> " if before else ""
        end = f"{after['value']:.4f}{_give_or_take(after)}"
        table.add_row(str(after["metric"]), f"{start}{end}  ({after['n']} rows)")
        for name, value in _further(after).items():
            start = f"{before[name]:.4f} -> " if before and name in before else ""
            table.add_row(name, f"{start}{value:.4f}")
    if _has(summary, "loss_first", "loss_last"):
        losses = f"{summary['loss_first']:.4f} -> {summary['loss_last']:.4f}"
        table.add_row("training loss", f"{losses}  ({summary.get('steps', '?')} steps)")
    if _has(summary, "step_s"):
        line = f"{summary['step_s']:.3f} s a step"
        if _has(summary, "forward_s"):
            ratio = summary["step_s"] / summary["forward_s"] if summary["forward_s"] else math.nan
            line += f", {ratio:.2f} x a plain forward over the same rows"
        table.add_row("time", line)
    if _has(summary, "base_rss_bytes", "load_peak_rss_bytes"):
        base, load = summary["base_rss_bytes"], summary["load_peak_rss_bytes"]
        parts = f"{format_bytes(base)} before loading, {format_bytes(load)} while loading"
        table.add_row("memory", parts)
    if phases := summary.get("phases"):
        peaks = (f"{name} {format_bytes(p['peak_rss_bytes'])}" for name, p in phases.items())
        table.add_row("sampled peaks", ", ".join(peaks))
    if _has(summary, "peak_rss_bytes"):
        where = "GPU memory" if _has(summary, "cuda_peak_bytes") else "peak memory"
        table.add_row(where, peaks_line(summary))
        if where == "GPU memory":
            table.add_row("RAM", f"measured {format_bytes(summary['peak_rss_bytes'])}, not capped")
    return table


def comparison_table(result: Mapping[str, Any]) -> RenderableType:
    """``edgezo compare``: a column for each run, a line for each figure, and below it the settings that differ."""
    runs = result["runs"]
    names = [str(run["run"]) for run in runs]
    folders = {str(Path(name).parent) for name in names}
    if len(folders) == 1:  # three names and their figures have room in 80 columns without it
        names = [Path(name).name for name in names]
    figures = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    differ = Table(title="settings that differ", title_justify="left", box=None, pad_edge=False)
    differ.padding = figures.padding
    for table in (figures, differ):
        table.add_column("", no_wrap=True)
        for name in names:
            table.add_column(name, overflow="fold")
    for name in _COMPARED:
        if any(run[name] is not None for run in runs):
            figures.add_row(_COMPARED[name], *(_figure(name, run) for run in runs))
    for name, values in result["differ"].items():
        differ.add_row(name, *("" if value is None else to_json(value) for value in values))
    return Group(figures, Text(), differ if result["differ"] else Text("no setting differs"))


# Figures of a comparison, with the words for them.
_COMPARED = {
    **{"state": "state", "model": "model", "method": "method", "rows": "rows evaluated"},
    **{"before": "before", "after": "after", "loss": "training loss", "steps": "steps"},
    **{"step_s": "a step", "peak_bytes": "peak memory", "max_mem_bytes": "cap"},
}


def _figure(name: str, run: Mapping[str, Any]) -> str:
    """A figure of a run as text; "" where it is not known."""
    value = run[name]
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name in ("before", "after"):
        error = {"standard_error": run[f"{name}_standard_error"]}
        return f"{run['metric']} {value:.4f}{_give_or_take(error)}"
    return (
        f"{value:.3f} s" if name == "step_s" else f"{value:.4f}" if name == "loss" else f"{value}"
    )


def runs_table(runs: Sequence[Mapping[str, Any]], folder: str) -> RenderableType:
    """``edgezo runs``: a line for each run, and what is wrong with those that are damaged."""
    if not runs:
        return Text(f"there is no run in {folder}, or below it")
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "method", "steps", "result", "peak"):
        side: Any = "right" if name in ("steps", "peak") else "left"
        most = 22 if name == "method" else None  # the rest of the line is for the run's path
        whole = name in ("state", "result", "peak")  # a method wraps between its words
        table.add_column(name, justify=side, overflow="fold", no_wrap=whole, max_width=most)
    for run in runs:
        names = ("state", "method", "steps", "after", "peak_bytes")
        table.add_row(run["run"], *(_figure(name, run) for name in names))
    problems = [f"{run['run']}: {run['problem']}" for run in runs if "problem" in run]
    return Group(table, *(Text(line) for line in (["", *problems] if problems else [])))


# Figures that an evaluation may have besides its metric.
MEASURED = ("accuracy", "f1", "exact_match", "numeric_match", "objective")


def evaluation_line(result: Mapping[str, Any]) -> str:
    """The figures of an evaluation as one line."""
    further = "".join(f", {name} {value:.4f}" for name, value in _further(result).items())
    value = f"{result['value']:.4f}{_give_or_take(result)}"
    standing = f" (unfinished: {result['unfinished']})" if "unfinished" in result else ""
    over = f", over the weights of {result['over']['name']}" if "over" in result else ""
    return f"{result['metric']} {value} on {result['n']} validation rows{further}{over}{standing}"


def _give_or_take(result: Mapping[str, Any]) -> str:
    """The standard error of a metric; "" where it is not known."""
    error = result.get("standard_error")
    return "" if error is None else f" ± {error:.4f}"


def _further(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation besides its metric, in the order of ``MEASURED``."""
    return {n: result[n] for n in MEASURED if n in result and n != result["metric"]}


def models_table(cards: Iterable[Card]) -> RenderableType:
    """Model cards, one in a line of 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("model", "family"):
        table.add_column(column, no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column(
        "on the hub", overflow="fold"
    )  # names are to be copied: no letter may be cut off
    for card in cards:
        places = [str(source).removeprefix("hub ") for source in card.sources]
        kind = [] if card.kind == "causal" else [f"a {card.kind} model"]
        sources = Text("\n".join([*places, *kind]))
        table.add_row(card.name, card.family, f"{card.parameters / 1e6:,.0f} M", sources)
    return table


def estimators_list(described: Sequence[dict[str, Any]]) -> RenderableType:
    """Estimators with paper, cost and equation, from what their presets describe."""
    parts: list[RenderableType] = []
    for row in described:
        costs = (
            f"{row['forwards']} forwards, state {row['state']}, weight-sized noise {row['noise']}"
        )
        lines = [f"{row['paper']}", f"{costs}; trains {'+'.join(row['train'])}"]
        lines += [row["equation"], *([f"({row['note']})"] if row["note"] else [])]
        parts += [Text(row["name"], style="bold"), Padding(Text("\n".join(lines)), (0, 0, 0, 4))]
    return Group(*parts)
