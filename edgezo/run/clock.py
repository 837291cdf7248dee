"""Seconds of training: a clock that stands still while something else is measured or evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgezo.machine.clock import now_s


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
