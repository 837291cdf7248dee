"""One record of a journal and its bytes; journal.py has the table of the layout.

CRC is ``zlib.crc32`` and starts from the CRC of the journal's header, so that a record of one journal does not pass in
another. A right CRC proves nothing of what a record says, because whoever makes a file can compute it. So reading takes
exactly the bytes that a writer would have written, and never believes a count that the bytes cannot hold.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LAYOUTS = (
    3  # formats 1 to 3; formats 4 to 6 have the same ones, and bind a record's body to its head
)
_HEAD = struct.Struct("<2sHIII")  # mark, flags, record length, step, B
_SIZES = struct.Struct("<dd")  # sigma, step size
_SHAPE = struct.Struct("<III")  # evaluations, credits, lists of touched tokens
_COUNT = struct.Struct("<I")
CRC = struct.Struct("<I")

_MARK = b"EZ"
_SKIPPED, _TOUCHED, _SHAPED, _SCALED = 1, 2, 4, 8
_ALL_FLAGS = _SKIPPED | _TOUCHED | _SHAPED | _SCALED

HEAD_BYTES = _HEAD.size + CRC.size
FIXED_BYTES = HEAD_BYTES + _SIZES.size + CRC.size
SHAPE_BYTES, COUNT_BYTES = _SHAPE.size, _COUNT.size
_MAX_STEP = _MAX_ID = 2**32 - 1
_MOST_LISTS = 2**16  # of touched tokens: a batch has 1024 examples at most
_LONGEST_VARINT = 5  # bytes of a number below 2**35
_PIECE_BYTES = 1 << 16  # of varints that are read at a time: bounds the memory


@dataclass(frozen=True, eq=False)
class StepRecord:
    """What one step needs to be applied again without data or forwards."""

    step: int
    sigma: float
    step_size: float
    skipped: bool
    losses: np.ndarray  # (S, B) float32: +sigma side, -sigma side
    # (K,) float32; K = B but where the whole batch is tried along each direction, and B + 1 where the last one is
    # the mean of an earlier step's
    credit: np.ndarray
    touched: tuple[np.ndarray, ...] = ()  # K or 1 sorted unique token id arrays; () if not recorded
    # (1 + n,) float32: a factor, then a number for each trained tensor by name (finetuner.py)
    scales: np.ndarray | None = None


class RecordHead(NamedTuple):
    """What the first bytes of a record say."""

    flags: int
    length: int  # of the whole record in bytes
    step: int
    examples: int  # B

    @property
    def shaped(self) -> bool:
        """Whether the record says how many losses, credits and lists of tokens it has."""
        return bool(self.flags & _SHAPED)

    @property
    def scaled(self) -> bool:
        """Whether the record holds scales."""
        return bool(self.flags & _SCALED)


def read_head(head: bytes, crc: int) -> RecordHead | None:
    """The head of a record at the beginning of ``head``; None if there is no whole, undamaged one."""
    if len(head) < HEAD_BYTES or not head.startswith(_MARK):
        return None
    if CRC.pack(zlib.crc32(head[: _HEAD.size], crc)) != head[_HEAD.size : HEAD_BYTES]:
        return None
    read = RecordHead(*_HEAD.unpack_from(head)[1:])
    return read if read.length >= FIXED_BYTES else None


def holds_record(data: bytes, crc: int) -> bool:
    """True if an undamaged head of a record begins anywhere in ``data``."""
    values = np.frombuffer(data, np.uint8)
    last = len(values) - HEAD_BYTES + 1
    if last <= 0:
        return False
    begins = values[:last] == _MARK[0]
    # Flags are below 16: few places are left, even in bytes that were made to have many marks.
    for offset, most in ((1, None), (2, _ALL_FLAGS), (3, 0)):
        there = values[offset : last + offset]
        begins &= there == _MARK[1] if most is None else there <= most
    places = np.flatnonzero(begins).tolist()
    return any(read_head(data[at : at + HEAD_BYTES], crc) is not None for at in places)


def is_shaped(record: StepRecord) -> bool:
    """Whether a record says how many losses, credits and lists of tokens it has."""
    k, lists = len(record.credit), len(record.touched)
    return record.losses.shape != (2, k) or lists not in (0, k)


def _last_crc(body: bytes, crc: int, bound: bool) -> int:
    """The CRC of a record, from its bytes before it; ``crc`` is the header's, ``bound`` in journals of format 4 to 6.

    The CRC of bytes that end with their own CRC is one number, whatever they are. So a CRC over head and body, as in
    formats 1 to 3, does not depend on the head: two records of one length could exchange their bodies unseen. The
    CRC of the body alone, which starts from that of the head, depends on both.
    """
    if not bound:
        return zlib.crc32(body, crc)
    (of_head,) = CRC.unpack_from(body, _HEAD.size)
    return zlib.crc32(memoryview(body)[HEAD_BYTES:], of_head)


def encode_record(record: StepRecord, crc: int, *, bound: bool = True) -> bytes:
    """One record in the layout of the module's table; `crc` is the header's. ValueError if the
    arrays have not the shapes and types of `StepRecord` (rounding here would break replay)."""
    if record.credit.ndim != 1 or record.losses.ndim != 2:
        raise ValueError(f"losses {record.losses.shape}, credit {record.credit.shape}")
    if record.losses.dtype != np.float32 or record.credit.dtype != np.float32:
        raise ValueError(f"losses {record.losses.dtype}, credit {record.credit.dtype}, not float32")
    sides, b = record.losses.shape
    k, lists = len(record.credit), len(record.touched)
    if lists not in (0, 1, k):
        raise ValueError(f"touched tokens of {lists} examples, not of {k}")
    shaped = is_shaped(record)
    if not 0 <= record.step <= _MAX_STEP:
        raise ValueError(f"step {record.step} is not in 0 to {_MAX_STEP}")
    flags = (_SKIPPED if record.skipped else 0) | (_TOUCHED if record.touched else 0)
    flags |= _SHAPED if shaped else 0
    scales = b""
    if record.scales is not None:
        if record.scales.ndim != 1 or record.scales.dtype != np.float32:
            raise ValueError(f"scales {record.scales.shape} {record.scales.dtype}")
        flags |= _SCALED
        scales = _COUNT.pack(len(record.scales)) + record.scales.astype("<f4", copy=False).tobytes()
    touched = bytearray()
    for ids in record.touched:
        _put_ids(touched, ids)
    shape = _SHAPE.pack(sides, k, lists) if shaped else b""
    length = FIXED_BYTES + len(shape) + 4 * (sides * b + k) + len(scales) + len(touched)
    head = _HEAD.pack(_MARK, flags, length, record.step, b)
    body = b"".join(
        (
            head,
            CRC.pack(zlib.crc32(head, crc)),
            _SIZES.pack(record.sigma, record.step_size),
            shape,
            record.losses.astype("<f4", order="C", copy=False).tobytes(),
            record.credit.astype("<f4", order="C", copy=False).tobytes(),
            scales,
            touched,
        )
    )
    return body + CRC.pack(_last_crc(body, crc, bound))


def decode_record(
    data: bytes, crc: int, head: RecordHead | None = None, *, bound: bool = True
) -> StepRecord | None:
    """The record that fills ``data``, arrays freshly owned; None if its bytes are damaged.

    ``head`` is what `read_head` made of it, where that was called before.
    Raises ValueError, with the problem, for bytes whose CRCs are right and that ``encode_record`` never makes, or whose
    numbers are not finite. Memory is at most ten times the size of ``data``.
    """
    head = head or read_head(data[:HEAD_BYTES], crc)
    if head is None or head.length != len(data):
        return None
    end = len(data) - CRC.size
    if CRC.pack(_last_crc(data[:end], crc, bound)) != data[end:]:
        return None
    if head.flags & ~_ALL_FLAGS:
        raise ValueError(f"its flags are {head.flags:#x}, and only those in {_ALL_FLAGS:#x} exist")
    rest = _Rest(data, HEAD_BYTES, end)
    sigma, step_size = rest.take(_SIZES)
    b = head.examples
    sides, k, lists = 2, b, b if head.flags & _TOUCHED else 0
    if head.shaped:
        sides, k, lists = rest.take(_SHAPE)
    _check_lists(head, k, lists)
    losses = rest.floats(sides * b).reshape(sides, b)
    credit = rest.floats(k)
    scales = rest.floats(*rest.take(_COUNT)) if head.scaled else None
    touched = _lists_of_ids(rest.varints(), lists) if lists else ()
    if rest.left_bytes:
        raise ValueError(f"{rest.left_bytes} bytes at its end belong to nothing")
    skipped = bool(head.flags & _SKIPPED)
    record = StepRecord(head.step, sigma, step_size, skipped, losses, credit, touched, scales)
    if head.shaped != is_shaped(record):
        raise ValueError("it gives its shape where that follows from B, or leaves it out")
    if problem := not_finite(record):
        raise ValueError(problem)
    return record


def not_finite(record: StepRecord) -> str:
    """Which number of a record is NaN or infinite and must not be; "" where none is. Losses may be."""
    for name, value in (("sigma", record.sigma), ("step size", record.step_size)):
        if not math.isfinite(value):
            return f"its {name} is {value}"
    if not np.isfinite(record.credit).all():
        return "a credit is not finite"
    # Weights that have become NaN give scales that are, in a step that is skipped.
    if record.scales is not None and not record.skipped and not np.isfinite(record.scales).all():
        return "a scale is not finite"
    return ""


def _check_lists(head: RecordHead, credits: int, lists: int) -> None:
    """Raise ValueError for another number of lists of touched tokens than a record can have."""
    if lists not in (0, 1, credits) or lists > _MOST_LISTS:
        raise ValueError(f"it has touched tokens of {lists} examples, and {credits} credits")
    if bool(lists) != bool(head.flags & _TOUCHED):
        raise ValueError(f"its flags {head.flags:#x} and its {lists} lists of tokens disagree")


@dataclass
class _Rest:
    """The bytes of a record that are still to be read, ``data[at:end]``."""

    data: bytes
    at: int
    end: int

    @property
    def left_bytes(self) -> int:
        return self.end - self.at

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The numbers of ``layout``. Raises ValueError where there are not so many bytes."""
        self._skip(layout.size)
        return layout.unpack_from(self.data, self.at - layout.size)

    def floats(self, count: int) -> np.ndarray:
        """(count,) float32. Raises ValueError where there are not so many."""
        self._skip(4 * count)
        return np.frombuffer(self.data, "<f4", count, self.at - 4 * count).astype(np.float32)

    def varints(self) -> np.ndarray:
        """All that is left as LEB128 numbers, (n,) int64. Raises ValueError for what ``_put_varint`` does not write."""
        parts = []
        while self.left_bytes:
            size = min(_PIECE_BYTES, self.left_bytes)
            piece = np.frombuffer(self.data, np.uint8, size, self.at)
            ends = np.flatnonzero(piece < 128)
            if not len(ends):
                raise ValueError("the last number of its touched tokens has no end")
            piece = piece[: ends[-1] + 1]
            starts = np.concatenate(([0], ends[:-1] + 1))
            lengths = ends + 1 - starts
            if lengths.max() > _LONGEST_VARINT or np.any((piece[ends] == 0) & (lengths > 1)):
                raise ValueError("a number of its touched tokens is longer than it has to be")
            shifts = 7 * (np.arange(len(piece)) - np.repeat(starts, lengths))
            parts.append(np.add.reduceat((piece & 127).astype(np.int64) << shifts, starts))
            self._skip(len(piece))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > self.left_bytes:
            raise ValueError(f"{n_bytes} bytes are announced where {self.left_bytes} are left")
        self.at += n_bytes


def _lists_of_ids(numbers: np.ndarray, lists: int) -> tuple[np.ndarray, ...]:
    """Sorted unique ids, one (n,) int64 array a list. Raises ValueError unless ``numbers`` are exactly those lists."""
    rows: list[np.ndarray] = []
    at = 0
    for _ in range(lists):
        if at >= len(numbers):
            raise ValueError(f"its touched tokens end after {len(rows)} of {lists} lists")
        first, at = at + 1, at + 1 + int(numbers[at])
        if at > len(numbers):
            raise ValueError(f"list {len(rows)} of its touched tokens is cut short")
        ids = np.cumsum(numbers[first:at], dtype=np.int64)
        if np.any(ids[1:] == ids[:-1]) or (len(ids) and ids[-1] > _MAX_ID):
            raise ValueError("its touched tokens are not sorted, unique and below 2**32")
        rows.append(ids)
    if at != len(numbers):
        raise ValueError(f"{len(numbers) - at} numbers follow its touched tokens")
    return tuple(rows)


def _put_ids(out: bytearray, ids: np.ndarray) -> None:
    values = np.asarray(ids)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"touched tokens are {values.dtype} {values.shape}, not a row of integers")
    _put_varint(out, len(values))
    last = -1
    for value in values.tolist():
        if value <= last:
            raise ValueError(f"touched tokens are not sorted and unique: {value} after {last}")
        _put_varint(out, value - max(last, 0))
        last = value


def _put_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
