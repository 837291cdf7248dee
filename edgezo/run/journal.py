"""The journal: one append-only file that holds what a run learned.

All integers and floats are little-endian; CRC is ``zlib.crc32``.

Header, written once, whole, before the file has its name:

======  ==========  ===========================================================================
offset  type        field
======  ==========  ===========================================================================
0       8 bytes     magic ``89 45 5A 4A 0D 0A 1A 0A`` (a copy in text mode breaks it)
8       u32         format version: 4, 5 where records have a shape of their own, or 6 where they
                    hold scales. Versions 1, 2 and 3 differ only in the last CRC of a record
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
end-4   u32         CRC of bytes 20..end-4, which starts from that of bytes 0..15; in versions 1
                    to 3 the CRC of bytes 0..end-4, which starts from that of the header
======  ==========  ===========================================================================

A record is appended by one ``write``, so kill -9 leaves at most a record cut short at the end, and
power loss zeros or records that are wrong. A tail that can only be one record is cut when a run
resumes, and kept beside (journal_kept.py); one that is cut short is left out when a run is replayed.
All other damage is an error, always. So is a record whose checksums are right and that the run of
the header cannot have written (journal_meaning.py).
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_write, write_error
from edgezo.machine.open_files import locked, open_inside
from edgezo.plan.config import RunConfig
from edgezo.run.journal_header import JournalHead, encode_header, read_head_of
from edgezo.run.journal_kept import (
    DroppedRecord,
    keep_cut,
    open_regular,
    read_again,
    remove_again,
    write_again,
)
from edgezo.run.journal_meaning import format_problem
from edgezo.run.journal_record import (
    FIXED_BYTES,
    HEAD_BYTES,
    LAYOUTS,
    RecordHead,
    StepRecord,
    decode_record,
    encode_record,
    holds_record,
    not_finite,
    read_head,
)


class Journal:
    """An open journal; use `create_journal` or `open_journal`. Bytes of the file never change
    once appended, except by `repair` and `truncate_to`.

    header       the dictionary given at creation
    first_step   number of the first record
    next_step    number that the next record must have
    cut_bytes    bytes of an unfinished tail, which `repair` cuts off (resume) or which is left out (replay)
    note         a sentence about it for people, or ""
    earlier      the journal of the run that this one goes on from, its parent; None: this run began at the base
    """

    def __init__(self, path: Path, fd: int, writable: bool, head: JournalHead):
        self.path = path
        self.header, self.version, self.first_step = head.header, head.version, head.first_step
        self.cut_bytes = 0
        self.note = ""
        self.earlier: Journal | None = None
        self._fd = fd
        self._writable = writable
        self._crc, self._meaning = head.crc, head.meaning
        # ends[i] is where record i begins and ends[i + 1] where it ends: 8 bytes a step in memory
        self._ends = array.array("Q", [head.start])
        self._longest_bytes = 0  # of a record
        self._scales: int | None = None  # numbers in the scales of the last record
        self._dropped: dict[int, DroppedRecord] = {}  # records that are computed again, by step
        self._repaired = False

    @property
    def next_step(self) -> int:
        return self.first_step + len(self)

    @property
    def valid_bytes(self) -> int:
        """Size of the header and the whole records."""
        return self._ends[-1]

    @property
    def settings(self) -> RunConfig:
        """The settings that the run began with. Raises EdgezoError where the journal is of no run."""
        if self._meaning is None:
            raise EdgezoError(f"{self.path}: the journal's header has no settings of a run.")
        return self._meaning.cfg

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and those of its parents, and let another process write. Does not fsync."""
        if self.earlier is not None:
            self.earlier.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def chain(self) -> list[Journal]:
        """The journals from the base to this one, which comes last."""
        return [*(self.earlier.chain() if self.earlier is not None else ()), self]

    # -- reading ------------------------------------------------------------------------------------------

    def record(self, step: int) -> StepRecord:
        """The record of one step, read and verified again. Raises EdgezoError."""
        begin, end = self._place(step)
        record = self._decode(self._read(begin, end), step, begin)
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

    def step_sizes_from(self, step: int) -> dict[int, float]:
        """Step sizes by step, from `step` on: of the records, and of those that are computed again."""
        dropped = {s: item.step_size for s, item in self._dropped.items() if s >= step}
        return dropped | {record.step: record.step_size for record in self.records(step)}

    def _place(self, step: int) -> tuple[int, int]:
        """The bytes at which a record begins and ends. Raises EdgezoError for a step that has none."""
        i = step - self.first_step
        if not 0 <= i < len(self):
            raise EdgezoError(
                f"{self.path}: no record of step {step}; the journal holds steps "
                f"{self.first_step} to {self.next_step - 1}."
            )
        return self._ends[i], self._ends[i + 1]

    def _read(self, begin: int, end: int) -> bytes:
        try:
            os.lseek(self._fd, begin, os.SEEK_SET)
            return os.read(self._fd, end - begin)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _decode(
        self, data: bytes, step: int, at: int, head: RecordHead | None = None
    ) -> StepRecord | None:
        """The record of `step` at byte `at`; None if its bytes are damaged. EdgezoError for what no run writes."""
        try:
            return self._checked(data, head)
        except ValueError as problem:
            raise self._meaningless(str(problem), step, at) from problem

    def _checked(self, data: bytes, head: RecordHead | None = None) -> StepRecord | None:
        """The record that fills `data`; None if its bytes are damaged. ValueError for what no run writes."""
        record = decode_record(data, self._crc, head, bound=self.version > LAYOUTS)
        if record is not None and (problem := self._problem(record)):
            raise ValueError(problem)
        return record

    def _problem(self, record: StepRecord) -> str:
        """What a record of this journal, whose numbers are finite, cannot be; "" where it can be one."""
        if problem := format_problem(record, self.version):
            return problem
        return "" if self._meaning is None else self._meaning.problem(record)

    def _meaningless(self, problem: str, step: int, at: int) -> EdgezoError:
        return EdgezoError(
            f"{self.path}: the record of step {step} at byte {at} has right checksums, but "
            f"{problem}: no run wrote it. {_remedy(self)}"
        )

    # -- scanning -----------------------------------------------------------------------------------------

    def _scan(self, file: BinaryIO, lenient: bool) -> None:
        """Find the whole records; set the tail's `cut_bytes` and `note`, or raise EdgezoError."""
        size = os.fstat(file.fileno()).st_size
        at = self.valid_bytes
        head = None
        while at < size:
            begin = file.read(HEAD_BYTES)
            head = read_head(begin, self._crc)
            if head is None:
                break
            self._check_head(head, at)
            if at + head.length > size:
                break
            rest = file.read(head.length - HEAD_BYTES)
            record = self._decode(begin + rest, head.step, at, head)
            if record is None:
                break
            at += head.length
            self._longest_bytes = max(self._longest_bytes, head.length)
            self._scales = None if record.scales is None else len(record.scales)
            self._ends.append(at)
        if at < size:
            file.seek(at)
            self._judge_tail(file, size - at, head, lenient)

    def _check_head(self, head: RecordHead, at: int) -> None:
        """Raise EdgezoError unless the record that begins so can be the next one."""
        if head.step != self.next_step:
            raise EdgezoError(
                f"{self.path}: step {head.step} follows step {self.next_step - 1} at byte "
                f"{at}: records are missing or twice in the file. {_remedy(self)}"
            )
        if self._meaning is not None:
            if problem := self._meaning.head_problem(head, self._scales):
                raise self._meaningless(problem, head.step, at)

    def _judge_tail(
        self, file: BinaryIO, n_bytes: int, head: RecordHead | None, lenient: bool
    ) -> None:
        """Take the end of the file, which is no whole record, for an unfinished one; else raise EdgezoError."""
        is_tail = self._is_one_record(n_bytes, head)
        if is_tail:
            tail = file.read(n_bytes)
            cut_short = n_bytes < (HEAD_BYTES if head is None else head.length) or not any(tail)
            is_tail = (cut_short or lenient) and not holds_record(tail[1:], self._crc)
        if not is_tail:
            raise EdgezoError(
                f"{self.path}: the record of step {self.next_step} at byte {self.valid_bytes} is damaged, "
                f"{n_bytes} bytes before the end of the file. {_remedy(self)}"
            )
        self.cut_bytes = n_bytes
        self.note = f"the journal ended with {n_bytes} bytes of an unfinished record of step {self.next_step}"
        if not lenient:
            self.note += "; left out"

    def _is_one_record(self, n_bytes: int, head: RecordHead | None) -> bool:
        """Whether the end of the file can only be of one record: `head` is its head, None if that is damaged."""
        if n_bytes < HEAD_BYTES:
            return True
        if head is not None:
            return n_bytes <= head.length
        if self._meaning is None:
            return n_bytes < 2 * FIXED_BYTES
        return self._meaning.is_one_record(
            n_bytes, self.next_step, self._longest_bytes, self._scales
        )

    # -- writing ------------------------------------------------------------------------------------------

    def append(self, record: StepRecord) -> None:
        """Write one record; it survives the death of the process, though not of the machine, when
        this returns. If it raises (the disk is full), the file is as before and may be used on.
        """
        self._check_writable()
        if record.step != self.next_step:
            raise ValueError(f"step {record.step} after step {self.next_step - 1}")
        if problem := format_problem(record, self.version):
            raise ValueError(problem)
        data = encode_record(record, self._crc, bound=self.version > LAYOUTS)
        if problem := not_finite(record) or self._problem(record):
            raise EdgezoError(
                f"{self.path}: step {record.step} cannot be recorded: {problem}. Nothing was written. "
                "Where losses have become very large, start again with a smaller --step."
            )
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
        if self._dropped and self.next_step > max(self._dropped):
            self._dropped = {}
            with contextlib.suppress(OSError):  # nothing reads it: the journal has its steps
                remove_again(self.path)

    @property
    def run(self) -> int:
        """The CRC of the header, u32: journals of one run have the same."""
        return self._crc

    def head_bytes(self) -> bytes:
        """The bytes of the header, with which the journal of every copy of this run begins. Raises EdgezoError."""
        return self._read(0, self._ends[0])

    def encoded(self, step: int) -> bytes:
        """The bytes of the record of one step. Raises EdgezoError."""
        self.record(step)
        return self._read(*self._place(step))

    def append_encoded(self, data: bytes) -> None:
        """Append the record that ``encoded`` of a journal with this header has given. Raises EdgezoError."""
        record = self._decode(data, self.next_step, self.valid_bytes)
        if record is None:
            raise EdgezoError(
                f"{self.path}: a record of step {self.next_step} that another process has sent is damaged, or of "
                "another run."
            )
        self.append(record)

    def repair(self) -> None:
        """Cut off the unfinished record at the end, if there is one; its bytes are kept beside first.

        To be called before anything is written. Raises EdgezoError; the journal is then as it was.
        """
        if self.cut_bytes and not self._repaired:
            tail = self._read(self.valid_bytes, self.valid_bytes + self.cut_bytes)
            kept = keep_cut(self.path, self.next_step, tail)
            self._cut(self.valid_bytes)
            self.note += f"; cut off, and kept in {kept.name}"
        self._repaired = True

    def truncate_to(self, step: int) -> None:
        """Drop the records of `step` and later ones; `step` is then the next to append.

        They are kept beside until as many have been appended again: a second kill loses none of them.
        """
        self._check_writable()
        if not self.first_step <= step <= self.next_step:
            raise ValueError(
                f"step {step} is outside of {self.first_step} to {self.next_step}, the next one"
            )
        if step == self.next_step:
            return
        dropped = {s: item for s, item in self._dropped.items() if s >= step}
        for record in self.records(step):
            data = self._read(*self._place(record.step))
            dropped[record.step] = DroppedRecord(record.step_size, data)
        write_again(self.path, dropped)
        self._dropped = dropped
        self._cut(self._ends[step - self.first_step])
        del self._ends[step - self.first_step + 1 :]

    def sync(self) -> None:
        """Make what was appended survive a power loss (fsync)."""
        self._check_writable()
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise write_error(self.path, "the journal", error) from error

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise write_error(self.path, "its shorter form", error) from error

    def _check_writable(self) -> None:
        if self._fd < 0 or not self._writable:
            raise ValueError("the journal is closed" if self._fd < 0 else "opened for replay only")
        if self.cut_bytes and not self._repaired:
            raise ValueError("the journal ends with an unfinished record: repair() comes first")


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
    version = LAYOUTS + (3 if scaled else 2 if shaped else 1)
    data = encode_header(header, version, first_step)
    if os.path.lexists(path):
        raise EdgezoError(
            f"{path} exists already: a run is there. Continue it with --resume, or choose another "
            "--out."
        )
    atomic_write(path, data)
    return open_journal(path, resume=True)


def open_journal(path: Path, *, resume: bool) -> Journal:
    """Open and verify a journal. The file is only read.

    ``resume=True``: to go on writing, once `Journal.repair` has cut an unfinished tail off. A second
    process that does the same is refused.
    ``resume=False``: to replay. A tail cut short is left out, and a last record that is complete but
    wrong is an error.

    Raises EdgezoError: no file, no journal, a later format, damage before the tail, a header or a
    record that no run has written.
    """
    try:
        fd = open_inside(path, os.O_RDWR) if resume else open_regular(path, os.O_RDONLY)
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
            journal = Journal(path, fd, resume, read_head_of(file, path))
            journal._scan(file, lenient=resume)
        if resume:
            journal._dropped = read_again(path, journal._crc, journal._checked)
    except OSError as error:
        os.close(fd)
        raise _unreadable(path, error) from error
    except BaseException:
        os.close(fd)
        raise
    return journal


def _lock(file: int, path: Path) -> None:
    if not locked(file):
        raise EdgezoError(
            f"{path}: another process is writing this run. Wait for it or stop it, then resume."
        )


def _unreadable(path: Path, error: OSError) -> EdgezoError:
    return EdgezoError(
        f"{path}: cannot be read ({error.strerror or error}). Check the disk, and restore the file from a copy."
    )


def _remedy(journal: Journal) -> str:
    if not len(journal):
        return "Restore the file from a copy, or start the run again."
    return (
        "Restore the file from a copy; or keep what is whole, the first "
        f"{journal.valid_bytes} bytes (steps {journal.first_step} to {journal.next_step - 1}): "
        f"`head -c {journal.valid_bytes} {journal.path.name}` into a new file."
    )
