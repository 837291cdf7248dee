"""First-order baselines of ``bench accuracy``: the rows, losses and evaluation of a run, in a study beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_accuracy import made
from test_runs import run_of

from edgezo.bench import accuracy
from edgezo.bench.accuracy_baselines import FIRST_ORDER_BASELINES, Request, Trainer, loss_of, run
from edgezo.bench.study import read_study
from edgezo.errors import EdgezoError, UsageError
from edgezo.run.session import open_request

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
FREE = ("precision", "micro_batch", "max_mem_bytes")


def asked(bench, kind="label", **more):
    settings = {k: v for k, v in bench.settings(kind).items() if k not in FREE}
    return {**settings, **more}


@pytest.mark.parametrize("kind", ["label", "choice", "completion"])
def test_before_the_first_step_a_baseline_has_the_losses_of_a_run(kind, bench, tmp_path):
    ours = run_of(bench, tmp_path / "run", kind, estimator="lora", micro_batch=4)
    for name in ("lora", "adamw"):
        theirs = run(asked(bench, kind, baseline=name), tmp_path / name)
        assert theirs["loss_first"] == pytest.approx(ours["loss_first"], abs=1e-4)
        for value in ("value", "loss", "n"):
            assert theirs["eval_before"][value] == pytest.approx(
                ours["eval_before"][value], abs=1e-4
            )
        assert theirs["steps"] == 3 and theirs["peak_rss_bytes"] > 0
        assert theirs["eval_after"]["loss"] != theirs["eval_before"]["loss"]
        assert json.loads((tmp_path / name / "summary.json").read_text()) == theirs


@pytest.mark.parametrize("name", FIRST_ORDER_BASELINES)
def test_what_is_trained_is_all_weights_or_what_peft_adds(name, bench):
    request = Request.of(asked(bench, baseline=name))
    dataset = open_request(request.cfg).dataset
    trainer = Trainer(request, bench.model, False, dataset)
    values = sum(p.numel() for p in trainer.trained)
    whole = sum(p.numel() for p in trainer.module.parameters())
    assert values == whole if name == "adamw" else 0 < values < whole / 3
    first = trainer.step(dataset.train[:4], 0.01)
    for _ in range(8):
        last = trainer.step(dataset.train[:4], 0.01)
    assert last < first


def test_padding_changes_no_loss(bench):
    request = Request.of(asked(bench, baseline="adamw"))
    dataset = open_request(request.cfg).dataset
    trainer = Trainer(request, bench.model, False, dataset)
    with torch.no_grad():
        together = trainer._scored(dataset.train[:6])
        for example, (loss, prediction) in zip(dataset.train[:6], together, strict=True):
            (row,) = example.rows
            logits = trainer.module(input_ids=torch.tensor(row.ids)[None]).logits[0]
            alone = loss_of([logits[list(row.score_at)]], example, dataset)
            assert (
                float(loss) == pytest.approx(float(alone[0]), abs=1e-5) and prediction == alone[1]
            )


def test_a_study_runs_them_beside_edgezo_once(tmp_path):
    given = made(tmp_path, seeds=[0], forwards=48)
    given["common"]["precision"] = "fp32"
    given["methods"] = {
        "ours": {"estimator": "lora"},
        "peft": {"baseline": "lora", "lr": 1e-2},
    }
    result = accuracy.bench_accuracy(read_study(given), threads=1, out=tmp_path / "out")
    ours, theirs = result["rows"]
    assert "error" not in ours and "error" not in theirs, result["rows"]
    # A backward pass counts: our blocks are run twice and gone back through, theirs once and gone back through.
    assert (ours["steps"], theirs["steps"]) == (4, 6)
    assert theirs["curve"][0]["value"] == ours["curve"][0]["value"]
    assert [point["step"] for point in theirs["curve"]] == [0, 2, 4, 6]
    assert theirs["peak_rss_bytes"] > 0 and result["medians"][1]["peak_bytes"] > 0
    made_at = {
        file: file.stat().st_mtime_ns for file in Path(tmp_path / "out").rglob("summary.json")
    }
    assert accuracy.bench_accuracy(read_study(given), threads=1, out=tmp_path / "out") == result
    assert made_at == {file: file.stat().st_mtime_ns for file in made_at} and len(made_at) == 2


def test_what_a_baseline_does_not_know_is_refused_with_what_it_takes(tmp_path):
    wrong = {"baseline": "lora", "step": 0.1, "sigma": 0.1}
    with pytest.raises(UsageError, match="it takes baseline, lr, rank"):
        read_study(made(tmp_path, methods={"peft": wrong}))
    with pytest.raises(UsageError, match="there is no baseline 'sgd'"):
        Request.of({"model": "m", "task": "sst2", "baseline": "sgd"})
    with pytest.raises(UsageError, match="no learning rate"):
        Request.of({"model": "m", "task": "sst2", "baseline": "adamw", "lr": 0})


@pytest.mark.parametrize("name", FIRST_ORDER_BASELINES)
def test_a_baseline_writes_and_is_judged_as_a_run_is(name, bench, tmp_path):
    more = {"max_new_tokens": 6}
    ours = run_of(bench, tmp_path / "run", "completion", train="lowrank", **more)
    theirs = run(asked(bench, "completion", baseline=name, **more), tmp_path / name)
    assert theirs["eval_after"]["metric"] == "exact_match" and "f1" in theirs["eval_after"]
    if name != "prefix":  # which is random at first
        same = {k: ours["eval_before"][k] for k in ("metric", "value", "f1", "n")}
        assert {k: theirs["eval_before"][k] for k in same} == same


def test_a_prefix_for_a_masked_model_is_refused(tmp_path):
    with pytest.raises(EdgezoError, match="prefix is for causal models"):
        Trainer(Request("prefix", 0.01, {}, None), tmp_path, True, None)


def test_a_baseline_writes_without_the_penalties_that_a_model_ships_with(bench, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bench.model, model)
    shipped = {"repetition_penalty": 5.0, "do_sample": True, "no_repeat_ngram_size": 1}
    (model / "generation_config.json").write_text(json.dumps(shipped))

    def texts(path):
        settings = asked(bench, "completion", baseline="adamw", max_new_tokens=6, model=str(path))
        request = Request.of(settings)
        opened = open_request(request.cfg)
        assert opened.judge is not None
        return Trainer(request, path, False, opened.dataset, opened.judge)._written(opened.judge)

    assert texts(model) == texts(bench.model)
