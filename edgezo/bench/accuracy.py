"""``edgezo bench accuracy``: tasks x methods x seeds at equal forwards or equal seconds, as one TOML file describes.

    model = "smollm2-135m"
    tasks = ["sst2", "trec"]     # or tables of settings: [tasks.mine] data = "rows.jsonl"
    seeds = [0, 1, 2]
    forwards = 12800             # examples that pass through the model in a run; or seconds = 120
    reach = [0.8, 0.85]          # after how many seconds of training each was first reached; needs eval-every
    [common]                     # settings of finetune for all
    [methods.grzo]               # a method's own; a list is a grid, of which tuning takes the best
    step = [0.05, 0.1, 0.2]
    [methods.peft]
    baseline = "lora"            # adamw, lora or prefix as people write them (accuracy_baselines.py), with lr and rank
    lr = [3e-4, 1e-3]
    [tune]                       # settings that differ while a grid is searched
    held-out = 0.1               # of the training rows, so that no reported row is seen (this is the default)
    seeds = [3]
    tasks = ["sst2"]             # tune on these and take a method's best on them for every task; else on each its own

Each run is a process of its own. Finished ones are kept, interrupted ones resumed.
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
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from edgezo.bench.accuracy_baselines import Request
from edgezo.bench.memory import write_results
from edgezo.data.tasks import TASKS
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.limits import MOST_PROBE_ROWS
from edgezo.plan.fields import flag
from edgezo.plan.request import RunConfig, make_config

Settings = dict[str, Any]
BUDGETS = ("forwards", "seconds")
KEYS = ("model", "tasks", "seeds", "reach", "common", "methods", "tune", *BUDGETS)
DEFAULT_BATCH = 16
HELD_OUT = 0.1
FREE = ("threads", "data_root", "out")  # not part of what a run is
# What every run is given, by what of the study.
OF_STUDY = {
    **dict.fromkeys(("steps", "for", "for_s"), "forwards or seconds"),
    "seed": "seeds",
    "out": "--out",
    "resume": "--out",
}


@dataclass(frozen=True)
class Study:
    """A study file, checked."""

    model: str
    tasks: dict[str, Settings]
    methods: dict[str, list[Settings]]  # every point of the method's grid
    seeds: list[int]
    tune_seeds: list[int]
    tune_tasks: list[str]  # a method is tuned on these for all tasks; none: on each task for itself
    budget: tuple[str, float]  # of BUDGETS
    reach: list[float]
    common: Settings
    tune: Settings

    def request(
        self, task: str, settings: Settings, seed: int, more: Settings, tuning: bool = False
    ) -> Settings:
        """Settings of finetune. Raises UsageError where they mean nothing together."""
        said = {"model": self.model, **more, **self.tasks[task], **self.common, **settings}
        if tuning:
            said |= {"held_out": HELD_OUT, **self.tune}
        said = {"batch_size": DEFAULT_BATCH, **said, "seed": seed}
        asked: Callable[[Settings], RunConfig | Request] = make_config
        if "baseline" in said:
            asked = partial(Request.of, own=tuple(settings))
        what, amount = self.budget
        if what == "seconds":
            said["for_s"] = amount
        else:
            said["steps"] = steps_of(asked(said), amount)
        asked(said)
        return said


def steps_of(asked: RunConfig | Request, forwards: float) -> int:
    """Steps in so many forwards of examples; a linear probe's pass counts, as if the data had enough rows."""
    cfg = asked if isinstance(asked, RunConfig) else asked.cfg
    assert cfg.batch_size is not None
    passes, probed = asked.mean_passes, 0
    if asked is cfg and "probe" in cfg.train:
        probed, passes = 1, 0.0 if cfg.train == ("probe",) else passes
    steps = forwards / (cfg.batch_size * (passes + probed))
    if passes and probed and steps * cfg.batch_size > MOST_PROBE_ROWS:
        steps = (forwards - MOST_PROBE_ROWS) / (cfg.batch_size * passes)
    return max(1, round(steps))


def read_study(found: Mapping[str, Any], methods: Sequence[str] = ()) -> Study:
    """Check a study; ``methods`` are those wanted of it. Raises UsageError with every problem found."""
    if problems := _wrong_types(found):
        raise UsageError(problems)
    problems = [f"unknown key {k!r}; there are {', '.join(KEYS)}" for k in found if k not in KEYS]
    for key in ("model", "tasks", "methods"):
        if not found.get(key):
            problems.append(f"{key} is missing")
    tasks = found.get("tasks", {})
    if isinstance(tasks, list):
        tasks = {name: {"task": name} for name in tasks}
    named = {name: _plain(own) for name, own in found.get("methods", {}).items()}
    problems += [
        f"task {own['task']!r} is not known; known are: {', '.join(TASKS)}"
        for own in tasks.values()
        if "task" in own and own["task"] not in list(TASKS)
    ]
    for place in ("common", "tune"):
        problems += _of_the_study(f"[{place}]", _plain(found.get(place, {})))
    for name, own in (*tasks.items(), *named.items()):
        problems += _of_the_study(name, _plain(own))
        problems += [f"{name}: the list of {k} is empty" for k, v in own.items() if v == []]
    problems += [
        f"the study has no method {m!r}; it has {', '.join(named)}"
        for m in methods
        if m not in named
    ]
    budget = [(name, float(found[name])) for name in BUDGETS if name in found]
    if len(budget) != 1 or budget[0][1] <= 0:
        problems.append("give one of forwards (of examples, in a run) and seconds, above 0")
    seeds = list(found.get("seeds", [0]))
    tune = _plain(found.get("tune", {}))
    tune_seeds = list(tune.pop("seeds", [max(seeds, default=0) + 1]))
    if not seeds or not tune_seeds:
        problems.append("seeds must not be empty")
    tune_tasks = list(tune.pop("tasks", []))
    problems += [
        f"[tune] has the task {t!r}, the study has not" for t in tune_tasks if t not in tasks
    ]
    if problems:
        raise UsageError(problems)
    study = Study(
        model=found["model"],
        tasks={name: _plain(own) for name, own in tasks.items()},
        methods={n: _points(own) for n, own in named.items() if not methods or n in methods},
        seeds=seeds,
        tune_seeds=tune_seeds,
        tune_tasks=tune_tasks,
        budget=budget[0],
        reach=[float(value) for value in found.get("reach", [])],
        common=_plain(found.get("common", {})),
        tune=tune,
    )
    for name, points in study.methods.items():
        for task, point, tuning in product(study.tasks, points, {False, len(points) > 1}):
            try:
                study.request(task, point, 0, {}, tuning)
            except UsageError as problem:
                problems += [f"{name} on {task}: {line}" for line in str(problem).splitlines()]
    if problems:
        raise UsageError(list(dict.fromkeys(problems)))
    return study


def _wrong_types(found: Mapping[str, Any]) -> list[str]:
    """What is not of the form that its key needs, with that form."""

    def number(value: Any) -> bool:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        return known and math.isfinite(value)

    def listed(value: Any, kind: Callable[[Any], bool]) -> bool:
        return isinstance(value, list) and all(kind(one) for one in value)

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def whole(value: Any) -> bool:
        return number(value) and isinstance(value, int)

    def tables(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(one, dict) for one in value.values())

    forms: dict[str, tuple[Callable[[Any], bool], str]] = {
        "model": (text, "a name or path in quotes"),
        "tasks": (
            lambda v: listed(v, text) or tables(v),
            'names, ["sst2"], or tables [tasks.NAME]',
        ),
        "seeds": (lambda v: listed(v, whole), "whole numbers, [0, 1, 2]"),
        "reach": (lambda v: listed(v, number), "numbers, [0.8, 0.85]"),
        "forwards": (number, "a number"),
        "seconds": (number, "a number"),
        "methods": (tables, "tables [methods.NAME]"),
        "common": (lambda v: isinstance(v, dict), "a table [common]"),
        "tune": (lambda v: isinstance(v, dict), "a table [tune]"),
    }
    tune = found.get("tune")
    within = tune if isinstance(tune, dict) else {}
    said = [(key, key, found[key]) for key in forms if key in found]
    said += [("tune.seeds", "seeds", within["seeds"])] if "seeds" in within else []
    problems = [
        f"{name} needs {forms[key][1]}, not {v!r}" for name, key, v in said if not forms[key][0](v)
    ]
    if "tasks" in within and not listed(within["tasks"], text):
        problems.append(f"tune.tasks needs names of the study's tasks, not {within['tasks']!r}")
    return problems


def _of_the_study(where: str, settings: Settings) -> list[str]:
    """Problems with settings that the study itself decides for every run."""
    return [
        f"{where}: {name} is the study's ({instead}), not a setting of a run"
        for name, instead in OF_STUDY.items()
        if name in settings
    ]


def _plain(settings: Mapping[str, Any]) -> Settings:
    return {name.replace("-", "_"): value for name, value in settings.items()}


def _points(settings: Settings) -> list[Settings]:
    """A method's grid: every combination of what is given as a list."""
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    combined = product(*lists.values())
    return [settings | dict(zip(lists, values, strict=True)) for values in combined]


def bench_accuracy(
    study: Study,
    *,
    data_root: str | None = None,
    threads: int | None = None,
    parallel: int = 1,
    out: Path,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run what is not there yet, ``parallel`` processes at once; writes accuracy.json and accuracy.png to ``out``.

    The result has ``rows`` (a run each), ``tuning`` (the points of every grid) and ``medians`` (of a method on a
    task, with the least and the most). A run that fails is a row with ``error`` and is run again the next time.
    """
    more = {
        name: value for name, value in (("data_root", data_root), ("threads", threads)) if value
    }
    one = partial(_run, folder=out / "runs", note=note)
    with ThreadPoolExecutor(parallel) as pool:
        grids = [m for m in study.methods if len(study.methods[m]) > 1]
        asked = [
            (task, method, point, study.request(task, point, seed, more, tuning=True))
            for task, method in product(study.tune_tasks or study.tasks, grids)
            for point in study.methods[method]
            for seed in study.tune_seeds
        ]
        ends = pool.map(lambda job: one(f"tune-{job[0]}-{job[1]}", job[3]), asked)
        tried = [
            {"task": task, "method": method, "settings": point, "seed": said["seed"], **end}
            for (task, method, point, said), end in zip(asked, ends, strict=True)
        ]
        chosen = {
            (t, m): _best(study.methods[m], tried, study.tune_tasks or [t], m)
            for t, m in product(study.tasks, grids)
        }
        jobs = [
            (task, method, chosen.get((task, method), (study.methods[method][0], False)), seed)
            for task, method, seed in product(study.tasks, study.methods, study.seeds)
        ]
        requests = [study.request(task, point[0], seed, more) for task, _, point, seed in jobs]
        ends = pool.map(
            lambda job: one(f"{job[0][0]}-{job[0][1]}", job[1]), zip(jobs, requests, strict=True)
        )
        rows: list[dict[str, Any]] = [
            {"task": task, "method": method, "seed": seed, "settings": point, "at_edge": at_edge}
            | end
            for (task, method, (point, at_edge), seed), end in zip(jobs, ends, strict=True)
        ]
    for row in rows:
        row["seconds_to"] = {
            str(goal): _first_above(row.get("curve", []), goal) for goal in study.reach
        }
    what, amount = study.budget
    found = {"model": study.model, what: amount, "rows": rows, "tuning": tried}
    found["medians"] = [_median(rows, t, m) for t, m in product(study.tasks, study.methods)]
    write_results(found, out / "accuracy", chart, note)
    if rows and all("error" in row for row in rows):
        raise EdgezoError(
            f"none of the study's {len(rows)} runs succeeded ({out / 'accuracy.json'} says why of each). "
            f"The first: {rows[0]['error']}\nOnce that is mended, the same command runs them again."
        )
    return found


def _run(
    name: str, request: Settings, *, folder: Path, note: Callable[[str], None]
) -> dict[str, Any]:
    """One run, made or finished if need be; its figures, or ``error``."""
    own = {k: v for k, v in sorted(request.items()) if k not in FREE}
    digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]
    out = folder / f"{name}-{digest}-{request['seed']}"
    if not (out / "summary.json").exists():
        command = [sys.executable, *_command(request, out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            try:
                why = str(json.loads(done.stdout)["error"])
            except (ValueError, KeyError):
                why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            note(f"{out.name}: {why.splitlines()[0]}")
            return {"run": str(out), "error": why}
    found = _figures(out)
    note(f"{out.name}: {found['metric']} {found['value']:.4f}")
    return found


def _command(request: Settings, out: Path) -> list[str]:
    """What Python is to run: a fine-tune, which goes on where it was left, or a baseline, which begins anew."""
    if "baseline" in request:
        return ["-m", "edgezo.bench.accuracy_baselines", json.dumps({**request, "out": str(out)})]
    said = [part for key, value in request.items() for part in _said(key, value)]
    if (out / "journal.bin").exists():
        said = ["--resume"]
    return ["-m", "edgezo", "finetune", *said, "--out", str(out), "--json"]


def _said(key: str, value: Any) -> list[str]:
    """A setting as on the command line."""
    if isinstance(value, bool):
        return [flag(key) if value else "--no-" + flag(key)[2:]]
    return [flag(key), str(value)]


def _figures(out: Path) -> dict[str, Any]:
    """What a finished run says. Raises EdgezoError for a damaged one."""
    try:
        summary = json.loads((out / "summary.json").read_text())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        after = summary["eval_after"]
        kept = ("steps", "batch_size", "train_s", "step_s", "peak_rss_bytes", "cuda_peak_bytes")
        found = {name: summary[name] for name in (*kept, "max_mem_bytes") if name in summary}
        before = summary.get("eval_before") or {}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise EdgezoError(
            f"{out} is damaged ({problem}).\nRemove it; the same command runs it again."
        ) from problem
    curve, spent_s = [], 0.0
    for line in lines:
        spent_s += line.get("step_s") or 0.0
        if "eval" in line:
            # A linear probe is fitted before the first step.
            probed_s = (summary.get("probe") or {}).get("fit_s", 0.0)
            if line["eval"] in ("before", "probe"):
                probed_s = line.get("pass_s", 0.0)
            at_s = spent_s + probed_s
            curve.append({"step": line["step"], "seconds": at_s, "value": line["value"]})
    figures = {"metric": after["metric"], "value": after["value"], "loss": after["loss"]}
    return {"run": str(out), **figures, "before": before.get("value"), "curve": curve, **found}


def _best(
    points: list[Settings], tried: list[dict[str, Any]], tasks: Sequence[str], method: str
) -> tuple[Settings, bool]:
    """The best point of a grid by its mean over ``tasks``, and whether it ends a list: then the grid was too small."""

    def quality(point: Settings) -> tuple[float, float]:
        own = [t for t in tried if (t["method"], t["settings"]) == (method, point)]
        own = [t for t in own if t["task"] in tasks]
        if any("error" in t for t in own):
            return -float("inf"), -float("inf")
        loss = statistics.fmean(t["loss"] for t in own)
        value = statistics.fmean(t["value"] for t in own)
        return (-loss if own[0]["metric"] == "loss" else value), -loss

    best = max(points, key=quality)
    varied = {
        name: [p[name] for p in points]
        for name in best
        if any(p[name] != best[name] for p in points)
    }
    numbers = {n: v for n, v in varied.items() if all(isinstance(x, int | float) for x in v)}
    return best, any(best[n] in (min(v), max(v)) and len(set(v)) > 2 for n, v in numbers.items())


def _first_above(curve: Sequence[Mapping[str, float]], goal: float) -> float | None:
    return next((point["seconds"] for point in curve if point["value"] >= goal), None)


def _median(rows: Sequence[dict[str, Any]], task: str, method: str) -> dict[str, Any]:
    own = [r for r in rows if (r["task"], r["method"]) == (task, method)]
    done = [r for r in own if "error" not in r]
    found: dict[str, Any] = {"task": task, "method": method, "seeds": len(done)}
    found["failed"] = len(own) - len(done)
    if done:
        values = sorted(r["value"] for r in done)
        found |= {"metric": done[0]["metric"], "value": statistics.median(values)}
        found |= {"least": values[0], "most": values[-1]}
        for name in ("loss", "train_s", "step_s"):
            found[name] = statistics.median(r[name] for r in done if r[name] is not None)
        found["peak_bytes"] = max(r.get("cuda_peak_bytes", r["peak_rss_bytes"]) for r in done)
        for goal in done[0].get("seconds_to", {}):
            times_s = [r["seconds_to"][goal] for r in done]
            reached = sorted(float("inf") if t is None else t for t in times_s)
            middle = statistics.median_low(reached)
            found[f"seconds_to_{goal}"] = None if middle == float("inf") else middle
    return found


def chart(found: Mapping[str, Any], file: Path) -> None:
    """A panel for each task: value against the examples passed, or seconds where those are equal; seeds thin. PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [row for row in found["rows"] if "error" not in row]
    tasks = list(dict.fromkeys(row["task"] for row in done))
    methods = list(dict.fromkeys(row["method"] for row in done))
    figure, panels = plt.subplots(1, len(tasks), figsize=(1.5 + 4 * len(tasks), 4), squeeze=False)
    across = "seconds" if "seconds" in found else "step"
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
    figure.suptitle(f"{found['model']}: held-out rows, one line a seed")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
