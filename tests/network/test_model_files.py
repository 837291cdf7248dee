"""What is given as a model: parts, other names, stand-ins, and files that another program reads. And what is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from edgezo.errors import EdgezoError
from edgezo.network import cards
from edgezo.network.loader import load_tokenizer, open_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 269060552\n"


def split(file: Path, folder: Path, count: int, **changes: Any) -> list[Path]:
    """The model of a GGUF file in parts, the metadata in the first one."""
    reader = gguf.GGUFReader(str(file))
    tensors = reader.tensors
    folder.mkdir(exist_ok=True)
    parts = [folder / f"m-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    share = -(-len(tensors) // count)
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "qwen2")
        for name, field in reader.fields.items() if number == 0 else ():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), kind, inner)
        writer.add_uint16("split.no", changes.get("no", number))
        writer.add_uint16("split.count", changes.get("count", count))
        writer.add_int32("split.tensors.count", changes.get("total", len(tensors)))
        for tensor in tensors[number * share : (number + 1) * share]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    tiny_models.make_gguf(tiny_models.random_model("qwen2"), file, tokenizer=True)
    return file


# ----------------------------------------------------------------------------- parts and names


@pytest.mark.parametrize("count", (2, 3, 5))
@pytest.mark.parametrize("given", ("folder", "first", "last"))
def test_parts_are_one_model_whichever_is_given(
    count: int, given: str, whole: Path, tmp_path: Path
) -> None:
    parts = split(whole, tmp_path / "parts", count)
    path = {"folder": tmp_path / "parts", "first": parts[0], "last": parts[-1]}[given]
    files, one = open_model(cards.resolve(str(path))), open_model(whole)
    assert files.source.files == parts and files.config.to_dict() == one.config.to_dict()
    assert set(files.source.names) == set(one.source.names)
    for name in one.source.names:
        assert torch.equal(files.source.read(name), one.source.read(name))
    tokens = [load_tokenizer(p)("a good tin")["input_ids"] for p in (files.path, whole)]
    assert tokens[0] == tokens[1] and files.end_ids == one.end_ids


def test_a_part_that_is_not_there_is_named(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path / "parts", 3)
    parts[1].unlink()
    for given in (parts[0], parts[2]):
        with pytest.raises(EdgezoError, match=r"one of 3 parts.*m-00002-of-00003\.gguf"):
            open_model(given)


def test_a_part_under_another_name_says_how_parts_are_named(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path / "parts", 2)
    renamed = parts[0].rename(tmp_path / "sha256-0123")
    with pytest.raises(EdgezoError, match=r"part 0 of 2 .*-of-00002\.gguf") as caught:
        open_model(cards.resolve(str(renamed)))
    assert "llama-gguf-split --merge" in str(caught.value)


@pytest.mark.parametrize("changes", ({"no": 0}, {"total": 99}), ids=str)
def test_parts_that_do_not_belong_together_are_refused(
    changes: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    parts = split(whole, tmp_path / "parts", 2, **changes)
    with pytest.raises(EdgezoError, match="parts again"):
        open_model(parts[0])


@pytest.mark.parametrize("name", ("sha256-" + "0f" * 32, "model.bin", "weights"))
def test_a_gguf_is_known_by_its_first_bytes(name: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(whole.read_bytes())
    path = cards.resolve(str(tmp_path / name))
    assert open_model(path).shape == open_model(whole).shape
    assert load_tokenizer(path)("tin")["input_ids"] == load_tokenizer(whole)("tin")["input_ids"]


# ----------------------------------------------------------------------------- advice that is the way out

PICKLE, ZIP = b"\x80\x02}q\x00.", b"PK\x03\x04" + b"\0" * 60
FILES: dict[str, tuple[str, bytes, str]] = {
    "git-lfs": ("m.gguf", LFS.encode(), "git lfs pull"),
    "a page": ("m.gguf", b"<!DOCTYPE html><html>", "hf download"),
    "torch": ("pytorch_model.bin", ZIP, "from_pretrained"),
    "old torch": ("consolidated.00.pth", PICKLE, "from_pretrained"),
    "onnx": ("model.onnx", b"\x08\x07\x12\x04", "ONNX"),
    "mlx": ("weights.npz", ZIP, "PyTorch, or another zip"),
    "one file of a directory": ("model.safetensors", b"\x08" + b"\0" * 7 + b"{}", "directory"),
    "nothing": ("m.gguf", b"", "empty"),
    "ggml": ("ggml-model.bin", b"lmgg" + b"\0" * 40, "before GGUF"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_model_says_what_it_is(name: str, tmp_path: Path) -> None:
    file, content, way_out = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(EdgezoError, match=way_out) as caught:
        cards.resolve(str(tmp_path / file))
    assert "fetch it again" not in str(caught.value) or name == "nothing"


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "a run": ({"journal.bin": ""}, "edgezo export"),
    "an adapter": (
        {
            "adapter_config.json": '{"base_model_name_or_path": "org/base"}',
            "adapter_model.safetensors": "",
        },
        "for org/base.*merge_and_unload",
    ),
    "an adapter of a run": (
        {"adapter_config.json": "{}", "edgezo.json": "{}"},
        "edgezo export RUN --format hf",
    ),
    "onnx": ({"model.onnx": ""}, "safetensors checkpoint"),
    "a model inside": ({"main/config.json": "{}"}, "give .*main"),
    "ollama": ({"sha256-aa": "x", "sha256-bb": "xxxx"}, "sha256-bb"),
    "weights alone": ({"model.safetensors": ""}, "config.json"),
    "pickled": ({"pytorch_model.bin": ""}, "from_pretrained"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_model_says_what_it_is(name: str, tmp_path: Path) -> None:
    files, way_out = FOLDERS[name]
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    with pytest.raises(EdgezoError, match=way_out):
        cards.resolve(str(tmp_path))


def test_an_adapter_with_the_config_of_its_base_is_told_from_a_model(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path)
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(EdgezoError, match="only an adapter for org/base"):
        open_model(path)


@pytest.mark.parametrize(
    "file", ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
)
def test_a_pointer_of_git_lfs_is_known_wherever_it_stands(file: str, tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path, tokenizer=True)
    (path / file).write_text(LFS)
    with pytest.raises(EdgezoError, match=f"{file} is a pointer of git-lfs.*git lfs pull"):
        open_model(path)
        load_tokenizer(path)


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    (
        (f"{QUERY}.weight", torch.zeros(48, 48).to(torch.float8_e4m3fn), "stored as F8_E4M3"),
        (f"{QUERY}.weight", torch.zeros(48, 48).to(torch.float8_e5m2), "stored as F8_E5M2"),
        (f"{QUERY}.weight", torch.zeros(48, 6, dtype=torch.uint32), "stored as U32"),
        (f"{QUERY}.weight", torch.zeros(48, 48, dtype=torch.int8), "is int8"),
        (f"{QUERY}.qweight", torch.zeros(6, 48, dtype=torch.int32), "GPTQ or AWQ"),
        (f"{QUERY}.weight_packed", torch.zeros(6, 48, dtype=torch.int32), "compressed-tensors"),
        (f"{QUERY}.weight.absmax", torch.zeros(36), "bitsandbytes"),
        (f"{QUERY}.weight_scale_inv", torch.ones(1, 1), "fp8"),
    ),
)
def test_codes_of_another_library_say_what_to_give_instead(
    name: str, tensor: torch.Tensor, said: str, tmp_path: Path
) -> None:
    path = tiny_models.make("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    if name.endswith(".weight"):
        del tensors[name]
    save_file(tensors | {name: tensor}, path / "model.safetensors")
    with pytest.raises(EdgezoError, match=said) as caught:
        open_model(path).notes  # noqa: B018
    message = str(caught.value)
    assert "GGUF file" in message and "fetch it again" not in message.lower()


def test_codes_of_mlx_are_known_by_their_config(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path)
    values = json.loads((path / "config.json").read_text())
    values["quantization"] = {"group_size": 64, "bits": 4}
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(EdgezoError, match=r"codes of MLX \(4 bits\)"):
        open_model(path)


def test_a_tokenizer_of_sentencepiece_alone_names_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.make("mistral", tmp_path)
    (path / "tokenizer.model").write_bytes(b"\x0a\x00")
    monkeypatch.setattr("edgezo.network.foreign_tokenizer.find_spec", lambda name: None)
    with pytest.raises(EdgezoError, match="pip install sentencepiece"):
        load_tokenizer(path)


# ----------------------------------------------------------------------------- tensors that nobody reads

UNUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "biases of attention": ("llama", {}, {"attention_bias": False}, r"8 tensors .*self_attn"),
    "biases of inner layers": ("llama", {}, {"mlp_bias": False}, r"6 tensors .*mlp"),
    "layers": (
        "mistral",
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 2},
        r"18 tensors .*layers\.2",
    ),
    "norms of queries": ("qwen3", {}, {"model_type": "mistral"}, r"4 tensors .*norm"),
    "layers of gpt2": ("gpt2", {"n_layer": 3}, {"n_layer": 1}, r"22 tensors .*h\.1"),
}


@pytest.mark.parametrize("name", UNUSED)
def test_tensors_that_the_config_does_not_ask_for_are_in_a_note(name: str, tmp_path: Path) -> None:
    family, made, changes, noted = UNUSED[name]
    path = tiny_models.make(family, tmp_path, **made)
    assert open_model(path).notes == []
    values = json.loads((path / "config.json").read_text()) | changes
    if "n_layer" not in changes:
        values.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(values))
    [note] = open_model(path).notes
    assert re.match(noted, note), note


@pytest.mark.parametrize(
    ("tensor", "noted"),
    (
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),
        ("model.rotary_emb.inv_freq", False),
        ("vision_tower.layer.weight", False),
        ("lm_head.weight", False),  # a copy of the tied embedding
        ("v_head.summary.weight", True),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", True),
        ("model.layers.0.self_attn.q_norm.weight", True),
        ("model.layers.2.input_layernorm.weight", True),
    ),
)
def test_buffers_and_copies_are_no_unread_tensors(tensor: str, noted: bool, tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors[tensor] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    assert [tensor in note for note in open_model(path).notes] == ([True] if noted else [])


def test_a_gguf_with_biases_that_the_family_has_not_says_so(tmp_path: Path) -> None:
    model = tiny_models.random_model("qwen2")
    bias = {"blk.0.ffn_up.bias": np.ones(80, np.float32)}
    tiny_models.make_gguf(model, tmp_path / "m.gguf", more=bias)
    [note] = open_model(tmp_path / "m.gguf").notes
    assert "1 tensors" in note and "mlp.up_proj.bias" in note


def test_tensors_that_the_config_asks_for_are_refused_before_a_weight_is_read(
    tmp_path: Path,
) -> None:
    path = tiny_models.make("mistral", tmp_path)
    values = json.loads((path / "config.json").read_text()) | {"model_type": "qwen3"}
    values.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(EdgezoError, match="No tensor for 4 parameters"):
        open_model(path).notes  # noqa: B018


def test_a_plan_without_data_says_what_is_odd_in_a_model(edgezo: Any, tmp_path: Path) -> None:
    path = tiny_models.make("mistral", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
    save_file(tensors, path / "model.safetensors")
    code, out, err = edgezo("plan", "--model", path)
    assert code == 0 and "planned memory" in out and "self_attn.q_proj.bias" in err
