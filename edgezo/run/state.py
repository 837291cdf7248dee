"""What the parts of one run share: its files, its plan, its model, its journal, and where it reports."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from edgezo.data.batches import Example
from edgezo.data.dataset import Dataset
from edgezo.errors import Interrupted
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
from edgezo.run.session import Opened, Planned


@dataclass
class StopRequest:
    """Whether Ctrl-C or SIGTERM has asked the run to stop between two steps."""

    files: RunFiles
    asked: bool = False

    def check(self, step: int) -> None:
        """Raise Interrupted, with the command that goes on, if the run was asked to stop."""
        if self.asked:
            raise Interrupted(
                f"stopped after step {step}; everything is saved in {self.files.path}.\n"
                f"Go on with: edgezo finetune --resume --out {self.files.path}"
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a first signal asks the run to stop between two steps, and a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


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
