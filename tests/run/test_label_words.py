"""Runs on label words of several tokens: a tree behind each prompt, and none behind a linear probe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_rows

from edgezo.data.batches import Batch
from edgezo.data.dataset import Dataset
from edgezo.data.packed import PackedExamples
from edgezo.network.model import Model
from edgezo.plan.request import make_config
from edgezo.run import readout_pass
from edgezo.run.directory import data_hash, same_task
from edgezo.run.evaluate import evaluate
from edgezo.run.session import open_request
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

TOPICS = ("order a card", "order a new card", "order late", "lost my card", "lost my phone", "fees")


@pytest.fixture
def asked(bench: Any, tmp_path: Path) -> dict[str, Any]:
    """A request over rows of six topics, five of which begin as another one does."""
    rows = [{"text": f"row {i} on {TOPICS[i % 6]}", "topic": TOPICS[i % 6]} for i in range(90)]
    file = write_rows(tmp_path / "topics.jsonl", rows)
    settings = bench.settings(
        "label", data=str(file), label_field="topic", **dict.fromkeys(("labels",))
    )
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def forwards() -> Iterator[list[Batch]]:
    """The batches that pass, in order."""
    seen: list[Batch] = []
    real = Model.losses

    def watched(self: Model, batch: Batch, *given: Any, **more: Any) -> Any:
        seen.append(batch)
        # Taps would keep the states of every token that a word is scored at, of all blocks.
        assert self.taps is None or self.taps.paused or not any(batch.trees)
        return real(self, batch, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "losses", watched)
        yield seen


def test_behind_a_probe_no_label_word_passes(
    asked: dict[str, Any], edgezo_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout_pass, "WORDS_ROWS", 8)
    run = tmp_path / "run"
    with forwards() as seen:
        summary = finetune(make_config({**asked, "out": str(run), "steps": 12}))
    assert summary["probe"]["used"] and summary["trained"] == "lowrank+probe"
    assert summary["probe"]["rows"] == 48 and np.isfinite(summary["probe"]["label_words_loss"])
    # The longest micro-batch and the first evaluation have the words, and of the pass the first eight rows.
    with_words = [any(tree is not None for tree in batch.trees) for batch in seen]
    last = max(at for at, words in enumerate(with_words) if words)
    first_prompts = with_words.index(False)
    of_pass = [
        b
        for b, words in zip(seen[first_prompts:], with_words[first_prompts:], strict=True)
        if words
    ]
    assert sum(len(batch.labels) for batch in of_pass) == 8
    assert (
        sum(len(b.labels) for b in seen[last + 1 :]) > 40 + 12 * 4
    )  # the rest of the pass, steps, rows
    for batch in seen[last + 1 :]:
        assert len(batch.lengths) == len(batch.labels) and not len(batch.score_ids)
    with forwards() as seen:
        code, figures = edgezo_json("eval", "--model", run)
    assert code == 0 and figures["value"] == summary["eval_after"]["value"]
    assert not any(tree is not None for batch in seen for tree in batch.trees)
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again == json.loads((run / "summary.json").read_text())
    code, replayed = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]
    code, _ = edgezo_json("export", run, "--format", "hf", "--out", tmp_path / "hf")
    data = ("--data", asked["data"], "--label-field", "topic", "--template", asked["template"])
    code, exported = edgezo_json("eval", "--model", tmp_path / "hf", *data, "--precision", "fp32")
    assert code == 0 and exported["value"] == pytest.approx(
        summary["eval_after"]["value"], abs=0.12
    )


@pytest.mark.parametrize("estimator", ("grzo", "lora"))
def test_without_a_probe_words_pass_as_trees_and_a_resume_has_the_same_bits(
    estimator: str, asked: dict[str, Any], edgezo_json: Any, tmp_path: Path
) -> None:
    settings = {**asked, "estimator": estimator, "steps": 4}
    if estimator == "grzo":
        settings["train"] = "lowrank+head"
    whole = finetune(make_config({**settings, "out": str(tmp_path / "whole")}))
    with forwards() as seen, pytest.MonkeyPatch.context() as patch:
        from edgezo.run.step import Stepper

        real = Stepper.step

        def step(self: Any, number: int, *given: Any) -> Any:
            if number == 2:
                raise KeyboardInterrupt
            return real(self, number, *given)

        patch.setattr(Stepper, "step", step)
        with pytest.raises(KeyboardInterrupt):
            finetune(make_config({**settings, "out": str(tmp_path / "cut")}))
    assert all(tree is not None for batch in seen for tree in batch.trees)
    code, summary = edgezo_json("finetune", "--resume", "--out", tmp_path / "cut")
    assert code == 0 and summary["trained_sha256"] == whole["trained_sha256"]


def test_an_evaluation_and_training_rows_are_those_of_whole_options(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_config({**asked, "train": "head"})
    fast = evaluate(asked["model"], cfg)
    dataset = open_request(cfg).dataset
    whole = [replace(e, rows=e.whole_rows, endings=()) for e in dataset.train]
    assert data_hash(dataset.train) == data_hash(whole) == data_hash(PackedExamples(whole))
    real = PackedExamples.__getitem__

    def apart(self: PackedExamples, index: Any) -> Any:
        item = real(self, index)
        return (
            [replace(i, apart=True) for i in item]
            if isinstance(index, slice)
            else replace(item, apart=True)
        )

    monkeypatch.setattr(PackedExamples, "__getitem__", apart)
    with forwards() as seen:
        slow = evaluate(asked["model"], cfg)
    assert not any(tree is not None for batch in seen for tree in batch.trees)
    assert fast["value"] == slow["value"] and fast["loss"] == pytest.approx(slow["loss"], rel=1e-5)


def test_rows_without_one_of_the_labels_are_evaluated_with_the_words_of_the_run(
    asked: dict[str, Any], edgezo_json: Any, edgezo: Any, tmp_path: Path
) -> None:
    finetune(make_config({**asked, "out": str(tmp_path / "run")}))
    rows = [json.loads(line) for line in Path(asked["data"]).read_text().splitlines()]
    labels = sorted({row["topic"] for row in rows})
    ordered = [r for label in labels for r in rows if r["topic"] == label]
    fewer = [r for r in ordered if r["topic"] != labels[0]]
    counts, losses = [], []
    for name, some in (("all", ordered), ("fewer", fewer), ("one", ordered[-1:])):
        file = write_rows(tmp_path / f"{name}.jsonl", some)
        code, made = edgezo_json("eval", "--model", tmp_path / "run", "--data", file)
        assert code == 0
        counts.append(made["n"])
        losses.append(made["loss"] * made["n"])
    assert counts == [len(ordered), len(fewer), 1]
    # The rows of the first label are what the two differ by.
    only = write_rows(tmp_path / "only.jsonl", [r for r in ordered if r["topic"] == labels[0]])
    code, made = edgezo_json("eval", "--model", tmp_path / "run", "--data", only)
    assert code == 0 and losses[0] - losses[1] == pytest.approx(made["loss"] * made["n"], rel=1e-4)
    _, _, err = edgezo("eval", "--model", tmp_path / "run", "--data", only)
    assert f"no row has label {', '.join(labels[1:])}" in err


def test_other_words_are_another_task(asked: dict[str, Any], edgezo: Any, tmp_path: Path) -> None:
    finetune(make_config({**asked, "out": str(tmp_path / "run")}))
    rows = [json.loads(line) for line in Path(asked["data"]).read_text().splitlines()]
    others = write_rows(
        tmp_path / "others.jsonl",
        [{**r, "topic": r["topic"].replace("fees", "order")} for r in rows],
    )
    code, _, err = edgezo("eval", "--model", tmp_path / "run", "--data", others)
    assert code == 1 and "same label words in the same order" in err


def test_the_plan_has_the_time_of_an_evaluation_by_words_and_steps_behind_a_probe(
    asked: dict[str, Any], edgezo_json: Any
) -> None:
    options = ("--model", asked["model"], "--data", asked["data"], "--label-field", "topic")
    options = (*options, "--template", asked["template"], "--max-mem", "2GB", "--precision", "fp32")
    code, plan = edgezo_json("plan", *options)
    _, few = edgezo_json("plan", *options, "--eval-limit", 3)
    assert code == 0 and few["evaluation_s"] == pytest.approx(plan["evaluation_s"] / 3, rel=0.05)
    _, unprobed = edgezo_json("plan", *options, "--train", "lowrank+head")
    assert unprobed["step_s"] > 1.5 * plan["step_s"] > 0  # the words, and the vocabulary twice
    masks = [item for item in plan["items"] if item["name"] == "option masks"]
    assert masks and masks[0]["bytes"] > 0


def test_label_words_without_ids_are_told_apart_by_their_names() -> None:
    facts = {"kind": "choice", "label_ids": [], "label_names": ["no good", "no bad"]}

    def data(*names: str) -> Dataset:
        return Dataset("choice", (), (), (), names, ())

    assert same_task(facts, data("no good", "no bad"))
    assert not same_task(facts, data("very cold", "very warm"))
