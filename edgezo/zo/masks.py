"""Masks: which entries of a direction are kept, and how they are scaled, in probe and update alike.

    none            D
    sparse          m * D, m = [|theta| < h]: only the smallest weights of a matrix (Sparse-MeZO, arXiv 2402.15751)
    layers          D in a random subset of the blocks, drawn every step, and 0 in the others (LeZO, arXiv 2410.09823)
    hessian         D/sqrt(H), H a running diagonal curvature (HiZOO, arXiv 2402.15173)
    hessian-block   D/sqrt(H), H one curvature for each row of a matrix
    quantized       Q(D) in the probe, Q'(D) in the update: two independent roundings (QuZO, arXiv 2502.12346).
                    For int8 weights the grid is that of the codes: every probed weight is a code times its scale
    block           s_b * D in tensor b; a learned finetuner gives s_b every step (ZO Fine-tuner, arXiv 2510.00419)

A mask sees the weights as the forward reads them at the start of the step, so probe and update agree on it. All else
that it knows is a function of the base, the seed and the journal: nothing has to be saved.
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

HESSIAN_PACE = 1e-6  # weight of a new measurement in the running curvature: HiZOO's "smooth"
LEAST_CURVATURE = 1e-8  # the running curvature stays between this and its inverse
LEVELS = 127  # `quantized` has so many levels on each side of 0: 8 bits
_RANGE = 4.25  # the largest level; noise.normals ends at 4.2
_SQUARE_GRID = 2.0**16  # squares are rounded to multiples of its inverse before they are summed


class MaskedLayout(Protocol):
    """What a mask needs of a stored matrix (weights/layouts.py)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def read(self, rows: slice | Tensor) -> Tensor: ...

    def grid_step(self, rows: slice | Tensor) -> Tensor | None: ...


class Masked(Protocol):
    """What a mask needs of a trained tensor (weights/trainable.py)."""

    @property
    def target(self) -> Target: ...

    @property
    def layout(self) -> MaskedLayout: ...

    state: dict[str, Tensor]
    threshold: float | None


class Mask:
    """No mask: every trained value is perturbed. Other masks override what they change."""

    name = "none"
    states: tuple[str, ...] = ()  # fp32 tensors beside each trained one, by name; ones at first
    by_row = False  # whether these have one column, not as many as the trained tensor

    def prepare(self, trainable: Masked) -> None:
        """Look at a trained tensor once, before the first step, when it has the base's values."""

    def shapes(self, trainable: Masked) -> bool:
        """Whether this mask changes the entries of U: whether they go through ``shape``."""
        return False

    def shape(
        self,
        u: Tensor,
        key: Key,
        trainable: Masked,
        rows: slice | Tensor,
        weights: Callable[[], Tensor],
        *,
        probing: bool,
    ) -> Tensor:
        """Rows of U as this mask shapes them, (n, cols) fp32; ``u`` is U there, or ones where a direction has no U.

        ``weights()``: (n, cols) fp32, the weights there as the forward reads them. ``probing``: True in a forward,
        False in the update.
        """
        raise NotImplementedError

    def scale(self, key: Key, trainable: Masked, finetuned: float = 1.0) -> float:
        """What the tensor's whole direction is multiplied by in this step; 0: the tensor is left as it is.

        ``finetuned``: the scale that a finetuner gives the tensor.
        """
        return 1.0

    def learn(self, trainable: Masked, rows: slice | Tensor, u: Tensor, curvature: Tensor) -> None:
        """Take in the ``curvature`` (n or 1, 1) that the step measured; ``u`` (n, cols): U before ``shape``."""


class Sparse(Mask):
    """Only the smallest weights of a matrix move: a share ``keep`` of them.

    The threshold h is that of the base. Which weights lie below it is seen from the current weights, as published, so
    a weight that grows past h stays as it is from then on. Vectors and tensors beside a matrix move as a whole.
    """

    name = "sparse"

    def __init__(self, keep: float):
        self.keep = keep

    def shapes(self, trainable: Masked) -> bool:
        return trainable.threshold is not None

    def prepare(self, trainable: Masked) -> None:
        """Find h, the ``keep`` quantile of |theta| to bf16's precision, from a histogram made tile by tile."""
        if trainable.target.vector or "#" in trainable.target.name:
            return
        count = np.zeros(1 << 15, np.int64)
        for rows in tiles(*trainable.layout.shape):
            bits = trainable.layout.read(rows).view(torch.int32) >> 16 & 0x7FFF
            count += np.bincount(bits.cpu().numpy().ravel(), minlength=1 << 15)
        last = int(np.searchsorted(np.cumsum(count), self.keep * count.sum()))
        trainable.threshold = float(np.array((last + 1) << 16, np.uint32).view(np.float32))

    def shape(
        self,
        u: Tensor,
        key: Key,
        trainable: Masked,
        rows: slice | Tensor,
        weights: Callable[[], Tensor],
        *,
        probing: bool,
    ) -> Tensor:
        assert trainable.threshold is not None
        return u * (weights().abs() < trainable.threshold)


class Layers(Mask):
    """Only a share ``keep`` of the model's blocks moves, drawn anew every step; what is in no block always moves."""

    name = "layers"

    def __init__(self, keep: float):
        self.keep = keep
        self.blocks: Collection[int] = set()

    def prepare(self, trainable: Masked) -> None:
        block = block_of(trainable.target.name)
        self.blocks = set(self.blocks) | ({block} if block is not None else set())

    def chosen(self, key: Key) -> set[int]:
        """The blocks that move in the step of ``key``."""
        blocks = sorted(self.blocks)
        count = max(1, round(self.keep * len(blocks)))
        order = noise.permutation(key, noise.tensor_id("layers"), noise.CHOICE, len(blocks))
        return {blocks[i] for i in order[:count]}

    def scale(self, key: Key, trainable: Masked, finetuned: float = 1.0) -> float:
        block = block_of(trainable.target.name)
        return 1.0 if block is None or block in self.chosen(key) else 0.0


def block_of(name: str) -> int | None:
    """Number of the block that a tensor is in; None where it is in none."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


class Hessian(Mask):
    """D = z/sqrt(H): long steps where the loss is flat. A third, plain forward measures the curvature along D.

        H <- (1 - pace) H + pace |l+ + l- - 2 l0|/(2 sigma^2) H z^2

    The update divides by the H of the probe, not by the new H (the release of HiZOO mixes the two).
    """

    name = "hessian"
    states = ("hessian",)

    def shapes(self, trainable: Masked) -> bool:
        return True

    def shape(
        self,
        u: Tensor,
        key: Key,
        trainable: Masked,
        rows: slice | Tensor,
        weights: Callable[[], Tensor],
        *,
        probing: bool,
    ) -> Tensor:
        return u / trainable.state["hessian"][rows].sqrt()

    def learn(self, trainable: Masked, rows: slice | Tensor, u: Tensor, curvature: Tensor) -> None:
        hessian = trainable.state["hessian"]
        h = hessian[rows]
        # One operation at a time: a fused one rounds differently at the end of a row.
        new = self._pooled(u.square()).mul_(h).mul_(curvature).mul_(HESSIAN_PACE)
        running = (h * (1 - HESSIAN_PACE)).add_(new)
        hessian[rows] = running.clamp_(LEAST_CURVATURE, 1 / LEAST_CURVATURE)

    def _pooled(self, squares: Tensor) -> Tensor:
        """z^2 (n, cols) in the shape of H."""
        return squares


class BlockHessian(Hessian):
    """``Hessian`` with one H for each row of a matrix, which learns from the mean of the row's z^2."""

    name = "hessian-block"
    by_row = True

    def _pooled(self, squares: Tensor) -> Tensor:
        # fp64 sums of whole numbers have no rounding, so that the mean does not depend on the order of adding.
        whole = squares.mul_(_SQUARE_GRID).round_().double().sum(1, keepdim=True)
        return whole.div_(_SQUARE_GRID * squares.shape[1]).float()


class Quantized(Mask):
    """U rounded stochastically to a grid, once for the probe and once more for the update.

    The grid has 255 levels. For int8 weights it is the one on which theta +- sigma*U has whole codes; there a change
    that would leave the range of codes on either side is cut to what both sides have room for, in probe and update.
    """

    name = "quantized"

    def __init__(self, sigma: float):
        self.sigma = sigma

    def shapes(self, trainable: Masked) -> bool:
        return True

    def shape(
        self,
        u: Tensor,
        key: Key,
        trainable: Masked,
        rows: slice | Tensor,
        weights: Callable[[], Tensor],
        *,
        probing: bool,
    ) -> Tensor:
        stream = noise.PROBE_GRID if probing else noise.UPDATE_GRID
        step: float | Tensor = _RANGE / LEVELS
        room = None
        if (scale := trainable.layout.grid_step(rows)) is not None:
            step = scale / self.sigma
            room = MOST_CODE - (weights() / scale).round_().abs_()
        whole = u / step
        below = torch.floor(whole)
        target = trainable.target
        dither = noise.uniform(key, target.id, stream, rows, target.cols, u.device)
        below.add_(dither < whole.sub_(below))
        if room is not None:
            below = torch.minimum(torch.maximum(below, -room), room)
        return below.mul_(step)


class Finetuned(Mask):
    """Each tensor's direction is as long as a finetuner says (run/finetuner.py); journal records carry the scales."""

    name = "block"

    def scale(self, key: Key, trainable: Masked, finetuned: float = 1.0) -> float:
        return finetuned


def mask_of(name: str, keep: float, sigma: float) -> Mask:
    """The mask of this name: ``keep`` is a share in (0, 1], ``sigma`` that of the probe. Raises KeyError."""
    makers: dict[str, Callable[[], Mask]] = {
        "none": Mask,
        "sparse": lambda: Sparse(keep),
        "layers": lambda: Layers(keep),
        "hessian": Hessian,
        "hessian-block": BlockHessian,
        "quantized": lambda: Quantized(sigma),
        "block": Finetuned,
    }
    return makers[name]()
