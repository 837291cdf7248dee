"""From what is asked to a checked ``RunConfig``: layers of settings are merged, filled in and validated.

A layer is a mapping from setting to value in which ``None`` means "not given here". The command line stands above the
file, the file above the model card's settings, those above the defaults. What depends on the machine and the model
(precision, batch split) stays ``None`` until the planner has decided it. Standard library and ``tomli_w`` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgezo.errors import UsageError
from edgezo.machine import foreign
from edgezo.machine.foreign_yaml import parse_yaml
from edgezo.machine.meant import nearest
from edgezo.plan.config import BEFORE, RunConfig
from edgezo.plan.conflicts import conflicts
from edgezo.plan.data_fields import LOSS
from edgezo.plan.engines import engine_conflicts
from edgezo.plan.field import as_text
from edgezo.plan.fields import (
    ALTERNATIVES,
    DEFAULT_STEPS,
    FIELDS,
    OF_PRESET,
    SET_BY_RUN,
    UNROUNDED,
    flag,
    flags,
)
from edgezo.plan.unused import without_effect
from edgezo.zo.axes import ROUNDINGS
from edgezo.zo.parts import trained, without_exact
from edgezo.zo.presets import FIRST_ORDER, default_step, preset_of

ALIASES = {field.alias: field.name for field in FIELDS.values() if field.alias}
# Names by which a file may give a setting.
_SPELLINGS = [name for name in (*ALIASES, *FIELDS) if name not in SET_BY_RUN]


def make_config(*layers: Mapping[str, Any], need_data: bool = True) -> RunConfig:
    """Merge the layers, highest first, and validate the result.

    The first layer is what the user gives with this command: a setting in it that the run would not use is refused,
    while in the lower layers it is only ignored.
    Raises UsageError with every problem.
    """
    problems: list[str] = []
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        given = read_layer(layer, problems)
        for group in ALTERNATIVES:
            in_layer = [name for name in group if name in given]
            if len(in_layer) > 1:
                problems.append(f"{flags(in_layer)} exclude each other; give one of them")
            if in_layer:
                for name in group:
                    merged.pop(name, None)
        if "step" in given:
            merged.pop("step_auto", None)
        merged.update(given)

    values = {name: merged.get(name, field.default) for name, field in FIELDS.items()}
    if values["steps"] is None and values["for_s"] is None:
        values["steps"] = DEFAULT_STEPS
    _fill_from_preset(values)
    cfg = RunConfig(**values)
    problems += conflicts(cfg, need_data) + engine_conflicts(cfg)
    problems += without_effect(layers[0] if layers else {}, cfg)
    if problems:
        raise UsageError(list(dict.fromkeys(problems)))
    return cfg


def read_layer(layer: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The values of a layer by setting, read and within their bounds; what is wrong is added to ``problems``.

    A name may be spelled as the option is: ``max-mem`` for ``max_mem_bytes``.
    """
    given = {}
    for spelling, value in layer.items():
        if value is None:
            continue
        name = spelling.replace("-", "_")
        name = ALIASES.get(name, name)
        field = FIELDS.get(name)
        if field is None:
            guess = nearest(name, _SPELLINGS) or "; docs/options.md lists all"
            problems.append(f"unknown setting {name!r}{guess}")
            continue
        if field.auto is not None and value == "auto":
            name, field, value = field.auto, FIELDS[field.auto], True
        if field.kind == "bytes" and spelling.replace("-", "_") != name and type(value) is int:
            value = str(value)  # max-mem = 2000 in a file is as unclear as --max-mem 2000
        try:
            given[name] = field.read(value)
        except (ValueError, UsageError) as error:
            problems.append(f"{flag(name)}: {error}")
    return given


def _fill_from_preset(values: dict[str, Any]) -> None:
    """Set what the request leaves to the estimator's preset, in place."""
    preset, step = preset_of(values["estimator"]), values["step"]
    by_gradient = values["estimator"] in FIRST_ORDER
    for name in OF_PRESET:
        if values[name] is None:
            values[name] = getattr(preset, name)
            if name == "train" and values["objective"] != LOSS and not by_gradient:
                values[name] = without_exact(preset.train)
    if step is None and not by_gradient:
        # A credit or rule that is chosen by hand may mean something else by a step.
        values["step"] = default_step(preset, values["credit"], values["rule"])
    if values["rounding"] is None and trained(tuple(values["train"])).weights:
        codes = values["precision"] == "int8" or not ROUNDINGS[preset.rounding or ""].requantised
        if values["precision"] not in UNROUNDED and codes:
            values["rounding"] = preset.rounding


def as_estimator(cfg: RunConfig, name: str) -> RunConfig:
    """The request with another estimator, which decides anew all that its preset decides. Raises UsageError."""
    decided = ("estimator", "rounding", *OF_PRESET)
    values = {name: value for name, value in cfg.to_dict().items() if name not in decided}
    return make_config({}, {**values, "estimator": name}, need_data=False)


# Settings of a run that one which goes on from it chooses anew.
_NOT_AFTER = (
    *("out", "began_in", "profile", "micro_batch", "residency", "state_rows"),
    *("parent", "parent_steps", "parent_sha256", "eval_rows"),
)


# Settings by which its parent's records are read: they say what is trained, and along which directions.
_SAME_AFTER = (
    *("estimator", "directions", "mask", "credit", "rule", "train", "blocks", "rounding", "rank"),
    *("keep", "refresh", "candidates", "precision", "seed"),
)


def check_after(saved: RunConfig, run: Path, asked: Mapping[str, Any]) -> None:
    """Raise UsageError where ``asked`` changes what no run that goes on from one with the settings ``saved`` can."""
    same = (*_SAME_AFTER, "sigma") if saved.mask == "quantized" else _SAME_AFTER
    changed = [
        f"{flag(name)} was {as_text(getattr(saved, name))} in {run}, not {as_text(asked[name])}: a run that goes on "
        "from another one trains what that has trained"
        for name in same
        if name in asked and asked[name] != getattr(saved, name)
    ]
    if changed:
        way_out = f"edgezo export {run} --out MODEL makes a model of it, for --model MODEL"
        raise UsageError([*changed, f"to train something else over its result: {way_out}"])


def settings_after(saved: RunConfig) -> dict[str, Any]:
    """The layer of a run that goes on from one with the settings ``saved`` (run/parent.py): its own ones lie above."""
    layer = {name: value for name, value in saved.to_dict().items() if name not in _NOT_AFTER}
    return layer if saved.eval_rows is None else {**layer, "eval_limit": None}


def completed(saved: Mapping[str, Any]) -> RunConfig:
    """A configuration that a journal holds, with the settings that versions since have added.

    Every value is read and checked as one of a command line. Raises UsageError with every problem.
    """
    return make_config({}, saved, BEFORE, need_data=False)


_BEFORE = {
    "device": "cpu",
    **BEFORE,
}  # of a run from before there was a choice; the device is in no journal


def from_toml(text: str) -> RunConfig:
    """The inverse of :meth:`RunConfig.to_toml`. Raises UsageError for any other text."""
    return make_config({}, parse_toml(text, "the configuration"), _BEFORE, need_data=False)


def read_run_config(path: Path) -> RunConfig:
    """The configuration of a run, from its file.

    Raises EdgezoError for a file that cannot be read, and UsageError, which names it, for any other text.
    """
    with foreign.reading(path, "Restore it from a copy."):
        text = foreign.read_small(path, foreign.MOST_TOML_BYTES).decode("utf-8")
    try:
        return make_config({}, parse_toml(text, str(path)), _BEFORE, need_data=False)
    except UsageError as problem:
        if str(path) in str(problem):
            raise
        what = f"{path} is not the configuration of a run of edgezo's"
        raise UsageError([what, *problem.problems]) from problem


def read_settings(path: Path | str) -> dict[str, Any]:
    """The layer in a TOML file, or in a YAML file (.yaml, .yml). Raises UsageError if it can't be read as one."""
    try:
        text = foreign.read_small(Path(path), foreign.MOST_TOML_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read the configuration {path}: {foreign.reason(error)}") from error
    if Path(path).suffix.lower() not in (".yaml", ".yml"):
        return parse_toml(text, str(path))
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The layer in a TOML text; ``name`` is for the message. Raises UsageError where it is not valid."""
    try:
        return foreign.parse_toml(text)
    except ValueError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from error
