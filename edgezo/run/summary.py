"""summary.json: the figures of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.process_memory import peak_rss_bytes
from edgezo.machine.profiler import running
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.run.directory import RunFiles
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal_record import StepRecord
from edgezo.run.state import RunState
from edgezo.run.summary_file import run_figures, saved_summary
from edgezo.weights.saved import saved_sha256


def check_same_end(run: RunFiles, cfg: RunConfig, model: Model, trained_sha256: str) -> None:
    """Raise EdgezoError unless a finished run's files give the weights that it ended with, by its summary.

    ``trained_sha256`` is that of ``model``, which was rebuilt from the files.
    """
    ended = str(saved_summary(run).get("trained_sha256"))
    if ended == trained_sha256:
        return
    files = [run.journal, *([run.snapshot] if model.needs_snapshots else [])]
    files += [run.probe] if cfg.parts.readout else []
    names = ", ".join(file.name for file in (*files, run.config))
    elsewhere = (
        " Or it was made on another kind of CPU: its method divides by square roots, which are not rounded alike "
        "everywhere. Then go on there."
        if takes_roots(cfg)
        else ""
    )
    raise EdgezoError(
        f"{run.path} has ended, but its files give other weights than it ended with: trained_sha256 is "
        f"{trained_sha256[:12]}..., and {run.summary.name} has {ended[:12]}... One of them was changed.\n"
        f"Restore {names} and {run.summary.name} from one copy.{elsewhere}"
    )


def save_profile(run: RunFiles, note: Callable[[str], None]) -> None:
    """profile.json of this process, however the run ends. A measurement that cannot be written fails no run."""
    profiler = running()
    if profiler is None:
        return
    report = profiler.report()
    if "forward" not in report["phases"] and run.summary.exists():
        return  # the run was over before: its own measurement stays
    try:
        atomic_write(run.profile, (to_json(report) + "\n").encode())
    except EdgezoError as problem:
        note(f"no profile of this run: {problem}")


def takes_roots(cfg: RunConfig) -> bool:
    """Whether updates divide by square roots, which torch leaves to a library that rounds them as the CPU has it."""
    return cfg.rule in ("adam", "centred") or cfg.mask in ("hessian", "hessian-block")


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
    cap_bytes, earlier_bytes = state.plan.max_mem_bytes, state.opened.peak_before_bytes
    return {
        "planned_peak_bytes": state.plan.planned_peak_bytes,
        "peak_rss_bytes": peak_bytes,
        f"inference_peak_{memory.unit}_bytes": inference_bytes,
        "max_mem_bytes": cap_bytes,
        # Of a program that called edgezo: it may have held more before than it asks for now.
        **({"earlier_peak_bytes": earlier_bytes} if earlier_bytes > cap_bytes else {}),
        **memory.figures(),
    }


def summarise(
    state: RunState,
    sides: int,
    steps: int,
    train_s: float,
    before: dict[str, Any] | None,
    after: dict[str, Any],
    readout: FittedProbe | None,
) -> dict[str, Any]:
    """What summary.json holds. ``before`` and ``after`` are evaluations; ``sides`` the forward passes of a step."""
    cfg = state.cfg
    evaluations = (before, after)
    summary = {
        **run_figures(
            *(state, steps, train_s, evaluations, readout),
            losses_of=lambda record: losses_of_step(record, sides).losses,
        ),
        **_of_parent(cfg),
        **peaks(state),
        "trained_sha256": saved_sha256(state.model.saved()),
        "run": str(state.files.path),
        **({} if state.ranks is None else {"processes": state.ranks.figures()}),
    }
    if (profiler := running()) is not None:
        summary["phases"] = profiler.phases()
    return summary


def _of_parent(cfg: RunConfig) -> dict[str, Any]:
    """Of a run that goes on from another one, what that was; nothing of others."""
    if cfg.parent is None:
        return {}
    named = {"run_id": cfg.parent, "steps": cfg.parent_steps, "trained_sha256": cfg.parent_sha256}
    return {"parent": named}
