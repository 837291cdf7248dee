"""``edgezo bench accuracy``: methods compared over tasks and seeds, at equal forwards or equal seconds.

study.py describes the TOML file that says what is compared. Every run is a process of its own. Finished runs are kept,
and interrupted ones are resumed, so the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from edgezo.bench.memory import claim_results, write_results
from edgezo.bench.page import page
from edgezo.bench.study import Round, Settings, Study
from edgezo.bench.study_data import placed
from edgezo.bench.untouched import Untouched
from edgezo.errors import EdgezoError
from edgezo.machine import children
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_write
from edgezo.plan.fields import flag

Figures = dict[str, Any]
# Where and how a run is made, not what it is: runs that differ in these alone share a directory.
LOCAL = ("threads", "data_root", "out")
RunAll = Callable[[list[tuple[str, Settings]]], list[Figures]]  # (name, settings) of each run


def bench_accuracy(
    study: Study,
    *,
    data_root: str | None = None,
    threads: int | None = None,
    parallel: int = 1,
    most_s: float | None = None,
    out: Path,
    note: Callable[[str], None] = lambda text: None,
) -> Figures:
    """Make the runs that are missing, ``parallel`` processes at once; write accuracy.json, .png and .md to ``out``.

    The result has ``rows`` (one for each run), ``tuning`` (one for each run of a grid search) and ``medians`` (one
    for each method on each task in each round, with the least and the most). A run that fails is a row with ``error``,
    and is made again the next time. After ``most_s`` seconds no run is begun; ``pending`` says how many are left, and
    the next call makes them. Raises EdgezoError where every run fails, UsageError where data is not there.
    """
    claim_results(out)
    study = placed(study, data_root, out / "data")
    options = {"data_root": data_root, "threads": threads}
    local = {name: value for name, value in options.items() if value}
    stop_s = math.inf if most_s is None else now_s() + most_s
    with ThreadPoolExecutor(parallel) as pool:

        def run_all(runs: list[tuple[str, Settings]]) -> list[Figures]:
            """Figures of these runs, in their order."""
            return list(
                pool.map(
                    lambda run: _run(*run, folder=out / "runs", stop_s=stop_s, note=note), runs
                )
            )

        tuning = _tune(study, local, run_all)
        rows = [row for at in study.rounds for row in _reported(study, local, tuning, run_all, at)]
    left = [run for run in (*tuning, *rows) if "pending" in run]
    tuning, rows = ([run for run in runs if "pending" not in run] for runs in (tuning, rows))
    if study.untouched:
        kept = Untouched(study.model, study.untouched, out / "untouched", local, note)
        for row in rows:
            row["untouched"] = kept.of_run(row, may_begin=now_s() < stop_s)
            left += [row] if row["untouched"] is None else []
    first = study.rounds[0]
    result: Figures = {"model": study.model, first.what: first.amount, "rows": rows}
    result |= {"tuning": tuning, "rounds": [at.name for at in study.rounds], "pending": len(left)}
    result["medians"] = [
        _over_seeds([row for row in rows if row["round"] == at.name], t, m) | {"round": at.name}
        for at, t, m in product(study.rounds, study.tasks, study.methods)
    ]
    write_results(result, out / "accuracy", chart, note)
    atomic_write(out / "accuracy.md", page(result).encode())
    if left:
        note(f"{len(left)} runs or evaluations are left: the same command makes them")
    if rows and all("error" in row for row in rows):
        raise EdgezoError(
            f"every run of the study failed, {len(rows)} in all; {out / 'accuracy.json'} has the reason for each. "
            f"The first failed with: {rows[0]['error']}\n"
            "Once that is mended, the same command makes the failed runs again."
        )
    return result


def _tune(study: Study, local: Settings, run_all: RunAll) -> list[Figures]:
    """Make the runs of every grid, on rows held out of training; one entry for each point, task and seed."""
    runs = [
        (task, method, point, study.request(task, point, seed, local, tuning=True))
        for task, method in product(study.tune_tasks or study.tasks, study.grids)
        for point in study.methods[method]
        for seed in study.tune_seeds
    ]
    results = run_all([(f"tune-{task}-{method}", request) for task, method, _, request in runs])
    return [
        {"task": task, "method": method, "settings": point, "seed": request["seed"], **figures}
        for (task, method, point, request), figures in zip(runs, results, strict=True)
    ]


def _reported(
    study: Study, local: Settings, tuning: list[Figures], run_all: RunAll, at: Round
) -> list[Figures]:
    """Make the runs of a round, each method at its best point; one row for each task, method and seed.

    A method whose grid is not searched to its end has no runs yet.
    """
    untuned = {(t["task"], t["method"]) for t in tuning if "pending" in t}
    best = {
        (task, method): _best(study.methods[method], tuning, study.tune_tasks or [task], method)
        for task, method in product(study.tasks, study.grids)
        if not untuned & {(tuned_on, method) for tuned_on in study.tune_tasks or [task]}
    }
    runs = [
        (task, method, *best.get((task, method), (study.methods[method][0], False)), seed)
        for task, method, seed in product(study.tasks, study.methods, study.seeds)
        if method not in study.grids or (task, method) in best
    ]
    results = run_all(
        [
            (f"{task}-{method}", study.request(task, point, seed, local, at=at))
            for task, method, point, _, seed in runs
        ]
    )
    rows: list[Figures] = [
        {"task": task, "method": method, "seed": seed, "settings": point, "at_edge": at_edge}
        | {"round": at.name}
        | figures
        for (task, method, point, at_edge, seed), figures in zip(runs, results, strict=True)
    ]
    for row in rows:
        row["seconds_to"] = {
            str(goal): _first_above(row.get("curve", []), goal) for goal in study.reach
        }
    return rows


def _run(
    name: str, request: Settings, *, folder: Path, stop_s: float, note: Callable[[str], None]
) -> Figures:
    """Make or finish one run, unless it is finished already; returns its figures, ``error``, or ``pending``.

    It is pending where it would begin after ``stop_s`` on the clock.
    """
    identity = {k: v for k, v in sorted(request.items()) if k not in LOCAL}
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    out = folder / f"{name}-{digest}-{request['seed']}"
    if not (out / "summary.json").exists():
        if now_s() >= stop_s:
            return {"run": str(out), "pending": True}
        command = [sys.executable, *_command(request, out)]
        done = subprocess.run(command, capture_output=True, text=True, env=children.environment())
        if done.returncode:
            try:
                why = str(json.loads(done.stdout)["error"])
            except (ValueError, KeyError):
                why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            note(f"{out.name}: {why.splitlines()[0]}")
            return {"run": str(out), "error": why}
    figures = _figures(out)
    note(f"{out.name}: {figures['metric']} {figures['value']:.4f}")
    return figures


def _command(request: Settings, out: Path) -> list[str]:
    """Arguments of Python for a run: finetune, which resumes what it has begun, or a baseline, which starts anew."""
    if "baseline" in request:
        return ["-m", "edgezo.bench.accuracy_baselines", json.dumps({**request, "out": str(out)})]
    options = [part for key, value in request.items() for part in _option(key, value)]
    if (out / "journal.bin").exists():
        options = ["--resume"]
    return ["-m", "edgezo", "finetune", *options, "--out", str(out), "--json"]


def _option(name: str, value: Any) -> list[str]:
    """A setting as command-line arguments."""
    if isinstance(value, bool):
        return [flag(name) if value else "--no-" + flag(name)[2:]]
    return [flag(name), str(value)]


def _figures(out: Path) -> Figures:
    """Figures of a finished run, from its summary.json and metrics.jsonl. Raises EdgezoError for damaged files."""
    try:
        summary = json.loads((out / "summary.json").read_text())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        after = summary["eval_after"]
        names = ("steps", "batch_size", "train_s", "step_s", "peak_rss_bytes", "cuda_peak_bytes")
        costs = {name: summary[name] for name in (*names, "max_mem_bytes") if name in summary}
        before = summary.get("eval_before") or {}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise EdgezoError(
            f"{out} is damaged ({problem}).\nRemove it; the same command makes the run again."
        ) from problem
    curve, steps_s = [], 0.0
    for line in lines:
        steps_s += line.get("step_s") or 0.0
        if "eval" in line:
            # A linear probe is fitted before the first step.
            fit_s = (summary.get("probe") or {}).get("fit_s", 0.0)
            if line["eval"] in ("before", "probe"):
                fit_s = line.get("pass_s", 0.0)
            curve.append({"step": line["step"], "seconds": steps_s + fit_s, "value": line["value"]})
    figures = {"metric": after["metric"], "value": after["value"], "loss": after["loss"]}
    figures["trained"] = summary.get("trained")  # None: a baseline, whose name says it
    return {"run": str(out), **figures, "before": before.get("value"), "curve": curve, **costs}


# ---------------------------------------------------------------------------------------------
# Comparing


def _best(
    points: list[Settings], tuning: list[Figures], tasks: Sequence[str], method: str
) -> tuple[Settings, bool]:
    """The point with the best mean over ``tasks``, and whether it ends a list of its grid, which was then too short."""

    def quality(point: Settings) -> tuple[float, float]:
        runs = [t for t in tuning if (t["method"], t["settings"]) == (method, point)]
        runs = [t for t in runs if t["task"] in tasks]
        if any("error" in t for t in runs):
            return -float("inf"), -float("inf")
        loss = statistics.fmean(t["loss"] for t in runs)
        value = statistics.fmean(t["value"] for t in runs)
        return (-loss if runs[0]["metric"] == "loss" else value), -loss

    best = max(points, key=quality)
    varied = {
        name: [p[name] for p in points]
        for name in best
        if any(p[name] != best[name] for p in points)
    }
    numbers = {n: v for n, v in varied.items() if all(isinstance(x, int | float) for x in v)}
    return best, any(best[n] in (min(v), max(v)) and len(set(v)) > 2 for n, v in numbers.items())


def _first_above(curve: Sequence[Mapping[str, float]], goal: float) -> float | None:
    """Seconds of training until a learning curve is at ``goal`` or above; None: it never is."""
    return next((point["seconds"] for point in curve if point["value"] >= goal), None)


def _over_seeds(rows: Sequence[Figures], task: str, method: str) -> Figures:
    """Medians of a method on a task over its seeds, with the least and the most value and the largest peak."""
    runs = [r for r in rows if (r["task"], r["method"]) == (task, method)]
    done = [r for r in runs if "error" not in r]
    medians: Figures = {"task": task, "method": method, "seeds": len(done)}
    medians["failed"] = len(runs) - len(done)
    if done:
        values = sorted(r["value"] for r in done)
        medians |= {"metric": done[0]["metric"], "value": statistics.median(values)}
        medians |= {"least": values[0], "most": values[-1]}
        # A readout takes the head's place where rows have label words, run by run.
        medians["trained"] = " or ".join(dict.fromkeys(r.get("trained") or "-" for r in done))
        for name in ("loss", "train_s", "step_s"):
            medians[name] = statistics.median(r[name] for r in done if r[name] is not None)
        peaks = ({"cuda_peak_bytes": r["peak_rss_bytes"], **r} for r in done)  # RAM without a GPU
        medians["peak_bytes"] = max(peak["cuda_peak_bytes"] for peak in peaks)
        for goal in done[0].get("seconds_to", {}):
            times_s = [r["seconds_to"][goal] for r in done]
            reached = sorted(float("inf") if t is None else t for t in times_s)
            middle = statistics.median_low(reached)
            medians[f"seconds_to_{goal}"] = None if middle == float("inf") else middle
    return medians


def chart(result: Mapping[str, Any], file: Path) -> None:
    """Draw a PNG with a panel for each task: value over steps, or over seconds where those are equal; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in result["rows"] if "error" not in row]
    tasks = list(dict.fromkeys(row["task"] for row in done))
    methods = list(dict.fromkeys(row["method"] for row in done))
    figure, panels = plt.subplots(1, len(tasks), figsize=(1.5 + 4 * len(tasks), 4), squeeze=False)
    across = "seconds" if "seconds" in result else "step"
    for panel, task in zip(panels[0], tasks, strict=True):
        for row in (row for row in done if row["task"] == task):
            points = [(p[across], p["value"]) for p in row["curve"]]
            colour = f"C{methods.index(row['method'])}"
            panel.plot(*zip(*points, strict=True), color=colour, marker=".", lw=0.8)
        panel.set_title(task)
        panel.set_xlabel({"seconds": "seconds of training", "step": "steps"}[across])
        panel.grid(alpha=0.3)
    for at, method in enumerate(methods):
        panels[0][-1].plot([], [], color=f"C{at}", label=method)
    panels[0][0].set_ylabel(done[0]["metric"])
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{result['model']}: validation rows, one line for each seed")
    figure.tight_layout()
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
