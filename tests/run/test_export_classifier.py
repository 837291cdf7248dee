"""Exports as transformers' sequence classification: its pipeline gives the labels of the run, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bench, Families
from safetensors.torch import load_file
from test_runs import run_of
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, pipeline

import edgezo as package
from edgezo.data.row_files import Problems, Record
from edgezo.errors import EdgezoError, UsageError
from edgezo.run.export import export

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE = {"step": 0.5, "sigma": 0.05}
RMS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
LAYER = ("opt", "gpt2")
ONE = {"train": "lowrank+probe", "probe_reads": "one", **LARGE}
TEXTS = [f"film {i} is {'warm' if i % 2 else 'cold'}" + " and long" * (i % 5) for i in range(20)]


@pytest.fixture(scope="module")
def families(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(bench, tmp_path_factory.mktemp("families"), layers=3)


def prompts_and_shares(run: Path) -> tuple[list[str], torch.Tensor]:
    """The prompts of texts, and the probabilities that the run gives its labels, (n, K)."""
    with package.load(run, precision="fp32") as used:
        asked = used.asker.ask([Record("", {"text": text}) for text in TEXTS], Problems())
        tokenizer = used.asker.how.tokenizer
        prompts = [
            tokenizer.decode(row.example.rows[0].ids, skip_special_tokens=True) for row in asked
        ]
        predicted = used.predict(TEXTS)
    return prompts, torch.tensor([list(p["probabilities"].values()) for p in predicted])


def classified(folder: Path, prompts: list[str]) -> torch.Tensor:
    """The probabilities that transformers' pipeline gives the labels, (n, K)."""
    # As the note of an export says: AutoTokenizer splits texts for Qwen2 by a rule of its own.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    classify = pipeline("text-classification", str(folder), tokenizer=tokenizer, top_k=None)
    names = json.loads((folder / "edgezo.json").read_text())["dataset"]["label_names"]
    every = [{entry["label"]: entry["score"] for entry in row} for row in classify(prompts)]
    return torch.tensor([[shares[name] for name in names] for shares in every])


@pytest.mark.parametrize("family", [*RMS, *LAYER])
def test_a_probe_of_one_block_becomes_a_classifier(
    families: Any, family: str, tmp_path: Path
) -> None:
    run_of(families(family), tmp_path / "run", **ONE)
    made = export(tmp_path / "run", "hf-classifier", tmp_path / "out")
    assert made["predicts_as_run"] is True
    prompts, wanted = prompts_and_shares(tmp_path / "run")
    shares = classified(tmp_path / "out", prompts)
    assert torch.equal(shares.argmax(1), wanted.argmax(1))
    if family in RMS:  # layer norms have the labels exactly, and the probabilities nearly
        assert torch.allclose(shares, wanted, atol=1e-3)
    assert len(set(wanted[:, 0].tolist())) > 5, "rows differ"
    module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    (block,) = load_file(tmp_path / "run/probe.safetensors")["probe.blocks"].tolist()
    assert module.config.num_hidden_layers == block + 1 <= 3
    assert list(module.config.id2label.values()) == ["bad", "good"]


@pytest.mark.parametrize("family", [*RMS, *LAYER])
def test_label_words_become_a_classifier(families: Any, family: str, tmp_path: Path) -> None:
    run_of(families(family), tmp_path / "run", train="lowrank+head+norms", **LARGE)
    made = export(tmp_path / "run", "hf-classifier", tmp_path / "out")
    prompts, wanted = prompts_and_shares(tmp_path / "run")
    shares = classified(tmp_path / "out", prompts)
    assert torch.equal(shares.argmax(1), wanted.argmax(1))
    capped = family == "gemma2"
    assert torch.allclose(shares, wanted, atol=1e-4) != capped
    assert bool([note for note in made["notes"] if "caps its logits" in note]) == capped


def test_a_card_says_how_it_is_asked(bench: Bench, edgezo_json: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", **ONE)
    code, made = edgezo_json(
        *("export", tmp_path / "run", "--format", "hf-classifier"),
        *("--dtype", "bf16", "--out", tmp_path / "out"),
    )
    assert code == 0 and made["dtype"] == "bfloat16"
    card = (tmp_path / "out/README.md").read_text()
    assert 'pipeline("text-classification"' in card and "{text} It was" in card
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert tensors["score.weight"].shape == (2, 48) and "lm_head.weight" not in tensors


def test_label_words_of_several_tokens_have_a_place_where_a_probe_reads_them(
    bench: Bench, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", kind="choice", **ONE)
    export(tmp_path / "run", "hf-classifier", tmp_path / "out")
    prompts, wanted = prompts_and_shares(tmp_path / "run")
    assert torch.equal(classified(tmp_path / "out", prompts).argmax(1), wanted.argmax(1))


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"train": "lowrank+probe"}, "--probe-reads one"),
        ({"kind": "completion", "train": "lowrank"}, "does not tell the labels"),
        ({"kind": "choice", "train": "lowrank"}, "label words of one token"),
    ],
    ids=str,
)
def test_what_it_cannot_hold_is_refused_with_the_option_that_would_fit(
    deep_bench: Bench, asked: dict[str, Any], why: str, tmp_path: Path
) -> None:
    run_of(deep_bench, tmp_path / "run", **asked)
    with pytest.raises(UsageError, match=why):
        export(tmp_path / "run", "hf-classifier", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_it_is_no_language_model(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", **ONE)
    export(tmp_path / "run", "hf-classifier", tmp_path / "out")
    with pytest.raises(EdgezoError, match=r"score\.weight"):
        package.load(tmp_path / "out")
