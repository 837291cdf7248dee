"""A run goes on, and is evaluated, wherever its files are: what they are is known by their content."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from conftest import Bench, write_rows

import edgezo as package
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine import downloads
from edgezo.machine.hardware import format_bytes
from edgezo.plan.request import from_toml, make_config
from edgezo.run import places
from edgezo.run.journal import open_journal

Edgezo = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgezo: Edgezo) -> Path:
    """A folder that a run began in, with paths that start from it. Its chat template writes the time."""
    home = tmp_path / "home"
    home.mkdir()
    tiny_models.make("llama", home / "model", tokenizer=True)
    settings = home / "model" / "tokenizer_config.json"
    changed = json.loads(settings.read_text())
    changed["chat_template"] = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + changed["chat_template"]
    settings.write_text(json.dumps(changed))
    rows = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        for i in range(8)
    ]
    text = "".join(json.dumps({"messages": turns}) + "\n" for turns in rows)
    (home / "rows.jsonl").write_text(text)
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "cache"))  # which knows no copy of the model
    monkeypatch.chdir(home)
    asked = ("--model", "model", "--data", "rows.jsonl", "--batch-size", 2, "--train", "lowrank")
    for out in ("run", tmp_path / "far" / "run"):
        code, _, err = edgezo("finetune", *asked, "--steps", 2, "--out", out)
        assert code == 0, err
    return home


def written_at(run: Path) -> Any:
    return from_toml((run / "config.toml").read_text()).written_at


def test_other_rows_are_evaluated_on_whole_and_own_ones_as_in_training(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgezo_json: Any
) -> None:
    (begun / "others.jsonl").write_text((begun / "rows.jsonl").read_text())
    asked = {
        "as it stands": ("--model", "run"),
        "its own rows": ("--model", "run", "--data", begun / "rows.jsonl"),
        "other rows": ("--model", "run", "--data", "others.jsonl"),
        "other rows, a share": ("--model", "run", "--data", "others.jsonl", "--held-out", 0.5),
        "a plain model": ("--model", "model", "--data", "rows.jsonl"),
    }
    counts = {name: edgezo_json("eval", *args)[1]["n"] for name, args in asked.items()}
    assert list(counts.values()) == [1, 1, 8, 4, 8]
    rows = shutil.move(begun / "rows.jsonl", tmp_path / "far" / "rows.jsonl")
    assert edgezo_json("eval", "--model", "run", "--data", rows)[1]["n"] == 1


def test_rows_of_a_file_are_read_as_the_task_that_a_run_was_trained_on(
    bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    asked = ("finetune", "--model", bench.model, "--task", "example", "--max-mem", "2GB")
    asked = (*asked, "--steps", 1)
    asked = (*asked, "--precision", "fp32", "--out", tmp_path / "run", "--eval-limit", 9)
    assert edgezo_json(*asked)[0] == 0
    rows = [{"text": "wake me at six", "intent": "alarm"}, {"text": "call mum", "intent": "call"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    code, made = edgezo_json("eval", "--model", tmp_path / "run", "--data", tmp_path / "rows.jsonl")
    assert code == 0 and made["n"] == 2
    code, told = edgezo_json("predict", tmp_path / "run", "--data", tmp_path / "rows.jsonl")
    assert code == 0 and told["accuracy"] == made["value"]


@pytest.mark.parametrize("which", ["run", "../far/run"])
def test_a_run_goes_on_from_another_folder(
    which: str, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgezo: Edgezo
) -> None:
    run, elsewhere = (begun / which).resolve(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text('{"text": "other rows of that name"}\n' * 9)
    monkeypatch.chdir(elsewhere)
    then = written_at(run)
    assert then is not None
    for command in (
        ("finetune", "--resume", "--out", run),
        ("eval", "--model", run),
        ("replay", run, "--out", "replayed"),
        ("export", run, "--format", "peft", "--out", "exported"),
        ("eval", "--model", "replayed"),
    ):
        code, _, err = edgezo(*command)
        assert code == 0, (command, err)
    assert written_at(run) == written_at(Path("replayed")) == then


def test_a_run_goes_on_after_its_folder_has_moved(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgezo: Edgezo
) -> None:
    monkeypatch.chdir(tmp_path)
    begun.rename(tmp_path / "moved")
    for command in (
        ("finetune", "--resume", "--out", "moved/run"),
        ("eval", "--model", "moved/run"),
    ):
        code, _, err = edgezo(*command)
        assert code == 0, (command, err)


def test_renamed_files_are_named_once_and_known_by_their_content(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgezo: Edgezo
) -> None:
    Path("rows.jsonl").rename("other.jsonl")
    code, _, err = edgezo("finetune", "--resume", "--out", "run")
    assert code == 2 and "say where they are now with --data" in err
    code, _, err = edgezo("finetune", "--resume", "--out", "run", "--data", "other.jsonl")
    assert code == 0, err
    Path("model").rename("base")
    for command in (
        ("finetune", "--resume", "--out", "run"),
        ("eval", "--model", "run"),
        ("export", "run", "--format", "peft", "--out", "exported"),
    ):
        code, _, err = edgezo(*command)
        assert code == 1 and "edgezo finetune --resume --out run --model PATH" in err, command
    monkeypatch.chdir(tmp_path)  # what is given starts from here
    code, _, err = edgezo("finetune", "--resume", "--out", "home/run", "--model", "home/base")
    assert code == 0, err
    monkeypatch.chdir("/")
    code, _, err = edgezo("eval", "--model", tmp_path / "home" / "run")
    assert code == 0, err


def test_other_rows_and_another_base_of_the_name_are_refused(begun: Path, edgezo: Edgezo) -> None:
    rows = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(rows.replace("a3", "b3").replace("a4", "b4"))
    code, _, err = edgezo("finetune", "--resume", "--out", "run")
    assert code == 1 and "trained on other rows" in err
    Path("rows.jsonl").write_text(rows)
    shutil.rmtree("model")
    tiny_models.make("llama", Path("model"), tokenizer=True, seed=1)
    code, _, err = edgezo("finetune", "--resume", "--out", "run")
    assert code == 5 and "other base weights" in err


def test_the_journal_does_not_say_where_a_run_began(begun: Path) -> None:
    with open_journal(begun / "run" / "journal.bin", resume=False) as journal:
        assert str(begun) not in json.dumps(journal.header)
        assert journal.header["config"]["written_at"] == written_at(begun / "run")


def test_names_that_are_no_paths_stay_as_they_are(tmp_path: Path) -> None:
    for model in ("smollm2-135m-instruct", "owner/name"):
        cfg = make_config({"model": model, "data": "owner/rows"})
        assert places.found_again(cfg, tmp_path / "run") == cfg
        assert places.with_base(cfg, tmp_path / "run") == cfg
        places.check_data_is_there(cfg, tmp_path / "run")
        assert places.with_beginning(cfg) == cfg
    cfg = make_config({"model": "/no/such/folder", "data": "/no/such/rows.jsonl"})
    for check in (places.with_base, places.check_data_is_there):
        with pytest.raises((EdgezoError, UsageError), match="say where"):
            check(cfg, tmp_path / "run")


@pytest.fixture
def shared(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgezo: Edgezo
) -> SimpleNamespace:
    """A run directory as another machine has it: its base and its rows lie elsewhere, under other names."""
    sender, ours = tmp_path / "sender", tmp_path / "ours"
    for folder in (sender, ours):
        folder.mkdir()
    shutil.copytree(bench.model, sender / "model")
    shutil.copy(bench.data / "label.jsonl", sender / "rows.jsonl")
    request = bench.arguments(model=sender / "model", data=sender / "rows.jsonl", train="lowrank")
    assert edgezo("finetune", *request, "--out", sender / "run")[0] == 0
    summary = json.loads((sender / "run" / "summary.json").read_text())
    shutil.copytree(sender / "run", ours / "run")
    shutil.copytree(sender / "model", ours / "base")
    shutil.copy(sender / "rows.jsonl", ours / "mine.jsonl")
    shutil.rmtree(sender)
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "cache"))  # which knows no file of the sender
    monkeypatch.chdir(ours)
    return SimpleNamespace(sender=sender, summary=summary)


def test_a_shared_run_is_evaluated_where_neither_base_nor_rows_have_their_places(
    shared: SimpleNamespace, edgezo: Edgezo, edgezo_json: Any
) -> None:
    weights = Path("base/model.safetensors")
    code, _, err = edgezo("eval", "--model", "run")
    assert code == 1 and "--base PATH" in err and "model.safetensors" in err
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in err
    assert format_bytes(weights.stat().st_size) in err
    code, _, err = edgezo("eval", "--model", "run", "--base", "base")
    assert code == 2 and "36 rows to train on and 4 to evaluate on" in err and "--data" in err
    asked = ("eval", "--model", "run", "--data", "mine.jsonl")
    code, figures = edgezo_json(*asked, "--base", "base")
    assert code == 0 and figures["value"] == shared.summary["eval_after"]["value"]
    assert figures["loss"] == shared.summary["eval_after"]["loss"]
    for command in (
        ("predict", "run", "--data", "mine.jsonl"),
        ("replay", "run", "--out", "copy"),
        ("export", "run", "--format", "peft", "--out", "exported"),
        ("export", "run", "--format", "journal", "--out", "run.edgezo"),
        ("plan", "--model", "run", "--more-steps", 2, "--data", "mine.jsonl"),
    ):
        code, _, err = edgezo(*command, "--base", "base")
        assert code == 0, (command, err)
    more = ("finetune", "--model", "run", "--more-steps", 1, "--data", "mine.jsonl")
    code, summary = edgezo_json(*more, "--base", "base", "--out", "longer")
    assert code == 0 and summary["model"] == "base"
    with package.load("run", base="base") as used:
        assert used.predict(["a film"])[0]["label"] in ("bad", "good")


def test_a_base_that_was_read_before_is_known_by_its_content(
    shared: SimpleNamespace, edgezo: Edgezo, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path("base/model.safetensors")
    later_ns = weights.stat().st_ctime_ns + 10**10  # what was written just now is not remembered
    monkeypatch.setattr(downloads, "time", SimpleNamespace(time_ns=lambda: later_ns))
    digest = downloads.file_sha256(weights)
    assert [*downloads.known_files(digest)] == [weights.resolve()]
    code, _, err = edgezo("eval", "--model", "run", "--data", "mine.jsonl")
    assert code == 0 and "by its content" in err
    weights.write_bytes(weights.read_bytes() + b"x")
    assert [*downloads.known_files(digest)] == []


def test_a_base_beside_a_plain_model_is_refused(bench: Bench, edgezo: Edgezo) -> None:
    rows = bench.data / "label.jsonl"
    for command in (
        ("eval", "--model", bench.model, "--data", rows),
        ("predict", bench.model, "--data", rows),
        ("plan", "--model", bench.model, "--data", rows),
    ):
        code, _, err = edgezo(*command, "--base", bench.model)
        assert code == 2 and "--base is that of a run" in err
