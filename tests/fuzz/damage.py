"""Damage to bytes, whatever they stand for: cases from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Damage(NamedTuple):
    """Bytes that differ from those of the sound file."""

    kind: str
    data: bytes


class Beside(NamedTuple):
    """Other sound files."""

    foreign: Sequence[bytes]  # of other runs, and of other kinds
    later: Sequence[
        bytes
    ] = ()  # of the same name and run, at another time: sound as a whole, but not in part


SECTOR = 512  # bytes; files that are smaller have pieces of 16


def _flip(rng: random.Random, data: bytearray, at: int | None = None) -> None:
    at = rng.randrange(len(data)) if at is None else at
    data[at] ^= 1 << rng.randrange(8)


def flipped(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    data = bytearray(whole)
    _flip(rng, data)
    return bytes(data)


def flipped_often(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    data = bytearray(whole)
    first = rng.randrange(len(data))
    for _ in range(rng.randint(2, 8)):
        _flip(
            rng, data, min(len(data) - 1, first + rng.randrange(64)) if rng.random() < 0.5 else None
        )
    return bytes(data)


def truncated(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    return whole[: rng.randrange(len(whole))]


def extended(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    return whole + (bytes(rng.randint(1, 64)) if rng.random() < 0.5 else rng.randbytes(8))


def zeroed(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    first, last = _range(rng, whole)
    return whole[:first] + bytes(last - first) + whole[last:]


def overwritten(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    first, last = _range(rng, whole)
    return whole[:first] + rng.randbytes(last - first) + whole[last:]


def exchanged(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    """Two sectors in each other's place."""
    size, count = _sectors(whole)
    a, b = sorted(rng.sample(range(count), 2))
    return (
        whole[: a * size]
        + whole[b * size : (b + 1) * size]
        + whole[(a + 1) * size : b * size]
        + whole[a * size : (a + 1) * size]
        + whole[(b + 1) * size :]
    )


def shifted(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    """A range that begins a little later or earlier, in a file of the same size."""
    first, last = _range(rng, whole)
    by = rng.choice((1, 2, 4, 8, 16, 512, 4096)) % max(1, last - first)
    middle = whole[first:last]
    return whole[:first] + middle[by:] + middle[:by] + whole[last:]


def repeated(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    """A sector over another one: a write that went to the wrong place."""
    size, count = _sectors(whole)
    a, b = rng.sample(range(count), 2)
    return whole[: b * size] + whole[a * size : (a + 1) * size] + whole[(b + 1) * size :]


def torn(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    """The first part of one file and the rest of another: a write that did not end."""
    other, at = rng.choice((*beside.foreign, *beside.later)), rng.randrange(1, len(whole))
    return whole[:at] + other[at:]


def foreign(rng: random.Random, whole: bytes, beside: Beside) -> bytes:
    return rng.choice(beside.foreign)


KINDS: tuple[Callable[[random.Random, bytes, Beside], bytes], ...] = (
    *(flipped, flipped_often, truncated, extended, zeroed, overwritten),
    *(exchanged, shifted, repeated, torn, foreign),
)


def damaged(whole: bytes, beside: Beside, seed: int, count: int) -> Iterator[Damage]:
    """``count`` cases of damage to a file, every kind as often unless it would change nothing."""
    rng = random.Random(seed)
    number = 0
    while number < count:
        make = KINDS[rng.randrange(len(KINDS))]
        data = make(rng, whole, beside)
        if data != whole and data not in beside.later:
            yield Damage(make.__name__, data)
            number += 1


def put(path: Path, data: bytes) -> None:
    """Give a file these bytes in place: emptying it first would make some file systems wait for the disk."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def _range(rng: random.Random, whole: bytes) -> tuple[int, int]:
    first = rng.randrange(len(whole))
    return first, min(len(whole), first + rng.choice((1, 2, 4, 16, 512, 4096)))


def _sectors(whole: bytes) -> tuple[int, int]:
    size = SECTOR if len(whole) >= 4 * SECTOR else 16
    return size, len(whole) // size
