"""summary.json of a run that has ended, and how far one is that has not."""

from __future__ import annotations

from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.foreign import read_json
from edgezo.plan.config import RunConfig
from edgezo.run.directory import RunFiles


def saved_summary(run: RunFiles) -> dict[str, Any]:
    """summary.json of a run that has ended; {} where there is none that can be read."""
    try:
        summary = read_json(run.summary)
    except EdgezoError:
        return {}
    return summary if isinstance(summary, dict) else {}


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
