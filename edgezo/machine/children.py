"""Processes that this one starts: each ends with it, whatever ends it, and leaves Ctrl-C to it.

``environment`` marks a child. edgezo/__init__.py calls ``end_with_parent`` in a process that is so marked, before
anything else is imported. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

PARENT = "EDGEZO_PARENT"  # the process id of the parent, in the environment of a child
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PARENT_LOOK_S = 1.0  # how often a child looks for its parent, where the system does not tell


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: this process's, with ``changes``, and the mark by which it ends with its parent."""
    return {**os.environ, PARENT: str(os.getpid()), **changes}


def command(module: str, *arguments: str) -> list[str]:
    """The command that calls ``main()`` of a module of edgezo, with nothing imported from the working directory."""
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.append({root!r}); from {module} import main; main()"
    return [sys.executable, "-P", "-X", "utf8", "-c", code, *arguments]


def end_with_parent(parent: int) -> None:
    """Let this process be killed when its parent ends, and leave Ctrl-C, which a terminal sends to both, to the parent.

    ``parent`` is the parent's process id: a parent that has ended before this call ends this process too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    elif hasattr(os, "getppid"):
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if hasattr(os, "getppid") and os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_LOOK_S)
    os._exit(1)


def address_space_bytes() -> int:
    """The size of this process's address space; 0 where the system does not tell it as Linux does."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def limit_memory(most_bytes: int) -> None:
    """Bound this process's address space: what goes beyond it is a MemoryError. Only Linux keeps such a bound."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, resource.RLIM_INFINITY))
