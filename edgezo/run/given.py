"""Rows and a model that a program gives as objects: they are kept in the run's directory, so that the run stands alone.

    given-rows/     train.jsonl, and what is evaluated on (validation.jsonl or test.jsonl)
    given-model/    a Hugging Face directory: config, tokenizer and safetensors

Each folder appears whole or not at all, with a list of its files and their SHA-256. By that list a folder is known to
be edgezo's (claims.py), and is removed with its run.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from edgezo.errors import UsageError
from edgezo.machine.downloads import cache_dir, file_sha256
from edgezo.machine.files import atomic_folder, write_error
from edgezo.machine.foreign import clip, parse_json, read_small
from edgezo.machine.open_files import check_folder, files_inside, remove_files, temporary_folder

GIVEN_ROWS, GIVEN_MODEL = "given-rows", "given-model"  # folders in a run's directory
EVALUATED = ("validation", "test")  # splits that a run may be evaluated on, the first that there is
_LIST = ".given"  # in such a folder: its files and their SHA-256
_MOST_LIST_BYTES = 1 << 20
_ROW_FILES = re.compile(r"(train|validation|test)\.jsonl")

Rows = Iterable[Mapping[str, Any]]


# ---------------------------------------------------------------------------------------------
# Rows


def splits_of(data: Any, validation: Rows | None) -> dict[str, Rows]:
    """The rows of each split: of a ``DatasetDict``, or of what gives rows one after the other.

    Raises UsageError for data without training rows, and for validation rows that are given twice.
    """
    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    if "train" not in splits:
        names = clip(", ".join(map(str, splits)), 200)
        raise UsageError(
            f"data has the splits {names}, and none is called train. Give data['...']."
        )
    if validation is not None:
        splits = {"train": splits["train"], EVALUATED[0]: validation}
    return {name: splits[name] for name in ("train", *EVALUATED) if name in splits}


def keep_rows(folder: Path, splits: Mapping[str, Rows]) -> None:
    """Write the rows of each split into a new folder, one after the other, so that an iterator takes no memory.

    Raises UsageError for what is no row, and EdgezoError where the disk refuses them.
    """
    with _kept(folder) as place:
        for name, rows in splits.items():
            write_rows(place / f"{name}.jsonl", name, rows)


def write_rows(file: Path, name: str, rows: Rows) -> None:
    """Write rows as lines of JSON. Raises UsageError for what is no row; ``name`` is that of the split."""
    if not isinstance(rows, Iterable):
        raise UsageError(
            f"{name}: a {type(rows).__name__} is no rows. Give a path, a list of dicts, a datasets.Dataset or an "
            "iterator of dicts."
        )
    with file.open("x", encoding="utf-8") as stream:
        for number, row in enumerate(rows, 1):
            where = f"{name}: row {number}"
            if not isinstance(row, Mapping):
                raise UsageError(
                    f"{where} is a {type(row).__name__}, not a dict of its fields, such as {{'text': '...'}}. "
                    "Of a DataFrame df give df.to_dict('records')."
                )
            values = {str(key): _plain(value, f"{where}: {key!r}") for key, value in row.items()}
            stream.write(_line(values) + "\n")


def _line(values: dict[str, Any]) -> str:
    line = json.dumps(values, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON has an escape for it
        return json.dumps(values)
    return line


def _plain(value: Any, where: str) -> Any:
    """A value of a row as JSON has it: numbers and arrays of numpy too; NaN is no value. Raises UsageError."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, where) for inner in value]
    as_list: Callable[[], Any] | None = getattr(value, "tolist", None)  # numpy, torch
    if as_list is not None:
        return _plain(as_list(), where)
    raise UsageError(
        f"{where} is a {type(value).__name__}, which a row of JSON has no form for. Leave the field out, or give it as "
        "text or numbers."
    )


@contextmanager
def rows_beside(rows: Rows) -> Iterator[Path]:
    """A folder in the cache with rows that are all evaluated on, until the end of the block."""
    if isinstance(rows, Mapping):
        raise UsageError("data is a mapping of splits: give the one that is to be evaluated on")
    parent = cache_dir() / "rows"
    with ExitStack() as at_end:
        try:
            folder = at_end.enter_context(temporary_folder(parent, _ROW_FILES))
            write_rows(folder / f"{EVALUATED[0]}.jsonl", "data", rows)
            # Their labels are known by training rows, which an evaluation does not read beyond that.
            shutil.copyfile(folder / f"{EVALUATED[0]}.jsonl", folder / "train.jsonl")
        except OSError as problem:
            raise write_error(parent, "rows", problem) from problem
        yield folder


# ---------------------------------------------------------------------------------------------
# A model


def is_loaded_model(model: object) -> bool:
    """Whether an object is a model of transformers, or one that is saved as such."""
    return hasattr(model, "save_pretrained") and hasattr(model, "config")


def model_bytes(model: Any) -> int:
    """What the parameters of a loaded model take of this process's memory."""
    parameters = {id(one): one for one in model.parameters() if one.device.type == "cpu"}
    return sum(one.numel() * one.element_size() for one in parameters.values())


def keep_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a loaded model with its tokenizer into a new folder.

    Weights that transformers has only mapped from files are in memory afterwards.
    Raises UsageError without a tokenizer, and EdgezoError for a model that edgezo does not know.
    """
    from edgezo.network.foreign_config import build_config

    if tokenizer is None:
        raise UsageError(
            "a loaded model needs its tokenizer: give tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    settings = json.loads(model.config.to_json_string(use_diff=False))
    build_config(settings, Path(f"the loaded model ({type(model).__name__})"))
    with _kept(folder) as place, _without_bars():
        model.save_pretrained(
            place
        )  # safetensors writes from where the weights are, without a copy
        tokenizer.save_pretrained(place)


@contextmanager
def _without_bars() -> Iterator[None]:
    """A block in which transformers draws no bars of its own."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------
# The folders


@contextmanager
def _kept(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then has a list of its files. One of a run that did not begin gives way to it."""
    if is_given(folder):
        remove_given(folder)
    with atomic_folder(folder) as place:
        yield place
        files = {file.name: file_sha256(file) for file in sorted(place.iterdir())}
        (place / _LIST).write_text(json.dumps({"files": files}) + "\n", encoding="utf-8")


def is_given(folder: Path) -> bool:
    """Whether a folder is one that edgezo wrote here, and every file in it as it was written."""
    if not folder.is_dir():
        return False
    files = _listed(folder)
    if set(os.listdir(folder)) != {*files, _LIST}:
        return False
    if len(files_inside(folder, names_of_given(folder))) != len(files) + 1:
        return False  # a link among them
    return all(file_sha256(folder / name) == digest for name, digest in files.items())


def names_of_given(folder: Path) -> re.Pattern[str]:
    """What the names of such a folder match."""
    return re.compile("|".join(map(re.escape, (*_listed(folder), _LIST))))


def remove_given(folder: Path) -> None:
    """Remove such a folder."""
    remove_files(folder, names_of_given(folder))


def _listed(folder: Path) -> dict[str, str]:
    """SHA-256 by name, as the list says; {} where there is none. Raises ValueError or OSError for what is no list."""
    check_folder(folder)
    if not os.path.lexists(folder / _LIST):
        return {}
    listed = parse_json(read_small(folder / _LIST, _MOST_LIST_BYTES).decode("utf-8"))
    files = listed["files"]
    if not all("/" not in name and name not in (".", "..") for name in files):
        raise ValueError(f"{folder / _LIST} names files elsewhere")
    return dict(files)
