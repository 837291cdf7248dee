"""What other programs find in an export: both versions of transformers read one model, and no file is forgotten.

With ``TRANSFORMERS_4`` as a folder that holds transformers 4 (``pip install --no-deps --target DIR transformers==4.57.6
tokenizers==0.22.2 huggingface_hub==0.36.2``), that version computes logits of the exports too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import Bench, make_model
from safetensors.torch import load_file, save_file
from test_runs import run_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from edgezo.errors import EdgezoError
from edgezo.network.foreign_config import read_config
from edgezo.network.loader import load_tokenizer
from edgezo.run.export import export
from edgezo.run.export_files import write_config

pytestmark = pytest.mark.usefixtures("one_thread")

_LONG = {"original_max_position_embeddings": 32}
_FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 4.0, 5.0, 6.0]}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LONG}


def table(kind: str, base: float = 5e5, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **more}}


def of_gemma(whole: dict[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": 2e4}
    return {"rope_parameters": {"full_attention": whole, "sliding_attention": local}}


# name -> family, changes of its config, fields that transformers 4 reads
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a base": ("llama", table("default"), {"rope_theta": 5e5, "rope_scaling": None}),
    "linear": (
        "llama",
        table("linear", factor=4.0),
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama3": (
        "llama",
        table("llama3", **_LLAMA3),
        {"rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
    ),
    "yarn": (
        "qwen2",
        table("yarn", factor=4.0, **_LONG),
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **_LONG}},
    ),
    "dynamic": (
        "mistral",
        table("dynamic", factor=2.0) | {"max_position_embeddings": 32},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "longrope": (
        "phi3",
        table("longrope", **_FACTORS) | _LONG,
        {"rope_scaling": {"type": "longrope", **_FACTORS}, "partial_rotary_factor": 1.0},
    ),
    "a part of a head": (
        "phi3",
        table("default", partial_rotary_factor=0.5),
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    ),
    "two bases": (
        "gemma3_text",
        of_gemma({"rope_type": "linear", "rope_theta": 3e5, "factor": 8.0}),
        {
            "rope_theta": 3e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "a base of gemma2": ("gemma2", table("default", 3e4), {"rope_theta": 3e4}),
    "windows of some layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "a window": ("mistral", {"sliding_window": 8}, {"sliding_window": 8}),
    "no rotation": ("gpt2", {}, {"torch_dtype": "float32"}),
}


def exported(folder: Path, name: str) -> tuple[Path, Path]:
    """A model as transformers 5 writes it, and the same weights with the config of an export."""
    family, changes, _ = VARIANTS[name]
    theirs = tiny_models.make(family, folder / "theirs", **changes)
    ours = tiny_models.make(family, folder / "ours", **changes)
    config = read_config(theirs / "config.json")
    config.dtype = torch.float32
    config.architectures = AutoConfig.from_pretrained(theirs).architectures
    write_config(config, ours)
    return theirs, ours


CODE = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        logits = model(torch.arange(4, 64)[None]).logits[0]
    print(json.dumps([transformers.__version__[0], model.config.vocab_size, logits[::7, :9].tolist()]))
"""


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_5_reads_what_the_run_computed_with(name: str, tmp_path: Path) -> None:
    theirs, ours = exported(tmp_path, name)
    ids = torch.arange(4, 64)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
            for path in (theirs, ours)
        ]
    assert torch.equal(*logits)
    before, after = (read_config(path / "config.json").to_dict() for path in (theirs, ours))
    after.get("rope_parameters", {}).pop("type", None)  # another name of rope_type
    assert {k: after[k] for k in before.keys() & after.keys()} == before


@pytest.mark.parametrize("name", VARIANTS)
def test_the_fields_of_transformers_4_are_there(name: str, tmp_path: Path) -> None:
    _, ours = exported(tmp_path, name)
    values = json.loads((ours / "config.json").read_text())
    assert values.items() >= VARIANTS[name][2].items()
    assert values["torch_dtype"] == values["dtype"] == "float32"


@pytest.fixture(scope="module")
def version_4() -> Callable[..., list[Any]]:
    folder = os.environ.get("TRANSFORMERS_4", "")
    if not (Path(folder) / "transformers").is_dir():
        pytest.skip("TRANSFORMERS_4 names no folder with transformers 4")

    def run(code: str, *given: object) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, given)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": folder},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_transformers_4_computes_the_same_logits(version_4: Any, tmp_path: Path) -> None:
    folders = {name: exported(tmp_path / str(n), name)[1] for n, name in enumerate(VARIANTS)}
    for name, (version, _, logits) in zip(folders, version_4(CODE, *folders.values()), strict=True):
        assert version == "4"
        module = AutoModelForCausalLM.from_pretrained(
            folders[name], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            expected = module(torch.arange(4, 64)[None]).logits[0, ::7, :9]
        assert torch.allclose(torch.tensor(logits), expected, atol=1e-4), name


def test_a_field_that_phi3_of_transformers_4_cannot_have_is_refused_there(tmp_path: Path) -> None:
    rope = table("longrope", **_FACTORS, attention_factor=2.0) | _LONG
    path = tiny_models.make("phi3", tmp_path, **rope)
    config = read_config(path / "config.json")
    config.dtype = torch.float32
    write_config(config, path)
    written = json.loads((path / "config.json").read_text())["rope_scaling"]
    assert written == {"type": "longrope", **_FACTORS, "attention_factor": 2.0}


# ----------------------------------------------------------------------------- tokenizers and files beside


@pytest.fixture
def run_on(bench: Bench, tmp_path: Path) -> Callable[..., Path]:
    """The export of a run of one step on a model."""

    def make(model: Path, form: str = "hf", **more: Any) -> Path:
        run_of(replace(bench, model=model), tmp_path / "run", kind="completion", steps=1, **more)
        export(tmp_path / "run", form, tmp_path / "out")
        return tmp_path / "out"

    return make


TEXTS = ("a good tin. 12\n", " bar<|im_end|>\n", "f(x) = {'y'}", "</s>\u00e9 \u4e16")
TOKENS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for text in json.loads(sys.argv[2]):
    print(json.dumps(tokenizer(text)["input_ids"]))
"""


def gguf_model(folder: Path) -> Path:
    tokens = tiny_models.byte_vocabulary()
    tokens[-1] = "<|im_end|>"
    metadata = {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.eot_token_id": 299,
    }
    module = tiny_models.random_model("qwen2", max_position_embeddings=512)
    tiny_models.make_gguf(module, folder / "m.gguf", tokenizer=True, metadata=metadata)
    return folder / "m.gguf"


def test_a_tokenizer_of_a_gguf_is_of_a_class_that_both_versions_have(
    run_on: Any, tmp_path: Path
) -> None:
    model = gguf_model(tmp_path)
    out = run_on(model)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    ours, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(out)
    assert [ours(t)["input_ids"] for t in TEXTS] == [theirs(t)["input_ids"] for t in TEXTS]
    assert theirs.chat_template == ours.chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 299]


def test_transformers_4_reads_the_tokenizer_of_a_gguf(
    run_on: Any, version_4: Any, tmp_path: Path
) -> None:
    model = gguf_model(tmp_path)
    ours = load_tokenizer(model)
    tokens = version_4(TOKENS, run_on(model), json.dumps(TEXTS))
    assert tokens == [ours(text)["input_ids"] for text in TEXTS]


def with_a_merge(model: Path, *merge: str) -> Path:
    """The model with a tokenizer.json that merges over the border of two words of its family's usual rule."""
    whole = json.loads((model / "tokenizer.json").read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["".join(merge)] = vocabulary.pop(list(vocabulary)[-1])
    merges = [*whole["model"]["merges"], list(merge)]
    whole["model"]["merges"] = [m for m in merges if "".join(m) in vocabulary]
    (model / "tokenizer.json").write_text(json.dumps(whole))
    return model


def name_class(model: Path, name: str) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))


@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_an_export_is_read_with_the_tokens_of_the_run(
    family: str, run_on: Any, tmp_path: Path
) -> None:
    model = with_a_merge(make_model(tmp_path / "model", family), "1", "2")
    name_class(model, "Qwen2Tokenizer" if family == "qwen3" else "GPT2Tokenizer")
    ours, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(run_on(model))
    assert ours.tokenize("x12")[-1] == "12"
    assert ours("x12 <|im_end|>")["input_ids"] == theirs("x12 <|im_end|>")["input_ids"]
    assert theirs.special_tokens_map.items() <= ours.special_tokens_map.items()


@pytest.mark.parametrize("name", ("Qwen2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"))
def test_an_export_says_where_autotokenizer_splits_by_a_rule_of_its_own(
    name: str, bench: Bench, tmp_path: Path
) -> None:
    # transformers 5 takes its class for qwen2, whatever is named.
    model = with_a_merge(make_model(tmp_path / "model", "qwen2"), "1", "2")
    name_class(model, name)
    run_of(replace(bench, model=model), tmp_path / "run", kind="completion", steps=1)
    result = export(tmp_path / "run", "hf", tmp_path / "out")
    assert "PreTrainedTokenizerFast.from_pretrained" in result["notes"][0]
    ours = load_tokenizer(model)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert (
        ours("x12")["input_ids"]
        == theirs("x12")["input_ids"]
        != AutoTokenizer.from_pretrained(tmp_path / "out")("x12")["input_ids"]
    )


BESIDE = {
    "LICENSE": "of the model",
    "NOTICE.txt": "too",
    "USE_POLICY.md": "so",
    "generation_config.json": '{"eos_token_id": [2, 3]}',
    "tokenizer.model": "pieces",
    "added_tokens.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}


@pytest.mark.parametrize("form", ("hf", "peft"))
def test_every_file_beside_the_weights_comes_along(
    form: str, bench: Bench, run_on: Any, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    for name, text in BESIDE.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    (model / "evil.py").write_text("raise SystemExit")
    (model / "pytorch_model.bin").write_text("")
    out = run_on(model, form)
    assert {name: (out / name).read_text() for name in BESIDE} == BESIDE
    assert not (out / "evil.py").exists() and not (out / "pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),
    (
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            {"extra_special_tokens": ["<|im_start|>"]},
            {"additional_special_tokens": ["<|im_start|>"]},
        ),
        ({"extra_special_tokens": {"image": "<|im_start|>"}}, {}),
    ),
    ids=str,
)
def test_settings_that_version_4_cannot_read_are_spelled_for_it(
    settings: dict[str, Any], expected: dict[str, Any], run_on: Any, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    values = json.loads((model / "tokenizer_config.json").read_text())
    values.pop("extra_special_tokens", None)
    (model / "tokenizer_config.json").write_text(json.dumps(values | settings))
    out = json.loads((run_on(model) / "tokenizer_config.json").read_text())
    assert out.items() >= (expected or settings).items()


# ----------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("model.layers.0.mlp.down_proj.weight", 70000.0),
        ("model.norm.weight", -1e5),
        ("model.embed_tokens.weight", 65520.0),
    ),
)
def test_a_number_that_the_dtype_cannot_hold_is_refused_by_its_tensor(
    name: str, value: float, bench: Bench, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors")
    run_of(replace(bench, model=model), tmp_path / "run", kind="completion", steps=1)
    with pytest.raises(EdgezoError, match=rf"{name} holds {abs(value):g}, and float16") as caught:
        export(tmp_path / "run", "hf", tmp_path / "out", dtype="fp16")
    assert "--dtype bf16 or fp32" in str(caught.value) and not (tmp_path / "out").exists()
    export(tmp_path / "run", "hf", tmp_path / "out", dtype="bf16")
