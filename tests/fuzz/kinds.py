"""The kinds of cases of the fuzz lane (lane.py): files of others, and files of edgezo's, each with its reader."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from fuzz import forged_journals, journals, overlays, snapshots
from fuzz.damage import damaged
from fuzz.datasets import SETS
from fuzz.lane import Believed, Kind
from fuzz.own_files import OWN
from fuzz.readers import READERS, FuzzReader

from edgezo.errors import EdgezoError
from edgezo.run.journal import open_journal

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def foreign(reader: FuzzReader) -> Callable[[int, Path], bool]:
    """A kind of files of others."""

    def read(seed: int, folder: Path) -> bool:
        name, data = reader.make(random.Random(seed))
        return reader.read(name, data, folder)

    return read


# ---------------------------------------------------------------------------------------------
# Journals


def damaged_journal(seed: int, folder: Path) -> bool:
    case, path = next(journals.damaged(seed)), folder / "journal.bin"
    path.write_bytes(case.data)
    accepted = False
    for resume in (False, True):
        try:
            with open_journal(path, resume=resume) as journal:
                accepted = True
                if why := journals.wrongly_accepted(case, journal):
                    raise Believed(f"{case.name} of {case.sound.name}: {why}")
        except EdgezoError:
            continue
    if path.read_bytes() != case.data:
        raise Believed("opening it has changed it")
    return accepted


def forged_journal(seed: int, folder: Path) -> bool:
    """Refused, or a journal: steps in their order, and nothing that is not finite."""
    (_, data), path = next(forged_journals.forged(seed)), folder / "journal.bin"
    path.write_bytes(data)
    accepted = False
    for resume in (False, True):
        try:
            with open_journal(path, resume=resume) as journal:
                accepted = not journal.settings or bool(journal.settings.model)
                for step, record in enumerate(journal.records()):
                    finite = np.isfinite([*record.credit, record.sigma, record.step_size]).all()
                    if record.step != step or not finite:
                        raise Believed(f"record {step} is of step {record.step}")
        except EdgezoError:
            continue
    return accepted


# ---------------------------------------------------------------------------------------------
# Files of what a run has trained


@cache
def _snapshot(number: int, folder: Path) -> snapshots.PreparedSnapshot:
    return snapshots.prepared(folder, number)


def snapshot(number: int) -> Callable[[int, Path], bool]:
    """Damage to the bytes of a file, and in a third of the cases to what its header says."""

    def read(seed: int, folder: Path) -> bool:
        sound, whole, beside = _snapshot(number, folder)
        cases = (
            damaged(whole, beside, seed, 1)
            if seed % 3
            else snapshots.forged_headers(whole, seed, 1)
        )
        case = next(cases)
        if snapshots.wrongly_read(folder / sound.name, sound, case.data):
            raise Believed(case.kind)
        return False

    return read


@cache
def _states(folder: Path) -> tuple[snapshots.SoundStates, list[bytes]]:
    return snapshots.prepared_states(folder)


def states(seed: int, folder: Path) -> bool:
    sound, foreign = _states(folder)
    case = next(damaged(sound.data, snapshots.Beside(foreign), seed, 1))
    if snapshots.states_wrongly_read(sound, case.data):
        raise Believed(case.kind)
    return False


@cache
def _block(folder: Path) -> overlays.PreparedBlock:
    return overlays.prepared_block(folder)


def block(seed: int, folder: Path) -> bool:
    sound, case = overlays.block_case(_block(folder), seed)
    if overlays.block_wrongly_read(sound, case.data):
        raise Believed(case.kind)
    return False


@cache
def _table(folder: Path, precision: str) -> overlays.SoundTable:
    return overlays.sound_table(folder / "overlay" / f"table-{precision}.overlay", precision)


def table(precision: str) -> Callable[[int, Path], bool]:
    def read(seed: int, folder: Path) -> bool:
        sound = _table(folder, precision)
        case = overlays.table_case(sound, seed)
        if overlays.table_wrongly_read(sound, case.data):
            raise Believed(case.kind)
        return False

    return read


KINDS: dict[str, Kind] = {
    **{name: Kind(foreign(reader), reader.share) for name, reader in (READERS | SETS).items()},
    **{name: Kind(*kind) for name, kind in OWN.items()},
    "journal-damaged": Kind(damaged_journal, 100),
    "journal-forged": Kind(forged_journal, 20),
    "head": Kind(snapshot(0), 100),
    "probe": Kind(snapshot(1), 100),
    "trained": Kind(snapshot(2), 100),
    "states": Kind(states, 100),
    "block": Kind(block, 100),
    "table-int8": Kind(table("int8"), 50),
    "table-fp32": Kind(table("fp32"), 50),
}
