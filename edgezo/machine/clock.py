"""Seconds that never go back, and how they are said.

Python promises that of ``time.monotonic``, but clocks of virtual machines have been seen to break it. A negative time
would count against what a run of a given time has used up, and its schedule would take steps longer than its first.
"""

from __future__ import annotations

import threading
import time


class Clock:
    """A clock that stands still for a moment where the one that it reads goes back, and goes on from there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_s = self._ahead_s = 0.0
        self._now_s = 0.0

    def now_s(self) -> float:
        """Seconds since some moment."""
        with self._lock:
            read_s = time.monotonic()
            self._ahead_s += max(0.0, self._read_s - read_s)
            self._read_s = read_s
            self._now_s = max(self._now_s, read_s + self._ahead_s)  # the sum is rounded
            return self._now_s


now_s = Clock().now_s


def seconds(s: float) -> str:
    """``0.25 s``, ``7.1 s``, ``90 s``."""
    return f"{s:.2f} s" if s < 1 else f"{s:.1f} s" if s < 10 else f"{s:.0f} s"


def duration(s: float) -> str:
    """``40 s``, ``4 min``, ``2 h 10 min``, ``4.4 days``."""
    if s < 99.5:
        return f"{max(1, round(s))} s"
    minutes = round(s / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h" + (f" {rest} min" if rest else "")
    return f"{s / 86400:.1f} days"
