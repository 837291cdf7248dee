"""Messages of a fleet: what a server asks of a device, and what a device reports. Bytes in, bytes out.

A fleet is a run whose rows lie on devices that come and go. A message is the one bytes field that a transport carries,
little-endian:

    order    mark ``EZFO``, run u32, step u32, first u32, header bytes u32, records u32, examples u32,
             the journal's header, the records from step ``first`` on (each u32 bytes and itself),
             slot u32 and row u32 of each example
    report   mark ``EZFR``, run u32, steps u32, journal u32, state u64, evaluations u32, examples u32, text bytes u32,
             losses f32 (evaluations, examples), text

``run`` is the CRC of the journal's header, ``steps`` how many records the device has, ``journal`` a hash of all of them
(``Tally``), ``state`` the first 64 bits of the SHA-256 of what is trained, or 0. The text of a report is JSON: who the
device is, or why it cannot do what it was asked to.

Both sides are foreign to each other: whatever the bytes are, reading them gives a message that has the form above, or
ValueError. No count is believed that the bytes cannot hold.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_ORDER_HEAD = struct.Struct("<4sIIIIII")
_REPORT_HEAD = struct.Struct("<4sIIIQIII")
_RECORD_SIZE = struct.Struct("<I")
_ORDER_MARK, _REPORT_MARK = b"EZFO", b"EZFR"
MOST_TEXT_BYTES = 1 << 22  # of a report: settings of a run, or a sentence
MOST_LOSSES = 1 << 22  # of a report
NOTHING = np.zeros((0, 0), np.float32)


class Order(NamedTuple):
    """What a server asks of a device."""

    run: int
    step: int  # that the losses are wanted for
    first: int  # step of the first record
    header: bytes = b""  # of the journal, for a device that has none
    records: Sequence[bytes] = ()
    slots: Sequence[int] = ()  # places of the examples in the step's group
    rows: Sequence[int] = ()  # which of the device's rows they are

    def encoded(self) -> bytes:
        """The bytes of the order."""
        head = _ORDER_HEAD.pack(
            _ORDER_MARK,
            *(self.run, self.step, self.first),
            *(len(self.header), len(self.records), len(self.slots)),
        )
        records = b"".join(_RECORD_SIZE.pack(len(record)) + record for record in self.records)
        examples = np.array([self.slots, self.rows], "<u4").T.tobytes()
        return head + self.header + records + examples


class DeviceReport(NamedTuple):
    """What a device answers."""

    run: int  # 0: it has no journal
    steps: int
    journal: int
    state: int = 0
    losses: np.ndarray = NOTHING  # (S, examples of the order) float32
    text: Mapping[str, Any] = {}

    def encoded(self) -> bytes:
        """The bytes of the report."""
        text = json.dumps(self.text, sort_keys=True).encode() if self.text else b""
        head = _REPORT_HEAD.pack(
            _REPORT_MARK,
            *(self.run, self.steps, self.journal, self.state),
            *(*self.losses.shape, len(text)),
        )
        return head + self.losses.astype("<f4", order="C").tobytes() + text


def read_order(data: bytes) -> Order:
    """The order that ``data`` is. Raises ValueError for any other bytes."""
    _check_mark(data, _ORDER_HEAD, _ORDER_MARK, "order")
    _, run, step, first, header_bytes, count, examples = _ORDER_HEAD.unpack_from(data)
    at = _ORDER_HEAD.size
    header, at = _taken(data, at, header_bytes)
    records = []
    for _ in range(count):
        size, at = _taken(data, at, _RECORD_SIZE.size)
        record, at = _taken(data, at, *_RECORD_SIZE.unpack(size))
        records.append(record)
    pairs, at = _taken(data, at, 8 * examples)
    _check_end(data, at)
    slots, rows = np.frombuffer(pairs, "<u4").reshape(-1, 2).T.tolist()
    return Order(run, step, first, header, records, slots, rows)


def read_report(data: bytes) -> DeviceReport:
    """The report that ``data`` is, whatever its numbers are. Raises ValueError for any other bytes."""
    _check_mark(data, _REPORT_HEAD, _REPORT_MARK, "report")
    _, run, steps, journal, state, evaluations, examples, text_bytes = _REPORT_HEAD.unpack_from(
        data
    )
    if evaluations * examples > MOST_LOSSES or text_bytes > MOST_TEXT_BYTES:
        raise ValueError(f"it announces {evaluations} x {examples} losses and {text_bytes} bytes")
    numbers, at = _taken(data, _REPORT_HEAD.size, 4 * evaluations * examples)
    text, at = _taken(data, at, text_bytes)
    _check_end(data, at)
    losses = np.frombuffer(numbers, "<f4").astype(np.float32).reshape(evaluations, examples)
    return DeviceReport(run, steps, journal, state, losses, _read_text(text))


def _read_text(text: bytes) -> Mapping[str, Any]:
    """The JSON object of a report. Raises ValueError."""
    if not text:
        return {}
    try:
        read = json.loads(text.decode())
    except (ValueError, RecursionError) as problem:
        raise ValueError("its text is no JSON") from problem
    if not isinstance(read, dict):
        raise ValueError("its text is no JSON object")
    return read


def losses_problem(losses: np.ndarray, evaluations: int, examples: int) -> str:
    """Why losses (S, n) of a device cannot be those that it was asked for; "" where they can.

    A per-example loss is a mean of negative log-probabilities: finite, and not below 0.
    """
    if losses.shape != (evaluations, examples):
        lines, n = losses.shape
        return f"it sends {lines} x {n} losses, where {evaluations} x {examples} were asked for"
    if not np.isfinite(losses).all():
        return f"{int((~np.isfinite(losses)).sum())} of its {losses.size} losses are not finite"
    if (losses < 0).any():
        return f"a loss of it is {losses.min():g}, below 0"
    return ""


def outlying(losses: np.ndarray, times: float) -> np.ndarray:
    """The slots whose difference between sides is more than ``times`` the group's median one, (n,) int64.

    ``losses`` (S, B) with S >= 2; slots without finite losses neither count nor are named. The median is one that a
    minority of the group cannot move far, which the standard deviation in the credit is not. A group whose median is 0
    has none.
    """
    finite = np.flatnonzero(np.isfinite(losses).all(axis=0))
    if not len(finite) or len(losses) < 2:
        return np.zeros(0, np.int64)
    differences = np.abs(np.float64(losses[0, finite]) - np.float64(losses[1, finite]))
    median = float(np.median(differences))
    return finite[differences > times * median] if median else np.zeros(0, np.int64)


class Tally:
    """A hash of a journal's records, after each of them: u32, of SHA-256.

    A CRC would not do: over bytes that end with their CRC it is one number, whatever they are.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._after = array("I", [0])

    def add(self, record: bytes) -> None:
        """Take the next record in."""
        self._digest.update(record)
        self._after.append(int.from_bytes(self._digest.copy().digest()[:4], "little"))

    def __len__(self) -> int:
        return len(self._after) - 1

    def after(self, steps: int) -> int:
        """The hash of the first ``steps`` records."""
        return self._after[steps]


def _check_mark(data: bytes, head: struct.Struct, mark: bytes, what: str) -> None:
    if len(data) < head.size or not data.startswith(mark):
        raise ValueError(f"its {len(data)} bytes are no {what}, which begins with {mark!r}")


def _taken(data: bytes, at: int, n_bytes: int) -> tuple[bytes, int]:
    """The next ``n_bytes`` bytes, and where the ones after them begin. Raises ValueError."""
    if n_bytes > len(data) - at:
        raise ValueError(f"{n_bytes} bytes are announced where {len(data) - at} are left")
    return data[at : at + n_bytes], at + n_bytes


def _check_end(data: bytes, at: int) -> None:
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes at its end belong to nothing")
