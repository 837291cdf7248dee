"""The gate before a directory is written to. tests/cli/test_users_files.py tries it with every command."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.ownership import MARKER, check_new, check_new_file, claim, kind_of


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(bench, tmp_path_factory):
    """A run of two steps, to be replayed and exported."""
    from edgezo.plan.request import make_config
    from edgezo.run.train import finetune

    run = tmp_path_factory.mktemp("runs") / "run"
    finetune(make_config(bench.settings(out=str(run), steps=2, train="lowrank+head")))
    return run


def test_a_directory_is_claimed_once_and_by_one_kind(tmp_path):
    folder = tmp_path / "a" / "b"
    claim(folder, "run")
    assert kind_of(folder) == "run" and json.loads((folder / MARKER).read_text())["format"] == 1
    (folder / "notes.txt").write_text("beside a run a user may keep files")
    claim(folder, "run")
    before = contents(folder)
    with pytest.raises(UsageError, match="of the kind 'run'"):
        claim(folder, "replay")
    assert contents(folder) == before


@pytest.mark.parametrize("marker", ["", "{", "[]", '{"kind": 1, "format": 1}', "\x00" * 2000])
def test_a_marker_that_cannot_be_read_is_no_proof(tmp_path, marker):
    (tmp_path / MARKER).write_text(marker)
    with pytest.raises(UsageError, match="Nothing was changed"):
        claim(tmp_path, "run")
    assert contents(tmp_path) == {MARKER: marker.encode()}


def test_a_marker_that_is_a_pipe_is_no_proof(tmp_path):
    os.mkfifo(tmp_path / MARKER)
    with pytest.raises(UsageError, match="not readable"):
        claim(tmp_path, "run")


def test_a_marker_does_not_prove_whose_each_file_is(tmp_path):
    claim(tmp_path, "run", forms={"a": Path.is_dir})
    (tmp_path / "b").write_text("a name that edgezo does not write")
    claim(tmp_path, "run", forms={"a": Path.is_dir})
    (tmp_path / "a").write_text("mine")
    for form in (Path.is_dir, Path.readlink):  # no, and an error
        with pytest.raises(UsageError, match="but a in it is no file that edgezo wrote"):
            claim(tmp_path, "run", forms={"a": form})
    assert (tmp_path / "a").read_text() == "mine"


def test_a_new_place_is_absent_or_empty(tmp_path):
    check_new(tmp_path / "a" / "b")
    assert (tmp_path / "a").is_dir() and not (tmp_path / "a" / "b").exists()
    check_new(tmp_path / "a")
    check_new_file(tmp_path / "a" / "b" / "file")
    for taken in (tmp_path, tmp_path / "a"):
        with pytest.raises(UsageError, match="there already"):
            check_new(taken)
        with pytest.raises(UsageError, match="exists already"):
            check_new_file(taken)


@pytest.mark.parametrize("place", ["deep/in/out", "deep/in/file.csv"])
def test_a_disk_without_room_for_a_directory_is_named_with_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def refused(folder: Path, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(Path, "mkdir", refused)
    check = check_new_file if place.endswith("csv") else check_new
    with pytest.raises(EdgezoError, match=r"[0-9,]+ bytes are free\)\. Nothing half-written"):
        check(tmp_path / place)


def test_files_links_and_places_without_permission_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        with pytest.raises(EdgezoError, match="not a directory"):
            claim(place, "run")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(EdgezoError, match="a link to nothing"):
        claim(link, "run")
    with pytest.raises(EdgezoError):
        claim(Path("/proc/1/run"), "run")
    assert file.read_text() == "mine"


def test_a_run_without_a_marker_goes_on_and_is_replayed(bench, finished, edgezo_json, tmp_path):
    """Runs of versions before there were markers, and copies of visible files only."""
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns(MARKER))
    code, summary = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and summary["steps"] == 2
    for _ in range(2):  # a second replay may replace the first one, with or without its marker
        assert edgezo_json("replay", run, "--out", tmp_path / "again")[0] == 0
        (tmp_path / "again" / MARKER).unlink()


def test_a_run_that_was_killed_before_its_journal_begins_again(bench, edgezo_json, tmp_path):
    run = tmp_path / "run"
    assert edgezo_json("finetune", *bench.arguments(steps=1), "--out", run)[0] == 0
    for path in list(run.iterdir()):
        if path.name not in ("config.toml", "plan.json"):
            path.unlink()
    assert edgezo_json("finetune", *bench.arguments(steps=1), "--out", run)[0] == 0
