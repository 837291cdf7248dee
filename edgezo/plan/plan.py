"""A plan: what a request became, every planned byte and every choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgezo.errors import DoesNotFit
from edgezo.plan.calibration import EXPANDED, Item, needed_bytes, peak_bytes, phase_bytes
from edgezo.plan.config import RunConfig, Settled
from edgezo.plan.request import as_estimator
from edgezo.zo.presets import AUTO


@dataclass(frozen=True)
class Decision:
    """Something that the user or the planner has chosen, with the reason."""

    name: str
    value: str | int | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "reason": self.reason}


@dataclass(frozen=True)
class Plan:
    """What a request became: how it will run, and what that takes."""

    model: str
    device: str  # whose memory is planned: cpu or cuda
    max_mem_bytes: int
    estimator: str
    short_tokens: int | None  # tokens of the longest example that addax takes the gradient of
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
    step_s: float  # seconds that a step takes, from the machine's estimated speed
    blocks_on_disk: int  # the last blocks, and the tables with them; 0: everything stays in memory
    disk_bytes: int  # what the overlay takes on disk
    reused_tokens: int  # packed tokens of all sides whose temporaries stay in the heap
    most_tokens: int | None  # tokens of one side in a piece of a micro-batch; None: no pieces
    maps: bool  # there are batches whose temporaries are mapped one by one (`process_memory.Heap`)
    panel_columns: int = 0  # of the widest fp32 product on a CPU; 0: products are in bf16
    blocks_in_host: int = 0  # the last blocks, where a GPU has no room for them
    host_bytes: int = 0  # what those blocks take of the RAM
    evaluation_s: float | None = None  # seconds of an evaluation; None where no data was given
    evaluations: int = 0  # its rows; 0: not known
    kept_tokens: int = 0  # tokens whose keys and values an evaluation keeps at once
    blocks: str = "all"  # how many of the last blocks are trained
    states: str | None = None  # how the output of the frozen ones is kept; None: none are frozen
    state_rows: int | None = None  # training rows whose states are kept
    first_trained: int = 0  # the number of the first block that is trained
    pass_row_s: float = (
        0.0  # estimated seconds of a row through the frozen ones, where states are kept
    )
    pass_from_disk: bool = False  # frozen blocks are read one by one while rows pass them

    @property
    def residency(self) -> str:
        """Where the last blocks are: on disk, in host memory, or with all others in memory."""
        return "disk" if self.blocks_on_disk else "host" if self.blocks_in_host else "resident"

    def phase_bytes(self, phase: str) -> int:
        """What a run takes while ``phase`` (load, forward, update or fit) lasts."""
        return phase_bytes(self.items, phase)

    def reason_of(self, name: str) -> str:
        """Why a decision was made, by its name."""
        return next(decision.reason for decision in self.decisions if decision.name == name)

    @property
    def tile_bytes(self) -> int:
        """The largest tile of weights in the compute dtype; 0 where they are stored in it."""
        return sum(item.bytes for item in self.items if item.name == EXPANDED)

    @property
    def load_peak_bytes(self) -> int:
        return self.phase_bytes("load")

    @property
    def planned_peak_bytes(self) -> int:
        """The peak that is expected."""
        return peak_bytes(self.items)

    @property
    def needed_bytes(self) -> int:
        """The smallest cap under which the run can be as planned: the peak and the reserves above it."""
        return needed_bytes(self.items)

    def settle(self, cfg: RunConfig) -> Settled:
        """The request with everything decided that it leaves to the planner."""
        if cfg.estimator == AUTO:
            cfg = as_estimator(cfg, self.estimator)
        return Settled.of(cfg, **{name: getattr(self, name) for name in DECIDED})

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            **{name: getattr(self, name) for name in IN_JSON},
            "trained": list(self.trained),
            "frozen": list(self.frozen),
            "items": [item.to_dict() for item in self.items],
            "decisions": [decision.to_dict() for decision in self.decisions],
        }


# Settings that a plan decides.
DECIDED = (
    *("device", "max_mem_bytes", "precision", "rounding", "batch_size", "micro_batch"),
    *("short_tokens", "blocks", "states", "state_rows"),
)
# Plain values in plan.json, in its order.
IN_JSON = (
    *("model", "device", "max_mem_bytes", "planned_peak_bytes", "load_peak_bytes"),
    *("needed_bytes", "smallest_bytes", "smallest_flags", "step_s", "evaluation_s"),
    *("residency", "blocks_on_disk", "disk_bytes", "blocks_in_host", "host_bytes", "estimator"),
    *("short_tokens", "precision", "rounding", "compute_dtype"),
    *("batch_size", "micro_batch", "most_tokens"),
    *("blocks", "states", "state_rows", "pass_from_disk"),
)


class PlanDoesNotFit(DoesNotFit):
    """A request that fits in no way. Has the numbers of its message, for callers that act on them."""

    def __init__(self, message: str, smallest_bytes: int, items: tuple[Item, ...]):
        super().__init__(message)
        self.smallest_bytes = smallest_bytes  # the smallest --max-mem for the request as it stands
        self.items = items  # of that smallest plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "smallest_bytes": self.smallest_bytes,
            "items": [item.to_dict() for item in self.items],
        }
