"""Files that hold what a run has trained, damaged and forged: cases from a seed, and whether a reader believes them.

    head.safetensors, probe.safetensors, trained.safetensors     ``SoundSnapshot``, ``read_snapshot``
    probe.states                                                  ``SoundStates``, ``read_states``

Damage to their bytes is that of damage.py; ``forged_headers`` changes what a header says, and leaves it a header. Never
may numbers be read that were not written (``wrongly_read``).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz.damage import Beside, Damage, damaged, put
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.network.readout import StateFile
from edgezo.network.state_file import DamagedRow
from edgezo.run.directory import PROBE_KEYS
from edgezo.weights.saved import Saved, write_saved
from edgezo.weights.verified import open_saved

RUNS = ("ab" * 32, "cd" * 32)  # identities: of the run, and of another one


@dataclass(frozen=True)
class SoundSnapshot:
    """A file as a run writes it."""

    name: str
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def write(self, path: Path, run: str | None = RUNS[0]) -> bytes:
        """Write the file, without a digest where ``run`` is None, and return its bytes."""
        path.unlink(missing_ok=True)
        saved = [Saved.of(name, tensor) for name, tensor in self.tensors.items()]
        write_saved(path, saved, self.metadata, run=run)
        return path.read_bytes()


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def sound_snapshots(seed: int = 0) -> list[SoundSnapshot]:
    """One file of each kind."""
    g = torch.Generator().manual_seed(seed)
    head = {
        "head.delta": _normal(g, 2, 16),
        "head.adam_first": _normal(g, 2, 16),
        "head.adam_second": _normal(g, 2, 16).square(),
        "head.adam_steps": torch.tensor([8]),
        "head.reach": torch.tensor([1.5], dtype=torch.float64),
    }
    probe = {
        "probe.blocks": torch.tensor([3, 4]),
        "probe.weight": _normal(g, 2, 3, 16),
        "probe.bias": _normal(g, 3),
    }
    trained = {
        "layers.0.weight": _normal(g, 12, 10, dtype=torch.bfloat16),
        "layers.0.weight#low": torch.randint(-127, 128, (12, 10), dtype=torch.int8, generator=g),
        "layers.1.weight": _normal(g, 12, 10, dtype=torch.bfloat16),
        "layers.1.weight#low": torch.randint(-127, 128, (12, 10), dtype=torch.int8, generator=g),
        "norm": _normal(g, 9, 1, dtype=torch.float16),
    }
    figures = dict.fromkeys(sorted(PROBE_KEYS), "0.5") | {"used": "True", "rows": "24"}
    return [
        SoundSnapshot("head.safetensors", {"step": str(8 + seed)}, head),
        SoundSnapshot("probe.safetensors", figures, probe),
        SoundSnapshot("trained.safetensors", {"steps": str(8 + seed)}, trained),
    ]


def read_snapshot(path: Path, sound: SoundSnapshot) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a run would use of a file. Raises EdgezoError."""
    into = {name: torch.zeros_like(tensor) for name, tensor in sound.tensors.items()}
    with open_saved(path, set(sound.metadata), RUNS[0], "Restore it.") as file:
        file.read(into)
        return {name: file.metadata[name] for name in sound.metadata}, into


def wrongly_read(path: Path, sound: SoundSnapshot, data: bytes) -> bool:
    """Whether a file with these bytes is believed although it is another one than was written."""
    put(path, data)
    try:
        read_snapshot(path, sound)
    except EdgezoError:
        return False
    return True


PreparedSnapshot = tuple[SoundSnapshot, bytes, Beside]


def prepared(folder: Path, number: int) -> PreparedSnapshot:
    """A sound file, its bytes, and files of other runs, of other kinds, and of the same run at another time."""
    here = folder / "sound"
    sound, later = sound_snapshots()[number], sound_snapshots(1)[number]
    whole = sound.write(here)
    foreign = [file.write(here, RUNS[1]) for file in (sound, later)]
    foreign += [other.write(here) for other in sound_snapshots() if other.name != sound.name]
    return sound, whole, Beside(foreign, [later.write(here)])


def damaged_snapshots(
    folder: Path, seed: int, count: int
) -> Iterator[tuple[SoundSnapshot, Damage]]:
    """``count`` damaged files of each kind."""
    for number in range(len(sound_snapshots())):
        sound, whole, beside = prepared(folder, number)
        for case in damaged(whole, beside, seed, count - count // 3):
            yield sound, case
        for case in forged_headers(whole, seed, count // 3):
            yield sound, case


# ---------------------------------------------------------------------------------------------
# What a header says, changed; its digest stays


def _number(rng: random.Random, header: dict[str, Any]) -> None:
    metadata = header["__metadata__"]
    name = rng.choice(sorted(metadata))
    metadata[name] = rng.choice(("0", "9", "-1", "nan", "True", "False", "", "0" * 64, RUNS[1]))


def _without(rng: random.Random, header: dict[str, Any]) -> None:
    metadata = header["__metadata__"]
    for name in rng.sample(sorted(metadata), rng.randint(1, len(metadata))):
        del metadata[name]


def _swapped_tensors(rng: random.Random, header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.sample(names, 2)
    header[a], header[b] = header[b], header[a]


def _renamed(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"])
    header[name + rng.choice("xyz")] = header.pop(name)


def _retyped(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"])
    same = {"F32": "I32", "BF16": "F16", "F16": "BF16", "I8": "U8", "I64": "F64", "F64": "I64"}
    header[name]["dtype"] = same[header[name]["dtype"]]


def _reshaped(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"])
    header[name]["shape"] = rng.choice(
        (header[name]["shape"][::-1], [*header[name]["shape"], 1], [1, *header[name]["shape"]], [])
    )


def _moved(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"])
    by = rng.choice((-8, -1, 1, 8, 1 << 62, 10**4000))
    header[name]["data_offsets"] = [n + by for n in header[name]["data_offsets"]]


def _spelled(rng: random.Random, header: dict[str, Any]) -> None:
    """Nothing is changed but the order of keys."""
    items = list(header.items())
    rng.shuffle(items)
    header.clear()
    header.update(items)


FORGERIES: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    *(_number, _without, _swapped_tensors, _renamed, _retyped, _reshaped, _moved, _spelled),
)


def forged_headers(whole: bytes, seed: int, count: int) -> Iterator[Damage]:
    """``count`` files whose headers say something else, about the same bytes."""
    rng = random.Random(seed)
    length = int.from_bytes(whole[:8], "little")
    number = 0
    while number < count:
        header = json.loads(whole[8 : 8 + length])
        forge = rng.choice(FORGERIES)
        forge(rng, header)
        text = json.dumps(header, separators=rng.choice(((",", ":"), (", ", ": ")))).encode()
        text += b" " * (-len(text) % 8)
        data = len(text).to_bytes(8, "little") + text + whole[8 + length :]
        stripped = "sha256" not in header["__metadata__"] and "run" not in header["__metadata__"]
        if data != whole and not stripped:  # without both it is a file of an earlier version
            yield Damage(forge.__name__.strip("_"), data)
            number += 1


# ---------------------------------------------------------------------------------------------
# probe.states


@dataclass(frozen=True)
class SoundStates:
    """A file of the pass over the rows, and what is in it."""

    file: StateFile
    values: Tensor  # (blocks, rows, hidden) fp16 as fp32
    losses: Tensor  # (rows,)
    data: bytes


def sound_states(path: Path, seed: int = 0, run: str = RUNS[0]) -> SoundStates:
    """A file of 8 rows, 2 blocks and 24 numbers."""
    generator = torch.Generator().manual_seed(seed)
    values, losses = _normal(generator, 2, 8, 24), _normal(generator, 8)
    file = StateFile(path, 2, 24, run)
    file.keep(0)
    file.append(list(values), losses, 0)
    return SoundStates(file, values.half().float(), losses, path.read_bytes())


def states_wrongly_read(sound: SoundStates, data: bytes) -> bool:
    """Whether numbers are read from a file with these bytes that were not written, in a row that counts as sound."""
    put(sound.file.path, data)
    try:
        rows = sound.file.rows()
        read = torch.stack([sound.file.block(number, rows) for number in range(2)])
        losses = sound.file.losses(rows)
    except (EdgezoError, DamagedRow):
        return True  # ``rows`` has counted them as sound
    most = sound.values.shape[1]
    return rows > most or not (
        torch.equal(read, sound.values[:, :rows]) and torch.equal(losses, sound.losses[:rows])
    )


def prepared_states(folder: Path) -> tuple[SoundStates, list[bytes]]:
    """A sound file, and files of another run."""
    sound = sound_states(folder / "states")
    return sound, [sound_states(folder / "other", n, RUNS[1]).data for n in (0, 1)]


def damaged_states(folder: Path, seed: int, count: int) -> Iterator[tuple[SoundStates, Damage]]:
    """``count`` damaged files."""
    sound, foreign = prepared_states(folder)
    for case in damaged(sound.data, Beside(foreign), seed, count):
        yield sound, case


def measure(folder: Path, count: int, seed: int = 0) -> Mapping[str, tuple[int, int]]:
    """Damaged files of each kind that were believed, of how many."""
    totals: dict[str, tuple[int, int]] = {}

    def add(name: str, wrong: bool) -> None:
        before, of = totals.get(name, (0, 0))
        totals[name] = before + wrong, of + 1

    for sound, case in damaged_snapshots(folder, seed, count):
        add(sound.name, wrongly_read(folder / sound.name, sound, case.data))
    for states, case in damaged_states(folder, seed, count):
        add("probe.states", states_wrongly_read(states, case.data))
    return totals
