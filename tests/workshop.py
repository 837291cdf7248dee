"""Cases that laws are tested on, in one table: to cover a new model family, direction or precision, add a case."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny_models
import torch
from torch import Tensor, nn

from edgezo.data.batches import Batch, Example, collate
from edgezo.data.trees import Row
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import open_model
from edgezo.network.model import Model
from edgezo.weights import layouts
from edgezo.weights.saved import load_trained, trained_tensors
from edgezo.zo.directions import DIRECTION_KINDS, Directions
from edgezo.zo.noise import Key, exact_grid
from edgezo.zo.recipe import Recipe

LABEL_IDS = (7, 31, 200)
MASK_ID = 3
KEY = Key(seed=11, step=5)
SIGMA = 0.01

# ----------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    family: str
    train: tuple[str, ...]
    directions: str = "signs"
    precision: str = "fp32"
    kind: str = "label"
    tied: bool | None = None
    rounding: str = "plane"
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        plain = Case("", ())
        rest = [
            f"{name}={getattr(self, name)}"
            for name in ("precision", "kind", "tied", "rounding")
            if getattr(self, name) != getattr(plain, name)
        ]
        changed = [f"{name}={value}" for name, value in self.changes]
        return "-".join([self.family, "+".join(self.train), self.directions, *rest, *changed])


def of(family: str, train: str, directions: str = "signs", **more: Any) -> Case:
    return Case(family, tuple(train.split("+")), directions, **more)


BESIDE = "lowrank+norms+scales"  # everything that can be trained beside frozen matrices
ALL = "full+lowrank+scales"  # and everything at once (full includes norms and biases)
FIRST = ("signs", "rademacher", "gaussian", "shared")
LATER = tuple(d for d in DIRECTION_KINDS if d not in FIRST)
WINDOW = (("sliding_window", 8),)
PART_WINDOW = (*WINDOW, ("use_sliding_window", True), ("max_window_layers", 1))

CASES: tuple[Case, ...] = (
    # Every family, all weights and everything that can be trained beside them.
    *(of(f, "full", d) for f in tiny_models.FAMILIES for d in ("signs", "shared")),
    *(of(f, BESIDE, "gaussian") for f in tiny_models.FAMILIES),
    # Every choice of what is trained, along every direction.
    *(
        of("llama", train, d)
        for train in ("lowrank", "norms", "scales", "lowrank+norms", ALL)
        for d in FIRST
    ),
    *(of("llama", "full", d) for d in DIRECTION_KINDS if d not in ("signs", "shared")),
    *(of("gpt2", BESIDE, d) for d in LATER),
    *(of("llama", BESIDE, d) for d in ("signs", "shared")),
    # Embeddings: tied and not, label words and whole vocabularies.
    *(
        of(f, "full", d, kind=kind, tied=tied)
        for f, d in (("llama", "signs"), ("llama", "shared"), ("gpt2", "rademacher"))
        for kind in ("label", "completion", "choice")
        for tied in (True, False)
    ),
    *(of(f, "full", kind="completion") for f in ("gemma2", "opt", "roberta")),
    *(of(f, "full", tied=True) for f in ("mistral", "phi3")),
    *(of(f, "full", tied=False) for f in ("opt", "gemma3_text")),
    # Windows shorter than the rows.
    of("mistral", BESIDE, changes=WINDOW),
    of("phi3", "full", changes=WINDOW),
    of("qwen2", "full", changes=PART_WINDOW),
    # Every store that the choice allows.
    *(of("llama", "full", d, precision="bf16") for d in DIRECTION_KINDS),
    of("llama", "full", precision="fp16"),
    *(of("gpt2", "full", precision=p, rounding="stochastic") for p in ("bf16", "fp16")),
    of("gemma2", "full", precision="bf16", kind="completion"),
    *(of("llama", "full", d, precision="int8", rounding="anchored") for d in DIRECTION_KINDS),
    *(of(f, "full", precision="int8", rounding="stochastic") for f in ("gpt2", "phi3")),
    *(of(f, "full", precision="int8", rounding="plane") for f in ("llama", "gpt2")),
    of("gemma2", "full", precision="int8", kind="completion", rounding="anchored"),
    *(of("llama", BESIDE, d, precision="int4") for d in FIRST),
    *(of("llama", BESIDE, precision=p) for p in ("bf16", "int8")),
    *(of(f, BESIDE, precision=p) for f in ("gpt2", "phi3", "roberta") for p in ("int8", "int4")),
    of("llama", BESIDE, precision="int4", kind="completion", tied=False),
)

# What is tried in bf16 arithmetic.
LOW: tuple[Case, ...] = (
    *(of(f, "full", precision="bf16") for f in tiny_models.FAMILIES),
    *(of("llama", BESIDE, d, precision="bf16") for d in FIRST),
    *(of("llama", "full", d, precision="bf16") for d in LATER),
    *(of("gemma3_text", ALL, d, precision="bf16", kind="completion") for d in FIRST),
    *(of("gpt2", BESIDE, precision=p) for p in ("int8", "int4", "fp16")),
    of("llama", "full", precision="int8", rounding="anchored"),
    of("llama", "lowrank+head", precision="bf16", kind="completion"),
)

# Biases that no loss depends on: the same number on every key leaves a softmax as it was (no rotation here).
WITHOUT_EFFECT = {"opt": ("k_proj.bias",), "roberta": ("attention.self.key.bias",)}


def pick(**wanted: Any) -> list[Case]:
    """The cases whose fields have these values."""
    return [c for c in CASES if all(getattr(c, k) == v for k, v in wanted.items())]


def cases(chosen: Sequence[Case] = CASES) -> Any:
    return pytest.mark.parametrize("tried", chosen, ids=str, indirect=True)


# ----------------------------------------------------------------------------- what a case is tried on


def make_row(generator: np.random.Generator, length: int, scored: int, masked: bool) -> Row:
    """A row of random ids with ``scored`` scored positions; one without a target where ``scored`` is 0 (a label)."""
    ids = generator.integers(4, tiny_models.VOCAB, length)
    if masked:
        at = sorted(generator.choice(length, max(scored, 1), replace=False).tolist())
        ids[at] = MASK_ID
    else:
        at = list(range(length - 1 - scored, length - 1)) if scored else [length - 1]
    targets = generator.integers(4, tiny_models.VOCAB, scored)
    return Row(tuple(ids.tolist()), tuple(at), tuple(targets.tolist()))


def make_examples(kind: str, masked: bool, count: int = 4, seed: int = 0) -> tuple[Example, ...]:
    generator = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        length = int(generator.integers(7, 20))
        if kind == "choice":
            rows = tuple(make_row(generator, length + k, 2 + k, masked) for k in range(2 + i % 2))
            if i < 2 and not masked:  # two examples whose options begin alike, which pass as trees
                first = rows[0].ids[: length - 3]
                rows = tuple(
                    replace(row, ids=(*first, *row.ids[len(first) :]), score_at=row.score_at)
                    for row in rows
                )
        else:
            rows = (make_row(generator, length, 0 if kind == "label" else 1 + i, masked),)
        label = int(generator.integers(0, len(rows) if kind == "choice" else len(LABEL_IDS)))
        examples.append(Example(rows, -1 if kind == "completion" else label))
    return tuple(examples)


@dataclass
class Tried:
    """A case with its objects: edgezo's model, transformers' module, and a group of examples."""

    case: Case
    path: Path
    model: Model
    start: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def twin(self) -> reference.Twin:
        module = official_module(self.case)
        return reference.Twin(module, kind=self.case.kind, label_ids=LABEL_IDS)

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        return make_examples(self.case.kind, self.model.masked)

    @cached_property
    def batch(self) -> Batch:
        return collate(self.examples, range(len(self.examples)))

    @cached_property
    def used(self) -> dict[str, list[Tensor]]:
        """For every trained tensor the rows that each example moves."""
        per_example = [self.twin.rows_used(example) for example in self.examples]
        return {
            name: [used.get(name, torch.arange(trainable.target.rows)) for used in per_example]
            for name, trainable in self.model.store.trainables.items()
        }

    def losses(self, directions: Directions | None = None, sigma: float = SIGMA) -> Tensor:
        """Two-sided losses (2, B) of the group; the rows touched in the forward are forgotten."""
        probe = self.model.probe(self.batch, KEY, sigma)
        probe.directions = directions or probe.directions
        losses, _ = self.model.losses(self.batch, probe, sides=2)
        self.model.take_touched(len(self.examples))
        return losses

    def touched(self, step: int = KEY.step) -> tuple[np.ndarray, ...]:
        probe = self.model.probe(self.batch, Key(KEY.seed, step), SIGMA)
        self.model.losses(self.batch, probe, sides=2)
        return self.model.take_touched(len(self.examples))

    def recipe(self, step: int, decay: float = 0.0) -> Recipe:
        """A recipe with random coefficients of a size that every precision can store."""
        c = np.random.default_rng(step).standard_normal(len(self.examples)) * 0.01
        touched = self.touched(step)
        guides = reference.probed_guides(self.model.store)
        return Recipe(step, exact_grid(c), decay, touched, guides=guides)

    def values(self) -> dict[str, Tensor]:
        """Every trained tensor as it is stored, (rows, cols) float64."""
        trainables = self.model.store.trainables.items()
        return {
            name: trainable.layout.read(slice(0, trainable.target.rows)).double()
            for name, trainable in trainables
        }

    def restore(self) -> None:
        load_trained(self.model.store, self.start)
        self.model.context.touched = []


def official_module(case: Case) -> nn.Module:
    changes = dict(case.changes) | {"attn_implementation": "eager"}
    module: nn.Module = tiny_models.random_model(case.family, tied=case.tied, **changes)
    return module


class Workshop:
    """Makes the objects of each case, once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: dict[Any, Path] = {}
        self.made: dict[Case, Tried] = {}

    def path(self, case: Case) -> Path:
        key = case.family, case.tied, case.changes
        if key not in self.paths:
            folder = self.folder / str(len(self.paths))
            changes = dict(case.changes)
            self.paths[key] = tiny_models.make(case.family, folder, tied=case.tied, **changes)
        return self.paths[key]

    def model(self, case: Case, dtype: torch.dtype = torch.float32) -> Model:
        spec = ModelSpec(
            precision=case.precision,
            train=case.train,
            directions=case.directions,
            seed=KEY.seed,
            rank=3,
            rounding=case.rounding,
            kind=case.kind,
            label_ids=LABEL_IDS if case.kind == "label" else (),
            dtype=dtype,
        )
        return assemble(open_model(self.path(case)), spec)

    def tried(self, case: Case) -> Tried:
        if case not in self.made:
            tried = Tried(case, self.path(case), self.model(case))
            settle(tried.model)
            tried.start = copy.deepcopy(trained_tensors(tried.model.store))
            self.made[case] = tried
        return self.made[case]


def settle(model: Model) -> None:
    """Move all trained values a little: factors, gains and low-order planes start at zero, which is special."""
    generator = torch.Generator().manual_seed(3)
    for name, trainable in model.store.trainables.items():
        every = slice(0, trainable.target.rows)
        step = torch.randn(trainable.layout.shape, generator=generator) * (
            0.1 if "#" in name else 1e-3
        )
        values = trainable.layout.snap(
            trainable.layout.read(every) + step, KEY, trainable.target.id, every
        )
        trainable.layout.write(every, values)


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


def code_steps(layout: layouts.Int8) -> Tensor:
    """How far rounding may move codes: their row's scale; any distance at the ends of the range, which stop a value."""
    at_end = layout.codes.abs() >= layouts.MOST_CODE
    return torch.where(at_end, math.inf, layout.scale.double())
