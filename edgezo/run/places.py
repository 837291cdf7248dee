"""Where the files of a run are now: its base, its rows and its finetuner may have moved since it began.

What they are is known by their content, which the journal's header has. So a path is only where to look first: as it
was given, from the folder that the run began in, and from the folders around the run's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgezo.data.sources import ReadFor
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import user_path
from edgezo.machine.foreign import read_json
from edgezo.machine.hardware import format_bytes
from edgezo.network import cards
from edgezo.network.onnx_manifest import is_trainable_export, open_manifest
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import flag
from edgezo.plan.request import read_run_config
from edgezo.run.given import GIVEN_MODEL, GIVEN_ROWS

PLACES = ("model", "data", "data_root", "finetuner")  # settings that may be paths


def with_beginning(cfg: RunConfig) -> RunConfig:
    """The request of a new run with the folder that it begins in, where its paths start from there."""
    relative = (
        value
        for name in PLACES
        if (value := getattr(cfg, name)) and not os.path.isabs(value) and os.path.exists(value)
    )
    here = os.getcwd()
    is_text = os.fsencode(here).decode(errors="replace") == here  # else config.toml cannot hold it
    return replace(cfg, began_in=here) if is_text and any(relative) else cfg


def given_now(cfg: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The request of a resume: paths that are given with it start from this folder, not from the run's first one."""
    if cfg.began_in in (None, os.getcwd()):
        return cfg
    here = {name: os.path.abspath(cfg_path) for name, cfg_path in _paths(cfg) if given.get(name)}
    return _moved(cfg, {name: path for name, path in here.items() if os.path.exists(path)})


def found_again(cfg: RunConfig, run: Path) -> RunConfig:
    """The configuration of a run with the places where its files are now; others stay as they are."""
    places = {}
    for name, value in _paths(cfg):
        if name == "model" and cards.find_card(value) is not None:
            continue
        places[name] = next(
            (place for place in _candidates(value, cfg, run) if os.path.exists(place)), value
        )
    return _moved(cfg, places)


def _paths(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    for name in PLACES:
        if value := getattr(cfg, name):
            yield name, value


def _moved(cfg: RunConfig, places: Mapping[str, Any]) -> RunConfig:
    return replace(cfg, **places) if places else cfg


def _candidates(value: str, cfg: RunConfig, run: Path) -> Iterator[str]:
    """Where a path of a run may be now, the likeliest first."""
    first, name = cfg.began_in or os.getcwd(), os.path.expanduser(value)
    if Path(name).name in (GIVEN_ROWS, GIVEN_MODEL):  # they lie in the run's own directory
        yield str(run / Path(name).name)
    if os.path.isabs(name):
        yield value
        if not Path(name).is_relative_to(first):
            return
        name = os.path.relpath(name, first)  # the run may have moved together with it
    if first == os.getcwd():
        yield value
    for folder in (Path(first), Path.cwd(), *run.resolve().parents):
        yield str(folder / name)


def at_base(cfg: RunConfig, base: str | None) -> RunConfig:
    """``cfg`` with the base where a user says that it is now; None: as it is."""
    return cfg if base is None else replace(cfg, model=base)


def uses_graphs(run: Path, base: str | None) -> bool:
    """Whether a run is used on ONNX Runtime: over graphs that ``base`` names, or as one of that engine."""
    if base is not None:
        return is_trainable_export(user_path(base))
    file = run / "config.toml"
    return file.is_file() and read_run_config(file).engine == "onnx"


def for_torch(cfg: RunConfig) -> RunConfig:
    """The configuration of a run of any engine, for use with torch: over the base that its graphs were written from.

    A journal means the same on every engine. Raises EdgezoError for graphs without a manifest.
    """
    if cfg.engine == "torch":
        return cfg
    model = cfg.model
    if is_trainable_export(user_path(model)):
        model = open_manifest(user_path(model)).base
    return replace(cfg, engine="torch", provider="cpu", model=model)


def with_base(
    cfg: RunConfig, run: Path, note: Callable[[str], None] = lambda text: None
) -> RunConfig:
    """The configuration of a run, or a request to use it, with its base where that is on this machine.

    Where the place that it names is empty, a model of the same content that edgezo has read before is taken; ``note``
    gets a sentence then. Raises EdgezoError, with what is looked for and the way out, where there is none.
    """
    if os.path.exists(os.path.expanduser(cfg.model)) or not cards.is_unknown(cfg.model):
        return cfg
    sha256 = _content_hash(run)
    if sha256 is not None and (place := cards.with_content(sha256)) is not None:
        note(f"the base of {run} is {place}, by its content")
        return replace(cfg, model=str(place))
    raise EdgezoError(
        f"{run} was trained over the model {cfg.model}, and there is no such file, folder or card."
        f"{_looked_for(run, sha256)}\n"
        f"If it has moved, say where it is now: --base PATH. Or once for all: edgezo finetune --resume --out {run} "
        "--model PATH, which of a run that is complete only notes the new place. Its weights say whether it is the "
        "same model."
    )


def _content_hash(run: Path) -> str | None:
    """The SHA-256 of the base's weights, by the journal of a run; None without a journal that can be read."""
    from edgezo.run.journal_header import (
        read_head_of,
    )  # it imports torch, whose threads may not be set yet

    try:
        with open(run / "journal.bin", "rb") as file:
            return str(read_head_of(file, run / "journal.bin").header["content_hash"])
    except (OSError, EdgezoError):
        return None


def _looked_for(run: Path, sha256: str | None) -> str:
    """What is known of a base that is missing."""
    if sha256 is None:
        return ""
    about = sources_of(run).get("base", {})
    text = f"\nIts weights have the SHA-256 {sha256}"
    if isinstance(about, dict) and isinstance(about.get("bytes"), int):
        text += f", and {format_bytes(about['bytes'])} as {about.get('name')}"
    card = cards.card_with_content(sha256)
    return text + (f": those of the card {card.name} (--base {card.name})." if card else ".")


def sources_of(run: Path) -> dict[str, Any]:
    """What plan.json says of the files that a run began with: their names and sizes; {} where it says nothing."""
    try:
        about = read_json(run / "plan.json")
    except EdgezoError:
        return {}
    sources = about.get("sources") if isinstance(about, dict) else None
    return sources if isinstance(sources, dict) else {}


def check_data_is_there(cfg: RunConfig, run: Path) -> None:
    """Raise UsageError, with the way out, where the rows of a run are in none of the places that are known."""
    for name in ("data", "data_root"):
        value = getattr(cfg, name)
        # A name as owner/name may be of the hub, which has an answer of its own.
        if value and not os.path.exists(os.path.expanduser(value)) and not _may_be_on_hub(value):
            about, rows = sources_of(run).get("data"), ""
            if isinstance(about, dict):
                counts = [about.get(name) for name in ("trained", "evaluated")]
                rows = "\nThey are {} rows to train on and {} to evaluate on.".format(*counts)
            raise UsageError(
                f"{run} was trained on the rows of {value}, and there is no such file or directory.{rows}\n"
                f"If they have moved, say where they are now with {flag(name)}; their content says whether they are "
                "the same."
            )


def rows_are_new(cfg: RunConfig, saved: RunConfig | None) -> bool:
    """Whether a request names rows by ``--data`` that are not those that a run was trained on.

    ``saved`` is the configuration of the run as ``found_again`` gives it, None of a plain model. Where the place of the
    run's rows is empty, any rows may be those, moved and renamed: then no training row is to be taken for a new one.
    """
    if cfg.data is None or saved is None or saved.data is None:
        return cfg.data is not None
    was, now = user_path(saved.data), user_path(cfg.data)
    return was.exists() and not (now.exists() and was.samefile(now))


def rows_to_evaluate(cfg: RunConfig, saved: RunConfig | None, words: tuple[str, ...]) -> ReadFor:
    """What an evaluation reads its rows for. ``saved``: as of ``rows_are_new``; ``words``: as of ``ReadFor``."""
    return ReadFor(training=False, whole=rows_are_new(cfg, saved), words=words)


def _may_be_on_hub(value: str) -> bool:
    return not Path(value).suffix and value.count("/") >= 1 and not os.path.isabs(value)
