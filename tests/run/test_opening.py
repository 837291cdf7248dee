"""The five lines that a run says before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Bench

from edgezo.cli.terminal import TerminalProgress, stderr
from edgezo.machine.clock import duration, seconds
from edgezo.plan.request import make_config
from edgezo.run.opening import LONG_S, Opening
from edgezo.run.progress import RunProgress, Silent
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        *[(0.2, "1 s"), (40, "40 s"), (99.4, "99 s"), (99.6, "2 min"), (5930, "99 min")],
        *[(5990, "1 h 40 min"), (7200, "2 h"), (86399, "1.0 days"), (380160, "4.4 days")],
    ],
)
def test_a_duration_is_said_as_people_count(value_s: float, text: str) -> None:
    assert duration(value_s) == text


@pytest.mark.parametrize(("value_s", "text"), [(0.254, "0.25 s"), (7.06, "7.1 s"), (90.4, "90 s")])
def test_a_step_is_said_with_two_digits(value_s: float, text: str) -> None:
    assert seconds(value_s) == text


class Kept(Silent):
    """Keeps what a run says before it starts, and how far each evaluation was."""

    def __init__(self) -> None:
        self.openings: list[Opening] = []
        self.rows: list[tuple[int, int]] = []

    def opening(self, opening: Opening) -> None:
        self.openings.append(opening)

    def evaluated(self, rows: int, total: int) -> None:
        self.rows.append((rows, total))


def run_with(
    bench: Bench, out: Path, progress: RunProgress, kind: str = "label", **changes: Any
) -> None:
    finetune(make_config(bench.settings(kind, out=str(out), **changes)), progress=progress)


REQUESTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "default": (
        {"steps": 3},
        [
            "default: a linear probe in closed form (or the head",
            "then grzo on low-rank factors",
            "Why: of all methods a linear probe does best in few steps",
            "3 steps of",
        ],
    ),
    "estimator": (
        {"estimator": "mezo", "steps": 2},
        ["mezo on low-rank factors by forward passes alone", "Why: as --estimator mezo asks"],
    ),
    "lora": ({"estimator": "lora", "steps": 2}, ["LoRA adapters by their gradient"]),
    "completion": (
        {"kind": "completion", "train": "lowrank", "steps": 2},
        ["learns the completion of each prompt"],
    ),
    "upper blocks": (
        {"train": "lowrank", "blocks": "2", "steps": 2},
        ["of the last 2 blocks", "rows through the frozen blocks"],
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_run_says_what_it_is_about_to_do(deep_bench: Bench, name: str, tmp_path: Path) -> None:
    request, wanted = REQUESTS[name]
    kept = Kept()
    run_with(deep_bench, tmp_path / "run", kept, **request)
    (opening,) = kept.openings
    lines = dict(opening.lines())
    assert list(lines) == ["model", "data", "method", "memory", "time"]
    text = "\n".join(lines.values())
    for part in wanted:
        assert part in text
    assert lines["method"].startswith("default: ") == (name == "default")
    assert f"{opening.trained:,} rows to train on, {opening.evaluated:,}" in lines["data"]
    assert kept.rows[-1] == (opening.evaluated, opening.evaluated)
    total_s = sum(opening.seconds().values())
    assert f"about {duration(total_s)}" in lines["time"]


def test_a_long_run_is_told_how_to_be_shorter(bench: Bench, tmp_path: Path) -> None:
    kept = Kept()
    run_with(bench, tmp_path / "run", kept, steps=2)
    (opening,) = kept.openings
    assert "That is long" not in dict(opening.lines())["time"]
    slow = opening._replace(plan=type(opening.plan)(**{**vars(opening.plan), "step_s": LONG_S}))
    assert "--for 1h ends it sooner" in dict(slow.lines())["time"]


def test_the_table_is_shown_when_it_is_asked_for(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, shows in enumerate((False, True)):
        progress = TerminalProgress(stderr(), shows_plan=shows)
        run_with(bench, tmp_path / f"run{number}", progress, steps=2)
        shown = capsys.readouterr().err
        assert ("linear weights" in shown) is shows
        assert "rows to train on" in shown
