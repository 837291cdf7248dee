"""Training along gradients, one decoder block at a time: LoRA adapters, and addax's low-rank factors.

A linear W, frozen in any layout, has thin trained matrices A (rank, d_in) and B (d_out, rank) beside it:

    forward     y  = W x + s B u + b,  u = A x
    backward    du = s B^T dy,  dx = W^T dy + A^T du,  dB = s dy u^T,  dA = du x^T

Rows of W are expanded a tile at a time, once for y and again for dx, so nothing of W's size is made. A block keeps its
input alone, one hidden state a token in the compute dtype. The backward pass runs the block again from that input
(recomputation: arXiv 1604.06174, section 4). torch.utils.checkpoint does as much, but imports a compiler of 100 MB.

``--estimator lora`` (LoRA, arXiv 2106.09685): y = W x + b + ALPHA/rank * B (A x) at every linear but the output
embedding, which peft calls "all-linear". A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), a function of the seed and the linear's
name; B = 0. --step is AdamW's learning rate, --weight-decay its decay.

``--estimator addax`` (after Addax, arXiv 2410.06441) trains the low-rank factor A of y = W x + A (V x), V fixed:

    examples of at most --short-tokens tokens    A <- A - AdamW(g), g the gradient of their mean loss; --short-lr
    longer examples                              A <- A - kappa * sum_i a_i * sigma D_i, GRZO over these alone; --step

The paper adds both gradients, weighted, and takes one SGD step. GRZO's estimate is as long as its noise and a gradient
is not, so here each has its rule and its rate.

Gradients are of the mean loss of the group and add up over its micro-batches. No seed can rebuild what comes of them,
so a run keeps values and moments in snapshots (run/directory.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgezo.data.batches import Example
from edgezo.machine import kernels
from edgezo.machine.limits import tiles
from edgezo.machine.matmul import addmm_, mm, thin_sum
from edgezo.network.perturb import Context, Matrix, PerturbedLinear
from edgezo.zo import noise
from edgezo.zo.noise import Key
from edgezo.zo.rules import BETA1, BETA2, EPS

ALPHA = 8.0  # peft's default lora_alpha: at rank 8 the product is scaled by 1


# ---------------------------------------------------------------------------------------------
# The backward pass


@dataclass
class Adapter:
    """The thin matrices beside one linear. Those that are trained are leaves of autograd, fp32."""

    down: Tensor  # A (rank, d_in); of addax V, fixed, in the compute dtype
    up: Tensor  # B (d_out, rank)
    scale: float  # s


def adapted_product(x: Tensor, matrix: Matrix, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """y (n, d_out) = W x + s B (A x) + b of x (n, d_in), both in the compute dtype, for autograd."""
    y: Tensor = _AdaptedProduct.apply(x, adapter.down, adapter.up, adapter.scale, matrix, bias)
    return y


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        matrix: Matrix,
        bias: Tensor | None,
    ) -> Tensor:
        rows, cols = matrix.layout.shape
        y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
        for tile in tiles(rows, cols, y.element_size()):
            mm(x, matrix.tile(tile).T, y[:, tile])
        if bias is not None:
            y.add_(bias)
        u = _thin_product(x, down)
        _add_product(y, u, up.T, scale)
        ctx.save_for_backward(x, u, down, up)
        ctx.scale, ctx.matrix = scale, matrix
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, down, up = ctx.saved_tensors
        needs_dx, needs_d_down, needs_d_up = ctx.needs_input_grad[:3]
        dy = dy.contiguous()
        du = _thin_product(dy, up.T).mul_(ctx.scale)
        d_up = thin_sum(u, dy).mul_(ctx.scale).T if needs_d_up else None
        d_down = thin_sum(du, x) if needs_d_down else None
        dx = None
        if needs_dx:
            dx = _through(dy, ctx.matrix)
            _add_product(dx, du, down)
        return dx, d_down, d_up, None, None, None


def _through(dy: Tensor, matrix: Matrix) -> Tensor:
    """dy (n, d_out) @ W, (n, d_in)."""
    rows, cols = matrix.layout.shape
    first, *others = tiles(rows, cols, dy.element_size())
    dx = mm(dy if not others else dy[:, first], matrix.tile(first))
    for tile in others:
        addmm_(dx, dy[:, tile], matrix.tile(tile))
    return dx


def _thin_product(x: Tensor, basis: Tensor) -> Tensor:
    """x (n, d) @ basis (r, d)^T in fp32, whatever the dtype of x."""
    product = kernels.thin_product(x, basis.contiguous())
    return x.float() @ basis.float().T if product is None else product


def _add_product(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """y (n, m) += scale * a (n, r) @ b (r, m), in fp32 and rounded once."""
    b = b.float()
    if kernels.add_thin(y, a, (b * scale).contiguous()):
        return
    if y.dtype == a.dtype:
        y.addmm_(a, b, alpha=scale)
    else:
        y.add_(a @ b, alpha=scale)


# Makes the context inside which a block's weights are in memory.
Visit = Callable[[], AbstractContextManager[None]]


def recompute(block: nn.Module, visit: Visit = nullcontext) -> None:
    """Let autograd keep only the input of ``block``, which is run again for its backward pass, inside ``visit()``.

    The block's first argument is the hidden states, and so is its result or the first of its results.
    """
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        x, others = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        further_results: list[Any] = []

        def run(x: Tensor) -> Tensor:
            result = inner(x, *others, **kwargs)
            if isinstance(result, tuple):
                further_results[:] = result[1:]
                return result[0]
            further_results[:] = ()
            return result

        # What is trained asks for gradients inside ``run``, where autograd does not see it.
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = _Recomputed.apply(x, run, visit)
        return (y, *further_results) if further_results else y

    block.forward = forward


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], visit: Visit) -> Tensor:
        # A backward pass may run in a thread of autograd, where context variables (packing.py) are not set.
        ctx.run, ctx.visit, ctx.variables = run, visit, copy_context()
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()

        def run_back() -> None:
            with ctx.visit(), torch.enable_grad():
                torch.autograd.backward(ctx.run(x), dy)

        ctx.variables.run(run_back)
        return x.grad, None, None


# ---------------------------------------------------------------------------------------------
# What is trained by its gradient


@dataclass
class AdamW:
    """Tensors trained by their gradient (leaves of autograd, by name) and the state of AdamW; all fp32.

    arXiv 1711.05101, algorithm 2, as torch.optim.AdamW.
    """

    decay: float = 0.0  # values shrink by rate * decay in a step
    steps: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def train(self, name: str, start: Tensor) -> Tensor:
        """Register ``start``, which is trained in place, under ``name``; returns the leaf, which shares its memory."""
        self.values[name] = value = start.detach().requires_grad_()
        value.grad = torch.zeros_like(start)
        self.first[name], self.second[name] = torch.zeros_like(start), torch.zeros_like(start)
        return value

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, value in self.values.items():
            assert value.grad is not None
            yield name, value, value.grad

    def forget(self) -> None:
        """Drop the gradient that this step has added up."""
        for _, _, gradient in self._gradients():
            gradient.zero_()

    def asks(self) -> Tensor:
        """(1,) fp32: whether the gradient is finite."""
        finite = [torch.isfinite(gradient).all() for _, _, gradient in self._gradients()]
        return torch.stack(finite).all().float().reshape(1)

    @torch.no_grad()
    def update(self, rate: float, known: Sequence[float] | None = None) -> None:
        """Take one AdamW step along the added gradient and clear it. A gradient that is not finite moves nothing."""
        if (self.asks().tolist() if known is None else known)[0]:
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
        """The trained tensors that are saved from here, by name."""
        return {name: value.detach() for name, value in self.values.items()}

    def tensors(self) -> dict[str, Tensor]:
        """State that a snapshot keeps: the tensors themselves, and a copy of the number of steps."""
        moments = {
            f"{name}@{which}": tensor
            for which, tensors in (("first", self.first), ("second", self.second))
            for name, tensor in tensors.items()
        }
        return self.trained() | moments | {"adamw.steps": torch.tensor([self.steps])}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors()`` gave. Raises KeyError for a missing name, RuntimeError for another shape."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.steps = int(tensors["adamw.steps"])


@dataclass
class Adapters(AdamW):
    """The LoRA adapters of a model, by the names of their linears."""

    def add(
        self, name: str, shape: tuple[int, int], rank: int, seed: int, device: torch.device
    ) -> Adapter:
        """Register the adapter of a linear of ``shape`` (d_out, d_in) and return it."""
        rows, cols = shape
        key, tensor = Key(seed, 0), noise.tensor_id(f"{name}#lora")
        uniform = noise.uniform(key, tensor, noise.BASIS, slice(0, rank), cols)
        down = self.train(f"{name}#lora_A", ((2 * uniform - 1) / cols**0.5).to(device))
        up = self.train(f"{name}#lora_B", torch.zeros(rows, rank, device=device))
        return Adapter(down, up, ALPHA / rank)


@dataclass
class LearnedFactors(AdamW):
    """Addax's low-rank factors, which belong to the store: it saves their values, and this their moments."""

    def asks(self) -> Tensor:
        """(2,) fp32: whether the gradient is finite, and whether it is anything but zero."""
        moved = [gradient.any() for _, _, gradient in self._gradients()]
        return torch.cat([super().asks(), torch.stack(moved).any().float().reshape(1)])

    def update(self, rate: float, known: Sequence[float] | None = None) -> None:
        """Take one AdamW step. No step where no example was short: momentum alone would move the factors."""
        known = self.asks().tolist() if known is None else known
        if known[1]:
            super().update(rate, known)

    def trained(self) -> dict[str, Tensor]:
        """Nothing: the store saves the factors."""
        return {}


def split_by_length(group: Sequence[Example], short_tokens: int) -> tuple[list[int], list[int]]:
    """Slots of the examples of at most ``short_tokens`` tokens, and slots of the longer ones."""
    short = [slot for slot, example in enumerate(group) if example.tokens <= short_tokens]
    taken = set(short)
    return short, [slot for slot in range(len(group)) if slot not in taken]


# ---------------------------------------------------------------------------------------------
# Linears


class LoraLinear(nn.Module):
    """A linear with its adapter, with and without autograd. Also stands for GPT-2's Conv1D (W transposed)."""

    matrix: Matrix
    context: Context
    frozen_bias: Tensor | None = None
    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = adapted_product(flat, self.matrix, self.frozen_bias, self.adapter)
        return y.view(*x.shape[:-1], y.shape[-1])


class MixedLinear(PerturbedLinear):
    """A perturbed linear that autograd can go back through: ``adapter`` is its low-rank factor, the leaf, and V."""

    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])
        y = adapted_product(flat, self.matrix, self.frozen_bias, self.adapter)
        return y.view(*x.shape[:-1], y.shape[-1])
