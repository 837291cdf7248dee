"""Memory that runs short in mid-run: the micro-batch shrinks, or the run stops and goes on to the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import numpy as np
import pytest

from edgezo.errors import BudgetExceeded, EdgezoError
from edgezo.machine import process_memory
from edgezo.machine.hardware import machine
from edgezo.machine.limits import GUARD_MARGIN_BYTES
from edgezo.plan.calibration import UNSEEN_BYTES
from edgezo.plan.plan import PlanDoesNotFit
from edgezo.plan.request import from_toml, make_config
from edgezo.run import session, short_memory, start
from edgezo.run.journal import open_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.metrics_log import MetricsLog
from edgezo.run.progress import Silent
from edgezo.run.session import Opened, Planned, open_request, settle, settle_again, split_less
from edgezo.run.train import finetune

STEPS, SHORT_AT = 8, 3  # the step, counted from 0, in whose second micro-batch memory is short
LONGEST_FIRST, A_STEP = (
    2,
    2,
)  # readings of the guard: before the loop, and a step of two micro-batches


class Killed(BaseException):
    """Stands for kill -9: nothing that is not on disk survives it, and nothing is saved for it."""


class Shortage(Silent):
    """Another allocation eats the room: what the guard reads, and the notes of the run.

    After ``after`` readings the margin is being eaten; once the heap was trimmed, there is room for
    ``examples`` at once.
    """

    def __init__(self, examples: float, after: int) -> None:
        self.examples, self.after = examples, after
        self.readings = 0
        self.trimmed = False
        self.notes: list[str] = []
        self.kill_after: int | None = None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def opening(self, opening: Any) -> None:
        self._plan = opening.plan

    def step(self, step: int, **more: Any) -> None:
        if step == self.kill_after:
            raise Killed

    def rss(self) -> int:
        self.readings += 1
        if self.readings <= self.after:
            return 10**9
        full = self._plan.max_mem_bytes - GUARD_MARGIN_BYTES
        forward = self._plan.phase_bytes("forward") - self._plan.phase_bytes("always")
        short_bytes = int(forward * self.examples / self._plan.micro_batch) + 1
        return full - short_bytes if self.trimmed else full + 1

    def trim(self) -> bool:
        self.trimmed = self.readings > self.after
        return self.trimmed


@pytest.fixture
def short(monkeypatch, enough):  # which keeps the real guard before this replaces it
    """``short(examples)`` -> the progress object of a run in which memory gets short."""

    def begin(examples: float, after: int = LONGEST_FIRST + SHORT_AT * A_STEP + 1) -> Shortage:
        found, real = Shortage(examples, after), process_memory.Guard
        monkeypatch.setattr(
            short_memory, "Guard", lambda cap, margin, **_: real(cap, margin, found.rss)
        )
        monkeypatch.setattr(process_memory, "malloc_trim", found.trim)
        return found

    yield begin


@pytest.fixture
def enough(monkeypatch):
    """Call it to have the real guard back: a resume in a process with more memory."""
    real_guard, real_trim = process_memory.Guard, process_memory.malloc_trim

    def again() -> None:
        monkeypatch.setattr(short_memory, "Guard", real_guard)
        monkeypatch.setattr(process_memory, "malloc_trim", real_trim)

    return again


def request(bench, out: Path, **changes: Any):
    fixed = {"steps": STEPS, "snapshot_every": 100, "train": "lowrank+head"}
    return make_config(bench.settings(out=str(out), **{**fixed, **changes}))


def records(run: Path) -> list[StepRecord]:
    with open_journal(run / "journal.bin", resume=False) as journal:
        return list(journal.records())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def micro_batch_of(run: Path) -> int | None:
    return from_toml((run / "config.toml").read_text()).micro_batch


# --- it shrinks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["lowrank+head", "full"])  # full names the rows of the embedding
@pytest.mark.parametrize(("examples", "left"), [(2.5, 2), (2, 2), (1.5, 1), (1, 1)])
def test_a_step_without_room_is_made_again_with_a_smaller_micro_batch(
    train, examples, left, bench, edgezo_json, short, tmp_path
):
    whole = finetune(request(bench, tmp_path / "whole", train=train))
    progress = short(examples)
    run = tmp_path / "run"
    summary = finetune(request(bench, run, train=train), progress=progress)
    assert (summary["steps"], summary["micro_batch"], whole["micro_batch"]) == (STEPS, left, 3)
    assert micro_batch_of(run) == left
    notes = [note for note in progress.notes if "micro-batch" in note]
    assert len(notes) == 1 and f"3 -> {left} after step {SHORT_AT}" in notes[0]
    changes = [line for line in lines(run) if "micro_batch" in line]
    assert len(changes[0].pop("crc")) == 8
    assert changes == [{"step": SHORT_AT, "micro_batch": left}]
    steps = [line["step"] for line in lines(run) if "loss" in line and "eval" not in line]
    assert steps == list(range(1, STEPS + 1))
    found, other = records(run), records(tmp_path / "whole")
    for own, same in zip(found[: SHORT_AT + 1], other, strict=False):
        tolerance = 0 if own.step < SHORT_AT else 1e-5
        np.testing.assert_allclose(own.losses, same.losses, rtol=tolerance)
        assert len(own.touched) == len(same.touched) == (4 if train == "full" else 0)
        assert all(map(np.array_equal, own.touched, same.touched))
    code, replayed = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]


def test_a_run_whose_longest_micro_batch_has_no_room_begins_with_a_smaller_one(
    bench, short, tmp_path
):
    progress = short(1.2, after=0)
    summary = finetune(request(bench, tmp_path / "run"), progress=progress)
    assert (summary["steps"], summary["micro_batch"]) == (STEPS, 1)
    assert any("3 -> 1 after step 0" in note for note in progress.notes)
    assert micro_batch_of(tmp_path / "run") == 1


def test_memory_that_gets_shorter_shrinks_it_again(bench, short, tmp_path):
    progress = short(2)
    run = tmp_path / "run"

    def shorter(step: int, **more: Any) -> None:
        if step == 6:
            progress.examples, progress.trimmed = 1, False

    progress.step = shorter  # type: ignore[method-assign]
    summary = finetune(request(bench, run), progress=progress)
    assert summary["micro_batch"] == 1
    changes = [(line["step"], line["micro_batch"]) for line in lines(run) if "micro_batch" in line]
    assert changes == [(3, 2), (6, 1)]


# --- it grows, once ---------------------------------------------------------------------------------

BASE_BYTES = 400_000_000


def split_plan(bench, out: Path) -> Planned:
    """A request that is one byte short of running its group at once, and its plan."""
    whole = open_request(request(bench, out, batch_size=128, micro_batch=128))
    cap_bytes = settle(whole, machine(), BASE_BYTES).plan.needed_bytes - 1
    changes = {"batch_size": 128, "micro_batch": None, "max_mem_bytes": cap_bytes}
    return settle(open_request(request(bench, out, **changes)), machine(), BASE_BYTES)


def test_a_plan_is_corrected_by_what_the_longest_batch_took(bench, tmp_path):
    planned = split_plan(bench, tmp_path / "run")
    assert planned.plan.micro_batch < 128
    as_planned = planned.plan.phase_bytes("forward")
    assert split_less(planned, machine(), BASE_BYTES, as_planned) is None
    assert split_less(planned, machine(), BASE_BYTES, as_planned + 10**7) is None
    # Later steps take more than the first forward did.
    assert split_less(planned, machine(), BASE_BYTES, as_planned - UNSEEN_BYTES) is None
    less = split_less(planned, machine(), BASE_BYTES, as_planned - UNSEEN_BYTES - 10**7)
    assert less is not None and less.plan.micro_batch == 128 == less.cfg.micro_batch
    assert less.plan.needed_bytes <= less.plan.max_mem_bytes == planned.plan.max_mem_bytes
    items = {item.name: item.bytes for item in less.plan.items}
    assert items["correction"] == -(10**7)


def test_a_corrected_plan_is_the_runs(bench, edgezo_json, monkeypatch, tmp_path):
    def correct(planned: Planned, host: Any, base_bytes: int, peak_bytes: int) -> Planned:
        cfg, plan = replace(planned.cfg, micro_batch=4), replace(planned.plan, micro_batch=4)
        return replace(planned, cfg=cfg, plan=plan)

    monkeypatch.setattr(short_memory, "split_less", correct)
    pinned = finetune(request(bench, tmp_path / "pinned", micro_batch=2))
    assert pinned["micro_batch"] == 2  # what is asked for is not corrected

    def planned_in_twos(opened: Opened, *rest: Any) -> Planned:
        plan = replace(settle(opened, *rest).plan, micro_batch=2)
        return Planned(opened, plan.settle(opened.cfg), plan)

    monkeypatch.setattr(start, "settle", planned_in_twos)
    progress, run = Notes(), tmp_path / "run"
    summary = finetune(request(bench, run, micro_batch=None), progress=progress)
    assert summary["micro_batch"] == 4 == micro_batch_of(run)
    assert json.loads((run / "plan.json").read_text())["micro_batch"] == 4
    assert [note for note in progress.notes if "2 -> 4 after step 0" in note]
    for own, same in zip(records(run), records(tmp_path / "pinned"), strict=True):
        np.testing.assert_allclose(own.losses, same.losses, rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    code, replayed = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- it shrinks, and is killed ---------------------------------------------------------------------


@pytest.fixture
def shrunk(bench, short, tmp_path) -> dict[str, Any]:
    """The summary of a run that shrinks and that nothing interrupts."""
    return finetune(request(bench, tmp_path / "shrunk"), progress=short(1))


def resumed(edgezo_json, run: Path, *more: object) -> dict[str, Any]:
    code, summary = edgezo_json("finetune", "--resume", "--out", run, *more)
    assert code == 0, summary
    return summary


@pytest.fixture
def cut(bench, short, enough, tmp_path) -> Path:
    """A run that was killed some steps after it shrank, and enough memory again."""
    run = tmp_path / "run"
    progress = short(1)
    progress.kill_after = SHORT_AT + 3
    with pytest.raises(Killed):
        finetune(request(bench, run), progress=progress)
    enough()
    return run


def test_a_run_killed_after_it_shrank_ends_with_the_bits_of_the_one_that_was_not(
    edgezo_json, shrunk, cut, tmp_path
):
    summary = resumed(edgezo_json, cut)
    assert summary["trained_sha256"] == shrunk["trained_sha256"]
    assert summary["micro_batch"] == 1
    assert (cut / "journal.bin").read_bytes() == (tmp_path / "shrunk/journal.bin").read_bytes()


def test_a_resume_from_python_that_names_no_micro_batch_takes_the_run_s(bench, shrunk, cut):
    summary = finetune(request(bench, cut, micro_batch=None), resume=True)
    assert summary["trained_sha256"] == shrunk["trained_sha256"]


def test_a_run_killed_before_its_new_micro_batch_is_written_goes_on_with_the_old_one(
    bench, edgezo_json, short, enough, monkeypatch, tmp_path
):
    whole = finetune(request(bench, tmp_path / "whole"))
    run = tmp_path / "run"
    progress = short(1)
    write = short_memory.atomic_write

    def killed(path: Path, data: bytes) -> None:
        if path.name == "config.toml" and progress.trimmed:
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(short_memory, "atomic_write", killed)
        with pytest.raises(Killed):
            finetune(request(bench, run), progress=progress)
    enough()
    summary = resumed(edgezo_json, run)
    assert summary["micro_batch"] == 3
    assert summary["trained_sha256"] == whole["trained_sha256"]


def test_a_run_killed_right_after_that_goes_on_with_the_new_one(
    bench, edgezo_json, short, enough, shrunk, monkeypatch, tmp_path
):
    run = tmp_path / "run"
    write = MetricsLog.write

    def killed(log: MetricsLog, record: dict[str, Any]) -> None:
        if "micro_batch" in record:
            raise Killed
        write(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", killed)
        with pytest.raises(Killed):
            finetune(request(bench, run), progress=short(1))
    enough()
    assert resumed(edgezo_json, run)["trained_sha256"] == shrunk["trained_sha256"]


# --- it stops --------------------------------------------------------------------------------------


def test_where_no_example_has_room_the_run_stops_saved_and_more_memory_goes_on_to_the_same_bits(
    bench, edgezo_json, short, enough, tmp_path
):
    run = tmp_path / "run"
    whole = finetune(request(bench, tmp_path / "whole", eval_every=2))
    progress = short(0.5)
    with pytest.raises(BudgetExceeded, match="is saved") as caught:
        finetune(request(bench, run, eval_every=2), progress=progress)
    assert caught.value.exit_code == 4 and "--resume and --max-mem" in str(caught.value)
    assert micro_batch_of(run) == 3 and not any("micro_batch" in line for line in lines(run))
    assert any(note.startswith("peak memory: planned") for note in progress.notes)
    assert lines(run)[-1]["step"] == SHORT_AT
    enough()
    summary = resumed(edgezo_json, run, "--max-mem", "9GB")
    assert summary["max_mem_bytes"] == 9 * 10**9
    assert summary["trained_sha256"] == whole["trained_sha256"]
    assert summary["eval_before"] == whole["eval_before"]
    assert (run / "journal.bin").read_bytes() == (tmp_path / "whole/journal.bin").read_bytes()


@pytest.mark.mem
def test_ballast_in_the_process_stops_the_run_below_its_cap_and_a_larger_cap_goes_on(
    bench, edgezo_json, tmp_path
):
    "Real memory: a block is allocated in mid-run that leaves half of the margin."
    code = """
import json, sys
from edgezo.machine import process_memory as memory
memory.allocator_policy()
from edgezo.plan.request import make_config
from edgezo.errors import EdgezoError
from edgezo.machine.limits import (GUARD_MARGIN_BYTES)
from edgezo.run.progress import (Silent)

class Ballast(Silent):
    def opening(self, opening):
        self.cap_bytes = opening.plan.max_mem_bytes
    def step(self, step, **more):
        if step == 3:
            memory.malloc_trim()
            room_bytes = self.cap_bytes - memory.rss_bytes()
            self.held = b"x" * (room_bytes - GUARD_MARGIN_BYTES // 2)

from edgezo.run.train import finetune
try:
    found = {"summary": finetune(make_config(json.loads(sys.argv[1])), progress=Ballast())}
except EdgezoError as error:
    found = {"exit_code": error.exit_code, "error": str(error)}
print(json.dumps(found | {"peak_rss_bytes": memory.peak_rss_bytes()}))
"""
    run = tmp_path / "run"
    cap_bytes = 1100 * 10**6  # PyTorch's CUDA build alone takes 741 MB
    whole = finetune(request(bench, tmp_path / "whole"))
    asked = bench.settings(
        out=str(run), steps=STEPS, train="lowrank+head", snapshot_every=100, max_mem_bytes=cap_bytes
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exit_code"] == 4 and "The state after step 3 is saved" in found["error"]
    assert found["peak_rss_bytes"] <= cap_bytes
    summary = resumed(edgezo_json, run, "--max-mem", "8GB")
    assert summary["trained_sha256"] == whole["trained_sha256"]


# --- other figures for a resume --------------------------------------------------------------------


@pytest.fixture
def killed_run(bench, tmp_path) -> Path:
    """Six steps, the last snapshot after the fourth."""
    run = tmp_path / "run"
    args = bench.arguments(train="lowrank+head", steps=STEPS, snapshot_every=4, out=run)
    forks.start(["finetune", *args], tmp_path / "out", forks.Blow("record", 6, 1)).end()
    return run


def test_a_cap_that_is_too_small_for_a_resume_changes_nothing_and_says_what_would_do(
    bench, edgezo_json, killed_run, tmp_path
):
    whole = finetune(request(bench, tmp_path / "whole"))
    before = {file.name: file.read_bytes() for file in killed_run.iterdir()}
    code, found = edgezo_json("finetune", "--resume", "--out", killed_run, "--max-mem", "50MB")
    assert code == 3
    needed_mb = -(-found["smallest_bytes"] // 10**6)
    for part in (str(killed_run), "50MB", "Nothing in it has changed", f"--max-mem {needed_mb}MB"):
        assert part in found["error"]
    assert "--precision" not in found["error"]  # a resume keeps it
    assert {file.name: file.read_bytes() for file in killed_run.iterdir()} == before
    for cap in ("7GB", "9GB"):
        summary = resumed(edgezo_json, killed_run, "--max-mem", cap)
        assert summary["trained_sha256"] == whole["trained_sha256"]


def test_a_resume_that_does_not_fit_names_the_micro_batch_that_would(monkeypatch):
    def settle(opened: Opened, machine: object, base_bytes: int) -> Planned:
        if opened.cfg.micro_batch > 3:
            raise PlanDoesNotFit("no", 500_000_001, ())
        return Planned(opened, opened.cfg, "a plan")  # type: ignore[arg-type]

    monkeypatch.setattr(session, "settle", settle)
    said = {
        "model": "m",
        "task": "sst2",
        "batch_size": 16,
        "max_mem_bytes": 400 * 10**6,
        "out": "r",
    }
    opened = Opened(make_config({**said, "micro_batch": 9}), None, None, None)  # type: ignore[arg-type]
    with pytest.raises(PlanDoesNotFit, match=r"--max-mem 501MB or more, or with --micro-batch 3 "):
        settle_again(opened, SimpleNamespace(gpu=None), 0)  # type: ignore[arg-type]
    assert opened.cfg.micro_batch == 9
    opened = replace(opened, cfg=make_config({**said, "micro_batch": 2}))
    assert settle_again(opened, None, 0).plan == "a plan"  # type: ignore[arg-type,comparison-overlap]


def test_a_resume_may_split_the_batch_further(bench, edgezo, edgezo_json, killed_run, tmp_path):
    code, _, err = edgezo("finetune", "--resume", "--out", killed_run, "--micro-batch", "1")
    assert code == 0 and "micro-batch 3 -> 1 after step 4, as asked" in err.replace("\n", " ")
    assert micro_batch_of(killed_run) == 1
    summary = json.loads((killed_run / "summary.json").read_text())
    assert (summary["steps"], summary["micro_batch"]) == (STEPS, 1)
    whole = finetune(request(bench, tmp_path / "whole"))
    assert summary["loss_last"] == pytest.approx(whole["loss_last"], rel=1e-2)
    code, replayed = edgezo_json("replay", killed_run, "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]
    code, found = edgezo_json("finetune", "--resume", "--out", killed_run, "--micro-batch", "9")
    assert code == 2 and "--batch-size" in found["error"]


def test_the_guard_asks_for_the_whole_need_only_once_its_margin_is_eaten(monkeypatch):
    held, trims = [0], []
    monkeypatch.setattr(process_memory, "malloc_trim", lambda: trims.append(held[0]))
    guard = process_memory.Guard(100, 10, rss=lambda: held[0])
    held[0] = 90
    guard.check_again(50, "a micro-batch")
    assert trims == []
    held[0] = 91
    with pytest.raises(EdgezoError, match="a micro-batch needs 50 B"):
        guard.check_again(50, "a micro-batch")
    assert trims
    monkeypatch.setattr(process_memory, "malloc_trim", lambda: held.__setitem__(0, 40))
    guard.check_again(50, "a micro-batch")
