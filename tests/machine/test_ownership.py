"""A directory of a user's files is never written to: every command that writes refuses it before a byte has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.ownership import MARKER, claim, kind_of

# Names that edgezo writes itself, with what a user might have in such files.
USERS_FILES = {
    "config.toml": '[server]\nport = 8080\nmodel = "mine"\n',
    "plan.json": '{"plan": "holidays"}\n',
    "metrics.jsonl": '{"visitors": 12}\n',
    "summary.json": '{"steps": 3}\n',
    "report.html": "<p>mine</p>\n",
    "trained.safetensors": "not a tensor",
    "head.safetensors": "not a tensor",
    "probe.safetensors": "not a tensor",
    "probe.states": "states of matter",
    "replay.json": '{"match": 1}\n',
    "overlay/block-0000.overlay": "a transparency",
    "overlay/notes.txt": "read me",
    "memory.json": "{}\n",
    "points.jsonl": "{}\n",
    "speed.json": "{}\n",
    "accuracy.json": "{}\n",
    ".config.toml.abcd1234.edgezo-tmp": "a file of another program",
}
JOURNALS = {
    "none": None,
    "text": b"Dear diary,\n",
    "empty": b"",
    "magic alone": b"\x89EZJ\r\n\x1a\n",
}


def users_directory(folder: Path, journal: bytes | None = None) -> Path:
    for name, text in USERS_FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if journal is not None:
        (folder / "journal.bin").write_bytes(journal)
    return folder


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


def commands(bench, finished: Path, folder: Path) -> dict[str, list[object]]:
    """Every command and option that writes to a place that the user names, with that place in ``folder``."""
    request = bench.arguments(steps=1)
    labelled = [*bench.arguments(steps=None, micro_batch=None, batch_size=None, precision=None)]
    study = folder.parent / "study.toml"
    study.write_text(
        f'model = "{bench.model}"\nseeds = [0]\nsteps = 1\nmetric = "accuracy"\n'
        "[tasks.example]\n[methods.grzo]\n"
    )
    return {
        "finetune": ["finetune", *request, "--out", folder],
        "finetune on disk": [
            *("finetune", *request, "--out", folder, "--train", "full", "--residency", "disk")
        ],
        "finetune profiled": ["finetune", *request, "--out", folder, "--profile"],
        "resume": ["finetune", *request, "--resume", "--out", folder],
        "resume alone": ["finetune", "--resume", "--out", folder],
        "replay": ["replay", finished, "--out", folder],
        "export hf": ["export", finished, "--out", folder],
        "export peft": ["export", finished, "--format", "peft", "--out", folder],
        "bench memory": ["bench", "memory", "--model", bench.model, "--out", folder],
        "bench speed": ["bench", "speed", *labelled, "--out", folder],
        "bench alignment": ["bench", "alignment", *labelled, "--out", folder],
        "bench accuracy": ["bench", "accuracy", study, "--out", folder],
        "meta-train": [
            *("meta-train", "--model", bench.model, "--task", "example", "--steps", 1),
            *("--out", folder / "trained.safetensors"),
        ],
        "convert-finetuner": ["convert-finetuner", "in.pth", folder / "trained.safetensors"],
    }


NAMES = (
    *("finetune", "finetune on disk", "finetune profiled", "resume", "resume alone", "replay"),
    *("export hf", "export peft", "bench memory", "bench speed", "bench alignment"),
    *("bench accuracy", "meta-train", "convert-finetuner"),
)


@pytest.mark.parametrize("journal", JOURNALS)
@pytest.mark.parametrize("name", NAMES)
def test_a_users_directory_is_byte_equal_after_every_command(
    bench, finished, edgezo, tmp_path, name, journal
):
    folder = users_directory(tmp_path / "mine", JOURNALS[journal])
    before = contents(folder)
    code, _, err = edgezo(*commands(bench, finished, folder)[name])
    assert contents(folder) == before
    assert code in (1, 2) and "Traceback" not in err


def test_a_converted_finetuner_replaces_no_file(edgezo, tmp_path):
    out = tmp_path / "mine.safetensors"
    out.write_text("mine")
    code, _, err = edgezo("convert-finetuner", tmp_path / "in.pth", out)
    assert code == 2 and "exists already" in err and out.read_text() == "mine"


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
