"""--for bounds the whole command: what is not training is taken off the time for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench, write_rows
from test_runs import run_of

from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import rss_bytes
from edgezo.plan import planner
from edgezo.plan.config import RunConfig
from edgezo.plan.request import make_config, read_run_config, settings_after
from edgezo.run import clock, readout_pass, states_pass, train
from edgezo.run.clock import LEAST_TRAINING_SHARE, TimeBox
from edgezo.run.few_rows import settled_in_time
from edgezo.run.requests import finetune_request
from edgezo.run.session import open_request, settle
from edgezo.run.start import opening_of
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


# ------------------------------------------------------------------ rows that there is time to evaluate on


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which an evaluation is expected to take a second a row."""
    monkeypatch.setattr(planner, "evaluation_s", lambda choice: choice.footprint.tokens.evaluations)


def of_many_rows(bench: Bench, out: Path, **changes: Any) -> RunConfig:
    """A request as the command line makes it, for 120 rows of which most are held out."""
    rows = [{"text": f"film {i} is", "label": i % 2} for i in range(150)]
    data = write_rows(out.parent / "many.jsonl", rows)
    given: dict[str, Any] = dict.fromkeys(make_config({"model": "m", "task": "sst2"}).to_dict())
    given |= {"base": None, "more_steps": None}
    given |= bench.settings(data=str(data), held_out=0.8, out=str(out), steps=None, **changes)
    return finetune_request(given, None, False, lambda text: None).cfg


def test_with_little_time_fewer_rows_are_evaluated_and_the_first_lines_say_so(
    bench: Bench, slow: None, tmp_path: Path
) -> None:
    cfg = of_many_rows(bench, tmp_path / "run", for_s=240.0)
    assert (cfg.eval_limit, cfg.eval_rows) == (300, 300)
    opened = open_request(cfg)
    planned = settled_in_time(opened, lambda one: settle(one, machine(), rss_bytes()))
    # Two evaluations of 120 rows at a second each would be the whole time, and a quarter is 60 seconds.
    assert planned.cfg.eval_rows == planned.plan.evaluations == 30
    rows = planned.opened.dataset.validation
    assert len(rows) == 30
    assert {str(row) for row in rows} < {str(row) for row in opened.dataset.validation}
    said = dict(opening_of(planned).lines())
    assert (
        "30 to evaluate on (of 120 that were read: two evaluations of all would take"
        in said["data"]
    )
    assert (
        "2.0 times that of all, of an accuracy up to 0.091; --eval-limit 120 takes all"
        in said["data"]
    )
    assert "2 evaluations of 30 rows 60 s" in said["time"]
    again = open_request(planned.cfg)  # as a resume does
    assert [str(row) for row in again.dataset.validation] == [str(row) for row in rows]


@pytest.mark.parametrize("changes", [{"for_s": 1200.0}, {"for_s": 240.0, "eval_limit": 300}])
def test_all_rows_are_evaluated_where_there_is_time_or_they_are_asked_for(
    bench: Bench, slow: None, tmp_path: Path, changes: dict[str, Any]
) -> None:
    opened = open_request(of_many_rows(bench, tmp_path / "run", **changes))
    planned = settled_in_time(opened, lambda one: settle(one, machine(), rss_bytes()))
    assert planned.plan.evaluations == 120
    assert "(" not in dict(opening_of(planned).lines())["data"].partition("labels")[0]


def test_a_run_with_fewer_rows_goes_on_with_them_and_its_report_says_why(
    bench: Bench, slow: None, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    cfg = of_many_rows(bench, out, for_s=240.0)
    summary = finetune(replace(cfg, for_s=None, steps=2))  # no time bounds the run: all rows
    assert summary["eval_after"]["n"] == 120
    out = tmp_path / "timed"
    summary = finetune(replace(cfg, for_s=1e-3, out=str(out)), began_s=clock.now_s())
    assert summary["eval_after"]["n"] == 20  # no fewer say anything
    assert "the standard error is 2.4 times" in (out / "report.html").read_text().lower()
    saved = read_run_config(out / "config.toml")
    assert saved.eval_rows == 20
    assert finetune(saved, resume=True) == summary
    after = settings_after(saved)  # a run that goes on from this one decides anew
    assert after["eval_limit"] is None and "eval_rows" not in after
