"""--for bounds the whole command: what is not training is taken off the time for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench
from test_runs import run_of

from edgezo.plan.request import make_config
from edgezo.run import clock, readout_pass, states_pass, train
from edgezo.run.clock import LEAST_TRAINING_SHARE, TimeBox
from edgezo.run.train import finetune

TICK_S = 0.25  # that pass between two looks at the clock of a test


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that is ``TICK_S`` later at every look; [the time that it shows]."""
    shown = [1000.0]

    def look() -> float:
        shown[0] += TICK_S
        return shown[0]

    for module in (clock, train, readout_pass, states_pass):
        monkeypatch.setattr(module, "now_s", look)
    return shown


def test_the_box_takes_off_what_is_over_and_what_the_last_evaluation_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clock, "now_s", lambda: 1030.0)
    box = TimeBox(120.0, began_s=1000.0, evaluation_s=12.0)
    assert box.left_s(spent_s=7.0) == 120 - 30 - 12
    box.earlier_s = 50.0  # an earlier process trained so long
    assert box.left_s() == 120 - 30 - 12 - 50
    box.earlier_s = 500.0
    assert box.left_s() == LEAST_TRAINING_SHARE * 120


def test_without_a_beginning_the_box_is_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now_s", lambda: 1030.0)
    assert TimeBox(120.0).left_s(spent_s=7.0) == 113
    assert TimeBox(120.0).left_s(spent_s=700.0) == 0
    assert TimeBox(None, began_s=0.0).left_s() == math.inf


@pytest.mark.parametrize("blocks", ["all", "2"])
@pytest.mark.parametrize("changes", [{"train": "lowrank"}, {"train": "lowrank+probe"}])
def test_the_whole_command_ends_within_its_time(
    deep_bench: Bench, ticking: list[float], tmp_path: Path, changes: dict[str, Any], blocks: str
) -> None:
    settings = deep_bench.settings(
        steps=None, for_s=60.0, out=str(tmp_path), blocks=blocks, **changes
    )
    begun_s = ticking[0]
    summary = finetune(make_config(settings), began_s=begun_s)
    assert summary["steps"] > 3
    assert 40 < ticking[0] - begun_s < 62


def test_evaluations_between_steps_are_inside(
    deep_bench: Bench, ticking: list[float], tmp_path: Path
) -> None:
    settings = deep_bench.settings(steps=None, for_s=60.0, out=str(tmp_path), eval_every=2)
    begun_s = ticking[0]
    finetune(make_config(settings), began_s=begun_s)
    assert ticking[0] - begun_s < 62


def test_training_alone_is_bounded_where_no_beginning_is_given(
    bench: Bench, ticking: list[float], tmp_path: Path
) -> None:
    begun_s = ticking[0]
    summary = run_of(bench, tmp_path / "run", steps=None, for_s=20.0, train="lowrank")
    assert ticking[0] - begun_s > 20
    assert 20 <= summary["train_s"] < 20 + 12 * TICK_S
