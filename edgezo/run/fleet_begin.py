"""The beginning of a fleet: a directory whose journal has a header and no records, for a server to go on with."""

from __future__ import annotations

from pathlib import Path

from edgezo.errors import UsageError
from edgezo.machine.files import atomic_write
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Meter
from edgezo.plan.config import RunConfig
from edgezo.run.claims import prepare
from edgezo.run.directory import RunFiles
from edgezo.run.fleet_settings import check_divisible
from edgezo.run.journal import create_journal
from edgezo.run.record_recipe import journal_is_shaped
from edgezo.run.session import header_of, open_request, settle


def begin_fleet(cfg: RunConfig) -> Path:
    """Write the journal's header in ``cfg.out``, for the base and settings of a request; returns the directory.

    The rows of the request show what task it is: its kind, its labels. Nobody trains on them. Raises UsageError for
    what a fleet cannot train, and as ``open_request`` and ``settle`` do.
    """
    if cfg.out is None:
        raise UsageError("a fleet needs out, a directory for its journal")
    check_divisible(cfg)
    files = RunFiles(Path(cfg.out))
    opened = open_request(cfg)
    planned = settle(opened, confirmed(machine()), Meter().mark("base").rss_bytes)
    prepare(files)
    atomic_write(files.config, planned.cfg.to_toml().encode())
    header = header_of(opened, planned.cfg)
    create_journal(files.journal, header, shaped=journal_is_shaped(planned.cfg)).close()
    return files.path
