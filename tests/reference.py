"""Slow references for what edgezo computes, written the obvious way: plain integers, whole matrices, float64.

Philox words         the ten rounds of the paper on Python integers
directions           one explicit matrix D_i an example
perturbed losses     a copy of the weights, theta +- sigma*D_i, inside transformers' own module, row by row
updates              - sum_i c_i D_i, matrix by matrix
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from edgezo.data.batches import Example
from edgezo.data.trees import Row
from edgezo.network.model import Model
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Trainable
from edgezo.zo import noise
from edgezo.zo.directions import Target
from edgezo.zo.noise import Key
from edgezo.zo.recipe import Recipe

# ----------------------------------------------------------------------------- noise

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x64-10 (Salmon et al., SC 2011): four 64-bit words of a counter."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c[0], _MULTIPLIERS[1] * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & _MASK, (a >> 64) ^ c[3] ^ k[1], a & _MASK]
        k = [(k[0] + _WEYL[0]) & _MASK, (k[1] + _WEYL[1]) & _MASK]
    return c


def bits(key: Key, tensor: int, stream: int, block: int) -> int:
    """The 256 bits of a block as one integer, bit 0 first. numpy counts before it generates, hence ``block + 1``."""
    words = philox((block + 1, stream, key.step, 1), (key.seed & _MASK, tensor))
    return sum(word << (64 * i) for i, word in enumerate(words))


def sign(key: Key, tensor: int, stream: int, row: int, col: int, width: int) -> int:
    blocks = -(-width // 256)
    value = bits(key, tensor, stream, row * blocks + col // 256)
    return 2 * ((value >> (col % 256)) & 1) - 1


def code(key: Key, tensor: int, stream: int, row: int, col: int, width: int) -> int:
    """The 16 bits that one element of a matrix of normals or uniforms is made from."""
    blocks = -(-16 * width // 256)
    value = bits(key, tensor, stream, row * blocks + col // 16)
    return (value >> (16 * (col % 16))) & 0xFFFF


def normal_levels() -> np.ndarray:
    """(65536,) float64: the normal quantiles of equally probable levels, over their standard deviation."""
    raw = np.array([NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(65536)])
    levels: np.ndarray = raw / np.sqrt(np.mean(raw**2))
    return levels


# ----------------------------------------------------------------------------- directions and updates


@functools.lru_cache(maxsize=512)
def direction(
    kind: str, key: Key, target: Target, slot: int, rank: int = 8, refresh: int = 50
) -> Tensor:
    """D_i of the example in ``slot``, (rows, cols) float64. It is cached: do not write to it."""
    rows, cols = target.rows, target.cols
    every = slice(0, rows)
    epoch = Key(key.seed, key.step // refresh)
    if kind == "centred":
        return centred(key, target)[0]
    if kind in ("shared", "aligned", "cone") or (
        kind in ("lowrank-shared", "activation-shared", "subspace") and target.vector
    ):
        return noise.normals(key, target.id, noise.DENSE, every, cols).double()
    if kind == "subspace":
        k = min(rank, rows, cols)
        z = noise.normals(key, target.id, noise.LEFT, slice(0, k), k).double()
        p = dealt(epoch, target, noise.SPAN, rows, k)
        q = dealt(epoch, target, noise.BASIS, cols, k)
        return math.sqrt(rows * cols) / k * p @ z @ q.T
    if kind == "rank-signs" and not target.vector:
        places = slice(slot * rank, (slot + 1) * rank)
        r, s = (
            noise.signs(key, target.id, stream, places, width).double()
            for stream, width in ((noise.ROW, rows), (noise.COLUMN, cols))
        )
        return r.T @ s / math.sqrt(rank)
    low = torch.zeros(rows, cols, dtype=torch.float64)
    if (kind.startswith("lowrank") or kind == "activation-shared") and not target.vector:
        a = noise.signs(key, target.id, noise.LEFT, slice(0, rank), rows).double()
        v = noise.signs(epoch, target.id, noise.SPAN, slice(0, rank), cols).double()
        low = a.T @ v / math.sqrt(rank)
    if kind in ("lowrank-shared", "activation-shared"):
        return low
    first = slot * rank if kind == "rank-signs" else slot
    one = slice(first, first + 1)
    d = noise.signs(key, target.id, noise.ROW, one, rows)[0].double()[:, None].expand(rows, cols)
    if not target.vector and kind != "lowrank-strict":
        d = d * noise.signs(key, target.id, noise.COLUMN, one, cols)[0].double()
    of_rank = kind in ("lowrank", "lowrank-strict")
    if of_rank and not target.vector:
        d = d * low
    if kind == "rademacher":
        d = d * noise.signs(key, target.id, noise.DENSE, every, cols).double()
    if kind == "gaussian" or (of_rank and target.vector):
        d = d * noise.normals(key, target.id, noise.DENSE, every, cols).double()
    return d.clone()


def dealt(key: Key, target: Target, stream: int, size: int, k: int) -> Tensor:
    """(size, k) float64 with one entry in each row and orthonormal columns."""
    matrix = torch.zeros(size, k, dtype=torch.float64)
    signs = noise.signs(key, target.id, noise.CHOICE + stream, slice(0, 1), size)[0]
    for place, row in enumerate(noise.permutation(key, target.id, stream, size).tolist()):
        matrix[row, place % k] = signs[row].double()
    return matrix / matrix.norm(dim=0)


def centred(key: Key, target: Target) -> tuple[Tensor, Tensor]:
    """ZO-AdaMU's (m, v) of a step, (rows, cols) float64, from more past steps than fp32 can resolve."""
    every, m = slice(0, target.rows), torch.zeros(target.rows, target.cols, dtype=torch.float64)
    v = m
    for step in range(max(0, key.step - 15), key.step + 1):
        then = Key(key.seed, step)
        z1, z2 = (
            noise.normals(then, target.id, stream, every, target.cols).double() * math.sqrt(0.5)
            for stream in (noise.DENSE, noise.CENTRE)
        )
        z2 = z2 + m
        m, v = 0.9 * z1 + 0.1 * z2, 0.9 * z1**2 + 0.1 * z2**2
    return m, v


def masked(
    store: WeightStore, trainable: Trainable, key: Key, slot: int, weights: Tensor
) -> Tensor:
    """D_i as the mask shapes it, (rows, cols) float64; ``weights``: as the forward reads them."""
    directions = store.directions
    d = direction(directions.name, key, trainable.target, slot, directions.rank, directions.refresh)
    if directions.name in ("aligned", "cone") and store.echo:
        d = sum(
            w * direction("shared", Key(key.seed, key.step - back), trainable.target, 0)
            for back, w in enumerate(store.echo)
            if w
        )
    if directions.name == "aligned-signs" and store.echo:  # D_i + b_i sum_j a_j D_j
        leans, a = np.array(store.echo).reshape(2, -1)
        last = Key(key.seed, key.step - 1)
        g = [x * direction("signs", last, trainable.target, j) for j, x in enumerate(a)]
        d = d + leans[slot] * torch.stack(g).sum(0)
    if trainable.basis is not None:  # A V^T
        a = noise.signs(
            key, trainable.target.id, noise.LEFT, slice(0, directions.rank), trainable.target.rows
        )
        d = a[: len(trainable.basis)].T.double() @ trainable.basis.double()
    if trainable.guides is not None:  # r_i v_i^T of the step that was probed last
        r = noise.signs(
            key, trainable.target.id, noise.ROW, slice(slot, slot + 1), trainable.target.rows
        )
        d = r[0].double()[:, None] * trainable.guides[slot].double()
    block = re.search(r"[.]([0-9]+)[.]", trainable.target.name)
    if store.mask.name == "sparse" and trainable.threshold is not None:
        d = d * (weights.abs() < trainable.threshold)
    if store.mask.name == "layers" and block is not None:
        d = d * (int(block[1]) in store.mask.chosen(key))
    if store.mask.name in ("hessian", "hessian-block"):
        d = d / trainable.state["hessian"].double().sqrt()
    return d * store.scales.get(trainable.target.name, 1.0)


def probed_guides(store: WeightStore) -> dict[str, Tensor]:
    """The guides of the last forward, as ``take_guides`` gives them."""
    trainables = (
        (name, trainable.guides) for name, trainable in store.trainables.items() if trainable.guides
    )
    guides = {
        name: torch.stack([by_slot[i] for i in sorted(by_slot)]) for name, by_slot in trainables
    }
    return guides | {n: r.basis for n, r in store.trainables.items() if r.basis is not None}


def update(store: WeightStore, recipe: Recipe, name: str, used: Sequence[Tensor]) -> Tensor:
    """-sum_i c_i D_i of a trained tensor, (rows, cols) float64; example i moves the rows in ``used[i]`` only."""
    target = store.trainables[name].target
    total = torch.zeros(target.rows, target.cols, dtype=torch.float64)
    for slot, c in enumerate(recipe.coefficients.tolist()):
        d = masked(
            store,
            store.trainables[name],
            Key(store.seed, recipe.step),
            slot,
            seen_values(store.trainables[name]),
        )
        total[used[slot]] -= c * d[used[slot]]
    return total


def seen_values(trainable: Trainable) -> Tensor:
    """A trained tensor as the forward reads it, (rows, cols) float64."""
    return trainable.layout.expand(
        slice(0, trainable.target.rows), torch.empty(trainable.layout.shape)
    ).double()


# ----------------------------------------------------------------------------- explicit weights


def explicit_weights(
    model: Model, key: Key | None = None, slot: int = 0, sigma: float = 0.0
) -> dict[str, Tensor]:
    """theta + sigma*D_i as plain float64 weights by parameter name; edgezo's (out, in) orientation."""
    store = model.store

    def moved(trainable: Trainable, weights: Tensor) -> Tensor:
        values = weights.double()
        if key is not None:
            values = values + sigma * masked(store, trainable, key, slot, values)
        return values

    weights = {name: values.double() for name, values in store.vectors.items()}
    for name, trainable in store.trainables.items():
        if trainable.target.vector and "#" not in name:
            weights[name] = moved(trainable, trainable.layout.values)[:, 0]
    for name, layout in store.layouts.items():
        # The forward reads the high part of a weight with a low-order plane.
        w = layout.expand(slice(0, layout.shape[0]), torch.empty(layout.shape)).double()
        matrix, gain, factor = (
            store.trainables.get(name + suffix) for suffix in ("", "#gain", "#lowrank")
        )
        if matrix is not None:
            w = moved(matrix, w)
        if gain is not None:
            w = w * (1 + moved(gain, gain.layout.values))
        if factor is not None:
            basis = store.basis(name, layout.shape[1]).double()
            w = w + moved(factor, factor.layout.values) @ basis
        weights[name] = w
    return weights


class Twin:
    """transformers' module in float64, whose weights can be replaced. It never sees classes of edgezo."""

    def __init__(self, module: Any, *, kind: str, label_ids: Sequence[int]):
        self.module: Any = module.double().eval()
        self.kind, self.label_ids = kind, torch.tensor(label_ids)
        self.head: Any = self.module.get_output_embeddings()
        config: Any = self.module.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, values in weights.items():
            parameter = self.module.get_parameter(name)
            owner = self.module.get_submodule(name.rpartition(".")[0])
            values = values.T if isinstance(owner, Conv1D) and values.dim() == 2 else values
            assert parameter.shape == values.shape, name
            parameter.copy_(values)

    def logits(self, row: Row) -> Tensor:
        """Logits at the p scored positions of one row, (p, vocab), as the module gives them."""
        logits: Tensor = self.module(input_ids=torch.tensor(row.ids)[None]).logits[0]
        return logits[list(row.score_at)]

    def features(self, row: Row) -> tuple[Tensor, Tensor]:
        """Input and output of the output embedding at the p scored positions: (p, hidden), (p, vocab) uncapped."""
        seen: list[tuple[Tensor, Tensor]] = []
        hook = self.head.register_forward_hook(lambda _, x, y: seen.append((x[0][0], y[0])))
        try:
            self.module(input_ids=torch.tensor(row.ids)[None])
        finally:
            hook.remove()
        hidden, logits = seen[0]
        return hidden[list(row.score_at)], logits[list(row.score_at)]

    def cap(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def loss(
        self, example: Example, change: Tensor | None = None, basis: Tensor | None = None
    ) -> Tensor:
        """Loss of one example. ``change`` is added to the head H as edgezo's exact head does: H + change @ basis."""
        rows = []
        for row in example.whole_rows:
            if change is None:
                rows.append(self.logits(row))
                if self.kind == "label":
                    rows[-1] = rows[-1][:, self.label_ids]
                continue
            hidden, logits = self.features(row)
            if self.kind == "label":
                logits = logits[:, self.label_ids]
            hidden = hidden if basis is None else hidden @ basis.T
            rows.append(self.cap(logits + hidden @ change.T))
        if self.kind == "label":
            return F.cross_entropy(rows[0], torch.tensor([example.label]))
        nll = [
            F.cross_entropy(logits, torch.tensor(row.score_ids))
            for logits, row in zip(rows, example.whole_rows, strict=True)
        ]
        if self.kind == "choice":
            return F.cross_entropy(-torch.stack(nll), torch.tensor(example.label))
        (only,) = nll
        return only

    @torch.no_grad()
    def losses(self, model: Model, examples: Sequence[Example], key: Key, sigma: float) -> Tensor:
        """(2, B) float64: the loss of every example with its copy of the weights, + side, then - side."""
        losses = torch.empty(2, len(examples), dtype=torch.float64)
        for slot, example in enumerate(examples):
            for side, sign in enumerate((1, -1)):
                self.load(explicit_weights(model, key, slot, sign * sigma))
                losses[side, slot] = self.loss(example)
        return losses

    def rows_used(self, example: Example) -> dict[str, Tensor]:
        """Rows of each 2-D parameter that an example's loss can depend on: look-ups, and scored logits."""
        names = {id(p): n for n, p in self.module.named_parameters()}
        used: dict[str, set[int]] = {}
        with _lookups() as seen, torch.no_grad():
            for row in example.whole_rows:
                self.logits(row)
        for weight, ids in seen:
            used.setdefault(names[id(weight)], set()).update(ids.reshape(-1).tolist())
        vocab = self.head.weight.shape[0]
        read = self.label_ids.tolist() if self.kind == "label" else range(vocab)
        for name in (names[id(self.head.weight)],):
            used.setdefault(name, set()).update(read)
        return {name: torch.tensor(sorted(rows)) for name, rows in used.items()}


@contextmanager
def _lookups() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Every (weight, ids) that ``torch.nn.functional.embedding`` is called with inside."""
    seen: list[tuple[Tensor, Tensor]] = []
    plain = F.embedding

    def recording(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((weight, input))
        return plain(input, weight, *args, **kwargs)

    with mock.patch.object(F, "embedding", recording):
        yield seen


# ----------------------------------------------------------------------------- published steps


def published_step(
    cfg: Any,
    step: int,
    theta: Tensor,
    directions: Sequence[Tensor],
    losses: np.ndarray,
    state: dict[str, Any],
) -> Tensor:
    """One step of ``cfg.estimator`` on one tensor, as its paper has it, in float64. Returns the new theta.

    ``directions``: the D_i of the probe, zero where example i does not move the tensor; ``losses``: (S, B). ``state``
    is that of this tensor, and is changed. Written from the papers' formulas, not from edgezo's tables.
    """
    lr, sigma, b = cfg.step, cfg.sigma, losses.shape[1]
    losses = losses.astype(np.float64)
    name = cfg.estimator
    if name == "bszo":  # a Kalman filter with a prior of N(0, I), by matrices
        k = len(directions)
        mean, covariance = np.zeros(k), np.eye(k)
        noise = state.get("noise", 1.0)
        for j, y in enumerate((losses[1:].mean(1) - losses[0].mean()) / sigma):
            h = np.eye(k)[j]
            residual = y - h @ mean
            noise = 0.9 * noise + 0.1 * residual**2
            gain = covariance @ h / (h @ covariance @ h + noise)
            mean, covariance = mean + gain * residual, covariance - np.outer(gain, h @ covariance)
        state["noise"] = noise
        return theta - lr / k * _total([m * d for m, d in zip(mean, directions, strict=True)])
    if name == "fzoo":
        base, tried = losses[0].mean(), losses[1:].mean(1)
        # theta -= lr/(eps N std) sum_j (l_j - l_0) u_j, with lr = kappa eps^2 N
        rate = lr * sigma**2 * len(tried) / (sigma * len(tried) * tried.std())
        parts = [(x - base) * d for x, d in zip(tried, directions, strict=True)]
        return theta - rate * _total(parts)
    if name == "grzo-one-sided":
        a = (losses[0] - losses[0].mean()) / losses[0].std()
        return theta - lr * sigma * _total([x * d for x, d in zip(a, directions, strict=True)])
    if name == "grzo-uniform":
        return theta - lr * sigma * _total(list(directions))
    delta = losses[0] - losses[1]
    if cfg.credit == "centred":  # EGGROLL, QES: z-scored fitness; sum_i a_i A_i B_i^T/sqrt(r)
        a = (delta - delta.mean()) / delta.std()
        return theta - lr * sigma * _total([x * d for x, d in zip(a, directions, strict=True)])
    if name == "vote":  # codes move by a grid step, which the caller knows; others by sigma
        votes = _total([np.sign(x) * d for x, d in zip(delta, directions, strict=True)])
        needed = NormalDist().inv_cdf(1 - lr / 2) * math.sqrt(b)
        return theta - state.get("unit", sigma) * torch.sign(votes) * (votes.abs() >= needed)
    weighted = [x * d for x, d in zip(delta, directions, strict=True)]
    if (
        cfg.credit == "group"
    ):  # GRZO and the drop-ins: 1/(2 sigma B) sum a_i D_i, lr = 2 kappa sigma^2 B
        rate = 2 * lr * sigma**2 * b
        change = rate / (2 * sigma * b) * _total(weighted) / delta.std()
        if cfg.rule == "replayed-momentum":
            change = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * change
        return theta - change
    g = _total(weighted) / (2 * sigma * b)  # of MeZO and what is built on it; grzo-raw
    if name == "meazo":
        state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * (float(delta.mean()) / (2 * sigma)) ** 2
        return theta - lr * g / (math.sqrt(state["v"] / (1 - 0.999 ** (step + 1))) + 1e-8)
    if name == "adamezo":  # equation of the paper's algorithm 1, 16 terms back
        past = state["g"] = [g, *state.get("g", [])][:17]
        m, v = (
            (1 - beta) * sum(beta**k * then**power for k, then in enumerate(past))
            for beta, power in ((0.9, 1), (0.999, 2))
        )
        return theta - lr * m / torch.sqrt(v + 1e-8)
    if name in ("mezo-adam", "replayed-adam"):
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
        state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g**2
        m, v = state["m"] / (1 - 0.9 ** (step + 1)), state["v"] / (1 - 0.999 ** (step + 1))
        return theta - lr * m / (torch.sqrt(v) + 1e-8)
    if name == "zo-adamu":
        return theta - lr * g / torch.sqrt(state["moment"] + 1e-8)
    if name == "qzo":
        slope = abs(float(delta.mean()) / (2 * sigma))
        return torch.clamp(theta - lr * g * min(1.0, 100 / max(slope, 1e-30)), min=-1.0)
    return theta - lr * g


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
