"""What all devices of a fleet have alike, and what each may have otherwise; nothing here needs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgezo import __version__
from edgezo.errors import UsageError
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.plan.fields import FREE_ON_RESUME


def check_divisible(cfg: RunConfig) -> None:
    """Raise UsageError for settings whose steps need more than losses, or rows that nobody has."""
    parts = cfg.parts
    learned = cfg.backward or parts.head or parts.readout
    problems = {
        "--train lowrank": learned and "a gradient or a linear probe needs rows",
        "--steps N": cfg.steps is None and "the time of a server is not that of devices",
        "--step N": cfg.step_auto and "--step auto measures with the rows at hand",
        "--mask none": cfg.finetuner is not None and "a finetuner's scales need a model",
        "--estimator grzo": cfg.carried > 0 and "a later step takes up what a server does not make",
        "--samples 1": cfg.samples != 1 and "a row is asked for once",
        "--objective loss": cfg.objective != LOSS and "scores are no losses",
        "no --from": cfg.parent is not None and "devices have no earlier run",
    }
    wrong = [f"{why}: give {way}" for way, why in problems.items() if why]
    if wrong:
        raise UsageError([f"a fleet cannot train so: {text}" for text in wrong])


def identity(header: Mapping[str, Any], free: Sequence[str] = FREE_ON_RESUME) -> dict[str, Any]:
    """What all devices of a fleet have alike, of a journal's header: version, base, task and settings; not the rows."""
    config = {name: value for name, value in header["config"].items() if name not in free}
    alike = {name: header[name] for name in ("content_hash", "dataset")}
    return {"version": __version__, **alike, "config": config}


def free_settings(cfg: RunConfig) -> tuple[str, ...]:
    """Settings that a device may have otherwise. Low-rank factors are fp32 beside a base of any precision."""
    only_factors = cfg.parts.factors and not (cfg.parts.weights or cfg.parts.vectors)
    return (*FREE_ON_RESUME, "precision") if only_factors else FREE_ON_RESUME


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of what two identities have differently, settings by their own names."""
    names = [name for name in first if name != "config" and first[name] != other.get(name)]
    one, two = first["config"], other.get("config")
    if not isinstance(two, Mapping):
        return [*names, "config"]
    return [*names, *sorted(n for n in {*one, *two} if one.get(n) != two.get(n))]


def settings_alike(header: Mapping[str, Any], cfg: RunConfig) -> Mapping[str, Any]:
    """The settings of a fleet that a device takes over from its journal's header."""
    free = free_settings(cfg)
    return {name: value for name, value in header["config"].items() if name not in free}
