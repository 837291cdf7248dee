"""Attention with softcapped scores: computed in pieces of the queries, it is that of the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgezo.network import packing

ROWS, HEADS, LENGTH, WIDTH = 2, 3, 300, 8
SCALE, SOFTCAP = 0.3, 5.0
SMALL_TILE = packing.SCORE_COPIES * ROWS * HEADS * LENGTH * 4 * packing.LENGTH_STEP  # of one piece


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def parts(grad: bool) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    made = [
        torch.randn(ROWS, HEADS, LENGTH, WIDTH, generator=drawn).requires_grad_(grad)
        for _ in range(3)
    ]
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = seen.expand(ROWS, 1, LENGTH, LENGTH).clone()
    mask[1, :, :, 250:] = False  # padding
    return [*made, mask]


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """In float64, without pieces."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.tanh(q @ k.transpose(2, 3) * SCALE / SOFTCAP) * SOFTCAP
    return torch.softmax(scores.masked_fill(~mask, -1e30), -1) @ v


@pytest.mark.parametrize("grad", [False, True])
def test_pieces_give_what_whole_rows_give(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TILE_BYTES", SMALL_TILE)
    whole, cut = parts(grad), parts(grad)
    wanted = by_hand(*whole)
    with torch.set_grad_enabled(grad), Largest() as largest:
        y = packing._softcapped(cut, SCALE, SOFTCAP)
        assert torch.allclose(y.double(), wanted, atol=1e-6)
        if grad:
            y.square().sum().backward()
    if grad:
        wanted.square().sum().backward()
    for of_whole, of_cut in zip(whole[:3], cut[:3], strict=True):
        if grad:
            assert torch.allclose(of_cut.grad, of_whole.grad, atol=1e-5)
    assert largest.elements <= max(y.numel(), ROWS * HEADS * packing.LENGTH_STEP * LENGTH)


def test_a_short_row_is_one_piece() -> None:
    with Largest() as largest:
        packing._softcapped(parts(False), SCALE, SOFTCAP)
    assert largest.elements == ROWS * HEADS * LENGTH * LENGTH
