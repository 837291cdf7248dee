"""Blocks of a model that live on disk and visit memory one after the other.

A decoder layer's matrices lie in an overlay file. An accelerate ``ModelHook`` binds them to a slot before the
layer's forward and releases them after it, while a thread reads the next block into the other slot. The update of
step t is applied to a block when it is bound at step t + 1, and the slot is written back while the layer computes:
one read and one write of each block a step. Frozen blocks are never written.

    bind(i)      wait for block i; apply what it lacks, make it again if it is ahead or damaged; queue its write;
                 queue the read of block i + 1
    release(i)   its matrices are empty again; the slot may be read into

One thread does all reads and writes in the order in which they were queued, so a slot is never overwritten before
its block is on disk. Two slots are all the memory that the blocks take, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from edgezo.errors import EdgezoError
from edgezo.files import write_error
from edgezo.footprint import SLOTS
from edgezo.layouts import Layout
from edgezo.overlay import Damaged, DiskTable, OverlayFile, Traffic


@dataclass(frozen=True)
class DiskSpec:
    """Where the overlay lies, and which decoder layers stay in memory: the first ones."""

    directory: Path
    identity: str  # of the run that the files must be of
    resident_blocks: int = 0


@dataclass
class Block:
    """One decoder layer on disk."""

    index: int
    file: OverlayFile
    layouts: dict[str, Layout]  # vacant but while the block is bound
    make: dict[str, Callable[[], Layout]]  # each matrix anew, from the base
    vacant: dict[str, dict[str, Tensor]]
    trained: bool
    applied: int = 0  # updates of steps before this one are in

    def adopt(self, data: Tensor) -> None:
        raw: dict[str, dict[str, Tensor]] = {owner: {} for owner in self.layouts}
        for part in self.file.parts:
            raw[part.owner][part.suffix] = part.view(data)
        for owner, layout in self.layouts.items():
            layout.adopt(raw[owner])

    def empty(self) -> None:
        for owner, layout in self.layouts.items():
            layout.adopt(self.vacant[owner])


@dataclass
class Residency:
    """The blocks and tables of one model that are on disk.

    ``catch_up(names, first)`` applies the updates of steps first to target - 1 to matrices that are bound.
    """

    spec: DiskSpec
    catch_up: Callable[[Sequence[str], int], None]
    target: int = 0  # the step up to which a bound block's updates are applied
    note: Callable[[str], None] = lambda text: None
    traffic: Traffic = field(default_factory=Traffic)
    blocks: list[Block] = field(default_factory=list)
    tables: list[DiskTable] = field(default_factory=list)
    # A slot is flat uint8, as long as the largest block.
    _free: list[Tensor] = field(default_factory=list)
    _ahead: dict[int, tuple[Tensor, Future[None]]] = field(default_factory=dict)
    _bound: tuple[Block, Tensor] | None = None
    _writes: list[Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.spec.directory.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise write_error(self.spec.directory, "the overlay", problem) from problem
        for file in self.spec.directory.glob("block-*.overlay"):
            # Of a layer that stays in memory now: what it holds would be outdated when it is wanted again.
            if int(file.name.split("-")[1].split(".")[0]) < self.spec.resident_blocks:
                file.unlink(missing_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="overlay")

    # -- building -----------------------------------------------------------------------------------------

    def table(self, name: str, vacant: Layout, make: Callable[[slice], Layout]) -> DiskTable:
        """Put a table on disk, made anew."""
        file = self._file(f"table-{len(self.tables)}", {name: vacant})
        file.open()
        held = DiskTable(file, vacant)
        held.fill(make)
        self.tables.append(held)
        return held

    def block(
        self,
        layouts: dict[str, Layout],
        make: dict[str, Callable[[], Layout]],
        *,
        trained: bool,
    ) -> Block:
        """Put a decoder layer on disk; a file of it that an earlier process of this run left is used as it is."""
        index = len(self.blocks)
        file = self._file(f"block-{index + self.spec.resident_blocks:04}", layouts)
        vacant = {owner: layout.tensors() for owner, layout in layouts.items()}
        block = Block(index, file, layouts, make, vacant, trained)
        self.blocks.append(block)
        if (applied := file.open()) is not None:
            block.applied = applied
            return block
        file.reserve()
        self._widen(file.data_bytes)
        slot = self._free.pop()
        self._make_again(block, slot)
        file.write(slot, 0)
        block.empty()
        self._free.append(slot)
        return block

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Hook the layers that the blocks are of, in order."""
        self._widen(max(block.file.data_bytes for block in self.blocks))
        for block, layer in zip(self.blocks, layers, strict=True):
            add_hook_to_module(layer, _Visit(self, block.index))

    def _file(self, name: str, layouts: Mapping[str, Layout]) -> OverlayFile:
        path = self.spec.directory / f"{name}.overlay"
        return OverlayFile(path, self.spec.identity, layouts, self.traffic)

    def _widen(self, nbytes: int) -> None:
        """Slots of at least that size."""
        if not self._free or len(self._free[0]) < nbytes:
            self._free = []  # before the new ones are made
            self._free = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(SLOTS)]

    # -- running ------------------------------------------------------------------------------------------

    def bind(self, index: int) -> None:
        """Let block ``index`` be in memory with every update before ``target``. EdgezoError if the disk fails."""
        if self._bound is not None:
            if self._bound[0].index == index:
                return
            self.release()  # a forward that was interrupted left it
        block = self.blocks[index]
        slot, changed = self._arrived(block)
        block.adopt(slot)
        self._bound = block, slot
        if block.trained and block.applied < self.target:
            self.catch_up(list(block.layouts), block.applied)
            block.applied, changed = self.target, True
        if changed:
            self._write(block, slot)
        following = (index + 1) % len(self.blocks)
        if self._free and following not in self._ahead and following != index:
            self._fetch(self.blocks[following])

    def bind_owner(self, name: str) -> None:
        """Bind the block that the matrix ``name`` is of."""
        self.bind(next(block.index for block in self.blocks if name in block.layouts))

    def release(self) -> None:
        if self._bound is not None:
            block, slot = self._bound
            self._bound = None
            block.empty()
            self._free.append(slot)

    def flush(self) -> None:
        """Bring every block on disk up to ``target`` and wait until it is written."""
        for block in self.blocks:
            if block.trained and block.applied != self.target:
                self.bind(block.index)
                self.release()
        wait(self._writes)
        self._check_writes()

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        for file in (*(b.file for b in self.blocks), *(t.file for t in self.tables)):
            file.close()

    def _fetch(self, block: Block) -> None:
        slot = self._free.pop()
        self.traffic.read_bytes += block.file.data_bytes
        self._ahead[block.index] = slot, self._thread.submit(block.file.read, slot)

    def _arrived(self, block: Block) -> tuple[Tensor, bool]:
        """The slot that holds ``block`` as it is on disk; or, and True, made again where that is not to be trusted."""
        if block.index not in self._ahead:
            if not self._free:  # read ahead for another order of layers
                _, (slot, reading) = self._ahead.popitem()
                reading.exception()
                self._free.append(slot)
            self._fetch(block)
        slot, reading = self._ahead.pop(block.index)
        try:
            reading.result()
            damage = None
        except Damaged as problem:
            damage = str(problem)
        self._check_writes()
        if damage is None and block.applied <= self.target:
            return slot, False
        if damage is not None:
            self.note(f"{block.file.path} was damaged ({damage}); made again from base and journal")
        self._make_again(block, slot)
        return slot, True

    def _make_again(self, block: Block, slot: Tensor) -> None:
        """The block from the base, with no update, into ``slot``."""
        slot.zero_()
        for owner, make in block.make.items():
            made = make().tensors()
            for part in block.file.parts:
                if part.owner == owner:
                    part.view(slot).copy_(made[part.suffix])
            del made  # before the next one is read
        block.applied = 0

    def _write(self, block: Block, slot: Tensor) -> None:
        """Queue the write of a block that is as of step ``block.applied``."""
        self.traffic.written_bytes += block.file.data_bytes
        self._writes.append(self._thread.submit(block.file.write, slot, block.applied))

    def _check_writes(self) -> None:
        """Forget the writes that have ended. EdgezoError if one of them failed."""
        for done in [w for w in self._writes if w.done()]:
            self._writes.remove(done)
            done.result()


class _Visit(ModelHook):
    """Binds one block for the time of its layer's forward."""

    def __init__(self, residency: Residency, index: int):
        self.residency, self.index = residency, index

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.residency.bind(self.index)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.residency.release()
        return output


def decoder_layers(module: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Name and list of the ``count`` blocks of a model, wherever its family keeps them."""
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return name, part
    raise EdgezoError(f"no list of {count} layers was found in the model")
