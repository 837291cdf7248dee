"""The cache directory, and hashes of files that are remembered there."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """``EDGEZO_CACHE``, or ``edgezo`` in the user's cache directory of this platform."""
    if configured := os.environ.get("EDGEZO_CACHE"):
        return Path(configured).expanduser()
    home = Path.home()
    platform = {
        "darwin": home / "Library" / "Caches",
        "win32": Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"),
    }
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return platform.get(sys.platform, xdg) / "edgezo"


def file_sha256(file: Path) -> str:
    """SHA-256 (hex) of a file, remembered in the cache by path, size and times."""
    file = file.resolve()
    known = cache_dir() / "hashes" / hashlib.sha256(str(file).encode()).hexdigest()[:32]
    before = _stamp(file)
    try:
        remembered = json.loads(known.read_text(encoding="utf-8"))
        if remembered["stamp"] == before:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # A file written within the clock's grain of its time stamp could change again unnoticed.
    if _stamp(file) == before and time.time_ns() - max(before[1:]) > 2_000_000_000:
        with _ignoring_full_or_read_only_disk():
            known.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=known.parent, delete=False, encoding="utf-8"
            ) as out:
                json.dump({"stamp": before, "sha256": digest}, out)
            os.replace(out.name, known)
    return digest


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextmanager
def _ignoring_full_or_read_only_disk() -> Iterator[None]:
    """The remembered hash only saves time; not being able to keep it is no error."""
    try:
        yield
    except OSError:
        pass
