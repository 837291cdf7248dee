"""Laws that hold for every model family, every choice of what is trained, every direction and every precision.

The reference is always transformers' module with an explicit float64 copy of the weights (reference.py). The cases are
in workshop.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import tiny_models
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from workshop import (
    ALL,
    BESIDE,
    CASES,
    KEY,
    LABEL_IDS,
    LOW,
    PART_WINDOW,
    SIGMA,
    WINDOW,
    WITHOUT_EFFECT,
    Case,
    Tried,
    Workshop,
    cases,
    close,
    code_steps,
    of,
    official_module,
    pick,
)

from edgezo.data.batches import Example, collate, micro_batches
from edgezo.data.trees import Row
from edgezo.errors import UsageError
from edgezo.machine import limits
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import open_model
from edgezo.network.model import Model
from edgezo.weights import layouts
from edgezo.weights.saved import load_trained, saved_sha256, saved_tensors
from edgezo.zo.credit import preset
from edgezo.zo.directions import Directions, Target
from edgezo.zo.noise import Key
from edgezo.zo.presets import PRESETS
from edgezo.zo.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

# ----------------------------------------------------------------------------- the plain forward

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
def test_a_packed_forward_gives_the_losses_of_transformers_padded_batch(tried: Tried) -> None:
    module: Any = official_module(tried.case)
    twin = reference.Twin(module, kind=tried.case.kind, label_ids=LABEL_IDS)
    rows = [row for example in tried.examples for row in example.rows]
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)], mask[number, : len(row.ids)] = torch.tensor(row.ids), 1
    # Causal rows never look at padding on their right; transformers' mask of it makes NaN beyond a window.
    masks = {"attention_mask": mask} if tried.model.masked else {}
    with torch.no_grad():
        padded = module(input_ids=ids, **masks).logits
        for number, row in enumerate(rows):
            close(padded[number, list(row.score_at)], twin.logits(row), atol=1e-5)
        wanted = torch.stack([twin.loss(example) for example in tried.examples])
    losses, predicted = as_loaded(tried).losses(tried.batch)
    close(losses[0], wanted, atol=2e-5)
    if tried.case.kind == "label":
        first = [twin.logits(e.rows[0])[0, list(LABEL_IDS)].argmax() for e in tried.examples]
        assert predicted[0].tolist() == [int(i) for i in first]


def as_loaded(tried: Tried) -> Model:
    """The model as loaded, before ``workshop.settle`` moves its weights."""
    case = tried.case
    spec = ModelSpec("fp32", case.train, "signs", KEY.seed, kind=case.kind, label_ids=LABEL_IDS)
    return assemble(open_model(tried.path), spec)


# ----------------------------------------------------------------------------- the perturbed forward


@cases()
def test_perturbed_losses_are_those_of_an_explicit_copy_of_the_weights(tried: Tried) -> None:
    losses = tried.losses()
    wanted = tried.twin.losses(tried.model, tried.examples, KEY, SIGMA)
    close(losses, wanted, atol=1e-4, rtol=1e-5)
    # The two sides differ by far more than what rounding could pretend.
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2
    close(losses[0] - losses[1], wanted[0] - wanted[1], atol=1e-4)


@pytest.mark.parametrize("family", ("qwen3", "gemma3_text"))
def test_norms_of_queries_tell_tokens_from_heads_when_there_are_as_many(
    family: str, workshop: Workshop
) -> None:
    # One row of two tokens on two sides is four tokens, and these models have four heads.
    tried = replace(workshop.tried(of(family, BESIDE, "gaussian")))
    row = Row((40, 41), (1,), ())
    tried.examples = (Example((row,), 1),)
    assert tried.model.module.config.num_attention_heads == 2 * len(row.ids)  # type: ignore[union-attr]
    wanted = tried.twin.losses(tried.model, tried.examples, KEY, SIGMA)
    close(tried.losses(), wanted, atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


# ----------------------------------------------------------------------------- the update


@cases()
def test_the_update_is_the_weighted_sum_of_the_probed_directions(tried: Tried) -> None:
    store, recipe = tried.model.store, tried.recipe(KEY.step)
    before = tried.values()
    frozen = [t for n, t in store.layouts.items() if n not in store.trainables]
    still = [t.clone() for layout in frozen for t in layout.tensors().values()]
    still += [t.clone() for t in store.vectors.values()]
    store.apply([recipe])
    after = tried.values()
    for name, trainable in store.trainables.items():
        wanted = reference.update(store, recipe, name, tried.used[name])
        moved = after[name] - before[name]
        assert wanted.abs().max() > 0
        assert cosine(moved, wanted) > 1 - 1e-4 or _coarse(trainable.layout), name
        # Half a step of the grid (a whole one where rounding is random), and fp32's own rounding.
        spare = _grid(trainable.layout) + 3e-7 * (before[name].abs() + wanted.abs())
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
        return layout.low is None
    return layout.values.dtype != torch.float32 and layout.low is None


def _grid(layout: layouts.Dense | layouts.Int8) -> Tensor:
    """(rows, cols) float64: how far ``snap`` may move each value."""
    if isinstance(layout, layouts.Int8):
        return code_steps(layout) if layout.low is None else layout.scale.double() / 256
    if layout.values.dtype == torch.float32:
        return torch.zeros(layout.shape, dtype=torch.float64)
    digits = {torch.bfloat16: 7, torch.float16: 10}[layout.values.dtype]
    ulp = 2.0 ** (torch.floor(torch.log2(layout.values.double().abs() + 1e-30)) - digits)
    return ulp / 128 if layout.low is not None else 2 * ulp


@cases([*pick(family="llama", kind="label"), *pick(kind="completion")])
def test_weight_decay_shrinks_before_the_update(tried: Tried) -> None:
    store, decay = tried.model.store, 0.25
    recipe = replace_decay(tried.recipe(KEY.step), decay)
    before = tried.values()
    store.apply([recipe])
    after = tried.values()
    for name, trainable in store.trainables.items():
        moves = torch.zeros(trainable.target.rows, dtype=torch.bool)
        for rows in tried.used[name]:
            moves[rows] = True
        update = reference.update(store, recipe, name, tried.used[name])
        wanted = torch.where(moves[:, None], before[name] * (1 - decay), before[name]) + update
        spare = 2 * _grid(trainable.layout) + 3e-7 * (before[name].abs() + update.abs())
        assert bool(((after[name] - wanted).abs() <= spare).all()), name


def replace_decay(recipe: Recipe, decay: float) -> Recipe:
    return recipe._replace(decay=decay)


# ----------------------------------------------------------------------------- both, or neither


class Flipped(Directions):
    """Directions that have the opposite sign in one tensor."""

    flipped: str

    def row_signs(self, key: Key, target: Target, slots: Sequence[int], term: int = 0) -> Tensor:
        signs = super().row_signs(key, target, slots, term)
        return -signs if target.name == self.flipped else signs

    def dense_rows(
        self, key: Key, target: Target, rows: slice, basis: Tensor | None = None
    ) -> Tensor:
        u = super().dense_rows(key, target, rows, basis)
        return -u if target.name == self.flipped and not self.factored else u


@cases(
    [
        *(of(f, "full") for f in tiny_models.FAMILIES),
        *pick(family="llama", kind="completion", train=("full",), directions="signs"),
        *(of(f, BESIDE, "gaussian") for f in ("llama", "gpt2")),
        of("mistral", ALL, "shared"),
    ]
)
def test_every_trained_tensor_is_perturbed_and_updated(tried: Tried) -> None:
    store, plain = tried.model.store, tried.losses()
    inert = WITHOUT_EFFECT.get(tried.case.family, ())
    for name in store.trainables:
        directions = Flipped(*store.directions)
        directions.flipped = name
        changed = (tried.losses(directions) - plain).abs().max()
        assert (changed > 2e-5) != name.endswith(inert or ("no such tensor",)), (name, changed)
    before = {name: values.clone() for name, values in tried.values().items()}
    store.apply([tried.recipe(KEY.step)])
    after = tried.values()
    assert all(not torch.equal(before[name], after[name]) for name in store.trainables)


@cases(pick(directions="signs"))
def test_each_choice_trains_what_it_says_and_lists_the_rest_as_frozen(tried: Tried) -> None:
    module, case = tried.twin.module, tried.case
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
    assert set(tried.model.store.trainables) == wanted
    assert sorted(tried.model.frozen) == sorted(set(parameters) - wanted)


def test_full_weights_cannot_be_trained_on_frozen_codes(workshop: Workshop) -> None:
    with pytest.raises(UsageError, match="frozen codes"):
        workshop.model(of("llama", "full", precision="int4"))


# ----------------------------------------------------------------------------- splitting changes nothing


@cases(
    [
        *(of(f, "full") for f in tiny_models.FAMILIES),
        *pick(family="llama", train=("full",), kind="choice"),
        *pick(train=tuple(BESIDE.split("+")), precision="int4"),
    ]
)
@pytest.mark.parametrize("size", (1, 2))
def test_micro_batches_see_the_same_directions(tried: Tried, size: int) -> None:
    model, group = tried.model, tried.examples
    whole = tried.losses()
    touched = tried.touched()
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
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tried.model.store
    recipes = [tried.recipe(step, decay=0.001 * step) for step in range(3)]
    skipped = Recipe(9, np.zeros(len(tried.examples), np.float32), 0.0)
    for recipe in recipes:
        store.apply([recipe])
    one_by_one = saved_sha256(saved_tensors(store))
    tried.restore()
    assert saved_sha256(saved_tensors(store)) != one_by_one
    for tile_bytes in (limits.TILE_BYTES, 3000):
        monkeypatch.setattr(limits, "TILE_BYTES", tile_bytes)
        tried.restore()
        store.apply([*recipes[:2], skipped, *recipes[2:]])
        assert saved_sha256(saved_tensors(store)) == one_by_one, tile_bytes


@cases([*pick(kind="completion"), *pick(family="phi3"), *pick(precision="int4")])
def test_losses_do_not_depend_on_the_tile(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tried.losses()
    monkeypatch.setattr(limits, "TILE_BYTES", 2000)
    monkeypatch.setattr(limits, "LOGITS_BYTES", 2000)
    close(tried.losses(), whole, atol=2e-5)


# ----------------------------------------------------------------------------- bad losses


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
    tried: Tried, estimator: str, sigma: float
) -> None:
    model = tried.model
    probe = model.probe(tried.batch, KEY, sigma)
    losses, _ = model.losses(tried.batch, probe, sides=2, learn=0.1)
    assert not torch.isfinite(losses).all()
    touched = model.take_touched(len(tried.examples))
    losses[:, 1] = torch.tensor([1.0, 2.0])  # one example came through
    chosen, entry = preset(estimator), PRESETS[estimator]
    c = chosen.coefficients(chosen.credit(losses.numpy()), entry.step, entry.sigma)
    model.store.apply([Recipe(0, c, 0.01, touched)])
    if model.exact is not None:
        model.exact.update(0.01)
    assert all(torch.isfinite(t.float()).all() for tensor in model.saved() for t in tensor.pieces())


# ----------------------------------------------------------------------------- compute dtype


@cases(LOW)
def test_bf16_arithmetic_gives_near_losses_and_the_same_updates(
    tried: Tried, workshop: Workshop
) -> None:
    wide, low = tried.model, workshop.model(tried.case, torch.bfloat16)
    load_trained(low.store, tried.start)
    recipe = tried.recipe(KEY.step)
    losses, _ = low.losses(tried.batch, low.probe(tried.batch, KEY, SIGMA), sides=2)
    touched = low.take_touched(len(tried.examples))
    # Random networks amplify bf16's 0.4 %; a wrong operation would be off by the size of the loss.
    wanted = tried.losses()
    assert losses.dtype == torch.float32
    assert (losses - wanted).abs().mean() < 0.1 * wanted.mean()
    assert all(np.array_equal(a, b) for a, b in zip(touched, recipe.touched, strict=True))
    wide.store.apply([recipe])
    low.store.apply([recipe])
    assert saved_sha256(saved_tensors(low.store)) == saved_sha256(saved_tensors(wide.store))
