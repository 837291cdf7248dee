"""``edgezo bench accuracy``: a study is checked before it runs, each run is made once, a grid is searched elsewhere."""

from __future__ import annotations

import json
import re

import pytest
from conftest import make_model

from edgezo.bench import accuracy
from edgezo.bench.study import read_study
from edgezo.errors import EdgezoError, UsageError


def rows_file(folder, n=60):
    folder.mkdir(parents=True)
    for name, count in (("train", n), ("validation", 12)):
        rows = [
            {"text": f"good {i}" if i % 2 else f"bad {i}", "label": i % 2} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made(tmp_path, **more):
    data = rows_file(tmp_path / "data")
    task = {"data": str(data), "template": "{text} It was", "labels": "0=bad,1=good"}
    return {
        "model": str(make_model(tmp_path / "model")),
        "tasks": {"own": task},
        "seeds": [0, 1],
        "forwards": 32,
        "common": {"batch-size": 4, "device": "cpu", "max-mem": "4GB", "eval-every": 2},
        "methods": {"grzo": {"train": "lowrank", "step": [0.01, 0.1, 1.0]}},
        **more,
    }


def test_budgets_in_forwards_are_steps_of_each_method(tmp_path):
    methods = {
        "grzo": {},
        "one": {"estimator": "grzo-one-sided"},
        "fzoo": {"estimator": "fzoo", "candidates": 7},
        "head": {"train": "head"},
        "probe": {"train": "probe"},
        "both": {"train": "lowrank+probe"},
    }
    plain = {"train": "lowrank"}
    methods = {name: plain | settings for name, settings in methods.items()}
    study = read_study(made(tmp_path, forwards=320, methods=methods))
    steps = {m: study.request("own", p[0], 0, {})["steps"] for m, p in study.methods.items()}
    assert steps == {"grzo": 40, "one": 80, "fzoo": 10, "head": 80, "probe": 80, "both": 27}


def test_seconds_are_for_s_and_tuning_never_sees_reported_rows(tmp_path):
    given = made(tmp_path)
    del given["forwards"]
    study = read_study(given | {"seconds": 20, "tune": {"seeds": [7], "held-out": 0.25}})
    point = study.methods["grzo"][1]
    assert point["step"] == 0.1 and len(study.methods["grzo"]) == 3
    request = study.request("own", point, 0, {})
    assert request["for_s"] == 20 and "held_out" not in request
    assert study.request("own", point, 0, {}, tuning=True)["held_out"] == 0.25
    assert study.tune_seeds == [7] and read_study(given | {"seconds": 20}).tune_seeds == [2]


def test_every_problem_of_a_study_is_named_at_once(tmp_path):
    given = made(tmp_path, methods={"a": {"stepp": 1}, "b": {"step": -1.0}}, budget=3)
    with pytest.raises(UsageError) as problem:
        read_study(given, ["c"])
    assert "budget" in str(problem.value) and "no method 'c'" in str(problem.value)
    del given["budget"]
    with pytest.raises(UsageError) as problem:
        read_study(given)
    assert "a on own: unknown setting 'stepp'" in str(problem.value)
    assert "b on own: --step" in str(problem.value)
    for bad, word in (
        ({"forwards": 0}, "above 0"),
        ({"seconds": 0}, "one of forwards"),
        ({"seeds": []}, "seeds"),
        ({"tasks": []}, "tasks is missing"),
    ):
        with pytest.raises(UsageError, match=word):
            read_study(made(tmp_path / word.replace(" ", "-"), **bad))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [10**400]}, "seeds needs whole numbers"),
        ({"forwards": 10**400}, "forwards needs a number"),
        ({"methods": {"a": {"step": 10**400}}}, "--step: needs a finite number"),
        ({"methods": {"a": {"baseline": {"x": 1}}}}, "there is no baseline {'x': 1}"),
        ({"methods": {"a": {"baseline": "lora", "lr": 10**400}}}, "is no learning rate"),
        ({"methods": {"a": {"step": [0.1] * 1001}}}, "more than 1,000 points"),
        ({"methods": {"a": {f"x{i}": [0.1, 0.2] for i in range(20_000)}}}, "more than 1,000"),
    ],
)
def test_numbers_beyond_any_float_and_grids_without_end_are_refused(changes, message, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        read_study(made(tmp_path, **changes))


def test_a_best_point_at_the_end_of_its_grid_is_reported():
    points = [{"step": s} for s in (0.1, 1.0, 10.0)]

    def tried(values, metric="accuracy"):
        return [
            {"task": "t", "method": "m", "settings": p, "metric": metric, "value": v, "loss": -v}
            for p, v in zip(points, values, strict=True)
        ]

    assert accuracy._best(points, tried([0.5, 0.9, 0.6]), ["t"], "m") == (points[1], False)
    assert accuracy._best(points, tried([0.5, 0.6, 0.9]), ["t"], "m") == (points[2], True)
    assert accuracy._best(points, tried([0.5, 0.4, 0.9], "loss"), ["t"], "m")[0] == points[2]
    failed = tried([0.5, 0.6, 0.9])
    failed[2] = {"task": "t", "method": "m", "settings": points[2], "error": "no memory"}
    assert accuracy._best(points, failed, ["t"], "m") == (points[1], False)
    other = [{**t, "task": "u"} for t in tried([0.9, 0.1, 0.2])]
    both = [*tried([0.5, 0.9, 0.6]), *other]
    assert accuracy._best(points, both, ["t", "u"], "m")[0] == points[0]  # 0.7 on average, 0.5, 0.4
    assert accuracy._best(points, both, ["t"], "m")[0] == points[1]


def test_a_study_tunes_on_the_tasks_it_names(tmp_path):
    given = made(tmp_path)
    assert read_study(given).tune_tasks == []
    assert read_study(given | {"tune": {"tasks": ["own"]}}).tune_tasks == ["own"]
    with pytest.raises(UsageError, match="'other', which the study does not have"):
        read_study(given | {"tune": {"tasks": ["other"]}})


@pytest.mark.slow
def test_a_study_is_run_once_and_its_figures_are_those_of_its_runs(tmp_path, edgezo_json):
    import tomli_w

    given = made(tmp_path, reach=[0.0, 1.1])
    given["methods"] = {
        "grzo": {"train": "lowrank", "step": [0.01, 0.1]},
        "mezo": {"estimator": "mezo", "train": "lowrank"},
    }
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(tomli_w.dumps(given))
    code, result = edgezo_json("bench", "accuracy", file, "--threads", "1", "--out", out)
    assert code == 0
    assert [(r["method"], r["seed"]) for r in result["rows"]] == [
        ("grzo", 0),
        ("grzo", 1),
        ("mezo", 0),
        ("mezo", 1),
    ]
    assert len(result["tuning"]) == 2 and {t["seed"] for t in result["tuning"]} == {2}
    for row in result["rows"]:
        assert "error" not in row, row
        summary = json.loads((tmp_path / row["run"] / "summary.json").read_text())
        assert row["value"] == summary["eval_after"]["value"] and row["steps"] == 4
        assert [p["step"] for p in row["curve"]] == [0, 2, 4]
        assert row["seconds_to"] == {"0.0": 0.0, "1.1": None}
    middle = result["medians"][0]
    assert middle["seeds"] == 2 and middle["least"] <= middle["value"] <= middle["most"]
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/journal.bin")}
    assert len(before) == 6
    assert edgezo_json("bench", "accuracy", file, "--threads", "2", "--out", out)[1] == result
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/journal.bin")} == before


def test_a_held_out_share_replaces_the_validation_rows(tmp_path, edgezo_json):
    model, data = make_model(tmp_path / "model"), rows_file(tmp_path / "data")
    options = ["--model", model, "--data", data, "--template", "{text} It was", "--max-mem", "4GB"]
    options += ["--labels", "0=bad,1=good", "--steps", "1", "--batch-size", "2", "--threads", "1"]
    code, result = edgezo_json(
        "finetune", *options, "--held-out", "0.25", "--out", tmp_path / "run"
    )
    assert code == 0 and result["eval_after"]["n"] == 15
    code, result = edgezo_json("finetune", *options, "--out", tmp_path / "other")
    assert result["eval_after"]["n"] == 12
    code, result = edgezo_json("finetune", *options, "--held-out", "0", "--out", tmp_path / "x")
    assert code == 2 and "--held-out" in result["error"]


WRONG = {
    "forwards": "many",
    "seeds": 0,
    "reach": 0.8,
    "tasks": "sst2",
    "methods": {"grzo": 3},
    "common": [],
    "model": 7,
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_another_form_is_named_with_the_form_it_needs(key, tmp_path):
    with pytest.raises(UsageError, match=f"{key} needs"):
        read_study(made(tmp_path, **{key: WRONG[key]}))


def test_what_the_study_says_is_no_setting_of_a_method(tmp_path):
    methods = {"grzo": {"steps": 3, "out": "here"}, "mezo": {"estimator": "mezo", "step": []}}
    with pytest.raises(UsageError) as raised:
        read_study(made(tmp_path, methods=methods, tasks=["nothing"]))
    for problem in (
        "steps is the study's",
        "out is the study's",
        "step is empty",
        "'nothing' is not",
    ):
        assert problem in str(raised.value)


def test_a_study_of_which_no_run_succeeds_is_an_error_that_says_why(tmp_path, edgezo_json):
    given = made(tmp_path, seeds=[0], methods={"grzo": {"train": "lowrank", "profile": True}})
    (tmp_path / "data" / "train.jsonl").unlink()
    study = read_study(given)
    with pytest.raises(EdgezoError, match="every run of the study failed, 1 in all"):
        accuracy.bench_accuracy(study, out=tmp_path / "out")
    assert "error" in json.loads((tmp_path / "out" / "accuracy.json").read_text())["rows"][0]
    command = accuracy._command({"profile": True, "steps": 3}, tmp_path / "run")
    assert "--profile" in command and "True" not in command
