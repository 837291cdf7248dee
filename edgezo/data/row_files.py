"""Files of rows: JSONL, JSON, CSV, TSV or Parquet; one file or pipe, or a folder with parts, also in shards.

``Problems`` collects whatever is wrong, so that one run reports all of it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgezo.data.json_array import PIECE_CHARS, JsonArray
from edgezo.data.table_files import SEPARATOR_NAMES, Table
from edgezo.errors import UsageError
from edgezo.machine import children
from edgezo.machine.foreign import FAULTS, clip, first_twice, parse_json, reason
from edgezo.machine.meant import meant_path
from edgezo.machine.process_memory import Guard, ReadingGuard

TABLES = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".ndjson", ".json", *TABLES, ".parquet")
# How files begin that hold rows in a form that is not read, and what to do with them.
PACKED = {
    b"\x1f\x8b": "it is compressed (gzip): unpack it first, with gunzip, or give --data <(gunzip -c FILE)",
    b"BZh": "it is compressed (bzip2): unpack it first, with bunzip2",
    b"\xfd7zXZ": "it is compressed (xz): unpack it first, with unxz",
    b"\x28\xb5\x2f\xfd": "it is compressed (zstd): unpack it first, with unzstd",
    b"PK\x03\x04": "it is a zip archive, as .xlsx is too: unpack it, or save the table as CSV",
    b"PAR1": "it is Parquet, which is read from a file whose name ends in .parquet, and not from a pipe",
}
_PEEK_BYTES = 4096
# Files about a data set, without rows.
ABOUT = ("dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
TRAIN_NAMES = ("train",)
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
CHECK_ROWS = 1024  # the guard is asked after so many rows
LARGE_CHARS = 1 << 16  # the guard is asked before a text of this length is parsed
VALUE_BYTES = 100  # of one small value that is parsed: an object, a key, a number
SHOWN_KEYS = 20  # of a row, in a message
# Memory that unpacking a Parquet file may take in a process of its own: what is left of the cap, within these bounds.
LEAST_PARQUET_BYTES, MOST_PARQUET_BYTES = 256 << 20, 1 << 30


class Problems:
    """Everything that is wrong: each kind of problem with the places where it occurs.

    What is kept of them is bounded: a file in which every row is wrong takes neither more memory nor more time.
    """

    SHOWN = 5
    MOST_KINDS = 20
    MOST_PLACES = 10_000  # after so many no more are looked for
    CHARS = 300  # of one line that is shown

    def __init__(self, skipped: Skipped | None = None, way_out: str = "") -> None:
        self._places: dict[str, list[str]] = {}  # the first few of each kind
        self._counts: dict[str, int] = {}
        self._total = 0
        self._of_rows = False
        self.remarks = Remarks()
        self.skipped = skipped  # where rows go that cannot be used; None: they are problems
        self._way_out = way_out  # what to do where rows are problems

    def add(self, what: str, *, at: str = "") -> None:
        """Note a problem; problems with the same ``what`` are shown together. Raises UsageError after too many."""
        self._total += 1
        if what in self._places or len(self._places) < self.MOST_KINDS:
            places = self._places.setdefault(what, [])
            if at:
                self._counts[what] = self._counts.get(what, 0) + 1
                if len(places) < self.SHOWN:
                    places.append(clip(at, self.CHARS))
        if self._total >= self.MOST_PLACES:
            self._places[f"stopped after {self._total:,} problems"] = []
            self.raise_any()

    def bad_row(self, what: str, where: str, more: str = "", row: Any = None) -> None:
        """Note a row that cannot be used: it is left out where such rows are skipped, else it is a problem."""
        if self.skipped is not None:
            self.skipped.add(what, where, more, row)
            return
        self._of_rows = True
        self.add(what, at=where + more)

    def move_to(self, problems: Problems, record: Record) -> None:
        """Make the problems of one row those of a bad row of ``problems``; none are left here."""
        for what, places in self._places.items():
            for place in places or [record.where]:
                problems.bad_row(
                    what, record.where, place.removeprefix(record.where), record.fields
                )
        self._places, self._counts, self._total = {}, {}, 0

    @property
    def noted(self) -> int:
        """Kinds of problems and rows that were skipped."""
        return len(self) + (self.skipped.count if self.skipped is not None else 0)

    def __len__(self) -> int:
        return len(self._places)

    def raise_any(self) -> None:
        """Raise UsageError with all problems, and a few places and the number of each, if there are any."""
        if self._places:
            way_out = [self._way_out] if self._of_rows and self._way_out else []
            raise UsageError([*(self._render(what) for what in self._places), *way_out])

    def _render(self, what: str) -> str:
        places, count = self._places[what], self._counts.get(what, 0)
        shown = clip(what, 4 * self.CHARS)
        lines = [f"{shown}:" if places else shown, *(f"  {p}" for p in places)]
        if count > len(places):
            lines.append(f"  ... and {count - len(places)} more ({count} in all)")
        return "\n".join(lines)


class Remarks:
    """What the user should know of rows that are in order: each kind with the rows that it is true of."""

    MOST_KINDS = 40

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._first: dict[str, str] = {}
        self._unused: dict[str, int] = {}  # rows by the field that nothing uses

    def add(self, what: str, where: str, times: int = 1) -> None:
        """Note something of a row at ``where``; ``what`` is true of so many things in it."""
        if what in self._rows or len(self._rows) < self.MOST_KINDS:
            self._rows[what] = self._rows.get(what, 0) + times
            self._first.setdefault(what, where)

    def add_unused(self, record: Record, used: Collection[str]) -> None:
        """Count the fields of a row that have a value and are not among those that are ``used``."""
        for name, value in record.fields.items():
            if name not in used and value is not None and value != "":
                if name in self._unused or len(self._unused) < self.MOST_KINDS:
                    self._unused[name] = self._unused.get(name, 0) + 1

    def lines(self) -> list[str]:
        """A sentence for each kind, with the number of its rows and the first of them."""
        lines = [
            f"{clip(what, 200)}: {count:,}, the first in {clip(self._first[what], 80)}"
            for what, count in self._rows.items()
        ]
        names = [f"{clip(name, 60)!r} ({count:,})" for name, count in self._unused.items()]
        if names:
            more = ", ..." if len(names) > SHOWN_KEYS else ""
            lines.append(
                f"fields that nothing uses, and their rows: {', '.join(names[:SHOWN_KEYS])}{more}"
            )
        return lines


SKIPPED_BEGIN = b'{"where": "'  # of the file of rows that are left out


class Skipped:
    """Rows that are left out, since they cannot be used: each reason with the rows, and all of them as lines of JSON.

    The lines are packed, so that they take less memory than the rows would have.
    """

    def __init__(self) -> None:
        self.reasons = Remarks()
        self.count = 0
        self._packer, self._packed = zlib.compressobj(1), bytearray()
        self._last = ""

    def add(self, what: str, where: str, more: str, row: Any) -> None:
        """Leave a row out. Several reasons of one row follow each other."""
        self.count += where != self._last
        self._last = where
        self.reasons.add(what, where)
        line = {"where": where, "why": what + more, "row": row}
        text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
        self._packed += self._packer.compress(text.encode("utf-8", "replace"))

    def lines(self) -> Iterator[bytes]:
        """Pieces of the file of all rows that were left out."""
        packed = bytes(self._packed) + self._packer.copy().flush()
        unpacker = zlib.decompressobj()
        while piece := unpacker.decompress(packed, PIECE_CHARS):
            yield piece
            packed = unpacker.unconsumed_tail

    def notes(self) -> list[str]:
        """A sentence that counts them, and one for each reason."""
        if not self.count:
            return []
        return [
            f"rows that cannot be used, skipped: {self.count:,} (a run lists them in its skipped.jsonl)",
            *(f"skipped: {line}" for line in self.reasons.lines()),
        ]


# ---------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file."""

    where: str  # "train.jsonl:12"
    fields: Mapping[str, Any]
    goes_on: bool = False  # a part of a text that does not end here

    @property
    def keys(self) -> str:
        """The names of its fields, for messages."""
        names = [
            clip(str(name), 60) for name, _ in zip(self.fields, range(SHOWN_KEYS), strict=False)
        ]
        more = ["..."] if len(self.fields) > len(names) else []
        return ", ".join([*names, *more]) or "none"


def find_splits(path: Path, problems: Problems) -> tuple[list[Path], list[Path]]:
    """The files of training rows and of validation rows at ``path``.

    A single file has training rows. A directory, or its folder ``data``, has ``train.jsonl`` or shards named as on the
    hub, ``train-00000-of-00002.parquet``, ..., and may have validation files; if no file has such a name, its only file
    has the training rows.
    """
    if path.is_file() or path.is_fifo():
        if _suffix(path) not in (*SUFFIXES, ""):
            problems.add(f"cannot read {path}: {_unread(path)}")
            return [], []
        return [path], []
    if path.exists() and not path.is_dir():
        problems.add(
            f"cannot read {path}: it is no file and no pipe of rows. Rows that came by a pipe have to be piped again"
        )
        return [], []
    if not path.is_dir():
        problems.add(f"no such file or directory: {path}{meant_path(path)}")
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
        f"no train.jsonl, .json, .csv, .tsv or .parquet in {path} (it holds: {listed or 'nothing'})"
    )
    return [], []


def _suffix(path: Path) -> str:
    """The suffix of a file in small letters; "" for a pipe, whose name means nothing."""
    return "" if path.is_fifo() else path.suffix.lower()


def _packed(start: bytes) -> str:
    """What a file that begins so is, and what to do with it; "" where it may have rows as text."""
    return next((what for magic, what in PACKED.items() if start.startswith(magic)), "")


def _unread(path: Path) -> str:
    """Why a file with this suffix is not read."""
    with path.open("rb") as file:
        start = file.read(8)
    return (
        _packed(start)
        or f"edgezo reads {', '.join(SUFFIXES)} files with rows of named fields, and texts as .txt, .md or .mbox"
    )


def _readable(folder: Path) -> list[Path]:
    """The files of a folder that may have rows, in alphabetical order."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        f for f in files if f.suffix.lower() in SUFFIXES and f.name not in ABOUT and f.is_file()
    ]


def _part(files: Sequence[Path], names: Sequence[str], problems: Problems) -> list[Path]:
    """The file or the shards of the first of ``names`` that a file has; [] if none has."""
    for name in names:
        for suffix in SUFFIXES:
            if single := [file for file in files if file.name.lower() == f"{name}{suffix}"]:
                return single
            form = re.compile(
                rf"{name}-(\d+)-of-(\d+)(?:-[0-9a-f]+)?{re.escape(suffix)}", re.IGNORECASE
            )
            shards = sorted(
                (int(match[1]), int(match[2]), file)
                for file in files
                if (match := form.fullmatch(file.name))
            )
            if shards:
                count = max(count for _, count, _ in shards)
                numbers = [number for number, _, _ in shards]
                if len(shards) != count or numbers != list(range(len(shards))):
                    problems.add(
                        f"{shards[0][2].parent} has {len(shards)} shards of {name}, not each of {count} "
                        "once: fetch those that are missing, or remove those of another set"
                    )
                return [file for _, _, file in shards]
    return []


def read_records(path: Path, problems: Problems, guard: Guard | None = None) -> Iterator[Record]:
    """The rows of a file, one after the other. Problems are noted with the file and the line.

    ``guard`` is asked at bounded intervals, and before whatever may be large. It raises DoesNotFit.
    """
    read = _read_parquet if _suffix(path) == ".parquet" else _read_text
    guard, before, count = guard or ReadingGuard(), problems.noted, 0
    try:
        for record in read(path, problems, guard):
            yield record
            count += 1
            if count % CHECK_ROWS == 0:
                guard.check(item=record.where)
    except UnicodeDecodeError as error:
        problems.add(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8")
    except csv.Error as error:
        problems.add(f"cannot read {path} as CSV: {error}")
    except MemoryError:
        problems.add(f"cannot read {path}: its rows take more memory than the system gives")
    except FAULTS as error:
        problems.add(f"cannot read {path}: {reason(error)}")
    if not count and problems.noted == before:
        size = path.stat().st_size
        is_empty = size == 0 and not path.is_fifo()
        problems.add(f"{path} is empty" if is_empty else f"no rows in {path} ({size} bytes)")


def _lines(file: IO[str], path: Path, guard: Guard) -> Iterator[str]:
    """The lines of a file. The guard is asked for every piece of a long one, before it is joined and parsed."""
    number = 0
    while line := file.readline(PIECE_CHARS):
        number += 1
        if len(line) >= LARGE_CHARS:
            where = f"{path.name}:{number}"
            line = _whole(line, file, where, guard)
            guard.check(_parsed_bytes(line), where)
        yield line


def _whole(text: str, file: IO[str], where: str, guard: Guard) -> str:
    """``text`` with what follows it, up to the end of its line."""
    pieces = [text]
    size_bytes = sys.getsizeof(text)
    while not pieces[-1].endswith("\n") and (piece := file.readline(PIECE_CHARS)):
        pieces.append(piece)
        size_bytes += sys.getsizeof(piece)
        guard.check(size_bytes, where)  # to be joined
    return "".join(pieces)


def _parsed_bytes(text: str) -> int:
    """At most so many bytes are taken by the values of a text of JSON or CSV: its texts, and each value in itself."""
    return sys.getsizeof(text) + VALUE_BYTES * sum(map(text.count, "[{,:"))


def _read_json_file(
    file: IO[str], path: Path, problems: Problems, guard: Guard, array: bool
) -> Iterator[Record]:
    """Rows of JSON: one object a line, or one ``array`` of objects."""
    if array:
        yield from _array(file, path, problems, guard)
    else:
        yield from _records(_lines(file, path, guard), path, problems)


def _read_text(path: Path, problems: Problems, guard: Guard) -> Iterator[Record]:
    """Rows of a file or a pipe that is text. A name without a suffix tells nothing, so that its first bytes do."""
    with path.open("rb") as raw:
        start = raw.peek(_PEEK_BYTES)
        if packed := _packed(start):
            problems.add(f"cannot read {path}: {packed}")
            return
        first = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        suffix = _suffix(path) or (".json" if first in (b"[", b"{", b"") else ".csv")
        is_table = suffix in TABLES
        newline = "" if is_table else None
        with io.TextIOWrapper(raw, "utf-8-sig", newline=newline) as file:
            if is_table:
                yield from _read_table(file, path, problems, guard)
            else:
                array = suffix == ".json" and first == b"["
                yield from _read_json_file(file, path, problems, guard, array)


def _array(file: IO[str], path: Path, problems: Problems, guard: Guard) -> Iterator[Record]:
    """Rows from one array of objects, each parsed as soon as it has been read."""
    buffer = JsonArray(file, path.name, guard)
    number = 0
    try:
        for text in buffer.elements():
            number += 1
            where = f"{path.name}[{number}]"
            if len(text) >= LARGE_CHARS:
                guard.check(_parsed_bytes(text), where)
            row = parse_json(text)
            if isinstance(row, dict):
                yield Record(where, row)
            else:
                shown = "a list" if isinstance(row, list) else _clip(str(row))
                problems.bad_row(f"not a JSON object in {path}", where, f": {shown}")
    except ValueError as error:
        problems.add(f"malformed JSON in {path}", at=f"after {number} rows: {error}")


def _read_parquet(path: Path, problems: Problems, guard: Guard) -> Iterator[Record]:
    room_bytes = min(max(guard.room_bytes(), LEAST_PARQUET_BYTES), MOST_PARQUET_BYTES)
    command = children.command("edgezo.data.parquet_rows", str(path), str(room_bytes))
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=children.environment(ARROW_DEFAULT_MEMORY_POOL="system", MALLOC_ARENA_MAX="2"),
        ) as child:
            assert child.stdout is not None
            try:
                yield from _records(_lines(child.stdout, path, guard), path, problems)
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            errors.seek(0)
            stopped = [f"the process that unpacks it ended with {child.returncode}"]
            why = errors.read().strip().splitlines()[-1:] or stopped
            problems.add(f"cannot read {path}: {why[0]}")


def _records(lines: Iterable[str], path: Path, problems: Problems) -> Iterator[Record]:
    """One row for each line of JSON."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problems.bad_row(f"malformed JSON in {path}", where, f": {why}: {_clip(line)}")
            continue
        if isinstance(row, dict) and row:
            yield Record(where, row)
        elif isinstance(row, dict):
            problems.bad_row(f"a row without fields in {path}", where)
        else:
            is_list = isinstance(row, list) and row and isinstance(row[0], dict)
            rename = f" (a list of rows: rename the file to {path.stem}.json)" if is_list else ""
            problems.bad_row(f"not a JSON object in {path}{rename}", where, f": {_clip(line)}")


def _read_table(file: IO[str], path: Path, problems: Problems, guard: Guard) -> Iterator[Record]:
    """Rows of CSV and its relatives."""
    table = Table(
        _lines(file, path, guard),
        _suffix(path) == ".tsv",
        lambda size_bytes: guard.check(size_bytes, path.name),
    )
    header, listed = table.header, clip(", ".join(table.header), 200)
    if (twice := first_twice(header)) is not None:
        problems.add(f"{path} has several columns named {twice!r} ({listed})")
        return
    if table.separator in SEPARATOR_NAMES and _suffix(path) != ".tsv":
        name = SEPARATOR_NAMES[table.separator]
        problems.remarks.add(f"files read as cells between {name}", path.name)
    for first, last, row in table.rows():
        where = f"{path.name}:{last}"
        if len(row) == len(header):
            if any(cell.strip() for cell in row):
                yield Record(where, dict(zip(header, row, strict=True)))
            else:
                problems.remarks.add("rows left out, since all their cells are empty", where)
            continue
        of = "" if first == last else f" (it begins in line {first}: is a quotation mark open?)"
        what = f"the cells of a row do not match the header of {path} ({listed})"
        problems.bad_row(what, where, of, row)


def _clip(text: str) -> str:
    """The beginning of a text, for a message."""
    return clip(text[:1000].strip(), 60)
