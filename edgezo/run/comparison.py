"""``edgezo compare``: what several runs have reached, what that took, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgezo.run.overview import FINISHED, Overview


def comparison(runs: Sequence[Overview]) -> dict[str, Any]:
    """``runs``: the figures of each; ``differ``: each setting that is not the same in all, with the value of each run.

    Raises EdgezoError where the metrics of an unfinished run are damaged.
    """
    settings = [run.settings() for run in runs]
    names = dict.fromkeys(name for values in settings for name in values)
    differ = {
        name: [values.get(name) for values in settings]
        for name in names
        if any(values.get(name) != settings[0].get(name) for values in settings)
    }
    return {"runs": [figures_of_run(run) for run in runs], "differ": differ}


def figures_of_run(run: Overview) -> dict[str, Any]:
    """A line of a comparison: None stands for what is not known, as most figures of an unfinished run."""
    summary, cfg = run.summary, run.cfg
    before, after = (_table(summary.get(name)) for name in ("eval_before", "eval_after"))
    loss = _number(summary.get("loss_last"))
    if run.state != FINISHED and run.of_run:
        losses = [line["loss"] for line in run.lines() if line.get("step_size") is not None]
        loss = _number(losses[-1]) if losses else None
    cap = _number(summary.get("max_mem_bytes"))
    peak = _number(summary.get("cuda_peak_bytes")) or _number(summary.get("peak_rss_bytes"))
    return {
        "run": str(run.files.path),
        "state": run.state,
        "model": cfg.model if cfg is not None else None,
        "method": run.method,
        "rows": _number(after.get("n")),
        "metric": str(after["metric"]) if "metric" in after else None,
        "before": _number(before.get("value")),
        "before_standard_error": _number(before.get("standard_error")),
        "after": _number(after.get("value")),
        "after_standard_error": _number(after.get("standard_error")),
        "loss": loss,
        "steps": run.steps,
        "step_s": _number(summary.get("step_s")),
        "peak_bytes": peak,
        "max_mem_bytes": cap if cap is not None or cfg is None else cfg.max_mem_bytes,
    }


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> Any:
    """A number as it is; None for anything else that stands in a foreign file."""
    return value if type(value) in (int, float) else None
