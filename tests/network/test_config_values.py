"""One meaning for "none" and "the usual", however a config or a GGUF file writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from edgezo.data.batches import Example, collate
from edgezo.data.tasks import Generation
from edgezo.data.trees import Row
from edgezo.errors import EdgezoError
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.foreign_config import read_config
from edgezo.network.generate import generate
from edgezo.network.loader import open_model
from edgezo.network.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(path: Path) -> Model:
    spec = ModelSpec(precision="fp32", train=("head",), directions="signs", seed=0, kind="text")
    return assemble(open_model(path), spec)


def computed(path: Path) -> tuple[list[float], list[list[int]]]:
    """What a model makes of rows: their losses, and the texts that it writes after them."""
    model = model_of(path)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 23, 14):
        ids = torch.randint(4, tiny_models.VOCAB, (length + 1,), generator=generator).tolist()
        rows.append(Row(ids[:-1], tuple(range(length)), ids[1:]))
    batch = collate([Example((row,), -1) for row in rows], range(3))
    prompts = [list(row.ids) for row in rows]
    texts = generate(model, prompts, Generation(5), lambda ids: False)[0]
    return [round(float(loss), 4) for loss in model.losses(batch)[0][0]], texts


@pytest.fixture(params=("1", "0"), ids=("kernels", "torch"))
def kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute: they must agree on every value."""
    if request.param == "0":
        monkeypatch.setattr("edgezo.machine.kernels.attention", lambda *_: None)


def changed(path: Path, **changes: Any) -> Path:
    values = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        if value is ...:
            values.pop(name, None)
        else:
            values[name] = value
    (path / "config.json").write_text(json.dumps(values))
    return path


# family, what the model is made with, spellings that all mean it
SPELLINGS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "no window of mistral": (
        "mistral",
        {"sliding_window": None},
        [{"sliding_window": value} for value in (0, -1, None)],
    ),
    "no window of phi3": (
        "phi3",
        {"sliding_window": None},
        [{"sliding_window": value} for value in (0, -1, ...)],
    ),
    "no window of qwen2": (
        "qwen2",
        {"use_sliding_window": False},
        [
            {"use_sliding_window": None, "sliding_window": 8, "layer_types": None},
            {"use_sliding_window": True, "sliding_window": 0, "layer_types": []},
            {"use_sliding_window": False, "max_window_layers": None, "layer_types": ...},
        ],
    ),
    "no window of gemma2": (
        "gemma2",
        {"sliding_window": None},
        [{"sliding_window": value} for value in (0, -1, None)],
    ),
    "no caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        [
            {"attn_logit_softcapping": 0, "final_logit_softcapping": 0.0},
            {"attn_logit_softcapping": None, "final_logit_softcapping": 0},
        ],
    ),
    "heads of the hidden width": (
        "llama",
        {"num_key_value_heads": 6},
        [
            {"head_dim": head_dim, "num_key_value_heads": keys}
            for head_dim, keys in ((None, None), (0, 0), (..., 6), (0, ...))
        ],
    ),
    "no scaling": (
        "llama",
        {},
        [
            *({"rope_parameters": ..., "rope_scaling": table} for table in (None, {})),
            {"rope_parameters": ..., "rope_scaling": {"type": None}},
            {"rope_parameters": ..., "rope_scaling": {"rope_type": "default"}},
            {"rope_parameters": ..., "rope_scaling": {"type": "none", "factor": 1.0}},
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 1.0}},
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": None}},
            {"rope_parameters": {"rope_type": None}, "rope_theta": None},
            {"rope_parameters": None, "rope_theta": 0, "partial_rotary_factor": None},
        ],
    ),
    "another base": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        [
            {"rope_parameters": ..., "rope_theta": 5e5},
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
            {"rope_scaling": {"type": "linear", "factor": 1}, "rope_theta": 5e5},
        ],
    ),
    "the usual scale of scores": (
        "gemma3_text",
        {"query_pre_attn_scalar": 256},
        [{"query_pre_attn_scalar": value} for value in (0, None, ...)],
    ),
}
CASES = [(name, at) for name, (_, _, ways) in SPELLINGS.items() for at in range(len(ways))]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("name", "at"), CASES)
def test_every_spelling_of_a_meaning_gives_one_model(name: str, at: int, tmp_path: Path) -> None:
    family, made, ways = SPELLINGS[name]
    plain = tiny_models.make(family, tmp_path / "plain", **made)
    spelled = changed(tiny_models.make(family, tmp_path / "spelled", **made), **ways[at])
    assert computed(plain) == computed(spelled)


def test_a_token_that_there_is_not_is_none(tmp_path: Path) -> None:
    path = changed(tiny_models.make("llama", tmp_path), bos_token_id=-1, eos_token_id=-1)
    config = read_config(path / "config.json")
    assert config.bos_token_id is None and config.eos_token_id is None
    assert open_model(path).end_ids == []


@pytest.mark.parametrize(
    "changes",
    (
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.22},
        {"logits_scaling": 8.0},
        {"scale_depth": 1.4},
        {"clip_qkv": 8},
        {"alibi": True},
        {"num_local_experts": 8},
        {"rope_theta": 20000.0},
    ),
    ids=str,
)
def test_what_would_make_another_model_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = changed(tiny_models.make("llama", tmp_path), **changes)
    with pytest.raises(EdgezoError, match=next(iter(changes))):
        open_model(path)


@pytest.mark.parametrize("neutral", ({"logits_scaling": 1.0}, {"clip_qkv": None}, {"alibi": False}))
def test_what_changes_nothing_is_passed_over(neutral: dict[str, Any], tmp_path: Path) -> None:
    open_model(changed(tiny_models.make("llama", tmp_path), **neutral))


# ----------------------------------------------------------------------------- GGUF

# family, what the model is made with, what its file says beside or in place of the converter's values
GGUF_SPELLINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "window 0": ("phi3", {"sliding_window": None}, {"phi3.attention.sliding_window": 0}),
    "window -1": ("phi3", {"sliding_window": None}, {"phi3.attention.sliding_window": -1}),
    "no window": ("phi3", {"sliding_window": None}, {"phi3.attention.sliding_window": None}),
    "window 0 of gemma2": (
        "gemma2",
        {"sliding_window": None},
        {"gemma2.attention.sliding_window": 0},
    ),
    "caps 0": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        {"gemma2.attn_logit_softcapping": 0.0, "gemma2.final_logit_softcapping": 0.0},
    ),
    "no key heads": (
        "qwen2",
        {"num_key_value_heads": 6},
        {"qwen2.attention.head_count_kv": None},
    ),
    "0 key heads": ("llama", {"num_key_value_heads": 6}, {"llama.attention.head_count_kv": 0}),
    "key heads of each layer": ("llama", {}, {"llama.attention.head_count_kv": [2, 2]}),
    "no width of a head": (
        "qwen3",
        {},
        {"qwen3.attention.key_length": None, "qwen3.rope.dimension_count": None},
    ),
    "scaling none": (
        "llama",
        {},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
    ),
    "factor 0": (
        "llama",
        {},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0},
    ),
    "a factor without a type": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"llama.rope.scaling.factor": 4.0},
    ),
    "the old name of a factor": (
        "qwen2",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"qwen2.rope.scale_linear": 2.0},
    ),
    "no base": ("llama", {}, {"llama.rope.freq_base": None}),
    "a part of a head rotated": (
        "phi3",
        {"partial_rotary_factor": 0.5},
        {"phi3.rope.dimension_count": 4},
    ),
    "scales of 1": ("llama", {}, {"llama.logit_scale": 1.0, "llama.residual_scale": 0.0}),
    "ids of no tokens": ("llama", {}, {"tokenizer.ggml.padding_token_id": 4294967295}),
    "windows by a pattern": (
        "gemma3_text",
        {"sliding_window_pattern": 2},
        {"gemma3.attention.sliding_window_pattern": [True, False, True]},
    ),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", GGUF_SPELLINGS)
def test_a_gguf_says_none_in_many_ways(name: str, tmp_path: Path) -> None:
    family, made, metadata = GGUF_SPELLINGS[name]
    made = made | ({"mlp_bias": False} if family == "llama" else {})
    plain = tiny_models.make(family, tmp_path / "plain", **made)
    file = tmp_path / "m.gguf"
    tiny_models.make_gguf(tiny_models.random_model(family, **made), file, metadata=metadata)
    assert computed(file) == computed(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    (
        ("logit_scale", 8.0),
        ("attention.scale", 0.0078125),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("attention.causal", False),
        ("rope.scaling.type", "yarn"),
        ("rope.dimension_count", 4),
        ("attention.value_length", 16),
    ),
)
def test_a_gguf_of_a_model_that_computes_otherwise_is_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    model = tiny_models.random_model("llama", mlp_bias=False)
    tiny_models.make_gguf(model, tmp_path / "m.gguf", metadata={f"llama.{key}": value})
    with pytest.raises(EdgezoError, match="safetensors checkpoint"):
        open_model(tmp_path / "m.gguf")


def test_a_key_that_nobody_reads_is_in_a_note(tmp_path: Path) -> None:
    model = tiny_models.random_model("llama", mlp_bias=False)
    file = tmp_path / "m.gguf"
    tiny_models.make_gguf(model, file, metadata={"llama.new_trick": 3})
    assert [note for note in open_model(file).notes if "llama.new_trick" in note]
