"""A run's request as a value: ``RunConfig``, and its two forms in which fewer settings may be None.

What each setting means, its bounds and its default stand in fields.py; ``request.make_config`` builds and checks one.
Standard library and ``tomli_w`` only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import tomli_w

from edgezo.machine.limits import MOST_READOUT_ROWS
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.zo.axes import CREDITS, DIRECTIONS, ECHO_DEPTH, forwards, mean_forwards
from edgezo.zo.parts import Trained, trained
from edgezo.zo.presets import BACKWARD_PASSES, FIRST_ORDER

# What a run did that began before there was a choice. Files of such a run do not have these settings, and are not
# given them.
BEFORE = {
    "text_end": "no",
    "speaker": None,
    "skip_bad_rows": False,
    "row_rules": 1,
    "written_at": None,
    "blocks": "all",
    "states": None,
    "state_rows": None,
    "when": "always",
    "max_temp": None,
    "max_cpu": None,
    "probe_reads": "five",
    "log_to": "none",
    "engine": "torch",
    "provider": "cpu",
    "weight_decay_to": "zero",
    "samples": 1,
    "parent": None,
    "parent_steps": 0,
    "parent_sha256": None,
    "eval_rows": None,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A validated request. Build it with ``request.make_config``, which fills in what is not given."""

    model: str
    data: str | None
    task: str | None
    data_root: str | None
    template: str | None
    labels: str | None
    label_field: str
    max_mem_bytes: int | None
    steps: int | None
    for_s: float | None
    estimator: str
    directions: str
    mask: str
    credit: str
    rule: str
    train: tuple[str, ...]
    blocks: str  # a number, "all" or "auto"
    states: str | None
    state_rows: int | None
    precision: str | None
    rounding: str | None
    residency: str | None
    device: str
    engine: str
    provider: str
    rank: int
    keep: float
    refresh: int
    candidates: int
    samples: int
    finetuner: str | None
    short_tokens: int | None
    short_lr: float
    batch_size: int | None
    micro_batch: int | None
    max_length: int
    objective: str
    max_new_tokens: int | None
    step: float
    step_auto: bool
    sigma: float
    schedule: str
    weight_decay: float
    weight_decay_to: str
    head_lr: float
    held_out: float | None
    seed: int
    eval_every: int
    eval_limit: int | None
    snapshot_every: int
    threads: int | None
    when: str
    max_temp: float | None
    max_cpu: float | None
    log_to: str
    profile: bool
    out: str | None
    text_end: str
    written_at: str | None
    began_in: str | None
    speaker: str | None
    skip_bad_rows: bool
    row_rules: int
    probe_reads: str
    parent: str | None
    parent_steps: int
    parent_sha256: str | None
    eval_rows: int | None

    @classmethod
    def of(cls, cfg: RunConfig, **changes: Any) -> Self:
        """``cfg`` as one of this class, with these fields changed."""
        return cls(**{f.name: getattr(cfg, f.name) for f in fields(cfg)} | changes)

    @property
    def backward(self) -> bool:
        """Whether a step has a backward pass."""
        return self.estimator in FIRST_ORDER

    @property
    def mixed(self) -> bool:
        """Short examples use backpropagation, the others are perturbed (addax)."""
        return self.estimator == "addax"

    @property
    def parts(self) -> Trained:
        """What is trained, by what it is: ``cfg.parts.weights``, ``cfg.parts.head``, ..."""
        return trained(self.train)

    def first_trained(self, layers: int) -> int:
        """The number of the first block that is trained, of so many; 0: all are."""
        return max(0, layers - int(self.blocks)) if self.blocks.isdigit() else 0

    @property
    def keeps_states(self) -> bool:
        """Whether frozen blocks pass once, and what they put out is kept on disk; of a request that is decided."""
        return self.states not in (None, "none")

    @property
    def probing(self) -> bool:
        """Whether a step perturbs anything."""
        return self.parts.perturbed

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the parts that are trained by their gradient, by part."""
        return {"head": self.head_lr, "lora": self.step, "lowrank": self.short_lr}

    @property
    def passes(self) -> int:
        """Forwards over an example in a step, all in one pass; 1 where nothing is perturbed."""
        return forwards(self.credit, self.mask, self.candidates) if self.probing else 1

    @property
    def mean_passes(self) -> float:
        """Forwards over an example in a step, averaged over the steps of a run; a backward pass counts as forwards."""
        if self.backward:
            return BACKWARD_PASSES
        if not self.probing:
            return 1
        return mean_forwards(self.credit, self.mask, self.candidates, self.refresh)

    @property
    def planned_sides(self) -> int:
        """Sides of a batch that a plan has room for.

        Two where nothing is perturbed: the plain forward that a step is compared with passes every row twice.
        """
        return self.passes if self.probing else 2

    def since_base(self, steps: int) -> int:
        """So many steps of this run, counted from its base: those of its parents come before."""
        return self.parent_steps + steps

    @property
    def terms(self) -> int:
        """How many products of two sign vectors a direction is the sum of, where it is one of such."""
        return self.rank if DIRECTIONS[self.directions].summed else 1

    @property
    def tries(self) -> bool:
        """Whether a step tries the whole batch along each of ``candidates`` directions."""
        return CREDITS[self.credit].tries

    @property
    def carried(self) -> int:
        """Numbers at the end of a record's credit that belong to no direction: a later step takes them up."""
        return int(self.anchored) + self.carries

    @property
    def carries(self) -> int:
        """How many of them the credit and the directions make."""
        if not self.probing:
            return 0
        entry = DIRECTIONS[self.directions]
        of_batch = 2 * (self.batch_size or DEFAULT_BATCH) if entry.per_example else 1 + ECHO_DEPTH
        return CREDITS[self.credit].carries + (of_batch if entry.echoes else 0)

    @property
    def anchored(self) -> bool:
        """Whether steps are compared with the weights of an earlier step (SVRG's anchor)."""
        return CREDITS[self.credit].anchored

    def is_anchor(self, step: int) -> bool:
        """Whether later steps are compared with the weights before ``step``."""
        return self.anchored and step % self.refresh == 0

    def to_dict(self) -> dict[str, Any]:
        """Every field, with lists for tuples, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def without_absent(self) -> dict[str, Any]:
        """Every field but those that mean what their absence means (``BEFORE``)."""
        return {k: v for k, v in self.to_dict().items() if k not in BEFORE or v != BEFORE[k]}

    def canonical_json(self) -> str:
        """The one spelling of the configuration that a journal's header holds: sorted keys, no spaces."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_toml(self) -> str:
        """The configuration as TOML, without the settings that are None; ``request.from_toml`` reads it."""
        return tomli_w.dumps({k: v for k, v in self.without_absent().items() if v is not None})


# The two classes below have the fields of RunConfig, some with a narrower type. They need no methods of their own, and
# making those again would take a twentieth of the time of ``edgezo --help``: hence no ``@dataclass``.


class Batched(RunConfig):
    """A request whose batch size is known: what a footprint is counted for."""

    batch_size: int

    def readout_rows(self, examples: int | None) -> int:
        """Training rows, out of ``examples``, that a linear probe is fitted to where time does not end it before.

        As many as the steps see; none where a parent has fitted it. ``examples`` is None where the data is not known.
        """
        if not self.parts.readout or self.parent is not None:
            return 0
        seen = self.steps * self.batch_size if self.steps else MOST_READOUT_ROWS
        return min(seen, MOST_READOUT_ROWS, seen if examples is None else examples)


class Settled(Batched):
    """A request with everything decided that it may leave to the planner; see ``plan.Plan.settle``."""

    max_mem_bytes: int
    precision: str
    micro_batch: int

    def reopened(self, **changes: Any) -> RunConfig:
        """The request with these fields changed, or left to the planner again by None."""
        return RunConfig.of(self, **changes)
