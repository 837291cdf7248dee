"""The ZO Fine-tuner: published files are converted, scales are those of its formulas, and runs keep their bits."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELLED, Bench, make_model
from preset_trials import make_finetuner
from safetensors.torch import load_file, save_file
from small_plans import MACHINE
from torch import nn

from edgezo.data.batches import Example
from edgezo.data.dataset import Dataset
from edgezo.data.trees import Row
from edgezo.errors import EdgezoError, UsageError
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import build_meta, open_model
from edgezo.network.model import Model
from edgezo.plan.planner import make_plan
from edgezo.plan.request import make_config
from edgezo.run.finetuner import Finetuner, Tuner, convert_finetuner, load_finetuner
from edgezo.run.journal import create_journal, open_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.train import finetune
from edgezo.weights.layouts import Dense
from edgezo.weights.store import WeightStore
from edgezo.zo.directions import DIRECTION_KINDS
from edgezo.zo.masks import mask_of
from edgezo.zo.recipe import Recipe
from edgezo.zo.rules import UPDATE_RULES

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = Dataset("label", (Example((Row((3, 4, 5, 6, 7), (4,), ()),), 0),) * 3, (), (5, 9), (), ())


def model_of(path: Path, train: str, precision: str = "fp32") -> Model:
    spec = ModelSpec(
        precision, tuple(train.split("+")), "shared", 3, mask="block", label_ids=(5, 9)
    )
    return assemble(open_model(path), spec)


def record(losses: Any, scales: Any = None) -> StepRecord:
    losses = np.array(losses, np.float32)
    return StepRecord(0, 1e-3, 1e-3, False, losses, np.zeros_like(losses[0]), (), scales)


# ----------------------------------------------------------------------------- files


def test_a_published_file_becomes_safetensors_that_give_what_its_modules_give(
    tmp_path: Path, edgezo_json: Any
) -> None:
    torch.manual_seed(0)
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    modules = {name: nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)) for name in names}
    torch.save(modules, tmp_path / "in.pth")
    code, found = edgezo_json(
        "convert-finetuner", tmp_path / "in.pth", tmp_path / "out.safetensors"
    )
    assert code == 0 and found["blocks"] == 3
    tuner = load_finetuner(tmp_path / "out.safetensors")
    assert tuner.blocks == tuple(sorted(names))
    features = torch.randn(3, 5, dtype=torch.float64)
    wanted = [
        modules[name](x.float()).abs().item()
        for name, x in zip(tuner.blocks, features, strict=True)
    ]
    np.testing.assert_allclose(tuner.sigma(features).numpy(), wanted, rtol=1e-5)


def test_a_file_that_is_no_finetuner_is_refused_with_the_way_on(
    tmp_path: Path, bench: Bench, edgezo_json: Any
) -> None:
    torch.save(
        {"a": nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))}, tmp_path / "f.pth"
    )
    with pytest.raises(UsageError, match=r"edgezo convert-finetuner .*f\.pth f\.safetensors"):
        load_finetuner(tmp_path / "f.pth")
    torch.save({"a": nn.Sequential(nn.Linear(5, 1))}, tmp_path / "g.pth")
    with pytest.raises(EdgezoError, match="not Linear, Tanh, Linear"):
        convert_finetuner(tmp_path / "g.pth", tmp_path / "g.safetensors")
    assert not (tmp_path / "g.safetensors").exists()
    file = tmp_path / "f.safetensors"
    file.write_bytes(b"not a header")
    with pytest.raises(EdgezoError, match="no header within them"):
        load_finetuner(file)
    Finetuner.plain(["a", "b"], 0).save(file, {})
    good = load_file(file)
    for name, values in (
        ("a.0.weight", torch.zeros(64, 4)),
        ("a.2.bias", torch.tensor([math.nan])),
        ("b.2.weight", None),
        ("weight", torch.zeros(2)),
    ):
        changed = {k: v for k, v in {**good, name: values}.items() if v is not None}
        save_file(changed, file)
        with pytest.raises(EdgezoError):
            load_finetuner(file)
    save_file({}, file)
    with pytest.raises(EdgezoError):
        load_finetuner(file)
    said = bench.arguments(estimator="zo-finetuner", finetuner=str(tmp_path / "none"))
    code, found = edgezo_json("finetune", *said, "--out", tmp_path / "run")
    assert code == 1 and "cannot be read" in found["error"] and not (tmp_path / "run").exists()


def test_every_flipped_bit_and_every_length_of_a_finetuner_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    tuner = Finetuner.plain(["a"], 0)
    small = replace(tuner, weights=tuple(w[:, :2] if w.ndim > 1 else w for w in tuner.weights))
    small.save(file, {"model": "m"})
    whole = file.read_bytes()
    assert load_finetuner(file).sha256 == hashlib.sha256(whole).hexdigest()
    assert set(load_file(file)) == {
        f"a.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    cases = [whole[:size] for size in range(len(whole))]
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        cases.append(bytes(data))
    for number, data in enumerate(cases):
        file.write_bytes(data)
        with pytest.raises(EdgezoError):
            load_finetuner(file)
            pytest.fail(f"case {number} was believed")


def test_a_finetuner_of_an_earlier_version_is_read() -> None:
    old = Path(__file__).parents[1] / "old_runs" / "finetuner.safetensors"
    assert b"sha256" not in old.read_bytes()[:200] and load_finetuner(old).blocks


def test_a_finetuner_for_another_architecture_is_refused_by_what_it_lacks(
    bench: Bench, tmp_path: Path, edgezo_json: Any
) -> None:
    file = tmp_path / "f.safetensors"
    Finetuner.plain(["model.embed_tokens.weight", "model.norm.weight"], 0).save(file, {})
    said = bench.arguments(estimator="zo-finetuner", finetuner=str(file))
    code, found = edgezo_json("finetune", *said, "--out", tmp_path / "run")
    assert code == 1 and "first is model.layers.0.input_layernorm.weight" in found["error"]


# ----------------------------------------------------------------------------- what a step is told


@pytest.mark.parametrize("train", ["full", "lowrank+norms+scales"])
def test_a_step_is_told_what_the_formulas_say(bench: Bench, tmp_path: Path, train: str) -> None:
    files = open_model(bench.model)
    tuner = load_finetuner(Path(make_finetuner(files, tmp_path / "f.safetensors")))
    model = model_of(bench.model, train)
    work = Tuner.of(tuner, model.store, DATA)
    names = sorted(model.store.trainables)
    weights_in = [name.partition("#")[0] for name in names]  # a block's tensors had one sigma
    before, previous = np.array([len(n) / 40 for n in weights_in], np.float32), None
    for losses in (None, [[1.0, 3.0, math.nan], [2.0, 1.0, 6.0]]):
        if losses is not None:
            previous = record(losses, np.concatenate(([7.0], before)).astype(np.float32))
        told = work.scale_step(previous)
        weights = {k: v.double() for k, v in weights_of(model).items()}
        for name, sigma, last in zip(names, told[1:], before, strict=True):
            theta = weights[name.partition("#")[0]]
            x = [theta.mean(), theta.var(), 0.0, 0.0, 1.0]
            if previous is not None:
                x = [*x[:2], 2.0, 3.0, float(last)]
            place = tuner.blocks.index(name.partition("#")[0])
            w1, c, w2, e = (w[place] for w in tuner.weights)
            wanted = abs(float(w2 @ torch.tanh(w1 @ torch.tensor(x, dtype=torch.float64) + c) + e))
            assert sigma == pytest.approx(wanted, rel=1e-5), name
        sizes = {n: math.prod(model.store.trainables[n].layout.shape) for n in names}
        table = "model.embed_tokens.weight"
        if train == "full":
            sizes[table] = 5 * model.store.trainables[table].target.cols  # of five tokens
        total = sum(sizes.values())
        assert sum(sizes[n] * model.store.scales[n] ** 2 for n in names) == pytest.approx(total)
        np.testing.assert_allclose(list(model.store.scales.values()), told[0] * told[1:])
        assert np.ptp(told[1:]) > 0.1


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    store = model.store
    found = {name: layout.tensors()[""] for name, layout in store.layouts.items()}
    return found | {
        n: r.values for n, r in store.trainables.items() if r.target.vector and "#" not in n
    }


def test_a_layer_that_shares_a_network_shares_its_scale(bench: Bench) -> None:
    blocks = ["model.layers.0", "model.embed_tokens.weight", "model.norm.weight"]
    tuner = Finetuner.plain(blocks, 0)
    tuner.weights[2].copy_(
        torch.linspace(-0.3, 0.5, 3, dtype=torch.float64)[:, None].expand(-1, 64)
    )
    model = model_of(bench.model, "full")
    work = Tuner.of(tuner, model.store, DATA)
    told = work.scale_step(None)
    inside = [n.startswith("model.layers.0.") for n in sorted(model.store.trainables)]
    assert len(set(told[1:][inside].tolist())) == 1
    assert len(set(told[1:].tolist())) == 3
    pooled = torch.cat(
        [w.flatten() for n, w in weights_of(model).items() if n.startswith("model.layers.0.")]
    ).double()
    found = work.features(None)[0].tolist()
    assert found[:2] == pytest.approx([float(pooled.mean()), float(pooled.var())], rel=1e-6)


def test_no_network_that_gives_anything_leaves_the_scales_finite(bench: Bench) -> None:
    model = model_of(bench.model, "lowrank")
    tuner = Finetuner.plain([n.partition("#")[0] for n in model.store.trainables], 0)
    tuner.weights[3].zero_()
    told = Tuner.of(tuner, model.store, DATA).scale_step(record([[math.inf], [math.nan]]))
    assert told.tolist() == [1.0] + [0.0] * (len(told) - 1)
    tuner.weights[3][0], tuner.weights[3][1] = 1e38, 1e-38
    told = Tuner.of(tuner, model.store, DATA).scale_step(None)
    assert np.isfinite(told).all() and np.isfinite(list(model.store.scales.values())).all()


def test_alignment_compares_with_a_finetuner(
    bench: Bench, tmp_path: Path, edgezo_json: Any
) -> None:
    file = make_finetuner(open_model(bench.model), tmp_path / "f.safetensors")
    said = ["--model", bench.model, "--data", bench.data / "label.jsonl", "--train", "lowrank"]
    said += [part for name, value in LABELLED.items() for part in (f"--{name}", value)]
    said += ["--estimators", "mezo,zo-finetuner,zo-finetuner-grzo", "--finetuner", file]
    said += ["--batch-sizes", 3, "--tries", 3, "--sigma", 1e-3, "--precision", "fp32"]
    code, found = edgezo_json("bench", "alignment", *said, "--out", tmp_path / "out")
    assert code == 0, found
    assert [row["mask"] for row in found["rows"]] == ["none", "block", "block"]
    # A scale that were another in the probe than in the estimate would leave a signal of about 1.
    assert all(row["signal_to_noise"] > 15 for row in found["rows"])


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
@pytest.mark.parametrize("kind", ["shared", "signs", "lowrank-shared", "lowrank-strict"])
def test_a_scale_goes_into_an_update_once(kind: str, rule: str) -> None:
    moved = []
    for scale in (1.0, 0.5):
        store = WeightStore(
            3, 4, DIRECTION_KINDS[kind], mask=mask_of("block", 1.0, 1e-3), rule=UPDATE_RULES[rule]
        )
        row = store.train("w", Dense(torch.zeros(6, 8)))
        store.prepare()
        c = np.array([0.5, -0.25, 1.0], np.float32)
        for step in range(2):
            recipe = Recipe(step, c, 0.0, (), 1.0, scales=np.array([scale], np.float32))
            store.apply([recipe])
        moved.append(row.values)
    assert moved[0].abs().max() > 0 and torch.equal(moved[0] / 2, moved[1])


# ----------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("tuned", "plain"), [("zo-finetuner", "mezo"), ("zo-finetuner-grzo", "grzo")]
)
def test_an_untrained_finetuner_changes_no_bit(
    bench: Bench, tmp_path: Path, tuned: str, plain: str
) -> None:
    files = open_model(bench.model)
    file = make_finetuner(files, tmp_path / "f.safetensors", drawn=0.0)
    same = {"train": "full", "step": 1e-2}
    one = finetune(make_config(bench.settings(estimator=plain, out=str(tmp_path / "a"), **same)))
    said = bench.settings(estimator=tuned, finetuner=file, out=str(tmp_path / "b"), **same)
    assert finetune(make_config(said))["trained_sha256"] == one["trained_sha256"]
    drawn = make_finetuner(files, tmp_path / "g.safetensors")
    said = bench.settings(estimator=tuned, finetuner=drawn, out=str(tmp_path / "c"), **same)
    assert finetune(make_config(said))["trained_sha256"] != one["trained_sha256"]


def test_a_run_is_replayed_without_its_finetuner_and_goes_on_only_with_it(
    bench: Bench, tmp_path: Path, edgezo_json: Any
) -> None:
    files, run = open_model(bench.model), tmp_path / "run"
    file = Path(make_finetuner(files, tmp_path / "f.safetensors"))
    said = bench.arguments(
        estimator="zo-finetuner-grzo", finetuner=str(file), train="lowrank", steps=4
    )
    code, whole = edgezo_json("finetune", *said, "--out", run)
    assert code == 0, whole
    with open_journal(run / "journal.bin", resume=True) as journal:
        assert journal.version == 6
        journal.truncate_to(2)
    (run / "summary.json").unlink()
    other = make_finetuner(files, tmp_path / "other.safetensors", drawn=0.2)
    code, found = edgezo_json("finetune", "--resume", "--out", run, "--finetuner", other)
    assert code == 1 and "another finetuner" in found["error"]
    moved = file.rename(tmp_path / "moved.safetensors")
    code, found = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 1 and "cannot be read" in found["error"]
    code, found = edgezo_json("finetune", "--resume", "--out", run, "--finetuner", moved)
    assert code == 0 and found["trained_sha256"] == whole["trained_sha256"]
    moved.unlink()
    code, found = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and found["trained_sha256"] == whole["trained_sha256"]
    code, found = edgezo_json("eval", "--model", run)
    assert code == 0 and found["value"] == whole["eval_after"]["value"]


def test_a_checkpoint_derived_from_the_model_takes_the_same_file(
    bench: Bench, tmp_path: Path
) -> None:
    file = make_finetuner(open_model(bench.model), tmp_path / "f.safetensors")
    derived = make_model(tmp_path / "derived")
    weights = load_file(derived / "model.safetensors")
    save_file(
        {k: v * 1.01 for k, v in weights.items()}, derived / "model.safetensors", {"format": "pt"}
    )
    said = replace(bench, model=derived).settings(
        estimator="zo-finetuner", finetuner=file, out=str(tmp_path / "run")
    )
    assert finetune(make_config(said))["steps"] == 3


def test_blocks_on_disk_give_the_bits_of_blocks_in_memory(bench: Bench, tmp_path: Path) -> None:
    deep = Bench(make_model(tmp_path / "deep", num_hidden_layers=4), bench.data)
    file = make_finetuner(open_model(deep.model), tmp_path / "f.safetensors")
    found = {}
    for residency in ("resident", "disk"):
        said = deep.settings(
            estimator="zo-finetuner-grzo",
            finetuner=file,
            train="lowrank",
            residency=residency,
            out=str(tmp_path / residency),
        )
        found[residency] = finetune(make_config(said))["trained_sha256"]
    assert found["disk"] == found["resident"]
    with pytest.raises(UsageError, match="mean and variance of every trained tensor"):
        make_config(deep.settings(estimator="zo-finetuner", finetuner=file, residency="disk"))


def test_requests_that_mean_nothing_are_refused_with_the_reason(bench: Bench) -> None:
    for changes, word in (
        ({"estimator": "zo-finetuner"}, "needs --finetuner FILE"),
        ({"estimator": "mezo", "finetuner": "f"}, "only --mask block"),
        ({"estimator": "zo-finetuner", "finetuner": "f", "rule": "adam"}, "would be lost"),
    ):
        with pytest.raises(UsageError, match=word):
            make_config(bench.settings(**changes))
    cfg = make_config(bench.settings(estimator="zo-finetuner-grzo", finetuner="f", rule="momentum"))
    assert cfg.mask == "block" and make_config({}, cfg.to_dict()) == cfg


def test_the_plan_names_the_finetuner(bench: Bench) -> None:

    cfg = make_config(bench.settings(estimator="zo-finetuner", finetuner="f"))
    plan = make_plan(open_model(bench.model).shape, cfg, MACHINE, base_bytes=0)
    networks = sum(1 for _ in build_meta(open_model(bench.model)).named_parameters())
    (item,) = (i for i in plan.items if i.name == "finetuner")
    assert 0.5 * 8 * 449 * networks < item.bytes < 2 * 8 * 449 * networks


# ----------------------------------------------------------------------------- the journal


def test_scales_are_read_back_to_the_bit_and_only_a_later_format_has_them(tmp_path: Path) -> None:
    losses, credit = np.ones((2, 3), "f4"), np.ones(3, "f4")
    scales = np.linspace(0, 1, 7, dtype="f4")
    touched = (np.arange(4), np.arange(0), np.arange(9))
    records = [
        StepRecord(0, 0.1, 0.2, False, losses, credit, (), scales),
        StepRecord(1, 0.1, 0.2, False, losses, credit, touched, scales[:2]),
        StepRecord(2, 0.1, 0.2, False, losses, credit, touched),
        StepRecord(3, 0.1, 0.2, False, np.ones((1, 3), "f4"), credit, (), scales[:0]),
    ]
    header = {"content_hash": "x"}
    with create_journal(tmp_path / "new", header, scaled=True) as journal:
        for one in records:
            journal.append(one)
    with open_journal(tmp_path / "new", resume=False) as journal:
        for found, wanted in zip(journal.records(), records, strict=True):
            if wanted.scales is None:
                assert found.scales is None
            else:
                np.testing.assert_array_equal(found.scales, wanted.scales)
            assert [t.tolist() for t in found.touched] == [t.tolist() for t in wanted.touched]
    with create_journal(tmp_path / "old", header, shaped=True) as journal:
        with pytest.raises(ValueError, match="formats 3 and 6"):
            journal.append(records[0])
    with (
        pytest.raises(ValueError, match="scales"),
        create_journal(tmp_path / "wrong", header, scaled=True) as journal,
    ):
        journal.append(replace(records[0], scales=scales.astype("f8")))
