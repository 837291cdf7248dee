"""First-order LoRA (arXiv 2106.09685) over a frozen base in any store, one block at a time (backward.py).

    y = W x + b + alpha/rank * B (A x)      A (rank, d_in), B (d_out, rank), fp32, beside every linear but the output
                                            embedding: what peft calls "all-linear"
    A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))      B = 0, alpha = 8: peft's defaults. A is a function of seed and name
    AdamW                                   arXiv 1711.05101, algorithm 2, as torch.optim.AdamW; betas 0.9 and 0.999

--step is AdamW's learning rate, --weight-decay its decay. Gradients are of the mean loss of the group and add up over
its micro-batches. No seed has what comes of them: a run keeps values and moments as snapshots (see ``train``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgezo.network.backward import product
from edgezo.network.perturb import Context, Matrix
from edgezo.zo import noise
from edgezo.zo.noise import Key

ALPHA = 8.0  # peft's default: at rank 8 the product counts as it is
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass
class Adapter:
    """The trained part of one linear: leaves of autograd, fp32."""

    down: Tensor  # A (rank, d_in)
    up: Tensor  # B (d_out, rank)
    scale: float


@dataclass
class AdamW:
    """What is trained by its own gradient, leaves of autograd by name, and the state of AdamW; all fp32."""

    decay: float = 0.0  # values shrink by rate * decay a step
    steps: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def train(self, name: str, start: Tensor) -> Tensor:
        """Register ``start``, in place, under ``name``; returns the leaf, which shares its memory."""
        self.values[name] = value = start.detach().requires_grad_()
        value.grad = torch.zeros_like(start)
        self.first[name], self.second[name] = torch.zeros_like(start), torch.zeros_like(start)
        return value

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, value in self.values.items():
            assert value.grad is not None
            yield name, value, value.grad

    def forget(self) -> None:
        """Drop what this step has accumulated."""
        for _, _, gradient in self._gradients():
            gradient.zero_()

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """One step of AdamW along the accumulated gradient, which is then cleared. None where it is not finite."""
        if all(bool(torch.isfinite(gradient).all()) for _, _, gradient in self._gradients()):
            self.steps += 1
            size = rate / (1 - BETA1**self.steps)
            for name, value, gradient in self._gradients():
                first, second = self.first[name], self.second[name]
                value.mul_(1 - rate * self.decay)
                first.lerp_(gradient, 1 - BETA1)
                second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
                spread = (second / (1 - BETA2**self.steps)).sqrt_().add_(EPS)
                value.addcdiv_(first, spread, value=-size)
        self.forget()

    def trained(self) -> dict[str, Tensor]:
        """What training has changed, by name."""
        return {name: value.detach() for name, value in self.values.items()}

    def tensors(self) -> dict[str, Tensor]:
        """State that a snapshot keeps: the tensors themselves, but for the number of steps."""
        moments = {
            f"{name}@{which}": tensor
            for which, held in (("first", self.first), ("second", self.second))
            for name, tensor in held.items()
        }
        return self.trained() | moments | {"adamw.steps": torch.tensor([self.steps])}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take what ``tensors`` gave in another process. KeyError or RuntimeError where it does not fit."""
        for name, held in self.tensors().items():
            held.copy_(tensors[name])
        self.steps = int(tensors["adamw.steps"])


@dataclass
class Adapters(AdamW):
    """Every adapter of a model by the name of its linear."""

    def add(
        self, name: str, shape: tuple[int, int], rank: int, seed: int, device: torch.device
    ) -> Adapter:
        """Register the adapter of a linear (rows, cols) and return it."""
        rows, cols = shape
        key, tensor = Key(seed, 0), noise.tensor_id(f"{name}#lora")
        uniform = noise.uniform(key, tensor, noise.BASIS, slice(0, rank), cols)
        down = self.train(f"{name}#lora_A", ((2 * uniform - 1) / cols**0.5).to(device))
        up = self.train(f"{name}#lora_B", torch.zeros(rows, rank, device=device))
        return Adapter(down, up, ALPHA / rank)


class LoraLinear(nn.Module):
    """A linear with its adapter, with and without autograd. Also stands for GPT-2's Conv1D (W transposed)."""

    matrix: Matrix
    context: Context
    bias_vector: Tensor | None
    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = product(flat, self.matrix, self.bias_vector, self.adapter)
        return y.view(*x.shape[:-1], y.shape[-1])
