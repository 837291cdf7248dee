"""Masks and scales: what is left of a direction before it is probed and applied.

    none        D
    sparse      m * D, m = [|theta| <= h]: the smallest weights of a matrix (Sparse-MeZO, arXiv 2402.15751)
    layers      D of the blocks of a random subset, drawn every step, else 0 (LeZO, arXiv 2410.09823)
    hessian     D/sqrt(H), H a running diagonal curvature (HiZOO, arXiv 2402.15173); hessian-block: H of a row
    quantized   Q(D) for the probe, Q'(D) for the update: two independent roundings (QuZO, arXiv 2502.12346);
                of int8 weights to the codes' own grid, so that every probed weight is a code times its scale
    block       s_b * D_b of tensor b, as a finetuner tells at every step (ZO Fine-tuner, arXiv 2510.00419)

A mask sees the weights as the forward reads them, at the step's start, so probe and update agree on it. What it
knows beside them is a function of the base, the seed and the journal: nothing has to be saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edgezo.machine.limits import MOST_CODE, tiles
from edgezo.zo import noise
from edgezo.zo.directions import Target
from edgezo.zo.noise import Key

HESSIAN_PACE = 1e-6  # of the running curvature; HiZOO's smooth type
LEAST_CURVATURE = 1e-8
LEVELS = 127  # of 8 bits, symmetric, over the range of noise.normals
_RANGE = 4.25
_SQUARES = 2.0**16


class MaskedLayout(Protocol):
    """What a mask asks of a stored matrix (weights/layouts.py)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def read(self, rows: slice | Tensor) -> Tensor: ...

    def grid_step(self, rows: slice | Tensor) -> Tensor | None: ...


class Masked(Protocol):
    """What a mask asks of a trained tensor (weights/trainable.py)."""

    @property
    def target(self) -> Target: ...

    @property
    def layout(self) -> MaskedLayout: ...

    state: dict[str, Tensor]
    threshold: float | None


class Mask:
    """Every trained value is probed. Also what the other masks have in common."""

    name = "none"
    states: tuple[str, ...] = ()  # fp32 tensors beside a trained one, all ones at the start
    by_row = False  # they have one column

    def prepare(self, row: Masked) -> None:
        """Look at a trained tensor once, when it has the base's values."""

    def shapes(self, row: Masked) -> bool:
        """Whether rows of U have to go through ``shape``."""
        return False

    def shape(
        self,
        u: Tensor,  # (n, cols) fp32 rows of U, or ones
        key: Key,
        row: Masked,
        rows: slice | Tensor,
        seen: Callable[[], Tensor],  # (n, cols) the weights there, as the forward reads them
        *,
        probing: bool,
    ) -> Tensor:
        raise NotImplementedError

    def scale(self, key: Key, row: Masked, told: float = 1.0) -> float:
        """Of the tensor's whole direction; 0: it is left alone this step. ``told``: what a finetuner makes of it."""
        return 1.0

    def learn(self, row: Masked, rows: slice | Tensor, u: Tensor, curvature: Tensor) -> None:
        """Take in what the step has measured, (n or 1, 1), along unmasked rows ``u`` of U."""


class Sparse(Mask):
    """The ``keep`` smallest of a matrix's weights. The threshold h is the base's; which weights lie below is looked
    up in the current ones, as published, so a weight that grows past h stays where it is from then on.
    """

    name = "sparse"

    def __init__(self, keep: float):
        self.keep = keep

    def shapes(self, row: Masked) -> bool:
        return row.threshold is not None

    def prepare(self, row: Masked) -> None:
        """h: the ``keep`` quantile of |theta| to bf16's precision, from a histogram made tile by tile."""
        if row.target.vector or "#" in row.target.name:
            return
        count = np.zeros(1 << 15, np.int64)
        for rows in tiles(*row.layout.shape):
            bits = row.layout.read(rows).view(torch.int32) >> 16 & 0x7FFF
            count += np.bincount(bits.cpu().numpy().ravel(), minlength=1 << 15)
        last = int(np.searchsorted(np.cumsum(count), self.keep * count.sum()))
        row.threshold = float(np.array((last + 1) << 16, np.uint32).view(np.float32))

    def shape(
        self,
        u: Tensor,
        key: Key,
        row: Masked,
        rows: slice | Tensor,
        seen: Callable[[], Tensor],
        *,
        probing: bool,
    ) -> Tensor:
        assert row.threshold is not None
        return u * (seen().abs() < row.threshold)


class Layers(Mask):
    """A ``keep`` share of the model's blocks, drawn anew every step; what is in no block is always probed."""

    name = "layers"

    def __init__(self, keep: float):
        self.keep = keep
        self.blocks: Collection[int] = set()

    def prepare(self, row: Masked) -> None:
        block = block_of(row.target.name)
        self.blocks = set(self.blocks) | ({block} if block is not None else set())

    def chosen(self, key: Key) -> set[int]:
        blocks = sorted(self.blocks)
        count = max(1, round(self.keep * len(blocks)))
        order = noise.permutation(key, noise.tensor_id("layers"), noise.CHOICE, len(blocks))
        return {blocks[i] for i in order[:count]}

    def scale(self, key: Key, row: Masked, told: float = 1.0) -> float:
        block = block_of(row.target.name)
        return 1.0 if block is None or block in self.chosen(key) else 0.0


def block_of(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


class Hessian(Mask):
    """D/sqrt(H): long where the loss is flat. A third, plain forward measures the curvature along the probe.

        H <- (1 - pace) H + pace |l+ + l- - 2 l0|/(2 sigma^2) H z^2

    with D = z/sqrt(H). The update takes the H that was probed, not the one that it becomes (the release mixes them).
    """

    name = "hessian"
    states = ("hessian",)

    def shapes(self, row: Masked) -> bool:
        return True

    def shape(
        self,
        u: Tensor,
        key: Key,
        row: Masked,
        rows: slice | Tensor,
        seen: Callable[[], Tensor],
        *,
        probing: bool,
    ) -> Tensor:
        return u / row.state["hessian"][rows].sqrt()

    def learn(self, row: Masked, rows: slice | Tensor, u: Tensor, curvature: Tensor) -> None:
        held = row.state["hessian"]
        h = held[rows]
        # One operation at a time: a fused one rounds differently at a vector's end.
        grown = self._pooled(u.square()).mul_(h).mul_(curvature).mul_(HESSIAN_PACE)
        held[rows] = (
            (h * (1 - HESSIAN_PACE)).add_(grown).clamp_(LEAST_CURVATURE, 1 / LEAST_CURVATURE)
        )

    def _pooled(self, squares: Tensor) -> Tensor:
        return squares


class BlockHessian(Hessian):
    """The same with one H for each row of a matrix: what a row's own z^2 tell, on average."""

    name = "hessian-block"
    by_row = True

    def _pooled(self, squares: Tensor) -> Tensor:
        # On a grid of which fp64 sums have no rounding, so that no tile changes the mean.
        whole = squares.mul_(_SQUARES).round_().double().sum(1, keepdim=True)
        return whole.div_(_SQUARES * squares.shape[1]).float()


class Quantized(Mask):
    """U rounded stochastically, once for the probe and once more for the update.

    To a grid of 255 levels; of int8 weights to one on which theta +- sigma*U has whole codes. There a change that would
    leave the codes' range on either side is cut to what has room on both, for probe and update alike.
    """

    name = "quantized"

    def __init__(self, sigma: float):
        self.sigma = sigma

    def shapes(self, row: Masked) -> bool:
        return True

    def shape(
        self,
        u: Tensor,
        key: Key,
        row: Masked,
        rows: slice | Tensor,
        seen: Callable[[], Tensor],
        *,
        probing: bool,
    ) -> Tensor:
        stream = noise.PROBE_GRID if probing else noise.UPDATE_GRID
        step: float | Tensor = _RANGE / LEVELS
        room = None
        if (scale := row.layout.grid_step(rows)) is not None:
            step = scale / self.sigma
            room = MOST_CODE - (seen() / scale).round_().abs_()
        whole = u / step
        below = torch.floor(whole)
        dither = noise.uniform_at(key, row.target.id, stream, rows, row.target.cols)
        below.add_(dither.to(u.device) < whole.sub_(below))
        if room is not None:
            below = torch.minimum(torch.maximum(below, -room), room)
        return below.mul_(step)


class Block(Mask):
    """Each tensor's direction as long as a finetuner tells (run/finetuner.py); records carry the scales."""

    name = "block"

    def scale(self, key: Key, row: Masked, told: float = 1.0) -> float:
        return told


def mask_of(name: str, keep: float, sigma: float) -> Mask:
    makers: dict[str, Callable[[], Mask]] = {
        "none": Mask,
        "sparse": lambda: Sparse(keep),
        "layers": lambda: Layers(keep),
        "hessian": Hessian,
        "hessian-block": BlockHessian,
        "quantized": lambda: Quantized(sigma),
        "block": Block,
    }
    return makers[name]()
