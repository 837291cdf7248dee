"""First-order LoRA block by block: the curve of peft's LoRA, bit-exact resumes, a plan that holds."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny_models
import torch
from conftest import Bench, make_model
from forks import Blow
from peft import LoraConfig, get_peft_model
from test_kills import finish
from test_runs import of_evaluation, run_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from edgezo.bench.alignment import example_loss
from edgezo.data.batches import Example, batch_indices, pieces
from edgezo.data.dataset import Dataset
from edgezo.machine.hardware import machine
from edgezo.network.first_order import ALPHA
from edgezo.network.model import Model
from edgezo.plan.request import make_config
from edgezo.run.session import Opened, load_model, open_request, settle
from edgezo.run.train import finetune

KINDS = ("label", "choice", "completion", "text")
RATE, DECAY = 0.01, 0.1

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Warnings of peft about transformers and about the layers of tiny models.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


def opened(
    bench: Bench, kind: str = "label", bf16_fast: bool = False, **changes: Any
) -> tuple[Opened, Model]:
    settings = {"estimator": "lora", "rank": 4, "weight_decay": DECAY, **changes}
    request = open_request(make_config(bench.settings(kind, **settings)))
    # In fp32 on every machine: products of another dtype round differently.
    plain = replace(machine(), bf16_fast=bf16_fast)
    return request, load_model(settle(request, plain, 0), plain).model


def learn(model: Model, group: list[Example], micro_batch: int, most: int | None) -> list[float]:
    """The losses of a group, whose gradient is added to the adapters'."""
    losses = [0.0] * len(group)
    for batch in pieces(group, micro_batch, most):
        piece, _ = model.losses(batch, learn=1 / len(group))
        for slot, loss in zip(batch.slots, piece[0].tolist(), strict=True):
            losses[slot] = loss
    return losses


class Peft:
    """The slow twin: transformers, peft and torch's AdamW, one example at a time."""

    def __init__(self, path: Path, masked: bool, model: Model, rank: int):
        auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        base: Any = auto.from_pretrained(path, dtype=torch.float32).eval()
        config = LoraConfig(r=rank, target_modules="all-linear", lora_alpha=int(ALPHA))
        self.module: Any = get_peft_model(base, config).eval()
        assert model.adapters is not None
        adapters = dict(model.adapters.trained())
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                linear, _, which = name.removeprefix("base_model.model.").partition(".lora_")
                parameter.data.copy_(adapters.pop(f"{linear}.weight#lora_{which[0]}"))
        assert not adapters, "peft adapts the same linears"
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=DECAY)

    def step(self, group: list[Example], dataset: Dataset) -> list[float]:
        losses = torch.stack([example_loss(self.module, e, dataset).reshape(()) for e in group])
        losses.mean().backward()
        self.adamw.step()
        self.adamw.zero_grad()
        return losses.tolist()


def curves(path: Path, bench: Bench, kind: str, **changes: Any) -> tuple[list[Any], list[Any]]:
    """Losses of six steps of four examples: ours, in pieces of at most 20 tokens, and peft's."""
    request, model = opened(Bench(path, bench.data), kind, **changes)
    with torch.random.fork_rng():
        twin = Peft(path, model.masked, model, request.cfg.rank)
    train, ours, theirs = request.dataset.train, [], []
    for step in range(6):
        group = [train[i] for i in batch_indices(len(train), 4, 0, step)]
        ours.append(learn(model, group, 3, 20))
        assert model.adapters is not None
        model.adapters.update(RATE)
        theirs.append(twin.step(group, request.dataset))
    return ours, theirs


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_losses_of_a_run_are_those_of_peft_in_every_family(family, bench, tmp_path):
    layers = 3 if family == "gemma3_text" else 2
    # transformers takes every token of that number for padding; a row here has none.
    padding = {"pad_token_id": 299} if family == "roberta" else {}
    positions = {"max_position_embeddings": 430} if padding else {}
    path = make_model(tmp_path / family, family, num_hidden_layers=layers, **padding, **positions)
    masked = {"template": "{text} It was {mask}"} if padding else {}
    ours, theirs = curves(path, bench, "label" if masked else "completion", **masked)
    assert torch.tensor(ours).sub(torch.tensor(theirs)).abs().max() < 2e-4
    assert ours[0] != ours[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_a_run_are_those_of_peft_for_every_kind_of_data(kind, bench):
    ours, theirs = curves(bench.model, bench, kind, rank=8)
    assert torch.tensor(ours).sub(torch.tensor(theirs)).abs().max() < 2e-4


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_over_codes_the_gradient_is_that_of_the_weights_they_stand_for(precision, bench):
    """The twin is a model in fp32 whose matrices have the values that the codes stand for."""
    _, model = opened(bench, "completion", precision=precision)
    request, exact = opened(bench, "completion", precision="fp32")
    for name, layout in model.store.layouts.items():
        weights = exact.store.layouts[name].tensors()[""]
        layout.expand(slice(0, layout.shape[0]), weights)
    group = list(request.dataset.train[:4])
    for each in (model, exact):
        for value in each.adapters.values.values():
            value.data.add_(0.01)  # B is zero at the start, and A would have no gradient
    assert learn(model, group, 4, None) == pytest.approx(learn(exact, group, 4, None), rel=1e-4)
    for name, value in model.adapters.values.items():
        other = exact.adapters.values[name].grad
        assert (value.grad - other).norm() < 1e-3 * other.norm(), name


def test_a_group_in_pieces_has_the_gradient_of_the_group(bench):
    request, model = opened(bench, "text")
    group = list(request.dataset.train[:6])
    gradients = []
    for micro_batch, most in ((6, None), (1, None), (4, 15)):
        model.forget()
        learn(model, group, micro_batch, most)
        gradients.append({n: v.grad.clone() for n, v in model.adapters.values.items()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, other[name], rtol=1e-3, atol=1e-6), name


def test_an_infinite_loss_moves_nothing(bench):
    request, model = opened(bench)
    before = {n: t.clone() for n, t in model.adapters.tensors().items()}
    learn(model, list(request.dataset.train[:2]), 2, None)
    next(iter(model.adapters.values.values())).grad[0] = torch.inf
    model.adapters.update(RATE)
    assert all(torch.equal(before[n], t) for n, t in model.adapters.tensors().items())


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_replay_and_evaluation_give_what_the_run_has(precision, bench, edgezo_json, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    summary = run_of(bench, run, estimator="lora", precision=precision, step=RATE)
    assert summary["trained"] == "lora" and summary["directions"] is None
    code, replayed = edgezo_json("replay", run, "--out", copy)
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]
    for place in (run, copy):
        code, evaluation = edgezo_json("eval", "--model", place)
        assert code == 0 and of_evaluation(evaluation) == of_evaluation(summary["eval_after"])
    assert summary["eval_before"]["loss"] != summary["eval_after"]["loss"]


def test_a_run_from_disk_has_the_bits_of_the_run_in_memory(bench, tmp_path):
    path = make_model(tmp_path / "model", num_hidden_layers=4)
    deeper = Bench(path, bench.data)
    settings = {"estimator": "lora", "kind": "completion", "step": RATE, "precision": "int8"}
    in_memory = run_of(deeper, tmp_path / "here", **settings)
    on_disk = run_of(deeper, tmp_path / "away", residency="disk", **settings)
    assert (
        on_disk["residency"] == "disk" and on_disk["trained_sha256"] == in_memory["trained_sha256"]
    )
    assert on_disk["disk_written_bytes"] == 0
    # Both micro-batches read each of four blocks for the forward and again for the backward pass.
    block = json.loads((tmp_path / "away" / "plan.json").read_text())["disk_bytes"] / 4
    assert on_disk["disk_read_bytes"] <= 2 * 2 * 4 * block


BLOWS = [
    Blow("record", 5, 0.5),
    Blow("record", 3, 1),
    Blow("cut", 1, 0),
    Blow("snapshot", 1, 0.5),
    Blow("head.safetensors", 1, 0),
    Blow("head.safetensors", 2, 1),
    Blow("metrics", 4, 0.5),
    Blow("summary.json", 1, 0),
]


def test_a_run_that_is_killed_goes_on_to_the_same_bits(bench, tmp_path):
    more = {"batch_size": 3, "micro_batch": 2, "snapshot_every": 4, "steps": 40}
    whole, run = tmp_path / "whole", tmp_path / "run"

    def arguments(out: Path) -> list[str]:
        request = bench.arguments(estimator="lora", precision="int8", out=out, **more)
        return ["finetune", *request, "--eval-every", "20"]

    whole_summary = finish(arguments(whole), tmp_path / "printed")
    args = arguments(run)
    for blow in BLOWS:
        code, _, err = forks.start(args, tmp_path / "printed", blow).end()
        assert code == -signal.SIGKILL, (blow, err)
        args = ["finetune", "--resume", "--out", str(run)]
    summary = finish(args, tmp_path / "printed")
    assert summary["trained_sha256"] == whole_summary["trained_sha256"]
    assert summary["eval_after"] == whole_summary["eval_after"]
    for name in ("journal.bin", "head.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_of_auto_is_a_run_of_what_it_chose(bench, edgezo_json, tmp_path):
    run = tmp_path / "run"
    arguments = bench.arguments("completion", estimator="auto", out=run)
    code, summary = edgezo_json("finetune", *arguments)
    assert code == 0 and summary["estimator"] == "lora"
    assert 'estimator = "lora"' in (run / "config.toml").read_text()
    reasons = {
        d["name"]: d["reason"] for d in json.loads((run / "plan.json").read_text())["decisions"]
    }
    assert "auto: first-order, and fits" in reasons["method"]
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again == summary


def test_estimators_lists_it(edgezo_json):
    code, listed = edgezo_json("estimators")
    row = next(row for row in listed["estimators"] if row["name"] == "lora")
    assert code == 0 and row["train"] == ["lora"] and row["directions"] is None


def test_losses_are_journalled_and_fall(bench, tmp_path):
    summary = run_of(bench, tmp_path / "run", "completion", estimator="lora", steps=15, step=RATE)
    assert summary["loss_last"] < summary["loss_first"]
    more = {"out": summary["run"], "estimator": "lora", "steps": 15, "step": RATE}
    again = finetune(make_config(bench.settings("completion", **more)), resume=True)
    assert again["trained_sha256"] == summary["trained_sha256"]


def test_benches_of_estimates_refuse_what_has_the_gradient(bench, edgezo, tmp_path):
    arguments = ["--model", bench.model, "--data", bench.data / "completion.jsonl"]
    arguments += ["--out", tmp_path / "out"]
    code, _, err = edgezo("bench", "alignment", *arguments, "--estimators", "lora")
    assert code == 2 and "trains with the true gradient" in err
    code, _, err = edgezo("bench", "speed", *arguments, "--estimators", "addax")
    assert code == 2 and "all alike" in err
