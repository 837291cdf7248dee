"""Rotary positions: a row is turned as it would be alone, whatever passes beside it or passed before it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from edgezo.data.batches import Example, collate
from edgezo.data.tasks import Generation
from edgezo.data.trees import Row
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.generate import generate
from edgezo.network.loader import open_model
from edgezo.network.model import Model
from edgezo.network.rotary import longrope_switch
from edgezo.zo.noise import Key

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL = 32  # positions before scaling begins
HALF_HEAD = {"llama": 4, "mistral": 4, "qwen2": 4, "phi3": 4, "qwen3": 8, "gemma3_text": 8}
FACTORS = {"short_factor": 1.0, "long_factor": 3.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}


def rope(scaling: str, family: str) -> dict[str, Any]:
    table = {"rope_type": scaling, "rope_theta": 10000.0, **SCALINGS[scaling]}
    if scaling == "longrope":
        table |= {name: [factor] * HALF_HEAD[family] for name, factor in FACTORS.items()}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return {"full_attention": table, "sliding_attention": local}
    return table


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(family: str, scaling: str) -> tuple[Path, Model]:
        long = {"max_position_embeddings": ORIGINAL, "rope_parameters": rope(scaling, family)}
        if family == "phi3":
            long["original_max_position_embeddings"] = ORIGINAL
        path = tiny_models.make(family, tmp_path_factory.mktemp("rope") / family, **long)
        spec = ModelSpec(precision="fp32", train=("head",), directions="signs", seed=0, kind="text")
        return path, assemble(open_model(path), spec)

    return make


def rows(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(sum(lengths))
    made = []
    for length in lengths:
        ids = torch.randint(4, tiny_models.VOCAB, (length + 1,), generator=generator).tolist()
        made.append(Example((Row(ids[:-1], tuple(range(length)), ids[1:]),), -1))
    return made


def losses(model: Model, examples: list[Example]) -> torch.Tensor:
    return model.losses(collate(examples, range(len(examples))))[0][0]


# Of Phi-3, transformers knows longrope only.
CASES = [(f, s) for f in HALF_HEAD for s in SCALINGS if f != "phi3" or s in ("default", "longrope")]


@pytest.mark.parametrize(("family", "scaling"), CASES)
def test_a_row_costs_the_same_alone_and_in_any_pack(
    family: str, scaling: str, model_of: Any
) -> None:
    path, model = model_of(family, scaling)
    examples = rows(9, 45, ORIGINAL, 70, ORIGINAL + 1, 20)
    together = losses(model, examples)
    backwards = losses(model, examples[::-1]).flip(0)
    alone = torch.cat([losses(model, [e]) for e in examples])
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(
        backwards, alone, atol=1e-5
    )
    for example, loss in zip(examples, alone, strict=True):
        row = example.rows[0]
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = theirs(torch.tensor([row.ids])).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row.score_ids))
        assert float(loss) == pytest.approx(float(expected), abs=2e-5)


@pytest.mark.parametrize("scaling", ("dynamic", "longrope"))
@pytest.mark.parametrize("family", ("llama", "gemma3_text"))
def test_the_two_sides_of_a_row_are_turned_alike(family: str, scaling: str, model_of: Any) -> None:
    _, model = model_of(family, scaling)
    batch = collate(rows(9, 70, 40), range(3))
    both = model.losses(batch, model.probe(batch, Key(0, 0), 0.0), sides=2)[0]
    assert torch.allclose(both[0], both[1], atol=1e-6)
    assert torch.allclose(both[0], model.losses(batch)[0][0], atol=1e-5)


@pytest.mark.parametrize("scaling", ("dynamic", "yarn", "longrope"))
def test_a_text_is_the_same_whoever_is_written_beside_it(scaling: str, model_of: Any) -> None:
    _, model = model_of("llama", scaling)
    prompts = [list(e.rows[0].ids) for e in rows(5, 60, 40)]
    limits = Generation(6, ())
    together = generate(model, prompts, limits, lambda ids: False)[0]
    alone = [generate(model, [p], limits, lambda ids: False)[0][0] for p in prompts]
    assert together == alone


def test_the_switch_of_longrope_is_known(model_of: Any) -> None:
    assert longrope_switch(open_model(model_of("llama", "longrope")[0]).config) == ORIGINAL
    assert longrope_switch(open_model(model_of("llama", "yarn")[0]).config) is None
