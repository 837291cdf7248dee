"""Seconds of training: a clock that stands still while something else is measured or evaluated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Pause:
    """How long a pause lasted, once it is over."""

    seconds: float = 0.0


class TrainingClock:
    """Runs from ``before_s`` seconds on."""

    def __init__(self, before_s: float):
        self._start_s = time.monotonic() - before_s

    def seconds(self) -> float:
        return time.monotonic() - self._start_s

    @contextmanager
    def paused(self) -> Iterator[Pause]:
        """A block that does not count as training."""
        begun_s, pause = time.monotonic(), Pause()
        try:
            yield pause
        finally:
            pause.seconds = time.monotonic() - begun_s
            self._start_s += pause.seconds
