"""A plan: what a request became, every planned byte with its reason, every choice with its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgezo.errors import DoesNotFit
from edgezo.machine.limits import REUSED_BYTES
from edgezo.plan.calibration import ACTIVATIONS, Item, peak_bytes, phase_bytes
from edgezo.plan.request import RunConfig, Settled, as_estimator
from edgezo.zo.presets import AUTO


@dataclass(frozen=True)
class Decision:
    """Something that was chosen, by the user or by the planner, with the reason."""

    name: str
    value: str | int | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "reason": self.reason}


@dataclass(frozen=True)
class Plan:
    model: str
    device: str  # cpu or cuda: whose memory is planned
    max_mem_bytes: int
    estimator: str
    short_tokens: int | None  # of the longest example that a mixed estimator goes back through
    precision: str
    rounding: str | None
    compute_dtype: str  # fp32 or bf16
    batch_size: int
    micro_batch: int
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    items: tuple[Item, ...]
    decisions: tuple[Decision, ...]
    smallest_bytes: int  # the smallest --max-mem that this request could run in
    smallest_flags: str  # how: "--precision int4 --micro-batch 1", rounded up to whole MB
    step_s: float  # about how long a step takes, from the machine's estimated speed
    blocks_on_disk: int  # the last ones, and the tables with them; 0: everything stays in memory
    disk_bytes: int  # what the overlay takes on disk
    reused_tokens: int  # packed tokens of all sides whose temporaries stay in the heap
    most_tokens: int | None  # of one side, in a piece of a micro-batch; None: it is whole
    blocks_in_host: int = 0  # the last ones, on a GPU that has no room for them
    host_bytes: int = 0  # what those take of the RAM
    kept_tokens: int = 0  # whose keys and values an evaluation keeps at once

    @property
    def residency(self) -> str:
        return "disk" if self.blocks_on_disk else "host" if self.blocks_in_host else "resident"

    def phase_bytes(self, phase: str) -> int:
        """What is held while ``phase`` (load, forward or update) lasts."""
        return phase_bytes(self.items, phase)

    @property
    def maps(self) -> bool:
        """Whether there are batches whose temporaries are mapped one by one (`memory.Heap`)."""
        return sum(i.bytes for i in self.items if i.name == ACTIVATIONS) > REUSED_BYTES

    @property
    def load_peak_bytes(self) -> int:
        return self.phase_bytes("load")

    @property
    def planned_peak_bytes(self) -> int:
        return peak_bytes(self.items)

    def settle(self, cfg: RunConfig) -> Settled:
        """The request with everything decided that it left open."""
        if cfg.estimator == AUTO:
            cfg = as_estimator(cfg, self.estimator)
        return Settled.of(
            cfg,
            device=self.device,
            max_mem_bytes=self.max_mem_bytes,
            precision=self.precision,
            rounding=self.rounding,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            short_tokens=self.short_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "model": self.model,
            "device": self.device,
            "max_mem_bytes": self.max_mem_bytes,
            "planned_peak_bytes": self.planned_peak_bytes,
            "load_peak_bytes": self.load_peak_bytes,
            "smallest_bytes": self.smallest_bytes,
            "smallest_flags": self.smallest_flags,
            "step_s": self.step_s,
            "residency": self.residency,
            "blocks_on_disk": self.blocks_on_disk,
            "disk_bytes": self.disk_bytes,
            "blocks_in_host": self.blocks_in_host,
            "host_bytes": self.host_bytes,
            "estimator": self.estimator,
            "short_tokens": self.short_tokens,
            "precision": self.precision,
            "rounding": self.rounding,
            "compute_dtype": self.compute_dtype,
            "batch_size": self.batch_size,
            "micro_batch": self.micro_batch,
            "most_tokens": self.most_tokens,
            "trained": list(self.trained),
            "frozen": list(self.frozen),
            "items": [item.to_dict() for item in self.items],
            "decisions": [decision.to_dict() for decision in self.decisions],
        }


class PlanDoesNotFit(DoesNotFit):
    """Holds the numbers that its message names, for callers that want to act on them."""

    def __init__(self, message: str, smallest_bytes: int, items: tuple[Item, ...]):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes  # the smallest --max-mem for the request as it stands
        self.items = items  # of that smallest plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "smallest_bytes": self.smallest_bytes,
            "items": [item.to_dict() for item in self.items],
        }
