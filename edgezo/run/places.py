"""Where the files of a run are now: its base, its rows and its finetuner may have moved since it began.

What they are is known by their content, which the journal's header has. So a path is only where to look first: as it
was given, from the folder that the run began in, and from the folders around the run's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError, UsageError
from edgezo.network import cards
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import flag
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


def check_base_is_there(cfg: RunConfig, run: Path) -> None:
    """Raise EdgezoError, with the way out, where the base of a run is in none of the places that are known."""
    if os.path.exists(os.path.expanduser(cfg.model)) or not cards.is_unknown(cfg.model):
        return
    raise EdgezoError(
        f"{run} was trained over the model {cfg.model}, and there is no such file, folder or card.\n"
        f"If it has moved, say where it is now: edgezo finetune --resume --out {run} --model PATH. "
        "A run that is complete only notes the new place; its weights say whether it is the same model."
    )


def check_data_is_there(cfg: RunConfig, run: Path) -> None:
    """Raise UsageError, with the way out, where the rows of a run are in none of the places that are known."""
    for name in ("data", "data_root"):
        value = getattr(cfg, name)
        # A name as owner/name may be of the hub, which has an answer of its own.
        if value and not os.path.exists(os.path.expanduser(value)) and not _may_be_on_hub(value):
            raise UsageError(
                f"{run} was trained on the rows of {value}, and there is no such file or directory.\n"
                f"If they have moved, say where they are now with {flag(name)}; their content says whether they are "
                "the same."
            )


def _may_be_on_hub(value: str) -> bool:
    return not Path(value).suffix and value.count("/") >= 1 and not os.path.isabs(value)
