"""What a run is asked to do: one frozen value, merged from command line, TOML file and defaults.

A layer is a mapping from field name to value in which ``None`` means "not said here". The command
line stands above the file, the file above the model card's settings, those above the defaults.
What depends on the machine and the model (precision, batch split) stays ``None`` until the planner
has decided it. Standard library and ``tomli_w`` only.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from edgezo.errors import UsageError
from edgezo.machine.limits import MOST_PROBE_ROWS
from edgezo.plan.conflicts import combinations, unused
from edgezo.plan.fields import (
    ALTERNATIVES,
    DEFAULT_STEPS,
    FIELDS,
    LOSS,
    OF_PRESET,
    UNROUNDED,
    flags,
    read_layer,
)
from edgezo.zo.parts import Trained, trained
from edgezo.zo.presets import (
    BACKWARD_PASSES,
    CREDITS,
    EXACT,
    FIRST_ORDER,
    PRESETS,
    default_step,
    forwards,
    mean_forwards,
)


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
    step_auto: bool  # step is only where it begins: run/auto_step.py measures what it becomes
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
    def parts(self) -> Trained:
        """What is trained, by what it is: ``cfg.parts.weights``, ``cfg.parts.head``, ..."""
        return trained(self.train)

    @property
    def probing(self) -> bool:
        """Whether anything is trained along what is probed."""
        return self.parts.perturbed

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


@dataclass(frozen=True, kw_only=True)
class Settled(RunConfig):
    """A request with everything decided that it may leave to the planner; see ``plan.Plan.settle``."""

    max_mem_bytes: int
    precision: str
    batch_size: int
    micro_batch: int

    @staticmethod
    def of(cfg: RunConfig, **decided: Any) -> Settled:
        """``cfg`` with these fields changed; what it leaves open has to be among them."""
        return Settled(**{f.name: getattr(cfg, f.name) for f in fields(cfg)} | decided)

    def reopened(self, **changes: Any) -> RunConfig:
        """The request again, with these fields changed, or left open by None."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in fields(self)} | changes)


def make_config(*layers: Mapping[str, Any], need_data: bool = True) -> RunConfig:
    """Merge the layers, highest first, and validate the result.

    The first layer is what the user said in this command: a field in it that this run would not use
    is refused, while in the lower layers it is only ignored.
    Raises UsageError with every problem found.
    """
    problems: list[str] = []
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        said = read_layer(layer, problems)
        for group in ALTERNATIVES:
            in_layer = [name for name in group if name in said]
            if len(in_layer) > 1:
                problems.append(f"{flags(in_layer)} exclude each other; give one of them")
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
    problems += combinations(values, need_data)
    problems += unused(layers[0] if layers else {}, values)
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


assert tuple(FIELDS) == tuple(f.name for f in fields(RunConfig))
