"""What runs forget: rows that no run trains on, before and after each run of a study.

After a run the model as it would be exported is evaluated: the base with all that was trained in it, but without a
linear probe, which answers nothing but its own task. So what a readout reaches counts nowhere here, and what the steps
below it did to the model does. The export is removed again; figures are kept in a file for each run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine import children
from edgezo.machine.files import atomic_write
from edgezo.plan.fields import flag

Figures = dict[str, Any]


class Untouched:
    """Evaluations of a base and of runs over it on the rows of ``tasks``, each made once."""

    def __init__(
        self,
        model: str,
        tasks: Mapping[str, Mapping[str, Any]],  # by name the settings of eval
        folder: Path,
        local: Mapping[str, Any],  # settings of the command line, such as threads
        note: Callable[[str], None] = lambda text: None,
    ):
        self.model, self.tasks, self.folder, self.note = model, tasks, folder, note
        self.local = local
        self.lock = threading.Lock()

    def of_run(self, row: Mapping[str, Any], may_begin: bool = True) -> Figures | None:
        """By task the metric, its value ``before`` and ``after``, and what was lost, above 0 where it got worse.

        {} for a run that failed, or one of a baseline, which keeps no weights; None where it is not made yet and may
        not begin.
        """
        run = Path(row["run"])
        if "error" in row or not (run / "config.toml").exists():
            return {}
        kept = self.folder / f"{run.name}.json"
        if not kept.exists():
            if not may_begin:
                return None
            try:
                self._evaluate_run(run, kept)
            except EdgezoError as problem:
                self.note(f"{run.name}: what it forgets is not known: {problem}")
                return {}
        figures: Figures = json.loads(kept.read_text())
        return figures

    def _evaluate_run(self, run: Path, kept: Path) -> None:
        before, copy = self._base(), self.folder / f"{run.name}-model"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            _edgezo(["export", run, "--format", "hf", "--out", copy])
            after = {name: self._evaluated(copy, name) for name in self.tasks}
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        figures = {name: _change(before[name], after[name]) for name in self.tasks}
        atomic_write(kept, (json.dumps(figures, indent=1) + "\n").encode())

    def _base(self) -> Figures:
        """The base's figures by task."""
        with self.lock:
            kept = self.folder / "base.json"
            known: Figures = json.loads(kept.read_text()) if kept.exists() else {}
            for name in self.tasks:
                if name not in known:
                    known[name] = self._evaluated(self.model, name)
                    self.folder.mkdir(parents=True, exist_ok=True)
                    atomic_write(kept, (json.dumps(known, indent=1) + "\n").encode())
            return known

    def _evaluated(self, model: str | Path, name: str) -> Figures:
        """Metric, value, rows and loss of a model on a task."""
        settings = {**self.local, **self.tasks[name]}
        if "task" not in settings:
            settings.pop("data_root", None)
        options = [part for key, value in settings.items() for part in (flag(key), str(value))]
        answer = _edgezo(["eval", "--model", model, *options])
        return {key: answer[key] for key in ("metric", "value", "n", "loss")}


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figures:
    rises = after["metric"] == "loss"
    lost = after["value"] - before["value"] if rises else before["value"] - after["value"]
    return {
        "metric": after["metric"],
        "before": before["value"],
        "after": after["value"],
        "lost": lost,
    }


def _edgezo(arguments: Sequence[object]) -> Figures:
    """The answer of a command as JSON. Raises EdgezoError with what went wrong."""
    command = [sys.executable, "-m", "edgezo", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=children.environment())
    try:
        answer: Figures = json.loads(done.stdout)
    except ValueError:
        answer = {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    if done.returncode:
        raise EdgezoError(str(answer.get("error", f"exit {done.returncode}")).splitlines()[0])
    return answer
