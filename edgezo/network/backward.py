"""A backward pass that touches one block at a time, over weights that stay as they are stored.

    product     y = W x + s B (A x) + b                           W frozen in any layout, A and B thin, fp32
                dx = W^T dy + A^T du,  dB = s dy u^T,  dA = du x^T         u = A x,  du = s B^T dy
    block       forward: keep the input, nothing else. backward: run the block again from it, back through it, free it

W is expanded a tile at a time, once for y and again for dx, so nothing of a weight's size is kept; what a block keeps
between its two visits is one hidden state a token, in the compute dtype. Recomputation as in arXiv 1604.06174, section
4; torch.utils.checkpoint does the same and brings a compiler of 100 MB into the process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgezo.machine.limits import tiles
from edgezo.machine.matmul import addmm_, mm
from edgezo.network.perturb import Matrix

Visit = Callable[[], AbstractContextManager[None]]


class Thin(Protocol):
    """What is trained beside a frozen matrix."""

    down: Tensor  # A (rank, d_in)
    up: Tensor  # B (d_out, rank) fp32
    scale: float


def product(x: Tensor, matrix: Matrix, bias: Tensor | None, thin: Thin) -> Tensor:
    """y (n, d_out) of x (n, d_in), both in the compute dtype, for autograd."""
    found: Tensor = _Product.apply(x, thin.down, thin.up, thin.scale, matrix, bias)
    return found


class _Product(torch.autograd.Function):
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
        u = mm(x.to(down.dtype), down.T)
        _add_product(y, u.float(), up.T, scale)
        ctx.save_for_backward(x, u, down, up)
        ctx.scale, ctx.matrix = scale, matrix
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, down, up = ctx.saved_tensors
        needs_x, needs_down, needs_up = ctx.needs_input_grad[:3]
        wide = dy.float()
        du = (wide @ up).mul_(ctx.scale)
        of_up = (wide.T @ u.float()).mul_(ctx.scale) if needs_up else None
        del wide
        of_down = du.T @ x.float() if needs_down else None
        dx = None
        if needs_x:
            rows, cols = ctx.matrix.layout.shape
            dx = torch.zeros_like(x)
            for tile in tiles(rows, cols, x.element_size()):
                addmm_(dx, dy[:, tile], ctx.matrix.tile(tile))
            _add_product(dx, du, down.float())
        return dx, of_down, of_up, None, None, None


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """y += scale * left @ right, in fp32 and rounded once."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scale)
    else:
        y.add_(left @ right, alpha=scale)


def recompute(layer: nn.Module, visit: Visit = nullcontext) -> None:
    """Let autograd keep nothing of ``layer`` but its input. Inside ``visit()`` its weights are in memory.

    The layer's first argument, and first result where it has several, are the hidden states.
    """
    inner = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        more: list[Any] = []  # what it puts out beside the hidden states

        def run(x: Tensor) -> Tensor:
            found = inner(x, *rest, **kwargs)
            if isinstance(found, tuple):
                more[:] = found[1:]
                return found[0]
            more[:] = ()
            return found

        # What is trained asks for gradients inside, where autograd does not see it.
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = _Recomputed.apply(x, run, visit)
        return (y, *more) if more else y

    layer.forward = forward


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], visit: Visit) -> Tensor:
        # A backward may run in a thread of autograd's own, which knows nothing of the packing.
        ctx.run, ctx.visit, ctx.known = run, visit, copy_context()
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()

        def again() -> None:
            with ctx.visit(), torch.enable_grad():
                torch.autograd.backward(ctx.run(x), dy)

        ctx.known.run(again)
        return x.grad, None, None
