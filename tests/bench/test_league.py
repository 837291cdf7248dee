"""A study of several rounds: budgets and caps, runs that are left for later, what runs forget, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgezo.bench import accuracy, untouched
from edgezo.bench.page import page
from edgezo.bench.study import DATA_ROOT, read_study
from edgezo.bench.study_data import placed
from edgezo.errors import EdgezoError, UsageError
from edgezo.plan.request import make_config

STUDY = {
    "model": "smollm2-135m",
    "tasks": {"sst2": {"task": "sst2"}, "mine": {"data": f"{DATA_ROOT}/mine"}},
    "seeds": [0, 1],
    "forwards": 320,
    "seconds": 30,
    "caps": ["700MB", "2GB"],
    "reach": [0.7],
    "common": {"batch-size": 4, "train": "lowrank"},
    "methods": {
        "grzo": {"estimator": "grzo", "step": [0.1, 0.2, 0.4]},
        "mezo": {"estimator": "mezo"},
    },
    "tune": {"tasks": ["sst2"], "seeds": [7]},
    "untouched": {"news": {"task": "ag_news"}},
}
ROUNDS = ["320 forwards, 700MB", "320 forwards, 2GB", "30 seconds, 700MB", "30 seconds, 2GB"]


def made_up_run(name: str, request: dict[str, Any], *, folder: Path, **_: Any) -> dict[str, Any]:
    """Figures of a run that takes no time: the step 0.2 is the best one."""
    value = 0.9 - abs(request.get("step", 0.3) - 0.2)
    curve = [{"step": s, "seconds": 10.0 * s, "value": value * s / 4} for s in (1, 2, 3, 4)]
    out = folder / f"{name}-{request['seed']}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").touch()
    figures = {"metric": "accuracy", "value": value, "loss": 1 - value, "before": 0.5}
    figures["trained"] = request["train"]
    costs = {"steps": 4, "train_s": 40.0, "step_s": 10.0, "peak_rss_bytes": 600_000_000}
    return {"run": str(out), **figures, **costs, "curve": curve}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs and evaluations are made up; returns the commands of the evaluations."""
    commands: list[list[str]] = []

    def answer(arguments: list[object]) -> dict[str, Any]:
        commands.append([str(part) for part in arguments])
        value = 0.6 if "smollm2-135m" in commands[-1] else 0.55
        return {"metric": "accuracy", "value": value, "n": 10, "loss": 1.0}

    monkeypatch.setattr(accuracy, "_run", made_up_run)
    monkeypatch.setattr(untouched, "_edgezo", answer)
    monkeypatch.setattr("edgezo.bench.memory.find_spec", lambda name: None)  # no chart
    return commands


def test_every_method_runs_under_every_budget_and_cap(quick: Any, tmp_path: Path) -> None:
    study = read_study(STUDY)
    result = accuracy.bench_accuracy(study, data_root="/data", out=tmp_path)
    assert result["rounds"] == ROUNDS and result["pending"] == 0
    places = [(r["round"], r["task"], r["method"], r["seed"]) for r in result["rows"]]
    assert len(places) == len(set(places)) == 4 * 2 * 2 * 2
    assert all(r["settings"]["step"] == 0.2 for r in result["rows"] if r["method"] == "grzo")
    assert [t["settings"]["step"] for t in result["tuning"]] == [0.1, 0.2, 0.4]
    text = (tmp_path / "accuracy.md").read_text()
    assert text == page(json.loads((tmp_path / "accuracy.json").read_text()))
    for name in ROUNDS:
        assert f"## {name}" in text
    assert "Best over these rows: `grzo`" in text and "| grzo | lowrank | 0.9000 |" in text
    assert "10s:0.225" in text and "| 40 |" in text.split("Seconds of training")[1]


def test_what_runs_forget_is_measured_once_on_the_exported_model(
    quick: list[list[str]], tmp_path: Path
) -> None:
    study = read_study(STUDY | {"seconds": 30, "caps": ["2GB"], "seeds": [0]})
    result = accuracy.bench_accuracy(study, data_root="/data", threads=1, out=tmp_path)
    forgotten = {"metric": "accuracy", "before": 0.6, "after": 0.55, "lost": pytest.approx(0.05)}
    assert all(row["untouched"] == {"news": forgotten} for row in result["rows"])
    text = (tmp_path / "accuracy.md").read_text()
    assert "## Forgetting" in text and "| grzo | +0.0500 | +0.0500 |" in text
    exported = [c for c in quick if c[0] == "export"]
    evaluated = [c for c in quick if c[0] == "eval"]
    assert "--task" in evaluated[0] and "--data-root" in evaluated[0]
    assert len({c[1] for c in exported}) == len(exported) == len(evaluated) - 1
    count = len(quick)
    accuracy.bench_accuracy(study, data_root="/data", threads=1, out=tmp_path)
    assert len(quick) == count
    assert not list((tmp_path / "untouched").glob("*-model"))


def test_a_run_whose_export_fails_or_that_keeps_no_weights_has_no_forgetting(
    quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    kept = untouched.Untouched("m", {"news": {"task": "ag_news"}}, tmp_path, {}, notes.append)
    (tmp_path / "run").mkdir()
    assert kept.of_run({"run": str(tmp_path / "run")}) == {}  # of a baseline
    (tmp_path / "run" / "config.toml").touch()
    assert kept.of_run({"run": str(tmp_path / "run"), "error": "no memory"}) == {}
    assert kept.of_run({"run": str(tmp_path / "run")}, may_begin=False) is None

    def refuse(arguments: Any) -> Any:
        raise EdgezoError("the disk is full")

    monkeypatch.setattr(untouched, "_edgezo", refuse)
    assert kept.of_run({"run": str(tmp_path / "run")}) == {}
    assert "the disk is full" in notes[0]


def test_after_the_time_no_run_begins_and_the_next_call_makes_those_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(STUDY | {"untouched": {}, "caps": ["2GB"]})
    plain, begun = accuracy._run, []

    def second_only(name: str, request: Any, *, folder: Path, stop_s: float, note: Any) -> Any:
        """The clock passes the end after four runs."""
        begun.append(name)
        if len(begun) > 4:
            return plain(name, request, folder=folder, stop_s=0.0, note=note)
        return made_up_run(name, request, folder=folder)

    monkeypatch.setattr("edgezo.bench.memory.find_spec", lambda name: None)
    monkeypatch.setattr(accuracy, "_run", second_only)
    notes: list[str] = []
    result = accuracy.bench_accuracy(
        study, data_root="/data", most_s=60.0, out=tmp_path, note=notes.append
    )
    assert len(result["tuning"]) == 3 and len(result["rows"]) == 1
    assert result["pending"] == 15 and "15 runs" in notes[-1]
    text = (tmp_path / "accuracy.md").read_text()
    assert "**Not finished**: 15" in text and "not yet" in text
    monkeypatch.setattr(accuracy, "_run", made_up_run)
    assert accuracy.bench_accuracy(study, data_root="/data", out=tmp_path)["pending"] == 0


def test_a_method_whose_grid_is_not_searched_has_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_study(STUDY | {"untouched": {}, "caps": ["2GB"]})
    monkeypatch.setattr("edgezo.bench.memory.find_spec", lambda name: None)
    result = accuracy.bench_accuracy(study, data_root="/data", most_s=0.0, out=tmp_path)
    assert not result["rows"] and not result["tuning"]
    assert "No run of this round is finished." in (tmp_path / "accuracy.md").read_text()


def test_completions_are_made_of_labelled_rows(tmp_path: Path) -> None:
    rows = tmp_path / "root" / "intents"
    rows.mkdir(parents=True)
    for split in ("train", "validation"):
        row = {"text": f"{split}: {{wake}} me", "intent": 3, "intent_text": "alarm"}
        (rows / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    task = {
        "data": f"{DATA_ROOT}/intents",
        "template": "{text}\nThis is",
        "completion": "{intent_text}",
    }
    study = read_study(STUDY | {"tasks": {"intents": task}, "tune": {}})
    found = placed(study, str(tmp_path / "root"), tmp_path / "data")
    assert found.tasks == {"intents": {"data": str(tmp_path / "data" / "intents")}}
    line = json.loads((tmp_path / "data/intents/train.jsonl").read_text())
    assert line == {"prompt": "train: {wake} me\nThis is", "completion": "alarm"}
    with pytest.raises(UsageError, match="--data-root"):
        placed(study, None, tmp_path / "data")
    lacking = read_study(STUDY | {"tasks": {"x": task | {"completion": "{intention}"}}, "tune": {}})
    with pytest.raises(UsageError, match="intention"):
        placed(lacking, str(tmp_path / "root"), tmp_path / "data")


def test_the_league_is_a_study_of_fifteen_methods_and_more() -> None:
    import tomllib

    file = Path(__file__).parents[2] / "benchmarks" / "league.toml"
    study = read_study(tomllib.loads(file.read_text()))
    assert len(study.methods) >= 15 and len(study.rounds) == 4 and len(study.seeds) == 3
    assert {"sst2", "trec", "snips", "rte", "banking77", "clinc_oos", "squad"} == set(study.tasks)
    assert set(study.untouched) == {"tiny_shakespeare", "ag_news"}
    for name, (point, *_) in study.methods.items():
        cfg = make_config(study.request("sst2", point, 0, {}))
        readout = cfg.parts.readout or cfg.parts.head
        assert readout == (name in ("default", "linear-probe", "exact-head")), name
        assert cfg.estimator == name or cfg.estimator == point.get("estimator") or readout, name


@pytest.mark.slow
def test_a_small_league_from_its_file_to_its_page(tmp_path: Path, edgezo_json: Any) -> None:
    import tomli_w
    from conftest import make_model

    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        for split, count in (("train", 20), ("validation", 8)):
            rows = [{"text": f"{name} {i}", "label": i % 2} for i in range(count)]
            file = tmp_path / name / f"{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"template": "{text} It was", "labels": "0=bad,1=good"}
    given = {
        "model": str(make_model(tmp_path / "model")),
        "tasks": {"mine": {"data": f"{DATA_ROOT}/mine", **words}},
        "forwards": 16,
        "caps": ["4GB"],
        "common": {"batch-size": 4, "device": "cpu", "train": "lowrank+head+probe"},
        "methods": {"default": {}},
        "untouched": {"other": {"data": f"{DATA_ROOT}/other", **words}},
    }
    study, out = tmp_path / "study.toml", tmp_path / "out"
    study.write_text(tomli_w.dumps(given))
    options = ("--data-root", tmp_path, "--threads", "1", "--out", out)
    code, left = edgezo_json("bench", "accuracy", study, "--for", "0s", *options)
    assert code == 0 and left["pending"] == 1 and not left["rows"]
    code, result = edgezo_json("bench", "accuracy", study, *options)
    assert code == 0 and result["pending"] == 0, result
    (row,) = result["rows"]
    assert "error" not in row and set(row["untouched"]["other"]) == {
        "metric",
        "before",
        "after",
        "lost",
    }
    assert "## Forgetting" in (out / "accuracy.md").read_text()
    assert edgezo_json("bench", "accuracy", study, *options)[1] == result
