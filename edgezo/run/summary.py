"""summary.json: the figures of a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from edgezo.machine.process_memory import peak_rss_bytes
from edgezo.machine.profiler import running
from edgezo.run.directory import RunFiles
from edgezo.run.journal_record import StepRecord
from edgezo.run.metrics_log import mean_loss
from edgezo.run.readout_pass import ReadoutResult
from edgezo.run.state import RunState
from edgezo.weights.saved import saved_sha256

AXES_OF_FORWARD_ONLY = (
    "directions",
    "mask",
    "credit",
    "rule",
)  # a backward pass has no use for them


def saved_summary(run: RunFiles) -> dict[str, Any]:
    """summary.json of a run that has ended; {} where there is none that can be read."""
    try:
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def losses_of_step(record: StepRecord, sides: int) -> StepRecord:
    """The record without losses at an anchor, which are not losses of the weights being trained."""
    return replace(record, losses=record.losses[: max(2, sides)])


def peaks(state: RunState) -> dict[str, int | None]:
    """The four figures that a run's memory is judged by: planned, measured, inference, cap."""
    memory = state.memory
    peak_bytes, inference_bytes = peak_rss_bytes(), state.inference_peak_bytes
    if inference_bytes is not None and memory.unit == "rss":
        # The kernel counts pages in batches, so that a peak may read lower later on than it did.
        inference_bytes = min(inference_bytes, peak_bytes)
    return {
        "planned_peak_bytes": state.plan.planned_peak_bytes,
        "peak_rss_bytes": peak_bytes,
        f"inference_peak_{memory.unit}_bytes": inference_bytes,
        "max_mem_bytes": state.plan.max_mem_bytes,
        **memory.figures(),
    }


def summarise(
    state: RunState,
    sides: int,
    steps: int,
    train_s: float,
    before: dict[str, Any] | None,
    after: dict[str, Any],
    readout: ReadoutResult | None,
) -> dict[str, Any]:
    """What summary.json holds. ``before`` and ``after`` are evaluations; ``sides`` the forward passes of a step."""
    cfg, model, journal = state.cfg, state.model, state.journal
    unused = "head" if model.readout else "probe"
    first_order = cfg.parts.adapters

    def loss_of(step: int) -> float | None:
        return mean_loss(losses_of_step(journal.record(step), sides).losses) if steps else None

    summary = {
        "model": cfg.model,
        "device": cfg.device,
        "estimator": cfg.estimator,
        **{axis: None if first_order else getattr(cfg, axis) for axis in AXES_OF_FORWARD_ONLY},
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
        **peaks(state),
        "trained_sha256": saved_sha256(model.saved()),
        "run": str(state.files.path),
    }
    if (profiler := running()) is not None:
        summary["phases"] = profiler.phases()
    return summary
