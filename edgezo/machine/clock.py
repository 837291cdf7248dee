"""Seconds that never go back.

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
