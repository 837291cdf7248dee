"""What a run keeps on disk beside its journal: state that no seed can rebuild, and weights that have no room."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgezo.errors import DoesNotFit
from edgezo.machine.downloads import cache_dir
from edgezo.machine.files import atomic_path, write_error
from edgezo.machine.hardware import format_bytes
from edgezo.machine.open_files import files_inside, remove_files, temporary_folder
from edgezo.network.model import Model
from edgezo.plan.fields import FREE_ON_RESUME
from edgezo.run.directory import RunFiles, run_id
from edgezo.weights.disk import DiskMedium
from edgezo.weights.from_base import BaseMedium
from edgezo.weights.overlay_names import OVERLAY_NAMES
from edgezo.weights.saved import Saved, snapshot_tensors, write_saved
from edgezo.weights.verified import open_saved

if TYPE_CHECKING:
    from torch import Tensor

    from edgezo.weights.home import Medium


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
        identity = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()
        return DiskMedium(self.directory, identity, resident_blocks)

    def check_room(self, needed_bytes: int) -> None:
        """Raise DoesNotFit unless the disk has room for what is not there yet."""
        there_bytes = 0
        with contextlib.suppress(OSError):  # whoever writes there says so
            there_bytes = sum(files_inside(self.directory, OVERLAY_NAMES).values())
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
        remove_files(self.directory, OVERLAY_NAMES)


class Elsewhere(Protocol):
    """Where blocks are for which a plan has no room."""

    def medium(self, resident_blocks: int) -> Medium: ...

    def check_room(self, needed_bytes: int) -> None:
        """Raise DoesNotFit unless there is room for so many bytes."""
        ...


class InBase:
    """Frozen blocks that are read from the base's own files, and take no room."""

    def medium(self, resident_blocks: int) -> BaseMedium:
        return BaseMedium(resident_blocks)

    def check_room(self, needed_bytes: int) -> None:
        """Nothing is written."""


@contextlib.contextmanager
def temporary_overlay() -> Iterator[Overlay]:
    """A place in the cache for weights on disk, for as long as a model is evaluated or replayed."""
    cache = cache_dir() / "overlay"
    with contextlib.ExitStack() as at_end:
        try:
            folder = at_end.enter_context(temporary_folder(cache, OVERLAY_NAMES))
        except OSError as problem:
            raise write_error(cache, "a folder for weights on disk", problem) from problem
        yield Overlay(folder, {}, "or set EDGEZO_CACHE to a folder on another disk")


def save_snapshot(run: RunFiles, model: Model, step: int, header: Mapping[str, Any]) -> None:
    """Write, as a whole or not at all, the state after ``step`` steps that no seed can rebuild.

    That is the exact head, and weights whose directions come from what layers read. ``header`` is the journal's.
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
        write_saved(temporary, saved, {"step": str(step)}, run=run_id(header))


def load_snapshot(run: RunFiles, model: Model, header: Mapping[str, Any]) -> int:
    """Read the snapshot into ``model``; the number of steps that it stands after (0 where there is none).

    ``header`` is the journal's. Raises EdgezoError for a file that is damaged, or of another run.
    """
    if not model.needs_snapshots or not run.snapshot.exists():
        return 0
    way_out = "It holds weights that the run has trained: restore it from a copy, or start again."
    with open_saved(run.snapshot, {"step"}, run_id(header), way_out) as file:
        step = int(file.metadata["step"])
        if step < 0:
            raise ValueError(f"it is of step {step}")
        parts = [(part, part.tensors()) for part in model.learned.values()]
        into = snapshot_tensors(model.store) if model.guided else {}
        for _, tensors in parts:
            into |= tensors
        file.read(into)
        for part, tensors in parts:
            part.load(tensors)
    return step
