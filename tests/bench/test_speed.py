"""``edgezo bench speed``: its parts add up, and its baselines do what their papers say; figures are benchmarks'."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_model

from edgezo.bench import speed
from edgezo.bench.alignment import point_config
from edgezo.bench.speed_baselines import PUBLISHED_STEPS, Plain
from edgezo.data.batches import Example
from edgezo.data.trees import Row


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [{"text": "good " * (1 + i % 5), "label": i % 2} for i in range(24)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ("--data", file, "--template", "{text} It was", "--labels", "0=bad,1=good")


def test_parts_of_a_step_add_up_and_every_row_is_there(tmp_path, rows, edgezo_json, one_thread):
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    options = (
        "--model",
        model,
        *rows,
        "--precisions",
        "bf16,int4",
        "--estimators",
        "grzo,grzo:gaussian",
    )
    options += ("--batch-sizes", "2", "--tokens", "own,24", "--repeats", "2", "--out", out)
    code, result = edgezo_json("bench", "speed", *options)
    assert code == 0 and json.loads((out / "speed.json").read_text()) == result
    assert len(result["rows"]) == 2 * (2 * 2 + 2)
    ours = [row for row in result["rows"] if row["ratio"] is not None]
    for row in ours:
        assert row["step_s"] >= row["update_s"] > 0 and row["perturbed_s"] > 0
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
        assert row["share_of_products"] > 0 and row["sides"] == 2
        assert row["tokens"] == "own" or row["rows"] == 2 * 2 * 24
        assert row["train"] == "lowrank+head"
        assert row["bookkeeping_share"] * row["step_s"] > 0
    assert {row["estimator"] for row in result["rows"]} == {
        "grzo",
        "grzo:gaussian",
        *PUBLISHED_STEPS,
    }
    assert result["sign_bits_per_s"] > 0 and result["normals_per_s"] > 0
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")
    for bad, word in ((("--tokens", "x"), "--tokens"), (("--estimators", "sgd"), "sgd")):
        code, result = edgezo_json("bench", "speed", *options, *bad)
        assert code == 2 and word in result["error"]


def test_a_fit_needs_four_sizes_and_finds_its_line():
    rows = [
        {"estimator": "grzo", "precision": "int4", "rows": n, "step_s": 0.25 + 0.002 * n}
        for n in (10, 20, 40, 80)
    ]
    (fit,) = speed.fits(rows)
    assert fit["fixed_s"] == pytest.approx(0.25) and fit["s_a_row"] == pytest.approx(0.002)
    assert fit["r2"] == pytest.approx(1.0) and fit["sizes"] == 4
    assert speed.fits(rows[:3]) == [] and speed.fits([*rows[:3], rows[2]]) == []


def test_a_row_is_stretched_at_its_front():
    example = Example((Row([1, 2, 3], (2,), ()),), 1)
    assert speed.stretched(example, speed.AS_THEY_ARE) is example
    (row,) = speed.stretched(example, 7).rows
    assert row.ids == [3, 1, 2, 3, 1, 2, 3] and row.score_at == (6,)
    (row,) = speed.stretched(example, 2).rows
    assert row.ids == [2, 3]


def test_baselines_are_the_methods_that_they_name(tmp_path, rows, one_thread):
    """The plain module scores as the store does; a hook's change of a row is that of the weights W + sigma D."""
    fields = dict(zip(("data", "template", "labels"), map(str, rows[1::2]), strict=True))
    model = str(make_model(tmp_path / "model"))
    cfg = point_config({"model": model, "precision": "fp32", "train": "lowrank", **fields}, "grzo")
    subject = speed._load("grzo", cfg)
    plain = Plain(subject.opened, subject.model)
    group = list(subject.opened.dataset.train[:3])
    from edgezo.data.batches import collate

    ours, _ = subject.model.losses(collate(group, range(3)))
    with torch.no_grad():
        assert torch.allclose(plain.losses(group), ours[0], atol=1e-4)
    before = {n: p.detach().clone() for n, p in plain.module.named_parameters()}
    assert plain.time("mezo-in-place", group) > 0
    moved = {n: (p.detach() - before[n]).abs().max() for n, p in plain.module.named_parameters()}
    assert all(0 < float(m) < 1e-3 for m in moved.values())  # there and back, and a step of 1e-9
    before = {n: p.detach().clone() for n, p in plain.module.named_parameters()}
    plain.time("grzo-hooks", group)
    inner = {n for n, m in plain.module.named_modules() if m in plain.linears}
    for name, weight in plain.module.named_parameters():
        changed = not torch.equal(weight, before[name])
        assert changed == (name.removesuffix(".weight") in inner), name
