"""GGUF exports: what edgezo reads back writes the tokens of the run, and llama.cpp too where it is installed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import Bench, Families, make_model, write_rows
from gguf.constants import GGMLQuantizationType
from test_runs import run_of
from tokenizers_fixture import CHAT_TEMPLATE, byte_tokenizer, piece_tokenizer

import edgezo as package
from edgezo.errors import EdgezoError, UsageError
from edgezo.network.gguf_tokenizer import gguf_tokenizer
from edgezo.run import export_gguf
from edgezo.run.export import export
from edgezo.weights.gguf_file import GgufSource
from edgezo.weights.gguf_header import read_header

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE = {"step": 0.5, "sigma": 0.05}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2")
PROMPTS = ("a warm film", "film 3 is cold. Verdict:", "The year 2024", "  two spaces")
LLAMA_CPP = "pip install 'edgezo[llama]' builds llama.cpp's Python binding"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MOST = 6  # tokens that are compared after each prompt


@pytest.fixture(scope="module")
def families(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(bench, tmp_path_factory.mktemp("families"), layers=2)


def texts_of(target: Path) -> list[str]:
    with package.load(target, max_new_tokens=MOST, precision="fp32") as used:
        return [used.generate(prompt) for prompt in PROMPTS]


def tokens_of(target: Path) -> list[list[int]]:
    """The tokens after each prompt, and each prompt's own."""

    every = []
    with package.load(target, max_new_tokens=MOST, precision="fp32") as used:
        for prompt in PROMPTS:
            ids = list(used.prompt_ids(prompt))
            every.append([*ids, *used.model.tokens_after(ids, MOST, None)])
    return every


def scores_of(target: Path) -> list[float]:
    """The mean log-probability of long texts, whose tokens are farther apart than a window."""
    texts = [{"text": f"{prompt} and {PROMPTS[0]}, {PROMPTS[1]} or not"} for prompt in PROMPTS]
    with package.load(target, precision="fp32") as used:
        return [prediction["score"] for prediction in used.predict(texts)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["full", "lowrank+head"])
def test_an_exported_file_writes_the_tokens_of_the_run(
    families: Any, family: str, train: str, tmp_path: Path
) -> None:
    bench = families(family)
    run_of(bench, tmp_path / "run", kind="completion", train=train, **LARGE)
    if family == "gemma2" and train == "lowrank+head":  # llama.cpp has no separate head for it
        with pytest.raises(UsageError, match="--train lowrank"):
            export(tmp_path / "run", "gguf", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    made = export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    assert made["dtype"] == "F32" and made["steps"] == 3
    wanted = tokens_of(tmp_path / "run")
    assert tokens_of(tmp_path / "out/model.gguf") == wanted
    scores = scores_of(tmp_path / "run")
    assert scores_of(tmp_path / "out/model.gguf") == pytest.approx(scores, abs=1e-4)
    assert tokens_of(bench.model) != wanted, "training has changed what is written"


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_writes_the_tokens_of_the_run(families: Any, family: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason=LLAMA_CPP)
    run_of(families(family), tmp_path / "run", kind="completion", train="full", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    file = str(tmp_path / "out/model.gguf")
    model = llama_cpp.Llama(file, n_ctx=64, n_threads=1, verbose=False, logits_all=True)
    wanted = tokens_of(tmp_path / "run")
    for prompt, ids in zip(PROMPTS, wanted, strict=True):
        assert model.tokenize(prompt.encode(), add_bos=True, special=True) == ids[:-MOST]
    check_written(model, wanted)


def check_written(model: Any, wanted: list[list[int]]) -> None:
    """llama.cpp's model writes these tokens, to the rounding of its arithmetic."""
    for ids in wanted:
        model.reset()
        model.eval(ids[:-MOST])
        for token in ids[-MOST:]:
            logits = np.array(model.scores[model.n_tokens - 1])
            assert logits[token] >= logits.max() - 1e-3 * logits.std()
            model.eval([token])
    model.close()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 3.0}),
        ("gemma3_text", {"final_logit_softcapping": 3.0}),
        ("phi3", {"sliding_window": 6}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}),
        ("llama", {"head_dim": 16, "rms_norm_eps": 1e-5}),
    ],
    ids=str,
)
def test_settings_of_a_model_go_along(
    families: Any, family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    bench = (
        families(family, **changes)
        if "rope_parameters" not in changes
        else replace(families(family), model=make_model(tmp_path / "model", family, **changes))
    )
    run_of(bench, tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    scores = scores_of(tmp_path / "run")
    assert scores_of(tmp_path / "out/model.gguf") == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0"])
def test_types_of_weights(families: Any, dtype: str, tmp_path: Path) -> None:
    bench = families("llama", hidden_size=64, intermediate_size=96, num_attention_heads=8)
    run_of(bench, tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "fp32", dtype="fp32")
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype=dtype)
    whole, made = GgufSource(tmp_path / "fp32/model.gguf"), GgufSource(tmp_path / "out/model.gguf")
    kinds = {made.stored(name).type for name in made.names if len(made.shape(name)) == 2}
    assert kinds == {export_gguf.ENCODED[dtype]}
    for name in made.names:
        a, b = whole.read(name), made.read(name, torch.float32)
        assert torch.allclose(a, b, atol=0.01 * float(a.abs().max())), name
    texts_of(tmp_path / "out/model.gguf")


@pytest.mark.parametrize("matrix_type", ["F16", "Q8_0", "Q4_0", "Q6_K"])
def test_a_gguf_base_keeps_its_types_and_what_was_not_trained(
    bench: Bench, matrix_type: str, tmp_path: Path
) -> None:
    width = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
    width |= {"num_key_value_heads": 2, "attention_bias": False, "mlp_bias": False}
    model = tiny_models.random_model("llama", num_hidden_layers=1, **width)
    file = tmp_path / "base.gguf"
    tiny_models.make_gguf(model, file, matrix_type=matrix_type, tokenizer=True)
    of_file = replace(bench, model=file)
    run_of(of_file, tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    made = export(tmp_path / "run", "gguf", tmp_path / "out")
    base, out = read_header(file), read_header(tmp_path / "out/model.gguf")
    assert base.tensors.keys() == out.tensors.keys()
    for name, tensor in base.tensors.items():
        written = out.tensors[name]
        same = (
            tensor.file.read_bytes()[tensor.offset :][: tensor.size_bytes]
            == (written.file.read_bytes()[written.offset :][: written.size_bytes])
        )
        is_linear = name.startswith("blk.") and len(tensor.shape) == 2
        assert same != is_linear, name
        if is_linear and matrix_type != "Q6_K":
            assert written.type == tensor.type
        elif is_linear:
            assert written.type is GGMLQuantizationType.Q8_0
    said = any("rounded to" in note for note in made["notes"])
    assert said == (matrix_type != "F16")
    others = [note for note in made["notes"] if "rounded to" not in note]
    assert bool(others) == (matrix_type == "Q6_K")
    kept = {k for k in base.metadata if k.startswith(("tokenizer.", "llama."))}
    assert all(base.entry(key) == out.entry(key) for key in kept)
    assert len(texts_of(tmp_path / "out/model.gguf")) == len(PROMPTS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_linear_probe_goes_along_in_the_metadata(
    families: Any, family: str, edgezo_json: Any, tmp_path: Path
) -> None:
    bench = families(family)
    summary = run_of(bench, tmp_path / "run", train="lowrank+probe", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    about = json.loads((tmp_path / "out/edgezo.json").read_text())
    assert about["predicts_as_run"] is False and "probe" in about["notes"][0]
    rows = bench.data / "label.jsonl"
    answers = []
    for target in (tmp_path / "run", tmp_path / "out/model.gguf"):
        code, made = edgezo_json("predict", target, "--data", rows, "--precision", "fp32")
        assert code == 0
        answers.append(made["predictions"])
    for ours, theirs in zip(*answers, strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)
    code, found = edgezo_json(
        *("eval", "--model", tmp_path / "out/model.gguf", "--data", rows, "--precision", "fp32"),
        *("--template", "{text} It was", "--labels", "0=bad,1=good", "--held-out", 0.1),
    )
    assert code == 0 and found["value"] == summary["eval_after"]["value"]


def test_an_export_is_asked_as_its_run(bench: Bench, edgezo_json: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a warm film"}, {"text": "a cold one"}])
    export(tmp_path / "run", "hf", tmp_path / "hf")
    export(tmp_path / "run", "gguf", tmp_path / "gguf", dtype="fp32")
    wanted = edgezo_json("predict", tmp_path / "run", "--data", rows)[1]["predictions"]
    for target in (tmp_path / "hf", tmp_path / "gguf/model.gguf"):
        code, made = edgezo_json("predict", target, "--data", rows, "--precision", "fp32")
        assert code == 0
        for ours, theirs in zip(wanted, made["predictions"], strict=True):
            assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


def test_weights_on_disk_are_exported(bench: Bench, tmp_path: Path) -> None:
    request = {"train": "full", "residency": "disk", "kind": "completion", **LARGE}
    run_of(bench, tmp_path / "run", **request)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    assert tokens_of(tmp_path / "out/model.gguf") == tokens_of(tmp_path / "run")


# ---------------------------------------------------------------------------------------------
# Adapters


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "asked", [{"train": "lowrank"}, {"estimator": "lora", "rank": 4, "step": 0.05}]
)
def test_an_adapter_holds_what_was_trained(
    families: Any, family: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    bench = families(family)
    settings = asked if "estimator" in asked else {**asked, **LARGE}
    run_of(bench, tmp_path / "run", kind="completion", **settings)
    export(tmp_path / "run", "gguf-adapter", tmp_path / "adapter")
    export(tmp_path / "run", "gguf", tmp_path / "whole", dtype="fp32")
    adapter = read_header(tmp_path / "adapter/adapter.gguf")
    assert adapter.metadata["general.type"] == "adapter"
    assert adapter.metadata["adapter.type"] == "lora"
    # llama.cpp's rule, over the base as llama.cpp has it.
    run_of(bench, tmp_path / "nothing", kind="completion", train="full", steps=1, step=1e-30)
    whole = read_header(tmp_path / "whole/model.gguf")
    alpha = adapter.metadata["adapter.lora.alpha"]
    merged = 0
    base = base_tensors(bench, tmp_path)
    for name, tensor in whole.tensors.items():
        if f"{name}.lora_a" in adapter.tensors:
            a, b = (raw(adapter.tensors[f"{name}.lora_{part}"]) for part in "ab")
            change = alpha / len(a) * (b @ a)
            assert np.allclose(base[name] + change, raw(tensor), rtol=1e-4, atol=1e-5), name
            assert np.abs(change).max() > 1e-3
            merged += 1
    assert merged == len(adapter.tensors) // 2 > 0


def test_llama_cpp_adds_an_adapter_to_its_base(bench: Bench, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason=LLAMA_CPP)
    model = tiny_models.random_model("llama", num_hidden_layers=2)
    file = tmp_path / "base.gguf"
    tiny_models.make_gguf(model, file, tokenizer=True)
    run_of(
        replace(bench, model=file), tmp_path / "run", kind="completion", train="lowrank", **LARGE
    )
    export(tmp_path / "run", "gguf-adapter", tmp_path / "adapter")
    loaded = llama_cpp.Llama(
        *(str(file),),
        n_ctx=64,
        n_threads=1,
        verbose=False,
        logits_all=True,
        lora_path=str(tmp_path / "adapter/adapter.gguf"),
    )
    wanted = tokens_of(tmp_path / "run")
    assert tokens_of(file) != wanted
    check_written(loaded, wanted)


def raw(tensor: Any) -> np.ndarray:
    data = tensor.file.read_bytes()[tensor.offset :][: tensor.size_bytes]
    return np.frombuffer(data, dtype=np.float32).reshape(tensor.shape)


def base_tensors(bench: Bench, folder: Path) -> dict[str, np.ndarray]:
    """The base as llama.cpp's converter stores it, by the converter of the tests."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(bench.model)
    return tiny_models.make_gguf(module, folder / "base.gguf")


def test_what_an_adapter_cannot_hold_is_refused(bench: Bench, edgezo: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "full", train="full")
    run_of(bench, tmp_path / "probe", train="lowrank+probe")
    run_of(bench, tmp_path / "head", train="lowrank+head")
    for run, why in (
        ("full", "--format gguf"),
        ("probe", "--train lowrank+head"),
        ("head", "--train lowrank"),
    ):
        out = tmp_path / "out"
        code, _, err = edgezo("export", tmp_path / run, "--format", "gguf-adapter", "--out", out)
        assert code == 2 and why in err and not out.exists(), err


# ---------------------------------------------------------------------------------------------
# What is refused, and what is checked


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("opt", {}, "a model of the type opt"),
        ("roberta", {"pad_token_id": 299, "max_position_embeddings": 430}, "of the type roberta"),
        ("mistral", {"sliding_window": 8}, "a window of 8 tokens"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "attention scaled by 24"),
        ("llama", {"hidden_act": "relu"}, "the activation relu"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    families: Any, family: str, changes: dict[str, Any], why: str, edgezo: Any, tmp_path: Path
) -> None:
    bench = families(family, **changes)
    run_of(bench, tmp_path / "run", train="lowrank")
    code, _, err = edgezo("export", tmp_path / "run", "--format", "gguf", "--out", tmp_path / "out")
    assert code == 2 and why in err and "--format hf" in err and not (tmp_path / "out").exists()


def test_a_file_that_is_not_the_runs_is_not_kept(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    plain = export_gguf.GgufExporter.stored_rows
    broken = {
        "other numbers": lambda self, name: (rows * 1.5 for rows in plain(self, name)),
        "the rows of a head in another order": lambda self, name: self.rows(name),
    }
    for what, stored in broken.items():
        monkeypatch.setattr(export_gguf.GgufExporter, "stored_rows", stored)
        with pytest.raises(EdgezoError, match="reads back"):
            export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
        assert not (tmp_path / "out").exists(), what
    monkeypatch.setattr(export_gguf.GgufExporter, "stored_rows", plain)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")


def test_training_that_the_type_cannot_hold_is_said(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank", step=1e-9, sigma=1e-3)
    with pytest.raises(EdgezoError, match=r"are those of the base.*\n?.*--dtype fp32"):
        export(tmp_path / "run", "gguf", tmp_path / "out", dtype="bf16")
    assert not (tmp_path / "out").exists()


def test_a_rule_of_splitting_without_a_name_is_refused(bench: Bench, tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    model = shutil.copytree(bench.model, tmp_path / "model")
    tokenizer = byte_tokenizer()
    odd = pre_tokenizers.Split(Regex("[aeiou]"), behavior="isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    before = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([odd, bytes_alone])
    tokenizer.save_pretrained(model)
    tokenizer.backend_tokenizer.pre_tokenizer = before
    run_of(replace(bench, model=model), tmp_path / "run", train="lowrank")
    with pytest.raises(UsageError, match="no name for the rule"):
        export(tmp_path / "run", "gguf", tmp_path / "out")


def test_a_sentencepiece_tokenizer_goes_along(bench: Bench, tmp_path: Path) -> None:
    model = shutil.copytree(bench.model, tmp_path / "model")
    shutil.rmtree(model)
    tokenizer = piece_tokenizer()
    tiny_models.make("llama", model, vocab_size=len(tokenizer), num_hidden_layers=1)
    tokenizer.save_pretrained(model)
    run_of(replace(bench, model=model), tmp_path / "run", train="lowrank", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    written, _ = gguf_tokenizer(tmp_path / "out/model.gguf")
    for text in ("it was good", " two  spaces", "a\nb é 世界"):
        assert written(text)["input_ids"] == tokenizer(text)["input_ids"]


# ---------------------------------------------------------------------------------------------
# What lies beside


def test_a_card_and_a_modelfile_lie_beside(bench: Bench, tmp_path: Path) -> None:
    model = shutil.copytree(bench.model, tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    summary = run_of(replace(bench, model=model), tmp_path / "run", train="lowrank", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for part in (
        "# model, fine-tuned",
        "label.jsonl",
        "3 steps of GRZO",
        "{text} It was",
        "bad, good",
    ):
        assert part in card, part
    after = summary["eval_after"]
    assert f"{after['value']:.4f} after, on {after['n']} rows" in card
    assert str(tmp_path) not in card, "no path of the machine"
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and 'PARAMETER stop "<|im_end|>"' in lines
    header = read_header(tmp_path / "out/model.gguf")
    assert header.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert header.metadata["tokenizer.ggml.pre"] == "gpt-2"


def test_a_run_that_has_not_ended_is_said(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    (tmp_path / "run/summary.json").unlink()
    made = export(tmp_path / "run", "gguf", tmp_path / "out")
    assert "is unfinished: step" in made["notes"][0]
    assert "none: the run has not ended" in (tmp_path / "out/README.md").read_text()


def test_metadata_of_a_stranger_chooses_nothing(bench: Bench, edgezo: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank+probe", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    file = tmp_path / "out/model.gguf"
    whole = file.read_bytes()
    rows = ("--data", bench.data / "label.jsonl")
    about = json.loads((tmp_path / "out/edgezo.json").read_text())
    for old, new in (
        (b'"label_names"', b'"label_nameZ"'),
        (b'"kind": "label"', b'"kind": "chose"'),
        (b'"asked_by": {', b'"asked_by": 3,{'),
        (b"edgezo.probe.bias", b"edgezo.probe.bIas"),
    ):
        assert old in whole, about
        file.write_bytes(whole.replace(old, new))
        code, out, err = edgezo("predict", file, *rows)
        assert code in (1, 2) and "Traceback" not in err and out == "", (old, err)
    # Settings that are no way to ask are passed over: no path and no code comes from a file.
    file.write_bytes(whole.replace(b'"max_length"', b'"finetuner" '))
    assert edgezo("predict", file, *rows)[0] == 0
