"""Files of rows: JSONL, JSON, CSV or Parquet; one file, or a folder with train and validation parts, also in shards.

``Problems`` collects whatever is wrong, so that one run reports all of it.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from edgezo.errors import UsageError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ABOUT = (
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
)  # files without rows
TRAIN_NAMES = ("train",)
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


class Problems:
    """Everything that is wrong: each kind of problem with the places where it occurs."""

    SHOWN = 5

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, *, at: str = "") -> None:
        """Note a problem; problems with the same ``what`` are shown together."""
        places = self._places.setdefault(what, [])
        if at:
            places.append(at)

    def __len__(self) -> int:
        return len(self._places)

    def raise_any(self) -> None:
        """Raise UsageError with all problems, and a few places and the number of each, if there are any."""
        if self._places:
            raise UsageError([self._render(what) for what in self._places])

    def _render(self, what: str) -> str:
        places = self._places[what]
        lines = [f"{what}:" if places else what, *(f"  {p}" for p in places[: self.SHOWN])]
        if len(places) > self.SHOWN:
            lines.append(f"  ... and {len(places) - self.SHOWN} more ({len(places)} in all)")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Record:
    """One row of a file."""

    where: str  # "train.jsonl:12"
    fields: Mapping[str, Any]

    @property
    def keys(self) -> str:
        """The names of its fields, for messages."""
        return ", ".join(map(str, self.fields)) or "none"


def find_splits(path: Path, problems: Problems) -> tuple[list[Path], list[Path]]:
    """The files of training rows and of validation rows at ``path``.

    A single file has training rows. A directory, or its folder ``data``, has ``train.jsonl`` or shards named as on the
    hub, ``train-00000-of-00002.parquet``, ..., and may have validation files; if no file has such a name, its only file
    has the training rows.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            problems.add(
                f"cannot read {path}: edgezo reads {', '.join(SUFFIXES)} files with rows of named fields"
            )
            return [], []
        return [path], []
    if not path.is_dir():
        problems.add(f"no such file or directory: {path}")
        return [], []
    folders = [_readable(folder) for folder in (path, path / "data")]
    for files in folders:
        if train := _part(files, TRAIN_NAMES, problems):
            return train, _part(files, VALIDATION_NAMES, problems)
    for files in folders:
        if len(files) == 1 and not _part(files, VALIDATION_NAMES, problems):
            return files, []
    names = sorted(p.name for p in path.iterdir())
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    problems.add(
        f"no train.jsonl, .json, .csv or .parquet in {path} (it holds: {listed or 'nothing'})"
    )
    return [], []


def _readable(folder: Path) -> list[Path]:
    """The files of a folder that may have rows, in alphabetical order."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f for f in files if f.suffix in SUFFIXES and f.name not in ABOUT and f.is_file()]


def _part(files: Sequence[Path], names: Sequence[str], problems: Problems) -> list[Path]:
    """The file or the shards of the first of ``names`` that a file has; [] if none has."""
    for name in names:
        for suffix in SUFFIXES:
            if single := [file for file in files if file.name == f"{name}{suffix}"]:
                return single
            form = re.compile(rf"{name}-(\d+)-of-(\d+)(?:-[0-9a-f]+)?{re.escape(suffix)}")
            shards = sorted(
                (int(match[1]), int(match[2]), file)
                for file in files
                if (match := form.fullmatch(file.name))
            )
            if shards:
                count = max(count for _, count, _ in shards)
                if [number for number, _, _ in shards] != list(range(count)):
                    problems.add(
                        f"{shards[0][2].parent} has {len(shards)} shards of {name}, not each of {count} "
                        "once: fetch those that are missing, or remove those of another set"
                    )
                return [file for _, _, file in shards]
    return []


def read_records(path: Path, problems: Problems) -> list[Record]:
    """All rows of a file. Problems are noted with the file and the line."""
    read = {".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix, _read_json)
    before = len(problems)
    try:
        records = list(read(path, problems))
    except UnicodeDecodeError as error:
        problems.add(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8")
        return []
    except OSError as error:
        problems.add(f"cannot read {path}: {error.strerror or error}")
        return []
    except csv.Error as error:
        problems.add(f"cannot read {path} as CSV: {error}")
        return []
    if not records and len(problems) == before:
        size = path.stat().st_size
        problems.add(f"{path} is empty" if size == 0 else f"no rows in {path} ({size} bytes)")
    return records


def _read_json(path: Path, problems: Problems) -> Iterator[Record]:
    """Rows of JSON: one object a line, or in a .json file also one array of objects."""
    with path.open(encoding="utf-8-sig") as lines:
        first = lines.read(1) if path.suffix == ".json" else ""
        while first.isspace():
            first = lines.read(1)
        lines.seek(0)
        read = _array if first == "[" else _records
        yield from read(lines, path, problems)


def _array(file: TextIO, path: Path, problems: Problems) -> Iterator[Record]:
    """Rows from one array of objects."""
    try:
        rows = json.load(file)
    except (ValueError, RecursionError) as error:
        problems.add(f"malformed JSON in {path}", at=str(error))
        return
    for number, row in enumerate(rows, 1):
        where = f"{path.name}[{number}]"
        if isinstance(row, dict):
            yield Record(where, row)
        else:
            problems.add(f"not a JSON object in {path}", at=f"{where}: {_clip(str(row))}")


# Runs in another process, so that the 60 MB of pyarrow are no part of a run's memory.
_PARQUET = """
import json, sys
try:
    import pyarrow.parquet
except ImportError:
    sys.exit("reading Parquet needs pyarrow: pip install pyarrow")
def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)
try:
    for batch in pyarrow.parquet.ParquetFile(sys.argv[1]).iter_batches(256):
        for row in batch.to_pylist():
            print(json.dumps(row, default=text))
except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
    sys.exit(str(error).splitlines()[0])
"""


def _read_parquet(path: Path, problems: Problems) -> Iterator[Record]:
    # -P: nothing is imported from the working directory.
    command = [sys.executable, "-P", "-X", "utf8", "-c", _PARQUET, str(path)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as child:
            assert child.stdout is not None
            yield from _records(child.stdout, path, problems)
        if child.returncode:
            errors.seek(0)
            reason = errors.read().strip().splitlines()[-1:] or [f"exit {child.returncode}"]
            problems.add(f"cannot read {path}: {reason[0]}")


def _records(lines: Iterable[str], path: Path, problems: Problems) -> Iterator[Record]:
    """One row for each line of JSON."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problems.add(f"malformed JSON in {path}", at=f"{where}: {reason}: {_clip(line)}")
            continue
        if isinstance(row, dict):
            yield Record(where, row)
        else:
            problems.add(f"not a JSON object in {path}", at=f"{where}: {_clip(line)}")


def _read_csv(path: Path, problems: Problems) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                names = ", ".join(reader.fieldnames or ())
                problems.add(
                    f"the cells of a row do not match the header of {path} ({names})", at=where
                )
            else:
                yield Record(where, row)


def _clip(text: str, most: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= most else text[:most] + "..."
