"""summary.json of a run that has ended, and how far one is that has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.foreign import read_json
from edgezo.plan.config import RunConfig
from edgezo.run.directory import RunFiles
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal_record import StepRecord
from edgezo.run.metrics_log import mean_loss
from edgezo.run.run_parts import RunParts

_AXES = ("directions", "mask", "credit", "rule")


def saved_summary(run: RunFiles) -> dict[str, Any]:
    """summary.json of a run that has ended; {} where there is none that can be read."""
    try:
        summary = read_json(run.summary)
    except EdgezoError:
        return {}
    return summary if isinstance(summary, dict) else {}


def run_figures(
    state: RunParts[Any, Any],
    steps: int,
    train_s: float,
    evaluations: tuple[dict[str, Any] | None, dict[str, Any]],
    readout: FittedProbe | None,
    losses_of: Callable[[StepRecord], np.ndarray] = lambda record: record.losses,
) -> dict[str, Any]:
    """What summary.json holds of a run on any engine, but for its memory and what it has trained.

    ``evaluations`` are those before and after; ``losses_of`` the losses of a record that are of the trained weights.
    """
    cfg, (before, after) = state.cfg, evaluations
    unused = "head" if state.model.readout else "probe"
    of_engine = {} if cfg.engine == "torch" else {"engine": cfg.engine, "provider": cfg.provider}

    def loss_of(step: int) -> float | None:
        return mean_loss(losses_of(state.journal.record(step))) if steps else None

    return {
        "model": cfg.model,
        "device": cfg.device,
        **of_engine,
        "estimator": cfg.estimator,
        # A backward pass has no use for them.
        **{axis: None if cfg.parts.adapters else getattr(cfg, axis) for axis in _AXES},
        "objective": cfg.objective,
        "trained": "+".join(part for part in cfg.train if part != unused),
        "precision": cfg.precision,
        "steps": steps,
        "batch_size": cfg.batch_size,
        "micro_batch": cfg.micro_batch,
        "loss_first": loss_of(0),
        "loss_last": loss_of(steps - 1),
        "eval_before": before,
        "eval_after": after,
        "train_s": train_s,
        **state.meter.summary(),
        "residency": state.plan.residency,
        **state.log.figures(),
        **({} if readout is None else {"probe": readout.to_dict()}),
    }


def how_far(run: RunFiles, cfg: RunConfig, steps: int) -> str:
    """How far a run is that has not ended: "step 37 of 200"; "" of one that has. ``steps``: those that are used."""
    if run.summary.exists() or run.trained.exists():
        return ""
    return f"step {steps:,}" + (f" of {cfg.steps:,}" if cfg.steps is not None else "")


def unfinished(run: RunFiles, cfg: RunConfig, steps: int) -> list[str]:
    """A sentence where a run has not ended, and is used as it stands after ``steps`` steps; else none."""
    if not (far := how_far(run, cfg, steps)):
        return []
    return [
        f"{run.path} is unfinished: {far}. It is used as it stands "
        f"(edgezo finetune --resume --out {run.path} goes on)"
    ]


def finish_replay(
    run: RunFiles, made: RunFiles, cfg: RunConfig, steps: int, digest: str
) -> dict[str, Any]:
    """Give a replay, whose trained tensors are written, the run's other files; what replay.json then says of it.

    The configuration last: with it the directory counts as a run, and is a whole one.
    """
    kept = [(run.journal, made.journal), (run.config, made.config)]
    if run.probe.exists():
        kept.insert(0, (run.probe, made.probe))
    for original, copy in kept:
        atomic_write(copy, original.read_bytes())
    result = {
        "run": str(run.path),
        "out": str(made.path),
        "steps": steps,
        "trained_sha256": digest,
    }
    if far := how_far(run, cfg, steps):
        result["unfinished"] = far
    atomic_write(made.path / "replay.json", (to_json(result) + "\n").encode())
    return result
