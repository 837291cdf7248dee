"""``--log-to``: a tracker gets the losses and evaluations of a run, and nothing of it stands in the run's way."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench
from test_opening import Kept
from test_runs import run_of

from edgezo.errors import UsageError
from edgezo.plan.request import make_config, read_run_config
from edgezo.run.directory import RunFiles
from edgezo.run.opening import Opening
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def missing(*packages: str) -> bool:
    return not any(importlib.util.find_spec(package) for package in packages)


needs_board = pytest.mark.skipif(
    missing("tensorboard", "tensorboardX"), reason="TensorBoard's writer is not installed"
)


def events(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of the scalars in the event files of a folder, in the order of their files."""
    if missing("tensorboard"):
        from tensorboardX.proto.event_pb2 import Event
    else:
        from tensorboard.compat.proto.event_pb2 import Event
    scalars = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(
            data
        ):  # a record: its length (u64), a checksum of that (u32), itself, and its checksum (u32)
            end = at + 12 + int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : end])
            at = end + 4
            for value in event.summary.value:
                number = value.simple_value or (value.tensor.float_val or [0.0])[0]
                scalars.append((value.tag, event.step, number))
    return scalars


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFiles(run).metrics.read_text().splitlines()]


class AtTheOpening(Kept):
    """Keeps what is imported when a run is planned."""

    def opening(self, opening: Opening) -> None:
        super().opening(opening)
        self.imported = set(sys.modules)


@needs_board
def test_tensorboard_gets_every_loss_and_evaluation_and_changes_nothing(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run, kept = tmp_path / "run", AtTheOpening()
    request = {"train": "lowrank+head", "steps": 4, "snapshot_every": 2}
    plain = run_of(bench, tmp_path / "plain", **request)
    cfg = make_config(bench.settings(out=str(run), log_to="tensorboard", **request))
    summary = finetune(cfg, progress=kept)
    assert summary["trained_sha256"] == plain["trained_sha256"]
    assert summary["eval_after"] == plain["eval_after"]
    # What the writer takes is part of the process that is planned.
    assert {"torch.utils.tensorboard", "tensorboardX"} & kept.imported
    logged = events(RunFiles(run).board)
    losses = [(line["step"], line["loss"]) for line in lines_of(run) if "step_size" in line]
    shown = [(step, value) for tag, step, value in logged if tag == "train/loss"]
    assert [step for step, _ in shown] == [step for step, _ in losses] == [1, 2, 3, 4]
    assert [value for _, value in shown] == pytest.approx([loss for _, loss in losses])
    accuracies = [(step, value) for tag, step, value in logged if tag == "eval/accuracy"]
    ends = (summary["eval_before"]["value"], summary["eval_after"]["value"])
    assert accuracies == [(0, ends[0]), (4, ends[1])]
    # It is a setting of the place: the journal does not have it, and a resume may change it.
    assert read_run_config(RunFiles(run).config).log_to == "tensorboard"
    assert b"log_to" not in RunFiles(run).journal.read_bytes()
    assert edgezo("finetune", "--resume", "--log-to", "none", "--out", run)[0] == 0
    code, _, err = edgezo("rm", run, "--yes")
    assert code == 0 and not run.exists(), err


@needs_board
def test_a_tracker_that_fails_ends_its_log_and_not_the_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("where a folder belongs")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "below"))
    notes: list[str] = []
    kept = Kept()
    monkeypatch.setattr(kept, "note", notes.append)
    cfg = make_config(bench.settings(out=str(tmp_path / "run"), log_to="tensorboard"))
    summary = finetune(cfg, progress=kept)
    assert summary["steps"] == 3
    failures = [note for note in notes if "--log-to tensorboard has failed" in note]
    assert len(failures) == 1 and "the run goes on" in failures[0]


@needs_board
def test_files_of_a_user_in_its_folder_are_not_edgezos(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_of(bench, run, train="lowrank", log_to="tensorboard")
    board = RunFiles(run).board
    (board / "notes.txt").write_text("mine")
    code, _, err = edgezo("rm", run, "--yes")
    assert code == 2 and (board / "notes.txt").read_text() == "mine", err
    (board / "notes.txt").unlink()
    elsewhere = shutil.copytree(board, tmp_path / "elsewhere")
    shutil.rmtree(board)
    board.symlink_to(elsewhere)
    code, _, err = edgezo("finetune", "--resume", "--out", run)
    assert code == 1 and "is a link to" in err


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(
    name: str, edgezo: Any, bench: Bench, tmp_path: Path
) -> None:
    if not missing(name):
        pytest.skip(f"{name} is installed")
    request = bench.arguments(out=tmp_path / "run", model=tmp_path / "no model")
    code, _, err = edgezo("finetune", *request, "--log-to", name)
    assert code == 2 and f"pip install {name}" in err
    assert not (tmp_path / "run").exists()
    code, _, err = edgezo("plan", *bench.arguments(), "--log-to", name)
    assert code == 2 and f"pip install {name}" in err


def test_no_other_tracker_is_known(bench: Bench) -> None:
    with pytest.raises(UsageError, match="'tensorbord' is not one of none, tensorboard, wandb"):
        make_config(bench.settings(log_to="tensorbord"))
