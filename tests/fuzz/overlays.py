"""Weights on disk, damaged: cases from a seed, and whether a block or a row of a table is believed.

    block-NNNN.overlay     ``SoundBlock``: believed only as it was written, else made again
    table-N.overlay        ``SoundTable``: a row that differs from the one that was written is an error

Damage to their bytes is that of damage.py.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from fuzz.damage import Beside, Damage, damaged, put
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine.limits import PAGE_BYTES
from edgezo.weights.disk import DiskTable, OverlayFile
from edgezo.weights.home import Damaged, Traffic
from edgezo.weights.layouts import place, vacant

RUNS = ("run", "another run")
SHAPE = (48, 64)
TABLE_ROWS = 12


@dataclass(frozen=True)
class SoundBlock:
    """A block's file with the updates of 7 steps, and its bytes in memory."""

    path: Path
    run: str
    memory: Tensor
    data: bytes

    def open(self) -> OverlayFile:
        return OverlayFile(self.path, self.run, _layouts(), Traffic())


def _layouts() -> dict[str, object]:
    how = {"table": False, "rounding": "plane", "trained": True}
    return {name: vacant(SHAPE, "bf16", **how) for name in ("q", "k")}  # type: ignore[arg-type]


def sound_block(path: Path, seed: int = 0, run: str = RUNS[0], applied: int = 7) -> SoundBlock:
    """A block of two bf16 matrices with their low-order planes: 6 pages and the head's."""
    path.parent.mkdir(exist_ok=True)
    file = OverlayFile(path, run, _layouts(), Traffic())
    file.open()
    file.reserve()
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 256, (file.data_bytes,), dtype=torch.uint8, generator=generator)
    file.write(memory, applied)
    file.close()
    return SoundBlock(path, run, memory, path.read_bytes())


def block_wrongly_read(sound: SoundBlock, data: bytes) -> bool:
    """Whether a file with these bytes is used as a block that was not written so."""
    put(sound.path, data)
    file, memory = sound.open(), torch.zeros_like(sound.memory)
    try:
        applied = file.open()
        if applied is None:
            return False
        file.read(memory)
        return applied != 7 or not torch.equal(memory, sound.memory)
    except Damaged:
        return False
    finally:
        file.close()


class PreparedBlock(NamedTuple):
    """A sound block, and other files: of another run, and of the same at another time; whole, and their data alone."""

    sound: SoundBlock
    beside: Beside
    data_beside: Beside


def prepared_block(folder: Path) -> PreparedBlock:
    sound = sound_block(folder / "overlay" / "block-0000.overlay")
    other = folder / "overlay" / "block-0001.overlay"
    foreign = [sound_block(other, n, RUNS[1]).data for n in (0, 1)]
    beside = Beside(foreign, [sound_block(other, 1, applied=8).data])
    others = [data[PAGE_BYTES:] for data in (*beside.foreign, *beside.later)]
    return PreparedBlock(
        sound, beside, Beside([data for data in others if data != sound.data[PAGE_BYTES:]])
    )


def block_case(prepared: PreparedBlock, seed: int) -> tuple[SoundBlock, Damage]:
    """The damaged file of a seed; half of the damage is to the data alone."""
    whole = prepared.sound.data
    if seed % 2:
        return prepared.sound, next(damaged(whole, prepared.beside, seed, 1))
    case = next(damaged(whole[PAGE_BYTES:], prepared.data_beside, seed, 1))
    return prepared.sound, Damage(case.kind, whole[:PAGE_BYTES] + case.data)


def damaged_blocks(folder: Path, seed: int, count: int) -> Iterator[tuple[SoundBlock, Damage]]:
    """``count`` damaged files."""
    prepared = prepared_block(folder)
    for number in range(seed * count, (seed + 1) * count):
        yield block_case(prepared, number)


def of_format_1(data: bytes) -> bytes:
    """A block's file as versions wrote it whose checksum was the CRC of the pages' sums."""
    sums = torch.frombuffer(bytearray(data[PAGE_BYTES:]), dtype=torch.int64)
    crc = zlib.crc32(sums.view(-1, PAGE_BYTES // 8).sum(1).numpy().tobytes())
    head = data[:8] + struct.pack("<I", 1) + data[12:20] + struct.pack("<I", crc) + data[24:56]
    return head + struct.pack("<I", zlib.crc32(head)) + data[60:]


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoundTable:
    """A table on disk that is in use, and what it holds."""

    table: DiskTable
    raw: dict[str, Tensor]
    data: bytes


def sound_table(path: Path, precision: str = "int8") -> SoundTable:
    """A table of 12 rows."""
    path.parent.mkdir(exist_ok=True)
    shape = (TABLE_ROWS, SHAPE[1])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    how = {"table": True, "rounding": None, "trained": precision != "int8"}
    empty = vacant(shape, precision, **how)  # type: ignore[arg-type]
    file = OverlayFile(path, RUNS[0], {"table": empty}, Traffic())
    file.open()
    table = DiskTable(file, empty)
    table.fill(lambda rows: place(weight[rows], precision, **how))  # type: ignore[arg-type]
    raw = {suffix: tensor.clone() for suffix, tensor in table.raw(slice(0, TABLE_ROWS)).items()}
    return SoundTable(table, raw, path.read_bytes())


def table_wrongly_read(sound: SoundTable, data: bytes) -> bool:
    """Whether a row is read, from a file with these bytes, that was not written so."""
    put(sound.table.file.path, data)
    for row in range(TABLE_ROWS):
        try:
            raw = sound.table.raw(slice(row, row + 1))
        except EdgezoError:
            continue
        if any(not torch.equal(raw[suffix][0], whole[row]) for suffix, whole in sound.raw.items()):
            return True
    return False


def table_case(sound: SoundTable, seed: int) -> Damage:
    """The damaged file of a seed: a table has no head to be damaged."""
    data = sound.data[PAGE_BYTES:]
    case = next(damaged(data, Beside([bytes(len(data)), data[::-1]]), seed, 1))
    return Damage(case.kind, sound.data[:PAGE_BYTES] + case.data)


def damaged_tables(folder: Path, seed: int, count: int) -> Iterator[tuple[SoundTable, Damage]]:
    """``count`` damaged files."""
    for precision in ("int8", "fp32"):
        sound = sound_table(folder / "overlay" / "table-0.overlay", precision)
        for number in range(seed * count, seed * count + count // 2):
            yield sound, table_case(sound, number)
        sound.table.file.close()


def measure(folder: Path, count: int, seed: int = 0) -> Mapping[str, tuple[int, int]]:
    """Damaged files of each kind that were believed, of how many; blocks by the kind of damage too."""
    totals: dict[str, tuple[int, int]] = {}

    def add(name: str, wrong: bool) -> None:
        before, of = totals.get(name, (0, 0))
        totals[name] = before + wrong, of + 1

    for block, case in damaged_blocks(folder, seed, count):
        wrong = block_wrongly_read(block, case.data)
        add("block", wrong)
        add(f"block, {case.kind}", wrong)
    for table, case in damaged_tables(folder, seed, count):
        add("table", table_wrongly_read(table, case.data))
    return totals
