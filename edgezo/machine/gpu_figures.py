"""What a plan counts with for a GPU: each figure with the card that it was measured on. Standard library only.

A card that was never measured is planned with the figures of the first card in the table. ``edgezo doctor --calibrate``
measures them on the user's card (gpu_calibration.py) and keeps them in the cache; they come first then.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine.downloads import cache_dir
from edgezo.machine.files import atomic_write
from edgezo.machine.limits import MB

FILE = "gpus.json"  # in the cache: figures by card and version of PyTorch
MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class GpuFigures:
    """Figures of one card. Bytes are those of its memory."""

    card: str  # what they were measured on
    source: str  # when, and by what
    context_bytes: int  # the driver's, for a process with the kernels of a run
    workspace_bytes: int  # cuBLAS's, inside PyTorch's allocator
    copying_bytes: int  # of two more streams, where blocks lie in the RAM
    flops_s: float  # bf16 products of a run's sizes
    copy_bytes_s: float  # from locked RAM to the card
    block_s: float  # of a step for each block, however small: the launches of its kernels

    def of(self, card: str) -> bool:
        """Whether they were measured on such a card."""
        return self.card == card


MEASURED_CARDS = (
    GpuFigures(
        card="NVIDIA H100 80GB HBM3",
        source="2026-11-22, three sessions, driver 580, torch 2.11+cu130; noise was made on the CPU then",
        context_bytes=742 * MB,
        workspace_bytes=33 * MB,
        copying_bytes=72 * MB,
        flops_s=2e14,
        copy_bytes_s=2e10,
        block_s=1.2e-2,
    ),
)
REFERENCE_CARD = MEASURED_CARDS[0]
# Figures outside of these bounds were not measured right, and are not believed.
_BOUNDS = {
    "context_bytes": (10 * MB, 8000 * MB),
    "workspace_bytes": (0, 2000 * MB),
    "copying_bytes": (0, 2000 * MB),
    "flops_s": (1e9, 1e17),
    "copy_bytes_s": (1e7, 1e14),
    "block_s": (0.0, 10.0),
}


def figures_of(card: str) -> GpuFigures:
    """The figures that plans for this card count with: the user's, else those of the table, else REFERENCE_CARD's."""
    with suppress(EdgezoError, OSError, ValueError, TypeError, KeyError, RecursionError):
        stored = _read(cache_dir() / FILE)[_key(card)]
        figures = GpuFigures(**{field.name: stored[field.name] for field in fields(GpuFigures)})
        if _believable(figures, card):
            return figures
    return next((one for one in MEASURED_CARDS if one.of(card)), REFERENCE_CARD)


def keep(figures: GpuFigures) -> Path:
    """Store the figures of a card in the cache, beside those of other cards; returns the file."""
    if not _believable(figures, figures.card):
        raise EdgezoError(
            f"what was measured on the {figures.card} cannot be right: {asdict(figures)}.\n"
            "Close other programs that use the GPU, and run edgezo doctor --calibrate again."
        )
    file = cache_dir() / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, RecursionError):
        known = _read(file)
    known[_key(figures.card)] = asdict(figures)
    atomic_write(file, json.dumps(known, indent=1, sort_keys=True).encode())
    return file


def rounded_up(figures: GpuFigures) -> GpuFigures:
    """With what is taken rounded up to whole MB."""
    sizes = {
        name: -(-getattr(figures, name) // MB) * MB for name in _BOUNDS if name.endswith("_bytes")
    }
    return replace(figures, **sizes)


def _key(card: str) -> str:
    """A driver's context grows with the kernels of PyTorch's version."""
    try:
        return f"{card}, torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        return card


def _read(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        known = json.loads(opened.read(MOST_FILE_BYTES))
    if not isinstance(known, dict):
        raise ValueError("not a table of cards")
    return known


def _believable(figures: GpuFigures, card: str) -> bool:
    numbers = all(
        isinstance(value := getattr(figures, name), int | float) and low <= value <= high
        for name, (low, high) in _BOUNDS.items()
    )
    return numbers and figures.of(card) and isinstance(figures.source, str)
