"""The readout (linear probe): classes read off hidden states of the blocks that know most, by one pass over the rows.

Fitting a classifier to frozen states takes one forward of each row and one small linear problem a block, solved
exactly. The state x of every block in the upper part of the model at the scored position, at unit root mean square, is
kept in a file of the run. Then for each block, with z the standardised x and t the one-hot labels less their means,

    W       = argmin |Z W - T|^2/n + ridge*|W|^2           (Hoerl & Kennard 1970), for each ridge of RIDGES
    error   = |(T - Z W)/(1 - h)|^2/(n K), h the leverages: the error of every row predicted by a fit to the others
              (leave one out in closed form: Allen 1974)

and the ``READOUT_BLOCKS`` blocks of least error are averaged. Their scores are multiplied by the one of FACTORS with
the least cross entropy on those left-out predictions, so that losses are on the scale of a softmax's. Blocks above the
last one that is read do not run any more.

With ``single`` the one block of least error is read, without an intercept and without the mean of a state: t is the
one-hot labels less 1/K, z the state less its mean, not less that of the rows. A final norm of ones, be it an RMS or a
layer norm, and a matrix give the labels of such a readout (export_classifier.py).

GRZO can go on to train the blocks below: its losses are then the readout's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.network.plain_readout import LEAST_SPREAD, RIDGES, PlainBlockFit, best_blocks
from edgezo.network.state_file import PlainStateFile

TILE_ROWS = 256


@dataclass(frozen=True)
class ReadoutWeights:
    """What gives scores of K classes from the states of S blocks: factor/S * sum_s (W_s x_s) + bias."""

    blocks: tuple[int, ...]  # ascending
    weight: Tensor  # (S, K, hidden) fp32
    bias: Tensor  # (K,) fp32

    def logits(self, states: Sequence[Tensor]) -> Tensor:
        """Logits (n, K) fp32 from the ``unit`` states of each of ``blocks``, (n, hidden) fp32 each."""
        logits = self.bias.expand(len(states[0]), -1)
        for state, weight in zip(states, self.weight, strict=True):
            logits = logits.addmm(state, weight.T)
        return logits

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of probe.safetensors, by name."""
        return {
            "probe.blocks": torch.tensor(self.blocks),
            "probe.weight": self.weight,
            "probe.bias": self.bias,
        }

    @staticmethod
    def of(tensors: dict[str, Tensor], hidden: int, device: torch.device) -> ReadoutWeights:
        """The inverse of ``tensors()``, for states of ``hidden`` numbers.

        Raises KeyError for a missing name, ValueError for shapes, dtypes or blocks that do not fit.
        """
        weight, bias, blocks = (tensors[f"probe.{name}"] for name in ("weight", "bias", "blocks"))
        if weight.dtype != torch.float32 or bias.dtype != torch.float32:
            raise ValueError(f"weights of {weight.dtype} and {bias.dtype}")
        if weight.dim() != 3 or bias.shape != weight.shape[1:2] or weight.shape[2] != hidden:
            raise ValueError(f"weights {tuple(weight.shape)} for states of {hidden} numbers")
        if blocks.shape != weight.shape[:1] or blocks.dtype != torch.int64 or not len(blocks):
            raise ValueError(f"weights {tuple(weight.shape)} for {tuple(blocks.shape)} blocks")
        numbers = tuple(blocks.tolist())
        if numbers[0] < 0 or any(a >= b for a, b in pairwise(numbers)):
            raise ValueError(f"blocks {numbers}")
        return ReadoutWeights(numbers, weight.to(device), bias.to(device))


def unit(state: Tensor) -> Tensor:
    """(n, hidden) states at unit root mean square, fp32.

    The scale of a state differs between blocks by orders of magnitude, and with its position in a row.
    """
    state = state.float()
    return state / state.square().mean(-1, keepdim=True).sqrt().clamp(min=LEAST_SPREAD)


@dataclass
class Taps:
    """Forward hooks that keep the states of some blocks at the scored positions of each forward."""

    # (n,) int64 into the packed tokens of the forward that runs; None: its states are not kept.
    index: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)  # (n, hidden) fp32 by block
    handles: list[Any] = field(default_factory=list)
    paused: bool = False

    @staticmethod
    def on(layers: nn.ModuleList, blocks: Sequence[int]) -> Taps:
        """Taps on those of a model's ``layers`` whose numbers are in ``blocks``."""
        taps = Taps()
        for block in blocks:

            def keep(module: nn.Module, args: Any, output: Any, block: int = block) -> None:
                if taps.paused or taps.index is None:
                    return
                hidden = output[0] if isinstance(output, tuple) else output
                taps.states[block] = unit(hidden.reshape(-1, hidden.shape[-1])[taps.index])

            taps.handles.append(layers[block].register_forward_hook(keep))
        return taps

    def take(self) -> list[Tensor]:
        """The last forward's states, (n, hidden) fp32 each, from the lowest block up."""
        states = [self.states[block] for block in sorted(self.states)]
        self.states = {}
        return states

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keep nothing of the forwards inside: many states may be read in them."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()


@dataclass
class Readout:
    """A linear probe in the head's place: its weights, and the taps that feed it."""

    weights: ReadoutWeights
    taps: Taps

    def logits(self) -> Tensor:
        """Logits (n, K) fp32 of the forward that has just run."""
        return self.weights.logits(self.taps.take())

    def __call__(self, labels: Tensor, sides: int) -> tuple[Tensor, Tensor]:
        """Losses (sides, b) fp32 and predictions (sides, b) int64 of the forward that has just run; labels (b,)."""
        logits = self.logits()
        losses = F.cross_entropy(logits, labels.repeat(sides).to(logits.device), reduction="none")
        return losses.view(sides, -1), logits.argmax(-1).view(sides, -1)


# ---------------------------------------------------------------------------------------------
# The states of a run's rows


class StateFile(PlainStateFile):
    """``PlainStateFile`` for tensors."""

    def append(self, states: Sequence[Tensor], losses: Tensor, first: int) -> None:
        """Add the states of rows ``first`` and later, (n, hidden) for each block, and their losses (n,).

        Raises EdgezoError where the disk is full.
        """
        rows = torch.stack(list(states), 1).half().cpu().numpy()
        self.append_arrays(rows, losses.float().numpy(), first)

    def block(self, number: int, rows: int) -> Tensor:
        """States of the first ``rows`` rows at one of the blocks, (rows, hidden) fp32. Raises DamagedRow."""
        return torch.from_numpy(self.block_array(number, rows))

    def losses(self, rows: int) -> Tensor:
        """Losses of the first ``rows`` rows, (rows,) fp32. Raises DamagedRow."""
        return torch.from_numpy(self.losses_array(rows))


# ---------------------------------------------------------------------------------------------
# The linear problem


class BlockFit(NamedTuple):
    """The linear problem of one block, solved with its best ridge."""

    error: float  # mean square over rows and classes, each row predicted by a fit to the others
    ridge: float
    weight: Tensor  # (K, hidden) fp32
    bias: Tensor  # (K,) fp32
    held_out: Tensor  # (n, K) fp32 scores, each row's by a fit to the others


class Fitted(NamedTuple):
    """A readout fitted to rows, and how well fits to the other rows predict each row."""

    readout: ReadoutWeights
    ridges: tuple[float, ...]  # of its blocks
    accuracy: float
    loss: float


def fit_block(x: Tensor, labels: Tensor, classes: int, single: bool = False) -> BlockFit:
    """Fit labels (n,) from states ``x`` (n, hidden) fp32, with the best of ``RIDGES``. ``x`` is overwritten.

    With ``single``, without an intercept, and by a weight whose rows have the mean 0.
    """
    n = len(x)
    targets = F.one_hot(labels, classes).float()
    share = torch.full((classes,), 1 / classes) if single else targets.mean(0)
    targets = targets - share
    if single:
        x.sub_(x.mean(1, keepdim=True))
    mean = x.mean(0)
    x.sub_(mean)
    spread = x.square().mean(0).sqrt_().clamp_(min=LEAST_SPREAD)
    if single:
        x.add_(mean)
    x.div_(spread)
    # Z = U S V^T by the smaller of Z^T Z and Z Z^T; at most two matrices of the size of x at once.
    if n > x.shape[1]:
        values, right = torch.linalg.eigh(x.T @ x / n)
        values.clamp_(min=0)
        turned = x @ right  # U S
    else:
        values, rotation = torch.linalg.eigh(x @ x.T / n)  # U
        values.clamp_(min=0)
        size = (n * values).sqrt_()
        right = (x.T @ rotation) / size.clamp(min=LEAST_SPREAD)
        turned = rotation.mul_(size)
    along = turned.T @ targets / n
    best: BlockFit | None = None
    for ridge in RIDGES:
        inverse = 1 / (values + ridge)
        scores = turned @ (along * inverse[:, None])
        leverage = torch.cat([part.square() @ inverse for part in turned.split(TILE_ROWS)]) / n
        if not single:
            leverage += 1 / n
        # A leverage of 1: the row alone decides its prediction, and no other row predicts it.
        held_out = targets - (targets - scores) / (1 - leverage).clamp(min=LEAST_SPREAD)[:, None]
        error = float((held_out - targets).square().mean())
        if best is None or error < best.error:
            weight = (right @ (along * inverse[:, None])).T / spread
            if single:
                weight -= weight.mean(1, keepdim=True)
            bias = torch.zeros(classes) if single else share - weight @ mean
            best = BlockFit(error, ridge, weight, bias, held_out + share)
    assert best is not None
    return best


def fit(
    states: Callable[[int], Tensor],
    blocks: Sequence[int],
    labels: Tensor,
    classes: int,
    single: bool = False,
) -> Fitted:
    """The readout from the best of ``blocks``, or with ``single`` from the best one, for labels (n,).

    ``states(i)`` reads those of ``blocks[i]`` anew, (n, hidden) fp32: they are overwritten.
    """

    def fitted(number: int) -> PlainBlockFit:
        made = fit_block(states(number), labels, classes, single)
        parts = (made.weight.numpy(), made.bias.numpy(), made.held_out.numpy())
        return PlainBlockFit(made.error, made.ridge, *parts)

    best = best_blocks(fitted, blocks, labels.numpy(), single)
    # In torch's own memory, which is aligned as that of a file that is read: products have the same bits then.
    weight, bias = (torch.tensor(part) for part in (best.weights.weight, best.weights.bias))
    readout = ReadoutWeights(best.weights.blocks, weight, bias)
    return Fitted(readout, best.ridges, best.accuracy, best.loss)
