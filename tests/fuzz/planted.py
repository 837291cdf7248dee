"""Readers with a fault each, which the fuzz lane has to report."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fuzz.lane import Believed, Kind

from edgezo.errors import EdgezoError

SEED = 3  # of the case that goes wrong; the others are refused


def _refused() -> bool:
    raise EdgezoError("the file is damaged")


def _raises(seed: int, folder: Path) -> bool:
    return {"a": True}["b"] if seed == SEED else _refused()


def _leaves(seed: int, folder: Path) -> bool:
    return sys.exit(0) if seed == SEED else _refused()


def _ends(seed: int, folder: Path) -> bool:
    if seed == SEED:
        print("about to end", file=sys.stderr)
        os.abort()
    return _refused()


def _loops(seed: int, folder: Path) -> bool:
    while seed == SEED:
        pass
    return _refused()


def _eats(seed: int, folder: Path) -> bool:
    return len(bytearray(b"x") * 300_000_000) > 0 if seed == SEED else _refused()


def _eats_all(seed: int, folder: Path) -> bool:
    pieces = []
    while seed == SEED:
        pieces.append(bytearray(b"x") * 100_000_000)
    return _refused()


def _believes(seed: int, folder: Path) -> bool:
    if seed == SEED:
        raise Believed("a flipped bit")
    return _refused()


def _says_nothing(seed: int, folder: Path) -> bool:
    raise EdgezoError("" if seed == SEED else "the file is damaged")


def _prints(seed: int, folder: Path) -> bool:
    print("[]")
    return True


PLANTED = {
    "raises": Kind(_raises),
    "leaves": Kind(_leaves),
    "ends": Kind(_ends),
    "loops": Kind(_loops),
    "eats": Kind(_eats),
    "eats-all": Kind(_eats_all),
    "believes": Kind(_believes),
    "says-nothing": Kind(_says_nothing),
    "prints": Kind(_prints),
}
