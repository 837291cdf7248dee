"""A run on a rounded file says so in its card and its page, and is measured over the weights before rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Bench
from peft import PeftModel
from test_export import LARGE, auto, loss_of
from test_runs import run_of

from edgezo.network.loader import open_model
from edgezo.run.base_file import BaseFile, other_weights
from edgezo.run.export import export
from edgezo.run.session import base_file
from edgezo.weights.stored_types import shares

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
WIDE = {"hidden_size": 96, "intermediate_size": 96}  # whole blocks of 32 weights in a row


@pytest.fixture
def pair(bench: Bench, tmp_path: Path) -> tuple[Bench, Bench]:
    """(over a file rounded to Q4_1, over the model before rounding)."""
    before = tiny_models.make("llama", tmp_path / "model", tokenizer=True, **WIDE)
    rounded = tmp_path / "tiny.Q4_1.gguf"
    module = tiny_models.random_model("llama", **WIDE)
    tiny_models.make_gguf(module, rounded, matrix_type="Q4_1", tokenizer=True)
    return replace(bench, model=rounded), replace(bench, model=before)


def test_types_are_counted_and_named(pair: tuple[Bench, Bench]) -> None:
    rounded, before = (base_file(open_model(bench.model)) for bench in pair)
    assert list(rounded.types) == ["Q4_1", "F32"] and rounded.rounded == "Q4_1"
    assert list(before.types) == ["F32"] and before.rounded == ""
    assert sum(rounded.types.values()) == sum(before.types.values())
    assert BaseFile.saved(rounded.to_dict()) == rounded and BaseFile.saved({"name": "x"}) is None
    assert "not the weights of HuggingFaceTB" in other_weights(rounded, "smollm2-135m")
    assert other_weights(before, "smollm2-135m") == ""
    assert shares({"Q4_1": 790, "Q8_0": 209, "F32": 1}) == "Q4_1 79.0 %, Q8_0 20.9 %, F32 0.1 %"


def test_a_run_on_a_rounded_file_says_which_and_what_measures_it(
    pair: tuple[Bench, Bench], edgezo_json: Any, edgezo: Any, tmp_path: Path
) -> None:
    on_file, before = pair
    run = tmp_path / "run"
    summary = run_of(on_file, run, train="lowrank+head", **LARGE)
    made = export(run, "peft", tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    hash_of_file = base_file(open_model(on_file.model)).sha256
    for text in ("rounded to Q4_1", "tiny.Q4_1.gguf (Q4_1", hash_of_file, "--other-base"):
        assert text in card, text
    assert made["base_file"]["sha256"] == hash_of_file and "--other-base" in made["notes"][0]
    assert "tiny.Q4_1.gguf" in (run / "report.html").read_text()
    modes = {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1, "whoever may read one file of an export may read all"
    # Over the weights before rounding it is what peft makes of the adapter there.
    code, there = edgezo_json("eval", "--model", run, "--other-base", before.model)
    assert code == 0 and there["over"]["name"] == "model.safetensors"
    module = PeftModel.from_pretrained(auto(before.model), tmp_path / "adapter")
    assert there["loss"] == pytest.approx(loss_of(module, before, "label"), rel=1e-5, abs=1e-6)
    assert abs(there["loss"] - summary["eval_after"]["loss"]) > 1e-4
    line = edgezo("eval", "--model", run, "--other-base", before.model)[1]
    assert line.endswith(", over the weights of model.safetensors\n")


def test_a_card_of_floating_point_weights_says_nothing_of_rounding(
    pair: tuple[Bench, Bench], tmp_path: Path
) -> None:
    run_of(pair[1], tmp_path / "run", train="lowrank", **LARGE)
    assert export(tmp_path / "run", "peft", tmp_path / "adapter")["notes"] == []
    card = (tmp_path / "adapter/README.md").read_text()
    assert "round" not in card and "model.safetensors (F32), SHA-256" in card
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert list(plan["sources"]["base"]["types"]) == ["F32"]


def test_what_no_other_weights_can_be_under_is_refused(
    pair: tuple[Bench, Bench], edgezo: Any, tmp_path: Path
) -> None:
    on_file, before = pair
    run_of(on_file, tmp_path / "full", train="full", **LARGE)
    run_of(on_file, tmp_path / "run", train="lowrank", **LARGE)
    larger = tiny_models.make("llama", tmp_path / "larger", tokenizer=True, hidden_size=192)
    for model, other, reason in (
        ("full", before.model, "beside frozen weights"),
        ("run", larger, "is no other file of the model"),
        (on_file.model, before.model, "is for a run"),
    ):
        code, _, err = edgezo("eval", "--model", tmp_path / model, "--other-base", other)
        assert code in (1, 2) and reason in err, err
    code, _, err = edgezo("eval", "--model", tmp_path / "run", "--base", larger)
    assert code == 5, err
