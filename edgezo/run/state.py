"""What the parts of one run with torch share: its files, its plan, its model, its journal, and where it reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgezo.data.batches import Example
from edgezo.machine.gpu_memory import Memory
from edgezo.machine.process_memory import Guard
from edgezo.network.model import Model
from edgezo.run.objective import Judge
from edgezo.run.ranks import Ranks
from edgezo.run.run_parts import RunParts
from edgezo.run.session import Opened


@dataclass(kw_only=True)
class RunState(RunParts[Opened, Model]):
    """One run while it goes on. Only ``planned`` and ``guard`` are replaced, where the micro-batch changes."""

    memory: Memory  # what the cap is on
    guard: Guard
    ranks: Ranks | None = None  # the processes that share the run's steps; None where there is one

    @property
    def examples(self) -> Sequence[Example]:
        """The training examples."""
        return self.model.reads(self.dataset.train)

    @property
    def judge(self) -> Judge | None:
        return self.opened.judge
