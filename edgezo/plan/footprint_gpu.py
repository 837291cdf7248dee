"""What a run takes of a GPU's memory, itemised in bytes. Pure; weights are counted as in footprint_stored.py.

What counts is what PyTorch's allocator reserves, in segments that grow by pages, and what the driver keeps for the
process (its context, the kernels that were loaded). The process itself is in the machine's RAM and not counted.
Temporaries are freed in the order of the computation, so an operation leaves nothing beside the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgezo.machine.gpu_figures import REFERENCE_CARD, GpuFigures
from edgezo.machine.limits import PAGE_BYTES, SLOTS, TILE_BYTES
from edgezo.plan.calibration import (
    ACTIVATIONS,
    GPU_LOGITS_BYTES,
    GPU_SLACK_BYTES,
    HIDDEN_COPIES,
    HOLES,
    KEY_COPIES,
    LARGE_HOLES,
    LOCKED_SHARE,
    MLP_COPIES,
    QUERY_COPIES,
    ROUNDING_BYTES,
    Item,
)
from edgezo.plan.footprint import Footprint
from edgezo.plan.shapes import MatrixShape


@dataclass(frozen=True)
class CudaFootprint(Footprint):
    """A request on a GPU. Blocks that have no room there lie in the RAM (``on_disk`` counts them)."""

    elsewhere = "host"
    threads = 1  # that multiply matrices: cuBLAS has a workspace for each
    gpu: GpuFigures = REFERENCE_CARD

    def compute_dtype(self, precision: str) -> tuple[str, str]:
        if precision == "fp32":
            return "fp32", "the weights are fp32"
        return "bf16", "the GPU multiplies bf16 matrices in hardware"

    def stored_bytes(self, matrices: Sequence[MatrixShape], precision: str) -> int:
        rounding = 3 * ROUNDING_BYTES * len(matrices)
        return super().stored_bytes(matrices, precision) + rounding

    def panel_columns(self, precision: str) -> int:
        return 0

    def disk_bytes(self, precision: str, on_disk: int) -> int:
        return 0

    def host_bytes(self, precision: str, on_disk: int) -> int:
        """What the blocks that are not on the GPU take of the RAM."""
        pages = PAGE_BYTES * 3 * len(self.shape.block)
        return on_disk * (self.block_bytes(precision) + pages)

    def _base(self) -> Item:
        reason = "the driver's, for this process and the kernels that it loads"
        return Item("CUDA context", self.gpu.context_bytes, reason)

    def items(self, precision: str, micro_batch: int, on_disk: int = 0) -> tuple[Item, ...]:
        """Every item, with the last ``on_disk`` blocks in the RAM."""
        compute_bytes = self.compute_bytes(precision)
        items = (
            self._base(),
            *self._weights(precision, on_disk),
            *self._trained(compute_bytes),
            self._workspace(),
            self._slack(micro_batch, compute_bytes),
            *self._forward(precision, micro_batch, compute_bytes),
            *self._updating(precision, micro_batch, compute_bytes, on_disk),
            *self._copying(precision, on_disk),
        )
        return (*items, *self._passing(items, precision))

    def _workspace(self) -> Item:
        reason = "taken at the first matrix product"
        if self.threads > 1:
            reason += f" of each of {self.threads} threads, of which autograd has one"
        return Item("cuBLAS workspace", self.threads * self.gpu.workspace_bytes, reason)

    def _copying(self, precision: str, on_disk: int) -> list[Item]:
        if not on_disk:
            return []
        size = self.gpu.copying_bytes + int(LOCKED_SHARE * self.host_bytes(precision, on_disk))
        return [Item("copying", size, "two streams, and page tables of the locked RAM")]

    def most_tokens(self, precision: str) -> int | None:
        """None: micro-batches are not split into pieces, as a GPU wants them large."""
        return None

    def _slack(self, micro_batch: int, compute_bytes: int) -> Item:
        temporaries = self._activations(self._longest_tokens(micro_batch), compute_bytes)
        size = max(GPU_SLACK_BYTES + int(HOLES * temporaries), int(LARGE_HOLES * temporaries))
        return Item("allocator slack", size, "pages of its segments that are not full")

    def _slots(self, precision: str, on_disk: int) -> list[Item]:
        """The weights where the last ``on_disk`` blocks are in the RAM; the tables stay on the GPU."""
        shape = self.shape
        on_gpu, block = shape.layers - on_disk, self.block_bytes(precision)
        items = []
        if size := on_gpu * block + self.stored_bytes(shape.outside, precision):
            reason = f"the first {on_gpu} blocks, and linears outside the blocks: {precision}"
            items.append(Item("linear weights", size, reason))
        pages = PAGE_BYTES * 3 * len(shape.block)
        reason = f"{SLOTS} blocks of {on_disk} that are in the RAM: one computes, one is copied"
        items.append(Item("slots", SLOTS * (block + pages), reason))
        return [*items, self._tables(precision)]

    def _forward(self, precision: str, micro_batch: int, compute_bytes: int) -> list[Item]:
        n_tokens, sides = self._longest_tokens(micro_batch), self.sides
        reason = (
            f"{n_tokens:,} tokens of {micro_batch} examples x {sides} sides, one block at a time"
        )
        items = [Item(ACTIVATIONS, self._activations(n_tokens, compute_bytes), reason, "forward")]
        items += self._expanded(precision, compute_bytes)
        items += self._attention(n_tokens)
        size = self._drawn(micro_batch) * (4 * n_tokens + 3 * self._widest()) * compute_bytes
        items += self._perturbing(micro_batch, size + 16 * n_tokens)
        scored = sides * micro_batch * self.tokens.scored
        logits, what = self._logits(scored, precision)
        reason = f"hidden states and logits of {scored:,} scored positions; {what}"
        # The blocks' temporaries are freed before scores are computed, which use their memory again.
        scores = logits + 6 * scored * self.shape.hidden - items[0].bytes
        if scores > 0:
            items.append(Item("scores", scores, reason, "forward"))
        return [*items, *self._keys_and_values(micro_batch, compute_bytes)]

    def _expanded_bytes(self, largest: int) -> int:
        """The tile, and the codes of one."""
        return 3 * min(largest, TILE_BYTES) // 2

    def _logits(self, scored: int, precision: str) -> tuple[int, str]:
        if self.tokens.kind == "label":
            return 8 * scored * self.tokens.label_words, "label words only"
        return GPU_LOGITS_BYTES, "the vocabulary in chunks"

    def _activations(self, n_tokens: int, compute_bytes: int) -> int:
        """Bytes of one block's temporaries over ``n_tokens`` tokens: while it attends, or while its MLP runs."""
        shape = self.shape
        mlp = MLP_COPIES[shape.gated] * shape.intermediate
        keys, queries = (shape.qkv_width - shape.attention_width) // 2, shape.attention_width
        attending = QUERY_COPIES * queries + KEY_COPIES * keys + queries // 2
        width = max(
            shape.hidden * (HIDDEN_COPIES - 1) + attending, HIDDEN_COPIES * shape.hidden + mlp
        )
        return n_tokens * (width + 2 * shape.head_dim) * compute_bytes

    def _updating(
        self, precision: str, micro_batch: int, compute_bytes: int, on_disk: int
    ) -> list[Item]:
        """Tiles of an update, and the holes that they leave for the next forward."""
        size = self._update_tiles(precision) + min(TILE_BYTES, self._largest_trained())
        reason = "weights, direction and change of one tile, in fp32"
        if on_disk:  # a block is updated between two layers
            size += self._longest_tokens(micro_batch) * self.shape.hidden * compute_bytes
            reason += "; beside the hidden states"
        items = [Item("update tiles", size, reason, "update")]
        temporaries = self._activations(self._longest_tokens(micro_batch), compute_bytes)
        if self.cfg.parts.weights and temporaries > size:
            holes = min(size, temporaries - size) // 4  # calibrated
            reason = "left by an update's tiles, too small for a forward's"
            items.append(Item("holes", holes, reason, "forward"))
        return items
