"""Train longer: a run that goes on from what another one, its parent, has trained.

It begins where the parent ended: at the same base and the same seed, with the step that comes after the parent's last,
so that no direction is drawn twice and the order of rows goes on. Its journal has its own steps only, and names the
parent in its header. All that the parent's weights are made from is copied, and the new run needs the parent no more:

    parent/journal-1.bin, ...   the journals from the base to the parent, whose own is the last one
    parent/head.safetensors     what no seed can rebuild, where there is any
    parent/probe.safetensors    the linear probe, where there is one
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from edgezo.data.dataset import Dataset
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_path, remove_leftovers
from edgezo.machine.open_files import files_inside, make_folder, remove_files
from edgezo.network.loader import ModelFiles
from edgezo.plan.config import RunConfig
from edgezo.plan.request import check_after
from edgezo.run.directory import PARENT_NAMES, RunFiles, run_id, same_task
from edgezo.run.journal import Journal, open_journal
from edgezo.run.journal_header import check_base
from edgezo.run.overview import FINISHED, REBUILT, RUNNING, Overview


class Parent(NamedTuple):
    """A finished run that another one goes on from."""

    files: RunFiles
    cfg: RunConfig
    identity: str  # by the header of its journal (directory.run_id)
    steps: int  # from the base to its end
    trained_sha256: str

    @staticmethod
    def of(folder: Path) -> Parent:
        """Read a run. Raises EdgezoError where it is none, or damaged, and UsageError where it has not ended."""
        run = Overview.of(folder)
        if run.state != FINISHED:
            raise UsageError(_why_not(run))
        assert run.cfg is not None
        if not run.steps:
            raise UsageError(
                f"{folder} has made no steps that more of them could follow: it has fitted a linear probe alone.\n"
                "Start a new run over its base, for example with --train lowrank+head+probe."
            )
        steps, digest = run.cfg.since_base(run.steps), str(run.summary["trained_sha256"])
        return Parent(run.files, run.cfg, run.of_run, steps, digest)

    def followed_by(self, cfg: RunConfig) -> RunConfig:
        """The request of a run that goes on from this one. Raises UsageError for what no such run can change."""
        check_after(self.cfg, self.files.path, {f.name: getattr(cfg, f.name) for f in fields(cfg)})
        named = replace(cfg, parent=self.identity, parent_steps=self.steps)
        return replace(named, parent_sha256=self.trained_sha256)

    def check(self, files: ModelFiles, dataset: Dataset) -> None:
        """Raise BaseMismatch for another base than the parent's, EdgezoError for rows of another task."""
        with open_journal(self.files.journal, resume=False) as journal:
            check_base(journal.header, files.content_hash, files.shape.vocab)
            facts = journal.header["dataset"]
        if not same_task(facts, dataset):
            raise EdgezoError(
                f"{self.files.path} was trained for {', '.join(facts['label_names']) or facts['kind']}; these rows "
                f"have {', '.join(dataset.label_names) or dataset.kind}.\n"
                "Give rows of the same task, with the same label words in the same order (--template, --labels)."
            )

    def copy_to(self, run: RunFiles) -> None:
        """Copy what its weights are made from into the directory of a new run. Raises EdgezoError."""
        with open_with_parents(self.files) as journal:
            sources = {f"journal-{n}.bin": part.path for n, part in enumerate(journal.chain(), 1)}
        for file in (self.files.snapshot, self.files.probe):
            if file.exists():
                sources[file.name] = file
        _copy(sources, run.parent.path)


def copy_parents(run: RunFiles, other: RunFiles) -> None:
    """Copy what a run goes on from into another directory, of a replay for example; nothing where it has no parent."""
    folder = run.parent.path
    if names := sorted(files_inside(folder, PARENT_NAMES)):
        _copy({name: folder / name for name in names}, other.parent.path)


def _copy(sources: Mapping[str, Path], folder: Path) -> None:
    """Fill a folder for what a run goes on from, without what an earlier command left there. Raises EdgezoError."""
    make_folder(folder)
    remove_leftovers(folder)
    remove_files(folder, PARENT_NAMES)
    make_folder(folder)
    for name, source in sources.items():
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(source, temporary)


def _why_not(run: Overview) -> str:
    """Why no run goes on from this one, and what to do."""
    path = run.files.path
    if run.state == REBUILT:
        return f"{path} was rebuilt by edgezo replay. Go on from the run itself, which has its head and optimizer too."
    if run.state == RUNNING:
        return f"a process is still training {path}. Wait until it has ended."
    asked = f" of {run.cfg.steps}" if run.cfg is not None and run.cfg.steps else ""
    return (
        f"{path} has not ended: {run.steps}{asked} steps are done. A run goes on from one that has.\n"
        f"Finish it first: {run.resume_command}"
    )


def open_with_parents(run: RunFiles) -> Journal:
    """Open the journal of a run for reading, and behind it those of the runs that it goes on from.

    Raises EdgezoError where a run has made no step yet.
    """
    if run.config.exists() and not os.path.lexists(run.journal):
        raise EdgezoError(
            f"{run.path} has no {run.journal.name}: it was stopped before its first step, or the file was removed.\n"
            f"Begin it with: edgezo finetune --resume --out {run.path}"
        )
    journal = open_journal(run.journal, resume=False)
    try:
        attach_parents(journal, run)
    except BaseException:
        journal.close()
        raise
    return journal


def attach_parents(journal: Journal, run: RunFiles) -> None:
    """Open the journals of the run's parents behind its own; they are closed with it.

    Raises EdgezoError where one of them is missing, damaged, or of another run.
    """
    later = journal
    for path in reversed(_journals(run)):
        parent, steps = later.settings.parent, later.settings.parent_steps
        if parent is None:
            raise _lost(run, f"{path.name} is of no parent")
        later.earlier = earlier = open_journal(path, resume=False)
        ends = earlier.settings.since_base(earlier.next_step)
        if (run_id(earlier.header), ends) != (parent, steps):
            raise _lost(run, f"{path.name} ends after step {ends}, or is of another run")
        later = earlier
    if later.header.get("config", {}).get("parent") is not None:
        raise _lost(run, f"that of {later.settings.parent} is not there")


def _journals(run: RunFiles) -> list[Path]:
    """The journals of a run's parents, the oldest first."""
    numbered = {}
    for name in files_inside(run.parent.path, PARENT_NAMES):
        match = PARENT_NAMES.fullmatch(name)
        if match is not None and match[1]:
            numbered[int(match[1])] = run.parent.path / name
    return [numbered[number] for number in sorted(numbered)]


def _lost(run: RunFiles, what: str) -> EdgezoError:
    return EdgezoError(
        f"{run.path} goes on from another run, whose journals {run.parent.path} has to hold: {what}.\n"
        "Restore the folder from a copy of the run."
    )
