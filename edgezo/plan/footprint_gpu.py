"""What a run takes of a GPU's memory, itemised in bytes. Pure, as footprint.py, whose counting of weights it shares.

What counts is what PyTorch's allocator reserves, in segments that grow by pages, and what the driver keeps for the
process (its context, the kernels that were loaded). The process itself is in the machine's RAM and not counted.
Temporaries are freed in the order of the computation, so nothing of an operation is left beside the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgezo.machine.limits import CONTEXT_BYTES, MB, PAGE_BYTES, SLOTS, TILE_BYTES
from edgezo.plan.calibration import HIDDEN_COPIES, KEY_COPIES, MLP_COPIES, QUERY_COPIES, Item
from edgezo.plan.footprint import Footprint
from edgezo.plan.shapes import BYTES_PER_WEIGHT, MatrixShape

# With blocks in the RAM: the queues of two more streams, and the GPU's page tables of the locked RAM.
COPYING_BYTES = 72 * MB
LOCKED_SHARE = 1 / 500
# cuBLAS's own, inside the allocator.
WORKSPACE_BYTES = 33 * MB
# The last page of the large blocks' segment and of the small ones'; and holes between temporaries (calibrated).
SLACK_BYTES = 38 << 20
HOLES, LARGE_HOLES = (
    1 / 8,
    0.28,
)  # shares of the temporaries: the second once they are all that counts
# A chunk of full-vocabulary logits with what is made of it (network/losses.py).
LOGITS_BYTES = 48 << 20
ROUNDING_BYTES = 512  # of a block of the allocator's


@dataclass(frozen=True)
class CudaFootprint(Footprint):
    """One request on a GPU. Blocks that have no room there lie in the RAM (``on_disk`` counts them)."""

    elsewhere = "host"

    def compute_dtype(self, precision: str) -> tuple[str, str]:
        if precision == "fp32":
            return "fp32", "the weights are fp32"
        return "bf16", "the GPU multiplies bf16 matrices in hardware"

    def stored_bytes(self, matrices: Sequence[MatrixShape], precision: str) -> int:
        found = super().stored_bytes(matrices, precision)
        return found + 3 * ROUNDING_BYTES * len(matrices)

    def disk_bytes(self, precision: str, on_disk: int) -> int:
        return 0

    def host_bytes(self, precision: str, on_disk: int) -> int:
        """What the blocks that are not on the GPU take of the RAM."""
        pages = PAGE_BYTES * 3 * len(self.shape.block)
        return on_disk * (self.block_bytes(precision) + pages)

    def _base(self) -> Item:
        reason = "the driver's, for this process and the kernels that it loads"
        return Item("CUDA context", CONTEXT_BYTES, reason)

    def items(self, precision: str, micro_batch: int, on_disk: int = 0) -> tuple[Item, ...]:
        """Every item, with the last ``on_disk`` blocks in the RAM."""
        compute_bytes = self._compute_bytes(precision)
        return (
            self._base(),
            *self._weights(precision, on_disk),
            *self._trained(compute_bytes),
            Item("cuBLAS workspace", WORKSPACE_BYTES, "taken at the first matrix product"),
            Item(
                "allocator slack",
                self._slack(micro_batch, compute_bytes),
                "pages of its segments that are not full",
            ),
            *self._forward(precision, micro_batch, compute_bytes),
            *self._update_of(precision, micro_batch, compute_bytes, on_disk),
            *self._copying(precision, on_disk),
        )

    def _copying(self, precision: str, on_disk: int) -> list[Item]:
        if not on_disk:
            return []
        size = COPYING_BYTES + int(LOCKED_SHARE * self.host_bytes(precision, on_disk))
        return [Item("copying", size, "two streams, and page tables of the locked RAM")]

    def most_tokens(self, precision: str) -> int | None:
        """Micro-batches are not split into pieces: a GPU wants them large."""
        return None

    def _slack(self, micro_batch: int, compute_bytes: int) -> int:
        temporaries = self._activations(self._rows(micro_batch), compute_bytes)
        return max(SLACK_BYTES + int(HOLES * temporaries), int(LARGE_HOLES * temporaries))

    def _slots(self, precision: str, on_disk: int) -> list[Item]:
        shape = self.shape
        here, block = shape.layers - on_disk, self.block_bytes(precision)
        items = []
        if held := here * block + self.stored_bytes(shape.outside, precision):
            reason = f"the first {here} blocks, and what is beside the blocks: {precision}"
            items.append(Item("linear weights", held, reason))
        pages = PAGE_BYTES * 3 * len(shape.block)
        reason = f"{SLOTS} blocks of {on_disk} that are in the RAM: one at work, one being copied"
        items.append(Item("slots", SLOTS * (block + pages), reason))
        return [*items, self._tables(precision)]

    def _forward(self, precision: str, micro_batch: int, compute_bytes: int) -> list[Item]:
        shape, tokens = self.shape, self.tokens
        rows = self._rows(micro_batch)
        sides = self.sides
        reason = f"{rows:,} tokens of {micro_batch} examples x {sides} sides, one block at a time"
        items = [Item("activations", self._activations(rows, compute_bytes), reason, "forward")]
        if BYTES_PER_WEIGHT.get(precision) != compute_bytes:
            largest = max(m.numel for m in shape.kinds) * compute_bytes
            reason = (
                f"{precision} weights become {self.compute_dtype(precision)[0]} a tile at a time"
            )
            # The tile, and the codes of one.
            size = 3 * min(largest, TILE_BYTES) // 2
            items.append(Item("expanded weights", size, reason, "forward"))
        widest = max(m.d_out + m.d_in for m in shape.kinds)
        reason = f"signs of {micro_batch} examples for the widest matrix; who is probed how"
        drawn = self.cfg.candidates if self.cfg.credit == "candidates" else micro_batch
        size = drawn * (4 * rows + 3 * widest) * compute_bytes + 16 * rows
        items.append(Item("directions", size, reason, "forward"))
        if noise := self._noise_tile():
            reason = "weight-sized noise of one tile, with what it is made from"
            items.append(Item("noise", noise, reason, "forward"))
        scored = sides * micro_batch * tokens.scored
        if tokens.kind == "label":
            logits, what = 8 * scored * tokens.label_words, "label words only"
        else:
            logits, what = LOGITS_BYTES, "the vocabulary in chunks"
        reason = f"hidden states and logits of {scored:,} scored positions; {what}"
        # By then the blocks' temporaries are gone, and what they took is there for the scores.
        scores = logits + 6 * scored * shape.hidden - items[0].bytes
        if scores > 0:
            items.append(Item("scores", scores, reason, "forward"))
        return [*items, *self._keys_and_values(micro_batch, compute_bytes)]

    def _activations(self, rows: int, compute_bytes: int) -> int:
        """The temporaries of one block over ``rows`` tokens: while it attends, or while its MLP runs."""
        shape = self.shape
        mlp = MLP_COPIES[shape.gated] * shape.intermediate
        keys, queries = (shape.qkv_width - shape.attention_width) // 2, shape.attention_width
        attending = QUERY_COPIES * queries + KEY_COPIES * keys + queries // 2
        width = max(
            shape.hidden * (HIDDEN_COPIES - 1) + attending, HIDDEN_COPIES * shape.hidden + mlp
        )
        return rows * (width + 2 * shape.head_dim) * compute_bytes

    def _update_of(
        self, precision: str, micro_batch: int, compute_bytes: int, on_disk: int
    ) -> list[Item]:
        size = self._update_tiles(precision) + min(TILE_BYTES, self._largest_trained())
        reason = "weights, direction and change of one tile, in fp32"
        if on_disk:  # a block is updated between two layers
            size += self._rows(micro_batch) * self.shape.hidden * compute_bytes
            reason += "; beside the hidden states"
        items = [Item("update tiles", size, reason, "update")]
        temporaries = self._activations(self._rows(micro_batch), compute_bytes)
        if "full" in self.cfg.train and temporaries > size:
            holes = min(size, temporaries - size) // 4  # calibrated
            reason = "what an update's tiles leave behind, too small for a forward's"
            items.append(Item("holes", holes, reason, "forward"))
        return items
