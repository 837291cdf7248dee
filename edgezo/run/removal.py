"""``edgezo rm``: a run's directory is removed if every file in it is provably edgezo's and no process writes there.

Each file is removed by its name, the marker last, and then the empty directory. So a removal that is interrupted is
given again, and a file that comes into the directory meanwhile stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import is_leftover, remove_leftovers
from edgezo.machine.open_files import (
    LOCK_SUFFIX,
    files_inside,
    locked,
    open_to_read,
    remove_files,
    unlink_inside,
)
from edgezo.machine.ownership import MARKER
from edgezo.run.claims import BOARD_NAMES, FORMS, check_ours
from edgezo.run.directory import PARENT_NAMES, RunFiles
from edgezo.run.given import GIVEN_MODEL, GIVEN_ROWS, names_of_given
from edgezo.weights.overlay_names import OVERLAY_NAMES

# The folders in a run's directory, and the names of the files in them.
FOLDERS = {"overlay": OVERLAY_NAMES, "parent": PARENT_NAMES, "tensorboard": BOARD_NAMES}
_CUT = re.compile(r"journal-cut-\d+(-\d+)?\.bin")  # bytes that a resume cut off, of any form


class Removable(NamedTuple):
    """A run's directory in which every file is edgezo's."""

    files: RunFiles
    names: list[str]
    size_bytes: int


def removable(folder: Path) -> Removable:
    """A run's directory that may be removed. Raises UsageError for any other, and EdgezoError where a run goes on."""
    if folder.is_symlink():
        raise UsageError(
            f"{folder} is a link. Name the directory itself: {os.path.realpath(folder)}."
        )
    files = RunFiles(check_ours(folder))
    names = os.listdir(folder)
    if MARKER not in names:
        raise UsageError(
            f"{folder} has no {MARKER}, by which edgezo knows a directory that it made. Nothing was removed. "
            "Remove it yourself."
        )
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder} holds the current directory. Change to another one (cd) first.")
    foreign = sorted(name for name in names if not _is_ours(folder, name))
    if foreign:
        shown = ", ".join(foreign[:3]) + (" and others" if len(foreign) > 3 else "")
        raise UsageError(
            f"{folder} holds files that edgezo did not write ({shown}). Nothing was removed. Move them elsewhere first."
        )
    with _nobody_writes(files):
        pass
    inside = [*(folder / name for name in names), *_in_folders(folder)]
    return Removable(files, names, sum(os.lstat(path).st_size for path in inside))


def remove(run: Removable) -> None:
    """Remove it. Raises EdgezoError where a run goes on there, or where it cannot be removed in full."""
    folder = run.files.path
    try:
        with _nobody_writes(run.files):
            for name in run.names:
                if (inside := _names_inside(folder, name)) is not None:
                    remove_leftovers(folder / name)
                    remove_files(folder / name, inside)
                elif name != MARKER:
                    unlink_inside(folder, name)
            unlink_inside(folder, MARKER)
        folder.rmdir()
    except OSError as problem:
        raise EdgezoError(
            f"{folder} could not be removed in full ({problem.strerror}). What is left is in it."
        ) from problem


def _is_ours(folder: Path, name: str) -> bool:
    """Whether a name is one of edgezo's; ``check_ours`` has looked at what those of ``FORMS`` hold."""
    path = folder / name
    if (inside := _names_inside(folder, name)) is not None:
        return all(map(is_leftover, set(os.listdir(path)) - files_inside(path, inside).keys()))
    if path.is_dir() and not path.is_symlink():
        return False
    return (
        name in FORMS
        or name == MARKER
        or is_leftover(name.removesuffix(LOCK_SUFFIX))
        or _CUT.fullmatch(name) is not None
    )


def _names_inside(folder: Path, name: str) -> re.Pattern[str] | None:
    """What the names of files match in a folder of edgezo's in a run's directory; None where it has no such folder."""
    if name in FOLDERS:
        return FOLDERS[name]
    return names_of_given(folder / name) if name in (GIVEN_ROWS, GIVEN_MODEL) else None


def _in_folders(folder: Path) -> list[Path]:
    """The files in the folders of a run's directory."""
    inside = {name: _names_inside(folder, name) for name in (*FOLDERS, GIVEN_ROWS, GIVEN_MODEL)}
    return [
        folder / name / file
        for name, names in inside.items()
        if names is not None
        for file in files_inside(folder / name, names)
    ]


@contextmanager
def _nobody_writes(files: RunFiles) -> Iterator[None]:
    """A block in which no run can go on in a directory. Raises EdgezoError where one does."""
    if not os.path.lexists(files.journal):
        yield
        return
    fd = open_to_read(files.journal)
    try:
        if not locked(fd):
            raise EdgezoError(
                f"{files.path} is in use: a process of edgezo's writes to its journal. Nothing was removed. "
                "Stop that run first (Ctrl-C)."
            )
        yield
    finally:
        os.close(fd)
