"""``edgezo bench alignment``: measured cosines are those of theory, and a probe sees the true gradient."""

from __future__ import annotations

import json
import math

import pytest


def arguments(bench, out, *more: object) -> list[object]:
    asked = {
        k: v for k, v in bench.settings().items() if k in ("model", "data", "template", "labels")
    }
    command = [part for name, value in asked.items() for part in (f"--{name}", value)]
    return ["bench", "alignment", *command, "--out", out, "--precision", "fp32", *more]


def test_the_signal_of_a_probe_is_the_true_gradient_along_it(bench, edgezo_json, tmp_path):
    for kind, train in (("label", "lowrank+norms+scales"), ("completion", "lowrank")):
        command = arguments(bench, tmp_path / kind, "--tries", 2, "--batch-sizes", 3)
        if kind != "label":
            at = command.index("--template")
            command = [*command[:at], *command[at + 4 :]]
            command[command.index("--data") + 1] = bench.data / f"{kind}.jsonl"
        names = "grzo,mezo,lo-grzo-strict"
        code, result = edgezo_json(
            *command, "--train", train, "--sigma", 1e-3, "--estimators", names
        )
        assert code == 0, result
        assert [row["estimator"] for row in result["rows"]] == names.split(",")
        # A gradient that is wrong in one coordinate of what is trained would leave a signal of 1.
        assert all(row["signal_to_noise"] > 15 for row in result["rows"]), result["rows"]
        assert json.loads((tmp_path / kind / "alignment.json").read_text()) == result


def test_cosines_are_those_of_theory_and_grow_with_the_candidates(bench, edgezo_json, tmp_path):
    names = "grzo,grzo:gaussian,mezo,fzoo,lezo"  # the last leaves a block alone
    command = arguments(bench, tmp_path / "out", "--tries", 10, "--batch-sizes", 4)
    code, result = edgezo_json(*command, "--train", "lowrank", "--estimators", names)
    assert code == 0, result
    for row in result["rows"]:
        error = 4.5 * row["cosine_error"] + 0.08 * row["cosine_theory"]
        assert abs(row["cosine_mean"] - row["cosine_theory"]) < error, row
        assert row["blocks"] and all(abs(c) <= 1 for c in row["blocks"].values())
    fzoo, mezo = result["rows"][3], result["rows"][2]
    assert fzoo["cosine_theory"] / mezo["cosine_theory"] == pytest.approx(math.sqrt(4 * math.pi))
    assert fzoo["cosine_mean"] > 2 * mezo["cosine_mean"]


def test_full_weights_are_compared_without_keeping_every_gradient(bench, edgezo, tmp_path):
    command = arguments(bench, tmp_path / "out", "--tries", 2, "--batch-sizes", 2)
    code, out, _ = edgezo(*command, "--estimators", "sparse-grzo,lozo")
    assert code == 0 and "sparse-grzo" in out and "lozo" in out
    rows = json.loads((tmp_path / "out" / "alignment.json").read_text())["rows"]
    assert [row["train"] for row in rows] == ["full", "full"]
    assert rows[0]["cosine_theory"] is None and rows[1]["cosine_theory"] > 0
    assert all(row["signal_to_noise"] is None for row in rows)


def test_an_estimator_that_is_none_is_refused_with_its_name(bench, edgezo_json, tmp_path):
    out = tmp_path / "out"
    for names, word in (("grzo,sgd", "sgd"), ("mezo:signs", "one direction for the whole batch")):
        code, result = edgezo_json(*arguments(bench, out, "--estimators", names))
        assert code == 2 and word in result["error"]
    assert not out.exists()
