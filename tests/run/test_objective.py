"""Objectives: scores of predictions in place of losses, in whole runs on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import Bench, make_model, write_rows
from test_generate import written as transformers_writes
from transformers import AutoModelForCausalLM

from edgezo.data.batches import batch_indices
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import rss_bytes
from edgezo.plan import calibration
from edgezo.plan.request import make_config
from edgezo.run import objective as judge
from edgezo.run import session
from edgezo.run.answering import evaluation_parts
from edgezo.run.evaluate import replay
from edgezo.run.journal import open_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.train import finetune
from edgezo.zo.noise import Key

pytestmark = pytest.mark.usefixtures("one_thread")

MOST = 9  # tokens, as in test_generate
VOWELS = """
def share(prediction, row):
    assert row["answers"] and "prompt" in row
    return sum(c in "aeiou" for c in prediction) / max(1, len(prediction))

def length(prediction, row):
    return len(prediction)

def same(prediction, row):
    return 1

def broken(prediction, row):
    return row["no such field"]

def endless(prediction, row):
    return float("inf")

def text(prediction, row):
    return "good"

def loud(prediction, row):
    print("looked at", prediction)
    return len(prediction)

def leaves(prediction, row):
    raise SystemExit(0)

def huge(prediction, row):
    return 10**5000

print("imported")

name = "no function"
"""
Module = Callable[..., str]


@pytest.fixture
def vowels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Names a function of a module in the current directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "own_scores.py").write_text(VOWELS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)
    return lambda name: f"own_scores:{name}"


def run_of(bench: Bench, out: Path, kind: str = "completion", **changes: Any) -> dict[str, Any]:
    if kind == "completion":
        changes = {"max_new_tokens": MOST, "sigma": 0.1, **changes}
    return finetune(make_config(bench.settings(kind, out=str(out), **changes)))


def records(run: Path) -> list[StepRecord]:
    with open_journal(run / "journal.bin", resume=False) as journal:
        return list(journal.records())


def opened_of(bench: Bench, kind: str, **changes: Any) -> tuple[session.Opened, Any]:
    """A request and its model as they are before the first step."""
    opened = session.open_request(make_config(bench.settings(kind, out="run", **changes)))
    planned = session.settle(opened, machine(), rss_bytes())
    return opened, session.load_model(planned, machine()).model


# ----------------------------------------------------------------------------- what a loss is


def test_losses_are_minus_the_scores_of_what_transformers_writes(
    bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    changes = {"objective": vowels("share"), "max_new_tokens": MOST, "sigma": 0.1, "train": "full"}
    run_of(bench, tmp_path / "run", steps=1, **changes)
    (record,) = records(tmp_path / "run")
    opened, model = opened_of(bench, "completion", **changes)
    module: Any = AutoModelForCausalLM.from_pretrained(bench.model)
    twin = reference.Twin(module, kind="completion", label_ids=())
    end = opened.tokenizer.eos_token_id
    for slot, i in enumerate(batch_indices(len(opened.dataset.train), 4, 0, 0)):
        example = opened.dataset.train[i]
        prompt = opened.tokenizer.decode(list(example.prompt))
        assert example.fields is not None and prompt == example.fields["prompt"]
        for side, sign in enumerate((1, -1)):
            twin.load(reference.explicit_weights(model, Key(0, 0), slot, sign * 0.1))
            ids = transformers_writes(twin.module, example.prompt, end)
            text = opened.tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip()
            score = sum(c in "aeiou" for c in text) / max(1, len(text))
            assert record.losses[side, slot] == np.float32(-score)
    assert len(set(record.losses.ravel().tolist())) > 2 and not record.skipped


@pytest.mark.parametrize("kind", ["label", "choice"])
def test_accuracy_of_label_words_and_options_is_whether_the_best_one_is_right(
    kind: str, bench: Bench, tmp_path: Path
) -> None:
    changes = {"objective": "accuracy", "sigma": 0.3, "batch_size": 16, "micro_batch": 5}
    run_of(bench, tmp_path / "run", kind, steps=1, **changes)
    (record,) = records(tmp_path / "run")
    opened, model = opened_of(bench, kind, **changes)
    twin = reference.Twin(
        AutoModelForCausalLM.from_pretrained(bench.model),
        kind=kind,
        label_ids=opened.dataset.label_ids,
    )
    for slot, i in enumerate(batch_indices(len(opened.dataset.train), 16, 0, 0)):
        example = opened.dataset.train[i]
        for side, sign in enumerate((1, -1)):
            twin.load(reference.explicit_weights(model, Key(0, 0), slot, sign * 0.3))
            with torch.no_grad():
                options = range(2)
                losses = [float(twin.loss(replace(example, label=o))) for o in options]
            assert record.losses[side, slot] == -float(np.argmin(losses) == example.label)


def test_the_split_of_a_group_changes_no_score(
    bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    hashes = set()
    for micro_batch in (1, 3, 4):
        out = tmp_path / str(micro_batch)
        summary = run_of(bench, out, objective=vowels("share"), micro_batch=micro_batch)
        hashes.add(summary["trained_sha256"])
    assert len(hashes) == 1


# ----------------------------------------------------------------------------- runs


def test_a_score_without_a_gradient_is_raised_by_training(
    bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    summary = run_of(
        bench,
        tmp_path / "run",
        objective=vowels("share"),
        steps=40,
        batch_size=8,
        micro_batch=8,
        step=0.3,
        schedule="constant",
    )
    found = [-record.losses.mean() for record in records(tmp_path / "run")]
    assert np.mean(found[-8:]) > np.mean(found[:8]) + 0.05
    assert summary["objective"] == "own_scores:share" and summary["trained"] == "lowrank"
    assert summary["eval_after"]["objective"] > summary["eval_before"]["objective"]
    assert summary["eval_after"]["metric"] == "objective"
    assert {"exact_match", "f1", "loss"} <= set(summary["eval_after"])


@pytest.mark.parametrize("estimator", ["grzo", "mezo", "fzoo", "grzo-one-sided", "hizoo", "lozo"])
def test_every_credit_takes_a_score_for_a_loss(
    estimator: str, bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary = run_of(bench, run, objective=vowels("length"), estimator=estimator, steps=2)
    assert all(record.credit.any() and (record.losses <= 0).all() for record in records(run))
    assert replay(run, tmp_path / "copy")["trained_sha256"] == summary["trained_sha256"]


def test_a_comparison_with_an_anchor_scores_both(
    bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    changes = {"estimator": "mezo-svrg", "refresh": 2, "step": 1e-3}
    run_of(bench, tmp_path / "run", objective=vowels("length"), **changes)
    assert [len(r.losses) for r in records(tmp_path / "run")] == [2, 4, 2]


def test_a_run_goes_on_bit_for_bit_and_its_replay_needs_no_objective(
    bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    summary = run_of(bench, run, objective=vowels("share"), steps=5)
    shutil.copytree(run, copy)
    with open_journal(copy / "journal.bin", resume=True) as journal:
        journal.truncate_to(2)
    (copy / "summary.json").unlink()
    again = finetune(
        make_config(
            bench.settings(
                "completion",
                out=str(copy),
                objective=vowels("share"),
                steps=5,
                max_new_tokens=MOST,
                sigma=0.1,
            )
        ),
        resume=True,
    )
    assert again["trained_sha256"] == summary["trained_sha256"]
    assert (run / "journal.bin").read_bytes() == (copy / "journal.bin").read_bytes()
    Path("own_scores.py").unlink()
    sys.modules.pop("own_scores")
    assert replay(run, tmp_path / "made")["trained_sha256"] == summary["trained_sha256"]
    with pytest.raises(UsageError, match="no module 'own_scores'"):
        run_of(bench, tmp_path / "other", objective=vowels("share"))


def test_scores_without_a_difference_move_nothing_and_are_recorded_so(
    bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    summary = run_of(bench, tmp_path / "run", objective=vowels("same"))
    assert all(record.skipped and not record.credit.any() for record in records(tmp_path / "run"))
    assert summary["eval_before"] == summary["eval_after"]
    assert summary["eval_after"]["objective"] == 1


def test_weights_on_disk_write_and_score_as_those_in_memory(
    bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    deep = Bench(make_model(tmp_path / "deep", num_hidden_layers=3), bench.data)
    found = [
        run_of(deep, tmp_path / where, objective=vowels("share"), residency=where, train="full")
        for where in ("resident", "disk")
    ]
    assert found[0]["trained_sha256"] == found[1]["trained_sha256"]
    assert found[0]["eval_after"] == found[1]["eval_after"]
    assert any(record.credit.any() for record in records(tmp_path / "disk"))


def test_a_rule_s_own_end_and_a_new_line_end_a_text(bench: Bench) -> None:
    opened, _ = opened_of(bench, "completion", max_new_tokens=MOST)
    found = opened.judge
    assert found is not None
    ids = opened.tokenizer(" warm\n and more")["input_ids"]
    assert found.over(ids) and found.answer(ids) == "warm"
    end = opened.tokenizer.eos_token_id
    assert found.over([ids[0], end]) and not found.over(ids[:1])
    assert found.answer([*opened.tokenizer(" warm dull")["input_ids"], end]) == "warm dull"


# ----------------------------------------------------------------------------- evaluation


def test_a_task_with_written_answers_is_evaluated_by_its_metrics(
    bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    rows = [
        {"context": f"It is {i}.", "question": "What?", "answers": {"text": [f"{i}", "it"]}}
        for i in range(12)
    ]
    (tmp_path / "squad").mkdir()
    for part in ("train", "validation"):
        write_rows(tmp_path / "squad" / f"{part}.jsonl", rows)
    asked = ["--task", "squad", "--data-root", tmp_path, "--precision", "fp32"]
    asked += ["--max-mem", "8GB", "--max-new-tokens", 3]
    code, found = edgezo_json("eval", "--model", bench.model, *asked)
    assert code == 0 and found["metric"] == "f1" and found["n"] == 12
    assert 0 <= found["exact_match"] <= found["value"] <= 1 and found["loss"] > 0
    code, found = edgezo_json("eval", "--model", bench.model, *asked, "--objective", "token-f1")
    assert code == 0 and found["objective"] == found["value"]
    code, found = edgezo_json("plan", "--model", bench.model, *asked, "--objective", "token-f1")
    assert code == 0 and any(item["name"] == "keys and values" for item in found["items"])


def test_label_words_show_the_objective_beside_their_accuracy(bench: Bench, tmp_path: Path) -> None:
    after = run_of(bench, tmp_path / "run", "label", objective="exact-match")["eval_after"]
    assert after["metric"] == "accuracy" and after["objective"] == after["value"]


def test_a_loss_has_neither_text_nor_score(bench: Bench, tmp_path: Path) -> None:
    opened, _ = opened_of(bench, "completion")
    assert opened.judge is None and opened.dataset.generation is None
    assert all(example.fields is None for example in opened.dataset.train)


@pytest.mark.parametrize("most", [1, 40, 2000])
def test_rows_that_write_at_once_keep_as_much_as_is_planned(most: int, bench: Bench) -> None:
    rows = opened_of(bench, "completion")[0].dataset.train
    parts = evaluation_parts(rows, most, 1024)
    assert sorted(i for part in parts for i in part) == list(range(len(rows)))
    for part in parts:
        kept = len(part) * (max(len(rows[i].prompt) for i in part) + most)
        assert len(part) == 1 or kept <= 1024


# ----------------------------------------------------------------------------- the plan


def test_what_is_kept_while_writing_is_planned_and_shrinks_with_the_micro_batch(
    bench: Bench,
) -> None:
    def kept(**changes: Any) -> int:
        changes = {"max_new_tokens": 200, **changes}
        opened = session.open_request(
            make_config(bench.settings("completion", out="run", **changes))
        )
        plan = session.settle(opened, machine(), rss_bytes()).plan
        items = {item.name: item.bytes for item in plan.items}
        return items.get("keys and values", 0)

    evaluating = kept()  # of the loss, with memory to spare
    dataset = opened_of(bench, "completion", max_new_tokens=1)[0].dataset
    prompt = max(len(e.prompt) for e in dataset.train)
    width = 2 * 2 * 8 * 4 * 2  # keys and values of 2 heads of 8 in fp32, in a block and once more
    written = len(dataset.validation) * (max(len(e.prompt) for e in dataset.validation) + 200)
    assert written < calibration.MOST_KEPT_TOKENS and evaluating == written * width
    for micro_batch in (30, 40):
        found = kept(objective="token-f1", micro_batch=micro_batch, batch_size=40)
        assert found == 2 * micro_batch * (prompt + 200) * width > evaluating
    assert kept(max_new_tokens=None) == 0


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("accurracy", "is not one of loss, accuracy"),
        ("own_scores", "nor module:function"),
        ("own_scores:", "nor module:function"),
        ("no_scores:share", "no module 'no_scores'"),
        ("own_scores.more:share", "no module 'own_scores.more'"),
        ("own_scores:shares", "has no function 'shares'"),
        ("own_scores:name", "has no function 'name'"),
        ("torn:share", "cannot be imported: SyntaxError"),
        ("needing:share", "needing needs 'not_here'"),
        ("accuracy", "take exact-match"),
    ],
)
def test_an_objective_that_is_not_to_be_had_is_refused(
    objective: str, said: str, bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    Path("torn.py").write_text("def share(:")
    Path("needing.py").write_text("import not_here")
    with pytest.raises(UsageError, match=said):
        run_of(bench, tmp_path / "run", objective=objective)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "failed on the prediction .* KeyError"),
        ("endless", "gave inf for the prediction"),
        ("text", "gave 'good' for the prediction"),
    ],
)
def test_a_score_that_is_none_ends_the_run_with_the_prediction(
    name: str, said: str, bench: Bench, vowels: Module, tmp_path: Path
) -> None:
    with pytest.raises(EdgezoError, match=said):
        run_of(bench, tmp_path / "run", objective=vowels(name))


def test_what_an_objective_does_not_go_with_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the exact head follows the gradient"):
        run_of(bench, tmp_path / "run", objective="token-f1", train="lowrank+head")
    with pytest.raises(UsageError, match="rows of text have none"):
        run_of(bench, tmp_path / "run", "text", objective="token-f1")
    with pytest.raises(UsageError, match="needs other directions"):
        run_of(bench, tmp_path / "run", objective="token-f1", estimator="ag-grzo")
    learned = Bench(
        make_model(tmp_path / "gpt2", "gpt2", num_hidden_layers=2, n_layer=1), bench.data
    )
    with pytest.raises(UsageError, match="has only 128 positions"):
        run_of(learned, tmp_path / "run", objective="token-f1", max_new_tokens=120)


def test_directions_that_no_seed_has_score_label_words(bench: Bench, tmp_path: Path) -> None:
    changes = {"estimator": "ag-grzo", "objective": "accuracy", "sigma": 0.3}
    summary = run_of(bench, tmp_path / "run", "label", **changes)
    assert summary["steps"] == 3
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["trained"]


def test_what_a_function_prints_is_no_part_of_the_result(
    bench: Bench, vowels: Module, edgezo_json: Any, tmp_path: Path
) -> None:
    asked = bench.arguments("label", objective=vowels("loud"), out=str(tmp_path / "run"))
    code, found = edgezo_json("finetune", *asked)
    assert code == 0 and found["steps"] == 3


@pytest.mark.parametrize("name", ["leaves", "huge"])
def test_a_function_that_leaves_or_overflows_ends_in_an_error(
    name: str, bench: Bench, vowels: Module, edgezo_json: Any, tmp_path: Path
) -> None:
    asked = bench.arguments("label", objective=vowels(name), out=str(tmp_path / "run"))
    code, found = edgezo_json("finetune", *asked)
    assert code == 1 and f"own_scores:{name}" in found["error"]


def test_a_run_is_evaluated_by_an_objective_that_it_was_not_trained_by(
    bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    summary = run_of(bench, tmp_path / "run", "label")
    assert "head" in summary["trained"] or "probe" in summary["trained"]
    code, found = edgezo_json("eval", "--model", tmp_path / "run", "--objective", "accuracy")
    assert code == 0 and found["objective"] == found["value"] == summary["eval_after"]["value"]


def test_a_run_whose_probes_all_score_the_same_says_so(
    bench: Bench, vowels: Module, edgezo: Any, tmp_path: Path
) -> None:
    asked = bench.arguments("label", objective=vowels("same"), out=str(tmp_path / "run"))
    code, _, err = edgezo("finetune", *asked)
    assert code == 0 and "all 3 steps were skipped" in err


def test_a_score_that_tells_nothing_ends_the_run_within_twenty_steps_with_the_cause(
    bench: Bench, vowels: Module, edgezo_json: Any, tmp_path: Path
) -> None:
    asked = bench.arguments("label", objective=vowels("same"), out=str(tmp_path / "run"), steps=30)
    code, found = edgezo_json("finetune", *asked)
    assert code == 1 and "in 20 steps" in found["error"] and "scored 1" in found["error"]
    assert len(records(tmp_path / "run")) == 20
    code, again = edgezo_json("finetune", "--resume", "--out", tmp_path / "run")
    assert code == 1 and "in 20 steps" in again["error"]  # one more step has told nothing either


@pytest.mark.parametrize(
    ("scores", "cause"),
    [
        ([[0, 0], [0, 0]], "never answers right"),
        ([[1, 1], [1, 1]], "nothing to improve"),
        ([[0, 1], [0, 1]], "larger --sigma"),
        ([[np.nan, np.inf], [np.nan, np.nan]], "no score was finite"),
    ],
)
def test_the_cause_of_no_signal_is_told_from_the_scores(
    scores: list[list[float]], cause: str
) -> None:
    losses, nothing = -np.array(scores, np.float32), np.zeros(2, np.float32)
    record = StepRecord(0, 2e-3, 0.1, True, losses, nothing)
    assert cause in judge.no_signal([record] * 20, "exact-match")


def test_a_batch_has_each_row_as_often_as_samples_say(bench: Bench, tmp_path: Path) -> None:
    request = {"credit": "by-prompt", "samples": 2, "train": "lowrank", "steps": 3}
    summary = run_of(bench, tmp_path / "run", "label", objective="accuracy", **request)
    assert summary["steps"] == 3
    again = replay(tmp_path / "run", tmp_path / "copy")
    assert again["trained_sha256"] == summary["trained_sha256"]
    with pytest.raises(UsageError, match="multiple"):
        run_of(bench, tmp_path / "other", "label", samples=3, train="lowrank")
