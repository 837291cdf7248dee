"""A linear probe: classification read off the hidden states of the blocks that know most, by one pass over the rows.

What a classifier on frozen states takes is forwards and one small linear problem a block, so it is forward-only and
exact. Of every block in the upper part of the model the state x at the scored position, at unit root mean square, is
kept in a file of the run; then for each block, with z the standardised x and t the one-hot labels less their means,

    W       = argmin |Z W - T|^2/n + ridge*|W|^2           (Hoerl & Kennard 1970), for each ridge of a short list
    error   = |(T - Z W)/(1 - h)|^2/(n K), h the leverages: what every row is predicted as by the others
              (leave one out in closed form: Allen 1974), so that each row is held out once

and the ``PROBED_BLOCKS`` blocks of least error are averaged. Their scores are multiplied by the factor of least cross
entropy on those held-out predictions, so that losses mean what those of a softmax mean. Blocks above the last one that
is read are not run any more.

With a probe GRZO can go on training the blocks below it: its losses are the probe's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.machine.files import write_error
from edgezo.machine.limits import PROBED_BLOCKS

if TYPE_CHECKING:
    pass

LOWEST = 1 / 3  # of the blocks below that none is looked at
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FACTORS = tuple(2 ** (k / 4) for k in range(29))  # 1 to 128
TILE_ROWS = 256
LEAST_ROWS = 8  # fewer say nothing about each other
EPS = 1e-6


def candidates(layers: int) -> tuple[int, ...]:
    """The blocks whose outputs are looked at."""
    return tuple(range(int(layers * LOWEST), layers))


@dataclass(frozen=True)
class LinearProbe:
    """Scores of K classes from the states of some blocks: factor/S * sum_s (W_s x_s) + bias."""

    blocks: tuple[int, ...]  # ascending
    weight: Tensor  # (S, K, hidden) fp32
    bias: Tensor  # (K,) fp32

    def logits(self, states: Sequence[Tensor]) -> Tensor:
        """(n, K) fp32 of one (n, hidden) fp32 state for each of ``blocks``, as ``unit`` gives them."""
        found = self.bias.expand(len(states[0]), -1)
        for state, weight in zip(states, self.weight, strict=True):
            found = found.addmm(state, weight.T)
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {
            "probe.blocks": torch.tensor(self.blocks),
            "probe.weight": self.weight,
            "probe.bias": self.bias,
        }

    @staticmethod
    def of(tensors: dict[str, Tensor], device: torch.device) -> LinearProbe:
        """The inverse of ``tensors``. Raises KeyError, ValueError for others."""
        weight, bias = tensors["probe.weight"], tensors["probe.bias"]
        blocks = tuple(int(b) for b in tensors["probe.blocks"])
        if weight.dim() != 3 or bias.shape != weight.shape[1:2] or len(blocks) != len(weight):
            raise ValueError(f"weights {tuple(weight.shape)} for {len(blocks)} blocks")
        return LinearProbe(blocks, weight.to(device), bias.to(device))


def unit(state: Tensor) -> Tensor:
    """(n, hidden) states at unit root mean square, fp32: blocks differ in scale by orders, rows by their position."""
    state = state.float()
    return state / state.square().mean(-1, keepdim=True).sqrt().clamp(min=EPS)


@dataclass
class Taps:
    """Forward hooks that keep the states of some blocks at the scored positions of each forward."""

    index: Tensor | None = None  # (n,) int64 into the packed tokens of the forward that runs
    seen: dict[int, Tensor] = field(default_factory=dict)  # (n, hidden) fp32 by block
    handles: list[Any] = field(default_factory=list)

    @staticmethod
    def on(layers: nn.ModuleList, blocks: Sequence[int]) -> Taps:
        taps = Taps()
        for block in blocks:

            def keep(module: nn.Module, given: Any, output: Any, block: int = block) -> None:
                whole = output[0] if isinstance(output, tuple) else output
                taps.seen[block] = unit(whole.reshape(-1, whole.shape[-1])[taps.index])

            taps.handles.append(layers[block].register_forward_hook(keep))
        return taps

    def take(self) -> list[Tensor]:
        """What the last forward showed, from the lowest block up."""
        found = [self.seen[block] for block in sorted(self.seen)]
        self.seen = {}
        return found

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass
class Readout:
    """A probe and the taps that feed it: what takes the head's place."""

    probe: LinearProbe
    taps: Taps

    def __call__(self, labels: Tensor, sides: int) -> tuple[Tensor, Tensor]:
        """Losses (sides, b) fp32 and predictions (sides, b) of the forward that has just run; labels (b,)."""
        logits = self.probe.logits(self.taps.take())
        losses = F.cross_entropy(logits, labels.repeat(sides).to(logits.device), reduction="none")
        return losses.view(sides, -1), logits.argmax(-1).view(sides, -1)


# ---------------------------------------------------------------------------------------------
# The states of a run's rows


@dataclass(frozen=True)
class StateFile:
    """States of rows in the order in which they passed, (blocks, hidden) fp16 each, and their loss so far, fp32.

    It only grows: after a kill the rows that are whole are there, and the pass goes on behind them.
    """

    path: Path
    blocks: int
    hidden: int

    @property
    def row_bytes(self) -> int:
        return 2 * self.blocks * self.hidden + 4

    def rows(self) -> int:
        """Whole rows that are there."""
        return self.path.stat().st_size // self.row_bytes if self.path.exists() else 0

    def keep(self, rows: int) -> None:
        """Forget what is beyond ``rows``."""
        if self.path.exists():
            os.truncate(self.path, rows * self.row_bytes)

    def append(self, states: Sequence[Tensor], losses: Tensor) -> None:
        """States of some rows, (n, hidden) for each block, and losses (n,). EdgezoError where the disk is full."""
        rows = torch.stack(list(states), 1).half().cpu().numpy()
        parts = zip(rows, losses.float().numpy(), strict=True)
        data = b"".join(row.tobytes() + loss.tobytes() for row, loss in parts)
        try:
            with open(self.path, "ab") as file:
                file.write(data)
        except OSError as problem:
            raise write_error(self.path, "states for the linear probe", problem) from problem

    def block(self, number: int, rows: int) -> Tensor:
        """The states of one block, (rows, hidden) fp32."""
        found = np.empty((rows, self.hidden), np.float32)
        for row, piece in enumerate(self._pieces(2 * self.hidden * number, 2 * self.hidden, rows)):
            found[row] = np.frombuffer(piece, np.float16)
        return torch.from_numpy(found)

    def losses(self, rows: int) -> Tensor:
        """(rows,) fp32."""
        pieces = self._pieces(self.row_bytes - 4, 4, rows)
        return torch.tensor([float(np.frombuffer(piece, np.float32)[0]) for piece in pieces])

    def _pieces(self, offset: int, size: int, rows: int) -> Iterator[bytes]:
        """``size`` bytes at ``offset`` of each row; never more than a row in memory."""
        with open(self.path, "rb", buffering=0) as file:
            for row in range(rows):
                file.seek(row * self.row_bytes + offset)
                yield file.read(size)


# ---------------------------------------------------------------------------------------------
# The linear problem


class BlockFit(NamedTuple):
    """The best ridge of one block."""

    error: float  # mean square over rows and classes, each row predicted by the others
    ridge: float
    weight: Tensor  # (K, hidden) fp32
    bias: Tensor  # (K,) fp32
    held_out: Tensor  # (n, K) fp32 scores of each row by the others


class Fitted(NamedTuple):
    probe: LinearProbe
    ridges: tuple[float, ...]  # of its blocks
    # Of the rows, each predicted by the others.
    accuracy: float
    loss: float


def fit_block(x: Tensor, labels: Tensor, classes: int) -> BlockFit:
    """The best of ``RIDGES`` for states ``x`` (n, hidden) fp32 and labels (n,); ``x`` is changed."""
    n = len(x)
    targets = F.one_hot(labels, classes).float()
    share = targets.mean(0)
    targets = targets - share
    mean = x.mean(0)
    x.sub_(mean)
    spread = x.square().mean(0).sqrt_().clamp_(min=EPS)
    x.div_(spread)
    # Z = U S V^T by the smaller of Z^T Z and Z Z^T; at most two matrices of the size of x at once.
    if n > x.shape[1]:
        values, right = torch.linalg.eigh(x.T @ x / n)
        values.clamp_(min=0)
        turned = x @ right  # U S
    else:
        values, left = torch.linalg.eigh(x @ x.T / n)
        values.clamp_(min=0)
        size = (n * values).sqrt_()
        right = (x.T @ left) / size.clamp(min=EPS)
        turned = left.mul_(size)
    along = turned.T @ targets / n
    best: BlockFit | None = None
    for ridge in RIDGES:
        inverse = 1 / (values + ridge)
        scores = turned @ (along * inverse[:, None])
        leverage = (
            torch.cat([part.square() @ inverse for part in turned.split(TILE_ROWS)]) / n + 1 / n
        )
        # A row that determines its own prediction says nothing about others.
        held_out = targets - (targets - scores) / (1 - leverage).clamp(min=EPS)[:, None]
        error = float((held_out - targets).square().mean())
        if best is None or error < best.error:
            weight = (right @ (along * inverse[:, None])).T / spread
            best = BlockFit(error, ridge, weight, share - weight @ mean, held_out + share)
    assert best is not None
    return best


def fit(
    states: Callable[[int], Tensor], blocks: Sequence[int], labels: Tensor, classes: int
) -> Fitted:
    """The probe of the best blocks; ``states(i)`` gives those of ``blocks[i]``, (n, hidden) fp32, freshly owned."""
    kept: dict[int, BlockFit] = {}
    for number, block in enumerate(blocks):
        kept[block] = fit_block(states(number), labels, classes)
        kept = dict(sorted(kept.items(), key=lambda item: (item[1].error, item[0]))[:PROBED_BLOCKS])
    kept = dict(sorted(kept.items()))
    scores = torch.stack([own.held_out for own in kept.values()]).mean(0)
    factor = min(FACTORS, key=lambda f: float(F.cross_entropy(scores * f, labels)))
    scale = factor / len(kept)
    probe = LinearProbe(
        tuple(kept),
        torch.stack([own.weight for own in kept.values()]) * scale,
        torch.stack([own.bias for own in kept.values()]).sum(0) * scale,
    )
    accuracy = float((scores.argmax(1) == labels).double().mean())
    loss = float(F.cross_entropy(scores * factor, labels))
    return Fitted(probe, tuple(own.ridge for own in kept.values()), accuracy, loss)
