"""The linear probe in numpy: what network/readout.py is with torch. Its mathematics is described there.

A probe that one engine has fitted is read by the other: it is a file of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from edgezo.data.batches import PackedRows
from edgezo.machine.limits import READOUT_BLOCKS
from edgezo.network.plain_losses import cross_entropies

LOWEST_SHARE = 1 / 3  # blocks in this lower share of the model are not tried
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FACTORS = tuple(2 ** (k / 4) for k in range(29))  # 1 to 128
LEAST_ROWS = 8  # fewer rows cannot be fitted and judged by leaving one out
LEAST_SPREAD = 1e-6  # of what is divided by


def tried_blocks(layers: int, first: int = 0) -> tuple[int, ...]:
    """The blocks whose states are tried, of a model with ``layers`` blocks of which those from ``first`` on run."""
    return tuple(range(max(int(layers * LOWEST_SHARE), first), layers))


def unit_states(states: np.ndarray) -> np.ndarray:
    """(n, hidden) states at unit root mean square, fp32."""
    size = np.sqrt(np.square(states).mean(-1, keepdims=True))
    return np.asarray(states / np.maximum(size, np.float32(LEAST_SPREAD)), np.float32)


@dataclass(frozen=True)
class PlainReadoutWeights:
    """What gives scores of K classes from the states of S blocks: sum_s (W_s x_s) + bias."""

    blocks: tuple[int, ...]  # ascending
    weight: np.ndarray  # (S, K, hidden) fp32
    bias: np.ndarray  # (K,) fp32

    def logits(self, states: Sequence[np.ndarray]) -> np.ndarray:
        """Logits (n, K) fp32 from the ``unit_states`` of each of ``blocks``, (n, hidden) each."""
        logits = np.repeat(self.bias[None], len(states[0]), axis=0)
        for state, weight in zip(states, self.weight, strict=True):
            logits = logits + state @ weight.T
        return logits

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of probe.safetensors, by name."""
        return {
            "probe.blocks": np.array(self.blocks, np.int64),
            "probe.weight": self.weight,
            "probe.bias": self.bias,
        }

    @staticmethod
    def of(tensors: dict[str, np.ndarray], hidden: int) -> PlainReadoutWeights:
        """The inverse of ``tensors()``. Raises KeyError or ValueError for what does not fit."""
        weight, bias, blocks = (tensors[f"probe.{name}"] for name in ("weight", "bias", "blocks"))
        if weight.dtype != np.float32 or bias.dtype != np.float32 or blocks.dtype != np.int64:
            raise ValueError(f"weights of {weight.dtype} and {bias.dtype}")
        if weight.ndim != 3 or bias.shape != weight.shape[1:2] or weight.shape[2] != hidden:
            raise ValueError(f"weights {weight.shape} for states of {hidden} numbers")
        numbers = tuple(int(n) for n in blocks)
        if len(numbers) != len(weight) or any(a >= b for a, b in pairwise((-1, *numbers))):
            raise ValueError(f"blocks {numbers}")
        return PlainReadoutWeights(numbers, weight, bias)


@dataclass
class PlainReadout:
    """A linear probe in the head's place."""

    weights: PlainReadoutWeights

    def losses(
        self, states: Sequence[np.ndarray], batch: PackedRows, sides: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses (sides, b) fp32 and predictions (sides, b) int64."""
        logits = self.weights.logits(states)
        losses = cross_entropies(logits, np.tile(batch.labels, sides))
        return losses.reshape(sides, -1), logits.argmax(-1).reshape(sides, -1)


# ---------------------------------------------------------------------------------------------
# The linear problem


class PlainBlockFit(NamedTuple):
    """The linear problem of one block, solved with its best ridge."""

    error: float  # mean square over rows and classes, each row predicted by a fit to the others
    ridge: float
    weight: np.ndarray  # (K, hidden) fp32
    bias: np.ndarray  # (K,) fp32
    held_out: np.ndarray  # (n, K) fp32 scores, each row's by a fit to the others


class PlainFit(NamedTuple):
    """A linear probe fitted to rows, and how well fits to the other rows predict each row."""

    weights: PlainReadoutWeights
    ridges: tuple[float, ...]  # of its blocks
    accuracy: float
    loss: float


def fit_states(x: np.ndarray, labels: np.ndarray, classes: int, single: bool) -> PlainBlockFit:
    """Fit labels (n,) from states ``x`` (n, hidden) fp32, with the best of RIDGES. ``x`` is overwritten.

    With ``single``, without an intercept, and by a weight whose rows have the mean 0.
    """
    n = len(x)
    targets = np.eye(classes, dtype=np.float32)[labels]
    share = np.full(classes, 1 / classes, np.float32) if single else targets.mean(0)
    targets = targets - share
    if single:
        x -= x.mean(1, keepdims=True)
    mean = x.mean(0)
    x -= mean
    spread = np.maximum(np.sqrt(np.square(x).mean(0)), np.float32(LEAST_SPREAD))
    if single:
        x += mean
    x /= spread
    values, right, turned = _decomposed(x)
    along = turned.T @ targets / np.float32(n)
    best: PlainBlockFit | None = None
    for ridge in RIDGES:
        inverse = 1 / (values + np.float32(ridge))
        scores = turned @ (along * inverse[:, None])
        leverage = np.square(turned) @ inverse / np.float32(n)
        if not single:
            leverage += np.float32(1 / n)
        rest = np.maximum(1 - leverage, np.float32(LEAST_SPREAD))[:, None]
        held_out = targets - (targets - scores) / rest
        error = float(np.square(held_out - targets).mean())
        if best is None or error < best.error:
            weight = (right @ (along * inverse[:, None])).T / spread
            if single:
                weight -= weight.mean(1, keepdims=True)
            bias = np.zeros(classes, np.float32) if single else share - weight @ mean
            best = PlainBlockFit(error, ridge, weight, bias, held_out + share)
    assert best is not None
    return best


def _decomposed(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(squared singular values over n, V, U S) of x = U S V^T, by the smaller of X^T X and X X^T."""
    n = np.float32(len(x))
    if len(x) > x.shape[1]:
        values, right = np.linalg.eigh(x.T @ x / n)
        return np.maximum(values, 0), right, x @ right
    values, rotation = np.linalg.eigh(x @ x.T / n)
    values = np.maximum(values, 0)
    size = np.sqrt(n * values)
    right = (x.T @ rotation) / np.maximum(size, np.float32(LEAST_SPREAD))
    return values, right, rotation * size


def fit_readout(
    states: Callable[[int], np.ndarray],
    blocks: Sequence[int],
    labels: np.ndarray,
    classes: int,
    single: bool = False,
) -> PlainFit:
    """The linear probe from the best of ``blocks``; ``states(i)`` reads those of ``blocks[i]`` anew, (n, hidden)."""
    return best_blocks(
        lambda number: fit_states(states(number), labels, classes, single), blocks, labels, single
    )


def best_blocks(
    fitted: Callable[[int], PlainBlockFit],
    blocks: Sequence[int],
    labels: np.ndarray,
    single: bool,
) -> PlainFit:
    """The linear probe from the best of ``blocks``, or with ``single`` from the best one; of any engine.

    ``fitted(i)`` solves the problem of ``blocks[i]`` for labels (n,).
    """
    best: dict[int, PlainBlockFit] = {}
    for number, block in enumerate(blocks):
        best[block] = fitted(number)
        ordered = sorted(best.items(), key=lambda item: (item[1].error, item[0]))
        best = dict(ordered[: 1 if single else READOUT_BLOCKS])
    best = dict(sorted(best.items()))
    fits = list(best.values())
    scores = np.stack([one.held_out for one in fits]).mean(0)

    def loss_at(factor: float) -> float:
        return float(cross_entropies(scores * np.float32(factor), labels).mean())

    factor = min(FACTORS, key=loss_at)
    scale = np.float32(factor / len(fits))
    weights = PlainReadoutWeights(
        tuple(best),
        np.ascontiguousarray(np.stack([one.weight for one in fits]) * scale),
        np.stack([one.bias for one in fits]).sum(0) * scale,
    )
    accuracy = float((scores.argmax(1) == labels).mean())
    return PlainFit(weights, tuple(one.ridge for one in fits), accuracy, loss_at(factor))
