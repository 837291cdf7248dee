"""A run goes on, and is evaluated, wherever its files are: what they are is known by their content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from edgezo.errors import EdgezoError, UsageError
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
    monkeypatch.chdir(home)
    asked = ("--model", "model", "--data", "rows.jsonl", "--batch-size", 2, "--train", "lowrank")
    for out in ("run", tmp_path / "far" / "run"):
        code, _, err = edgezo("finetune", *asked, "--steps", 2, "--out", out)
        assert code == 0, err
    return home


def written_at(run: Path) -> Any:
    return from_toml((run / "config.toml").read_text()).written_at


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
        places.check_base_is_there(cfg, tmp_path / "run")
        places.check_data_is_there(cfg, tmp_path / "run")
        assert places.with_beginning(cfg) == cfg
    cfg = make_config({"model": "/no/such/folder", "data": "/no/such/rows.jsonl"})
    for check in (places.check_base_is_there, places.check_data_is_there):
        with pytest.raises((EdgezoError, UsageError), match="say where"):
            check(cfg, tmp_path / "run")
