"""``--estimator addax``: true gradients of the short examples, GRZO of the rest, over the same low-rank factors.

    y = W x + A (V x)        A (d_out, rank) trained, V fixed: --train lowrank
    short examples           g = mean gradient by A, back through one block at a time (backward.py);  A <- A - AdamW(g)
    the others               A <- A - kappa * sum_i a_i * sigma D_i, credits a_i over these examples alone

After Addax (arXiv 2410.06441): backpropagation where an example is short enough for the memory, zeroth order elsewhere.
The paper adds both gradients, weighted, and takes one SGD step. GRZO's estimate is as long as its noise, a gradient is
not, so each has a rule and a rate of its own here: --step is kappa, --short-lr AdamW's. No seed has what comes of it:
a run keeps factors and moments as snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgezo.data.batches import Example, tokens_of
from edgezo.network.backward import product
from edgezo.network.lora import AdamW, Adapter
from edgezo.network.perturb import PerturbedLinear


@dataclass
class Factors(AdamW):
    """Low-rank factors of a store, whose values are saved there."""

    def update(self, rate: float) -> None:
        """One step of AdamW; none where no example was short, for momentum alone would go on."""
        if any(bool(gradient.any()) for _, _, gradient in self._gradients()):
            super().update(rate)

    def trained(self) -> dict[str, Tensor]:
        return {}


class MixedLinear(PerturbedLinear):
    """The perturbed linear; for autograd the same function, with its factor as a leaf."""

    leaf: Adapter

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y = product(flat, self.matrix, self.bias_vector, self.leaf)
        return y.view(*x.shape[:-1], y.shape[-1])


def divide(group: Sequence[Example], short_tokens: int) -> tuple[list[int], list[int]]:
    """Slots of the examples of at most ``short_tokens`` tokens, and of the others."""
    short = [slot for slot, example in enumerate(group) if tokens_of(example) <= short_tokens]
    taken = set(short)
    return short, [slot for slot in range(len(group)) if slot not in taken]
