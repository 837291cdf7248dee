"""A run directory at a glance, from its small files: whether it has ended, how far it is, and what it has reached.

No model is loaded and nothing is written. What ``report``, ``compare`` and ``runs`` show begins here.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import read_json, reading
from edgezo.machine.open_files import locked, open_to_read
from edgezo.machine.ownership import MARKER
from edgezo.plan.config import RunConfig
from edgezo.plan.method import method_name
from edgezo.plan.request import read_run_config
from edgezo.run.directory import PROBE_KEYS, RunFiles, run_id
from edgezo.run.journal import open_journal
from edgezo.run.metrics_log import read_lines
from edgezo.run.summary_file import saved_summary
from edgezo.weights.plain_saved import read_arrays
from edgezo.zo.parts import PARTS

FINISHED, UNFINISHED, RUNNING, REBUILT, DAMAGED = (
    "finished",
    "unfinished",
    "running",
    "rebuilt",
    "damaged",
)
# Settings that say where a run is, and not what it does.
OF_PLACE = ("out", "began_in", "profile", "written_at", "log_to")
_MOST_DEPTH = 8  # folders below the one that is searched
_MOST_PLAN_BYTES = 64 << 20


@dataclass(frozen=True)
class Overview:
    """What the files of a run say."""

    files: RunFiles
    state: str  # FINISHED, UNFINISHED, RUNNING (a process has its journal), REBUILT (by a replay) or DAMAGED
    problem: str = ""  # of a damaged run
    cfg: RunConfig | None = None  # None: damaged
    steps: int = 0
    of_run: str = ""  # its identity
    summary: Mapping[str, Any] = field(default_factory=dict)  # {} until the run has ended

    @staticmethod
    def of(folder: Path) -> Overview:
        """Read a run. Raises EdgezoError where it is none, or where one of its files is damaged."""
        files = RunFiles(folder)
        # As it began: where its files are now does not matter here.
        if not os.path.lexists(files.config):
            files.read_config()  # says what is missing
        cfg, summary = read_run_config(files.config), saved_summary(files)
        if not os.path.lexists(files.journal):
            return Overview(files, UNFINISHED, cfg=cfg)
        with open_journal(files.journal, resume=False) as journal:
            steps, of_run = journal.next_step, run_id(journal.header)
        if os.path.lexists(files.trained):
            state = REBUILT
        elif summary.get("steps") == steps and "trained_sha256" in summary:
            return Overview(files, FINISHED, "", cfg, steps, of_run, summary)
        else:
            state = RUNNING if in_progress(files) else UNFINISHED
        return Overview(files, state, "", cfg, steps, of_run)

    @staticmethod
    def or_damaged(folder: Path) -> Overview:
        """Read a run; where that is not possible, what the problem is."""
        try:
            return Overview.of(folder)
        except EdgezoError as problem:
            return Overview(RunFiles(folder), DAMAGED, str(problem))

    @property
    def method(self) -> str:
        """What made the result, by its name: "default (linear probe + GRZO)"."""
        if self.cfg is None:
            return ""
        trained = self.summary.get("trained", "+".join(self._trained()))
        return method_after(str(trained), self.steps, self.cfg)

    def _trained(self) -> list[str]:
        """What a run that has no summary has trained so far: a linear probe once it is there, in the head's place."""
        assert self.cfg is not None
        unused = "probe"
        if os.path.lexists(self.files.probe):
            about, _ = read_arrays(self.files.probe, PROBE_KEYS, None, "Restore it from a copy.")
            unused = "head" if about["used"] == "True" else "probe"
        return [part for part in self.cfg.train if part != unused]

    @property
    def resume_command(self) -> str:
        return f"edgezo finetune --resume --out {shlex.quote(str(self.files.path))}"

    def settings(self) -> dict[str, Any]:
        """The settings that say what the run does, without those that are None."""
        values = self.cfg.to_dict() if self.cfg is not None else {}
        return {k: v for k, v in values.items() if k not in OF_PLACE and v is not None}

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl. Raises EdgezoError for a damaged one."""
        return read_lines(self.files.metrics, self.of_run)

    def plan(self) -> dict[str, Any]:
        """plan.json; {} where there is none. Raises EdgezoError for one that cannot be read."""
        return read_table(self.files.plan)


def read_table(file: Path) -> dict[str, Any]:
    """The object in a file of JSON; {} where there is no file. Raises EdgezoError for one that cannot be read."""
    if not os.path.lexists(file):
        return {}
    value = read_json(file, _MOST_PLAN_BYTES)
    with reading(file):
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    return value


def method_after(trained: str, steps: int, cfg: RunConfig) -> str:
    """What made a result, part by part. ``trained`` names parts with + between them; only a readout needs no step."""
    parts = [name for name in trained.split("+") if name in PARTS]
    return method_name([name for name in parts if steps or PARTS[name].readout], cfg)


def in_progress(files: RunFiles) -> bool:
    """Whether a process has the journal of a run open to write to it."""
    try:
        fd = open_to_read(files.journal)
    except OSError:
        return False
    try:
        return not locked(fd)
    finally:
        os.close(fd)


def runs_below(folder: Path) -> Iterator[Overview]:
    """Every run in a folder and in the folders below it, by name. Links are not followed. Raises EdgezoError."""
    with reading(folder, "Give a folder that can be read."):
        names = sorted(os.listdir(folder))
    if is_run(names):
        yield Overview.or_damaged(folder)
        return
    yield from _below(folder, _MOST_DEPTH)


def _below(folder: Path, depth: int) -> Iterator[Overview]:
    try:
        entries = sorted(
            (e for e in os.scandir(folder) if e.is_dir(follow_symlinks=False)), key=lambda e: e.name
        )
    except OSError:  # not ours to read: a list of runs goes on without it
        return
    for entry in entries:
        path = Path(entry.path)
        try:
            names = os.listdir(path)
        except OSError:
            continue
        if is_run(names):
            yield Overview.or_damaged(path)
        elif depth > 1:
            yield from _below(path, depth - 1)


def is_run(names: Sequence[str]) -> bool:
    """Whether a folder with these names is a run, whole or not."""
    run = {"config.toml", "journal.bin", "plan.json"} & set(names)
    return len(run) >= 2 or (MARKER in names and bool(run))
