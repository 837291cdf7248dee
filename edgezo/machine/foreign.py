"""Reading what somebody else wrote: one list of exceptions, and JSON and TOML that are checked while they are parsed.

A foreign file may be damaged, or made to harm its reader. Whatever Python raises over it is in one list here, and
leaves a reader as EdgezoError. Standard library only.
"""

from __future__ import annotations

import json
import re
import struct
import tomllib
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError

# What Python's parsers and arithmetic raise over bytes that are not what they should be. UnicodeError,
# JSONDecodeError and TOMLDecodeError are ValueErrors, KeyError and IndexError are LookupErrors, RecursionError is a
# RuntimeError, OverflowError and ZeroDivisionError are ArithmeticErrors. Readers of zips and of CSV add what only those
# modules raise.
FAULTS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(RuntimeError, AssertionError, EOFError, BufferError, MemoryError, SyntaxError),
    *(struct.error, zlib.error),
)
MOST_DEPTH = 64  # lists and tables inside each other; no file that is read nests deeper
MOST_CONFIG_BYTES = 4 << 20  # of a model's configuration; the largest published one has 0.2 MB
MOST_INDEX_BYTES = (
    32 << 20
)  # of an index of shards, or of a tokenizer's settings with all added tokens
MOST_TOML_BYTES = 256 << 10
_MOST_KEY_PAIRS = 1_000_000
_REASON_LENGTH = 300
FETCH_AGAIN = "The file is damaged or incomplete: fetch it again."


@contextmanager
def reading(what: object, way_out: str = FETCH_AGAIN, *, any_kind: bool = False) -> Iterator[None]:
    """A block that reads ``what``, a file or part of one: every exception of ``FAULTS`` becomes EdgezoError.

    ``any_kind``: for a library that raises exceptions of its own, all of them do. A panic of a library in Rust, which
    is no Exception, does so in any case.
    """
    try:
        yield
    except EdgezoError:
        raise
    except MemoryError as problem:
        raise EdgezoError(
            f"{what} takes more memory to read than the system gives. Close other programs, or give a smaller file."
        ) from problem
    except BaseException as problem:
        known = isinstance(problem, FAULTS) or (any_kind and isinstance(problem, Exception))
        if not known and not is_panic(problem):
            raise
        raise EdgezoError(f"{what} cannot be read ({reason(problem)}). {way_out}") from problem


def is_panic(problem: BaseException) -> bool:
    """Whether a library in Rust has stopped over its input (pyo3's PanicException, a BaseException)."""
    return type(problem).__name__ == "PanicException"


def reason(problem: BaseException) -> str:
    """Why a file cannot be read, in one line of at most 300 characters."""
    if isinstance(problem, RecursionError):
        return "it is nested too deeply"
    if isinstance(problem, UnicodeDecodeError):
        return f"it is not UTF-8 text: {problem.reason} at byte {problem.start:,}"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    if isinstance(problem, KeyError):
        return f"it has no {problem}"
    return clip(str(problem).strip().partition("\n")[0] or type(problem).__name__, _REASON_LENGTH)


def first_twice(names: Iterable[str]) -> str | None:
    """The first of the names that occurs more than once; None where none does."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def clip(text: str, most: int) -> str:
    """``text``, or its first ``most`` characters and an ellipsis."""
    return text if len(text) <= most else text[:most] + "..."


# ---------------------------------------------------------------------------------------------
# JSON and TOML


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError for a key that occurs twice in an object, which it names, for lists and objects that are nested
    more than ``MOST_DEPTH`` deep, and for half a surrogate pair, which is no character and cannot be written as UTF-8.
    """
    try:
        value = json.loads(text)
        if not _is_flat(text, value):
            value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as problem:
        raise ValueError(_TOO_DEEP) from problem
    _check_depth(text, value)
    if "\\u" in text and _SURROGATE.search(text):
        _check_characters(value)
    return value


def read_json(file: Path, most_bytes: int = MOST_CONFIG_BYTES) -> Any:
    """The value in a file of JSON. Raises EdgezoError, with what ``parse_json`` says of it."""
    with reading(file):
        return parse_json(read_small(file, most_bytes).decode("utf-8-sig"))


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text. Raises ValueError where it is not valid, too long or nested too deeply."""
    if len(text) > MOST_TOML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, more than {MOST_TOML_BYTES:,}")
    _check_dotted_keys(text)
    try:
        table = tomllib.loads(text)
    except RecursionError as problem:
        raise ValueError(_TOO_DEEP) from problem
    _check_depth(None, table)
    return table


def read_small(file: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises ValueError for one of more than ``most_bytes``, EdgezoError for a stand-in, OSError otherwise.
    """
    if file.exists() and not file.is_file():
        raise ValueError("it is no regular file")
    refuse_stand_in(file)
    with open(file, "rb") as stream:
        raw = stream.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    return raw


# First bytes of what stands where a file should be: a pointer of git-lfs, a page of a web server.
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")


def refuse_stand_in(file: Path) -> None:
    """EdgezoError for a file that only stands in for the one that is meant, with the command that gets that one."""
    with open(file, "rb") as stream:
        head = stream.read(len(_LFS))
    if head.startswith(_LFS):
        raise EdgezoError(
            f"{file} is a pointer of git-lfs, not the file itself. Run git lfs install and then git lfs pull in "
            f"{file.parent}."
        )
    if head.lstrip().lower().startswith(_PAGES):
        raise EdgezoError(
            f"{file} is a page of a web server, not the file itself. Fetch it with hf download, or by the link that "
            "starts the download."
        )


_TOO_DEEP = f"lists or tables are nested more than {MOST_DEPTH} deep"
# An escape that may be half a pair; most are whole pairs, so that the parsed texts are looked at.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _is_flat(text: str, value: Any) -> bool:
    """Whether ``value`` is an object of plain values whose keys are as many as in ``text``: none occurs twice.

    Counting quotes takes a third of the time of a hook for each object. False where they do not tell.
    """
    if type(value) is not dict or "\\\\" in text:
        return False
    strings = len(value)
    for field in value.values():
        if type(field) is str:
            strings += 1
        elif isinstance(field, dict | list):
            return False
    return text.count('"') - text.count('\\"') == 2 * strings


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = first_twice(key for key, _ in pairs)
        raise ValueError(f"the key {clip(str(twice), 60)!r} occurs twice")
    return fields


def _check_dotted_keys(text: str) -> None:
    """ValueError for dotted keys that are too long: tomllib keeps every pair of their parts, 20 GB for one of 400 KB.

    A key ends with its line, so that the dots of a line bound its parts.
    """
    lines = text.split("\n")
    deep = any(line.count(".") > MOST_DEPTH for line in lines if line.lstrip().startswith("["))
    if deep or sum(line.count(".") ** 2 for line in lines) > _MOST_KEY_PAIRS:
        raise ValueError(_TOO_DEEP)


def _check_depth(text: str | None, value: Any) -> None:
    """ValueError where lists and tables are nested too deeply. A ``text`` with few of them is not looked into."""
    if text is not None and text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, dict | list))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, dict | list))
        level, depth = inner, depth + 1


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        half = problem.object[problem.start]
        raise ValueError(
            f"a text holds half a character (\\u{ord(half):04x}, one of a surrogate pair)"
        ) from None
