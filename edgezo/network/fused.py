"""Parts of transformers' modules with a faster equal in machine/kernels.py, found by what they hold, not by class."""

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
        """xhat, fp32 of the shape of x."""
        x = x.float()
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def fused(self, x: Tensor, weight: Tensor) -> Tensor | None:
        """xhat * (weight + offset) as ``kernels.rms_norm`` has it; None without a kernel for it."""
        return None if self.centred else kernels.rms_norm(x, weight, self.eps, self.offset)


def norm_of(module: nn.Module) -> Norm:
    """How ``module`` normalises.

    Raises TypeError where it is no normalisation with one weight vector over its last axis.
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
            found: Tensor = torch.func.functional_call(module, fills, (x,))
        return found.float()

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
    """In front of a frozen norm's own class, which goes on where there is no kernel."""

    norm: Norm

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        assert isinstance(weight, Tensor)
        found = self.norm.fused(x, weight)
        return super().forward(x) if found is None else found


class FusedGate(nn.Module):
    """down(act(gate(x)) * up(x)), the middle in one pass."""

    activation: int  # of kernels.ACTIVATIONS
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gated = kernels.gate(self.gate_proj(x), self.up_proj(x), self.activation)
        found: Tensor = self.down_proj(gated)
        return found


def activation_of(module: nn.Module) -> int | None:
    """The activation of a block's gated part, if ``module`` is such a part and has a known one."""
    if not all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    x = torch.linspace(-6, 6, 49)
    gate, up = 2 * x - 1, x + 3
    own = SimpleNamespace(
        gate_proj=lambda _: gate,
        up_proj=lambda _: up.clone(),
        down_proj=lambda middle: 5 * middle,
        act_fn=module.act_fn,
    )
    try:
        with torch.no_grad():
            found = type(module).forward(own, x)
    except Exception:  # it does more than that
        return None
    for place, activation in enumerate(kernels.ACTIVATIONS):
        if torch.allclose(found, 5 * activation(gate) * up, atol=1e-5):
            return place
    return None


def fuse_norm(module: nn.Module) -> None:
    """Let a frozen norm with its weight in place use the kernel, if it is one that has one."""
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


ROTARY = "apply_rotary_pos_emb"  # what transformers' attention modules call for positions
Rotary = Callable[..., tuple[Tensor, Tensor]]


@cache
def _turned(own: Rotary) -> Rotary | None:
    """``own`` with the kernel in front; None where ``own`` does something else."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (3, 1))
    cos, sin = torch.randn(2, 1, 5, 8, generator=generator)

    def wanted(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin

    try:
        found = own(q, k, cos, sin)
    except Exception:  # it has other arguments
        return None
    if not all(torch.allclose(f, wanted(x), atol=1e-5) for f, x in zip(found, (q, k), strict=True)):
        return None

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        # What projections have just written is nobody else's.
        if not more and not named and kernels.rotate(q, cos, sin):
            if not kernels.rotate(k, cos, sin):
                k = own(k, k, cos, sin)[0]
            return q, k
        return own(q, k, cos, sin, *more, **named)

    return turned


def _with_rotary(kind: type) -> type | None:
    """A subclass whose forward is ``kind``'s own, but for the function that turns queries and keys."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(ROTARY)
    turned = None if own is None else _turned(own)
    if turned is None:
        return None
    seen = {**forward.__globals__, ROTARY: turned}
    rest = (forward.__name__, forward.__defaults__, forward.__closure__)
    copied = FunctionType(forward.__code__, seen, *rest)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return type("Fused" + kind.__name__, (kind,), {"forward": copied})


def fuse_rotary(model: nn.Module) -> None:
    """Let attention turn its queries and keys in one pass."""
    kinds = {kind: _with_rotary(kind) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        module.__class__ = kinds[type(module)] or type(module)
