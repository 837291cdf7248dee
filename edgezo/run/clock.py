"""Seconds of training: a clock that stands still while something else is measured, and the box that --for gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgezo.machine.clock import now_s

# The least share of --for that is left for training, however long loading and evaluating take.
LEAST_TRAINING_SHARE = 0.05


@dataclass
class TimeBox:
    """The time that --for gives a run, or none."""

    for_s: float | None
    # When the command began (``now_s``): reading, loading, passes and evaluations are then inside the box.
    # None: training alone is.
    began_s: float | None = None
    earlier_s: float = 0.0  # training of earlier processes of this run
    evaluation_s: float = 0.0  # about what the evaluation at the end will take

    def left_s(self, spent_s: float = 0.0) -> float:
        """Seconds that are left for training; ``spent_s``: training so far, of all processes."""
        if self.for_s is None:
            return math.inf
        if self.began_s is None:
            return max(0.0, self.for_s - spent_s)
        left_s = self.for_s - (now_s() - self.began_s) - self.earlier_s - self.evaluation_s
        return max(LEAST_TRAINING_SHARE * self.for_s, left_s)

    def longest_pause_s(self, left_s: float) -> float:
        """Seconds that a pause may take where ``left_s`` are left for training; a bound on training alone sets none."""
        return math.inf if self.began_s is None else left_s


@dataclass
class Pause:
    """How long a pause lasted, once it is over."""

    seconds: float = 0.0


class TrainingClock:
    """Runs from ``before_s`` seconds on."""

    def __init__(self, before_s: float):
        self._start_s = now_s() - before_s

    def seconds(self) -> float:
        return now_s() - self._start_s

    @contextmanager
    def paused(self) -> Iterator[Pause]:
        """A block that does not count as training."""
        begun_s, pause = now_s(), Pause()
        try:
            yield pause
        finally:
            pause.seconds = now_s() - begun_s
            self._start_s += pause.seconds
