"""Bytes to and from another process of this machine, over a Unix socket that only its user can open.

One connection is one request: its length u64 and itself, then the answer in the same form.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from edgezo.errors import EdgezoError, UsageError

_MESSAGE_SIZE = struct.Struct("<Q")
MOST_MESSAGE_BYTES = 1 << 26  # of a request or an answer
MOST_PATH_BYTES = 100  # of a socket's path; the kernels allow 103 to 107
WAITING = 8  # connections


def ask(path: Path, request: bytes) -> bytes:
    """The answer of the process that listens at ``path``. Raises EdgezoError where none does, or it ends meanwhile."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(str(path))
            link.sendall(_MESSAGE_SIZE.pack(len(request)) + request)
            return _received(link)
    except OSError as error:
        raise EdgezoError(
            f"nothing answers at {path} ({error.strerror or error}): start the process that listens there"
        ) from error


def listen(path: Path, answer: Callable[[bytes], bytes], goes_on: Callable[[], bool]) -> None:
    """Answer requests at ``path``, one after the other, until ``goes_on`` is false after one.

    A socket that is there from a process that was killed is replaced; any other file is refused. Raises UsageError,
    EdgezoError.
    """
    if len(os.fsencode(path)) > MOST_PATH_BYTES:
        raise UsageError(f"{path} has more than {MOST_PATH_BYTES} bytes: give a shorter path")
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"{path} is a file, and no socket: give another path")
        if _is_used(path):
            raise EdgezoError(f"{path}: another process listens there already")
        path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        except OSError as error:
            raise EdgezoError(f"{path}: no socket can be made ({error.strerror})") from error
        finally:
            os.umask(before)
        try:
            listening.listen(WAITING)
            while goes_on():
                link, _ = listening.accept()
                # Who asked may be gone, or send what is no request: the next one is answered all the same.
                with link, contextlib.suppress(OSError):
                    answered = answer(_received(link))
                    link.sendall(_MESSAGE_SIZE.pack(len(answered)) + answered)
        finally:
            path.unlink(missing_ok=True)


def _is_used(path: Path) -> bool:
    """Whether a process listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        try:
            link.connect(str(path))
        except OSError:
            return False
    return True


def _received(link: socket.socket) -> bytes:
    """One message. Raises OSError where it ends early, or is longer than any."""
    (size,) = _MESSAGE_SIZE.unpack(_exactly(link, _MESSAGE_SIZE.size))
    if size > MOST_MESSAGE_BYTES:
        raise OSError(f"{size} bytes are announced")
    return _exactly(link, size)


def _exactly(link: socket.socket, n_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < n_bytes:
        piece = link.recv(min(1 << 16, n_bytes - len(data)))
        if not piece:
            raise OSError(f"the other process ended after {len(data)} of {n_bytes} bytes")
        data += piece
    return bytes(data)
