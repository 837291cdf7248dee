"""Parts of transformers' modules that have a faster equal in machine/kernels.py.

A part is recognised by its attributes and by what it computes on a small input, not by its class.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.machine import kernels


class Norm(NamedTuple):
    """A normalisation over the last axis, before its weight (and bias)."""

    centred: bool  # a layer norm; else an RMS norm
    eps: float
    offset: float  # 1.0 where the module multiplies by 1 + weight

    def __call__(self, x: Tensor) -> Tensor:
        """xhat, fp32, of the shape of x."""
        x = x.float()
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def fused(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """xhat * (weight + offset) by ``kernels.rms_norm``; None where there is no kernel for it."""
        return None if self.centred else kernels.rms_norm(x, weight, self.eps, self.offset)


def norm_of(module: nn.Module) -> Norm:
    """How ``module`` normalises, tried out on a small input.

    Raises TypeError where it is not a normalisation with one weight vector over its last axis.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    d = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, d, generator=generator) * 2 + 0.5
    names = dict(module.named_parameters(recurse=False))

    def run(value: float) -> Tensor:
        fills = {n: torch.full(p.shape, value if n == "weight" else 0.0) for n, p in names.items()}
        with torch.no_grad():
            y: Tensor = torch.func.functional_call(module, fills, (x,))
        return y.float()

    at_zero, at_one = run(0.0), run(1.0)
    slope = at_one - at_zero
    offset = 1.0 if torch.allclose(at_zero, slope, atol=1e-5) else 0.0
    eps = next(
        float(getattr(module, n))
        for n in ("variance_epsilon", "eps", "epsilon")
        if hasattr(module, n)
    )
    for centred in (False, True):
        norm = Norm(centred, eps, offset)
        if torch.allclose(norm(x), slope, atol=1e-4):
            return norm
    raise TypeError(f"{type(module).__name__} is neither an RMS nor a layer normalisation")


class FusedNorm(nn.Module):
    """Base in front of a frozen norm's class, whose forward runs where there is no kernel."""

    norm: Norm

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        assert isinstance(weight, Tensor)
        fused = self.norm.fused(x, weight)
        return super().forward(x) if fused is None else fused


class FusedGate(nn.Module):
    """down(act(gate(x)) * up(x)), with act and the product in one pass."""

    activation: int  # index into kernels.GATE_ACTIVATIONS
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gated = kernels.gate(self.gate_proj(x), self.up_proj(x), self.activation)
        y: Tensor = self.down_proj(gated)
        return y


def activation_of(module: nn.Module) -> int | None:
    """Index of the activation of a block's gated part; None where ``module`` is no such part, or its is not known."""
    if not all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    x = torch.linspace(-6, 6, 49)
    gate, up = 2 * x - 1, x + 3
    stand_in = SimpleNamespace(
        gate_proj=lambda _: gate,
        up_proj=lambda _: up.clone(),
        down_proj=lambda middle: 5 * middle,
        act_fn=module.act_fn,
    )
    try:
        with torch.no_grad():
            y = type(module).forward(stand_in, x)
    except (
        Exception
    ):  # its forward needs more than these attributes, so it is another kind of module
        return None
    for place, activation in enumerate(kernels.GATE_ACTIVATIONS):
        if torch.allclose(y, 5 * activation(gate) * up, atol=1e-5):
            return place
    return None


def fuse_norm(module: nn.Module) -> None:
    """Let a frozen norm, whose weight is in place, use the kernel if there is one for it."""
    if getattr(module, "bias", None) is not None:
        return
    try:
        norm = norm_of(module)
    except (TypeError, StopIteration):
        return
    if not norm.centred:
        kind = type(module)
        module.__class__ = type("Fused" + kind.__name__, (FusedNorm, kind), {})
        object.__setattr__(module, "norm", norm)


def fuse_gates(model: nn.Module) -> None:
    """Let the gated parts of all blocks use the kernel."""
    for module in model.modules():
        if (activation := activation_of(module)) is not None:
            module.__class__ = FusedGate
            object.__setattr__(module, "activation", activation)


ROTARY = "apply_rotary_pos_emb"  # the function by which transformers' attention modules rotate queries and keys
Rotary = Callable[..., tuple[Tensor, Tensor]]


@cache
def _fused_rotary(original: Rotary) -> Rotary | None:
    """``original`` with the kernel in front; None where ``original`` computes something else than the kernel."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (3, 1))
    cos, sin = torch.randn(2, 1, 5, 8, generator=generator)

    def expected(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin

    try:
        rotated = original(q, k, cos, sin)
    except Exception:  # it takes other arguments
        return None
    pairs = zip(rotated, (q, k), strict=True)
    if not all(torch.allclose(y, expected(x), atol=1e-5) for y, x in pairs):
        return None

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        # In place: projections have just written q and k, and nobody else reads them.
        if not more and not named and kernels.rotate(q, cos, sin):
            if not kernels.rotate(k, cos, sin):
                k = original(k, k, cos, sin)[0]
            return q, k
        return original(q, k, cos, sin, *more, **named)

    return fused


def _with_rotary(kind: type) -> type | None:
    """A subclass with the forward of ``kind``, in which ROTARY is the fused function; None where there is none."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(ROTARY)
    fused = None if original is None else _fused_rotary(original)
    if fused is None:
        return None
    names = {**forward.__globals__, ROTARY: fused}
    rest = (forward.__name__, forward.__defaults__, forward.__closure__)
    copied = FunctionType(forward.__code__, names, *rest)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return type("Fused" + kind.__name__, (kind,), {"forward": copied})


def fuse_rotary(model: nn.Module) -> None:
    """Let attention rotate its queries and keys by the kernel, in one pass."""
    kinds = {kind: _with_rotary(kind) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        module.__class__ = kinds[type(module)] or type(module)
