"""One record of a journal and its bytes; journal.py has the table of the layout.

CRC is ``zlib.crc32`` and starts from the CRC of the journal's header, so that a record of one journal does not pass in
another.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

_HEAD = struct.Struct("<2sHIII")  # mark, flags, record length, step, B


_SIZES = struct.Struct("<dd")  # sigma, step size


_SHAPE = struct.Struct("<III")  # evaluations, credits, lists of touched tokens


_COUNT = struct.Struct("<I")


CRC = struct.Struct("<I")


_MARK = b"EZ"


_SKIPPED, _TOUCHED, _SHAPED, _SCALED = 1, 2, 4, 8


HEAD_BYTES = _HEAD.size + CRC.size


_FIXED_BYTES = HEAD_BYTES + _SIZES.size + CRC.size


_MAX_STEP = 2**32 - 1


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


def record_length(head: bytes, crc: int) -> int | None:
    """Length from a record's head, or None if this is no whole, undamaged head."""
    if len(head) < HEAD_BYTES or not head.startswith(_MARK):
        return None
    if CRC.pack(zlib.crc32(head[: _HEAD.size], crc)) != head[_HEAD.size : HEAD_BYTES]:
        return None
    length: int = _HEAD.unpack_from(head)[2]
    return length if length >= _FIXED_BYTES else None


def holds_record(data: bytes, crc: int) -> bool:
    """True if an undamaged head of a record begins anywhere in `data`."""
    at = data.find(_MARK)
    while at >= 0:
        if record_length(data[at : at + HEAD_BYTES], crc) is not None:
            return True
        at = data.find(_MARK, at + 1)
    return False


def is_shaped(record: StepRecord) -> bool:
    """Whether a record says how many losses, credits and lists of tokens it has."""
    k, lists = len(record.credit), len(record.touched)
    return record.losses.shape != (2, k) or lists not in (0, k)


def encode_record(record: StepRecord, crc: int) -> bytes:
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
    length = _FIXED_BYTES + len(shape) + 4 * (sides * b + k) + len(scales) + len(touched)
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
    return body + CRC.pack(zlib.crc32(body, crc))


def decode_record(data: bytes, crc: int) -> StepRecord | None:
    """The record that fills `data`, arrays freshly owned; None if it is damaged."""
    if record_length(data[:HEAD_BYTES], crc) != len(data):
        return None
    end = len(data) - CRC.size
    if CRC.pack(zlib.crc32(data[:end], crc)) != data[end:]:
        return None
    _, flags, _, step, b = _HEAD.unpack_from(data)
    at = HEAD_BYTES + _SIZES.size
    sides, k, lists = 2, b, b
    if flags & _SHAPED:
        if at + _SHAPE.size > end:
            return None
        sides, k, lists = _SHAPE.unpack_from(data, at)
        at += _SHAPE.size
    after = at + 4 * (sides * b + k)
    if after > end:
        return None
    sigma, step_size = _SIZES.unpack_from(data, HEAD_BYTES)
    losses = np.frombuffer(data, "<f4", sides * b, at).astype(np.float32).reshape(sides, b)
    credit = np.frombuffer(data, "<f4", k, at + 4 * sides * b).astype(np.float32)
    scales = None
    if flags & _SCALED:
        if after + _COUNT.size > end:
            return None
        (n,) = _COUNT.unpack_from(data, after)
        start, after = after + _COUNT.size, after + _COUNT.size + 4 * n
        if after > end:
            return None
        scales = np.frombuffer(data, "<f4", n, start).astype(np.float32)
    touched: tuple[np.ndarray, ...] = ()
    if flags & _TOUCHED:
        touched = _get_all_ids(data[after:end], lists)
    skipped = bool(flags & _SKIPPED)
    return StepRecord(step, sigma, step_size, skipped, losses, credit, touched, scales)


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


def _get_all_ids(data: bytes, b: int) -> tuple[np.ndarray, ...]:
    """The CRC has vouched for `data`, so this is what `_put_ids` wrote."""
    numbers: list[int] = []
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value = shift = 0
    rows, at = [], 0
    for _ in range(b):
        count = numbers[at]
        rows.append(np.cumsum(numbers[at + 1 : at + 1 + count], dtype=np.int64))
        at += 1 + count
    return tuple(rows)
