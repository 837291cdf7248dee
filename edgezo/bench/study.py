"""The study file of ``edgezo bench accuracy``: read from TOML and checked before the first run.

    model = "smollm2-135m"
    tasks = ["sst2", "trec"]     # or tables of settings: [tasks.mine] data = "rows.jsonl"
    seeds = [0, 1, 2]
    forwards = 12800             # forwards over one example that a run may take
    seconds = 120                # how long a run may take; a study has one of the two, or both, one after the other
    caps = ["700MB", "2GB"]      # every run under each of these; else under the max-mem of its settings
    reach = [0.8, 0.85]          # report the training seconds until each value is reached; needs eval-every
    [common]                     # settings of finetune for every run
    [methods.grzo]               # settings of one method; a list is a grid, of which tuning takes the best point
    step = [0.05, 0.1, 0.2]
    [methods.peft]
    baseline = "lora"            # adamw, lora or prefix with stock peft and PyTorch, see accuracy_baselines.py
    lr = [3e-4, 1e-3]
    [tune]                       # settings that differ while a grid is searched
    held-out = 0.1               # share of the training rows that tuning evaluates on; it never sees reported rows
    seeds = [3]
    tasks = ["sst2"]             # tune on these and take a method's best point for every task; else task by task
    [untouched.news]             # settings of eval: rows that no run trains on, before and after each (untouched.py)
    task = "ag_news"

Grids are searched under the first budget and the first cap. In a table of a task, "{data-root}" in data stands for
--data-root, and completion = "{intent}" makes completions of its rows: the template is then the prompt.
Settings are named as the options of ``edgezo finetune``, without the two dashes in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from edgezo.bench.accuracy_baselines import Request
from edgezo.data.tasks import TASKS
from edgezo.errors import UsageError
from edgezo.machine.limits import MOST_READOUT_ROWS
from edgezo.plan.config import RunConfig
from edgezo.plan.field import is_finite
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.plan.request import make_config

Settings = dict[str, Any]
BUDGETS = ("forwards", "seconds")
KEYS = (
    *("model", "tasks", "seeds", "reach", "common", "methods", "tune", "caps", "untouched"),
    *BUDGETS,
)
DATA_ROOT = "{data-root}"  # in a table of a task
HELD_OUT = 0.1
MOST_POINTS = 1000  # of all methods' grids on all tasks, each of which is a run of tuning
# Settings that the study decides for every run, and the key or option that decides them.
STUDY_DECIDES = {
    **dict.fromkeys(("steps", "for", "for_s"), "forwards or seconds"),
    "seed": "seeds",
    "out": "--out",
    "resume": "--out",
}


class Round(NamedTuple):
    """What every method gets: a budget, and a cap on its memory."""

    what: str  # one of BUDGETS
    amount: float
    cap: str | None  # --max-mem; None: as each run's settings have it

    @property
    def name(self) -> str:
        return f"{self.amount:g} {self.what}" + (f", {self.cap}" if self.cap else "")


@dataclass(frozen=True)
class Study:
    """A study file, checked."""

    model: str
    tasks: dict[str, Settings]
    methods: dict[str, list[Settings]]  # every point of the method's grid
    seeds: list[int]
    tune_seeds: list[int]
    tune_tasks: list[str]  # a method is tuned on these for all tasks; none: on each task for itself
    rounds: list[Round]  # in each, all methods are compared
    reach: list[float]
    common: Settings
    tune: Settings
    untouched: dict[str, Settings]  # by name the settings of eval for rows that no run trains on

    @property
    def grids(self) -> list[str]:
        """Methods that have to be tuned: those of more than one point."""
        return [name for name, points in self.methods.items() if len(points) > 1]

    def request(
        self,
        task: str,
        point: Settings,
        seed: int,
        local: Settings,
        tuning: bool = False,
        at: Round | None = None,
    ) -> Settings:
        """Settings of one run of finetune or of a baseline.

        ``point``: the method's settings; ``local``: settings of the command line, such as threads; ``at``: the round,
        else the first one.
        Raises UsageError for settings that do not go together.
        """
        of_task = {k: v for k, v in self.tasks[task].items() if k != "completion"}
        settings = {"model": self.model, **local, **of_task, **self.common, **point}
        if tuning:
            settings |= {"held_out": HELD_OUT, **self.tune}
        settings = {"batch_size": DEFAULT_BATCH, **settings, "seed": seed}
        check: Callable[[Settings], RunConfig | Request] = make_config
        if "baseline" in settings:
            check = partial(Request.of, of_method=tuple(point))
        what, amount, cap = at or self.rounds[0]
        if cap is not None:
            settings["max_mem"] = cap
        if "task" not in settings:
            settings.pop("data_root", None)
        if what == "seconds":
            settings["for_s"] = amount
        else:
            settings["steps"] = steps_of(check(settings), amount)
        check(settings)
        return settings


def steps_of(run: RunConfig | Request, forwards: float) -> int:
    """Steps that ``forwards`` forwards over one example are enough for, at least 1.

    The pass that fits a linear probe counts too: one forward over every row that the steps see, at most
    ``MOST_READOUT_ROWS``, as if the data had that many.
    """
    cfg = run if isinstance(run, RunConfig) else run.cfg
    batch_size = cfg.batch_size or DEFAULT_BATCH
    passes, fit_passes = run.mean_passes, 0
    if run is cfg and cfg.parts.readout:
        fit_passes, passes = 1, 0.0 if len(cfg.train) == 1 else passes
    steps = forwards / (batch_size * (passes + fit_passes))
    if passes and fit_passes and steps * batch_size > MOST_READOUT_ROWS:
        steps = (forwards - MOST_READOUT_ROWS) / (batch_size * passes)
    return max(1, round(steps))


# ---------------------------------------------------------------------------------------------
# Reading a study


def read_study(given: Mapping[str, Any], methods: Sequence[str] = ()) -> Study:
    """Check the tables of a study file; ``methods`` names those to run, or is empty for all of them.

    Raises UsageError with every problem.
    """
    if problems := _wrong_types(given):
        raise UsageError(problems)
    tables = given.get("tasks", {})
    if isinstance(tables, list):
        tables = {name: {"task": name} for name in tables}
    tasks = {name: _with_underscores(settings) for name, settings in tables.items()}
    tables = given.get("methods", {})
    grids = {name: _with_underscores(settings) for name, settings in tables.items()}
    seeds = list(given.get("seeds", [0]))
    common, tune = (_with_underscores(given.get(name, {})) for name in ("common", "tune"))
    problems = _wrong_keys(given, seeds)
    each = [*tasks.items(), *grids.items()]
    problems += _decided_by_study([("[common]", common), ("[tune]", tune), *each])
    problems += [f"{name}: the list of {k} is empty" for name, s in each for k in s if s[k] == []]
    problems += _unknown_names(tasks, grids, tune.get("tasks", []), methods)
    problems += _too_many_points(grids, len(tasks))
    if problems:
        raise UsageError(problems)
    amounts = [(name, float(given[name])) for name in BUDGETS if name in given]
    rounds = [Round(*amount, cap) for amount in amounts for cap in given.get("caps", [None])]
    tune_seeds = list(tune.pop("seeds", [max(seeds) + 1]))
    tune_tasks = list(tune.pop("tasks", []))
    study = Study(
        model=given["model"],
        tasks=tasks,
        methods={n: _points(grid) for n, grid in grids.items() if not methods or n in methods},
        seeds=seeds,
        tune_seeds=tune_seeds,
        tune_tasks=tune_tasks,
        rounds=rounds,
        reach=[float(value) for value in given.get("reach", [])],
        common=common,
        tune=tune,
        untouched={n: _with_underscores(s) for n, s in given.get("untouched", {}).items()},
    )
    if problems := _refused_runs(study):
        raise UsageError(problems)
    return study


def _wrong_types(given: Mapping[str, Any]) -> list[str]:
    """Problems with values that do not have the form that their key needs."""

    def number(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and is_finite(value)

    def listed(value: Any, kind: Callable[[Any], bool]) -> bool:
        return isinstance(value, list) and all(kind(one) for one in value)

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def whole(value: Any) -> bool:
        return number(value) and isinstance(value, int)

    def table(value: Any) -> bool:
        return isinstance(value, dict)

    def tables(value: Any) -> bool:
        return table(value) and all(table(one) for one in value.values())

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
        "common": (table, "a table [common]"),
        "tune": (table, "a table [tune]"),
        "caps": (lambda v: bool(v) and listed(v, text), 'sizes in quotes, ["700MB", "2GB"]'),
        "untouched": (tables, "tables [untouched.NAME]"),
    }
    tune = given["tune"] if table(given.get("tune")) else {}
    values = [(key, key, given[key]) for key in forms if key in given]
    values += [("tune.seeds", "seeds", tune["seeds"])] if "seeds" in tune else []
    problems = [
        f"{name} needs {forms[key][1]}, not {v!r}"
        for name, key, v in values
        if not forms[key][0](v)
    ]
    if "tasks" in tune and not listed(tune["tasks"], text):
        problems.append(f"tune.tasks needs names of the study's tasks, not {tune['tasks']!r}")
    return problems


def _wrong_keys(given: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """Problems with the keys of the file itself."""
    problems = [f"unknown key {k!r}; there are {', '.join(KEYS)}" for k in given if k not in KEYS]
    problems += [f"{key} is missing" for key in ("model", "tasks", "methods") if not given.get(key)]
    amounts = [float(given[name]) for name in BUDGETS if name in given]
    if not amounts or min(amounts) <= 0:
        problems.append(
            "give one of forwards (over single examples, that a run may take) and seconds, or both, above 0"
        )
    if not seeds or given.get("tune", {}).get("seeds") == []:
        problems.append("seeds must not be empty")
    return problems


def _decided_by_study(tables: Sequence[tuple[str, Settings]]) -> list[str]:
    """Problems with settings in tables (name, settings) that the study decides for every run."""
    return [
        f"{table}: {name} is the study's ({decided_by}), not a setting of a run"
        for table, settings in tables
        for name, decided_by in STUDY_DECIDES.items()
        if name in settings
    ]


def _too_many_points(grids: Mapping[str, Settings], tasks: int) -> list[str]:
    """A problem with grids of more points than anybody has the time for, of which a list would have no room."""
    lists = ([v for v in settings.values() if isinstance(v, list)] for settings in grids.values())
    points = tasks * sum(math.prod(map(len, grid)) for grid in lists)
    if points <= MOST_POINTS:
        return []
    return [
        f"the grids of all methods have more than {MOST_POINTS:,} points on all tasks: give shorter lists"
    ]


def _unknown_names(
    tasks: Mapping[str, Settings],
    grids: Mapping[str, Settings],
    tune_tasks: Sequence[str],
    methods: Sequence[str],
) -> list[str]:
    """Problems with names of tasks and methods that do not exist."""
    problems = [
        f"task {settings['task']!r} is not known; known are: {', '.join(TASKS)}"
        for settings in tasks.values()
        if "task" in settings and settings["task"] not in list(TASKS)
    ]
    problems += [
        f"the study has no method {name!r}; it has {', '.join(grids)}"
        for name in methods
        if name not in grids
    ]
    problems += [
        f"[tune] names the task {name!r}, which the study does not have"
        for name in tune_tasks
        if name not in tasks
    ]
    return problems


def _refused_runs(study: Study) -> list[str]:
    """Problems with the settings of each run: of every point of every method, on every task."""
    problems = []
    for name, points in study.methods.items():
        tries = product(study.tasks, points, {False, len(points) > 1}, study.rounds)
        for task, point, tuning, at in tries:
            try:
                study.request(task, point, 0, {}, tuning, at)
            except UsageError as problem:
                problems += [f"{name} on {task}: {line}" for line in str(problem).splitlines()]
    return list(dict.fromkeys(problems))


def _with_underscores(settings: Mapping[str, Any]) -> Settings:
    """Settings by their field names: ``batch-size`` becomes ``batch_size``."""
    return {name.replace("-", "_"): value for name, value in settings.items()}


def _points(settings: Settings) -> list[Settings]:
    """Points of a method's grid: every combination of the values that are given as lists."""
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    combined = product(*lists.values())
    return [settings | dict(zip(lists, values, strict=True)) for values in combined]
