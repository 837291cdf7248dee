"""The journal: one append-only file that holds what a run learned.

All integers and floats are little-endian; CRC is ``zlib.crc32``.

Header, written once, whole, before the file has its name:

======  ==========  ===========================================================================
offset  type        field
======  ==========  ===========================================================================
0       8 bytes     magic ``89 45 5A 4A 0D 0A 1A 0A`` (a copy in text mode breaks it)
8       u32         format version: 1, 2 where records have a shape of their own, or 3 where they
                    hold scales
12      u32         number of the first step
16      u32         n, length of the JSON in bytes
20      n bytes     header as canonical JSON: UTF-8, sorted keys, no spaces, no NaN
20 + n  u32         CRC of everything before; also the start value of every CRC below, so that a
                    record of one journal does not pass in another
======  ==========  ===========================================================================

Magic, version, lengths and this CRC stay where they are in every later version. Then one record a
step, steps consecutive; 40 bytes + 12 B (B directions in the group) without touched tokens:

======  ==========  ===========================================================================
offset  type        field
======  ==========  ===========================================================================
0       2 bytes     mark ``45 5A``
2       u16         flags: 1 the step was skipped, 2 touched tokens follow, 4 a shape follows,
                    8 scales follow
4       u32         length of the record in bytes, this head and the last CRC included
8       u32         step
12      u32         B
16      u32         CRC of bytes 0..15: a damaged length is told from a record cut short
20      f64         sigma
28      f64         step size
36      3 u32       shape, if flagged: S evaluations, K credits, T lists of touched tokens; else
                    2, B and B
...     S B f32     losses of the evaluations in turn: +sigma side then -sigma side
...     K f32       credit
...     u32, f32s   scales, if flagged: their number and themselves
...     varints     touched tokens, if flagged: for each of the T examples the count, the first id
                    and the differences of the sorted ids (LEB128, 7 bits a byte, low bits first)
end-4   u32         CRC of the record before it
======  ==========  ===========================================================================

A record is appended by one ``write``, so kill -9 leaves at most a record cut short at the end, and
power loss at most zeros or a last record that is wrong. Such a tail is cut when a run resumes and
left out when a run is replayed. Damage with a whole record after it is an error, always.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edgezo.errors import BaseMismatch, EdgezoError
from edgezo.machine.files import atomic_write, locked, write_error
from edgezo.run.journal_record import (
    CRC,
    HEAD_BYTES,
    StepRecord,
    decode_record,
    encode_record,
    holds_record,
    is_shaped,
    record_length,
)

MAGIC = b"\x89EZJ\r\n\x1a\n"
VERSION = 3  # the latest that is read
_PREFIX = struct.Struct("<8sIII")  # magic, version, first step, JSON length


def check_base(header: Mapping[str, Any], content_hash: str) -> None:
    """Raise BaseMismatch unless the journal was written over the base with `content_hash`."""
    recorded = header.get("content_hash")
    if recorded != content_hash:
        raise BaseMismatch(
            "the journal belongs to other base weights: it was written over "
            f"{recorded}, the model given is {content_hash}. Give the base model that the run "
            "started from (`model` in the run's config.toml)."
        )


class Journal:
    """An open journal; use `create_journal` or `open_journal`. Bytes of the file never change
    once appended, except by `truncate_to`.

    header       the dictionary given at creation
    first_step   number of the first record
    next_step    number that the next record must have
    cut_bytes    bytes of an unfinished tail that opening cut off (resume) or left out (replay)
    note         a sentence about it for people, or ""
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        writable: bool,
        header: dict[str, Any],
        first_step: int,
        start: int,
        crc: int,
        version: int,
    ):
        self.path = path
        self.header = header
        self.version = version
        self.first_step = first_step
        self.cut_bytes = 0
        self.note = ""
        self._fd = fd
        self._writable = writable
        self._crc = crc
        # ends[i] is where record i begins and ends[i + 1] where it ends: 8 bytes a step in memory
        self._ends = array.array("Q", [start])

    @property
    def next_step(self) -> int:
        return self.first_step + len(self)

    @property
    def valid_bytes(self) -> int:
        """Size of the header and the whole records."""
        return self._ends[-1]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let another process write. Does not fsync."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def record(self, step: int) -> StepRecord:
        """The record of one step, read and verified again."""
        i = step - self.first_step
        if not 0 <= i < len(self):
            raise EdgezoError(
                f"{self.path}: no record of step {step}; the journal holds steps "
                f"{self.first_step} to {self.next_step - 1}."
            )
        begin, end = self._ends[i], self._ends[i + 1]
        os.lseek(self._fd, begin, os.SEEK_SET)
        data = os.read(self._fd, end - begin)
        record = decode_record(data, self._crc)
        if record is None or record.step != step:
            raise EdgezoError(
                f"{self.path}: the record of step {step} (byte {begin}) has changed on disk since "
                "it was read. Check the disk and restore the file from a copy."
            )
        return record

    def records(self, first: int | None = None) -> Iterator[StepRecord]:
        """All records from step `first` on, in order, one in memory at a time."""
        for step in range(self.first_step if first is None else first, self.next_step):
            yield self.record(step)

    def append(self, record: StepRecord) -> None:
        """Write one record; it survives the death of the process, though not of the machine, when
        this returns. If it raises (the disk is full), the file is as before and may be used on.
        """
        self._check_writable()
        if record.step != self.next_step:
            raise ValueError(f"step {record.step} after step {self.next_step - 1}")
        if self.version < 2 and is_shaped(record):
            raise ValueError("format 1 has two losses and one credit an example")
        if self.version < 3 and record.scales is not None:
            raise ValueError("only format 3 has scales")
        data = encode_record(record, self._crc)
        try:
            os.lseek(self._fd, self.valid_bytes, os.SEEK_SET)
            written = os.write(self._fd, data)
            if written < len(data):
                # a short write is how a full disk shows first; the second one would say so
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written")
        except BaseException as error:
            with contextlib.suppress(OSError):  # a tail that stays is cut by the next resume
                os.ftruncate(self._fd, self.valid_bytes)
            if isinstance(error, OSError):
                raise write_error(
                    self.path, f"step {record.step} ({len(data)} bytes)", error
                ) from error
            raise
        self._ends.append(self.valid_bytes + len(data))

    def truncate_to(self, step: int) -> None:
        """Drop the records of `step` and later ones; `step` is then the next to append."""
        self._check_writable()
        if not self.first_step <= step <= self.next_step:
            raise ValueError(
                f"step {step} is outside of {self.first_step} to {self.next_step}, the next one"
            )
        end = self._ends[step - self.first_step]
        os.ftruncate(self._fd, end)
        del self._ends[step - self.first_step + 1 :]

    def sync(self) -> None:
        """Make what was appended survive a power loss (fsync)."""
        self._check_writable()
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise write_error(self.path, "the journal", error) from error

    def _check_writable(self) -> None:
        if self._fd < 0 or not self._writable:
            raise ValueError("the journal is closed" if self._fd < 0 else "opened for replay only")


def create_journal(
    path: Path,
    header: Mapping[str, Any],
    first_step: int = 0,
    *,
    shaped: bool = False,
    scaled: bool = False,
) -> Journal:
    """Start a journal. `header` needs ``content_hash`` (of the base) and must be plain JSON.
    `shaped`: records may have other than two losses and one credit an example. `scaled`: and scales.

    Raises EdgezoError if the file exists, or cannot be written; then nothing is left behind.
    """
    if not isinstance(header.get("content_hash"), str):
        raise ValueError("a journal's header needs content_hash, the hash of the base weights")
    if os.path.lexists(path):
        raise EdgezoError(
            f"{path} exists already: a run is there. Continue it with --resume, or choose another "
            "--out."
        )
    text = json.dumps(
        header, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
    version = 3 if scaled else 2 if shaped else 1
    data = _PREFIX.pack(MAGIC, version, first_step, len(text)) + text
    atomic_write(path, data + CRC.pack(zlib.crc32(data)))
    return open_journal(path, resume=True)


def open_journal(path: Path, *, resume: bool) -> Journal:
    """Open and verify a journal.

    ``resume=True``: to go on writing. An unfinished tail is cut off (`cut_bytes`, `note`), and a
    second process that does the same is refused.
    ``resume=False``: to replay. The file is only read, a tail cut short is left out, and a last
    record that is complete but wrong is an error.

    Raises EdgezoError: no file, no journal, a later format, damage before the tail.
    """
    flags = (os.O_RDWR if resume else os.O_RDONLY) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise EdgezoError(
            f"{path}: no journal there. Give a run directory that `edgezo finetune` made (--out)."
        ) from None
    except OSError as error:
        raise EdgezoError(
            f"{path}: cannot be opened for {'writing' if resume else 'reading'} "
            f"({error.strerror}). Check that it is a file and whose it is."
        ) from error
    try:
        if resume:
            _lock(fd, path)
        with os.fdopen(fd, "rb", closefd=False) as file:
            header, first_step, start, crc, version = _read_header(file, path)
            journal = Journal(path, fd, resume, header, first_step, start, crc, version)
            _scan(journal, file, start, crc, lenient=resume)
        if resume and journal.cut_bytes:
            os.ftruncate(fd, journal.valid_bytes)
    except BaseException:
        os.close(fd)
        raise
    return journal


def _lock(file: int, path: Path) -> None:
    if not locked(file):
        raise EdgezoError(
            f"{path}: another process is writing this run. Wait for it or stop it, then resume."
        )


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int, int, int, int]:
    """(header, first step, offset of the first record, CRC that the records start from, version)."""
    damaged = EdgezoError(
        f"{path}: the journal's header is damaged or cut short (the file has "
        f"{os.fstat(file.fileno()).st_size} bytes). Nothing can be read without it: restore the "
        "file from a copy, or start the run again."
    )
    prefix = file.read(_PREFIX.size)
    if not prefix.startswith(MAGIC):
        if MAGIC.startswith(prefix):
            raise damaged
        raise EdgezoError(
            f"{path} is not a journal of edgezo: it begins with {prefix[:8]!r}. Give a run "
            "directory that `edgezo finetune` made, or its journal.bin."
        )
    if len(prefix) < _PREFIX.size:
        raise damaged
    _, version, first_step, n = _PREFIX.unpack(prefix)
    remaining = os.fstat(file.fileno()).st_size - _PREFIX.size
    if n + CRC.size > remaining:
        raise damaged
    text = file.read(n)
    crc = zlib.crc32(prefix + text)
    if file.read(CRC.size) != CRC.pack(crc):
        raise damaged
    if not 1 <= version <= VERSION:
        raise EdgezoError(
            f"{path}: format {version} of the journal; this edgezo reads formats up to {VERSION}. "
            "Install the version of edgezo that wrote it, or a later one."
        )
    try:
        header = json.loads(text)
    except ValueError:
        raise damaged from None
    if not isinstance(header, dict):
        raise damaged
    return header, first_step, _PREFIX.size + n + CRC.size, crc, version


def _scan(journal: Journal, file: BinaryIO, start: int, crc: int, lenient: bool) -> None:
    """Find the whole records; set the tail's `cut_bytes` and `note`, or raise."""
    size = os.fstat(file.fileno()).st_size
    at = start
    while at < size:
        head = file.read(HEAD_BYTES)
        length = record_length(head, crc)
        if length is None or at + length > size:
            break
        record = decode_record(head + file.read(length - len(head)), crc)
        if record is None:
            break
        if record.step != journal.next_step:
            raise EdgezoError(
                f"{journal.path}: step {record.step} follows step {journal.next_step - 1} at byte "
                f"{at}: records are missing or twice in the file. {_remedy(journal)}"
            )
        at += length
        journal._ends.append(at)
    if at == size:
        return
    file.seek(at)
    tail = file.read()
    length = record_length(tail[:HEAD_BYTES], crc)
    cut_short = len(tail) < (HEAD_BYTES if length is None else length) or not any(tail)
    if holds_record(tail[1:], crc) or not (cut_short or lenient):
        raise EdgezoError(
            f"{journal.path}: the record of step {journal.next_step} at byte {at} is damaged, "
            f"{len(tail)} bytes before the end of the file. {_remedy(journal)}"
        )
    journal.cut_bytes = len(tail)
    journal.note = (
        f"the journal ended with {len(tail)} bytes of an unfinished record of step "
        f"{journal.next_step}; {'cut off' if lenient else 'left out'}"
    )


def _remedy(journal: Journal) -> str:
    if not len(journal):
        return "Restore the file from a copy, or start the run again."
    return (
        "Restore the file from a copy; or keep what is whole, the first "
        f"{journal.valid_bytes} bytes (steps {journal.first_step} to {journal.next_step - 1}): "
        f"`head -c {journal.valid_bytes} {journal.path.name}` into a new file."
    )
