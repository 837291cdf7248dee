"""Files that edgezo writes to in place, in a directory that somebody else may have made: no link leads out of it.

A run directory is sent from one machine to another, and may hold links. A file that is replaced (files.atomic_write)
takes a link's place and leaves alone where it led. A file that is written or cut in place is opened here:

    the last names of its path      are no links, neither the file nor the folders between it and the run directory
    the file                        is a regular file with one name, so that no other name's bytes change

Whatever else is there raises EdgezoError before a byte has changed. The directory itself, which a user names, may be a
link. A folder is removed only where a lock beside it proves that a process of edgezo's made it, and that it has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgezo.errors import EdgezoError

try:
    import fcntl
except ImportError:  # Windows: no lock against a second writer there
    fcntl = None  # type: ignore[assignment]

# The end of the name of a lock: an empty file beside a temporary folder, locked by the process that made both.
LOCK_SUFFIX = ".lock"
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

    Those that killed processes left there are removed first: folders, no links, that hold such files and nothing else,
    and have a lock that no process has. Raises OSError.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for lock in list(parent.glob(f"*{LOCK_SUFFIX}")):
        folder = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
        if not os.path.lexists(folder) or _holds_only(folder, names):
            with abandoned(lock) as is_abandoned:
                if is_abandoned:
                    remove_files(folder, names)
    folder = parent / secrets.token_hex(8)
    with lock_beside(folder):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:  # this process made it; links in it are not followed
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def lock_beside(folder: Path) -> Iterator[None]:
    """A lock beside a folder that is made and removed, or renamed, in the block: by it later processes know its state.

    The lock is there before the folder is and after it is gone, so that a kill at any moment leaves no folder without
    one. Raises OSError.
    """
    path = folder.with_name(folder.name + LOCK_SUFFIX)
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE, 0o600)
    try:
        locked(lock)
        if not _is_at(
            lock, path
        ):  # another process took it for an abandoned one before it was locked
            raise OSError(errno.EAGAIN, "another process writes there", str(folder))
        yield
    finally:
        if _is_at(lock, path):
            with contextlib.suppress(OSError):  # it may stay: the next one removes it
                path.unlink()
        os.close(lock)


@contextlib.contextmanager
def abandoned(lock: Path) -> Iterator[bool]:
    """Whether a lock is the empty file of a process that has ended. It is then removed after the block."""
    fd = -1
    try:
        with contextlib.suppress(OSError, EdgezoError):
            fd = open_inside(lock, os.O_RDWR)
        is_abandoned = fd >= 0 and os.fstat(fd).st_size == 0 and locked(fd) and _is_at(fd, lock)
        yield is_abandoned
        folder = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
        if is_abandoned and not os.path.lexists(folder):
            with contextlib.suppress(OSError):
                lock.unlink()
    finally:
        if fd >= 0:
            os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        there, ours = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


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
