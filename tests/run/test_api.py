"""The Python API: a model and rows in every form that a program has them, and a Run that is evaluated and asked."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELLED, Bench
from tiny_models import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

import edgezo
from edgezo.errors import DoesNotFit, EdgezoError, Interrupted, UsageError
from edgezo.machine.process_memory import peak_rss_bytes, rss_bytes
from edgezo.plan.calibration import CALLING
from edgezo.plan.request import make_config
from edgezo.run.given import GIVEN_MODEL, GIVEN_ROWS
from edgezo.run.given import write_rows as write_given
from edgezo.run.progress import Silent, verdict_on_cap

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")
SMALL: dict[str, Any] = {
    **{"precision": "fp32", "batch_size": 4, "micro_batch": 3, "max_mem": "8GB", "steps": 2},
    **{"progress": False, "train": "lowrank+head", **LABELLED},
}


def rows_of(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (bench.data / "label.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> edgezo.Run:
    """A run over rows that were given as a list."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    run = edgezo.finetune(bench.model, rows_of(bench), out=out, **SMALL)
    torch.set_num_threads(threads)
    return run


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# ------------------------------------------------------------------------------- what is given


def test_rows_in_every_form_make_one_run(bench, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def rows() -> Iterator[dict[str, Any]]:
        yield from rows_of(bench)

    assert (made.directory / GIVEN_ROWS / "train.jsonl").exists()
    forms = {
        "path": str(bench.data / "label.jsonl"),
        "iterator": rows(),
        "splits": {"train": rows()},
    }
    for name, data in forms.items():
        run = edgezo.finetune(str(bench.model), data, **{**SMALL, "labels": {0: "bad", 1: "good"}})
        assert run["trained_sha256"] == made["trained_sha256"], name
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["model-label", "model-rows", "model-rows-2"]


def test_a_data_set_of_the_datasets_library_is_rows(bench, made, tmp_path):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Dataset"):
        pytest.skip("another module of that name is on the path of the tests")
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows_of(bench))
    split = datasets.Dataset(table, fingerprint="rows")
    parts = datasets.DatasetDict({"train": split, "test": split.select(range(5))})
    run = edgezo.finetune(bench.model, split, out=tmp_path / "a", **SMALL)
    assert run["trained_sha256"] == made["trained_sha256"]
    run = edgezo.finetune(bench.model, parts, out=tmp_path / "b", **SMALL)
    assert run["eval_after"]["n"] == 5


def test_validation_rows_are_evaluated_on_with_the_threads_that_are_asked_for(bench, tmp_path):
    rows, threads = rows_of(bench), list[int]()

    class Looking(Silent):
        def step(self, step: int, **figures: Any) -> None:
            threads.append(torch.get_num_threads())

    asked = {**SMALL, "progress": Looking(), "out": tmp_path / "run", "threads": 2}
    run = edgezo.finetune(bench.model, rows, validation=rows[:7], **asked)
    assert run["eval_after"]["n"] == 7
    assert (
        threads == [2, 2] and torch.get_num_threads() == 1
    )  # those of the call, and of the program
    with pytest.raises(UsageError, match="one folder"):
        edgezo.finetune(bench.model, bench.data / "label.jsonl", validation=rows, **SMALL)


def test_a_loaded_model_is_kept_with_its_run(bench, made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bench.model)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    shown = Notes()
    asked = {**SMALL, "out": tmp_path / "run", "progress": shown}
    run = edgezo.finetune(model, rows_of(bench), tokenizer=tokenizer, **asked)
    assert run["trained_sha256"] == made["trained_sha256"]
    assert any(re.match(r"the loaded model takes \d+", note) for note in shown.notes)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    run.directory.rename(moved)
    found = edgezo.Run.open(moved)
    assert found.evaluate()["value"] == made.evaluate()["value"]
    assert {path.name for path in moved.iterdir()} >= {GIVEN_MODEL, GIVEN_ROWS}


def test_a_model_that_cannot_be_trained_is_refused_and_leaves_nothing(bench, tmp_path):
    out = tmp_path / "run"
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    for model, more, problem in (
        (random_model("llama"), {}, "needs its tokenizer"),
        (bloom, {"tokenizer": tokenizer}, "BloomForCausalLM.*'bloom'. edgezo loads"),
        (bench.model, {"tokenizer": tokenizer}, "a path or a card has its own"),
    ):
        with pytest.raises(EdgezoError, match=problem):
            edgezo.finetune(model, rows_of(bench), out=out, **more, **SMALL)
        assert not out.exists()


def broken() -> Iterator[Any]:
    yield {"text": "fine", "label": 1}
    raise KeyError("the program's own")


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a text": (["a film"], {}, UsageError, r"row 1 is a str.*to_dict\('records'\)"),
    "a value": ([{"text": object()}], {}, UsageError, "row 1: 'text' is a object"),
    "a number": (5, {}, UsageError, "a int is no rows"),
    "splits": ({"test": []}, {}, UsageError, "none is called train"),
    "no rows": ([], {}, UsageError, "is empty"),
    "an error of the program's": (broken(), {}, KeyError, "own"),
    "a template": ([{"text": "a", "label": 1}] * 3, {"template": "{other}"}, UsageError, "other"),
    "a setting": ([{"text": "a"}], {"speed": 3}, UsageError, "unknown setting 'speed'"),
    "labels": ([{"text": "a"}], {"labels": {0: "bad, or so", 1: "good"}}, UsageError, "a comma"),
    "a cap": ("rows", {"max_mem": "1MB"}, DoesNotFit, "--max-mem"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_leaves_nothing(case, bench, tmp_path):
    data, more, error, problem = REFUSED[case]
    data = rows_of(bench) if data == "rows" else data
    out = tmp_path / "runs" / "run"
    with pytest.raises(error, match=problem):
        edgezo.finetune(bench.model, data, out=out, **{**SMALL, **more})
    assert not out.exists()


def test_rows_are_not_written_where_a_user_has_files(bench, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="files that edgezo did not write"):
        edgezo.finetune(bench.model, rows_of(bench), out=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_values_of_numpy_and_halves_of_characters_are_kept(tmp_path):
    row = {
        "n": np.int64(3),
        "x": np.float32("nan"),
        "list": np.arange(2),
        "text": "\ud83d",
        5: None,
    }
    write_given(tmp_path / "rows.jsonl", "train", [row])
    kept = json.loads((tmp_path / "rows.jsonl").read_text())
    assert kept == {"n": 3, "x": None, "list": [0, 1], "text": "\ud83d", "5": None}


def test_given_files_are_removed_with_their_run_and_a_users_file_is_not(made, edgezo, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.directory, run)
    (run / GIVEN_ROWS / "notes.txt").write_text("mine")
    assert edgezo("rm", run, "--yes")[0] == 2 and (run / GIVEN_ROWS / "notes.txt").exists()
    (run / GIVEN_ROWS / "notes.txt").unlink()
    with (run / GIVEN_ROWS / "train.jsonl").open("a") as file:
        file.write("\n")
    code, _, error = edgezo("rm", run, "--yes")
    assert code == 2 and "given-rows in it is no file that edgezo wrote" in error
    shutil.rmtree(run)
    shutil.copytree(made.directory, run)
    assert edgezo("rm", run, "--yes")[0] == 0 and not run.exists()


# ------------------------------------------------------------------------------------- a run


def test_a_run_is_evaluated_asked_exported_and_shown(bench, made, tmp_path):
    rows = rows_of(bench)
    assert made.evaluate(iter(rows))["n"] == len(rows)
    assert made.evaluate(bench.data / "label.jsonl", **LABELLED)["n"] == len(rows)
    with pytest.raises(UsageError, match="give the one"):
        made.evaluate({"train": rows})
    answers = made.predict(["film 3 is warm", {"text": "film 4 is cold"}])
    assert [answer["label"] in ("bad", "good") for answer in answers] == [True, True]
    with pytest.raises(UsageError, match="tells bad, good apart"):
        made.generate("film 3 is")
    with edgezo.load(made) as used:
        assert used.predict(["film 3 is warm"])[0]["label"] == answers[0]["label"]
    with pytest.raises(UsageError, match="was closed"):
        used.predict(["film 3 is warm"])
    assert made.export("hf", out=tmp_path / "model")["format"] == "hf"
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert made.report.read_text().startswith("<!doctype html>")
    assert set(made) == set(made.summary) and len(made) == len(made.summary)
    assert f"{made['eval_after']['value']:.4f}" in repr(made)
    shown = made._repr_html_()
    assert "report.html" in shown and "<td>peak memory</td>" in shown


def test_what_a_page_shows_in_a_notebook_is_escaped(made, tmp_path):
    run = tmp_path / "<b>run</b>"
    shutil.copytree(made.directory, run)
    shown = edgezo.Run.open(run)._repr_html_()
    assert "&lt;b&gt;run" in shown and "<b>" not in shown


def test_a_run_that_was_stopped_goes_on_by_its_directory(bench, made, tmp_path):
    class Stopping(Silent):
        def step(self, step: int, **figures: Any) -> None:
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C, and as a notebook that is interrupted

    asked = {**SMALL, "progress": Stopping(), "out": tmp_path / "run"}
    with pytest.raises(Interrupted):
        edgezo.finetune(bench.model, iter(rows_of(bench)), **asked)
    run = edgezo.Run.open(tmp_path / "run")
    assert dict(run) == {} and "edgezo.Run" in repr(run)
    with pytest.raises(UsageError, match="goes on as it began"):
        run.resume(steps=9, progress=False)
    assert run.resume(progress=False)["trained_sha256"] == made["trained_sha256"]


def test_a_configuration_says_all(bench, tmp_path):
    cfg = make_config(bench.settings(out=str(tmp_path / "run"), steps=1, train="lowrank"))
    run = edgezo.finetune(cfg, progress=None)
    assert run["steps"] == 1 and edgezo.finetune(cfg, resume=True, progress=None) == dict(run)
    for more in ({"steps": 3}, {"rank": 4}, {"data": "rows.jsonl"}):
        with pytest.raises(UsageError, match="a RunConfig says all"):
            edgezo.finetune(cfg, **more)
    with pytest.raises(UsageError, match=r"Run\.open\(DIRECTORY\)\.resume"):
        edgezo.finetune(bench.model, "rows.jsonl", resume=True)
    with pytest.raises(EdgezoError, match="no run"):
        edgezo.Run.open(tmp_path)


# ---------------------------------------------------------------------------------- memory


def test_what_the_program_holds_is_an_item_of_the_plan(bench, made, tmp_path):
    run = edgezo.finetune(bench.model, rows_of(bench), out=tmp_path / "run", **SMALL)
    items = {
        item["name"]: item for item in json.loads((tmp_path / "run/plan.json").read_text())["items"]
    }
    assert items[CALLING]["bytes"] > 200e6 and "of data" in items[CALLING]["reason"]
    total = items[CALLING]["bytes"] + items["base process"]["bytes"]
    assert abs(total - run["base_rss_bytes"]) < 1e6
    with pytest.raises(DoesNotFit, match=r"the calling program has \d+MB.*of data"):
        edgezo.load(run, max_mem_bytes=rss_bytes() + 10_000_000)


def test_what_the_program_held_before_is_none_of_the_runs_peak(bench, tmp_path):
    cap_bytes = rss_bytes() + 150_000_000
    more = np.ones(2 * cap_bytes, np.uint8)
    assert peak_rss_bytes() > cap_bytes
    del more
    asked = {**SMALL, "out": tmp_path / "run", "max_mem": cap_bytes, "steps": 1, "train": "lowrank"}
    run = edgezo.finetune(bench.model, bench.data / "label.jsonl", **asked)
    assert run["max_mem_bytes"] == cap_bytes < run["peak_rss_bytes"] <= run["earlier_peak_bytes"]
    assert "kept (the peak was before)" in run._repr_html_()
    for peak, before, verdict in ((5, 0, "kept"), (9, 0, "NOT kept"), (9, 8, "NOT kept")):
        summary = {"max_mem_bytes": 5, "earlier_peak_bytes": before}
        assert verdict_on_cap(summary, peak) == verdict
