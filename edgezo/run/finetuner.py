"""ZO Fine-tuner (arXiv 2510.00419): small networks that scale the noise of each block at every step.

    sigma_b = |w . tanh(W x_b + c) + e|     x_b = (mean theta_b, var theta_b, L+, L-, sigma_b). The last three are
                                            those of the step before; 0, 0 and 1 at the first step.
                                            L- is L+ where a step has one side.
    nu      = sqrt(sum_b d_b / sum_b d_b sigma_b^2)
    D_b    <- s_b D_b, s_b = nu sigma_b     in the perturbation and in the update; nu keeps E|D|^2 as it was

A block is a parameter's name, as published, or a layer's (``model.layers.3``), whose tensors then share one network
and one sigma. Networks go by name, so a finetuner serves every checkpoint derived from the model that it was trained
on, whatever is trained of a block: its weight, low-rank factors or gains. Mean and variance are always those of the
weight: computed once if it is frozen, at every step if it is trained.

nu and the sigma of every trained tensor stand in the record of a step. So a replay needs no finetuner, and a
resume goes on from the last record.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgezo.data.dataset import Dataset
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_path
from edgezo.machine.foreign import reading
from edgezo.machine.limits import tiles
from edgezo.machine.open_files import open_to_read
from edgezo.machine.ownership import check_new_file
from edgezo.run.journal_record import StepRecord
from edgezo.run.pickled import read_networks
from edgezo.weights.saved import Saved, write_saved
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Trainable
from edgezo.weights.verified import open_saved

FEATURES, HIDDEN = 5, 64  # as published
LARGEST_SIGMA = 1e6
LEAST_SIGMA = 1e-6  # a smaller root mean square of all sigmas counts as 0
_MOMENTS_PIECE_BYTES = (
    16  # counted for an element, so that a piece is a quarter of a tile: sums take copies
)
_ABOUT = "edgezo-finetuner"  # the metadata of a file: what it was made from, as JSON
_PARTS = ("0.weight", "0.bias", "2.weight", "2.bias")  # names of a network's tensors in the file

Moments = tuple[float, float, int]  # sum, sum of squares, count


@dataclass(frozen=True, eq=False)
class Finetuner:
    """The networks of n blocks, stacked: W (n, h, 5), c (n, h), w (n, h), e (n), float64."""

    blocks: tuple[str, ...]
    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    sha256: str = ""  # of the file

    def sigma(self, features: Tensor) -> Tensor:
        """(n, 5) float64 features, one row a block -> (n,) standard deviations."""
        w1, c, w2, e = self.weights
        hidden = torch.tanh((w1 * features[:, None, :]).sum(-1) + c)
        return ((w2 * hidden).sum(-1) + e).abs()

    def block_of(self, tensor: str) -> int | None:
        """The number of a trained tensor's network: that of its weight's name, or of the nearest module around it."""
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
        """Networks before training: random first layers, and sigma = 1 whatever the features are."""
        generator = torch.Generator().manual_seed(seed)
        n, bound = len(blocks), FEATURES**-0.5

        def draw(*shape: int) -> Tensor:
            wide = torch.rand(*shape, generator=generator, dtype=torch.float64)
            return wide.mul_(2 * bound).sub_(bound)

        drawn = draw(n, HIDDEN, FEATURES), draw(n, HIDDEN)
        rest = torch.zeros(n, HIDDEN, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        return Finetuner(tuple(blocks), (*drawn, *rest))

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """Write safetensors with the names of published networks: ``BLOCK.0.weight`` and so on."""
        tensors = {}
        for place, block in enumerate(self.blocks):
            w1, c, w2, e = (w[place].detach().float().clone() for w in self.weights)
            parts = zip(_PARTS, (w1, c, w2[None], e[None]), strict=True)
            tensors.update({f"{block}.{part}": values for part, values in parts})
        saved = [Saved.of(name, values) for name, values in tensors.items()]
        with atomic_path(path, lock=True) as temporary:
            write_saved(temporary, saved, {_ABOUT: json.dumps(dict(about), sort_keys=True)}, run="")


def load_finetuner(path: Path) -> Finetuner:
    """Read a file that ``Finetuner.save`` wrote. Raises EdgezoError, or UsageError for a pickled one."""
    way_out = (
        "Give another --finetuner: edgezo meta-train and edgezo convert-finetuner make such files."
    )
    with reading(f"The finetuner {path}", way_out):
        with os.fdopen(open_to_read(path), "rb") as stream:
            is_zip = stream.read(2) == b"PK"
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if is_zip:
        raise UsageError(
            f"{path} holds pickled modules, as finetuners are published.\n"
            f"Convert it first: edgezo convert-finetuner {path} {path.with_suffix('.safetensors').name}"
        )
    networks: dict[str, dict[str, np.ndarray]] = {}
    with open_saved(path, {_ABOUT}, None, way_out) as file:
        tensors = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in file.places.items()}
        file.read(tensors)
        for name, values in tensors.items():
            block, first, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", name, "")
            networks.setdefault(block, {})[f"{first}.{kind}"] = values.float().numpy()
    return _stacked(networks, path, sha256)


def convert_finetuner(source: Path, out: Path) -> Finetuner:
    """Convert a published file of pickled networks to safetensors. Nothing of it is run.

    Raises UsageError where ``out`` exists already, EdgezoError for a file that is no finetuner.
    """
    check_new_file(out)
    networks = {}
    for name, layers in read_networks(source).items():
        kinds = ["weight" in layer for layer in layers]
        if kinds != [True, False, True]:
            raise EdgezoError(f"{source}: the network of {name} is not Linear, Tanh, Linear.")
        networks[name] = {
            f"{at}.{kind}": values for at in (0, 2) for kind, values in layers[at].items()
        }
    finetuner = _stacked(networks, source, "")
    finetuner.save(out, {"source": source.name})
    return finetuner


def _stacked(
    networks: Mapping[str, Mapping[str, np.ndarray]], path: Path, sha256: str
) -> Finetuner:
    """A finetuner from networks of one size. Raises EdgezoError for other shapes, or values that are not finite."""
    if not networks:
        raise EdgezoError(f"{path} is no finetuner: it holds no network.")
    blocks = tuple(sorted(networks))  # a safetensors file is read in any order
    first = next(iter(networks.values()), {}).get(_PARTS[0], np.empty((0, 0)))
    hidden = first.shape[0]
    shapes = dict(zip(_PARTS, ((hidden, FEATURES), (hidden,), (1, hidden), (1,)), strict=True))
    for block, parts in networks.items():
        if {part: values.shape for part, values in parts.items()} != shapes or not hidden:
            shown = ", ".join(f"{part} {values.shape}" for part, values in sorted(parts.items()))
            raise EdgezoError(
                f"{path} is no finetuner: the network of {block or 'no name'} has {shown}, where "
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
# Scales for a model in training


@dataclass
class Tuner:
    """Scales the directions of a store by a finetuner, step by step. Tensors go by name, as in a step's record."""

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
        places = [self.finetuner.block_of(name) for name in self.names]
        self.places = [place for place in places if place is not None]
        if missing := [n for n, place in zip(self.names, places, strict=True) if place is None]:
            raise EdgezoError(
                f"the finetuner has {len(self.finetuner.blocks)} blocks, but none for {len(missing)} of "
                f"the {len(places)} trained tensors; the first is {missing[0]}.\n"
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
        """A tuner for training on ``dataset``; the lengths of its examples say how many rows of a table one moves."""
        tokens = [example.tokens for example in dataset.train]
        mean = sum(tokens) / max(1, len(tokens))
        trainables = [store.trainables[name] for name in sorted(store.trainables)]
        return Tuner(finetuner, store, np.array([_size(t, mean) for t in trainables]))

    def features(self, previous: StepRecord | None) -> Tensor:
        """(blocks, 5) float64 for the step after ``previous``; zeros for blocks of which nothing is trained."""
        features = torch.zeros(len(self.finetuner.blocks), FEATURES, dtype=torch.float64)
        moments = dict(self.frozen)
        for place, name in zip(self.places, self.names, strict=True):
            if "#" not in name:
                _add(moments, place, _moments(self.store.trainables[name]))
        for place, (total, square, count) in moments.items():
            mean = total / count
            features[place, 0] = mean
            features[place, 1] = max(0.0, square - total * mean) / max(1, count - 1)
        sigma = torch.ones(len(self.names), dtype=torch.float64)
        if previous is not None:
            plus, minus = previous.losses[0], previous.losses[min(1, len(previous.losses) - 1)]
            features[:, 2], features[:, 3] = _finite_mean(plus), _finite_mean(minus)
            if previous.scales is not None:
                sigma = torch.from_numpy(previous.scales[1:].astype(np.float64))
        features[self.places, 4] = sigma
        return features

    def scale_step(self, previous: StepRecord | None, features: Tensor | None = None) -> np.ndarray:
        """Scale the store's directions for the step after ``previous``.

        Returns (1 + n,) fp32 for its record: nu, and the sigma of each trained tensor.
        """
        features = self.features(previous) if features is None else features
        sigma = self.finetuner.sigma(features).detach().numpy()[self.places]
        sigma = np.minimum(sigma, LARGEST_SIGMA).astype(np.float32)
        scales = np.concatenate(([self.normaliser(sigma)], sigma)).astype(np.float32)
        self.store.scales = dict(zip(self.names, (scales[0] * scales[1:]).tolist(), strict=True))
        return scales

    def normaliser(self, sigma: np.ndarray) -> float:
        """nu; 1 where every sigma is about 0, because then no direction is perturbed at all."""
        squares = math.fsum(d * float(s) ** 2 for d, s in zip(self.sizes, sigma, strict=True))
        total = math.fsum(self.sizes)
        return math.sqrt(total / squares) if squares > LEAST_SIGMA**2 * total else 1.0


def _size(trainable: Trainable, tokens: float) -> float:
    """Values that the direction of an example of so many tokens moves."""
    rows = float(trainable.target.rows)
    if trainable.fixed_rows is not None:
        rows = float(len(trainable.fixed_rows))
    elif trainable.touched_offset is not None:
        rows = min(rows, tokens)
    return rows * trainable.target.cols


def _finite_mean(losses: np.ndarray) -> float:
    finite = losses[np.isfinite(losses)]
    return float(finite.astype(np.float64).mean()) if finite.size else 0.0


def _add(moments: dict[int, Moments], place: int, more: Moments) -> None:
    total, square, count = moments.get(place, (0.0, 0.0, 0))
    moments[place] = total + more[0], square + more[1], count + more[2]


def _moments(trainable: Trainable) -> Moments:
    """Sum, sum of squares and count of a trained tensor as it is now."""
    rows, cols = trainable.layout.shape
    moments = (0.0, 0.0, 0)
    for part in tiles(rows, cols, _MOMENTS_PIECE_BYTES):
        moments = _with_piece(moments, trainable.layout.read(part))
    return moments


def _frozen_moments(store: WeightStore, weight: str) -> Moments:
    """Sum, sum of squares and count of a frozen matrix, wherever it is, as a forward pass reads it."""
    if store.residency is not None:
        store.residency.bind_owner(weight)
    layout = store.layouts[weight]
    rows, cols = layout.shape
    moments = (0.0, 0.0, 0)
    for part in tiles(rows, cols, _MOMENTS_PIECE_BYTES):
        piece = torch.empty(part.stop - part.start, cols, device=store.device)
        moments = _with_piece(moments, layout.expand(part, piece))
    return moments


def _with_piece(before: Moments, piece: Tensor) -> Moments:
    total = float(piece.sum(dtype=torch.float64))
    square = float(piece.square().sum(dtype=torch.float64))
    return before[0] + total, before[1] + square, before[2] + piece.numel()
