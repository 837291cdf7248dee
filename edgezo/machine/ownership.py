"""The one gate before a directory is written to: it is absent, empty, or one that edgezo made.

A directory that edgezo made holds ``.edgezo``, a file of JSON that names its kind and format. Directories from before
there was such a file, and copies without it, are recognised by what only edgezo writes (``proof``). Any other directory
is refused before a byte in it has changed, so that no file of a user is ever overwritten or removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_write, to_json

MARKER = ".edgezo"
FORMAT = 1
SHOWN_NAMES = 3  # of a foreign directory's files, in the refusal
_MARKER_BYTES = 1000  # more than any marker has


def claim(folder: Path, kind: str, proof: Callable[[Path], bool] = lambda folder: False) -> None:
    """Make ``folder`` a directory of this kind, or find that it is one.

    ``proof`` says whether a directory without a marker is one all the same. Raises UsageError for a directory with
    other files, or one of another kind, and EdgezoError where it cannot be made.
    """
    names = _names(folder)
    if names is None:
        _make(folder)
        names = []
    if MARKER in names:
        made_as = kind_of(folder)
        if made_as != kind:
            what = "not readable" if made_as is None else f"of the kind {made_as!r}"
            raise UsageError(
                f"{folder} is a directory of edgezo's, but {what}, and this command writes a {kind!r} there. "
                "Nothing was changed. Give another --out."
            )
        return
    if names and not proof(folder):
        others = sorted(names)
        shown = ", ".join(others[:SHOWN_NAMES])
        more = f" and {len(others) - SHOWN_NAMES} more" if len(others) > SHOWN_NAMES else ""
        raise UsageError(
            f"{folder} holds files that edgezo did not write ({shown}{more}). Nothing was changed. "
            "Give another --out: a new or an empty directory."
        )
    atomic_write(folder / MARKER, (to_json({"kind": kind, "format": FORMAT}) + "\n").encode())


def kind_of(folder: Path) -> str | None:
    """The kind that the marker of ``folder`` names; None without a marker that can be read."""
    try:
        with open(folder / MARKER, "rb") as file:
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


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise EdgezoError(
            f"the directory {folder} cannot be made ({problem.strerror}). Give another --out."
        ) from problem
