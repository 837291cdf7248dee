"""The run directory: the names of its files, its snapshot, its weights on disk, and the checks before a run goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from edgezo.data.batches import Example
from edgezo.data.dataset import Dataset
from edgezo.errors import DoesNotFit, EdgezoError, UsageError
from edgezo.machine.downloads import cache_dir
from edgezo.machine.files import atomic_path, is_leftover, locked
from edgezo.machine.hardware import format_bytes
from edgezo.machine.limits import tiles
from edgezo.machine.ownership import claim
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import FREE_ON_RESUME, flag
from edgezo.plan.request import completed, from_toml
from edgezo.run.journal import Journal, check_base, open_journal
from edgezo.run.progress import RunProgress
from edgezo.weights.saved import Saved, snapshot_tensors, write_saved

if TYPE_CHECKING:
    from torch import Tensor

    from edgezo.weights.disk import DiskMedium


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
    def overlay(self) -> Path:
        """Weights on disk of a model that does not fit. Can be deleted whenever no run is going."""
        return self.path / "overlay"

    @property
    def trained(self) -> Path:
        """Every trained tensor, as ``replay`` writes them."""
        return self.path / "trained.safetensors"

    @property
    def exported(self) -> Path:
        """In a directory that ``export`` wrote: the run that it is of."""
        return self.path / "edgezo.json"

    def read_config(self) -> RunConfig:
        try:
            return from_toml(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError as problem:
            raise EdgezoError(
                f"{self.path} is no run: it has no config.toml.\n"
                "Give the --out directory of an edgezo finetune, or one that edgezo replay wrote."
            ) from problem


def free_directory(cfg: RunConfig) -> Path:
    """runs/MODEL-DATA, numbered where that name is taken."""
    model = Path(cfg.model).name.removesuffix(".gguf")
    data = cfg.task or Path(cfg.data or "data").stem
    base = Path("runs") / f"{model}-{data}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


@dataclass(frozen=True)
class Overlay:
    """Where offloaded weights live, and the run that they must belong to."""

    directory: Path
    run: Mapping[str, Any]
    way_out: str = "give an --out on another disk, or more --max-mem"

    @staticmethod
    def of(run: RunFiles, header: Mapping[str, Any]) -> Overlay:
        """The overlay of a run. Settings that a resume may change do not make its files foreign."""
        config = {k: v for k, v in header["config"].items() if k not in FREE_ON_RESUME}
        return Overlay(run.overlay, {**header, "config": config})

    def medium(self, resident_blocks: int) -> DiskMedium:
        from edgezo.weights.disk import DiskMedium

        identity = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()
        return DiskMedium(self.directory, identity, resident_blocks)

    def check_room(self, needed_bytes: int) -> None:
        """Raise DoesNotFit unless the disk has room for what is not there yet."""
        there_bytes = sum(f.stat().st_size for f in self.directory.glob("*.overlay"))
        existing = next(p for p in (self.directory, *self.directory.parents) if p.exists())
        free_bytes = shutil.disk_usage(existing).free
        if needed_bytes - there_bytes > free_bytes:
            raise DoesNotFit(
                f"the weights on disk take {format_bytes(needed_bytes)} in {self.directory}, "
                f"but only {format_bytes(free_bytes + there_bytes)} are free there.\n"
                f"Free some space, {self.way_out}."
            )

    def remove(self) -> None:
        """Delete it: base and journal are enough to make it again."""
        for file in self.directory.glob("*.overlay"):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or not ours alone
            self.directory.rmdir()


@contextlib.contextmanager
def temporary_overlay() -> Iterator[Overlay]:
    """A place in the cache for weights on disk, for as long as a model is evaluated or replayed."""
    folder = cache_dir() / "overlay"
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob("*/lock"):  # by processes that were killed
        with open(abandoned, "wb") as lock:
            if locked(lock):
                shutil.rmtree(abandoned.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as name, open(Path(name, "lock"), "wb") as lock:
        locked(lock)
        yield Overlay(Path(name), {}, "or set EDGEZO_CACHE to a folder on another disk")


def save_snapshot(run: RunFiles, model: Model, step: int) -> None:
    """Write, as a whole or not at all, the state after ``step`` steps that no seed can rebuild.

    That is the exact head, and weights whose directions come from what layers read.
    """
    if not model.needs_snapshots:
        return
    tensors: dict[str, Tensor] = {}
    for part in model.learned.values():
        tensors |= part.tensors()
    if model.guided:
        tensors = {**tensors, **snapshot_tensors(model.store)}
    saved = [Saved.of(name, tensor.contiguous()) for name, tensor in tensors.items()]
    with atomic_path(run.snapshot) as temporary:
        write_saved(temporary, saved, {"step": str(step)})


def lost_head(run: RunFiles, cfg: RunConfig, steps: int) -> EdgezoError:
    """The error for a run of ``steps`` steps whose snapshot was removed, or not written yet."""
    again = (
        f"Compute it again with: edgezo finetune --resume --out {run.path}"
        if cfg.steps is not None
        else "Restore it from a copy: a run of a given time cannot be computed again to the same end."
    )
    return EdgezoError(
        f"{run.path} has {steps} steps in its journal, but {run.snapshot.name}, the head after them, "
        f"is not there.\n{again}"
    )


def load_snapshot(run: RunFiles, model: Model) -> int:
    """Read the snapshot into ``model``; the number of steps that it stands after (0 where there is none)."""
    if not model.needs_snapshots or not run.snapshot.exists():
        return 0
    try:
        with safe_open(run.snapshot, "pt") as file:
            step = int(file.metadata()["step"])
            for part in model.learned.values():
                part.load({name: file.get_tensor(name) for name in part.tensors()})
            for name, held in (snapshot_tensors(model.store) if model.guided else {}).items():
                _read_into(held, file.get_slice(name))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as problem:
        raise EdgezoError(
            f"{run.snapshot} is damaged ({problem}).\n"
            "It holds weights that the run has trained; restore it from a copy, or start again."
        ) from problem
    return step


def _read_into(tensor: Tensor, stored: Any) -> None:
    """Copy a slice of a file into a tensor, a tile at a time. Raises ValueError for another shape."""
    if tuple(stored.get_shape()) != tuple(tensor.shape):
        raise ValueError(f"{stored.get_shape()} where {list(tensor.shape)} belong")
    for rows in tiles(len(tensor), tensor[0].numel()):
        tensor[rows].copy_(stored[rows])


def data_hash(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of the tokens, targets and labels that training sees."""
    digest = hashlib.sha256()
    for example in examples:
        rows = [[list(r.ids), list(r.score_at), list(r.score_ids)] for r in example.rows]
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


RUN, REPLAY = "run", "replay"  # kinds of directories (machine/ownership.py)


def prepare(run: RunFiles) -> None:
    """Make the directory of a new run. Raises UsageError, and changes nothing, where a run or other files are."""
    if os.path.lexists(run.journal):
        raise UsageError(
            f"{run.path} already holds a run. Go on with it (--resume --out {run.path}), "
            "or give another --out."
        )
    claim(run.path, RUN, _began_here)


def prepare_replay(run: RunFiles) -> None:
    """Make the directory of a replay. Raises UsageError, and changes nothing, where a run or other files are."""
    if run.journal.exists() and not run.trained.exists():
        raise UsageError(
            f"{run.path} holds a run, which a replay would overwrite. Give another --out."
        )
    claim(run.path, REPLAY, _replayed_here)


def _began_here(folder: Path) -> bool:
    """Whether a run began in a directory without a marker: a version before there were markers was killed there."""
    run = RunFiles(folder)
    ours = {run.config.name, run.plan.name}
    try:
        text = run.config.read_text(encoding="utf-8")
        only_ours = all(n in ours or is_leftover(n) for n in os.listdir(folder))
        return only_ours and from_toml(text).to_toml() == text
    except (OSError, ValueError, EdgezoError):
        return False


def _replayed_here(folder: Path) -> bool:
    """Whether a directory without a marker is what a replay wrote."""
    run = RunFiles(folder)
    try:
        open_journal(run.journal, resume=False).close()
    except EdgezoError:
        return False
    return run.trained.exists()


def reopen(run: RunFiles, given: Mapping[str, Any], progress: RunProgress) -> Journal:
    """Open the journal of a run to go on with. ``given`` is the header of the request: base, rows and settings.

    Raises BaseMismatch for another base, EdgezoError for other rows, UsageError for other settings.
    """
    journal = open_journal(run.journal, resume=True)
    try:
        began = journal.header
        check_base(began, given["content_hash"])
        if began.get("data_hash") != given["data_hash"]:
            raise EdgezoError(
                f"{run.path} was trained on other rows than the ones that the data gives now.\n"
                "Restore the data files, or start a new run with another --out."
            )
        if began.get("dataset", given["dataset"]) != given["dataset"]:
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
        asked = completed(began["config"])
        changed = [
            f"{flag(name)} was {asked.get(name)} when the run began, not {value}; "
            "a resumed run goes on as it began"
            for name, value in given["config"].items()
            if name not in FREE_ON_RESUME and asked.get(name) != value
        ]
        if changed:
            raise UsageError(changed)
    except BaseException:
        journal.close()
        raise
    if journal.note:
        progress.note(journal.note)
    return journal
