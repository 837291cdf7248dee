"""Loading: one tensor at a time from disk, with the values that transformers loads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from fuzz import readers
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from edgezo.errors import EdgezoError
from edgezo.network import cards
from edgezo.network.loader import build_meta, load_tokenizer, open_model, shape_of, source_names
from edgezo.weights import safetensors_file
from edgezo.weights.gguf_file import GgufSource
from edgezo.weights.gguf_header import GgufArray, read_header
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


def one_screen(message: str) -> bool:
    return len(message) < 1500 and message.count("\n") < 15


def try_reading(path: Path) -> None:
    """Do all that a run does with the weights. Nothing but an EdgezoError may be raised."""
    files = open_model(path)
    for stored in source_names(files, build_meta(files)).values():
        files.source.read(stored)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("intact")
    model = tiny_models.random_model("llama", mlp_bias=False)
    tiny_models.make_gguf(model, root / "m.gguf", tokenizer=True)
    return {"safetensors": tiny_models.make("llama", root / "hf"), "gguf": root / "m.gguf"}


def damaged(intact: dict[str, Path], form: str, tmp_path: Path, data: bytes) -> Path:
    if form == "gguf":
        (tmp_path / "m.gguf").write_bytes(data)
        return tmp_path / "m.gguf"
    (tmp_path / "config.json").write_bytes((intact[form] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


def contents(intact: dict[str, Path], form: str) -> bytes:
    path = intact[form]
    return (path / "model.safetensors" if path.is_dir() else path).read_bytes()


@pytest.mark.parametrize("form", ("safetensors", "gguf"))
@pytest.mark.parametrize("keep", (0, 3, 7, 100, 0.3, 0.9, -1))
def test_a_truncated_file_is_refused(
    form: str, keep: float, intact: dict[str, Path], tmp_path: Path
) -> None:
    data = contents(intact, form)
    cut = int(keep * len(data)) if isinstance(keep, float) else keep
    with pytest.raises(EdgezoError) as caught:
        open_model(damaged(intact, form, tmp_path, data[:cut]))
    assert one_screen(str(caught.value)) and any(c.isdigit() for c in str(caught.value))


@pytest.mark.parametrize("form", ("safetensors", "gguf"))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_header_is_an_error_or_harmless(
    form: str, where: float, bit: int, intact: dict[str, Path], tmp_path: Path
) -> None:
    data = bytearray(contents(intact, form))
    header = 8 + struct.unpack("<Q", data[:8])[0]
    if form == "gguf":
        header = min(t.offset for t in read_header(intact[form]).tensors.values())
    data[int(where * header)] ^= 1 << bit
    try:
        try_reading(damaged(intact, form, tmp_path, bytes(data)))
    except EdgezoError as problem:
        assert one_screen(str(problem))


def header_of(tensors: dict[str, Any], body: int) -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw + b"\0" * body


@pytest.mark.parametrize(
    ("data", "fault"),
    (
        (struct.pack("<Q", 1 << 60) + b"{}", "announces a header"),
        (struct.pack("<Q", 4) + b"{]}}", "cannot be read"),
        (header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4), "4 bytes"),
        (header_of({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, 4), "whole"),
        (header_of({"a": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}, 1), "F8_E5"),
        (
            header_of(
                {
                    "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                    "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
                },
                6,
            ),
            "overlaps",
        ),
        (header_of({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, 4), "hole"),
        (header_of({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, 5), "too many"),
        (header_of({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, 5), "missing"),
        (header_of({"a": [1]}, 0), "cannot be read"),
    ),
)
def test_an_inconsistent_safetensors_header_says_what_is_wrong(
    data: bytes, fault: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(EdgezoError, match=fault):
        open_tensors(tmp_path)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_a_value_that_is_not_finite_names_its_tensor(value: float, tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    tiny_models.write_weights(path, tensors)
    with pytest.raises(EdgezoError, match=name):
        open_model(path).source.read(name)


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    tiny_models.write_weights(path, tensors)
    files = open_model(path)
    with pytest.raises(EdgezoError) as caught:
        source_names(files, build_meta(files))
    assert "q_proj" in str(caught.value) and "model.norm.weight is [7]" in str(caught.value)


def test_incomplete_shards_and_foreign_shard_names_are_refused(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model", shards=3)
    lost = path / "model-00002-of-00003.safetensors"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(EdgezoError, match="lacks 1 of the 3 shards"):
        open_tensors(path)
    lost.write_bytes(kept)
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    good["weight_map"]["model.extra.weight"] = lost.name
    index.write_text(json.dumps(good))
    with pytest.raises(EdgezoError, match=r"model\.extra\.weight"):
        open_tensors(path)
    index.write_text(index.read_text().replace(lost.name, "../" + lost.name))
    with pytest.raises(EdgezoError, match="outside its directory"):
        open_tensors(path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(EdgezoError, match="pickled"):
        open_model(path)


@pytest.mark.parametrize(
    ("config", "fault"),
    (
        (None, r"no config\.json"),
        ("{", "cannot be read"),
        ("{}", "no model_type"),
        ('{"model_type": "mamba"}', "mamba.*llama, mistral"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid config"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            "already quantised",
        ),
    ),
)
def test_a_config_that_cannot_be_used_says_why(
    config: str | None, fault: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(EdgezoError, match=fault):
        open_model(tmp_path)


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path / "model")
    values = json.loads((path / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (path / "config.json").write_text(json.dumps(values))
    (path / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    assert type(build_meta(open_model(path))).__name__ == "LlamaForCausalLM"


def test_a_gguf_of_another_architecture_or_type_is_refused(tmp_path: Path) -> None:
    for arch, kind, fault in (("mamba", "F32", "'mamba'"), ("llama", "F64", "stored as F64")):
        file = tmp_path / f"{arch}-{kind}.gguf"
        writer = gguf.GGUFWriter(file, arch)
        values = np.zeros((4, 4), dtype=np.float64 if kind == "F64" else np.float32)
        writer.add_tensor("token_embd.weight", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(EdgezoError, match=fault):
            open_model(file)


# ----------------------------------------------------------------------------- cards' shapes


def test_the_shape_of_a_card_is_the_shape_of_its_config() -> None:
    card = cards.find_card("qwen3-0.6b")
    assert card is not None
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    shape = shape_of(config)
    assert all(getattr(card, name) == value for name, value in vars(shape).items())


# ----------------------------------------------------------------------------- numbers that lie


ENTRY = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
LYING_ENTRIES: dict[str, dict[str, Any]] = {
    "3000 axes": {"shape": [2] * 3000},
    "thousands of digits": {"shape": [10**4000] * 9},
    "an axis of thousands of digits": {"shape": [10**4000, 0]},
    "no axis for these bytes": {"shape": []},
    "offsets beyond all": {"data_offsets": [10**400, 10**400 + 32]},
    "one offset": {"data_offsets": [0]},
    "a negative axis": {"shape": [-2, -4]},
    "half an axis": {"shape": [2.0, 4]},
    "a list for a dtype": {"dtype": ["F32"]},
    "no shape": {"shape": None},
}


@pytest.mark.parametrize("name", LYING_ENTRIES)
def test_a_tensor_whose_numbers_lie_is_refused_before_they_are_multiplied(
    name: str, tmp_path: Path
) -> None:
    header = json.dumps({"x": ENTRY | LYING_ENTRIES[name]}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(EdgezoError, match=r"model\.safetensors") as caught:
        open_tensors(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_header_of_many_small_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    header = b"{" + b'"":0,' * 2000 + b'"":0}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(EdgezoError, match=r"2,001 fields in .* bytes, more than tensors need"):
        open_tensors(tmp_path)


def test_tensors_without_rows_are_read(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(0, 4), "y": torch.ones(3)}, tmp_path / "model.safetensors")
    source = open_tensors(tmp_path)
    assert source.read("x").shape == (0, 4)
    assert source.read("x", rows=slice(0, 0)).shape == (0, 4)
    assert source.same_bytes("x", "x") and source.read("y").sum() == 3


def gguf_of(folder: Path, **changes: Any) -> Path:
    """The sound GGUF file of the fuzz lane, with other values (``key=(type, bytes)``) or tensors."""
    sound = readers.sound_gguf()
    values = {key: (kind, value) for key, kind, value in sound.values}
    tensors = {name: (axes, kind, offset) for name, axes, kind, offset in sound.tensors}
    for name, change in changes.items():
        place = tensors if name.encode() in tensors or len(change) == 3 else values
        place[name.encode()] = change
    file = folder / "m.gguf"
    changed = sound._replace(
        values=[(key, *value) for key, value in values.items()],
        tensors=[(name, *tensor) for name, tensor in tensors.items()],
    )
    file.write_bytes(changed.encode())
    return file


def u64(*numbers: int) -> bytes:
    return b"".join(n.to_bytes(8, "little") for n in numbers)


LYING_GGUF: dict[str, dict[str, Any]] = {
    "a count without end": {"more": (9, (8).to_bytes(4, "little") + u64(2**63))},
    "an array of arrays": {"more": (9, (9).to_bytes(4, "little") + u64(3))},
    "numbers without end": {"more": (9, (10).to_bytes(4, "little") + u64(2**61))},
    "no rows": {"blk.0.attn_q.weight": ((48, 0), 0, 0)},
    "axes whose product overflows": {"blk.0.attn_q.weight": ((2**32,) * 4, 0, 0)},
    "an offset beyond all": {"blk.0.attn_q.weight": ((48, 48), 0, 2**64 - 32)},
    "a text for a size": {"llama.block_count": (8, u64(3) + b"abc")},
    "an array for a size": {
        "llama.block_count": (9, (4).to_bytes(4, "little") + u64(1) + b"\1\0\0\0")
    },
    "no base of positions": {"llama.rope.freq_base": (8, u64(3) + b"abc")},
    "a base that is no number": {"llama.rope.freq_base": (6, b"\0\0\xc0\x7f")},
    "a scale that is no number": {
        "llama.rope.scaling.type": (8, u64(6) + b"linear"),
        "llama.rope.scaling.factor": (8, u64(1) + b"x"),
    },
    "heads of a gigabyte": {"llama.attention.key_length": (4, (2**30).to_bytes(4, "little"))},
}


@pytest.mark.parametrize("name", LYING_GGUF)
def test_a_gguf_whose_numbers_lie_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(EdgezoError, match=r"m\.gguf"):
        open_model(gguf_of(tmp_path, **LYING_GGUF[name]))


def test_a_long_array_of_a_gguf_is_passed_over_and_counted(tmp_path: Path) -> None:
    array = (0).to_bytes(4, "little") + u64(5000) + bytes(5000)
    header = read_header(gguf_of(tmp_path, more=(9, array)))
    assert header.metadata["more"] == GgufArray(5000)
    assert header.metadata["tokenizer.ggml.tokens"] == GgufArray(tiny_models.VOCAB)
    open_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "weight_map",
    [
        {"x": "../model.safetensors"},
        {"x": "a\0b"},
        {"x": 3},
        ["x"],
        {"x": "y" * 5000},
        {"x": "\ud800"},
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(EdgezoError) as caught:
        open_tensors(tmp_path)
    assert len(str(caught.value)) < 1000
