"""Loading: files that are damaged, that lie, or that edgezo does not read, each with an error that says which."""

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
from fuzz import cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from edgezo.errors import EdgezoError
from edgezo.network import cards
from edgezo.network.loader import build_meta, open_model, shape_of, source_names
from edgezo.weights.gguf_header import GgufArray, read_header
from edgezo.weights.tensor_source import open_tensors

pytestmark = pytest.mark.usefixtures("own_cache")


def one_screen(message: str) -> bool:
    return len(message) < 1500 and message.count("\n") < 15


def try_reading(path: Path) -> None:
    """Do all that a run does with the weights. Nothing but an EdgezoError may be raised."""
    files = open_model(path)
    for stored in source_names(files, build_meta(files)).values():
        files.source.read(stored)


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
    sound = cases.sound_gguf()
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
