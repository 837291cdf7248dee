"""What a run has on every engine: a plan, files, a journal, where it reports to. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from edgezo.data.dataset import Dataset
from edgezo.machine.process_memory import Meter
from edgezo.plan.config import Settled
from edgezo.plan.plan import Plan
from edgezo.run.clock import TimeBox
from edgezo.run.directory import RunFiles
from edgezo.run.journal import Journal
from edgezo.run.manners import Manners
from edgezo.run.metrics_log import RunLog
from edgezo.run.progress import RunProgress
from edgezo.run.stopping import StopRequest


class HasRows(Protocol):
    """A request with its files and rows open."""

    @property
    def dataset(self) -> Dataset: ...

    @property
    def peak_before_bytes(self) -> int: ...


Opened = TypeVar("Opened", bound=HasRows)
Model = TypeVar("Model")


@dataclass(frozen=True)
class PlannedRun(Generic[Opened]):
    """An opened request with its plan, and with everything decided that the request left open."""

    opened: Opened
    cfg: Settled
    plan: Plan


@dataclass
class RunParts(Generic[Opened, Model]):
    """One run while it goes on. Only ``planned`` is replaced, where the micro-batch changes."""

    files: RunFiles
    planned: PlannedRun[Opened]
    model: Model
    journal: Journal
    log: RunLog
    meter: Meter
    progress: RunProgress
    stop: StopRequest
    manners: Manners
    box: TimeBox
    # The peak of plain forward passes, once the longest micro-batch has run: what inference takes.
    inference_peak_bytes: int | None = field(default=None, init=False)

    @property
    def opened(self) -> Opened:
        return self.planned.opened

    @property
    def cfg(self) -> Settled:
        return self.planned.cfg

    @property
    def plan(self) -> Plan:
        return self.planned.plan

    @property
    def dataset(self) -> Dataset:
        return self.opened.dataset

    def log_line(self, line: Mapping[str, Any]) -> None:
        """Write a line to metrics.jsonl, and report it."""
        self.log.write(line)
        self.progress.logged(line)

    def split(self, micro_batch: int) -> None:
        """Go on with micro-batches of this size."""
        cfg = replace(self.cfg, micro_batch=micro_batch)
        self.planned = replace(self.planned, cfg=cfg)
