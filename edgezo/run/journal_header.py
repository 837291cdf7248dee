"""The header of a journal: its bytes, and whether it belongs to a base; journal.py has the table of the layout."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from edgezo.errors import BaseMismatch, EdgezoError
from edgezo.run.journal_meaning import Meaning
from edgezo.run.journal_record import CRC, LAYOUTS

MAGIC = b"\x89EZJ\r\n\x1a\n"
VERSION = 2 * LAYOUTS  # the latest that is read
MOST_HEADER_BYTES = 2**22  # of JSON, which takes up to 25 times as much once it is read
_PREFIX = struct.Struct("<8sIII")  # magic, version, first step, JSON length


class JournalHead(NamedTuple):
    """What stands before the records of a journal."""

    header: dict[str, Any]
    version: int
    first_step: int
    start: int  # offset of the first record
    crc: int  # that the CRC of every record starts from
    meaning: Meaning | None  # None: a journal without settings, as measurements and tests write


def check_base(header: Mapping[str, Any], content_hash: str, vocab: int | None = None) -> None:
    """Raise BaseMismatch unless a run's journal was written over the base with ``content_hash``.

    Raises EdgezoError where the header is of no run, or names tokens beyond the base's ``vocab`` words.
    """
    if "config" not in header:
        raise EdgezoError(
            "the journal's header has no settings, so it is of no run. Give a run directory that "
            "`edgezo finetune` made."
        )
    recorded = header.get("content_hash")
    if recorded != content_hash:
        raise BaseMismatch(
            "the journal belongs to other base weights: it was written over "
            f"{recorded}, the model given is {content_hash}. Give the base model that the run "
            "started from (`model` in the run's config.toml)."
        )
    largest = max(header["dataset"]["label_ids"], default=0)
    if vocab is not None and largest >= vocab:
        raise EdgezoError(
            f"the journal's header names the token {largest} as a label word, but the base has {vocab} words: "
            "the file was changed. Restore it from a copy."
        )


def encode_header(header: Mapping[str, Any], version: int, first_step: int) -> bytes:
    """The bytes of a header. Raises ValueError for what JSON cannot hold, EdgezoError for what no journal may hold."""
    if not isinstance(header.get("content_hash"), str):
        raise ValueError("a journal's header needs content_hash, the hash of the base weights")
    text = _canonical(header)
    if len(text) > MOST_HEADER_BYTES:
        raise EdgezoError(
            f"the settings of the run take {len(text)} bytes, and a journal's header at most "
            f"{MOST_HEADER_BYTES}: give shorter texts (--template, --labels)."
        )
    if problem := _problem(header, first_step):
        raise EdgezoError(f"no journal can be written for these settings: {problem}.")
    data = _PREFIX.pack(MAGIC, version, first_step, len(text)) + text
    return data + CRC.pack(zlib.crc32(data))


def read_head_of(file: BinaryIO, path: Path) -> JournalHead:
    """Read the header of an open journal. Raises EdgezoError unless it is whole and makes sense."""
    size = os.fstat(file.fileno()).st_size
    damaged = EdgezoError(
        f"{path}: the journal's header is damaged or cut short (the file has {size} bytes). Nothing can be read "
        "without it: restore the file from a copy, or start the run again."
    )
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC):
        if MAGIC.startswith(prefix):
            raise damaged
        raise EdgezoError(
            f"{path} is not a journal of edgezo: it begins with {prefix[:8]!r}. Give a run directory that "
            "`edgezo finetune` made, or its journal.bin."
        )
    if len(prefix) < _PREFIX.size:
        raise damaged
    _, version, first_step, n = _PREFIX.unpack(prefix)
    if n + CRC.size > size - _PREFIX.size or n > MOST_HEADER_BYTES:
        raise damaged
    text = file.read(n)
    crc = zlib.crc32(prefix + text)
    if file.read(CRC.size) != CRC.pack(crc):
        raise damaged
    if not 1 <= version <= VERSION:
        raise EdgezoError(
            f"{path}: format {version} of the journal; this edgezo reads formats up to {VERSION}. Install the version "
            "of edgezo that wrote it, or a later one."
        )
    header = _parsed(text)
    if header is None:
        raise damaged
    if problem := _problem(header, first_step):
        raise EdgezoError(
            f"{path}: the journal's header is whole, but {problem}. A later edgezo wrote it, which you can install; or "
            "the file was changed: restore it from a copy."
        )
    meaning = Meaning.of(header) if "config" in header else None
    return JournalHead(header, version, first_step, _PREFIX.size + n + CRC.size, crc, meaning)


def _canonical(header: Mapping[str, Any]) -> bytes:
    """The one spelling of a header. Raises ValueError for what JSON cannot hold."""
    return json.dumps(
        header, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The header that ``text`` spells; None for any other text, with keys twice for example."""
    try:
        header = json.loads(text.decode())
        known = isinstance(header, dict) and _canonical(header) == text
    except (ValueError, RecursionError):
        return None
    return header if known else None


def _problem(header: Mapping[str, Any], first_step: int) -> str:
    """What no run writes into its header; "" where there is nothing."""
    if "config" not in header:
        return ""
    if first_step:
        return f"it begins with step {first_step}, where every run begins with step 0"
    try:
        Meaning.of(header)
    except ValueError as problem:
        return str(problem)
    return ""
