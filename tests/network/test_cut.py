"""A model cut below its first trained block: the same losses as the whole model's, from either half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from workshop import KEY, LABEL_IDS, SIGMA, make_examples, settle

from edgezo.data.batches import Batch, collate
from edgezo.errors import EdgezoError
from edgezo.network import loader
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.model import Model
from edgezo.zo.masks import Mask
from edgezo.zo.noise import Key

KINDS = ("label", "choice", "completion")
LAYERS = {"gpt2": "n_layer"}  # where a family names the number of blocks otherwise
BLOCKS, FIRST = 4, 2

pytestmark = pytest.mark.usefixtures("one_thread")
Maker = Callable[..., Model]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Makes a model of a family with four blocks."""
    paths: dict[Any, Path] = {}

    def made(family: str, half: str = "whole", first: int = FIRST, **changes: Any) -> Model:
        shape = {LAYERS.get(family, "num_hidden_layers"): BLOCKS, **changes.pop("shape", {})}
        key = (family, *sorted(shape.items()))
        if key not in paths:
            path = tmp_path_factory.mktemp(family)
            paths[key] = tiny_models.make(family, path, dtype=torch.float32, **shape)
        settings: dict[str, Any] = {
            "precision": "fp32",
            "train": ("lowrank", "norms"),
            "directions": "signs",
            "seed": 3,
            "rank": 4,
            "kind": "label",
            "label_ids": LABEL_IDS,
        }
        files = loader.open_model(paths[key])
        return assemble(files, ModelSpec(**settings | changes, first_trained=first, half=half))

    return made


class OnlyThese(Mask):
    """Perturbs nothing but tensors of these names."""

    def __init__(self, names: Sequence[str]):
        self.names = set(names)

    def scale(self, key: Key, trainable: Any, finetuned: float = 1.0) -> float:
        return float(trainable.target.name in self.names)


def batch_of(model: Model, kind: str) -> Batch:
    examples = make_examples(kind, model.masked)
    return collate(examples, range(len(examples)))


def losses(model: Model, batch: Batch, key: Key = KEY) -> Tensor:
    return model.losses(batch, model.probe(batch, key, SIGMA), sides=2)[0]


def upper_names(model: Model) -> list[str]:
    """What is trained of a whole model, without what the cut freezes."""
    number = model.blocks_name + "."
    below = [f"{number}{i}." for i in range(FIRST)]
    names = []
    for name in model.store.trainables:
        before_blocks = ".embeddings." in name or "project_in" in name
        if not before_blocks and not any(name.startswith(prefix) for prefix in below):
            names.append(name)
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_cut_model_has_the_losses_of_the_whole_one(build: Maker, family: str, kind: str) -> None:
    whole, cut = build(family, first=0, kind=kind), build(family, kind=kind)
    names = upper_names(whole)
    whole.store.keep_only(names)
    whole.store.mask = OnlyThese(names)
    assert list(cut.store.trainables) == list(whole.store.trainables)
    settle(whole)
    settle(cut)
    batch = batch_of(whole, kind)
    torch.testing.assert_close(losses(cut, batch), losses(whole, batch), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("family", "kind", "precision"),
    [
        *((family, kind, "fp32") for family in tiny_models.FAMILIES for kind in KINDS),
        *((f, "label", p) for f in ("llama", "gpt2", "roberta") for p in ("bf16", "int8", "int4")),
    ],
)
def test_halves_give_the_bits_of_the_cut_model(
    build: Maker, family: str, kind: str, precision: str
) -> None:
    shared = {"kind": kind, "precision": precision}
    cut, below, above = (build(family, half, **shared) for half in ("whole", "below", "above"))
    batch = batch_of(cut, kind)
    assert not below.store.trainables
    assert list(above.store.trainables) == list(cut.store.trainables)
    settle(cut)
    settle(above)
    above.kept_states = below.states_at_cut
    assert torch.equal(losses(above, batch), losses(cut, batch))
    assert torch.equal(above.losses(batch)[1], cut.losses(batch)[1])


def test_cut_of_a_model_whose_embeddings_are_narrower(build: Maker) -> None:
    narrow = {"shape": {"word_embed_proj_dim": 16, "do_layer_norm_before": False}}
    halves = [build("opt", half, **narrow) for half in ("whole", "below", "above")]
    cut, below, above = halves
    batch = batch_of(cut, "label")
    assert not below.store.trainables
    assert not any("project_in" in name for name in cut.store.trainables)
    above.kept_states = below.states_at_cut
    assert torch.equal(losses(above, batch), losses(cut, batch))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", ["full", "lora", "scales"])
def test_other_parts_and_heads(build: Maker, train: str, tied: bool) -> None:
    shared = {"train": (train,), "shape": {"tie_word_embeddings": tied}}
    cut, below, above = (build("llama", half, **shared) for half in ("whole", "below", "above"))
    batch = batch_of(cut, "label")
    above.kept_states = below.states_at_cut
    if train == "lora":
        for model in (cut, above):
            model.losses(batch, learn=0.25)
            model.learned["lora"].update(1e-2)
        before = cut.learned["lora"].trained()
        after = above.learned["lora"].trained()
        assert before.keys() == after.keys()
        assert not any(f".layers.{i}." in name for i in range(FIRST) for name in before)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(bool(t.any()) for name, t in after.items() if name.endswith("lora_B"))
    assert torch.equal(losses(above, batch), losses(cut, batch))


def test_upper_half_holds_no_table_and_no_lower_block(build: Maker) -> None:
    names = set(build("llama", "above").store.layouts)
    assert not any("embed_tokens" in n or ".layers.0." in n or ".layers.1." in n for n in names)
    assert any(".layers.2." in name for name in names)
    names = set(build("llama", "below").store.layouts)
    assert not any(".layers.2." in n or ".layers.3." in n or "lm_head" in n for n in names)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_frozen_blocks_stay_as_the_checkpoint_has_them(build: Maker, family: str) -> None:
    model = build(family, train=("full",), kind="completion")
    frozen = [n for n in model.store.layouts if n not in model.store.trainables]
    assert any(f"{model.blocks_name}.0." in name for name in frozen)
    assert not any(f"{model.blocks_name}.{FIRST}." in name for name in frozen)


def test_model_without_a_cut_has_none(build: Maker) -> None:
    model = build("llama", first=0)
    assert model.cut is None
    with pytest.raises((AssertionError, EdgezoError)):
        model.states_at_cut(batch_of(model, "label"))
