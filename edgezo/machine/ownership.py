"""The one gate before a directory is written to: it is absent, empty, or one that edgezo made.

A directory that edgezo made holds ``.edgezo``, a file of JSON that names its kind and format. Directories from before
there was such a file, and copies without it, are recognised by what only edgezo writes (``proof``). Any other directory
is refused before a byte in it has changed, so that no file of a user is ever overwritten or removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import (
    atomic_write,
    is_full,
    remove_abandoned,
    remove_leftovers,
    to_json,
    write_error,
)
from edgezo.machine.foreign import FAULTS
from edgezo.machine.open_files import open_to_read

MARKER = ".edgezo"
FORMAT = 1
SHOWN_NAMES = 3  # of a foreign directory's files, in the refusal
_NO_FORM: tuple[type[Exception], ...] = (*FAULTS, EdgezoError)  # what a test of a file may end with
_MARKER_BYTES = 1000  # more than any marker has


def claim(
    folder: Path,
    kind: str,
    proof: Callable[[Path], bool] = lambda folder: False,
    forms: Mapping[str, Callable[[Path], bool]] = {},
) -> None:
    """Make ``folder`` a directory of this kind, or find that it is one.

    ``proof`` says whether a directory without a marker is one all the same. ``forms`` has the names that may be
    replaced in a directory of this kind, each with a test of whether the file that is there is edgezo's: a marker may
    have come with a copy of other files. Raises UsageError for a directory with other files, or one of another kind,
    and EdgezoError where it cannot be made.
    """
    if os.path.isdir(folder):
        remove_abandoned(folder / MARKER)
    names = _names(folder)
    if names is None:
        _make(folder, folder)
        names = []
    if MARKER in names:
        made_as = kind_of(folder)
        if made_as != kind:
            what = "not readable" if made_as is None else f"of the kind {made_as!r}"
            raise UsageError(
                f"{folder} is a directory of edgezo's, but {what}, and this command writes a {kind!r} there. "
                "Nothing was changed. Give another --out."
            )
        _check_forms(folder, names, forms)
        remove_leftovers(folder)
        return
    if names and not proof(folder):
        others = sorted(names)
        shown = ", ".join(others[:SHOWN_NAMES])
        more = f" and {len(others) - SHOWN_NAMES} more" if len(others) > SHOWN_NAMES else ""
        raise UsageError(
            f"{folder} holds files that edgezo did not write ({shown}{more}). Nothing was changed. "
            "Give another --out: a new or an empty directory."
        )
    marker = to_json({"kind": kind, "format": FORMAT}) + "\n"
    atomic_write(folder / MARKER, marker.encode(), lock=True)


def check_made(
    folder: Path,
    kinds: Collection[str],
    proof: Callable[[Path], bool],
    forms: Mapping[str, Callable[[Path], bool]],
) -> list[str]:
    """The names in a directory that edgezo has made, of one of these kinds; nothing is made or changed.

    ``proof`` and ``forms`` are those of ``claim``. Raises UsageError for any other directory, or none.
    """
    names = _names(folder)
    if names is None:
        raise UsageError(f"{folder} is not there. edgezo runs lists the runs in a folder.")
    made_as = kind_of(folder) if MARKER in names else None
    if made_as not in kinds and (MARKER in names or not proof(folder)):
        raise UsageError(
            f"{folder} is no directory that edgezo made as a {' or a '.join(kinds)}. Nothing was changed."
        )
    _check_forms(folder, names, forms)
    return names


def _check_forms(
    folder: Path, names: list[str], forms: Mapping[str, Callable[[Path], bool]]
) -> None:
    """Raise UsageError where a file under a name of edgezo's is none of edgezo's."""
    for name in sorted(forms.keys() & set(names)):
        if not has_form(folder / name, forms):
            raise UsageError(
                f"{folder} is a directory of edgezo's, but {name} in it is no file that edgezo wrote, or is damaged. "
                "Nothing was changed. Put the file elsewhere, or name another directory."
            )


def has_form(file: Path, forms: Mapping[str, Callable[[Path], bool]]) -> bool:
    """Whether a file passes the test that ``forms`` has for its name."""
    try:
        return forms[file.name](file)
    except _NO_FORM:
        return False


def check_new(folder: Path) -> None:
    """Raise UsageError unless ``folder`` is absent or empty, EdgezoError where it cannot be made.

    The directories above it are made, so that what is in their way shows before the work that is to be written.
    """
    remove_abandoned(folder)
    names = _names(folder)
    if names is None:
        _make(folder, folder.parent)
    if names:
        raise UsageError(
            f"{folder} is there already. Nothing was changed. Give another --out, or remove it."
        )


def check_new_file(file: Path) -> None:
    """Raise UsageError where something is in the place of a file to write; else make its directory, or EdgezoError."""
    remove_abandoned(file)
    if os.path.lexists(file):
        raise UsageError(
            f"{file} exists already. Nothing was changed. Remove it, or give another name."
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        if is_full(problem):
            raise write_error(file.parent, "the directory", problem) from problem
        raise EdgezoError(
            f"{file} cannot be made: its directory is not there and cannot be made ({problem.strerror}). "
            "Give another name."
        ) from problem


def kind_of(folder: Path) -> str | None:
    """The kind that the marker of ``folder`` names; None without a marker that can be read."""
    try:
        with os.fdopen(open_to_read(folder / MARKER), "rb") as file:
            marker = json.loads(file.read(_MARKER_BYTES))
        kind, version = marker["kind"], marker["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kind if isinstance(kind, str) and version == FORMAT else None


def _names(folder: Path) -> list[str] | None:
    """The names in a directory; None where there is nothing. Raises EdgezoError for what is no directory."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        if folder.is_symlink():
            raise EdgezoError(
                f"{folder} is a link to nothing. Nothing was changed. Give another --out."
            ) from None
        return None
    except NotADirectoryError:
        raise EdgezoError(
            f"{folder} is a file, or lies below one, not a directory. Nothing was changed. Give another --out."
        ) from None
    except OSError as problem:
        raise EdgezoError(
            f"{folder} cannot be read ({problem.strerror}). Nothing was changed. Give another --out."
        ) from problem


def _make(folder: Path, made: Path) -> None:
    """Make ``made``: ``folder``, or the directories above it."""
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        if is_full(problem):
            raise write_error(folder, "the directory", problem) from problem
        raise EdgezoError(
            f"the directory {folder} cannot be made ({problem.strerror}). Give another --out."
        ) from problem
