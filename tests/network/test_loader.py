"""Loading: one tensor at a time from disk, with the values that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from edgezo.errors import EdgezoError
from edgezo.network import cards
from edgezo.network.loader import build_meta, load_tokenizer, open_model, shape_of, source_names
from edgezo.weights import safetensors_file
from edgezo.weights.gguf_file import GgufSource
from edgezo.weights.tensor_source import open_tensors

BLOCK_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
PLAIN_TYPES = ("F32", "F16", "BF16")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "cache"))


def load(path: Path) -> nn.Module:
    """The module with every tensor read and assigned, in float32."""
    files = open_model(path)
    module = build_meta(files)
    parameters = dict(module.named_parameters())
    real = {
        parameters[name]: nn.Parameter(files.source.read(stored).float(), requires_grad=False)
        for name, stored in source_names(files, module).items()
    }
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = real[parameter]
    return module


def logits(module: nn.Module) -> torch.Tensor:
    ids = torch.randint(4, tiny_models.VOCAB, (2, 19), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return module(ids).logits


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_logits_equal_those_of_transformers_own_loading(family: str, tmp_path: Path) -> None:
    path = tiny_models.make(family, tmp_path / "model")
    theirs = tiny_models.auto_class(family).from_pretrained(path, dtype=torch.float32).eval()
    assert same(logits(load(path)), logits(theirs))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("tied", (True, False))
def test_every_parameter_is_found_and_counted(family: str, tied: bool, tmp_path: Path) -> None:
    files = open_model(tiny_models.make(family, tmp_path / "model", tied=tied))
    module = build_meta(files)
    parameters = dict(module.named_parameters())
    assert set(source_names(files, module)) == set(parameters)
    assert all(p.is_meta and not p.requires_grad for p in parameters.values())
    assert not any(buffer.is_meta for buffer in module.buffers())
    if family == "roberta" and not tied:
        return  # its head bias is then stored twice; no published checkpoint is untied
    assert shape_of(files.config).parameters == sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_shards_give_the_tensors_of_a_single_file(family: str, tmp_path: Path) -> None:
    single = open_tensors(tiny_models.make(family, tmp_path / "one"))
    sharded = open_tensors(tiny_models.make(family, tmp_path / "three", shards=3))
    assert set(single.names) == set(sharded.names) and len(sharded.files) == 3
    assert all(torch.equal(single.read(n), sharded.read(n)) for n in single.names)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_tensor_has_the_stored_bits_and_memory_of_its_own(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tiny_models.make("llama", tmp_path / "model", dtype=dtype)
    source, theirs = open_tensors(path), load_file(path / "model.safetensors")
    for name, expected in theirs.items():
        tensor = source.read(name)
        assert tensor.dtype == source.dtype(name) == dtype and source.shape(name) == tensor.shape
        assert torch.equal(tensor, expected)
        assert tensor.nbytes == source.nbytes(name) == tensor.untyped_storage().nbytes()


RENAMED = {
    "gpt2": lambda n: n.removeprefix("transformer."),
    "opt": lambda n: n.removeprefix("model."),
    "roberta": lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ),
    "gemma3_text": lambda n: "language_model." + n,
    "llama": lambda n: n.replace("model.", "model.language_model."),
}


@pytest.mark.parametrize("family", RENAMED)
def test_older_tensor_names_load_the_same_model(family: str, tmp_path: Path) -> None:
    path = tiny_models.make(family, tmp_path / "model")
    expected = logits(load(path))
    tensors = load_file(path / "model.safetensors")
    renamed = {RENAMED[family](name): tensor for name, tensor in tensors.items()}
    assert set(renamed) != set(tensors)
    tiny_models.write_weights(path, renamed)
    assert torch.equal(logits(load(path)), expected)


def test_a_tied_model_loads_from_the_head_alone(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model")
    expected = logits(load(path))
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    tiny_models.write_weights(path, tensors)
    assert torch.equal(logits(load(path)), expected)


@pytest.mark.parametrize("equal", (True, False))
def test_two_stored_matrices_are_tied_only_if_they_are_equal(equal: bool, tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1.0 if equal else 2.0)
    tiny_models.write_weights(path, tensors)
    names = dict(build_meta(open_model(path)).named_parameters())
    assert ("lm_head.weight" in names) is not equal


def test_the_content_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    first = open_model(tiny_models.make("llama", tmp_path / "a"))
    again = open_model(tiny_models.make("llama", tmp_path / "b"))
    other = open_model(tiny_models.make("llama", tmp_path / "c", seed=1))
    sharded = open_model(tiny_models.make("llama", tmp_path / "d", shards=2))
    hashes = [files.content_hash for files in (first, again, other, sharded)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert all(len(h) == 64 for h in hashes)


@pytest.mark.parametrize("form", ("safetensors", "gguf"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_reading_in_another_dtype_is_reading_and_rounding(
    form: str, dtype: torch.dtype, intact: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE_ELEMENTS", 1000)
    source = open_model(intact[form]).source
    for name in source.names:
        tensor = source.read(name, dtype)
        assert tensor.dtype == dtype and torch.equal(tensor, source.read(name).to(dtype))


def test_a_changed_byte_changes_a_remembered_hash(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\0" * 100)
    before = cards.file_sha256(file)
    file.write_bytes(b"\0" * 99 + b"\1")
    assert cards.file_sha256(file) != before


# ----------------------------------------------------------------------------- GGUF


def quantised_file(kind: str, file: Path, rows: int, columns: int) -> tuple[GgufSource, Any]:
    """A GGUF of a llama with one matrix of ``kind``, and the values that gguf decodes it to."""
    model = tiny_models.random_model(
        "llama",
        hidden_size=columns,
        intermediate_size=columns,
        vocab_size=rows,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    stored = tiny_models.make_gguf(model, file, matrix_type=kind)["token_embd.weight"]
    return GgufSource(file), dequantize(stored, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", ["safetensors", "F16", "Q8_0", "Q4_1"])
def test_rows_of_an_embedding_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    if kind == "safetensors":
        source = open_tensors(tiny_models.make("llama", tmp_path / "model"))
    else:
        source, _ = quantised_file(kind, tmp_path / "m.gguf", 37, 64)
    whole = source.read(name, torch.bfloat16)
    for rows in (slice(0, 3), slice(7, 8), slice(len(whole) - 5, len(whole))):
        assert torch.equal(source.read(name, torch.bfloat16, rows), whole[rows])


@pytest.mark.parametrize("kind", (*PLAIN_TYPES, *BLOCK_TYPES))
def test_every_type_reads_as_gguf_decodes_it(kind: str, tmp_path: Path) -> None:
    columns = 256 if kind.endswith("_K") else 64
    source, expected = quantised_file(kind, tmp_path / "m.gguf", 37, columns)
    tensor = source.read("model.embed_tokens.weight")
    wanted = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert tensor.dtype == source.dtype("model.embed_tokens.weight") == wanted
    assert np.array_equal(tensor.float().numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("kind", ("BF16", "Q4_1", "Q6_K"))
def test_the_piece_size_does_not_change_a_value(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    source, _ = quantised_file(kind, file, 37, 256)
    for piece in (1, 300, 1000, 1 << 20):
        other = GgufSource(file, piece_elements=piece)
        assert all(torch.equal(source.read(n), other.read(n)) for n in source.names)


@pytest.mark.parametrize("family", tuple(tiny_models._GGUF_ARCHITECTURES))
@pytest.mark.parametrize("tied", (True, False))
def test_a_gguf_gives_the_logits_of_the_model_it_was_made_of(
    family: str, tied: bool, tmp_path: Path
) -> None:
    if family == "gemma2" and not tied:
        return  # llama.cpp has no separate head for it
    # A GGUF has no keys for these settings, for which llama.cpp has conventions.
    changes: dict[str, Any] = {
        "gemma3_text": {"sliding_window_pattern": 6},
    }.get(family, {})
    model = tiny_models.random_model(family, tied=tied, **changes)
    tiny_models.make_gguf(model, tmp_path / "m.gguf")
    assert same(logits(load(tmp_path / "m.gguf")), logits(model))


def test_a_quantised_gguf_gives_the_logits_of_transformers_own_loading(tmp_path: Path) -> None:
    model = tiny_models.random_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        attention_bias=False,
        mlp_bias=False,
    )
    tiny_models.make_gguf(model, tmp_path / "m.gguf", matrix_type="Q8_0", tokenizer=True)
    theirs = tiny_models.auto_class("llama").from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    assert same(logits(load(tmp_path / "m.gguf")), logits(theirs.eval()))


def test_llama_3_frequency_factors_become_its_rope_rule(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_models.random_model(
        "llama", mlp_bias=False, head_dim=64, rope_parameters=rope, max_position_embeddings=131072
    )
    rotary = model.model.rotary_emb
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    factors = (plain / rotary.inv_freq.double()).float().numpy()
    assert factors.max() > 31
    tiny_models.make_gguf(model, tmp_path / "m.gguf", more={"rope_freqs.weight": factors})
    built = build_meta(open_model(tmp_path / "m.gguf"))
    assert torch.allclose(built.model.rotary_emb.inv_freq, rotary.inv_freq, rtol=1e-5)


# ----------------------------------------------------------------------------- tokenizer


def test_directory_and_gguf_tokenizers_agree(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model", tokenizer=True)
    model = tiny_models.random_model("llama")
    tiny_models.make_gguf(model, tmp_path / "m.gguf", tokenizer=True)
    first, second = load_tokenizer(path), load_tokenizer(tmp_path / "m.gguf")
    text = "the good bar, in a tin.  12 oo\n"
    assert first(text)["input_ids"] == second(text)["input_ids"]
    assert first.decode(first(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "a bad tin"}]
    asked = [
        t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for t in (first, second)
    ]
    assert asked[0] == asked[1] and asked[0].endswith("assistant ")
    for tokenizer in (first, second):
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert ids == (1, 2, 0) and tokenizer.is_fast


def test_a_tokenizer_without_a_pad_token_pads_with_the_end(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model", tokenizer=True)
    config = path / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["pad_token"]
    config.write_text(json.dumps(values))
    assert load_tokenizer(path).pad_token_id == AutoTokenizer.from_pretrained(path).eos_token_id


def test_digits_stand_alone_where_the_merges_were_learned_so(tmp_path: Path) -> None:
    model = tiny_models.random_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        add = gguf.GGUFWriter.add_tokenizer_pre
        patch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda w, _: add(w, "smollm"))
        tiny_models.make_gguf(model, tmp_path / "m.gguf", tokenizer=True)
    pieces = load_tokenizer(tmp_path / "m.gguf").backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in pieces("a  12")] == ["a", "ĠĠ", "1", "2"]


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model")
    with pytest.raises(EdgezoError, match="tokenizer"):
        load_tokenizer(path)


# ----------------------------------------------------------------------------- bad input
