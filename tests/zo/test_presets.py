"""The contract that every preset keeps, so that a new preset needs no new test.

Each preset is tried with every precision that it supports, on a tiny Llama and the examples of a label task. The
reference holds explicit float64 weights and takes the step that the preset's paper describes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from preset_trials import (
    ON_STORES,
    SEED,
    SIGMA,
    UPDATED_ALONG_ANOTHER,
    Killed,
    Maker,
    Trial,
    make_finetuner,
    on_stores,
    presets,
    probed_of_quantized,
    settle,
    stores,
)
from small_plans import MACHINE
from torch import Tensor
from workshop import code_steps

from edgezo.data.token_stats import TokenStats
from edgezo.errors import DoesNotFit
from edgezo.machine import limits
from edgezo.network.loader import open_model
from edgezo.plan.planner import make_plan
from edgezo.plan.request import make_config
from edgezo.run.journal import Journal, create_journal, open_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import recipe_of
from edgezo.run.train import finetune
from edgezo.weights.layouts import Dense, Int8
from edgezo.weights.saved import saved_sha256, saved_tensors
from edgezo.weights.store import WeightStore
from edgezo.zo import masks
from edgezo.zo.axes import CREDITS, forwards
from edgezo.zo.axes import DIRECTIONS as DIRECTION_LAWS
from edgezo.zo.noise import Key
from edgezo.zo.presets import DEFAULT, ESTIMATORS, PRESETS

# ----------------------------------------------------------------------------- probed as said


@on_stores
def test_losses_are_those_of_explicit_weights_at_every_evaluation(
    name: str, precision: str, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = maker.trial(name, precision)
    settle(trial)
    model, key = trial.model, Key(SEED, 3)
    if name in UPDATED_ALONG_ANOTHER:
        monkeypatch.setattr(reference, "masked", probed_of_quantized)
    losses = trial.losses(3)[: len(model.evaluations)]
    wanted = np.empty_like(losses, dtype=np.float64)
    for number, evaluation in enumerate(model.evaluations):
        for slot, example in enumerate(trial.examples):
            candidate = slot if evaluation.candidate is None else evaluation.candidate
            weights = reference.explicit_weights(model, key, candidate, evaluation.sign * SIGMA)
            trial.twin.load(weights)
            wanted[number, slot] = float(trial.twin.loss(example).detach())
    assert len(losses) == forwards(trial.cfg.credit, trial.cfg.mask, trial.cfg.candidates)
    np.testing.assert_allclose(losses, wanted, atol=1e-4, rtol=1e-5)
    assert np.abs(wanted - wanted[:, ::-1]).max() > 1e-2
    assert len(losses) == 1 or np.abs(wanted[0] - wanted[1]).max() > 1e-2


# ----------------------------------------------------------------------------- moved as published

# Presets whose equations are tested elsewhere in this file.
OWN_TWIN = ("hizoo", "hizoo-block", "lozo-m", "zo-muon", "mezo-svrg", *UPDATED_ALONG_ANOTHER)


@pytest.mark.parametrize(("name", "precision"), [c for c in ON_STORES if c[0] not in OWN_TWIN])
def test_steps_are_those_of_the_paper(name: str, precision: str, maker: Maker) -> None:
    trial = maker.trial(
        name, precision, refresh=2 if PRESETS[name].directions[:3] == "low" else None
    )
    theta, states = trial.values(), {}
    for step in range(3):
        losses = trial.losses(step)
        before = {n: v.clone() for n, v in theta.items()}
        along = {n: trial.directions(step, n) for n in theta}
        trial.model.store.apply([trial.recipe(step, losses)])
        after = trial.values()
        for n, trainable in trial.model.store.trainables.items():
            state = states.setdefault(n, {})
            if name == "zo-adamu":
                state["moment"] = reference.centred(Key(SEED, step), trainable.target)[1]
            if (
                name == "vote"
                and (codes := trainable.layout.grid_step(every_row(trainable))) is not None
            ):
                state["unit"] = codes.double()
            wanted = reference.published_step(trial.cfg, step, theta[n], along[n], losses, state)
            moved = wanted - before[n]
            # fp32's own rounding, coefficients' 17 bits, and half a step of a coarser grid.
            spare = 3e-7 * before[n].abs() + 1e-4 * moved.abs().max() + grid(trainable.layout)
            assert bool(((after[n] - wanted).abs() <= spare).all()), (n, step)
            assert moved.abs().max() > 0 or n not in moving(trial, step)
            theta[n] = after[n]  # each step on its own: rounding does not add up


def every_row(trainable: Any) -> slice:
    return slice(0, trainable.target.rows)


def moving(trial: Trial, step: int) -> set[str]:
    store = trial.model.store
    return {n for n, r in store.trainables.items() if store.mask.scale(Key(SEED, step), r)}


def grid(layout: Any) -> Tensor:
    if isinstance(layout, Int8):
        return code_steps(layout)
    if not isinstance(layout, Dense) or layout.values.dtype == torch.float32:
        return torch.zeros(layout.shape, dtype=torch.float64)
    ulp = 2.0 ** (torch.floor(torch.log2(layout.values.double().abs() + 1e-30)) - 7)
    return ulp / 128 if layout.low is not None else 2 * ulp


@pytest.mark.parametrize("name", ["hizoo", "hizoo-block"])
def test_hizoo_divides_by_a_running_curvature_that_it_measures(
    name: str, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = 0.01
    monkeypatch.setattr(masks, "HESSIAN_PACE", pace)
    trial = maker.trial(name)
    trainables = trial.model.store.trainables
    curvature = {n: torch.ones(r.layout.shape, dtype=torch.float64) for n, r in trainables.items()}
    assert name == "hizoo" or all(r.state["hessian"].shape[1] == 1 for r in trainables.values())
    lr = trial.cfg.step
    for step in range(4):
        before, losses = trial.values(), trial.losses(step)
        trial.model.store.apply([trial.recipe(step, losses)])
        after = trial.values()
        plus, minus, plain = losses.astype(np.float64).mean(1)
        for n, trainable in trainables.items():
            z = reference.direction("shared", Key(SEED, step), trainable.target, 0)
            h = curvature[n]
            wanted = before[n] - lr * (plus - minus) / (2 * SIGMA) * z / torch.sqrt(h)
            torch.testing.assert_close(after[n], wanted, atol=1e-7, rtol=1e-4)
            measured = abs(plus + minus - 2 * plain) / (2 * SIGMA**2)
            squares = z**2 if name == "hizoo" else (z**2).mean(1, keepdim=True).expand_as(z)
            curvature[n] = (1 - pace) * h + pace * measured * h * squares
            stored = trainable.state["hessian"].double().expand_as(z)
            torch.testing.assert_close(stored, curvature[n], atol=0, rtol=1e-4)
    assert any((c - 1).abs().max() > 0.01 for c in curvature.values())


@pytest.mark.parametrize("precision", stores("mezo-svrg"))
def test_svrg_corrects_the_anchors_estimate_by_what_the_batch_says_of_both(
    precision: str, maker: Maker
) -> None:
    """Algorithm 1 in float64; the anchors are those of steps 0 and 2."""
    trial = maker.trial("mezo-svrg", precision, refresh=2)
    settle(trial)
    store, lr = trial.model.store, trial.cfg.step
    theta, anchor, at_anchor = trial.values(), {}, {}
    for step in range(5):
        losses = trial.losses(step)
        assert len(losses) == (2 if step % 2 == 0 else 4)
        along = {
            n: reference.direction("shared", Key(SEED, step), trainable.target, 0)
            for n, trainable in store.trainables.items()
        }
        delta = (losses[0] - losses[1]).astype(np.float64).mean() / (2 * SIGMA)
        if step % 2 == 0:
            anchor, at_anchor = theta, {n: delta * z for n, z in along.items()}
            g = at_anchor
        else:
            for slot, example in enumerate(trial.examples):  # the other two are those of the anchor
                for side, sign in enumerate((1, -1)):
                    moved = {n: anchor[n] + sign * SIGMA * z for n, z in along.items()}
                    with replaced(store, moved):
                        trial.twin.load(reference.explicit_weights(trial.model, Key(0, 0), 0, 0.0))
                    wanted = float(trial.twin.loss(example).detach())
                    assert abs(losses[2 + side, slot] - wanted) < 1e-4
            delta_at_anchor = (losses[2] - losses[3]).astype(np.float64).mean() / (2 * SIGMA)
            g = {n: (delta - delta_at_anchor) * z + at_anchor[n] for n, z in along.items()}
        store.apply([trial.recipe(step, losses)])
        after = trial.values()
        for n, step_of in g.items():
            moved_by = lr * step_of
            spare = 3e-7 * theta[n].abs() + 1e-4 * moved_by.abs().max()
            assert bool(((after[n] - theta[n] + moved_by).abs() <= spare).all()), (n, step)
        theta = after


@contextmanager
def replaced(store: WeightStore, values: dict[str, Tensor]) -> Iterator[None]:
    trainables = store.trainables
    before = {n: trainables[n].values.clone() for n in values}
    for n, v in values.items():
        trainables[n].values.copy_(v)
    try:
        yield
    finally:
        for n, v in before.items():
            trainables[n].values.copy_(v)


def test_lozo_m_keeps_its_momentum_in_the_basis_and_takes_it_along(maker: Maker) -> None:
    trial = maker.trial("lozo-m", refresh=2, rank=3)
    trainables = {n: r for n, r in trial.model.store.trainables.items() if not r.target.vector}
    rank, lr, n_of = 3, trial.cfg.step, {}
    bases: dict[str, Tensor] = {}
    for step in range(5):
        before, losses = trial.values(), trial.losses(step)
        along = {n: trial.directions(step, n) for n in trainables}
        trial.model.store.apply([trial.recipe(step, losses)])
        after = trial.values()
        c = (losses[0] - losses[1]).astype(np.float64).mean() / (2 * SIGMA)
        for n, trainable in trainables.items():
            key = Key(SEED, step)
            u = trial.model.store.directions.coordinates(key, trainable.target).double()
            v = trial.model.store.directions.basis(key, trainable.target).double()
            momentum = n_of.get(n, torch.zeros_like(u))
            if n in bases and not torch.equal(bases[n], v):
                momentum = momentum @ bases[n].T @ v / trainable.target.cols
            g = c * u
            if n in trial.used[0]:  # of an embedding each example moves the rows that it used
                part = torch.stack(
                    [(d * v[:, 0] * 0 + d).abs().sum(1) > 0 for d in along[n]]
                ).double()
                delta = (losses[0] - losses[1]).astype(np.float64) / (2 * SIGMA * len(part))
                g = (torch.from_numpy(delta)[:, None] * part).sum(0)[:, None] * u
            n_of[n], bases[n] = 0.9 * momentum + 0.1 * g, v
            wanted = before[n] - lr * n_of[n] @ v.T / math.sqrt(rank)
            moved = (wanted - before[n]).abs().max()
            spare = 3e-7 * before[n].abs() + 1e-4 * moved
            assert bool(((after[n] - wanted).abs() <= spare).all()), (n, step)
    assert all(r.state["momentum"].shape == (r.target.rows, rank) for r in trainables.values())


def test_zo_muon_moves_by_the_singular_vectors_of_its_coordinates(maker: Maker) -> None:
    rank = 3
    trial = maker.trial("zo-muon", refresh=2, rank=rank)
    store, lr = trial.model.store, trial.cfg.step
    for step in range(3):
        before, losses = trial.values(), trial.losses(step)
        recipe = trial.recipe(step, losses)
        store.apply([recipe])
        after, key = trial.values(), Key(SEED, step)
        tried = losses[1:].astype(np.float64).mean(1) - losses[0].astype(np.float64).mean()
        for name, trainable in store.trainables.items():
            target, change = trainable.target, before[name] - after[name]
            if target.vector:
                g = sum(x * d for x, d in zip(tried, trial.directions(step, name), strict=True))
                assert (change - lr * torch.sign(g)).abs().max() < 1e-6 * lr + 1e-6, name
                continue
            rows = torch.cat(
                [used[name] for used in trial.used if name in used] or [torch.arange(target.rows)]
            )
            rows = rows.unique()
            signs = store.directions.row_signs(key, target, range(len(tried))).double()
            n = (torch.from_numpy(tried) @ signs)[rows, None]
            n = n * store.directions.coordinates(key, target).double()[rows]
            left, _, right = torch.linalg.svd(n, full_matrices=False)
            v = store.directions.basis(key, target).double()
            wanted = lr * math.sqrt(len(rows) / rank) * left @ right @ v.T
            assert (change[rows] - wanted).abs().max() < 5e-3 * wanted.abs().max(), (name, step)
            still = torch.ones(target.rows, dtype=torch.bool)
            still[rows] = False
            assert not change[still].any()


@pytest.mark.parametrize("name", UPDATED_ALONG_ANOTHER)
def test_quantised_directions_are_rounded_twice_without_a_bias(name: str, maker: Maker) -> None:
    store = maker.trial(name).model.store
    trainable = next(r for r in store.trainables.values() if not r.target.vector)
    every = slice(0, trainable.target.rows)
    sums = torch.zeros(2, *trainable.layout.shape)
    steps = 200
    u = torch.linspace(-4.1, 4.1, trainable.target.rows * trainable.target.cols).reshape(
        trainable.layout.shape
    )
    crossed = 0.0
    for step in range(steps):
        pair = [
            store.mask.shape(u, Key(SEED, step), trainable, every, lambda: u, probing=probing)
            for probing in (True, False)
        ]
        assert all(bool(((q - u).abs() < 4.25 / 127 + 1e-5).all()) for q in pair)
        crossed += float(((pair[0] - u) * (pair[1] - u)).mean()) / steps
        sums += torch.stack(pair) / steps
    width = 4.25 / 127
    assert (sums - u).abs().max() < 5.5 * width / 2 / math.sqrt(steps)
    assert abs(crossed) < 0.02 * width**2  # the two roundings know nothing of each other


# ----------------------------------------------------------------------------- the laws of the store


@on_stores
def test_many_steps_at_once_give_the_bits_of_one_by_one_for_any_tile(
    name: str, precision: str, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = maker.trial(name, precision, weight_decay=0.01, **refreshed(name))
    recipes = trial.run()
    whole = saved_sha256(saved_tensors(trial.model.store))
    again = maker.model(trial.cfg)
    if any(np.any(r.coefficients) for r in recipes):
        assert saved_sha256(saved_tensors(again.store)) != whole
    monkeypatch.setattr(limits, "TILE_BYTES", 3000)
    again.store.apply(recipes)
    assert saved_sha256(saved_tensors(again.store)) == whole
    pairs = zip(again.store.trainables.values(), trial.model.store.trainables.values(), strict=True)
    for trainable, other in pairs:
        assert trainable.state.keys() == other.state.keys()
        assert all(torch.equal(trainable.state[n], other.state[n]) for n in other.state)


def refreshed(name: str) -> dict[str, int]:
    """``refresh`` so small that a basis or anchor is made anew within the few steps of a test."""
    entry = PRESETS[name]
    drawn = DIRECTION_LAWS[entry.directions].refreshed or CREDITS[entry.credit].anchored
    # An anchored run that is cut at step 3 goes on with a step that is compared with an anchor of the replay.
    return {"refresh": 3 if CREDITS[entry.credit].anchored else 2} if drawn else {}


@presets
def test_micro_batches_see_the_same_directions(name: str, maker: Maker) -> None:
    trial = maker.trial(name)
    whole = trial.losses(1)
    touched = trial.model.take_touched(4)
    for size in (1, 3):
        np.testing.assert_allclose(trial.losses(1, size), whole, atol=2e-5)
        again = trial.model.take_touched(4)
        assert len(again) == len(touched)
        assert all(np.array_equal(a, b) for a, b in zip(again, touched, strict=True))


@on_stores
def test_a_probe_that_blows_up_leaves_everything_finite(
    name: str, precision: str, maker: Maker
) -> None:
    trial = maker.trial(name, precision)
    trial.cfg = replace(trial.cfg, sigma=3e38)
    losses = trial.losses(0)
    assert not np.isfinite(losses).all()
    losses[:, 1] = np.linspace(2.0, 1.0, len(losses))  # one example came through
    with np.errstate(over="ignore"):
        record = trial.record(0, losses)
        record = replace(record, sigma=2e-3)
        recipe = recipe_of(trial.cfg, record)
        trial.model.store.apply([recipe._replace(guides=trial.model.store.take_guides())])
    for trainable in trial.model.store.trainables.values():
        tensors = [*trainable.layout.tensors().values(), *trainable.state.values()]
        assert all(torch.isfinite(t.float()).all() for t in tensors)


@presets
def test_bf16_arithmetic_gives_near_losses_and_the_same_updates(name: str, maker: Maker) -> None:
    trial = maker.trial(name, "bf16")
    recipes = trial.run(2)
    low = maker.model(trial.cfg, torch.bfloat16)
    wide, trial.model = trial.model, maker.model(trial.cfg)
    plain = trial.losses(0)
    trial.model = low
    assert np.abs(trial.losses(0) - plain).mean() < 0.1 * plain.mean()
    low.store.apply(recipes)
    assert saved_sha256(saved_tensors(low.store)) == saved_sha256(saved_tensors(wide.store))


# ----------------------------------------------------------------------------- whole runs


@presets
def test_a_run_that_was_cut_goes_on_and_replays_with_the_same_bits(
    name: str, bench: Any, edgezo_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"estimator": name, "steps": 5, "snapshot_every": 2, "precision": None}
    request |= {"weight_decay": 0.01, **refreshed(name)}
    if PRESETS[name].mask == "block":
        request["finetuner"] = make_finetuner(open_model(bench.model), tmp_path / "f.safetensors")
    whole = finetune(make_config(bench.settings(out=str(tmp_path / "whole"), **request)))
    assert math.isfinite(whole["loss_last"]) and whole["steps"] == 5
    run, plain = tmp_path / "run", Journal.append

    def cut(journal: Journal, record: StepRecord) -> None:
        plain(journal, record)
        if record.step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", cut)
        with pytest.raises(Killed):
            finetune(make_config(bench.settings(out=str(run), **request)))
    code, resumed = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0, resumed
    assert resumed["trained_sha256"] == whole["trained_sha256"]
    code, replayed = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == whole["trained_sha256"]
    with open_journal(run / "journal.bin", resume=False) as journal:
        skipped = [record.skipped for record in journal.records()]
    assert skipped == [False] * 5
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] > 0 for line in lines)


@pytest.mark.parametrize("name", ["grzo", "mezo"])
def test_a_run_from_before_there_were_five_choices_goes_on(
    name: str, bench: Any, edgezo_json: Any, tmp_path: Path
) -> None:
    request = {"estimator": name, "steps": 5, "train": "lowrank"}
    whole = finetune(make_config(bench.settings(out=str(tmp_path / "whole"), **request)))
    run = tmp_path / "run"
    run.mkdir()
    new = ("mask", "credit", "rule", "keep", "refresh", "candidates")
    lines = (tmp_path / "whole" / "config.toml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.split(" ")[0] not in new]
    assert len(kept) == len(lines) - len(new)
    (run / "config.toml").write_text("".join(kept).replace("whole", "run"))
    with open_journal(tmp_path / "whole" / "journal.bin", resume=False) as journal:
        header = {**journal.header}
        header["config"] = {k: v for k, v in header["config"].items() if k not in new}
        with create_journal(run / "journal.bin", header) as old:
            for step in range(3):
                old.append(journal.record(step))
    code, resumed = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0, resumed
    assert resumed["trained_sha256"] == whole["trained_sha256"]


# ----------------------------------------------------------------------------- what it costs


@presets
def test_the_plan_counts_the_state_to_the_byte(name: str, maker: Maker) -> None:
    trial = maker.trial(name)
    trainables = trial.model.store.trainables.values()
    state_bytes = sum(t.nbytes for trainable in trainables for t in trainable.state.values())
    plan = make_plan(open_model(maker.path).shape, trial.cfg, MACHINE, base_bytes=0)
    counted = {item.name: item.bytes for item in plan.items}
    states = ("rule state", "mask state", "anchor")
    assert sum(counted.get(item, 0) for item in states) == state_bytes
    assert PRESETS[name].describe()["state_values"] == 0 or state_bytes


@presets
def test_more_forwards_take_more_activations(name: str, maker: Maker) -> None:
    sides = forwards(PRESETS[name].credit, PRESETS[name].mask, 8)
    tokens = TokenStats("label", (100,), 1, 2)  # so that nothing is split into pieces
    plans = [
        make_plan(open_model(maker.path).shape, maker.config(n), MACHINE, tokens, base_bytes=0)
        for n in (name, "mezo")
    ]
    of_preset, of_two = (next(i for i in p.items if i.name == "activations").bytes for p in plans)
    assert (of_preset - of_two) * (sides - 2) >= 0 and (of_preset == of_two) == (sides == 2)


def test_state_beside_full_weights_is_never_planned_on_disk(maker: Maker) -> None:
    cfg = maker.config("mezo-adam", train="full", max_mem_bytes=10_000_000)
    with pytest.raises(DoesNotFit) as refused:
        make_plan(open_model(maker.path).shape, cfg, MACHINE, base_bytes=0)
    assert "--residency disk (" not in str(refused.value)


def test_the_list_of_estimators_says_what_each_costs(edgezo: Any, edgezo_json: Any) -> None:
    code, answer = edgezo_json("estimators")
    assert code == 0 and [entry["name"] for entry in answer["estimators"]] == [DEFAULT, *ESTIMATORS]
    for entry in answer["estimators"]:
        assert entry["equation"] and entry["step_meaning"] and entry["paper"]
    assert {r["name"]: r["forwards"] for r in answer["estimators"]}["fzoo"] == 9
    code, out, _ = edgezo("estimators")
    assert code == 0 and all(name in out for name in (DEFAULT, *ESTIMATORS))
