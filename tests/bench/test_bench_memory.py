"""``edgezo bench memory`` on a tiny model: real processes, real peaks; the figures are for benchmarks/."""

from __future__ import annotations

import io
import json

import pytest
from conftest import make_model
from rich.console import Console

from edgezo.bench import memory
from edgezo.cli import tables

MB = 1_000_000


@pytest.mark.slow
def test_every_method_is_measured_once_and_its_point_is_kept(edgezo_json, tmp_path):
    model = make_model(tmp_path / "model")
    out = tmp_path / "out"
    methods = ("inference", "grzo", "mezo-in-place", "lora-checkpoint")
    args = ("--model", model, "--tokens", "16", "--threads", "1", "--out", out)
    code, result = edgezo_json(
        "bench", "memory", *args, "--batch-sizes", "2", "--methods", ",".join(methods)
    )
    assert code == 0 and tuple(p["method"] for p in result["rows"]) == methods
    for point in result["rows"]:
        assert "error" not in point, point
        assert 50 * MB < point["base_rss_bytes"] <= point["train_peak_rss_bytes"] < 2000 * MB
        assert point["step_s"] > 0
        assert point["peak_rss_bytes"] >= point["train_peak_rss_bytes"] and point["precision"]
    inference, grzo, mezo, lora = result["rows"]
    assert inference["train_peak_rss_bytes"] < 1.1 * grzo["train_peak_rss_bytes"]
    for baseline in (mezo, lora):
        assert baseline["trained_parameters"] > 0 and all(loss > 0 for loss in baseline["losses"])
    assert (out / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "memory.json").read_text()) == result
    named = [(row["estimator"], row["directions"], row["precision"]) for row in result["rows"]]
    assert named[1:3] == [("grzo", "signs", "bf16"), (None, None, "bf16")]
    before = (out / "points.jsonl").read_bytes()
    assert edgezo_json("bench", "memory", *args, "--batch-sizes", "2", "--methods", "grzo")[0] == 0
    assert (out / "points.jsonl").read_bytes() == before
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    code, result = edgezo_json(
        "bench", "memory", *args, "--batch-sizes", "3", "--methods", "inference"
    )
    assert code == 0 and result["rows"][0]["error"]  # reported, not fatal: other methods go on


def test_what_cannot_be_measured_is_refused_at_once(edgezo_json, tmp_path):
    model = make_model(tmp_path / "model")
    out = tmp_path / "out"
    for options, word in (
        (("--methods", "grzo,sgd"), "sgd"),
        (("--batch-sizes", "4,x"), "--batch-sizes"),
        (("--tokens", "4"), "4 is not 8 or more"),
        (("--max-mem", "lots"), "lots"),
    ):
        code, result = edgezo_json("bench", "memory", "--model", model, "--out", out, *options)
        assert code == 2 and word in result["error"]
    assert edgezo_json("bench", "memory")[0] == 2
    assert not out.exists()


def test_a_baseline_that_takes_too_long_is_ended_with_its_peak_so_far():

    figures = memory._child("1", "-c", "kept = b'x' * 50_000_000\nwhile kept: pass", limit_s=2)
    assert figures["stopped_s"] == 2 and figures["train_peak_rss_bytes"] > 50 * MB
    point = {"method": "lora", "batch_size": 16, "tokens": 128, **figures}
    console = Console(width=150, file=io.StringIO())
    console.print(tables.memory_table({"model": "m", "rows": [point]}))
    assert ">= " in console.file.getvalue() and "stopped" in console.file.getvalue()
