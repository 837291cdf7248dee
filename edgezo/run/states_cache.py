"""Where states of rows at a cut are kept between runs, and how much of the disk they may take."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from edgezo.errors import EdgezoError
from edgezo.machine.downloads import cache_dir
from edgezo.machine.open_files import files_inside, unlink_inside

STATES_NAMES = re.compile(r"[0-9a-f]{32}\.states")
MOST_CACHE_SHARE = (
    0.5  # of what is free or theirs: files that were used longest ago are removed beyond it
)


def states_folder() -> Path:
    """Where files of states lie. Raises EdgezoError for a user without a home directory."""
    return cache_dir() / "states"


def states_room_bytes() -> int | None:
    """What states may take of the disk, those that are there included; None where that cannot be told."""
    with suppress(OSError, EdgezoError):
        folder = states_folder()
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        there = sum(files_inside(folder, STATES_NAMES).values())
        return int(MOST_CACHE_SHARE * (shutil.disk_usage(existing).free + there))
    return None


def make_room(keep: Path) -> None:
    """Remove the files of states that were used longest ago, where all together take more than their share."""
    folder = keep.parent
    room = states_room_bytes()
    with suppress(OSError):
        sizes = files_inside(folder, STATES_NAMES)
        used = sorted(sizes, key=lambda name: os.lstat(folder / name).st_mtime)
        total = sum(sizes.values())
        for name in used:
            if room is None or total <= room or name == keep.name:
                continue
            unlink_inside(folder, name)
            total -= sizes[name]
