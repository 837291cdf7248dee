"""Repositories of the Hugging Face hub: models and data sets.

What was fetched once is taken from the hub's own cache without a word to the network; large files must have the hash
that the hub states. Nothing that is code or a pickle is downloaded. SourceError comes within seconds where there is no
network.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from edgezo.errors import EdgezoError, SourceError
from edgezo.machine.cache import cache_dir, file_sha256
from edgezo.machine.files import atomic_write

TIMEOUT_S = 5
MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = r"(?!\.+(?:/|$))[\w.-]+"  # not . or ..
DATA_ID = re.compile(rf"({_NAME}/{_NAME})((?:/{_NAME})*)")  # a repository, and a folder of it
BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", *BESIDE_WEIGHTS)
MODEL_SKIPPED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.py")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Unreachable(SourceError):
    """The hub gave no answer, or not this repository."""


@dataclass(frozen=True)
class Repository:
    """A repository of models or data."""

    name: str  # owner/name
    kind: str = "model"  # "model" | "dataset"
    revision: str | None = None

    def cached(self, names: Sequence[str], skipped: Sequence[str] = ()) -> Path | None:
        """Its folder in the hub's cache; None if files of these names (patterns) are known to be missing."""
        return self._snapshot(names, skipped, local_files_only=True)

    def fetch(self, choose: Callable[[Sequence[str]], list[str]]) -> tuple[Path, list[str]]:
        """Its folder with the files that ``choose`` takes of all names, and these; it may refuse (SourceError)."""
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
            raise Unreachable("HF_HUB_OFFLINE is set")
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
        except Exception as problem:  # the client's HTTP library raises types of its own
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
    """Safetensors, config and tokenizer; SourceError without weights."""
    taken = [n for n in names if any(fnmatch(n, p) for p in MODEL_FILES)]
    taken = [n for n in taken if not any(fnmatch(n, p) for p in MODEL_SKIPPED)]
    if not any(n.endswith(".safetensors") for n in taken):
        raise SourceError("it has no safetensors weights (pickled files are never loaded)")
    return taken


def dataset(name: str, suffixes: Sequence[str], tell: Callable[[str], None]) -> Path:
    """Local folder of a data set, ``owner/name`` or ``owner/name/folder``, with its files of these suffixes.

    Once fetched it is served from the hub's cache, so that a run that goes on reads the same rows. Raises SourceError.
    """
    match = DATA_ID.fullmatch(name)
    if match is None:
        raise SourceError("a data set of the hub is owner/name or owner/name/folder")
    repository, folder = Repository(match[1], "dataset"), match[2].strip("/")

    def choose(names: Sequence[str]) -> list[str]:
        places = {folder, f"{folder}/data".strip("/")}
        readable = [n for n in names if n.endswith(tuple(suffixes))]
        taken = [n for n in readable if n.rpartition("/")[0] in places]
        if not taken:
            held = sorted({n.rpartition("/")[0] for n in readable})
            raise SourceError(
                f"no {', '.join(suffixes)} file in {folder or 'its root'}"
                + (f"; folders with such files: {', '.join(held[:12])}" if held else "")
            )
        return taken

    # Which files belong together is known to the hub only: of a download that was cut off some are missing. And the
    # hub's cache may come to know a newer commit by the same name.
    whole = cache_dir() / "datasets" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(whole.read_bytes())
        then = replace(repository, revision=known["commit"])
        snapshot = then.cached([escape(n) for n in known["files"]])
        if snapshot is not None:
            files = [snapshot / n for n in known["files"]]
            if all(map(Path.is_file, files)) and sound(files, tell):
                return snapshot / folder
    except (OSError, ValueError, TypeError, KeyError):
        pass  # fetched again
    tell(f"fetching {name} from the hub")
    try:
        fetched, chosen = repository.fetch(choose)
    except Unreachable as problem:  # what another program has fetched, which may not be all
        snapshot = repository.cached([f"{folder}/*{suffix}".strip("/") for suffix in suffixes])
        held = [] if snapshot is None else [p for p in snapshot.rglob("*") if p.is_file()]
        names = [str(p.relative_to(snapshot)) for p in held if snapshot is not None]
        try:
            chosen = choose(names)
        except SourceError:
            raise problem from None
        assert snapshot is not None
        tell(f"{problem}; of {name} the hub cache holds {', '.join(chosen)}")
        return snapshot / folder
    with contextlib.suppress(
        OSError, EdgezoError
    ):  # as a remembered hash, it only saves asking again
        whole.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(whole, json.dumps({"commit": fetched.name, "files": chosen}).encode())
    return fetched / folder


def sound(files: Iterable[Path], tell: Callable[[str], None]) -> bool:
    """Whether no file of the hub's cache is damaged; those that are, are removed."""
    bad = _damaged(files)
    for file in bad:
        tell(f"{file.name} in the hub cache is damaged; fetching it again")
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    return not bad


def _damaged(files: Iterable[Path]) -> list[Path]:
    """Those whose bytes do not have the SHA-256 under which the hub cache keeps them (large ones)."""
    return [
        file
        for file in files
        if _SHA256.fullmatch(stored := file.resolve().name)
        and file_sha256(file.resolve()) != stored
    ]


def first_line(problem: object) -> str:
    return str(problem).strip().split("\n", 1)[0][:300]
