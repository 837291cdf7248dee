"""Blocks of a model that live elsewhere and visit memory one after the other.

A decoder layer's matrices have a home: a file on disk (disk.py), or the RAM beside a GPU (ram.py). An accelerate
``ModelHook`` binds them to a slot before the layer's forward and releases them after it, while the next block is read
into the other slot. The update of step t is applied to a block when it is bound at step t + 1, and the slot is written
back while the layer computes: one read and one write of each block a step. Frozen blocks are never written.

    bind(i)      wait for block i; apply what it lacks, make it again if it is ahead or damaged; queue the read of
                 block i + 1; queue the write of block i
    release(i)   its matrices are empty again; the slot may be read into

A medium reads into a slot only when what was queued before is done with it, so a slot is never overwritten before
its block is written. Two slots are all the memory that the blocks take, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from edgezo.machine.limits import SLOTS
from edgezo.weights.home import Damaged, Home, Medium, Pending
from edgezo.weights.layouts import Layout


@dataclass
class Block:
    """One decoder layer that is elsewhere."""

    index: int
    home: Home
    layouts: dict[str, Layout]  # vacant but while the block is bound
    make: dict[str, Callable[[], Layout]]  # each matrix anew, from the base
    vacant: dict[str, dict[str, Tensor]]
    trained: bool
    applied: int = 0  # updates of steps before this one are in

    def adopt(self, data: Tensor) -> None:
        raw: dict[str, dict[str, Tensor]] = {owner: {} for owner in self.layouts}
        for part in self.home.parts:
            raw[part.owner][part.suffix] = part.view(data)
        for owner, layout in self.layouts.items():
            layout.adopt(raw[owner])

    def empty(self) -> None:
        for owner, layout in self.layouts.items():
            layout.adopt(self.vacant[owner])


@dataclass
class Residency:
    """The blocks of one model that are elsewhere.

    ``catch_up(names, first)`` applies the updates of steps first to target - 1 to matrices that are bound.
    """

    medium: Medium
    catch_up: Callable[[Sequence[str], int], None]
    target: int = 0  # the step up to which a bound block's updates are applied
    note: Callable[[str], None] = lambda text: None
    blocks: list[Block] = field(default_factory=list)
    # A slot is flat uint8, as long as the largest block.
    _free: list[Tensor] = field(default_factory=list)
    _ahead: dict[int, tuple[Tensor, Pending]] = field(default_factory=dict)
    _bound: tuple[Block, Tensor] | None = None
    _writes: list[Pending] = field(default_factory=list)

    # -- building -----------------------------------------------------------------------------------------

    def block(
        self,
        layouts: dict[str, Layout],
        make: dict[str, Callable[[], Layout]],
        *,
        trained: bool,
    ) -> Block:
        """Give a decoder layer its home; what an earlier process of this run left there is used as it is."""
        index = len(self.blocks)
        home = self.medium.home(f"block-{index + self.medium.resident_blocks:04}", layouts)
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
        """Hook the layers that the blocks are of, in order."""
        self._widen(max(block.home.data_bytes for block in self.blocks))
        for block, layer in zip(self.blocks, layers, strict=True):
            add_hook_to_module(layer, _Visit(self, block.index))

    def _widen(self, nbytes: int) -> None:
        """Slots of at least that size."""
        if not self._free or len(self._free[0]) < nbytes:
            self._free = []  # before the new ones are made
            self._free = [self.medium.slot(nbytes) for _ in range(SLOTS)]

    # -- running ------------------------------------------------------------------------------------------

    @contextmanager
    def again(self, index: int) -> Iterator[None]:
        """Block ``index`` in memory for a backward pass, in which the block before it comes next."""
        self.bind(index, toward=-1)
        try:
            yield
        finally:
            self.release()

    def bind(self, index: int, toward: int = 1) -> None:
        """Let block ``index`` be in memory with every update before ``target``. EdgezoError if the disk fails.

        ``toward``: 1 where the next one follows, -1 where the one before it does.
        """
        if self._bound is not None:
            if self._bound[0].index == index:
                return
            self.release()  # a forward that was interrupted left it
        block = self.blocks[index]
        slot, changed = self._arrived(block)
        block.adopt(slot)
        if block.trained and block.applied < self.target:
            try:
                self.catch_up(list(block.layouts), block.applied)
            except BaseException:  # memory that is short; its home still has the block as it was
                block.empty()
                self._free.append(slot)
                raise
            block.applied, changed = self.target, True
        self._bound = block, slot
        # A forward begins again at the first block; a backward pass ends there.
        following = max(0, (index + toward) % len(self.blocks) if toward > 0 else index + toward)
        for other in [i for i in self._ahead if i != following]:
            self._give_up(other)  # read ahead for another order of layers
        if self._free and following not in self._ahead and following != index:
            self._fetch(self.blocks[following])
        if changed:
            self._write(block, slot)

    def bind_owner(self, name: str) -> None:
        """Bind the block that the matrix ``name`` is of, where it is of one that is elsewhere."""
        for block in self.blocks:
            if name in block.layouts:
                self.bind(block.index)

    def release(self) -> None:
        if self._bound is not None:
            block, slot = self._bound
            self._bound = None
            block.empty()
            self._free.append(slot)

    def flush(self) -> None:
        """Bring every block up to ``target`` and wait until it is written."""
        for block in self.blocks:
            if block.trained and block.applied != self.target:
                self.bind(block.index)
                self.release()
        while self._writes:
            self._writes.pop(0).result()

    def close(self) -> None:
        self.medium.close()
        for block in self.blocks:
            block.home.close()

    def _fetch(self, block: Block) -> None:
        slot = self._free.pop()
        self.medium.traffic.read_bytes += block.home.data_bytes
        self._ahead[block.index] = slot, self.medium.read(block.home, slot)

    def _give_up(self, index: int) -> None:
        """Take back the slot that a block is being read into."""
        slot, reading = self._ahead.pop(index)
        with suppress(Damaged):
            reading.result()
        self._free.append(slot)

    def _arrived(self, block: Block) -> tuple[Tensor, bool]:
        """The slot that holds ``block`` as it is at home; or, and True, made again where that is not to be trusted."""
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
        """The block from the base, with no update, into ``slot``."""
        slot.zero_()
        for owner, make in block.make.items():
            made = make().tensors()
            for part in block.home.parts:
                if part.owner == owner:
                    part.view(slot).copy_(made[part.suffix])
            del made  # before the next one is read
        block.applied = 0

    def _write(self, block: Block, slot: Tensor) -> None:
        """Queue the write of a block that is as of step ``block.applied``."""
        self.medium.traffic.written_bytes += block.home.data_bytes
        self._writes.append(self.medium.write(block.home, slot, block.applied))

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
