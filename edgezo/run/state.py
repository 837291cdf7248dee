"""What the parts of one run share: its files, its plan, its model, its journal, and where it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgezo.data.batches import Example
from edgezo.data.dataset import Dataset
from edgezo.machine.gpu_memory import Memory
from edgezo.machine.process_memory import Guard, Meter
from edgezo.network.model import Model
from edgezo.plan.config import Settled
from edgezo.plan.plan import Plan
from edgezo.run.clock import TimeBox
from edgezo.run.directory import RunFiles
from edgezo.run.journal import Journal
from edgezo.run.manners import Manners
from edgezo.run.metrics_log import RunLog
from edgezo.run.objective import Judge
from edgezo.run.progress import RunProgress
from edgezo.run.ranks import Ranks
from edgezo.run.session import Opened, Planned
from edgezo.run.stopping import StopRequest


@dataclass
class RunState:
    """One run while it goes on. Only ``planned`` and ``guard`` are replaced, where the micro-batch changes."""

    files: RunFiles
    planned: Planned
    model: Model
    memory: Memory  # what the cap is on
    journal: Journal
    log: RunLog
    meter: Meter
    progress: RunProgress
    guard: Guard
    stop: StopRequest
    manners: Manners
    box: TimeBox
    ranks: Ranks | None = None  # the processes that share the run's steps; None where there is one
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

    @property
    def examples(self) -> Sequence[Example]:
        """The training examples."""
        return self.model.reads(self.dataset.train)

    @property
    def judge(self) -> Judge | None:
        return self.opened.judge

    def log_line(self, line: Mapping[str, Any]) -> None:
        """Write a line to metrics.jsonl, and report it."""
        self.log.write(line)
        self.progress.logged(line)

    def split(self, micro_batch: int) -> None:
        """Go on with micro-batches of this size."""
        cfg = replace(self.cfg, micro_batch=micro_batch)
        self.planned = replace(self.planned, cfg=cfg)
