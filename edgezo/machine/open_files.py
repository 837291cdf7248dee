"""Files that edgezo writes to in place, in a directory that somebody else may have made: no link leads out of it.

A run directory is sent from one machine to another, and may hold links. A file that is replaced (files.atomic_write)
takes a link's place and leaves alone where it led. A file that is written or cut in place is opened here:

    the last names of its path      are no links, neither the file nor the folders between it and the run directory
    the file                        is a regular file with one name, so that no other name's bytes change

Whatever else is there raises EdgezoError before a byte has changed. The directory itself, which a user names, may be a
link. A folder is removed only where a lock in it proves that a process of edgezo's made it, and that it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgezo.errors import EdgezoError

try:
    import fcntl
except ImportError:  # Windows: no lock against a second writer there
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"  # the file of a temporary folder that the process which made it has locked
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_FILE = (
    getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)  # a pipe is refused at once, whether or not somebody reads it
)
# Windows opens no file relative to an open folder: there a link is refused by its path.
_BY_FOLDER = os.open in os.supports_dir_fd and bool(_NO_LINK)
# What open says of a link or a folder where a file belongs, and of anything but a folder on the way to it.
_NO_FILE = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)


# ---------------------------------------------------------------------------------------------
# Files


def open_inside(path: Path, flags: int, *, levels: int = 1, mode: int = 0o666) -> int:
    """Open a file that is read, written or made in place; returns its descriptor. It is never emptied here.

    ``flags`` are those of ``os.open`` without ``O_TRUNC``. ``levels``: so many of the last names of ``path`` are no
    links: 1 for a file of a directory, 2 for one in a folder of it. ``mode`` is that of a file that is made.
    Raises EdgezoError for what is no regular file with one name inside its directory, else OSError.
    """
    try:
        fd = _open(path, flags | _FILE, levels, mode)
    except OSError as problem:
        if problem.errno in _NO_FILE:
            raise _foreign(path, levels) from problem
        raise
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            raise _foreign(path, levels)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_to_read(path: Path) -> int:
    """Open a regular file, or a link to one, for reading; returns its descriptor.

    Raises OSError; for a pipe, a device or a folder too, and at once.
    """
    fd = os.open(path, os.O_RDONLY | _FILE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return fd


def check_inside(path: Path, *, levels: int = 1) -> None:
    """Raise EdgezoError, and change nothing, where ``open_inside`` would refuse a file that is there."""
    with contextlib.suppress(OSError):  # not there, or not ours to read: whoever opens it says so
        os.close(open_inside(path, os.O_RDONLY, levels=levels))


def check_replaced(path: Path) -> None:
    """Raise EdgezoError where a folder is in the place of a file that edgezo replaces or removes."""
    if path.is_dir() and not path.is_symlink():
        raise _foreign(path, 1)


def locked(file: int | BinaryIO) -> bool:
    """Lock an open file for this process until it is closed; False if another process has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks
    return True


# ---------------------------------------------------------------------------------------------
# Folders


def make_folder(folder: Path) -> None:
    """Make a folder, and the directory that it is in. Raises EdgezoError where it is a link or a file, or OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raise EdgezoError where ``folder`` is there and no folder, but a link to one for example."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise _foreign(folder, 1)


def files_inside(folder: Path, names: re.Pattern[str]) -> dict[str, int]:
    """Bytes of the regular files of a folder whose names match, by name; {} without the folder.

    Raises EdgezoError where the folder is a link, or OSError.
    """
    check_folder(folder)
    sizes = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if names.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    return sizes


def remove_files(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the regular files of a folder whose names match, and the folder if nothing else is in it.

    Links and folders in it stay as they are. Raises EdgezoError where the folder itself is a link.
    """
    with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
        for name in files_inside(folder, names):
            unlink_inside(folder, name)
        folder.rmdir()


def unlink_inside(folder: Path, name: str) -> None:
    """Remove a file, or a link in its place, from a folder that is no link. Raises OSError."""
    if not _BY_FOLDER:
        (folder / name).unlink()
        return
    inner = os.open(folder, _DIRECTORY | _NO_LINK)
    try:
        os.unlink(name, dir_fd=inner)
    finally:
        os.close(inner)


@contextlib.contextmanager
def temporary_folder(parent: Path, names: re.Pattern[str]) -> Iterator[Path]:
    """A folder in ``parent`` for files whose names match, removed after the block.

    Those that killed processes left there are removed first: folders, no links, that hold such files and a lock that
    no process has, and nothing else. Raises OSError.
    """
    parent.mkdir(parents=True, exist_ok=True)
    ours = re.compile(f"{names.pattern}|{LOCK}")
    for abandoned in list(parent.iterdir()):
        if _holds_only(abandoned, ours) and is_abandoned(abandoned):
            remove_files(abandoned, ours)
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        with locked_folder(folder):
            yield folder
    finally:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # this process made it; links in it are not followed


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock the file ``LOCK`` in a new folder during the block: later processes know by it whether the folder is in use.

    The file stays.
    """
    hidden = folder / f".{LOCK}"
    lock = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, 0o600)
    try:
        locked(lock)  # before it has its name: whoever sees it there sees it locked
        hidden.rename(folder / LOCK)
        yield
    finally:
        os.close(lock)


def is_abandoned(folder: Path) -> bool:
    """Whether ``folder`` is no link, and has the lock of a process that has ended."""
    try:
        lock = open_inside(folder / LOCK, os.O_RDWR, levels=2)
    except (OSError, EdgezoError):
        return False
    try:
        return locked(lock)
    finally:
        os.close(lock)


def _holds_only(folder: Path, names: re.Pattern[str]) -> bool:
    """Whether all that ``folder`` holds are regular files whose names match."""
    try:
        check_folder(folder)
        with os.scandir(folder) as entries:
            return all(
                names.fullmatch(e.name) and e.is_file(follow_symlinks=False) for e in entries
            )
    except (OSError, EdgezoError):
        return False


# ---------------------------------------------------------------------------------------------


def _open(path: Path, flags: int, levels: int, mode: int) -> int:
    """``os.open`` that follows no link among the last ``levels`` names of ``path``. Raises OSError."""
    if not _BY_FOLDER:
        if any(place.is_symlink() for place in (path, *path.parents)[:levels]):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return os.open(path, flags, mode)
    names = path.parts[-levels:]
    parent = os.open(Path(*path.parts[: -len(names)]), _DIRECTORY)
    try:
        for name in names[:-1]:
            inner = os.open(name, _DIRECTORY | _NO_LINK, dir_fd=parent)
            os.close(parent)
            parent = inner
        return os.open(names[-1], flags | _NO_LINK, mode, dir_fd=parent)
    finally:
        os.close(parent)


def _foreign(path: Path, levels: int) -> EdgezoError:
    """The error for what is there in place of a file of edgezo's, or of a folder on the way to it."""
    place, what = path, "not to be opened"
    for place in reversed((path, *path.parents)[:levels]):
        try:
            state = os.lstat(place)
        except OSError:
            break
        if stat.S_ISLNK(state.st_mode):
            what = f"a link to {os.readlink(place)}"
            break
        if stat.S_ISREG(state.st_mode):
            names = f" with {state.st_nlink} names (hard links)" if state.st_nlink > 1 else ""
            what = f"a file{names}"
        elif not stat.S_ISDIR(state.st_mode):
            what = "no regular file"
        elif place == path:
            what = "a folder"
        else:
            continue
        break
    return EdgezoError(
        f"{place} is {what}, where edgezo writes something of its own. Nothing was changed, there or where it leads.\n"
        "If it belongs there, put a copy in its place; else remove it. Then give the command again."
    )
