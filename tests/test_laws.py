"""The laws of the engine: every family, whatever is trained, along every direction, from every store.

The reference is always transformers' own module holding an explicit float64 copy of the weights (``reference``).
A case is a row of a table; a new family, direction or store is covered by adding one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from edgezo import layouts, objective
from edgezo.assemble import ModelSpec, assemble
from edgezo.data import Batch, Example, Row, collate, micro_batches
from edgezo.directions import DIRECTIONS, Directions, Target
from edgezo.errors import UsageError
from edgezo.estimators import Recipe, preset
from edgezo.head import ExactHead
from edgezo.loader import open_model
from edgezo.model import Model
from edgezo.noise import Key, exact_grid
from edgezo.presets import PRESETS
from edgezo.shapes import PRODUCT_ROWS
from edgezo.weights import Saved, saved_sha256

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
LATER = tuple(d for d in DIRECTIONS if d not in FIRST)
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
    *(of("llama", "full", d) for d in DIRECTIONS if d not in ("signs", "shared")),
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
    *(of("llama", "full", d, precision="bf16") for d in DIRECTIONS),
    of("llama", "full", precision="fp16"),
    *(of("gpt2", "full", precision=p, rounding="stochastic") for p in ("bf16", "fp16")),
    of("gemma2", "full", precision="bf16", kind="completion"),
    *(of("llama", "full", d, precision="int8", rounding="anchored") for d in DIRECTIONS),
    *(of(f, "full", precision="int8", rounding="stochastic") for f in ("gpt2", "phi3")),
    of("gemma2", "full", precision="int8", kind="completion", rounding="anchored"),
    *(of("llama", BESIDE, d, precision="int4") for d in FIRST),
    *(of("llama", BESIDE, precision=p) for p in ("bf16", "int8")),
    *(of(f, BESIDE, precision=p) for f in ("gpt2", "phi3", "roberta") for p in ("int8", "int4")),
    of("llama", BESIDE, precision="int4", kind="completion", tied=False),
)

# Biases that no loss depends on: the same number on every key leaves a softmax as it was (no rotation here).
WITHOUT_EFFECT = {"opt": ("k_proj.bias",), "roberta": ("attention.self.key.bias",)}


def pick(**wanted: Any) -> list[Case]:
    """The cases whose fields have these values."""
    return [c for c in CASES if all(getattr(c, k) == v for k, v in wanted.items())]


def cases(chosen: Sequence[Case] = CASES) -> Any:
    return pytest.mark.parametrize("bench", chosen, ids=str, indirect=True)


# ----------------------------------------------------------------------------- what a case is tried on


def make_row(generator: np.random.Generator, length: int, scored: int, masked: bool) -> Row:
    """Random ids; ``scored`` positions, or one for a label (0)."""
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
    found = []
    for i in range(count):
        length = int(generator.integers(7, 20))
        if kind == "choice":
            rows = tuple(make_row(generator, length + k, 2 + k, masked) for k in range(2 + i % 2))
        else:
            rows = (make_row(generator, length, 0 if kind == "label" else 1 + i, masked),)
        label = int(generator.integers(0, len(rows) if kind == "choice" else len(LABEL_IDS)))
        found.append(Example(rows, -1 if kind == "completion" else label))
    return tuple(found)


@dataclass
class Bench:
    """A case made real: edgezo's model, transformers' own module, and a group of examples."""

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
        """Rows of every trained tensor that each example moves."""
        per_example = [self.twin.rows_used(example) for example in self.examples]
        return {
            name: [used.get(name, torch.arange(row.target.rows)) for used in per_example]
            for name, row in self.model.store.trainables.items()
        }

    def losses(self, directions: Directions | None = None, sigma: float = SIGMA) -> Tensor:
        """Two-sided losses (2, B) of the group; what was touched is forgotten."""
        probe = self.model.probe(self.batch, KEY, sigma)
        probe.directions = directions or probe.directions
        found, _ = self.model.losses(self.batch, probe, sides=2)
        self.model.take_touched(len(self.examples))
        return found

    def touched(self, step: int = KEY.step) -> tuple[np.ndarray, ...]:
        probe = self.model.probe(self.batch, Key(KEY.seed, step), SIGMA)
        self.model.losses(self.batch, probe, sides=2)
        return self.model.take_touched(len(self.examples))

    def recipe(self, step: int, decay: float = 0.0) -> Recipe:
        """A recipe with arbitrary coefficients of a size that every store can hold."""
        c = np.random.default_rng(step).standard_normal(len(self.examples)) * 0.01
        touched = self.touched(step)
        guides = reference.probed_guides(self.model.store)
        return Recipe(step, exact_grid(c), decay, touched, guides=guides)

    def values(self) -> dict[str, Tensor]:
        """Every trained tensor as the store's grid holds it, (rows, cols) float64."""
        rows = self.model.store.trainables.items()
        return {name: row.layout.read(slice(0, row.target.rows)).double() for name, row in rows}

    def restore(self) -> None:
        self.model.store.load_trained(self.start)
        self.model.context.touched = []


def official_module(case: Case) -> nn.Module:
    changes = dict(case.changes) | {"attn_implementation": "eager"}
    module: nn.Module = tiny_models.random_model(case.family, tied=case.tied, **changes)
    return module


class Workshop:
    """Makes benches, each once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: dict[Any, Path] = {}
        self.benches: dict[Case, Bench] = {}

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

    def bench(self, case: Case) -> Bench:
        if case not in self.benches:
            bench = Bench(case, self.path(case), self.model(case))
            _settle(bench.model)
            bench.start = copy.deepcopy(bench.model.store.trained_tensors())
            self.benches[case] = bench
        return self.benches[case]


def _settle(model: Model) -> None:
    """Move what starts at zero (factors, gains) and the low-order planes to somewhere generic."""
    generator = torch.Generator().manual_seed(3)
    for name, row in model.store.trainables.items():
        every = slice(0, row.target.rows)
        step = torch.randn(row.layout.shape, generator=generator) * (0.1 if "#" in name else 1e-3)
        values = row.layout.snap(row.layout.read(every) + step, KEY, row.target.id, every)
        row.layout.write(every, values)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEZO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Workshop(tmp_path_factory.mktemp("models"))


@pytest.fixture
def bench(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[Bench]:
    made = workshop.bench(request.param)
    yield made
    made.restore()


def close(found: Tensor, wanted: Tensor, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), atol=atol, rtol=rtol)


# ----------------------------------------------------------------------------- (a) the plain forward

FORWARDS: tuple[Case, ...] = (
    *(
        of(f, "norms", kind=kind)
        for f in tiny_models.FAMILIES
        for kind in ("label", "completion", "choice")
    ),
    *(of(f, "norms", kind="completion", changes=WINDOW) for f in ("mistral", "phi3")),
    of("qwen2", "norms", kind="completion", changes=PART_WINDOW),
    of("gemma2", "norms", kind="completion", changes=(("final_logit_softcapping", 2.0),)),
)


@cases(FORWARDS)
def test_a_packed_forward_gives_the_losses_of_transformers_padded_batch(bench: Bench) -> None:
    module: Any = official_module(bench.case)
    twin = reference.Twin(module, kind=bench.case.kind, label_ids=LABEL_IDS)
    rows = [row for example in bench.examples for row in example.rows]
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)], mask[number, : len(row.ids)] = torch.tensor(row.ids), 1
    # Causal rows never look at padding on their right; transformers' mask of it makes NaN beyond a window.
    masks = {"attention_mask": mask} if bench.model.masked else {}
    with torch.no_grad():
        padded = module(input_ids=ids, **masks).logits
        for number, row in enumerate(rows):
            close(padded[number, list(row.score_at)], twin.logits(row), atol=1e-5)
        wanted = torch.stack([twin.loss(example) for example in bench.examples])
    found, predicted = as_loaded(bench).losses(bench.batch)
    close(found[0], wanted, atol=2e-5)
    if bench.case.kind == "label":
        first = [twin.logits(e.rows[0])[0, list(LABEL_IDS)].argmax() for e in bench.examples]
        assert predicted[0].tolist() == [int(i) for i in first]


def as_loaded(bench: Bench) -> Model:
    """The model as loaded, before ``_settle``."""
    case = bench.case
    spec = ModelSpec("fp32", case.train, "signs", KEY.seed, kind=case.kind, label_ids=LABEL_IDS)
    return assemble(open_model(bench.path), spec)


# ----------------------------------------------------------------------------- (b) the perturbed forward


@cases()
def test_perturbed_losses_are_those_of_an_explicit_copy_of_the_weights(bench: Bench) -> None:
    found = bench.losses()
    wanted = bench.twin.losses(bench.model, bench.examples, KEY, SIGMA)
    close(found, wanted, atol=1e-4, rtol=1e-5)
    # The two sides differ by far more than what rounding could pretend.
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2
    close(found[0] - found[1], wanted[0] - wanted[1], atol=1e-4)


@pytest.mark.parametrize("family", ("qwen3", "gemma3_text"))
def test_norms_of_queries_tell_tokens_from_heads_when_there_are_as_many(
    family: str, workshop: Workshop
) -> None:
    # One row of two tokens on two sides is four tokens, and these models have four heads.
    bench = replace(workshop.bench(of(family, BESIDE, "gaussian")))
    row = Row((40, 41), (1,), ())
    bench.examples = (Example((row,), 1),)
    assert bench.model.module.config.num_attention_heads == 2 * len(row.ids)  # type: ignore[union-attr]
    wanted = bench.twin.losses(bench.model, bench.examples, KEY, SIGMA)
    close(bench.losses(), wanted, atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


# ----------------------------------------------------------------------------- (c) the update


@cases()
def test_the_update_is_the_weighted_sum_of_the_probed_directions(bench: Bench) -> None:
    store, recipe = bench.model.store, bench.recipe(KEY.step)
    before = bench.values()
    frozen = [t for n, t in store.layouts.items() if n not in store.trainables]
    still = [t.clone() for layout in frozen for t in layout.tensors().values()]
    still += [t.clone() for t in store.vectors.values()]
    store.apply([recipe])
    after = bench.values()
    for name, row in store.trainables.items():
        wanted = reference.update(store, recipe, name, bench.used[name])
        moved = after[name] - before[name]
        assert wanted.abs().max() > 0
        assert cosine(moved, wanted) > 1 - 1e-4 or _coarse(row.layout), name
        # Half a step of the grid (a whole one where rounding is random), and fp32's own rounding.
        spare = _grid(row.layout) + 3e-7 * (before[name].abs() + wanted.abs())
        assert bool(((moved - wanted).abs() <= spare).all()), name
        untouched = wanted == 0
        assert torch.equal(after[name][untouched], before[name][untouched]), name
    moved_not = [t for layout in frozen for t in layout.tensors().values()]
    moved_not += list(store.vectors.values())
    assert all(torch.equal(a, b) for a, b in zip(still, moved_not, strict=True))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.sum(a * b) / (a.norm() * b.norm()))


def _coarse(layout: layouts.Dense | layouts.Int8) -> bool:
    if isinstance(layout, layouts.Int8):
        return True
    return layout.values.dtype != torch.float32 and layout.low is None


def _grid(layout: layouts.Dense | layouts.Int8) -> Tensor:
    """How far ``snap`` may move each value, (rows, cols) float64."""
    if isinstance(layout, layouts.Int8):
        return code_steps(layout)
    if layout.values.dtype == torch.float32:
        return torch.zeros(layout.shape, dtype=torch.float64)
    digits = {torch.bfloat16: 7, torch.float16: 10}[layout.values.dtype]
    ulp = 2.0 ** (torch.floor(torch.log2(layout.values.double().abs() + 1e-30)) - digits)
    return ulp / 128 if layout.low is not None else 2 * ulp


def code_steps(layout: layouts.Int8) -> Tensor:
    """The same for codes: a row's scale; at the ends of their range, which hold a value back, any distance."""
    at_end = layout.codes.abs() >= layouts.MOST_CODE
    return torch.where(at_end, math.inf, layout.scale.double())


@cases([*pick(family="llama", kind="label"), *pick(kind="completion")])
def test_weight_decay_shrinks_before_the_update(bench: Bench) -> None:
    store, decay = bench.model.store, 0.25
    recipe = replace_decay(bench.recipe(KEY.step), decay)
    before = bench.values()
    store.apply([recipe])
    after = bench.values()
    for name, row in store.trainables.items():
        moves = torch.zeros(row.target.rows, dtype=torch.bool)
        for rows in bench.used[name]:
            moves[rows] = True
        update = reference.update(store, recipe, name, bench.used[name])
        wanted = torch.where(moves[:, None], before[name] * (1 - decay), before[name]) + update
        spare = 2 * _grid(row.layout) + 3e-7 * (before[name].abs() + update.abs())
        assert bool(((after[name] - wanted).abs() <= spare).all()), name


def replace_decay(recipe: Recipe, decay: float) -> Recipe:
    return recipe._replace(decay=decay)


# ----------------------------------------------------------------------------- (d) both, or neither


class Flipped(Directions):
    """Directions with the sign of one tensor's turned around."""

    flipped: str

    def row_signs(self, key: Key, target: Target, slots: Sequence[int]) -> Tensor:
        found = super().row_signs(key, target, slots)
        return -found if target.name == self.flipped else found

    def dense_rows(
        self, key: Key, target: Target, rows: slice, basis: Tensor | None = None
    ) -> Tensor:
        found = super().dense_rows(key, target, rows, basis)
        return -found if target.name == self.flipped and not self.factored else found


@cases(
    [
        *(of(f, "full") for f in tiny_models.FAMILIES),
        *pick(family="llama", kind="completion", train=("full",), directions="signs"),
        *(of(f, BESIDE, "gaussian") for f in ("llama", "gpt2")),
        of("mistral", ALL, "shared"),
    ]
)
def test_every_trained_tensor_is_perturbed_and_updated(bench: Bench) -> None:
    store, plain = bench.model.store, bench.losses()
    inert = WITHOUT_EFFECT.get(bench.case.family, ())
    for name in store.trainables:
        directions = Flipped(*store.directions)
        directions.flipped = name
        changed = (bench.losses(directions) - plain).abs().max()
        assert (changed > 2e-5) != name.endswith(inert or ("no such tensor",)), (name, changed)
    before = {name: values.clone() for name, values in bench.values().items()}
    store.apply([bench.recipe(KEY.step)])
    after = bench.values()
    assert all(not torch.equal(before[name], after[name]) for name in store.trainables)


@cases(pick(directions="signs"))
def test_each_choice_trains_what_it_says_and_lists_the_rest_as_frozen(bench: Bench) -> None:
    module, case = bench.twin.module, bench.case
    parameters = dict(module.named_parameters())
    vectors = {n for n, p in parameters.items() if p.dim() == 1}
    linears = {
        f"{name}.weight"
        for name, sub in module.named_modules()
        if isinstance(sub, nn.Linear | Conv1D) and sub is not module.get_output_embeddings()
    }
    expected = {
        "full": set(parameters),
        "norms": vectors,
        "scales": {f"{n}#gain" for n in linears},
        "lowrank": {f"{n}#lowrank" for n in linears},
    }
    wanted = set().union(*(expected[choice] for choice in case.train))
    assert set(bench.model.store.trainables) == wanted
    assert sorted(bench.model.frozen) == sorted(set(parameters) - wanted)


def test_full_weights_cannot_be_trained_on_frozen_codes(workshop: Workshop) -> None:
    with pytest.raises(UsageError, match="frozen codes"):
        workshop.model(of("llama", "full", precision="int4"))


# ----------------------------------------------------------------------------- (e) splitting changes nothing


@cases(
    [
        *(of(f, "full") for f in tiny_models.FAMILIES),
        *pick(family="llama", train=("full",), kind="choice"),
        *pick(train=tuple(BESIDE.split("+")), precision="int4"),
    ]
)
@pytest.mark.parametrize("size", (1, 2))
def test_micro_batches_see_the_same_directions(bench: Bench, size: int) -> None:
    model, group = bench.model, bench.examples
    whole = bench.losses()
    touched = bench.touched()
    parts = torch.full_like(whole, float("nan"))
    for slots in micro_batches(group, size):
        batch = collate([group[s] for s in slots], slots)
        parts[:, slots], _ = model.losses(batch, model.probe(batch, KEY, SIGMA), sides=2)
    close(parts, whole, atol=2e-5)
    again = model.take_touched(len(group))
    assert len(again) == len(touched)
    assert all(np.array_equal(a, b) for a, b in zip(again, touched, strict=True))


@cases(
    [
        *pick(family="llama", kind="label", precision="fp32", train=("full",)),
        *pick(family="gpt2", kind="completion"),
        *(c for c in CASES if c.precision in ("bf16", "fp16", "int8") and "full" in c.train),
        of("llama", ALL, "gaussian"),
        of("llama", BESIDE, precision="int4"),
    ]
)
def test_many_recipes_at_once_give_the_bits_of_one_by_one_for_any_tile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bench.model.store
    recipes = [bench.recipe(step, decay=0.001 * step) for step in range(3)]
    skipped = Recipe(9, np.zeros(len(bench.examples), np.float32), 0.0)
    for recipe in recipes:
        store.apply([recipe])
    one_by_one = saved_sha256(store.saved())
    bench.restore()
    assert saved_sha256(store.saved()) != one_by_one
    for tile_bytes in (layouts.TILE_BYTES, 3000):
        monkeypatch.setattr(layouts, "TILE_BYTES", tile_bytes)
        bench.restore()
        store.apply([*recipes[:2], skipped, *recipes[2:]])
        assert saved_sha256(store.saved()) == one_by_one, tile_bytes


@cases([*pick(kind="completion"), *pick(family="phi3"), *pick(precision="int4")])
def test_losses_do_not_depend_on_the_tile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.losses()
    monkeypatch.setattr(layouts, "TILE_BYTES", 2000)
    monkeypatch.setattr(objective, "_CHUNK_BYTES", 2000)
    close(bench.losses(), whole, atol=2e-5)


# ----------------------------------------------------------------------------- (f) the estimator

QUADRATIC = {
    "matrix": Target("quadratic.weight", 6, 5, vector=False),
    "vector": Target("quadratic.bias", 7, 1, vector=True),
}


@pytest.mark.parametrize("shape", QUADRATIC)
@pytest.mark.parametrize("name", [d for d in DIRECTIONS if d != "centred"])
def test_the_two_sided_estimate_of_a_quadratic_averages_to_its_gradient(
    name: str, shape: str
) -> None:
    # l(theta) = theta.H theta/2 + b.theta, so l(theta + s D) - l(theta - s D) = 2 s (H theta + b).D exactly.
    directions, target = DIRECTIONS[name], QUADRATIC[shape]
    size, sigma = target.rows * target.cols, 0.1
    generator = np.random.default_rng(0)
    root = generator.standard_normal((size, size))
    h, b, theta = (
        root @ root.T / size,
        generator.standard_normal(size),
        generator.standard_normal(size),
    )

    def loss(at: np.ndarray) -> float:
        return float(at @ h @ at / 2 + b @ at)

    keys, per_key = (250, 16) if directions.factored else (1500, 1)
    total = torch.zeros(target.rows, target.cols, dtype=torch.float64)
    for step in range(keys):
        key = Key(3, step)
        delta = np.empty(per_key)
        for slot in range(per_key):
            d = (
                sigma
                * reference.direction(name, key, target, slot, directions.rank).numpy().ravel()
            )
            delta[slot] = loss(theta + d) - loss(theta - d)
        c = torch.from_numpy(delta / (2 * sigma * per_key)).float()
        total += directions.weighted_sum(key, target, c, slice(0, target.rows))
    found = (total / keys).numpy().ravel()
    true = h @ theta + b
    # One estimate's entries have a standard deviation of about |g|; U shared by a group counts once.
    independent = keys * (1 if directions.dense else per_key)
    assert np.abs(found - true).max() < 4.5 * np.linalg.norm(true) / math.sqrt(independent)
    assert np.linalg.norm(found - true) < 0.3 * np.linalg.norm(true)


LLAMA = of("llama", "full")


@pytest.mark.parametrize("estimator, directions", [("grzo", "signs"), ("grzo", "rademacher")])
@pytest.mark.parametrize("size", (4, 16))
def test_the_cosine_to_the_true_gradient_grows_with_the_root_of_the_group(
    estimator: str, directions: str, size: int, workshop: Workshop
) -> None:
    # E[c_i D_i . g] = |g|^2 and |sum c_i D_i|^2 ~ sum |g_i|^2 d_i, so the cosine is near |g| B/sqrt(sum |g_i|^2 d_i).
    bench = replace(workshop.bench(replace(LLAMA, directions=directions)))
    bench.examples = make_examples("label", False, count=size, seed=1)
    gradients = _example_gradients(bench)
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}
    squares = [sum(float(g[n].square().sum()) for n in g) for g in gradients]
    places = [
        sum(row.target.cols * len(bench.used[n][i]) for n, row in _rows(bench)) for i in range(size)
    ]
    length = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
    noise = math.sqrt(sum(s * d for s, d in zip(squares, places, strict=True)))
    tries = 64
    found = np.mean([_estimate_cosine(bench, estimator, step, mean) for step in range(tries)])
    # A single cosine scatters by about 1/sqrt(d); group credit's common factor cancels.
    scatter = 1 / math.sqrt(min(places) * tries)
    assert abs(found - length * size / noise) < 4 * scatter + 0.05 * found
    assert found > 4 * scatter


def test_one_shared_direction_has_the_cosine_of_a_single_gaussian(workshop: Workshop) -> None:
    bench = workshop.bench(replace(LLAMA, directions="shared"))
    gradients = _example_gradients(bench)
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}
    moved = {n: torch.unique(torch.cat(bench.used[n])) for n, _ in _rows(bench)}
    places = sum(row.target.cols * len(moved[name]) for name, row in _rows(bench))
    tries = 60
    found = np.mean([_estimate_cosine(bench, "mezo", step, mean) for step in range(tries)])
    # Example i of a shared direction moves only its own rows of an embedding, which turns U a little.
    assert abs(found * math.sqrt(places) - math.sqrt(2 / math.pi)) < 4 * 0.6 / math.sqrt(tries)


def _rows(bench: Bench) -> Any:
    return bench.model.store.trainables.items()


def _example_gradients(bench: Bench) -> list[dict[str, Tensor]]:
    """Autograd's gradient of each example's loss, by parameter, (rows, cols)."""
    twin = bench.twin
    twin.load(reference.explicit_weights(bench.model))
    found = []
    for example in bench.examples:
        twin.module.zero_grad()
        twin.loss(example).backward()
        found.append(
            {
                name: twin.module.get_parameter(name).grad.reshape(row.target.rows, -1).clone()
                for name, row in _rows(bench)
            }
        )
    return found


def _estimate_cosine(bench: Bench, estimator: str, step: int, true: dict[str, Tensor]) -> float:
    """Cosine of one step's -update to ``true``."""
    model, chosen = bench.model, preset(estimator)
    batch = collate(bench.examples, range(len(bench.examples)))
    losses, _ = model.losses(batch, model.probe(batch, Key(KEY.seed, step), 1e-3), sides=2)
    touched = model.take_touched(len(bench.examples))
    # A step that is large against fp32's rounding of the weights; its size does not enter the cosine.
    c = chosen.credit(losses.numpy())
    recipe = Recipe(step, exact_grid(c / np.abs(c).max()), 0.0, touched)
    before = bench.values()
    model.store.apply([recipe])
    after = bench.values()
    bench.restore()
    dot = sum(float(torch.sum((before[n] - after[n]) * true[n])) for n in true)
    length = math.sqrt(sum(float((before[n] - after[n]).square().sum()) for n in true))
    return dot / length / math.sqrt(sum(float(g.square().sum()) for g in true.values()))


# ----------------------------------------------------------------------------- (g) the exact head

HEADS: tuple[Case, ...] = (
    *(of("llama", "lowrank+head", kind=k) for k in ("label", "completion", "choice")),
    *(
        of(f, "head", kind=k)
        for f in ("gemma2", "roberta", "gpt2")
        for k in ("label", "completion")
    ),
    of("gemma2", "full+head", kind="choice"),
    of("llama", "head", kind="completion", tied=False, precision="int8"),
)


@cases(HEADS)
def test_the_exact_heads_gradient_is_autograds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "_CHUNK_BYTES", 40_000)
    model, head = bench.model, bench.model.exact
    assert head is not None
    head.delta.copy_(torch.randn(head.delta.shape, generator=torch.Generator().manual_seed(1)) / 20)
    change = head.delta.double().requires_grad_()
    basis = None if head.basis is None else head.basis.double()
    total = torch.zeros((), dtype=torch.float64)
    wanted = torch.empty(2, len(bench.examples), dtype=torch.float64)
    for slot, example in enumerate(bench.examples):
        for side, sign in enumerate((1, -1)):
            bench.twin.load(reference.explicit_weights(model, KEY, slot, sign * SIGMA))
            loss = bench.twin.loss(example, change, basis)
            wanted[side, slot], total = loss.detach(), total + loss
    (gradient,) = torch.autograd.grad(total / wanted.numel(), change)
    head.gradient.zero_()
    probe = model.probe(bench.batch, KEY, SIGMA)
    found, _ = model.losses(bench.batch, probe, sides=2, learn=1 / wanted.numel())
    close(found, wanted, atol=1e-4)
    close(head.gradient, gradient, atol=2e-5 * float(gradient.abs().max()) + 1e-7, rtol=1e-3)
    assert gradient.abs().max() > 1e-3
    head.delta.zero_()
    head.gradient.zero_()


def test_the_head_takes_the_steps_of_torch_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    head = ExactHead.for_labels(3, 20)
    weight = nn.Parameter(torch.zeros(3, 20))
    adam = torch.optim.Adam([weight], lr=0.01)
    for step in range(20):
        gradient = torch.randn(3, 20, generator=generator) * 10.0 ** -(step % 5)
        weight.grad = gradient.clone()
        head.gradient += gradient
        adam.step()
        head.update(0.01)
        close(head.delta, weight.detach(), atol=1e-7, rtol=1e-5)
        assert not head.gradient.any()


def test_the_heads_rate_is_in_units_of_the_score_whatever_the_states_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    features, error = (torch.randn(6, n, generator=generator) for n in (20, 3))
    moved = []
    for scale in (1.0, 1000.0):
        head = ExactHead.for_labels(3, 20)
        head.learn(slice(None), error, features * scale)
        head.forget()  # a step that was cut leaves nothing
        for rows in (slice(0, 2), slice(2, 3)):  # tiles of the vocabulary see the same positions
            head.learn(rows, error[:, rows], features * scale)
        head.update(0.5)
        mean = float(features.abs().sum(1).mean()) * scale
        close(head.delta.abs(), torch.full((3, 20), 0.5 / mean), atol=0.0, rtol=1e-4)
        head.gradient += scale
        head.update(0.5)
        moved.append(features * scale @ head.delta.T)
    close(moved[1], moved[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_gradient_that_is_not_finite_leaves_the_head_as_it_was(bad: float) -> None:
    head = ExactHead.for_labels(3, 20)
    head.gradient.fill_(0.5)
    head.update(0.01)
    before = {name: tensor.clone() for name, tensor in head.tensors().items()}
    head.gradient[1, 2] = bad
    head.update(0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in head.tensors().items())
    assert not head.gradient.any()


def _bits(head: ExactHead) -> str:
    return saved_sha256(Saved.of(name, tensor) for name, tensor in head.tensors().items())


def test_a_saved_head_goes_on_with_the_same_bits() -> None:
    def steps(head: ExactHead, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            head.gradient += torch.randn(head.delta.shape, generator=generator)
            head.update(0.01)

    first, second = (ExactHead.for_vocabulary(30, 20, 4, seed=1) for _ in range(2))
    steps(first, seed=0)
    second.load({name: tensor.clone() for name, tensor in first.tensors().items()})
    steps(first, seed=1)
    steps(second, seed=1)
    assert _bits(first) == _bits(second)


# ----------------------------------------------------------------------------- (h) bad losses


@cases(
    [
        *pick(directions="signs", train=("full",), kind="label", precision="bf16"),
        *pick(family="gpt2", precision="fp16"),
        *pick(family="llama", train=("lowrank", "norms", "scales"), precision="fp32"),
        of("llama", "lowrank+head", kind="completion"),
    ]
)
@pytest.mark.parametrize("estimator", ("grzo", "mezo"))
@pytest.mark.parametrize("sigma", (1e30, 3e38))
def test_a_probe_that_blows_up_leaves_every_weight_finite(
    bench: Bench, estimator: str, sigma: float
) -> None:
    model = bench.model
    probe = model.probe(bench.batch, KEY, sigma)
    losses, _ = model.losses(bench.batch, probe, sides=2, learn=0.1)
    assert not torch.isfinite(losses).all()
    touched = model.take_touched(len(bench.examples))
    losses[:, 1] = torch.tensor([1.0, 2.0])  # one example came through
    chosen, row = preset(estimator), PRESETS[estimator]
    c = chosen.coefficients(chosen.credit(losses.numpy()), row.step, row.sigma)
    model.store.apply([Recipe(0, c, 0.01, touched)])
    if model.exact is not None:
        model.exact.update(0.01)
    assert all(torch.isfinite(t.float()).all() for kept in model.saved() for t in kept.pieces())


# ----------------------------------------------------------------------------- compute dtype

LOW: tuple[Case, ...] = (
    *(of(f, "full", precision="bf16") for f in tiny_models.FAMILIES),
    *(of("llama", BESIDE, d, precision="bf16") for d in FIRST),
    *(of("llama", "full", d, precision="bf16") for d in LATER),
    *(of("gemma3_text", ALL, d, precision="bf16", kind="completion") for d in FIRST),
    *(of("gpt2", BESIDE, precision=p) for p in ("int8", "int4", "fp16")),
    of("llama", "full", precision="int8", rounding="anchored"),
    of("llama", "lowrank+head", precision="bf16", kind="completion"),
)


@cases(LOW)
def test_bf16_arithmetic_gives_near_losses_and_the_same_updates(
    bench: Bench, workshop: Workshop
) -> None:
    wide, low = bench.model, workshop.model(bench.case, torch.bfloat16)
    low.store.load_trained(bench.start)
    recipe = bench.recipe(KEY.step)
    found, _ = low.losses(bench.batch, low.probe(bench.batch, KEY, SIGMA), sides=2)
    touched = low.take_touched(len(bench.examples))
    # Random networks amplify bf16's 0.4 %; a wrong operation would be off by the size of the loss.
    wanted = bench.losses()
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.1 * wanted.mean()
    assert all(np.array_equal(a, b) for a, b in zip(touched, recipe.touched, strict=True))
    wide.store.apply([recipe])
    low.store.apply([recipe])
    assert saved_sha256(low.store.saved()) == saved_sha256(wide.store.saved())


class _Shapes(TorchDispatchMode):
    """The shapes of every bf16 product while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in args if isinstance(a, Tensor)]
        if func.overloadpacket.__name__ in PRODUCTS and given[0].dtype == torch.bfloat16:
            self.seen.add(tuple(a.shape for a in given))
        return func(*args, **(kwargs or {}))


PRODUCTS = (
    "mm",
    "addmm",
    "addmm_",
    "bmm",
    "baddbmm",
    "baddbmm_",
    "matmul",
    "linear",
    "mv",
    "addmv",
)


@cases(LOW)
def test_bf16_products_have_the_same_few_shapes_for_all_batches(
    bench: Bench, workshop: Workshop
) -> None:
    """Kernels are compiled for each shape, and kept: memory would grow with every batch (products.py)."""
    model = workshop.model(bench.case, torch.bfloat16)
    model.store.load_trained(bench.start)
    examples = make_examples(bench.case.kind, model.masked, 16, seed=1)

    def shapes(sizes: Sequence[int]) -> set[tuple[torch.Size, ...]]:
        with _Shapes() as found:
            for part in (part for n in sizes for part in micro_batches(examples, n)):
                batch = collate([examples[slot] for slot in part], part)
                model.losses(batch, model.probe(batch, KEY, SIGMA), sides=2)
                model.losses(batch)
                model.take_touched(len(examples))
                model.store.take_guides(learn=False)
        return found.seen

    def lengths(seen: set[tuple[torch.Size, ...]]) -> set[int]:
        return {n for product in seen for shape in product for n in shape}

    whole = lengths(shapes((1, 16)))
    assert whole & set(PRODUCT_ROWS)
    assert lengths(shapes((3, 5, 7))) <= whole | set(PRODUCT_ROWS) | {32, 48}  # or thin axes
