"""Blocks and tables that are read from the base's own files whenever they are wanted, and have no copy.

For matrices that nothing changes, in a command that looks at each of them once: an export or a replay. A copy on disk
(disk.py) would be as large as the model, and take longer than what is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgezo.weights.home import Home, Make, Traffic, make_block, parts_of
from edgezo.weights.layouts import Layout


class BaseBlock:
    """One block in the base's files, a ``Home``."""

    def __init__(self, name: str, layouts: Mapping[str, Layout], make: Mapping[str, Make]):
        self.name, self._make = name, make
        self.parts, self.data_bytes = parts_of(layouts)

    def open(self) -> int:
        return 0  # there from the start, with no update

    def reserve(self) -> None:
        """Nothing: it is never written."""

    def read(self, data: Tensor) -> None:
        """Fill ``data``. Raises EdgezoError where the base's file cannot be read."""
        make_block(self.parts, self._make, data)

    def write(self, data: Tensor, applied: int) -> None:
        raise TypeError("a block that updates change has no home in the base's files")

    def close(self) -> None:
        """Nothing: each read opens the file."""


class BaseTable:
    """An embedding table in the base's files, a ``Layout``."""

    def __init__(self, vacant: Layout, make: Callable[[slice], Layout]):
        self._vacant, self._make = vacant, make
        self.shape = vacant.shape

    def expand(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        wanted = (
            [rows] if isinstance(rows, slice) else [slice(row, row + 1) for row in rows.tolist()]
        )
        at = 0
        for part in wanted:
            size = part.stop - part.start
            self._make(part).expand(slice(0, size), out[at : at + size])
            at += size
        return out

    def direct(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def nbytes(self) -> int:
        """None of its bytes stay in memory."""
        return 0

    def tensors(self) -> dict[str, Tensor]:
        return self._vacant.tensors()

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        raise TypeError("the bytes of a table in the base's files cannot be replaced")


@dataclass
class BaseMedium:
    """The base's files as the place of all blocks after the first ``resident_blocks``, and of tables."""

    resident_blocks: int = 0
    kind: str = "base"
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="base")

    def home(self, name: str, layouts: Mapping[str, Layout], make: Mapping[str, Make]) -> BaseBlock:
        return BaseBlock(name, layouts, make)

    def table(self, vacant: Layout, make: Callable[[slice], Layout]) -> BaseTable:
        return BaseTable(vacant, make)

    def slot(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def read(self, home: Home, slot: Tensor) -> Future[None]:
        return self._thread.submit(home.read, slot)

    def write(self, home: Home, slot: Tensor, applied: int) -> Future[None]:
        return self._thread.submit(home.write, slot, applied)

    def close(self) -> None:
        """Wait for the reads that are queued."""
        self._thread.shutdown(wait=True)
