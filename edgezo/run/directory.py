"""The run directory: the names of its files, its snapshot, and the checks before a run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgezo.data.batches import Example
from edgezo.data.dataset import Dataset
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_path
from edgezo.machine.open_files import (
    check_folder,
    check_inside,
    check_replaced,
)
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import FREE_ON_RESUME, flag
from edgezo.plan.request import read_run_config
from edgezo.run.journal import Journal, open_journal
from edgezo.run.journal_header import check_base
from edgezo.run.places import found_again
from edgezo.weights.overlay_names import OVERLAY_NAMES

PROBE_KEYS = {
    "used",
    "rows",
    "fit_s",
    "loss",
    "accuracy",
    "label_words_loss",
}  # metadata of the linear probe's file
# Copies of what a run goes on from (parent.py).
PARENT_NAMES = re.compile(r"journal-([1-9]\d{0,5})\.bin|head\.safetensors|probe\.safetensors")


@dataclass(frozen=True)
class RunFiles:
    """The paths of the files in a run directory."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def journal(self) -> Path:
        return self.path / "journal.bin"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def predictions(self) -> Path:
        """What the run answered to its validation rows before and after training."""
        return self.path / "predictions.json"

    @property
    def asked(self) -> Path:
        """What base and run answered to ``edgezo report --ask``."""
        return self.path / "asked.json"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def skipped(self) -> Path:
        """Rows that were left out, since they cannot be used; absent where there are none."""
        return self.path / "skipped.jsonl"

    @property
    def profile(self) -> Path:
        return self.path / "profile.json"

    @property
    def snapshot(self) -> Path:
        return self.path / "head.safetensors"

    @property
    def probe(self) -> Path:
        """The linear probe; absent until it is fitted."""
        return self.path / "probe.safetensors"

    @property
    def states(self) -> Path:
        """The hidden states that the linear probe is fitted to; removed once it is fitted."""
        return self.path / "probe.states"

    @property
    def kept(self) -> Path:
        """Of a run of a given time with frozen blocks: how many training rows have passed these."""
        return self.path / "states.safetensors"

    @property
    def overlay(self) -> Path:
        """Weights on disk of a model that does not fit. Can be deleted whenever no run is going."""
        return self.path / "overlay"

    @property
    def trained(self) -> Path:
        """Every trained tensor, as ``replay`` writes them."""
        return self.path / "trained.safetensors"

    @property
    def board(self) -> Path:
        """Event files of TensorBoard, with --log-to."""
        return self.path / "tensorboard"

    @property
    def parent(self) -> RunFiles:
        """Copies of what the run goes on from: journals, snapshot and linear probe of its parent (parent.py)."""
        return RunFiles(self.path / "parent")

    @property
    def exported(self) -> Path:
        """In a directory that ``export`` wrote: the run that it is of."""
        return self.path / "edgezo.json"

    def read_config(self) -> RunConfig:
        """The settings of the run, with the places where its files are now. Raises EdgezoError without such a file."""
        if not os.path.lexists(self.config):
            raise EdgezoError(
                f"{self.path} is no run: it has no config.toml.\n"
                "Give the --out directory of an edgezo finetune, or one that edgezo replay wrote."
            )
        return found_again(read_run_config(self.config), self.path)


def free_directory(model: str, data: str) -> Path:
    """runs/MODEL-DATA, numbered where that name is taken; ``data`` is a task, or where the rows are."""
    base = Path("runs") / f"{Path(model).name.removesuffix('.gguf')}-{Path(data).stem}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def refuse_links(run: RunFiles) -> None:
    """Raise EdgezoError, and change nothing, where a file that is written in place is a link, or not a file at all.

    A link to a file that is replaced stays until then; a folder in its place is refused.
    """
    if run.path.is_file():
        raise EdgezoError(
            f"{run.path} is a file, and a run needs a directory. Nothing was changed. Give another --out."
        )
    for path in (
        run.config,
        run.plan,
        run.summary,
        run.predictions,
        run.asked,
        run.report,
        run.skipped,
        run.profile,
        run.snapshot,
        run.probe,
        run.kept,
        run.trained,
    ):
        check_replaced(path)
    for path in (run.journal, run.metrics, run.states):
        check_inside(path)
    check_folder(run.board)
    for name in _names_in(run.overlay):
        if OVERLAY_NAMES.fullmatch(name):
            check_inside(run.overlay / name, levels=2)


def _names_in(folder: Path) -> list[str]:
    """The names in a folder of a run; none where it is not there. Raises EdgezoError where it is a link or a file."""
    check_folder(folder)
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def save_skipped(run: RunFiles, dataset: Dataset) -> None:
    """Write down the rows that were left out, if there are any."""
    if dataset.skipped is not None and dataset.skipped.count:
        with atomic_path(run.skipped) as temporary, temporary.open("xb") as file:
            file.writelines(dataset.skipped.lines())


def run_id(header: Mapping[str, Any]) -> str:
    """The identity of a run, which files of edgezo's name: SHA-256 (hex) of the header of its journal.

    The header stands in the journal of a resume, of an evaluation, and of what a replay wrote.
    """
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def lost_head(run: RunFiles, cfg: RunConfig, steps: int) -> EdgezoError:
    """The error for a run of ``steps`` steps whose snapshot was removed, or not written yet."""
    again = (
        f"Compute it again with: edgezo finetune --resume --out {run.path}"
        if cfg.steps is not None
        else "Restore it from a copy: a run of a given time cannot be computed again to the same end."
    )
    return EdgezoError(
        f"{run.path} has {steps} steps in its journal, but {run.snapshot.name}, the head after them, is not there: "
        f"it is written every {cfg.snapshot_every} steps and at the end, or was removed.\n{again}"
    )


def data_hash(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of the tokens, targets and labels that training sees."""
    digest = hashlib.sha256()
    for example in examples:
        rows = [[list(r.ids), list(r.score_at), list(r.score_ids)] for r in example.whole_rows]
        digest.update(json.dumps([rows, example.label]).encode())
        if example.fields is not None:  # what its predictions are scored by
            digest.update(json.dumps(example.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """The facts by which other data is recognised as data of the same task."""
    return {
        "kind": dataset.kind,
        "label_ids": list(dataset.label_ids),
        "label_names": list(dataset.label_names),
    }


# Settings that a replay does not need: the journal's header leaves them out.
NOT_IN_HEADER = (
    *("out", "max_mem_bytes", "device", "threads", "profile", "finetuner", "began_in"),
    *("when", "max_temp", "max_cpu", "log_to", "engine", "provider"),
)


def run_header(
    content_hash: str, dataset: Dataset, cfg: RunConfig, finetuner: str | None = None
) -> dict[str, Any]:
    """What the journal remembers of a run: enough to replay it, and to refuse another base, other rows or settings.

    ``content_hash`` is the base's, ``finetuner`` the digest of the file that scales directions. Engines are not in it:
    a journal means the same on each.
    """
    return {
        **({} if finetuner is None else {"finetuner_hash": finetuner}),
        "content_hash": content_hash,
        "data_hash": data_hash(dataset.train),
        "dataset": dataset_facts(dataset),
        "config": {k: v for k, v in cfg.without_absent().items() if k not in NOT_IN_HEADER},
    }


def words_of_run(run: RunFiles) -> tuple[str, ...]:
    """The label words of the rows that a run is trained on; () before its first step.

    Raises EdgezoError for a journal that cannot be read.
    """
    if not run.journal.exists():
        return ()
    with open_journal(run.journal, resume=False) as journal:
        return tuple(journal.header["dataset"]["label_names"])


def same_task(facts: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether a data set has the labels of the one that ``facts`` were taken of."""
    if facts["kind"] != dataset.kind or tuple(facts["label_ids"]) != dataset.label_ids:
        return False
    # Label words of several tokens have no ids.
    return dataset.kind != "choice" or tuple(facts["label_names"]) == dataset.label_names


def reopen(run: RunFiles, given: Mapping[str, Any]) -> Journal:
    """Open the journal of a run to go on with. ``given`` is the header of the request: base, rows and settings.

    The journal is locked and only read: ``restore.begin_writing`` cuts its end, once nothing can refuse the resume.
    Raises BaseMismatch for another base, EdgezoError for other rows, UsageError for other settings.
    """
    journal = open_journal(run.journal, resume=True)
    try:
        _check_as_begun(run, journal, given)
    except BaseException:
        journal.close()
        raise
    return journal


def _check_as_begun(run: RunFiles, journal: Journal, given: Mapping[str, Any]) -> None:
    """Raise unless base, rows, finetuner and settings are those that the run began with."""
    began = journal.header
    check_base(began, given["content_hash"])
    if began["data_hash"] != given["data_hash"]:
        raise EdgezoError(
            f"{run.path} was trained on other rows than the ones that the data gives now.\n"
            "Restore the data files (--data names them where they have moved), the tokenizer and its chat template, or "
            "start a new run with another --out."
        )
    if began["dataset"] != given["dataset"]:
        first, now = (
            f"{facts['kind']}, {', '.join(facts['label_names']) or 'no label words'}, tokens {facts['label_ids']}"
            for facts in (began["dataset"], given["dataset"])
        )
        raise EdgezoError(
            f"{run.path} began with rows of another task than the data gives now: first {first}; now {now}.\n"
            "Restore the data files and the tokenizer, or start a new run with another --out."
        )
    if began.get("finetuner_hash") != given.get("finetuner_hash"):
        raise EdgezoError(
            f"{run.path} was trained with another finetuner than the one that --finetuner gives now.\n"
            "Restore the file, or start a new run with another --out."
        )
    asked = journal.settings.to_dict()
    changed = [
        f"{flag(name)} was {asked[name]} when the run began, not {value}; "
        "a resumed run goes on as it began"
        for name, value in given["config"].items()
        if name not in FREE_ON_RESUME and asked[name] != value
    ]
    if changed:
        raise UsageError(changed)
