"""ZO Fine-tuner (arXiv 2510.00419): how long the noise of each block is at every step, told by small networks.

    sigma_b = |w . tanh(W x_b + c) + e|     x_b = (mean theta_b, var theta_b, L+, L-, sigma_b), the last three of the
                                            step before; at the first step 0, 0 and 1;
                                            L- is L+ where a step has one side
    nu      = sqrt(sum_b d_b / sum_b d_b sigma_b^2)
    D_b    <- s_b D_b, s_b = nu sigma_b     in the probe and in the update alike, so E|D|^2 stays what it was

A block is a parameter's name, as published, or a layer's (``model.layers.3``), whose tensors then share one network
and one sigma. Networks go by name, so a finetuner serves every checkpoint derived from the model that it was trained
on, and whatever of a block is trained: its weight, low-rank factors or gains. Mean and variance are the weight's
either way: of what is frozen taken once, of what is trained at every step.

What a step was told is in its record: nu and sigma of every trained tensor. So a replay needs no finetuner, and a
resume goes on from the last record.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from edgezo.data.dataset import Dataset
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_write
from edgezo.machine.limits import tiles
from edgezo.run.journal import StepRecord
from edgezo.run.pickled import read_networks
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Trainable

FEATURES, HIDDEN = 5, 64  # as published
LARGEST, LEAST = 1e6, 1e-6  # of a sigma, and of their root mean square before it counts as 0
_PIECE_BYTES = 16  # of an element: pieces a quarter of a tile, because sums take copies
_PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")  # of a network in the file

Moments = tuple[float, float, int]  # sum, sum of squares, count


@dataclass(frozen=True, eq=False)
class Finetuner:
    """Networks of n blocks, stacked: W (n, h, 5), c (n, h), w (n, h), e (n), float64."""

    blocks: tuple[str, ...]
    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    sha256: str = ""  # of the file

    def sigma(self, features: Tensor) -> Tensor:
        """(n, 5) float64 features, one row a block -> (n,) standard deviations."""
        w1, c, w2, e = self.weights
        hidden = torch.tanh((w1 * features[:, None, :]).sum(-1) + c)
        return ((w2 * hidden).sum(-1) + e).abs()

    def block_of(self, tensor: str) -> int | None:
        """Which network is for a trained tensor: that of its weight's name, else of the nearest module around it."""
        name = tensor.partition("#")[0]
        while name:
            if name in self._places:
                return self._places[name]
            name = name.rpartition(".")[0]
        return None

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.blocks)}

    @staticmethod
    def plain(blocks: Sequence[str], seed: int) -> Finetuner:
        """Networks before training: drawn first layers, and sigma = 1 whatever the features are."""
        generator = torch.Generator().manual_seed(seed)
        n, bound = len(blocks), FEATURES**-0.5

        def draw(*shape: int) -> Tensor:
            wide = torch.rand(*shape, generator=generator, dtype=torch.float64)
            return wide.mul_(2 * bound).sub_(bound)

        drawn = draw(n, HIDDEN, FEATURES), draw(n, HIDDEN)
        rest = torch.zeros(n, HIDDEN, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        return Finetuner(tuple(blocks), (*drawn, *rest))

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """As safetensors: ``BLOCK.0.weight`` and so on, the names of the published networks' own parts."""
        tensors = {}
        for place, block in enumerate(self.blocks):
            w1, c, w2, e = (w[place].detach().float().clone() for w in self.weights)
            parts = zip(_PARTS, (w1, c, w2[None], e[None]), strict=True)
            tensors.update({f"{block}.{part}": values for part, values in parts})
        # One entry: several would be written in any order.
        told = json.dumps(dict(about), sort_keys=True)
        atomic_write(path, serialise(tensors, {"edgezo-finetuner": told}))


def load_finetuner(path: Path) -> Finetuner:
    """Read what ``Finetuner.save`` wrote. Raises EdgezoError for anything else."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise EdgezoError(
            f"the finetuner {path} cannot be read ({problem.strerror}).\nGive another --finetuner."
        ) from problem
    if data[:2] == b"PK":
        raise UsageError(
            f"{path} holds pickled modules, as finetuners are published.\n"
            f"Convert it first: edgezo convert-finetuner {path} {path.with_suffix('.safetensors').name}"
        )
    try:
        tensors = parse(data)
    except (SafetensorError, ValueError) as problem:
        raise EdgezoError(
            f"{path} is no finetuner: it cannot be read as safetensors ({problem}).\n"
            "edgezo meta-train and edgezo convert-finetuner make such files."
        ) from problem
    networks: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        block, first, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", name, "")
        networks.setdefault(block, {})[f"{first}.{kind}"] = values.float().numpy()
    return _stacked(networks, path, hashlib.sha256(data).hexdigest())


def convert_finetuner(source: Path, out: Path) -> Finetuner:
    """A published file of pickled networks as safetensors. Nothing of it is run; raises EdgezoError."""
    networks = {}
    for name, layers in read_networks(source).items():
        kinds = ["weight" in layer for layer in layers]
        if kinds != [True, False, True]:
            raise EdgezoError(f"{source}: the network of {name} is not Linear, Tanh, Linear.")
        held = {f"{at}.{kind}": values for at in (0, 2) for kind, values in layers[at].items()}
        networks[name] = held
    found = _stacked(networks, source, "")
    found.save(out, {"source": source.name})
    return found


def _stacked(
    networks: Mapping[str, Mapping[str, np.ndarray]], path: Path, sha256: str
) -> Finetuner:
    """One finetuner of networks of one size. Raises EdgezoError for other shapes and values."""
    if not networks:
        raise EdgezoError(f"{path} is no finetuner: it holds no network.")
    blocks = tuple(sorted(networks))  # a safetensors file is read in any order
    first = next(iter(networks.values()), {}).get(_PARTS[0], np.empty((0, 0)))
    hidden = first.shape[0]
    shapes = dict(zip(_PARTS, ((hidden, FEATURES), (hidden,), (1, hidden), (1,)), strict=True))
    for block, parts in networks.items():
        if {part: values.shape for part, values in parts.items()} != shapes or not hidden:
            found = ", ".join(f"{part} {values.shape}" for part, values in sorted(parts.items()))
            raise EdgezoError(
                f"{path} is no finetuner: the network of {block or 'no name'} has {found}, where "
                f"{FEATURES} features, {hidden or HIDDEN} hidden values and one result belong."
            )
        if not all(np.isfinite(values).all() for values in parts.values()):
            raise EdgezoError(f"{path}: the network of {block} holds values that are not finite.")
    stacks = [
        torch.from_numpy(np.stack([networks[b][part] for b in blocks]).astype(np.float64))
        for part in _PARTS
    ]
    return Finetuner(blocks, (stacks[0], stacks[1], stacks[2][:, 0], stacks[3][:, 0]), sha256)


# ---------------------------------------------------------------------------------------------
# At work on a model


@dataclass
class Tuner:
    """A finetuner at work on a store: what each step is told. Tensors go by name, as in a step's record."""

    finetuner: Finetuner
    store: WeightStore
    sizes: (
        np.ndarray
    )  # (n,) d_b of the trained tensors: the values that an example's direction moves
    names: list[str] = field(init=False)
    places: list[int] = field(init=False)  # the block of each
    frozen: dict[int, Moments] = field(
        init=False
    )  # by block, of weights that something beside is trained of

    def __post_init__(self) -> None:
        self.names = sorted(self.store.trainables)
        found = [self.finetuner.block_of(name) for name in self.names]
        self.places = [place for place in found if place is not None]
        if missing := [n for n, place in zip(self.names, found, strict=True) if place is None]:
            raise EdgezoError(
                f"the finetuner has {len(self.finetuner.blocks)} blocks, but none for {len(missing)} of "
                f"the {len(found)} trained tensors, the first is {missing[0]}.\n"
                "It belongs to another architecture; edgezo meta-train makes one for this model."
            )
        self.frozen = {}
        for weight in sorted({n.partition("#")[0] for n in self.names if "#" in n}):
            place = self.finetuner.block_of(weight)
            assert place is not None
            _add(self.frozen, place, _frozen_moments(self.store, weight))
        if self.store.residency is not None:
            self.store.residency.release()

    @staticmethod
    def of(finetuner: Finetuner, store: WeightStore, dataset: Dataset) -> Tuner:
        """For training on ``dataset``, whose examples say how many rows of a table one of them moves."""
        tokens = [sum(len(row.ids) for row in example.rows) for example in dataset.train]
        mean = sum(tokens) / max(1, len(tokens))
        rows = [store.trainables[name] for name in sorted(store.trainables)]
        return Tuner(finetuner, store, np.array([_size(row, mean) for row in rows]))

    def features(self, previous: StepRecord | None) -> Tensor:
        """(blocks, 5) float64 for the step after ``previous``; zeros for blocks of which nothing is trained."""
        found = torch.zeros(len(self.finetuner.blocks), FEATURES, dtype=torch.float64)
        moments = dict(self.frozen)
        for place, name in zip(self.places, self.names, strict=True):
            if "#" not in name:
                _add(moments, place, _moments(self.store.trainables[name]))
        for place, (total, square, count) in moments.items():
            mean = total / count
            found[place, 0] = mean
            found[place, 1] = max(0.0, square - total * mean) / max(1, count - 1)
        sigma = torch.ones(len(self.names), dtype=torch.float64)
        if previous is not None:
            plus, minus = previous.losses[0], previous.losses[min(1, len(previous.losses) - 1)]
            found[:, 2], found[:, 3] = _finite_mean(plus), _finite_mean(minus)
            if previous.scales is not None:
                sigma = torch.from_numpy(previous.scales[1:].astype(np.float64))
        found[self.places, 4] = sigma
        return found

    def tell(self, previous: StepRecord | None, features: Tensor | None = None) -> np.ndarray:
        """What the step after ``previous`` is told, (1 + n,) fp32: nu, and sigma of each trained tensor.

        The store's directions are from now on as long as that.
        """
        features = self.features(previous) if features is None else features
        sigma = self.finetuner.sigma(features).detach().numpy()[self.places]
        sigma = np.minimum(sigma, LARGEST).astype(np.float32)
        told = np.concatenate(([self.normaliser(sigma)], sigma)).astype(np.float32)
        self.store.scales = dict(zip(self.names, (told[0] * told[1:]).tolist(), strict=True))
        return told

    def normaliser(self, sigma: np.ndarray) -> float:
        """nu; 1 where every sigma is about 0, for then there is nothing to be probed along."""
        squares = math.fsum(d * float(s) ** 2 for d, s in zip(self.sizes, sigma, strict=True))
        total = math.fsum(self.sizes)
        return math.sqrt(total / squares) if squares > LEAST**2 * total else 1.0


def _size(row: Trainable, tokens: float) -> float:
    rows = float(row.target.rows)
    if row.fixed_rows is not None:
        rows = float(len(row.fixed_rows))
    elif row.touched_offset is not None:
        rows = min(rows, tokens)
    return rows * row.target.cols


def _finite_mean(losses: np.ndarray) -> float:
    finite = losses[np.isfinite(losses)]
    return float(finite.astype(np.float64).mean()) if finite.size else 0.0


def _add(moments: dict[int, Moments], place: int, more: Moments) -> None:
    held = moments.get(place, (0.0, 0.0, 0))
    moments[place] = held[0] + more[0], held[1] + more[1], held[2] + more[2]


def _moments(row: Trainable) -> Moments:
    """Of a trained tensor as it is now."""
    rows, cols = row.layout.shape
    found = (0.0, 0.0, 0)
    for part in tiles(rows, cols, _PIECE_BYTES):
        found = _of_piece(found, row.layout.read(part))
    return found


def _frozen_moments(store: WeightStore, weight: str) -> Moments:
    """Of a frozen matrix, wherever it is, as the forward reads it."""
    if store.residency is not None:
        store.residency.bind_owner(weight)
    layout = store.layouts[weight]
    rows, cols = layout.shape
    found = (0.0, 0.0, 0)
    for part in tiles(rows, cols, _PIECE_BYTES):
        piece = torch.empty(part.stop - part.start, cols, device=store.device)
        found = _of_piece(found, layout.expand(part, piece))
    return found


def _of_piece(before: Moments, piece: Tensor) -> Moments:
    total = float(piece.sum(dtype=torch.float64))
    square = float(piece.square().sum(dtype=torch.float64))
    return before[0] + total, before[1] + square, before[2] + piece.numel()
