"""What a run is asked to do: one frozen value, merged from command line, TOML file and defaults.

A layer is a mapping from field name to value in which ``None`` means "not said here". The command
line stands above the file, the file above the model card's settings, those above the defaults.
What depends on the machine and the model (precision, batch split) stays ``None`` until the planner
has decided it. Standard library and ``tomli_w`` only.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from edgezo.errors import UsageError
from edgezo.presets import (
    AUTO,
    BACKWARD_PASSES,
    CREDITS,
    DIRECTIONS,
    ESTIMATORS,
    EXACT,
    FIRST_ORDER,
    MASKS,
    PRESETS,
    RULES,
    cannot_anchor,
    cannot_pace,
    default_step,
    forwards,
    mean_forwards,
    refusals,
)

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
MOST_PROBE_ROWS = 4096
# Blocks that a linear probe averages: one alone is up to 3 points worse, and its choice is noisy (LOG.md).
PROBED_BLOCKS = 5
PROBE_SHARE = 0.7  # of a run's time for a linear probe, where something else is trained after it
EVAL_TOKENS = 512  # packed tokens of an evaluation batch, unless one example is longer
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
    "profile": Field("bool", False),  # profile.json: where the memory goes (profiler.py)
    "out": Field("str"),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A validated request. Build it with :func:`make_config`, which fills in what was not said."""

    model: str
    data: str | None
    task: str | None
    data_root: str | None
    template: str | None
    labels: str | None
    label_field: str
    max_mem_bytes: int | None
    steps: int | None  # None where for_s bounds the run
    for_s: float | None
    estimator: str  # the row of the table that decides what is not said of the five axes
    directions: str
    mask: str
    credit: str
    rule: str
    train: tuple[str, ...]
    precision: str | None
    rounding: str | None
    residency: str | None
    device: str
    rank: int  # of the factors of --train lowrank and lora, and of low-rank directions
    keep: float  # share of the weights or blocks that a mask leaves
    refresh: int  # steps between two bases of low-rank directions, or two anchors
    candidates: int  # directions of credit candidates
    finetuner: str | None  # file of the scales of --mask block
    short_tokens: int | None  # of the longest example that --estimator addax has the gradient of
    short_lr: float
    batch_size: int | None
    micro_batch: int | None
    max_length: int  # tokens
    objective: str  # what training lowers (loss), or raises: a name, or module:function
    max_new_tokens: int | None  # of an answer that the model writes
    step: float  # kappa or a learning rate: presets.step_meaning
    step_auto: bool  # step is only where it begins: pace.py measures what it becomes
    sigma: float
    schedule: str
    weight_decay: float
    head_lr: float
    held_out: float | None  # share of the training rows that is evaluated on instead
    seed: int
    eval_every: int
    eval_limit: int | None
    snapshot_every: int
    threads: int | None
    profile: bool
    out: str | None

    @property
    def backward(self) -> bool:
        """Whether a step has a backward pass."""
        return self.estimator in FIRST_ORDER

    @property
    def mixed(self) -> bool:
        """Whether some examples are gone back through and the others probed."""
        return self.estimator == "addax"

    @property
    def probing(self) -> bool:
        """Whether anything is trained along what is probed."""
        return not EXACT.issuperset(self.train)

    @property
    def rates(self) -> dict[str, float]:
        """Of the parts that are trained by their own gradient."""
        return {"head": self.head_lr, "lora": self.step, "lowrank": self.short_lr}

    @property
    def passes(self) -> int:
        """Forwards over an example in a step, all in one pass: what is exact needs one."""
        if not self.probing:
            return 1
        return forwards(self.credit, self.mask, self.candidates)

    @property
    def mean_passes(self) -> float:
        """The same on average over steps that are not alike."""
        if self.backward:
            return BACKWARD_PASSES
        if not self.probing:
            return 1
        return mean_forwards(self.credit, self.mask, self.candidates, self.refresh)

    @property
    def planned_sides(self) -> int:
        """Sides that a plan has room for: where nothing is probed, those of a plain forward over two."""
        return self.passes if self.probing else 2

    def probe_rows(self, examples: int | None) -> int:
        """Training rows, of so many, that a linear probe is fitted to where time does not end it before.

        As many as the steps will see.
        """
        if "probe" not in self.train:
            return 0
        asked = self.steps * (self.batch_size or 1) if self.steps else MOST_PROBE_ROWS
        return min(asked, MOST_PROBE_ROWS, asked if examples is None else examples)

    @property
    def anchored(self) -> bool:
        """Whether steps are compared with the weights of an earlier one."""
        return CREDITS[self.credit].anchored

    def is_anchor(self, step: int) -> bool:
        """Whether later steps are compared with the weights before ``step``."""
        return self.anchored and step % self.refresh == 0

    def to_dict(self) -> dict[str, Any]:
        """Every field, with lists for tuples, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def canonical_json(self) -> str:
        """One spelling of the configuration: sorted keys, no spaces. For the journal's header."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_toml(self) -> str:
        """The resolved configuration as TOML; what is None is left out. See :func:`from_toml`."""
        return tomli_w.dumps({k: v for k, v in self.to_dict().items() if v is not None})


def make_config(*layers: Mapping[str, Any], need_data: bool = True) -> RunConfig:
    """Merge the layers, highest first, and validate the result.

    The first layer is what the user said in this command: a field in it that this run would not use
    is refused, while in the lower layers it is only ignored.
    Raises UsageError with every problem found.
    """
    problems: list[str] = []
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        said = _read_layer(layer, problems)
        for group in ALTERNATIVES:
            in_layer = [name for name in group if name in said]
            if len(in_layer) > 1:
                problems.append(f"{_flags(in_layer)} exclude each other; give one of them")
            if in_layer:
                for name in group:
                    merged.pop(name, None)
        if "step" in said:
            merged.pop("step_auto", None)
        merged.update(said)

    values = {name: merged.get(name, spec.default) for name, spec in FIELDS.items()}
    if values["steps"] is None and values["for_s"] is None:
        values["steps"] = DEFAULT_STEPS
    _fill_from_preset(values)
    problems += _combinations(values, need_data)
    problems += _unused(layers[0] if layers else {}, values)
    if problems:
        raise UsageError(list(dict.fromkeys(problems)))
    return RunConfig(**values)


def _fill_from_preset(values: dict[str, Any]) -> None:
    """What was not said, as the estimator's row of the table has it."""
    # What is trained by its own gradient has no axes: the default's stand there, as with --train head alone.
    row = PRESETS.get(values["estimator"], PRESETS["grzo"])
    if (first := FIRST_ORDER.get(values["estimator"])) is not None:
        row = row._replace(step=first.step, train=first.train)
    own_step = values["step"]
    for name in OF_PRESET:
        if values[name] is None:
            values[name] = getattr(row, name)
            if name == "train" and values["objective"] != LOSS and first is None:
                values[name] = tuple(part for part in row.train if part not in EXACT)
    if first is not None:
        values["step"] = row.step if own_step is None else own_step
    elif own_step is None:  # a credit or rule that was chosen by hand may mean another thing by it
        values["step"] = default_step(row, values["credit"], values["rule"])
    if values["rounding"] is None and "full" in values["train"]:
        if values["precision"] not in UNROUNDED:
            values["rounding"] = row.rounding


def as_estimator(cfg: RunConfig, name: str) -> RunConfig:
    """The same request with another estimator, and all that an estimator's row decides. Raises UsageError."""
    left = ("estimator", "rounding", *OF_PRESET)
    values = {name: value for name, value in cfg.to_dict().items() if name not in left}
    return make_config({}, {**values, "estimator": name}, need_data=False)


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as an earlier version wrote it, with what that version did not know of."""
    values = {**{name: spec.default for name, spec in FIELDS.items()}, **saved}
    _fill_from_preset(values)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def from_toml(text: str) -> RunConfig:
    """The inverse of :meth:`RunConfig.to_toml`. Raises UsageError for any other text."""
    before = {"device": "cpu"}  # of a run from before there was a choice
    return make_config({}, parse_toml(text, "the configuration"), before, need_data=False)


def read_toml(path: Path | str) -> dict[str, Any]:
    """The layer in a TOML file. Raises UsageError if it can't be read as one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"can't read the configuration {path}: {reason}") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from error


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


def _flags(names: Sequence[str]) -> str:
    return " and ".join(flag(name) for name in names)


def _read_layer(layer: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
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
            from edgezo.machine import parse_bytes  # reads the machine elsewhere; not needed before

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


def _combinations(v: Mapping[str, Any], need_data: bool) -> list[str]:
    """Requests whose parts are fine alone and mean nothing together, each with its reason."""
    train, problems = v["train"], []
    if v["model"] is None:
        problems.append(
            "--model is missing: a card (see edgezo models), a directory, a .gguf file or a hub id"
        )
    if need_data and v["data"] is None and v["task"] is None:
        problems.append("--data or --task is missing: there is nothing to learn from")
    if v["data_root"] is not None and v["task"] is None:
        problems.append(
            "--data-root is where --task looks for its data; without --task give --data"
        )
    if (
        need_data
        and v["mask"] == "block"
        and v["finetuner"] is None
        and not EXACT.issuperset(train)
    ):
        problems.append(
            "--mask block needs --finetuner FILE: edgezo meta-train makes one, and "
            "edgezo convert-finetuner reads a published one"
        )
    problems += refusals(v)
    if v["step_auto"] and (why := cannot_pace(v)):
        problems.append(f"--step auto: {why}; give --step a number")
    if v["objective"] not in OBJECTIVES and not re.fullmatch(r"[\w.]+:[\w.]+", v["objective"]):
        problems.append(
            f"--objective {v['objective']!r} is not one of {', '.join(OBJECTIVES)}, nor module:function, "
            "a Python function (prediction, row) -> float"
        )
    if v["objective"] != LOSS:
        if v["estimator"] in FIRST_ORDER:
            problems.append(
                f"--estimator {v['estimator']} with --objective {v['objective']}: it follows the gradient of a loss, "
                "and a score of predictions has none; use a forward-only row"
            )
        elif "head" in train:
            problems.append(
                f"--train {'+'.join(train)} with --objective {v['objective']}: the exact head follows the gradient "
                "of a loss, and a score of predictions has none; leave out head"
            )
    if "full" in train and v["precision"] == "int4":
        problems.append(
            "--train full with --precision int4: its codes are frozen; "
            "train lowrank, norms, scales or head there, or use int8 or bf16"
        )
    for part in ("lowrank", "norms", "scales"):
        if "full" in train and part in train:
            problems.append(
                f"--train full+{part}: full weights already hold what {part} would train"
            )
    if {"full", "probe"} <= set(train):
        problems.append(
            "--train full+probe: a probe reads the blocks alone, so no loss depends on the head's table; "
            "use full, full+head, or lowrank+probe"
        )
    if v["rounding"] is not None:
        if "full" not in train:
            problems.append(
                "--rounding says how full weights keep small steps; it needs --train full"
            )
        if v["precision"] in UNROUNDED:
            problems.append(
                f"--rounding with --precision {v['precision']}: {UNROUNDED[v['precision']]}"
            )
        elif v["rounding"] == "plane" and v["precision"] == "int8":
            problems.append(
                "--rounding plane adds 8 bits to bf16 or fp16 weights; "
                "with --precision int8 use anchored, or stochastic"
            )
        elif v["rounding"] == "anchored" and v["precision"] != "int8":
            problems.append(
                "--rounding anchored makes int8 codes anew from base and journal; it needs --precision int8"
            )
        elif v["rounding"] == "anchored" and (why := cannot_anchor(v)):
            problems.append(f"--rounding anchored: {why}; use --rounding stochastic")
    if v["residency"] == "host" and v["device"] == "cpu":
        problems.append(
            "--residency host keeps blocks in the RAM beside a GPU; with --device cpu use disk"
        )
    if v["residency"] == "disk" and v["device"] == "cuda":
        problems.append(
            "--residency disk with --device cuda: blocks reach a GPU from the RAM; "
            "use --residency host, or --device cpu"
        )
    if v["batch_size"] is not None and v["micro_batch"] is not None:
        if v["micro_batch"] > v["batch_size"]:
            problems.append(
                f"--micro-batch {v['micro_batch']} is more than "
                f"--batch-size {v['batch_size']}, which it splits"
            )
    return problems


def _unused(said: Mapping[str, Any], v: Mapping[str, Any]) -> list[str]:
    """What the user said in this command and the run would silently ignore."""
    train = v["train"]
    probing = not EXACT.issuperset(train)
    first = FIRST_ORDER.get(v["estimator"])
    said = {**said, "step": said.get("step", said.get("step_auto"))}
    drawn = DIRECTIONS[v["directions"]]
    rules = {
        "rank": (
            {"lowrank", "lora"} & set(train)
            or drawn.refreshed
            or (drawn.guided and not drawn.per_example),
            "it is the rank of --train lowrank or lora, and of low-rank directions",
        ),
        "keep": (v["mask"] in ("sparse", "layers"), "it is what --mask sparse or layers leaves"),
        "refresh": (
            drawn.refreshed or CREDITS[v["credit"]].anchored,
            "only low-rank directions have a basis that is drawn anew, and only --credit svrg an anchor",
        ),
        "candidates": (v["credit"] == "candidates", "only --credit candidates draws them"),
        **{
            name: (v["estimator"] == "addax", "only --estimator addax has short examples")
            for name in ("short_tokens", "short_lr")
        },
        "finetuner": (
            v["mask"] == "block" and probing,
            "only --mask block (--estimator zo-finetuner) asks one for scales",
        ),
        "head_lr": ("head" in train, "it is the learning rate of --train head"),
        "sigma": (probing, f"--train {'+'.join(train)} alone perturbs nothing"),
        "step": (
            probing or first is not None,
            "--train head or probe alone perturbs nothing; a head's rate is --head-lr",
        ),
    }
    if first is not None:
        axes = "directions, masks and credits are of forward-only rows"
        rules |= {name: (False, axes) for name in ("directions", "mask", "credit", "rule")}
    if v["estimator"] == AUTO:
        chosen = "--estimator auto decides it with the estimator; name that to say it"
        rules |= {name: (False, chosen) for name in OF_PRESET}
    return [
        f"{flag(name)} has no effect here: {reason}"
        for name, (used, reason) in rules.items()
        if said.get(name) is not None and not used
    ]


assert tuple(FIELDS) == tuple(f.name for f in fields(RunConfig))
