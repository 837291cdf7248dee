"""Writing files so that each is whole or absent; JSON; and the error for a disk that refuses a write."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine.open_files import LOCK_SUFFIX, abandoned, lock_beside

_TEMP_SUFFIX = ".edgezo-tmp"
_TEMP_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}" + re.escape(_TEMP_SUFFIX), re.DOTALL)


def user_path(name: str) -> Path:
    """The path that a user gives. ``~`` is the home directory; where there is none, a name as any other."""
    return Path(os.path.expanduser(name))


def home() -> Path | None:
    """The user's home directory; None for a user without one, as in a container that runs under a bare number."""
    path = user_path("~")
    return path if path.is_absolute() else None


def atomic_write(path: Path, data: bytes, *, lock: bool = False) -> None:
    """Write a file so that at any moment ``path`` is the old file or the whole new one. Raises EdgezoError.

    A link that is there is replaced by the file; what it leads to stays as it is. ``lock``: see ``atomic_path``.
    """
    with atomic_path(path, lock=lock) as temp, open(temp, "xb") as file:
        file.write(data)


@contextlib.contextmanager
def atomic_path(path: Path, *, lock: bool = False) -> Iterator[Path]:
    """A temporary file name beside ``path`` to write to, for writers that take a file name (safetensors).

    If the block succeeds, the file is synced to disk and renamed to ``path``; if it raises, the file is removed. An
    OSError of the block becomes EdgezoError, with the free space if the disk is full. A kill -9 inside the block leaves
    the temporary file: in a directory of edgezo's ``remove_leftovers`` finds it; elsewhere it needs a ``lock``, by
    which the next write of ``path`` knows that it may remove it.
    """
    with _in_place_of(path, path.name, lock=lock) as temp:
        yield temp
        _fsync(temp)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary directory to fill, as ``atomic_path``: ``path`` is as before, absent or empty, or has all files.

    It has a lock, and what a killed process left beside it is removed first.
    """
    with _in_place_of(path, "the directory", lock=True) as temp:
        temp.mkdir()
        yield temp
        for file in temp.iterdir():
            _fsync(file)
        if path.is_dir():
            path.rmdir()


@contextlib.contextmanager
def _in_place_of(path: Path, what: str, *, lock: bool) -> Iterator[Path]:
    """A temporary name that takes the place of ``path`` after the block; ``what`` names it in an error."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMP_SUFFIX}")
    with contextlib.ExitStack() as at_end:
        try:
            if lock:
                path.parent.mkdir(parents=True, exist_ok=True)
                remove_abandoned(path)
                at_end.enter_context(lock_beside(temp))
            yield temp
            os.replace(temp, path)
            with contextlib.suppress(
                OSError
            ):  # Windows and some network file systems cannot sync a directory
                _fsync(path.parent)
        except BaseException as error:
            _discard(temp)
            cause = _os_error(error)
            if cause is None:
                raise
            raise write_error(path, what, cause) from error


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files and directories that killed processes left beside ``path``: they have a lock."""
    try:
        locks = list(path.parent.glob(f".*{_TEMP_SUFFIX}{LOCK_SUFFIX}"))
    except OSError:  # whoever writes there says so
        return
    for lock in locks:
        leftover = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
        name = _TEMP_NAME.fullmatch(leftover.name)
        if name is not None and name[1] == path.name and not leftover.is_symlink():
            with abandoned(lock) as is_abandoned:
                if is_abandoned:
                    _discard(leftover)


def _discard(temp: Path) -> None:
    if temp.is_dir():
        shutil.rmtree(temp, ignore_errors=True)  # links in it are not followed
        return
    with contextlib.suppress(OSError):
        temp.unlink()


def remove_leftovers(directory: Path) -> int:
    """Delete the temporary files that a killed process left in ``directory``; returns how many there were.

    Links and folders that are called so stay. No other process may write there meanwhile (the journal, open for a
    resume, is locked).
    """
    removed = 0
    for temp in list(directory.glob(f".*{_TEMP_SUFFIX}")):
        if is_leftover(temp.name) and temp.is_file() and not temp.is_symlink():
            with contextlib.suppress(OSError):  # it may stay
                temp.unlink()
                removed += 1
    return removed


def is_leftover(name: str) -> bool:
    """Whether a file of this name is a temporary one that a killed process left."""
    return _TEMP_NAME.fullmatch(name) is not None


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def _os_error(error: BaseException) -> OSError | None:
    """``error`` as an OSError, if it is one. safetensors, written in Rust, has the number only in its message."""
    if isinstance(error, OSError):
        return error
    match = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of room: on the disk, in the quota or in the file."""
    return error.errno in _FULL


def write_error(path: Path, what: str, error: OSError) -> EdgezoError:
    """The error for a failed write of ``what``: why, the free space if the disk is full, and what to do next."""
    if not is_full(error):
        return EdgezoError(
            f"{path}: {what} could not be written ({error.strerror or error}). Check that the "
            "directory exists and is writable, or choose another --out."
        )
    try:
        there = next(folder for folder in path.parents if folder.exists())
        free = f"{shutil.disk_usage(there).free:,} bytes are free"
    except OSError:
        free = "free space unknown"
    return EdgezoError(
        f"{path}: {what} could not be written, the disk, the quota or the file size limit is full "
        f"({error.strerror or error}; {free}). Nothing half-written is kept. Free some space and "
        "give the command again; a run goes on with --resume."
    )


def to_json(value: Any) -> str:
    """One line of strict JSON. NaN and Inf become null."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
