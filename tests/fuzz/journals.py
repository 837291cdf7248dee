"""Journals that are damaged, and journals that are forged: cases from a seed, and what may become of each.

    damaged    bytes of a sound journal with flipped bits, zeroed or exchanged ranges, lost or repeated ones, foreign
               ones, cut short; no checksum is made right again. Never may a record be read that was not written, nor
               more than one be lost in silence (``wrongly_accepted``)
    forged     a sound journal whose fields say something else, with every checksum right. It may be refused, or be a
               journal: nothing else, and with little memory

Both begin with ``SoundJournal``s: those of tests/old_runs, of every format, and some that are made here.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.run.journal import Journal

OLD_RUNS = Path(__file__).resolve().parent.parent / "old_runs"
MAGIC = b"\x89EZJ\r\n\x1a\n"
SKIPPED, TOUCHED, SHAPED, SCALED = 1, 2, 4, 8
OLD_FORMATS = 3  # formats up to this one do not bind a record's body to its head
SHORTEST = 52  # bytes of a record


# ---------------------------------------------------------------------------------------------
# A writer of its own, which writes whatever its fields say


@dataclass
class RecordFields:
    """A record in fields that may contradict each other."""

    step: int
    flags: int
    examples: int
    sigma: float
    step_size: float
    floats: list[float]  # losses, then credits
    shape: tuple[int, int, int] | None = None
    scales: list[float] | None = None
    scale_count: int | None = None  # None: as many as there are
    varints: list[int] | None = None  # of touched tokens
    more: bytes = b""  # after everything else
    length: int | None = None  # None: what it is

    def encode(self, crc: int, bound: bool = True) -> bytes:
        """The bytes of the record; ``bound`` as in formats 4 to 6."""
        body = struct.pack("<dd", self.sigma, self.step_size)
        if self.shape is not None:
            body += struct.pack("<III", *self.shape)
        body += struct.pack(f"<{len(self.floats)}f", *self.floats)
        if self.scales is not None:
            count = len(self.scales) if self.scale_count is None else self.scale_count
            body += struct.pack("<I", count) + struct.pack(f"<{len(self.scales)}f", *self.scales)
        body += b"".join(map(varint, self.varints or [])) + self.more
        length = 20 + len(body) + 4 if self.length is None else self.length
        head = struct.pack(
            "<2sHIII", b"EZ", self.flags, length & 0xFFFFFFFF, self.step, self.examples
        )
        of_head = zlib.crc32(head, crc)
        whole = head + struct.pack("<I", of_head) + body
        last = zlib.crc32(body, of_head) if bound else zlib.crc32(whole, crc)
        return whole + struct.pack("<I", last)

    @staticmethod
    def decode(data: bytes) -> RecordFields:
        """The fields of a record that is sound."""
        _, flags, _, step, examples = struct.unpack_from("<2sHIII", data)
        sigma, step_size = struct.unpack_from("<dd", data, 20)
        at, end = 36, len(data) - 4
        shape = struct.unpack_from("<III", data, at) if flags & SHAPED else None
        at += 12 if shape else 0
        sides, credits, _ = shape or (2, examples, examples)
        count = sides * examples + credits
        floats = list(struct.unpack_from(f"<{count}f", data, at))
        at += 4 * count
        scales = None
        if flags & SCALED:
            (n,) = struct.unpack_from("<I", data, at)
            scales = list(struct.unpack_from(f"<{n}f", data, at + 4))
            at += 4 + 4 * n
        numbers = list(varints_in(data[at:end])) if flags & TOUCHED else None
        return RecordFields(
            step, flags, examples, sigma, step_size, floats, shape, scales, None, numbers
        )


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def varints_in(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def canonical(header: Any) -> bytes:
    """JSON as a journal has it."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="surrogatepass"
    )


@dataclass
class JournalFields:
    """A journal in fields that may contradict each other."""

    version: int
    first_step: int
    header: Any
    records: list[RecordFields] = field(default_factory=list)
    text: bytes | None = None  # of the header, in place of its JSON

    def encode(self) -> bytes:
        text = canonical(self.header) if self.text is None else self.text
        head = struct.pack("<8sIII", MAGIC, self.version, self.first_step, len(text)) + text
        crc = zlib.crc32(head)
        return b"".join(
            [
                *(head, struct.pack("<I", crc)),
                *(record.encode(crc, self.version > OLD_FORMATS) for record in self.records),
            ]
        )


# ---------------------------------------------------------------------------------------------
# Sound journals


class SoundJournal(NamedTuple):
    """The bytes of a journal, and where its header and each of its records end."""

    name: str
    data: bytes
    ends: tuple[int, ...]

    @property
    def records(self) -> list[bytes]:
        return [self.data[a:b] for a, b in zip(self.ends, self.ends[1:], strict=False)]

    def fields(self) -> JournalFields:
        """Its fields, to be changed."""
        version, first_step, n = struct.unpack_from("<III", self.data, 8)
        header = json.loads(self.data[20 : 20 + n])
        return JournalFields(
            version, first_step, header, [RecordFields.decode(r) for r in self.records]
        )

    @staticmethod
    def of(name: str, data: bytes) -> SoundJournal:
        """A journal without its unfinished tail, by the lengths that its records give."""
        ends = [20 + struct.unpack_from("<I", data, 16)[0] + 4]
        while ends[-1] + 8 <= len(data):
            end = ends[-1] + struct.unpack_from("<I", data, ends[-1] + 4)[0]
            if end > len(data):
                break
            ends.append(end)
        return SoundJournal(name, data[: ends[-1]], tuple(ends))


def made_here(name: str, steps: int, **config: Any) -> SoundJournal:
    """A journal of full weights, whose records name touched tokens and so have many lengths."""
    chance = random.Random(name)
    kept = {"model": "m", "train": ["full"], "precision": "fp32", "batch_size": 3, **config}
    header = {
        "content_hash": "ab12",
        "data_hash": "cd34",
        "dataset": {"kind": "label", "label_ids": [7, 3], "label_names": ["bad", "schön"]},
        "config": {"steps": max(1, steps), "step": 0.1, "sigma": 0.002, **kept},
    }
    fields = JournalFields(4, 0, header)
    for step in range(steps):
        floats = [chance.gauss(0, 1) for _ in range(9)]
        ids = [
            sorted({chance.randrange(300) for _ in range(chance.choice((1, 5, 60)))}) for _ in "abc"
        ]
        numbers = [n for row in ids for n in (len(row), *_differences(row))]
        fields.records.append(RecordFields(step, TOUCHED, 3, 0.002, 0.1, floats, varints=numbers))
    return SoundJournal.of(name, fields.encode())


def _differences(ids: Sequence[int]) -> list[int]:
    return [b - a for a, b in zip((0, *ids), ids, strict=False)]


@cache
def sound_journals() -> tuple[SoundJournal, ...]:
    """Of every format, with every part that a record can have."""
    files = sorted(OLD_RUNS.glob("finished/*/journal.bin"))
    old = [SoundJournal.of(file.parent.name, file.read_bytes()) for file in files]
    new = []
    for sound in old:
        fields = sound.fields()
        fields.version += OLD_FORMATS
        new.append(SoundJournal.of(f"{sound.name}, as now", fields.encode()))
    return (*old, *new, made_here("touched", 12), made_here("two", 2), made_here("none", 0))


@cache
def journals_of_now() -> tuple[SoundJournal, ...]:
    """Of the formats that are written now."""
    return tuple(sound for sound in sound_journals() if sound.data[8] > OLD_FORMATS)


# ---------------------------------------------------------------------------------------------
# Damage


class DamagedJournal(NamedTuple):
    """A case: what was done to which journal."""

    name: str
    sound: SoundJournal
    data: bytes


def flipped_bits(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 20))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def zeroed_range(data: bytes, chance: random.Random) -> bytes:
    a, b = _range(data, chance)
    return data[:a] + bytes(b - a) + data[b:]


def zeroed_end(data: bytes, chance: random.Random) -> bytes:
    a = chance.randrange(len(data))
    return data[:a] + bytes(len(data) - a)


def random_range(data: bytes, chance: random.Random) -> bytes:
    a, b = _range(data, chance)
    return data[:a] + chance.randbytes(b - a) + data[b:]


def lost_range(data: bytes, chance: random.Random) -> bytes:
    a, b = _range(data, chance)
    return data[:a] + data[b:]


def repeated_range(data: bytes, chance: random.Random) -> bytes:
    a, b = _range(data, chance)
    at = chance.choice((a, b, len(data), chance.randrange(len(data))))
    return data[:at] + data[a:b] + data[at:]


def exchanged_ranges(data: bytes, chance: random.Random) -> bytes:
    size = chance.randrange(1, max(2, len(data) // 3))
    a = chance.randrange(max(1, len(data) - 2 * size))
    b = chance.randrange(a + size, max(a + size + 1, len(data) - size + 1))
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def more_at_the_end(data: bytes, chance: random.Random) -> bytes:
    size = chance.choice((1, 19, 20, 76, 200, 5000))
    return data + chance.choice((bytes(size), chance.randbytes(size), data[-size:]))


def foreign_range(data: bytes, chance: random.Random) -> bytes:
    other = chance.choice(sound_journals()).data
    a, b = _range(other, chance)
    at = chance.randrange(len(data))
    return data[:at] + other[a:b] + data[chance.choice((at, min(len(data), at + b - a))) :]


DAMAGE: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flipped_bits, flipped_bits, truncated, zeroed_range, zeroed_end, random_range),
    *(lost_range, repeated_range, exchanged_ranges, more_at_the_end, foreign_range),
)


def _range(data: bytes, chance: random.Random) -> tuple[int, int]:
    """A range of bytes: any, or a sector of a disk."""
    sector = chance.choice((512, 1024))
    if chance.random() < 0.3 and len(data) > sector:
        a = chance.randrange(len(data) // sector) * sector
        return a, min(len(data), a + sector)
    a, b = sorted((chance.randrange(len(data)), chance.randrange(len(data) + 1)))
    return a, b


def at_records(sound: SoundJournal, chance: random.Random) -> tuple[str, bytes]:
    """Whole records that are lost, repeated, exchanged or zeroed: the damage that is hardest to see."""
    records = sound.records
    a, b = sorted((chance.randrange(len(records) + 1), chance.randrange(len(records) + 1)))
    some, start = records[a:b], sound.data[: sound.ends[0]]
    name, changed = chance.choice(
        (
            ("lost records", records[:a] + records[b:]),
            ("repeated records", records[:b] + some + records[b:]),
            ("reversed records", records[:a] + some[::-1] + records[b:]),
            ("zeroed records", [*records[:a], *(bytes(len(r)) for r in some), *records[b:]]),
            ("damaged heads", [*records[:a], *(_bad_head(r, chance) for r in some), *records[b:]]),
        )
    )
    return name, start + b"".join(changed)


def _bad_head(record: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(20)
    return record[:at] + bytes([record[at] ^ 1 << chance.randrange(8)]) + record[at + 1 :]


def damaged(seed: int) -> Iterator[DamagedJournal]:
    """Damaged journals without end: the same ones for the same seed. Never a sound one."""
    chance = random.Random(seed)
    while True:
        sound = chance.choice(journals_of_now())
        if chance.random() < 0.25:
            name, data = at_records(sound, chance)
        else:
            damage = chance.choice(DAMAGE)
            name, data = damage.__name__, damage(sound.data, chance)
            if chance.random() < 0.1:
                second = chance.choice(DAMAGE)
                name, data = f"{name}, {second.__name__}", second(data or b"\0", chance)
        # A range of another journal may be all of it: what is read must then be as it was there.
        sound = next((s for s in journals_of_now() if data.startswith(s.data[: s.ends[0]])), sound)
        if data != sound.data:
            yield DamagedJournal(name, sound, data)


def wrongly_accepted(case: DamagedJournal, journal: Journal) -> str:
    """What is wrong with a damaged journal that was opened; "" where what it gives is right.

    Right is: the first records of the sound journal, as they were. What is left out behind them has less bytes than two
    records, and holds none of the others. Where every byte is in its place, only the last record is missing.
    """
    sound, records = case.sound, case.sound.records
    n, end = len(journal), journal.valid_bytes
    if n > len(records) or end != sound.ends[n] or case.data[:end] != sound.data[:end]:
        return f"{n} records end at byte {end}, and not all are as they were"
    tail = case.data[end:]
    if len(tail) != journal.cut_bytes:
        return f"{len(tail)} bytes follow, and {journal.cut_bytes} are said to"
    longest = max(map(len, records), default=len(tail))
    one, two = (len(records[i]) if i < len(records) else SHORTEST for i in (n, n + 1))
    if len(tail) >= (one + two if n < len(records) else longest + SHORTEST):
        return f"{len(tail)} bytes are left out, as many as two records have"
    if any(record in tail for record in records[n:]):
        return "a whole record is left out"
    if len(case.data) == len(sound.data) and n < len(records) - 1:
        return f"{len(records) - n} records are left out"
    return ""
