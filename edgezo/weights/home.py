"""Where the bytes of a block lie while the block is not in memory, and how they are laid out there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edgezo.machine.limits import PAGE_BYTES
from edgezo.weights.layouts import Layout, TrainedLayout


class Damaged(Exception):
    """The bytes read are not the bytes written."""


@dataclass
class Traffic:
    """Bytes of blocks elsewhere that a running model has read and written, counted when they are asked for."""

    read_bytes: int = 0
    written_bytes: int = 0


class StoredTensor(NamedTuple):
    """One raw tensor of a file."""

    owner: str  # the matrix's name
    suffix: str  # the raw tensor's name in its layout
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # from the start of the data
    nbytes: int

    def view(self, data: Tensor) -> Tensor:
        """The tensor inside ``data`` (flat uint8)."""
        return data[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


def parts_of(layouts: Mapping[str, Layout]) -> tuple[list[StoredTensor], int]:
    """Where the raw tensors of (vacant) layouts lie, each from the start of a page; and how long that is."""
    parts, offset = [], 0
    for owner, layout in layouts.items():
        for suffix, tensor in layout.tensors().items():
            nbytes = tensor.numel() * tensor.element_size()
            parts.append(
                StoredTensor(owner, suffix, tensor.dtype, tuple(tensor.shape), offset, nbytes)
            )
            offset += -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    return parts, offset


class Home(Protocol):
    """Where the bytes of one block lie while it is not in a slot."""

    name: str
    parts: list[StoredTensor]
    data_bytes: int

    def open(self) -> int | None:
        """The step up to which updates are in what an earlier process left here; None: nothing that could be used."""
        ...

    def reserve(self) -> None: ...

    def read(self, data: Tensor) -> None:
        """Fill ``data`` (flat uint8, at least data_bytes). Raises Damaged."""
        ...

    def write(self, data: Tensor, applied: int) -> None:
        """Replace the bytes, which hold the updates before step ``applied``."""
        ...

    def close(self) -> None: ...


class Pending(Protocol):
    """A read or write that was queued."""

    def done(self) -> bool: ...

    def result(self) -> None:
        """Let what follows come after it. Raises what it raised."""
        ...


class Medium(Protocol):
    """Where blocks have their homes, and what moves them to their slots and back beside the computation."""

    kind: str  # disk or host
    resident_blocks: int  # the first decoder layers stay in memory
    traffic: Traffic

    def home(self, name: str, layouts: Mapping[str, Layout]) -> Home: ...

    def table(self, vacant: Layout, make: Callable[[slice], Layout]) -> TrainedLayout | None:
        """A home for an embedding table, made anew; None where tables stay in memory."""
        ...

    def slot(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 zeros."""
        ...

    def read(self, home: Home, slot: Tensor) -> Pending: ...

    def write(self, home: Home, slot: Tensor, applied: int) -> Pending: ...

    def close(self) -> None: ...
