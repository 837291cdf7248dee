"""The settings of a run: of which kind each is, its bounds, its default, and how a layer of them is read.

Standard library only.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgezo.errors import UsageError
from edgezo.zo.presets import AUTO, CREDITS, DIRECTIONS, ESTIMATORS, MASKS, RULES

TRAINABLE = ("lowrank", "full", "norms", "scales", "head", "probe", "lora")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
QUANTIZED = ("int8", "int4")
UNROUNDED = {"fp32": "updates are exact there", "int4": "nothing is rounded there"}
RESIDENCIES = ("resident", "host", "disk")
DEVICES = ("auto", "cpu", "cuda")
ROUNDINGS = ("plane", "stochastic", "anchored")
SCHEDULES = ("linear", "constant")
LOSS = "loss"  # the objective that is the model's own loss
OBJECTIVES = (LOSS, "accuracy", "exact-match", "token-f1", "numeric-match")

DEFAULT_STEPS = 400
# What an estimator's row of the table decides where the request does not.
AXES = ("directions", "mask", "credit", "rule", "train")
OF_PRESET = (*AXES, "step", "sigma", "keep", "refresh")

# Fields of which one replaces the other: said in a higher layer, it removes the lower layers'.
ALTERNATIVES = (("steps", "for_s"), ("data", "task"))
# Friendlier spellings in a TOML file; "-" may stand for "_".
ALIASES = {"max_mem": "max_mem_bytes", "for": "for_s"}
# What may differ when a run is resumed; everything else would change the numbers. Files may have moved: the
# journal knows the weights, the training rows and the finetuner. Another micro-batch or device changes losses in
# their rounding.
FREE_ON_RESUME = (
    *("max_mem_bytes", "micro_batch", "residency", "device", "threads", "profile"),
    *("out", "model", "data", "data_root", "finetuner"),
)


@dataclass(frozen=True)
class Field:
    """The law of one field: ``kind`` is str, int, float, bool, duration, bytes, choice or train."""

    kind: str
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    open_low: bool = False  # low itself is not allowed
    auto: str | None = None  # the field that "auto" in place of a value sets


FIELDS: dict[str, Field] = {
    "model": Field("str"),
    "data": Field("str"),
    "task": Field("str"),
    "data_root": Field("str"),
    "template": Field("str"),
    "labels": Field("str"),
    "label_field": Field("str", "label"),
    "max_mem_bytes": Field("bytes", low=1),
    "steps": Field("int", low=1, high=10_000_000),
    "for_s": Field("duration", low=0, open_low=True),
    "estimator": Field("choice", "grzo", choices=(*ESTIMATORS, AUTO)),
    "directions": Field("choice", choices=tuple(DIRECTIONS)),
    "mask": Field("choice", choices=tuple(MASKS)),
    "credit": Field("choice", choices=tuple(CREDITS)),
    "rule": Field("choice", choices=tuple(RULES)),
    "train": Field("train", choices=TRAINABLE),
    "precision": Field("choice", choices=PRECISIONS),
    "rounding": Field("choice", choices=ROUNDINGS),
    # None: on the disk (CPU) or in host memory (GPU) where memory is too small
    "residency": Field("choice", choices=RESIDENCIES),
    "device": Field("choice", "auto", choices=DEVICES),
    "rank": Field("int", 8, low=1, high=256),
    "keep": Field("float", low=0, high=1, open_low=True),
    "refresh": Field("int", low=1),
    "candidates": Field("int", 8, low=1, high=256),
    "finetuner": Field("str"),
    # None: as long as memory has room to go back through
    "short_tokens": Field("int", low=0, high=1_048_576),
    "short_lr": Field("float", 1e-4, low=0, open_low=True),
    "batch_size": Field("int", low=1, high=1024),
    "micro_batch": Field("int", low=1, high=1024),
    "max_length": Field("int", 512, low=8, high=1_048_576),
    "objective": Field("str", LOSS),
    "max_new_tokens": Field("int", low=1, high=65_536),  # None: as the task says
    "step": Field("float", low=0, open_low=True, auto="step_auto"),
    "step_auto": Field("bool", False),
    "sigma": Field("float", low=0, high=1, open_low=True),
    "schedule": Field("choice", "linear", choices=SCHEDULES),
    "weight_decay": Field("float", 0.0, low=0, high=1),
    "head_lr": Field("float", 2.0, low=0, open_low=True),
    "held_out": Field("float", low=0, high=0.9, open_low=True),  # None: the validation rows
    "seed": Field("int", 0, low=0, high=2**63 - 1),
    "eval_every": Field("int", 0, low=0),  # 0: before the first and after the last step only
    "eval_limit": Field("int", low=1),  # None: every validation row
    "snapshot_every": Field("int", 25, low=1),
    "threads": Field("int", low=1, high=4096),  # None: what PyTorch picks
    "profile": Field("bool", False),  # profile.json: where the memory goes (machine/profiler.py)
    "out": Field("str"),
}


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``120s``, ``10m`` or ``1.5h``. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write for example 120s, 10m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    special = {"max_mem_bytes": "--max-mem", "for_s": "--for"}
    return special.get(name, "--" + name.replace("_", "-"))


def flags(names: Sequence[str]) -> str:
    return " and ".join(flag(name) for name in names)


def read_layer(layer: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    said = {}
    for name, value in layer.items():
        if value is None:
            continue
        name = name.replace("-", "_")
        name = ALIASES.get(name, name)
        spec = FIELDS.get(name)
        if spec is None:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            problems.append(
                f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
            continue
        if spec.auto is not None and value == "auto":
            name, spec, value = spec.auto, FIELDS[spec.auto], True
        try:
            said[name] = _coerce(spec, value)
        except (ValueError, UsageError) as error:
            problems.append(f"{flag(name)}: {error}")
    return said


def _coerce(spec: Field, value: Any) -> Any:
    match spec.kind:
        case "str":
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"needs text, not {value!r}")
            return value
        case "choice":
            if value not in spec.choices:
                raise ValueError(f"{value!r} is not one of {', '.join(spec.choices)}")
            return value
        case "bool":
            if not isinstance(value, bool):
                raise ValueError(f"needs true or false, not {value!r}")
            return value
        case "train":
            return _coerce_train(spec, value)
        case "duration" if isinstance(value, str):
            value = parse_duration(value)
        case "bytes" if isinstance(value, str):
            from edgezo.machine.hardware import (
                parse_bytes,  # reads the machine elsewhere; not needed before
            )

            value = parse_bytes(value)
        case _ if isinstance(value, str):
            value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"needs a number, not {value!r}")
    if spec.kind in ("int", "bytes"):
        if value != value or value in (math.inf, -math.inf) or int(value) != value:
            raise ValueError(f"needs a whole number, not {value!r}")
        value = int(value)
    else:
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"needs a finite number, not {value!r}")
    below = value <= spec.low if spec.open_low else value < spec.low
    if below:
        raise ValueError(
            f"must be {'above' if spec.open_low else 'at least'} {spec.low:g}, not {value:g}"
        )
    if value > spec.high:
        raise ValueError(f"must be at most {spec.high:g}, not {value:g}")
    return value


def _number(text: str) -> int | float | str:
    """The number that ``text`` spells, as the command line gives it; else the text itself."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _coerce_train(spec: Field, value: Any) -> tuple[str, ...]:
    parts = value.split("+") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError(
            f"needs one or more of {', '.join(spec.choices)} joined by +, not {value!r}"
        )
    names = [part.strip() if isinstance(part, str) else part for part in parts]
    unknown = [name for name in names if name not in spec.choices]
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} is not one of {', '.join(spec.choices)}; join by +"
        )
    return tuple(name for name in spec.choices if name in names)  # one order, no repeats
