"""Meta-training: slopes are true, a seed says everything, and what is learned lowers the loss, under every credit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELLED, Bench, make_model

from edgezo.bench.meta_train import MetaRequest, MetaTrainer, layer_of, meta_train, task_of
from edgezo.data.dataset import Dataset
from edgezo.errors import DoesNotFit, UsageError
from edgezo.plan.request import make_config
from edgezo.run.finetuner import load_finetuner
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import recipe_of
from edgezo.run.session import open_request
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
CREDITS = ("zo-finetuner", "zo-finetuner-grzo")


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench with a model of two blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return Bench(make_model(folder / "model", num_hidden_layers=2), bench.data)


def settings_of(bench: Bench, **changes: Any) -> dict[str, Any]:
    return {"model": str(bench.model), **LABELLED, "batch_size": 6, **changes}


def trainer_of(bench: Bench, kind: str = "label", **changes: Any) -> MetaTrainer:
    request = changes.pop("request", MetaRequest(restart=8))
    fixed = {"precision": "fp32", "data": str(bench.data / f"{kind}.jsonl")}
    fixed |= {"max_mem_bytes": 10**15, "residency": "resident", "device": "cpu"}
    values = settings_of(bench, **{"estimator": "zo-finetuner", **changes, **fixed})
    if kind != "label":
        values = {k: v for k, v in values.items() if k not in LABELLED}
    opened = open_request(make_config(values, need_data=False))
    return MetaTrainer.of(opened, [opened.dataset], request, None)


def shaken(trainer: MetaTrainer) -> None:
    """Give the networks weights with which every tensor has another scale."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        w = trainer.finetuner.weights[2]
        w.copy_(torch.randn(w.shape, generator=generator) / 20)


@pytest.mark.parametrize("train", ["full", "lowrank+norms"])
@pytest.mark.parametrize("estimator", CREDITS)
@pytest.mark.parametrize("kind", ["label", "completion"])
def test_slopes_are_those_of_the_loss_after_the_step(
    deep: Bench, estimator: str, train: str, kind: str
) -> None:
    # A step large enough to show in fp32.
    step = {"zo-finetuner": 0.03, "zo-finetuner-grzo": 5.0}[estimator]
    trainer = trainer_of(deep, kind, estimator=estimator, train=train, step=step)
    shaken(trainer)
    trainer.step(0)
    group = trainer._group(0, 1)
    record, features = trainer._probed(1, 0, group)
    recipe = recipe_of(trainer.cfg, record)._replace(scales=None)

    def ahead(scales: list[float]) -> float:
        trainer._put_ahead(recipe, scales)
        return trainer._backward(group, 0)

    scales = trainer._scales(0, features).tolist()
    of_store = np.array(list(trainer.model.store.scales.values()))
    np.testing.assert_allclose(scales, of_store, rtol=1e-6)
    ahead(scales)
    slopes = trainer._slopes(recipe).numpy()
    assert np.abs(slopes).max() > 1e-3
    for place in np.argsort(-np.abs(slopes))[:3]:
        h = min(0.05, 0.003 / abs(slopes[place]))
        moved = [
            ahead([s + side * h * (i == place) for i, s in enumerate(scales)]) for side in (1, -1)
        ]
        assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(slopes[place], rel=0.05)


def test_the_networks_follow_the_gradient_through_scale_and_normaliser(deep: Bench) -> None:
    trainer = trainer_of(deep)
    shaken(trainer)
    features = trainer.tuners[0].features(None)
    generator = torch.Generator().manual_seed(1)
    slopes = torch.randn(len(trainer.places), generator=generator, dtype=torch.float64)

    def value() -> float:
        return float((trainer._scales(0, features) * slopes).sum().detach())

    before, start = value(), [w.detach().clone() for w in trainer.finetuner.weights]
    trainer.request = MetaRequest(rate=1e-4)
    trainer._learn(trainer._scales(0, features), slopes)
    parts = zip(trainer.finetuner.weights, start, strict=True)
    moved = [(now - then).detach() for now, then in parts]
    length = sum(float(m.square().sum()) for m in moved) ** 0.5
    assert length == pytest.approx(1e-4)
    # Steepest: no other step of the length lowers it by more, and half of it lowers it by half.
    lowered = before - value()
    for weights, then, m in zip(trainer.finetuner.weights, start, moved, strict=True):
        with torch.no_grad():
            weights.copy_(then + m / 2)
    assert lowered > 0 and before - value() == pytest.approx(lowered / 2, rel=0.01)
    for _ in range(5):
        drawn = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in start]
        size = sum(float(d.square().sum()) for d in drawn) ** 0.5
        for weights, then, d in zip(trainer.finetuner.weights, start, drawn, strict=True):
            with torch.no_grad():
                weights.copy_(then - d * 1e-4 / size)
        assert before - value() < lowered
    total = trainer.tuners[0].sizes
    normalised = trainer._scales(0, features).detach().numpy()
    assert (total * normalised**2).sum() == pytest.approx(total.sum())


def test_module_and_store_agree_on_the_loss_all_along_a_trajectory(deep: Bench) -> None:
    for train in ("full", "lowrank+norms"):
        trainer = trainer_of(deep, train=train)
        first = None
        for number in range(9):  # the last one begins again
            group = trainer._group(0, number)
            row = trainer.step(number)
            assert np.isfinite(row["ahead"])
            if number == 0:
                first = row["loss"]
                trainer.model.store.scales = {}
            from edgezo.data.batches import collate

            batch = collate(group, range(len(group)))
            of_store = float(trainer.model.losses(batch)[0].mean())
            of_module = trainer._backward(group, 0)
            assert of_store == pytest.approx(of_module, abs=2e-5)
        assert first is not None
        trainer._begin_again()
        group = trainer._group(0, 0)
        assert trainer._backward(group, 0) == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "sharing"),
    [("zo-finetuner", "block"), ("zo-finetuner-grzo", "block"), ("zo-finetuner-grzo", "layer")],
)
def test_what_is_learned_lowers_the_loss_faster_in_other_directions(
    deep: Bench, estimator: str, sharing: str, tmp_path: Path
) -> None:
    out = tmp_path / "f.safetensors"
    result = meta_train(
        settings_of(deep, estimator=estimator),
        [{"data": str(deep.data / "label.jsonl")}],
        MetaRequest(steps=40, restart=10, sharing=sharing, rate=0.1),
        out,
    )
    assert result["scales"]["most"] > 1.5 * result["scales"]["least"]
    plain = trainer_of(deep, estimator=estimator, seed=1)
    trained = replaced(plain, out)
    before, after = (
        np.mean([gain_at_base(trainer, number) for number in range(20)])
        for trainer in (plain, trained)
    )
    assert after > 1.2 * before > 0, (after, before)


def replaced(trainer: MetaTrainer, file: Path) -> MetaTrainer:
    """The trainer with a finetuner from a file."""
    return MetaTrainer(
        trainer.cfg,
        trainer.request,
        trainer.opened,
        trainer.model,
        trainer.module,
        load_finetuner(file),
        trainer.datasets,
    )


def gain_at_base(trainer: MetaTrainer, number: int) -> float:
    """What a step of the first order in its size would take off the loss: <grad, scaled estimate>."""
    trainer._score(0)
    group = trainer._group(0, number)
    record, features = trainer._probed(number, 0, group)
    recipe = recipe_of(trainer.cfg, record)._replace(scales=None)
    trainer._backward(group, 0)
    slopes = trainer._slopes(recipe)
    return -float((slopes * trainer._scales(0, features).detach()).sum())


def test_the_same_request_writes_the_same_bytes_and_another_seed_others(
    deep: Bench, tmp_path: Path
) -> None:
    written = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tasks = [{"data": str(deep.data / "label.jsonl")}] * 2
        out = tmp_path / f"{name}.safetensors"
        meta_train(settings_of(deep, seed=seed), tasks, MetaRequest(steps=5, restart=3), out)
        written[name] = out.read_bytes()
    assert written["a"] == written["b"] != written["c"]


def test_every_round_has_every_task_once_in_an_order_of_its_own() -> None:
    rounds = [[task_of(4 * turn + at, 4, 7) for at in range(4)] for turn in range(20)]
    for turn, in_round in enumerate(rounds):
        assert sorted(in_round) == [(task, turn) for task in range(4)]
    assert len({tuple(task for task, _ in in_round) for in_round in rounds}) > 5


def test_tasks_of_other_words_are_learned_from_in_turn(deep: Bench, tmp_path: Path) -> None:
    trainer = trainer_of(deep)
    one = trainer.datasets[0]
    other = Dataset(one.kind, one.train, (), tuple(reversed(one.label_ids)), (), ())
    trainer = MetaTrainer.of(trainer.opened, [one, other], MetaRequest(restart=4), None)
    seen: dict[int, list[float]] = {0: [], 1: []}
    for number in range(6):
        row = trainer.step(number)
        seen[int(row["task"])].append(row["loss"])
        assert set(trainer.model.scorer.label_ids.tolist()) == set(one.label_ids)
    assert len(seen[0]) == len(seen[1]) == 3
    assert not np.allclose(seen[0][0], seen[1][0])  # the words' roles are exchanged
    record: StepRecord = trainer.previous[0]
    assert record.scales is not None and len(record.scales) == 1 + len(trainer.places)


def test_layers_share_by_name() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj.weight") == "model.layers.12"
    assert layer_of("transformer.h.0.ln_1.weight") == "transformer.h.0"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens.weight"


def test_the_command_makes_a_file_that_a_run_takes(
    deep: Bench, tmp_path: Path, edgezo_json: Any
) -> None:
    out = tmp_path / "made" / "f.safetensors"
    words = [part for name, value in LABELLED.items() for part in (f"--{name}", value)]
    request = ["--model", deep.model, "--data", deep.data / "label.jsonl", *words, "--out", out]
    request += ["--steps", 3, "--restart", 2, "--batch-size", 4, "--sharing", "layer"]
    code, result = edgezo_json("meta-train", *request)
    assert code == 0, result
    assert result["out"] == str(out) and result["sharing"] == "layer" and result["steps"] == 3
    assert json.dumps(result, allow_nan=False)
    code, result = edgezo_json("meta-train", *request)
    assert code == 2 and "exists already" in result["error"]
    for name in CREDITS:
        run = deep.settings(estimator=name, finetuner=str(out), out=str(tmp_path / name))
        assert finetune(make_config(run))["steps"] == 3


def test_requests_that_cannot_be_are_refused_before_anything_is_made(
    deep: Bench, tmp_path: Path
) -> None:
    label, text = ({"data": str(deep.data / f"{kind}.jsonl")} for kind in ("label", "text"))
    out = tmp_path / "f.safetensors"
    for changes, tasks, request, word in (
        ({}, [], MetaRequest(), "one or more tasks"),
        ({"estimator": "mezo"}, [label], MetaRequest(), "uses no finetuner"),
        ({"train": "full+head"}, [label], MetaRequest(), "full, lowrank or norms"),
        ({"sigma": -1}, [label], MetaRequest(sharing="all", steps=0), "--sharing all"),
        ({}, [label, {**text, "template": None, "labels": None}], MetaRequest(), "of one kind"),
    ):
        with pytest.raises(UsageError, match=word):
            meta_train(
                settings_of(deep, **{"estimator": "zo-finetuner", **changes}), tasks, request, out
            )
    with pytest.raises(DoesNotFit, match="runs backward"):
        meta_train(
            settings_of(deep, estimator="zo-finetuner"),
            [label],
            MetaRequest(),
            out,
            max_mem_bytes=10**6,
        )
    assert not out.exists()
