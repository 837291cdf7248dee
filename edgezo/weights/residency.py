"""Decoder blocks that do not stay in memory but visit it one after the other.

The matrices of such a block have a home: a file on disk (disk.py), host RAM beside a GPU (ram.py), or the base's own
files, where nothing changes them (from_base.py). An accelerate
``ModelHook`` binds them to a slot before the layer's forward and releases them after it, while the next block is read
into the other slot. The update of step t is applied to a block when it is bound at step t + 1, and the slot is written
back while the layer computes: one read and one write of each block a step. Frozen blocks are never written.

    bind(i)      wait for block i; apply the updates that it lacks, or make it again if it is ahead or damaged; queue
                 the read of block i + 1; queue the write of block i
    release(i)   its matrices are empty again; the slot may be read into

A medium reads into a slot only after all that was queued before, so a slot is never overwritten before its block is
written. Two slots are all the memory that the blocks take, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from edgezo.machine.limits import SLOTS
from edgezo.weights.home import Damaged, Home, Make, Medium, Pending, make_block
from edgezo.weights.layouts import Layout


@dataclass
class Block:
    """One decoder layer that does not stay in memory."""

    index: int
    home: Home
    layouts: dict[str, Layout]  # by matrix; without bytes unless the block is bound
    make: dict[str, Make]
    vacant: dict[
        str, dict[str, Tensor]
    ]  # the raw tensors of a block that is not bound, on ``meta``
    trained: bool
    applied: int = 0  # the updates of so many steps are in its bytes at home

    def adopt(self, data: Tensor) -> None:
        """Let the matrices be views of ``data``, a slot with the block's bytes."""
        raw: dict[str, dict[str, Tensor]] = {owner: {} for owner in self.layouts}
        for part in self.home.parts:
            raw[part.owner][part.suffix] = part.view(data)
        for owner, layout in self.layouts.items():
            layout.adopt(raw[owner])

    def empty(self) -> None:
        """Take their bytes away from the matrices."""
        for owner, layout in self.layouts.items():
            layout.adopt(self.vacant[owner])


@dataclass
class Residency:
    """The blocks of one model that do not stay in memory."""

    medium: Medium
    # (matrices, first) -> None: makes the updates of steps first to target - 1 to matrices that are bound.
    catch_up: Callable[[Sequence[str], int], None]
    target: int = 0  # a block that is bound has the updates of so many steps
    note: Callable[[str], None] = lambda text: None  # tells the user
    blocks: list[Block] = field(default_factory=list)
    # Slots are flat uint8, as long as the largest block.
    _free: list[Tensor] = field(default_factory=list)
    _ahead: dict[int, tuple[Tensor, Pending]] = field(default_factory=dict)  # read ahead, by block
    _bound: tuple[Block, Tensor] | None = None
    _writes: list[Pending] = field(default_factory=list)

    # -- building -----------------------------------------------------------------------------------------

    def block(
        self,
        layouts: dict[str, Layout],
        make: dict[str, Make],
        *,
        trained: bool,
    ) -> Block:
        """Give the next decoder layer its home. Bytes of an earlier process of this run are used as they are."""
        index = len(self.blocks)
        name = f"block-{index + self.medium.resident_blocks:04}"
        home = self.medium.home(name, layouts, make)
        vacant = {owner: layout.tensors() for owner, layout in layouts.items()}
        block = Block(index, home, layouts, make, vacant, trained)
        self.blocks.append(block)
        if (applied := home.open()) is not None:
            block.applied = applied
            return block
        home.reserve()
        self._widen(home.data_bytes)
        slot = self._free.pop()
        self._make_again(block, slot)
        home.write(slot, 0)
        block.empty()
        self._free.append(slot)
        return block

    def attach(self, layers: Sequence[nn.Module]) -> None:
        """Hook the layers of the blocks, in order, so that each forward binds its block."""
        self._widen(max(block.home.data_bytes for block in self.blocks))
        for block, layer in zip(self.blocks, layers, strict=True):
            add_hook_to_module(layer, _Visit(self, block.index))

    def _widen(self, nbytes: int) -> None:
        """Make slots of at least ``nbytes``, unless there are such slots already."""
        if not self._free or len(self._free[0]) < nbytes:
            self._free = []  # before the new ones are made
            self._free = [self.medium.slot(nbytes) for _ in range(SLOTS)]

    # -- running ------------------------------------------------------------------------------------------

    @contextmanager
    def again(self, index: int) -> Iterator[None]:
        """Bind block ``index`` for a backward pass, in which the block before it comes next."""
        self.bind(index, toward=-1)
        try:
            yield
        finally:
            self.release()

    def bind(self, index: int, toward: int = 1) -> None:
        """Have block ``index`` in memory with the updates of ``target`` steps. Raises EdgezoError if the disk fails.

        ``toward``: 1 where the next block will be bound after it, -1 where the one before it will.
        """
        if self._bound is not None:
            if self._bound[0].index == index:
                return
            self.release()  # it stayed bound when a forward was interrupted
        block = self.blocks[index]
        slot, changed = self._arrived(block)
        block.adopt(slot)
        if block.trained and block.applied < self.target:
            try:
                self.catch_up(list(block.layouts), block.applied)
            except BaseException:  # memory may be short; the home still has the block as it was
                block.empty()
                self._free.append(slot)
                raise
            block.applied, changed = self.target, True
        self._bound = block, slot
        # A forward begins again at the first block; a backward pass ends there.
        following = max(0, (index + toward) % len(self.blocks) if toward > 0 else index + toward)
        for other in [i for i in self._ahead if i != following]:
            self._give_up(other)  # it was read ahead for another order of layers
        if self._free and following not in self._ahead and following != index:
            self._fetch(self.blocks[following])
        if changed:
            self._write(block, slot)

    def bind_owner(self, name: str) -> None:
        """Bind the block that the matrix ``name`` belongs to, if it belongs to one."""
        for block in self.blocks:
            if name in block.layouts:
                self.bind(block.index)

    def release(self) -> None:
        """Let go of the block that is bound, if one is; its slot is free again."""
        if self._bound is not None:
            block, slot = self._bound
            self._bound = None
            block.empty()
            self._free.append(slot)

    def flush(self) -> None:
        """Bring every block up to ``target`` steps and wait until all are written."""
        for block in self.blocks:
            if block.trained and block.applied != self.target:
                self.bind(block.index)
                self.release()
        while self._writes:
            self._writes.pop(0).result()

    def close(self) -> None:
        """Close files, end threads, unlock memory."""
        self.medium.close()
        for block in self.blocks:
            block.home.close()

    def _fetch(self, block: Block) -> None:
        """Queue the read of a block into a free slot."""
        slot = self._free.pop()
        self.medium.traffic.read_bytes += block.home.data_bytes
        self._ahead[block.index] = slot, self.medium.read(block.home, slot)

    def _give_up(self, index: int) -> None:
        """Wait for a block that was read ahead, and free its slot."""
        slot, reading = self._ahead.pop(index)
        with suppress(Damaged):
            reading.result()
        self._free.append(slot)

    def _arrived(self, block: Block) -> tuple[Tensor, bool]:
        """A slot with the block's bytes: (as they are at home, False), or (made again from the base, True).

        They are made again where they are damaged, or ahead of ``target``.
        """
        if block.index not in self._ahead:
            if not self._free:
                self._give_up(next(iter(self._ahead)))
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
            self.note(f"{block.home.name} was damaged ({damage}); made again from base and journal")
        self._make_again(block, slot)
        return slot, True

    def _make_again(self, block: Block, slot: Tensor) -> None:
        """Make the block from the base, with no update, in ``slot``."""
        slot.zero_()
        make_block(block.home.parts, block.make, slot)
        block.applied = 0

    def _write(self, block: Block, slot: Tensor) -> None:
        """Queue the write of a block that has the updates of ``block.applied`` steps."""
        self.medium.traffic.written_bytes += block.home.data_bytes
        self._writes.append(self.medium.write(block.home, slot, block.applied))

    def _check_writes(self) -> None:
        """Forget the writes that have ended. Raises EdgezoError if one of them failed."""
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
