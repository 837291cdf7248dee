"""Who watches a run: its display, and with ``--log-to`` a tracker beside it (trackers.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgezo.plan.config import RunConfig
from edgezo.run.directory import RunFiles
from edgezo.run.progress import RunProgress, Several


@contextmanager
def watching(cfg: RunConfig, files: RunFiles, progress: RunProgress) -> Iterator[RunProgress]:
    """``progress``, and with --log-to the tracker beside it. Raises UsageError where that is not installed."""
    if cfg.log_to == "none":
        yield progress
        return
    from edgezo.run.trackers import (
        TrackerLog,
    )  # its imports take memory, which only then is planned

    log = TrackerLog(cfg.log_to, files, progress.note)
    try:
        yield Several([progress, log])
    finally:
        log.end()
