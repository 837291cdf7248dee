"""What a run with a backward pass through one block at a time takes (network/first_order.py). Pure, as footprint.py.

A step visits each block twice. Between the two visits it keeps one hidden state for each token and block; during the
second it takes what autograd keeps of that one block, with the gradients on their way. An evaluation and a plain
forward take what they take in every other run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgezo.plan.calibration import (
    ACTIVATIONS,
    ADAPTER_COPIES,
    BACKWARD_BYTES,
    EXPANDED,
    HIDDEN_KEPT,
    KEYS_KEPT,
    LEAST_BACKWARD_TOKENS,
    LEAST_PIECE_TOKENS,
    MLP_KEPT,
    QUERIES_KEPT,
    UNUSED_SHARE,
    Item,
)
from edgezo.plan.footprint import Footprint
from edgezo.plan.footprint_gpu import CudaFootprint
from edgezo.plan.shapes import ModelShape


def kept_bytes(shape: ModelShape, n_tokens: int, compute_bytes: int) -> int:
    """Inputs of all blocks over ``n_tokens`` tokens, and the output of the last one."""
    return n_tokens * shape.hidden * (shape.layers + 1) * compute_bytes


def backward_bytes(shape: ModelShape, n_tokens: int, compute_bytes: int) -> int:
    """All that a backward pass over ``n_tokens`` tokens takes beside the weights."""
    keys = (shape.qkv_width - shape.attention_width) // 2
    block = HIDDEN_KEPT * shape.hidden + MLP_KEPT[shape.gated] * shape.intermediate
    attended = QUERIES_KEPT * shape.attention_width + KEYS_KEPT * keys + 2 * shape.head_dim
    # A gradient on its way, in fp32 where the block computes in less.
    wide = 0 if compute_bytes == 4 else 8 * max(m.d_out for m in shape.kinds)
    block_bytes = block * compute_bytes + 4 * attended + wide
    size = kept_bytes(shape, n_tokens, compute_bytes) + n_tokens * block_bytes
    return int((1 + UNUSED_SHARE) * size)


@dataclass(frozen=True)
class BackwardFootprint(Footprint):
    """A request with a backward pass (lora)."""

    product_kinds = 2

    def most_tokens(self, precision: str) -> int | None:
        """Tokens of a piece of a micro-batch."""
        a_token = backward_bytes(self.trained_shape, 1, self.compute_bytes(precision))
        return max(LEAST_BACKWARD_TOKENS, BACKWARD_BYTES // a_token)

    def reused_tokens(self, precision: str) -> int:
        """None are reused: what is kept and what comes and goes would leave holes between each other in the heap."""
        return 0

    def _of_directions(self, compute_bytes: int) -> list[Item]:
        """Adapters go along no directions."""
        return []

    def _forward(self, precision: str, micro_batch: int, compute_bytes: int) -> list[Item]:
        shape, tokens = self.trained_shape, self.tokens
        trained = tokens.at_once(micro_batch, self.most_tokens(precision))
        whole = tokens.longest(micro_batch)
        what = (
            f"{micro_batch} examples" if trained == whole else f"a piece of {micro_batch} examples"
        )
        kept = kept_bytes(shape, trained, compute_bytes)
        reason = f"inputs of {shape.layers} blocks, {trained:,} tokens of {what}"
        items = [Item("block inputs", kept, reason, "forward")]
        block = backward_bytes(shape, trained, compute_bytes) - kept
        # An evaluation keeps no block inputs.
        n_tokens = self._tokens_at_once(precision, micro_batch)
        evaluated = self._activations(n_tokens, compute_bytes)
        reason = "one block, run again for its backward pass, with its gradients"
        items.append(Item(ACTIVATIONS, max(block, evaluated - kept), reason, "forward"))
        items += self._expanded(precision, compute_bytes)
        items += self._attention(n_tokens)
        scored = min(micro_batch * tokens.scored, trained)
        logits, what = self._logits(scored, precision)
        # Scores are computed when all block inputs are kept, before a block is run again.
        scores = logits + 8 * (scored + 2 * trained) * shape.hidden - items[1].bytes
        reason = f"hidden states, their gradients and logits of {scored:,} scored positions, {what}"
        if scores > 0:
            items.append(Item("scores", scores, reason, "forward"))
        return [*items, *self._beside(micro_batch, compute_bytes)]

    def _largest_trained(self) -> int:
        """Bytes in fp32 of the largest factor."""
        return 4 * self.cfg.rank * max(max(m.d_out, m.d_in) for m in self.shape.kinds)


@dataclass(frozen=True)
class MixedFootprint(Footprint):
    """A request with a backward pass over its short examples (addax). Short is what has room."""

    product_kinds = 2

    def with_short_tokens(
        self, precision: str, micro_batch: int, on_disk: int, cap: int
    ) -> Footprint:
        if self.cfg.short_tokens is not None:
            return self
        # From all that the data has down to nothing; beyond BACKWARD_BYTES a piece only takes more.
        most = max(BACKWARD_BYTES // self._backward(1, precision), LEAST_BACKWARD_TOKENS)
        longest = self.tokens.tokens[0]
        tried = (max(most, longest), most, *(most * part // 16 for part in range(15, 0, -1)))
        for tokens in tried:
            footprint = replace(self, cfg=replace(self.cfg, short_tokens=tokens))
            if footprint.needed_bytes(precision, micro_batch, on_disk) <= cap:
                return footprint
        return replace(self, cfg=replace(self.cfg, short_tokens=0))

    def _backward(self, n_tokens: int, precision: str) -> int:
        return backward_bytes(self.trained_shape, n_tokens, self.compute_bytes(precision))

    def reused_tokens(self, precision: str) -> int:
        """None are reused: what a backward pass keeps would leave holes in the heap."""
        return 0

    def most_tokens(self, precision: str) -> int | None:
        reused = super().reused_tokens(precision)
        return reused // self.sides if reused >= LEAST_PIECE_TOKENS else None

    def _trained(self, compute_bytes: int) -> list[Item]:
        values = self.trained_shape.rows * self.cfg.rank
        reason = f"gradient and AdamW's two moments of {values:,} factors, fp32"
        moments = Item("gradients", 4 * (ADAPTER_COPIES - 1) * values, reason)
        return [*super()._trained(compute_bytes), moments]

    def _forward(self, precision: str, micro_batch: int, compute_bytes: int) -> list[Item]:
        items = super()._forward(precision, micro_batch, compute_bytes)
        short = self.cfg.short_tokens or 0
        lengths = [n for n in self.tokens.tokens if n <= short]
        n_tokens = min(short, sum(lengths[:micro_batch])) if self.tokens.known else short
        shared = (EXPANDED, "correction")
        perturbed = sum(i.bytes for i in items if i.name not in shared)
        more = self._backward(n_tokens, precision) - perturbed
        if more > 0:
            reason = (
                f"over {n_tokens:,} tokens of short examples: more than a perturbed forward takes"
            )
            items.append(Item("backward pass", more, reason, "forward"))
        return items


@dataclass(frozen=True)
class CudaBackwardFootprint(BackwardFootprint, CudaFootprint):
    """A request with a backward pass (lora) on a GPU, over a whole micro-batch at once."""

    most_tokens = CudaFootprint.most_tokens
    threads = 2


@dataclass(frozen=True)
class CudaMixedFootprint(MixedFootprint, CudaFootprint):
    """A request with a backward pass over its short examples (addax) on a GPU."""

    most_tokens = CudaFootprint.most_tokens
    threads = 2


# Footprints of estimators with a backward pass, on the CPU and on a GPU.
BACKWARD: dict[str, type[Footprint]] = {"lora": BackwardFootprint, "addax": MixedFootprint}
BACKWARD_ON_GPU: dict[str, type[CudaFootprint]] = {
    "lora": CudaBackwardFootprint,
    "addax": CudaMixedFootprint,
}
