"""Files of rows: JSONL or CSV, one file or a folder with train and validation parts.

``Problems`` collects whatever is wrong, so that one run reports all of it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgezo.errors import UsageError

SUFFIXES = (".jsonl", ".json", ".csv")
TRAIN_NAMES = ("train",)
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")


class Problems:
    """What is wrong, by kind; ``raise_any`` shows a few places of each kind and their number."""

    SHOWN = 5

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, *, at: str = "") -> None:
        places = self._places.setdefault(what, [])
        if at:
            places.append(at)

    def __len__(self) -> int:
        return len(self._places)

    def raise_any(self) -> None:
        """Raises UsageError if anything was added."""
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
    """One row as it stands in its file."""

    where: str  # "train.jsonl:12"
    fields: Mapping[str, Any]

    @property
    def keys(self) -> str:
        return ", ".join(map(str, self.fields)) or "none"


def find_splits(path: Path, problems: Problems) -> tuple[Path | None, Path | None]:
    """The train and validation files of a directory, or a single file as train."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            problems.add(
                f"cannot read {path}: edgezo reads {', '.join(SUFFIXES)} files (one row a line)"
            )
            return None, None
        return path, None
    if not path.is_dir():
        problems.add(f"no such file or directory: {path}")
        return None, None
    train, validation = (_first(path, names) for names in (TRAIN_NAMES, VALIDATION_NAMES))
    if train is None:
        found = sorted(p.name for p in path.iterdir())
        listed = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        problems.add(f"no train.jsonl or train.csv in {path} (it holds: {listed or 'nothing'})")
    return train, validation


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    files = (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def read_records(path: Path, problems: Problems) -> list[Record]:
    """All rows of a JSONL or CSV file; problems name the file and the line."""
    read = _read_csv if path.suffix == ".csv" else _read_jsonl
    before = len(problems)
    try:
        records = list(read(path, problems))
    except UnicodeDecodeError as error:
        problems.add(f"{path} is not UTF-8 text (byte {error.start} of a chunk: {error.reason})")
        return []
    except OSError as error:
        problems.add(f"cannot read {path}: {error.strerror or error}")
        return []
    except csv.Error as error:
        problems.add(f"{path} is not a CSV file that can be read: {error}")
        return []
    if not records and len(problems) == before:
        size = path.stat().st_size
        problems.add(f"{path} is empty" if size == 0 else f"no rows in {path} ({size} bytes)")
    return records


def _read_jsonl(path: Path, problems: Problems) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                problems.add(f"malformed JSON in {path}", at=f"{where}: {reason}: {_clip(line)}")
                if number == 1 and line.lstrip().startswith("["):
                    problems.add(f"{path} holds a JSON array; edgezo reads one object a line")
                    return
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
