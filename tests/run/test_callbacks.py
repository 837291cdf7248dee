"""transformers' TrainerCallbacks on a run: the events of a Trainer, in its order, and what they ask for is done."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest
from conftest import Bench
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from edgezo.errors import UsageError
from edgezo.plan.request import make_config
from edgezo.run.callbacks import TrainerCallbacks
from edgezo.run.progress import Several, Silent
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


class Events(TrainerCallback):
    """Keeps every event with the step that it came after, and asks for something after one step."""

    def __init__(self, after: int | None = None, **asked: bool):
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, Any]] = []
        self.after, self.asked = after, asked

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def event(
            args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
        ) -> TrainerControl | None:
            assert isinstance(args, TrainingArguments) and state.log_history is not None
            self.events.append((name, state.global_step))
            if name == "on_log":
                self.logs.append(more["logs"])
            if name != "on_step_end" or state.global_step != self.after:
                return None
            for what, value in self.asked.items():
                setattr(control, what, value)
            return control

        return event

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def run_with(bench: Bench, out: Any, *callbacks: Any, **changes: Any) -> dict[str, Any]:
    settings = {
        "kind": "completion",
        "train": "lowrank+head",
        "batch_size": 12,
        "snapshot_every": 2,
        **changes,
    }
    cfg = make_config(bench.settings(**settings, out=str(out)))
    return finetune(cfg, progress=Several([Silent(), TrainerCallbacks(callbacks)]))


def test_callbacks_get_the_events_of_a_trainer_in_its_order(bench, tmp_path):
    events = Events()
    summary = run_with(bench, tmp_path / "run", events, steps=5, eval_every=3)
    names = events.names()
    assert names[:2] == ["on_init_end", "on_train_begin"] and names[-1] == "on_train_end"
    assert names[2:5] == [
        "on_log",
        "on_evaluate",
        "on_epoch_begin",
    ]  # the evaluation before training
    assert [step for name, step in events.events if name == "on_step_end"] == [1, 2, 3, 4, 5]
    assert [step for name, step in events.events if name == "on_step_begin"] == [0, 1, 2, 3, 4]
    assert [step for name, step in events.events if name == "on_evaluate"] == [0, 3, 5]
    assert [step for step, _ in groupby(s for name, s in events.events if name == "on_save")] == [
        1,
        3,
        5,
    ]
    # 36 rows to train on, 12 a step: three steps are an epoch.
    assert [step for name, step in events.events if name == "on_epoch_end"] == [3, 5]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "step_size" in line]
    assert [log["loss"] for log in events.logs if "loss" in log] == losses
    assert events.logs[0]["eval_loss"] == summary["eval_before"]["loss"]
    assert "stopped" not in summary


def test_a_callback_stops_a_run_which_is_then_complete(bench, tmp_path, capsys):
    events = Events(2, should_training_stop=True)
    summary = run_with(bench, tmp_path / "run", events, PrinterCallback, steps=50)
    assert summary["steps"] == 2 and "a callback" in summary["stopped"]
    assert summary["eval_after"]["n"] > 0 and events.names()[-1] == "on_train_end"
    assert "'eval_loss'" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["stopped"] == summary["stopped"]
    )
    cfg = make_config(
        bench.settings(
            "completion",
            train="lowrank+head",
            batch_size=12,
            snapshot_every=2,
            steps=50,
            out=str(tmp_path / "run"),
        )
    )
    assert finetune(cfg, resume=True) == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_callback_asks_for_an_evaluation_and_a_snapshot(bench, tmp_path):
    events = Events(1, should_evaluate=True, should_save=True)
    asked = run_with(bench, tmp_path / "asked", events, steps=3, snapshot_every=100)
    assert ("on_evaluate", 1) in events.events and ("on_save", 1) in events.events
    plain = run_with(bench, tmp_path / "plain", steps=3, snapshot_every=100)
    assert asked["trained_sha256"] == plain["trained_sha256"]


def test_early_stopping_of_transformers_stops_a_run_that_learns_nothing(bench, tmp_path):
    patience = EarlyStoppingCallback(early_stopping_patience=2)
    summary = run_with(
        bench, tmp_path / "run", patience, steps=20, eval_every=1, step=1e-30, head_lr=1e-30
    )
    assert 2 < summary["steps"] < 8


def test_what_is_no_callback_is_refused():
    with pytest.raises(UsageError, match=r"a Silent is no transformers\.TrainerCallback"):
        TrainerCallbacks([Silent()])  # type: ignore[list-item]
