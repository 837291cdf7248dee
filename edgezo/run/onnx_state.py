"""What the parts of one run on the ONNX engine share, and how its state is saved and brought back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgezo.data.batches import Example
from edgezo.data.packed import PackedExamples
from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_path, remove_leftovers
from edgezo.machine.limits import GUARD_MARGIN_BYTES
from edgezo.machine.process_memory import Guard
from edgezo.network.onnx_engine import OnnxModel
from edgezo.network.plain_readout import PlainReadout, PlainReadoutWeights
from edgezo.plan.config import RunConfig
from edgezo.run.directory import PROBE_KEYS, RunFiles, lost_head, run_id
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal import Journal
from edgezo.run.onnx_session import OnnxOpened
from edgezo.run.progress import RunProgress
from edgezo.run.record_recipe import check_settings, recipe_of
from edgezo.run.run_parts import RunParts
from edgezo.weights.plain_factors import tensors_sha256
from edgezo.weights.plain_saved import read_arrays, write_arrays
from edgezo.zo.recipe import Recipe


@dataclass
class OnnxRunState(RunParts[OnnxOpened, OnnxModel]):
    """One run while it goes on."""

    def __post_init__(self) -> None:
        self.guard = Guard(
            self.plan.max_mem_bytes,
            GUARD_MARGIN_BYTES,
            planned_bytes=self.plan.planned_peak_bytes,
        )

    @property
    def examples(self) -> Sequence[Example]:
        """The training examples, as they have to pass."""
        return as_read(self.model, self.dataset.train)


def as_read(model: OnnxModel, examples: Sequence[Example]) -> Sequence[Example]:
    """Examples as they have to pass: a linear probe reads prompts, and no label word behind them."""
    return examples if model.readout is None else PackedExamples.of(examples).prompts()


def trained_arrays(model: OnnxModel) -> dict[str, np.ndarray]:
    """Every trained tensor, named as the torch engine names it."""
    tensors = model.factors.tensors()
    if model.scorer.exact is not None:
        tensors["head.delta"] = model.scorer.exact.delta
    if model.readout is not None:
        tensors |= model.readout.weights.tensors()
    return tensors


def trained_sha256(model: OnnxModel) -> str:
    """SHA-256 (hex) over everything that is trained: the torch engine's for the same bits."""
    return tensors_sha256(trained_arrays(model))


# ---------------------------------------------------------------------------------------------
# Snapshots and the linear probe


def save_head(run: RunFiles, model: OnnxModel, step: int, header: Mapping[str, Any]) -> None:
    """Write the exact head after ``step`` steps, as a whole or not at all; nothing without one."""
    if model.scorer.exact is None:
        return
    with atomic_path(run.snapshot) as temporary:
        tensors = model.scorer.exact.tensors()
        write_arrays(temporary, tensors, {"step": str(step)}, run_id(header))


def load_head(run: RunFiles, model: OnnxModel, header: Mapping[str, Any]) -> int:
    """Read the exact head into ``model``; the steps that it stands after. Raises EdgezoError for another's file."""
    if model.scorer.exact is None or not run.snapshot.exists():
        return 0
    way_out = "It holds weights that the run has trained: restore it from a copy, or start again."
    metadata, tensors = read_arrays(run.snapshot, {"step"}, run_id(header), way_out)
    try:
        model.scorer.exact.load(tensors)
        return int(metadata["step"])
    except (KeyError, ValueError) as problem:
        raise EdgezoError(f"{run.snapshot} is of another model or task.\n{way_out}") from problem


def save_probe(
    run: RunFiles, weights: PlainReadoutWeights, result: FittedProbe, of_run: str
) -> None:
    """Write the linear probe as a whole or not at all."""
    metadata = {key: str(result.to_dict()[key]) for key in sorted(PROBE_KEYS)}
    with atomic_path(run.probe) as temporary:
        write_arrays(temporary, weights.tensors(), metadata, of_run)


def recall_probe(run: RunFiles, model: OnnxModel, of_run: str | None) -> FittedProbe | None:
    """Let ``model`` classify by the linear probe that the run has fitted; None where there is none yet."""
    if not run.probe.exists():
        return None
    way_out = "It is the linear probe that the run was trained with: restore it from a copy, or start again."
    metadata, tensors = read_arrays(run.probe, PROBE_KEYS, of_run, way_out)
    try:
        weights = PlainReadoutWeights.of(tensors, model.manifest.shape.hidden)
        figures: dict[str, Any] = {
            name: float(metadata[name]) for name in ("loss", "accuracy", "label_words_loss")
        }
        used = {"True": True, "False": False}[metadata["used"]]
        result = FittedProbe(used, int(metadata["rows"]), float(metadata["fit_s"]), figures)
    except (KeyError, ValueError) as problem:
        raise EdgezoError(f"{run.probe} is of another model or task.\n{way_out}") from problem
    figures["blocks"] = list(weights.blocks)
    if used:
        classify_by(model, weights)
    return result


def classify_by(model: OnnxModel, weights: PlainReadoutWeights) -> None:
    """Classify by a linear probe from now on: what no loss depends on any more is neither run nor trained."""
    last = max(weights.blocks)
    if last >= len(model.manifest.blocks):
        raise EdgezoError(
            f"the linear probe reads block {last}, but the model has {len(model.manifest.blocks)} blocks.\n"
            "The probe belongs to another model: restore the run's probe.safetensors from a copy."
        )
    model.scorer.exact = None
    model.readout = PlainReadout(weights)
    model.factors.keep_only(last)
    model.drop_above(last)


# ---------------------------------------------------------------------------------------------
# Where a run goes on


def bring_back(run: RunFiles, cfg: RunConfig, model: OnnxModel, journal: Journal) -> int:
    """Bring what is trained to where the journal stands, or to the last snapshot before; returns its steps.

    Files stay as they are. Raises EdgezoError where the snapshot or the probe is lost.
    """
    check_settings(cfg, journal)
    stop = journal.next_step
    if cfg.parts.readout:
        fitted = recall_probe(run, model, run_id(journal.header))
        if fitted is None and len(journal):
            raise EdgezoError(
                f"{run.path} has {stop} steps in its journal, but {run.probe.name}, the linear probe that they were "
                "computed with, is not there.\nRestore it from a copy, or start again with another --out."
            )
    if model.scorer.exact is not None:
        if cfg.steps is None and stop >= cfg.snapshot_every and not run.snapshot.exists():
            raise lost_head(run, cfg, stop)
        stop = load_head(run, model, journal.header)
        if stop > journal.next_step:
            raise EdgezoError(
                f"{run.snapshot} is of step {stop}, but {journal.path.name} ends after step {journal.next_step}: its "
                f"end was lost.\nRestore it from a copy, or remove {run.snapshot.name}."
            )
    model.factors.apply(recipes_of(cfg, journal, stop))
    return stop


def recipes_of(cfg: RunConfig, journal: Journal, stop: int) -> Iterator[Recipe]:
    """The updates of a journal's first ``stop`` steps. Raises EdgezoError for one that is not finite."""
    for record in journal.records(0):
        if record.step >= stop:
            return
        recipe = recipe_of(cfg, record)
        if not np.isfinite(recipe.coefficients).all() or not np.isfinite(recipe.decay):
            raise EdgezoError(
                f"{journal.path}: the update of step {record.step} is not finite. No run over this base wrote it: "
                "restore the file from a copy."
            )
        yield recipe


def begin_files(run: RunFiles, journal: Journal, steps: int, progress: RunProgress) -> None:
    """Make the directory that of a run at ``steps``: from here on a resume changes it."""
    journal.repair()
    if journal.note:
        progress.note(journal.note)
    journal.truncate_to(steps)
    remove_leftovers(run.path)
    _remove(run.trained)  # written by a replay, and outdated by the steps that follow
    if not steps:
        _remove(run.snapshot)
    if run.probe.exists():
        _remove(run.states)


def _remove(path: Path) -> None:
    if os.path.lexists(path):
        path.unlink()
