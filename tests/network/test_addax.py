"""Addax: gradients of the short examples and GRZO of the others train the same factors."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import make_model
from forks import Blow
from test_kills import finish
from test_lora import learn, opened
from test_planner import MB, SST2, item, plan
from test_runs import contents, of_evaluation, run_of

from edgezo.bench.alignment import example_loss, in_trained, plain_module
from edgezo.data.token_stats import TokenStats
from edgezo.network.first_order import split_by_length
from edgezo.run.journal import open_journal

pytestmark = pytest.mark.usefixtures("one_thread")
ADDAX = {"estimator": "addax", "train": "lowrank"}
BETWEEN = 12  # tokens: about half of the fixture's rows have at most so many


def test_the_gradient_of_the_factors_is_that_of_autograd(bench):
    for kind in ("label", "completion"):
        request, model = opened(bench, kind, short_tokens=BETWEEN, **ADDAX)
        for trainable in model.store.trainables.values():
            trainable.values.add_(0.01)
        group = list(request.dataset.train[:4])
        module = plain_module(request, replace_factors(model))
        losses = torch.stack([example_loss(module, e, request.dataset) for e in group])
        losses.mean().backward()
        assert learn(model, group, 3, 30) == pytest.approx(losses.tolist(), rel=1e-4)
        assert model.factors is not None
        for name, gradient in in_trained(module, model.store).items():
            learned = model.factors.values[name].grad
            assert learned is not None and gradient.norm() > 0
            assert (learned - gradient).norm() < 1e-3 * gradient.norm(), name


def replace_factors(model):
    """The model with its factors folded into its matrices, as a plain module has them."""
    layouts = {}
    for name, layout in model.store.layouts.items():
        factor = model.store.trainables.get(f"{name}#lowrank")
        if factor is None:
            layouts[name] = layout
            continue
        moved = layout.tensors()[""] + factor.values @ model.store.basis(name, layout.shape[1])
        layouts[name] = type(layout)(moved)
    return replace(model, store=replace(model.store, layouts=layouts))


def losses_of(run: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_journal(run / "journal.bin", resume=False) as journal:
        records = list(journal.records(0))
    return np.stack([r.losses for r in records]), np.stack([r.credit for r in records])


def test_only_longer_examples_are_probed_and_have_credit(bench, tmp_path):
    run_of(bench, tmp_path / "run", short_tokens=BETWEEN, steps=6, **ADDAX)
    losses, credit = losses_of(tmp_path / "run")
    probed = losses[:, 0] != losses[:, 1]
    assert 0 < probed.sum() < probed.size
    assert np.array_equal(credit != 0, probed)


def test_with_no_short_example_it_is_grzo_and_with_no_long_one_first_order(bench, tmp_path):
    grzo = run_of(bench, tmp_path / "grzo", train="lowrank")
    none = run_of(bench, tmp_path / "none", short_tokens=0, **ADDAX)
    assert none["trained_sha256"] == grzo["trained_sha256"]
    every = run_of(bench, tmp_path / "all", "completion", short_tokens=500, steps=15, **ADDAX)
    assert not losses_of(tmp_path / "all")[1].any()
    assert every["loss_last"] < every["loss_first"]


def test_a_group_is_divided_by_the_tokens_of_its_examples(bench):
    request, _ = opened(bench, short_tokens=BETWEEN, **ADDAX)
    group = list(request.dataset.train[:12])
    short, others = split_by_length(group, BETWEEN)
    assert sorted(short + others) == list(range(12)) and short and others
    assert max(group[s].tokens for s in short) <= BETWEEN
    assert min(group[s].tokens for s in others) > BETWEEN


def test_a_killed_run_goes_on_to_the_same_bits_and_is_replayed_from_its_snapshot(
    bench, edgezo_json, tmp_path
):
    more = {
        "batch_size": 4,
        "micro_batch": 2,
        "snapshot_every": 4,
        "steps": 24,
        "precision": "int8",
    }
    whole, run = tmp_path / "whole", tmp_path / "run"

    def arguments(out: Path) -> list[str]:
        settings = {**ADDAX, "train": "lowrank+head", "short_tokens": BETWEEN, "out": out, **more}
        return ["finetune", *bench.arguments(**settings)]

    expected = finish(arguments(whole), tmp_path / "printed")
    args = arguments(run)
    for blow in (Blow("record", 6, 0.5), Blow("update", 9, 1), Blow("head.safetensors", 2, 0)):
        code, _, err = forks.start(args, tmp_path / "printed", blow).end()
        assert code == -signal.SIGKILL, (blow, err)
        args = ["finetune", "--resume", "--out", str(run)]
    summary = finish(args, tmp_path / "printed")
    assert summary["trained_sha256"] == expected["trained_sha256"]
    for name in ("journal.bin", "head.safetensors"):
        assert contents(run)[name] == contents(whole)[name]
    code, replayed = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == expected["trained_sha256"]
    for place in (run, tmp_path / "copy"):
        code, evaluation = edgezo_json("eval", "--model", place)
        assert code == 0 and of_evaluation(evaluation) == of_evaluation(expected["eval_after"])


def test_from_disk_it_has_the_bits_of_the_run_in_memory(bench, tmp_path):
    deeper = replace(bench, model=make_model(tmp_path / "model", num_hidden_layers=3))
    settings = {"precision": "int8", "short_tokens": BETWEEN, **ADDAX}
    in_memory = run_of(deeper, tmp_path / "here", **settings)
    on_disk = run_of(deeper, tmp_path / "away", residency="disk", **settings)
    assert (
        on_disk["residency"] == "disk" and on_disk["trained_sha256"] == in_memory["trained_sha256"]
    )


def test_the_plan_goes_back_through_as_much_as_there_is_room_for(bench, tmp_path):
    def short(cap_mb: int, tokens: TokenStats = SST2) -> int:
        planned = plan(tokens, estimator="addax", precision="int8", max_mem_bytes=cap_mb * MB)
        assert planned.needed_bytes <= cap_mb * MB
        assert planned.short_tokens is not None
        return planned.short_tokens

    long = TokenStats("label", tuple(range(2000, 0, -20)), 1, 2)
    limits = [short(cap_mb, long) for cap_mb in (800, 850, 900, 1000)]
    assert limits == sorted(limits) and limits[0] < limits[-1] == 2000
    assert short(900) >= SST2.tokens[0], "every example"
    planned = plan(long, estimator="addax", precision="int8", max_mem_bytes=900 * MB)
    assert item(planned, "gradients") == 12 * 8 * 30 * 5184
    summary = run_of(bench, tmp_path / "run", **ADDAX)
    assert "short_tokens" in json.loads((tmp_path / "run" / "plan.json").read_text())
    assert summary["estimator"] == "addax"
