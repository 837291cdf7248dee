"""Where the bytes of a decoder block lie while it is not in memory, and how they are laid out there.

A *home* is a file on disk (disk.py), a buffer in RAM beside a GPU (ram.py), or the base itself (from_base.py). A *slot*
is the memory that blocks visit one after the other (residency.py). A *medium* has the homes and moves bytes between
homes and slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edgezo.machine.limits import PAGE_BYTES
from edgezo.weights.layouts import Layout


class Damaged(Exception):
    """What was read is not what was written."""


@dataclass
class Traffic:
    """Bytes that a running model has read from homes and written to them, counted when a copy is queued."""

    read_bytes: int = 0
    written_bytes: int = 0


class StoredTensor(NamedTuple):
    """Where one raw tensor lies in the bytes of a block."""

    owner: str  # the matrix's name
    suffix: str  # the raw tensor's name in its layout
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the block's bytes
    nbytes: int

    def view(self, data: Tensor) -> Tensor:
        """The tensor inside ``data``, the block's bytes (flat uint8)."""
        return data[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


def parts_of(layouts: Mapping[str, Layout]) -> tuple[list[StoredTensor], int]:
    """Where the raw tensors of (vacant) layouts lie, each from the start of a page; and the bytes of all."""
    parts, offset = [], 0
    for owner, layout in layouts.items():
        for suffix, tensor in layout.tensors().items():
            nbytes = tensor.numel() * tensor.element_size()
            parts.append(
                StoredTensor(owner, suffix, tensor.dtype, tuple(tensor.shape), offset, nbytes)
            )
            offset += -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    return parts, offset


# Makes a matrix from the base, some of its rows at a time.
Make = Callable[[], Iterator[tuple[slice, Layout]]]


def make_block(parts: list[StoredTensor], make: Mapping[str, Make], slot: Tensor) -> None:
    """Write the bytes of a block, as they are without an update, into ``slot``."""
    for owner, pieces in make.items():
        of_owner = [part for part in parts if part.owner == owner]
        for rows, made in pieces():
            raw = made.tensors()
            for part in of_owner:
                place = part.view(slot)
                if len(raw[part.suffix]) < len(place):  # of int4 codes two rows share their bytes
                    place = place[rows]
                place.copy_(raw[part.suffix])
            del made, raw  # before the next rows are read


class Home(Protocol):
    """Where the bytes of one block lie while it is not in a slot."""

    name: str
    parts: list[StoredTensor]
    data_bytes: int

    def open(self) -> int | None:
        """Open the home. Its bytes have the updates of so many steps; None: it holds nothing that can be used."""
        ...

    def reserve(self) -> None:
        """Take all the room that the block needs, so that no later write finds too little."""
        ...

    def read(self, data: Tensor) -> None:
        """Fill ``data`` (flat uint8, at least data_bytes). Raises Damaged."""
        ...

    def write(self, data: Tensor, applied: int) -> None:
        """Replace the bytes by ``data``, which has the updates of the first ``applied`` steps."""
        ...

    def close(self) -> None: ...


class Pending(Protocol):
    """A read or write that is queued."""

    def done(self) -> bool: ...

    def result(self) -> None:
        """Let whatever follows come after it. Raises what it raised."""
        ...


class Medium(Protocol):
    """Where blocks have their homes. Copies between homes and slots run beside the computation."""

    kind: str  # "disk", "host" or "base"
    resident_blocks: int  # so many decoder layers, the first ones, always stay in memory
    traffic: Traffic

    def home(self, name: str, layouts: Mapping[str, Layout], make: Mapping[str, Make]) -> Home:
        """The home of a block with these (vacant) layouts, which ``make`` makes from the base."""
        ...

    def table(self, vacant: Layout, make: Callable[[slice], Layout]) -> Layout | None:
        """An embedding table in a home, made some rows at a time; None where tables stay in memory."""
        ...

    def slot(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 zeros."""
        ...

    def read(self, home: Home, slot: Tensor) -> Pending: ...

    def write(self, home: Home, slot: Tensor, applied: int) -> Pending: ...

    def close(self) -> None: ...
