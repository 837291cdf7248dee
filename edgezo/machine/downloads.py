"""What is fetched from the Hugging Face hub, models and data sets; and edgezo's cache directory.

What was fetched once is taken from the hub's own cache without asking the network. Large files must have the hash that
the hub states. Code and pickles are never downloaded. Where there is no network, SourceError comes within seconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from glob import escape
from pathlib import Path

from edgezo.errors import EdgezoError, SourceError
from edgezo.machine.files import atomic_write, home, user_path

TIMEOUT_S = 5
MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = r"(?!\.+(?:/|$))[\w.-]+"  # not . or ..
DATA_ID = re.compile(rf"({_NAME}/{_NAME})((?:/{_NAME})*)")  # a repository, and a folder of it
# Patterns of file names. These lie beside the weights of a model:
BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    *("*.model", "tekken.json", "*.tiktoken"),  # vocabularies of other makes
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", *BESIDE_WEIGHTS)
MODEL_SKIPPED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.py")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_SHA256 = re.compile(r"[0-9a-f]{64}")


# ---------------------------------------------------------------------------------------------
# The cache directory, and hashes of files that are remembered there


_CACHES = {"darwin": ("Library", "Caches"), "win32": ("AppData", "Local")}  # in a user's home


def cache_dir() -> Path:
    """``EDGEZO_CACHE``, or ``edgezo`` in the user's cache directory of this platform.

    Raises EdgezoError for a user without a home directory, where EDGEZO_CACHE is not set.
    """
    if configured := os.environ.get("EDGEZO_CACHE"):
        return user_path(configured)
    if (xdg := _absolute("XDG_CACHE_HOME")) is not None and sys.platform not in _CACHES:
        return xdg / "edgezo"
    at_home = home()
    if at_home is None:
        raise EdgezoError(
            "This user has no home directory to keep edgezo's cache in. Set EDGEZO_CACHE to a directory that can be "
            "written (and HF_HOME to another one, if the model comes from the hub)."
        )
    if sys.platform == "win32" and (local := _absolute("LOCALAPPDATA")) is not None:
        return local / "edgezo"
    return at_home.joinpath(*_CACHES.get(sys.platform, (".cache",)), "edgezo")


def _absolute(variable: str) -> Path | None:
    """The directory that an environment variable names; None where it is not set or, against its rules, relative."""
    path = Path(os.environ.get(variable, ""))
    return path if path.is_absolute() else None


def check_hub_cache() -> None:
    """Raise Unreachable where the hub's client would keep what it fetches in a folder named ``~``."""
    places = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    if home() is None and not any(os.environ.get(place) for place in places):
        raise Unreachable(
            "this user has no home directory for the hub's cache; set HF_HOME to a directory that can be written"
        )


def file_sha256(file: Path) -> str:
    """SHA-256 (hex) of a file, remembered in the cache by the file's path, size and times. Raises OSError."""
    file = file.resolve()
    before = _stamp(file)
    try:
        known = cache_dir() / "hashes" / hashlib.sha256(os.fsencode(file)).hexdigest()[:32]
    except EdgezoError:  # no place to remember it
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        remembered = json.loads(known.read_text(encoding="utf-8"))
        if remembered["stamp"] == before:
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # A file written within the clock's resolution of its time stamp could change again unnoticed.
    if _stamp(file) == before and time.time_ns() - max(before[1:]) > 2_000_000_000:
        # A disk that is full or read-only is no error: a remembered hash only saves time. Written in place, so that a
        # kill leaves no other file: what is not whole is no JSON, and written again.
        with contextlib.suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            entry = {"stamp": before, "sha256": digest}
            if os.fsencode(file).decode(errors="replace") == str(file):  # else JSON cannot hold it
                entry["file"] = str(file)
            known.write_text(json.dumps(entry), encoding="utf-8")
    return digest


def known_files(sha256: str) -> Iterator[Path]:
    """Files with this SHA-256 (hex) that edgezo has read on this machine, and that are as they were then."""
    try:
        folder = cache_dir() / "hashes"
        names = sorted(os.listdir(folder))
    except (OSError, EdgezoError):
        return
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            remembered = json.loads((folder / name).read_text(encoding="utf-8"))
            file = Path(remembered["file"])
            if remembered["sha256"] == sha256 and remembered["stamp"] == _stamp(file):
                yield file


def _stamp(file: Path) -> list[int]:
    """Size and times of a file: another stamp means that it was written."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


# ---------------------------------------------------------------------------------------------
# The hub


class Unreachable(SourceError):
    """The hub gave no answer, or does not give out this repository."""


@dataclass(frozen=True)
class Repository:
    """A repository of models or data."""

    name: str  # owner/name
    kind: str = "model"  # "model" | "dataset"
    revision: str | None = None  # branch, tag or commit; None: the default branch

    def cached(self, names: Sequence[str], skipped: Sequence[str] = ()) -> Path | None:
        """Its folder in the hub's cache; None where files of these names (patterns) are known to be missing."""
        return self._snapshot(names, skipped, local_files_only=True)

    def fetch(self, choose: Callable[[Sequence[str]], list[str]]) -> tuple[Path, list[str]]:
        """Download the files that ``choose`` takes of all names: (folder, names taken).

        ``choose`` may refuse (SourceError). Raises SourceError, and OSError where the disk refuses.
        """
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
            raise Unreachable("HF_HUB_OFFLINE is set")
        check_hub_cache()
        from huggingface_hub import HfApi

        try:
            info = HfApi().repo_info(
                self.name, revision=self.revision, repo_type=self.kind, timeout=TIMEOUT_S
            )
            siblings = getattr(info, "siblings", None) or []
            chosen = choose([sibling.rfilename for sibling in siblings])
            snapshot = self._snapshot([escape(n) for n in chosen], (), local_files_only=False)
        except SourceError:
            raise
        except Exception as problem:  # the client's HTTP library raises exceptions of many types
            if isinstance(problem, OSError) and problem.errno in _DISK_ERRORS:
                raise
            raise Unreachable(first_line(problem)) from problem
        if snapshot is None or not all((snapshot / name).is_file() for name in chosen):
            raise SourceError("the download is incomplete")
        if bad := _damaged(snapshot / name for name in chosen):
            raise SourceError(f"{bad[0].name} does not have the hash that the hub states")
        return snapshot, chosen

    def _snapshot(
        self, names: Sequence[str], skipped: Sequence[str], *, local_files_only: bool
    ) -> Path | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    self.name,
                    repo_type=self.kind,
                    revision=self.revision,
                    allow_patterns=list(names),
                    ignore_patterns=list(skipped),
                    etag_timeout=TIMEOUT_S,
                    local_files_only=local_files_only,
                )
            )
        except (LocalEntryNotFoundError, HFValidationError) as problem:
            if local_files_only:
                return None
            raise SourceError(first_line(problem)) from problem


def model_files(names: Sequence[str]) -> list[str]:
    """The files of a repository that a model needs: safetensors, config, tokenizer. SourceError without weights."""
    taken = [n for n in names if any(fnmatch(n, p) for p in MODEL_FILES)]
    taken = [n for n in taken if not any(fnmatch(n, p) for p in MODEL_SKIPPED)]
    if not any(n.endswith(".safetensors") for n in taken):
        raise SourceError("it has no safetensors weights (pickled files are never loaded)")
    return taken


def dataset(name: str, suffixes: Sequence[str], tell: Callable[[str], None]) -> Path:
    """Local folder of a data set, ``owner/name`` or ``owner/name/folder``, with its files of these suffixes.

    Once fetched it is served from the hub's cache, so that a resumed run reads the same rows. ``tell`` is given lines
    for the user. Raises SourceError.
    """
    match = DATA_ID.fullmatch(name)
    if match is None:
        raise SourceError("a data set of the hub is owner/name or owner/name/folder")
    repository, folder = Repository(match[1], "dataset"), match[2].strip("/")
    choose = partial(_data_files, folder=folder, suffixes=suffixes)
    # Only the hub knows which files belong together: of a download that was cut off some are missing. And the hub's
    # cache may come to hold a newer commit under the same name. So the commit and its files are remembered.
    record = cache_dir() / "datasets" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    if (snapshot := _fetched_before(record, repository, tell)) is not None:
        return snapshot / folder
    tell(f"fetching {name} from the hub")
    try:
        fetched, chosen = repository.fetch(choose)
    except Unreachable as problem:
        # What another program has fetched, which may not be all.
        snapshot = repository.cached([f"{folder}/*{suffix}".strip("/") for suffix in suffixes])
        files = [] if snapshot is None else [p for p in snapshot.rglob("*") if p.is_file()]
        names = [str(p.relative_to(snapshot)) for p in files if snapshot is not None]
        try:
            chosen = choose(names)
        except SourceError:
            raise problem from None
        assert snapshot is not None
        tell(f"{problem}; the hub's cache has these files of {name}: {', '.join(chosen)}")
        return snapshot / folder
    with contextlib.suppress(OSError, EdgezoError):  # the record only saves asking the hub again
        record.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(record, json.dumps({"commit": fetched.name, "files": chosen}).encode())
    return fetched / folder


def _data_files(names: Sequence[str], *, folder: str, suffixes: Sequence[str]) -> list[str]:
    """Files of these suffixes in ``folder`` or its folder ``data``; SourceError where there are none."""
    places = {folder, f"{folder}/data".strip("/")}
    readable = [n for n in names if n.endswith(tuple(suffixes))]
    taken = [n for n in readable if n.rpartition("/")[0] in places]
    if not taken:
        others = sorted({n.rpartition("/")[0] for n in readable})
        raise SourceError(
            f"no {', '.join(suffixes)} file in {folder or 'its root'}"
            + (f"; folders with such files: {', '.join(others[:12])}" if others else "")
        )
    return taken


def _fetched_before(
    record: Path, repository: Repository, tell: Callable[[str], None]
) -> Path | None:
    """The folder in the hub's cache with all files of ``record``, undamaged; None where they have to be fetched."""
    try:
        known = json.loads(record.read_bytes())
        snapshot = replace(repository, revision=known["commit"]).cached(
            [escape(n) for n in known["files"]]
        )
        if snapshot is not None:
            files = [snapshot / n for n in known["files"]]
            if all(map(Path.is_file, files)) and sound(files, tell):
                return snapshot
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def sound(files: Iterable[Path], tell: Callable[[str], None]) -> bool:
    """Whether no file of the hub's cache is damaged. Damaged files are removed from it."""
    bad = _damaged(files)
    for file in bad:
        tell(f"{file.name} in the hub cache is damaged; fetching it again")
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    return not bad


def _damaged(files: Iterable[Path]) -> list[Path]:
    """Files whose SHA-256 is not the one under which the hub's cache stores them (it does so for large files)."""
    return [
        file
        for file in files
        if _SHA256.fullmatch(stored := file.resolve().name)
        and file_sha256(file.resolve()) != stored
    ]


def first_line(problem: object) -> str:
    """The first line of an error's text, at most 300 characters."""
    return str(problem).strip().split("\n", 1)[0][:300]
