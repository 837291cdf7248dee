"""What a run with a backward pass through one block at a time takes (backward.py). Pure, as footprint.py.

Between its two visits of a block a step keeps one hidden state a token and block; during the second what autograd keeps
of that one block, with the gradients on their way. An evaluation, and the plain forward, take what they always do.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgezo.footprint import (
    ACTIVATIONS,
    LOGITS_BYTES,
    MB,
    TILE_BYTES,
    Footprint,
    Item,
)
from edgezo.shapes import BYTES_PER_WEIGHT

# A piece of a micro-batch takes no more, but for the least that is worth reading all weights three times for.
BACKWARD_BYTES = 96 * MB
LEAST_BACKWARD_TOKENS = 256
# Of one block, for each token: hidden states of norms, residuals and their gradients, ...
HIDDEN_KEPT = 9
# ... queries, keys and values in rows, what attention puts out, and their gradients, ...
QUERIES_KEPT, KEYS_KEPT = 4, 4
# ... gate, its activation, up, their product, and three gradients; without a gate those of a GELU.
MLP_KEPT = {True: 7, False: 6}
# Value, gradient and AdamW's two moments, fp32.
ADAPTER_COPIES = 4
# Of what a step takes, in pages of maps that are not full and blocks too small for one (calibrated).
LEFT = 0.06


@dataclass(frozen=True)
class BackwardFootprint(Footprint):
    """One request with a backward pass, on the CPU."""

    def most_tokens(self, precision: str) -> int | None:
        """Tokens of a piece."""
        a_token = self._backward(1, self._compute_bytes(precision))
        return max(LEAST_BACKWARD_TOKENS, BACKWARD_BYTES // a_token)

    def reused_tokens(self, precision: str) -> int:
        """None: what is kept and what comes and goes would leave holes between each other in the heap."""
        return 0

    def _kept(self, rows: int, compute_bytes: int) -> int:
        """Inputs of all blocks, and what the last one puts out."""
        return rows * self.shape.hidden * (self.shape.layers + 1) * compute_bytes

    def _backward(self, rows: int, compute_bytes: int) -> int:
        """All that a backward pass over ``rows`` tokens holds beside the weights."""
        shape = self.shape
        keys = (shape.qkv_width - shape.attention_width) // 2
        block = HIDDEN_KEPT * shape.hidden + MLP_KEPT[shape.gated] * shape.intermediate
        block += QUERIES_KEPT * shape.attention_width + KEYS_KEPT * keys + 2 * shape.head_dim
        # A gradient on its way, in fp32 where the block computes in less.
        wide = 0 if compute_bytes == 4 else 8 * max(m.d_out for m in shape.kinds)
        held = self._kept(rows, compute_bytes) + rows * (block * compute_bytes + wide)
        return int((1 + LEFT) * held)

    def _trained(self, compute_bytes: int) -> list[Item]:
        shape, rank = self.shape, self.cfg.rank
        values = (shape.rows + shape.cols) * rank
        reason = (
            f"rank {rank}: {values:,} trained values, their gradient and AdamW's two moments, fp32"
        )
        return [Item("adapters", 4 * ADAPTER_COPIES * values, reason)]

    def _forward(self, precision: str, micro_batch: int, compute_bytes: int) -> list[Item]:
        shape, tokens = self.shape, self.tokens
        trained = tokens.at_once(micro_batch, self.most_tokens(precision))
        whole = tokens.longest(micro_batch)
        what = (
            f"{micro_batch} examples" if trained == whole else f"a piece of {micro_batch} examples"
        )
        kept = self._kept(trained, compute_bytes)
        reason = f"inputs of {shape.layers} blocks, {trained:,} tokens of {what}"
        items = [Item("block inputs", kept, reason, "forward")]
        block = self._backward(trained, compute_bytes) - kept
        # Nothing is kept of an evaluation.
        evaluated = self._activations(self._at_once(precision, micro_batch), compute_bytes)
        reason = "one block, run again for its backward pass, with its gradients"
        items.append(Item(ACTIVATIONS, max(block, evaluated - kept), reason, "forward"))
        if BYTES_PER_WEIGHT.get(precision) != compute_bytes:
            largest = max(m.numel for m in shape.kinds) * compute_bytes
            compute = self.compute_dtype(precision)[0]
            reason = f"{precision} weights become {compute} a tile at a time"
            items.append(Item("expanded weights", min(largest, TILE_BYTES), reason, "forward"))
        scored = min(micro_batch * tokens.scored, trained)
        if tokens.kind == "label":
            logits, what = 4 * scored * tokens.label_words, "label words only"
        else:
            logits, what = LOGITS_BYTES, "the vocabulary in chunks"
        # Scored when all block inputs are kept, before a block is run again.
        scores = logits + 8 * (scored + 2 * trained) * shape.hidden - items[1].bytes
        reason = f"hidden states, their gradients and logits of {scored:,} scored positions, {what}"
        if scores > 0:
            items.append(Item("scores", scores, reason, "forward"))
        if self.correction_bytes:
            reason = "the longest batch, measured, beside what is counted"
            items.append(Item("correction", self.correction_bytes, reason, "forward"))
        return items

    def _largest_trained(self) -> int:
        """Bytes in fp32 of the largest factor."""
        return 4 * self.cfg.rank * max(max(m.d_out, m.d_in) for m in self.shape.kinds)
