"""Pauses between steps: when there is one, that it changes no bit, and what of --for is left after it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import psutil
import pytest
from conftest import Bench

from edgezo.errors import Interrupted, UsageError
from edgezo.machine import surroundings
from edgezo.machine.surroundings import Surroundings
from edgezo.plan.request import make_config
from edgezo.run import clock, manners, train
from edgezo.run.manners import COOLER_C, QUIET_LOOKS, Manners
from edgezo.run.states_cache import states_folder
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
FREE = Surroundings(on_battery=False, celsius=50.0, others=0.0)
BUSY, HOT = FREE._replace(others=0.6), FREE._replace(celsius=91.0)
ON_BATTERY = FREE._replace(on_battery=True)


class FakeMachine:
    """A machine that shows ``looks`` one after the other, then the last one; its clock goes while a run sleeps."""

    cores = 2

    def __init__(self, patch: pytest.MonkeyPatch, *looks: Surroundings):
        self.looks, self.now_s, self.computed, self.slept = list(looks), 1000.0, 0.0, []
        self.at_sleep: Callable[[], object] = lambda: None
        patch.setattr(manners, "Watch", lambda: self)
        patch.setattr(manners, "now_s", lambda: self.now_s)
        patch.setattr(manners, "sleep", self.sleep)

    def look(self) -> Surroundings:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def computed_s(self) -> float:
        return self.computed

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        self.at_sleep()


def asked(
    notes: list[str] | None = None, check: Any = lambda step: None, **options: Any
) -> Manners:
    cfg = make_config({"model": "m", "task": "example", **options})
    return Manners(cfg, (notes if notes is not None else []).append, check)


# (options, what the machine shows at each look, seconds of the pause, what is said of it)
PAUSES = {
    "nothing is asked": ({}, [HOT, BUSY, ON_BATTERY], 0, ""),
    "on mains": ({"when": "plugged-in"}, [FREE, BUSY, HOT], 0, ""),
    "on battery": ({"when": "plugged-in"}, [ON_BATTERY] * 4 + [FREE], 4, "--when plugged-in asks: the machine runs on"),
    "no battery": ({"when": "plugged-in"}, [FREE._replace(on_battery=None)], 0, ""),
    "nobody else": ({"when": "idle"}, [FREE, ON_BATTERY, HOT], 0, ""),
    "others compute": ({"when": "idle"}, [BUSY] * 3 + [FREE], 2 + QUIET_LOOKS, "--when idle asks: other programs take"),
    "warm": ({"max_temp": 95}, [HOT], 0, ""),
    "hot": ({"max_temp": 80}, [HOT] * 3 + [FREE._replace(celsius=80.1 - COOLER_C), FREE], 4, "the processor has 91 C"),
    "no sensor any more": ({"max_temp": 80}, [FREE._replace(celsius=None)], 0, ""),
    "all cores taken": ({"max_cpu": 50}, [BUSY] * 5 + [FREE], 5, "--max-cpu 50 asks: other programs take 60%"),
}  # fmt: skip


@pytest.mark.parametrize("case", PAUSES)
def test_a_run_pauses_while_what_it_asks_for_is_not_so(case, monkeypatch):
    options, looks, seconds, said = PAUSES[case]
    # The first look is that of the beginning, and the next one a second later.
    machine, notes = FakeMachine(monkeypatch, FREE, *looks), []
    polite = asked(notes, **options)
    machine.now_s += 1
    assert polite.wait(7) == pytest.approx(seconds)
    assert sum(machine.slept) == pytest.approx(seconds)
    assert ("paused after step 7" in " ".join(notes)) is bool(seconds) and said in " ".join(notes)
    assert len(notes) == 2 * bool(seconds)


def test_a_run_rests_for_what_it_has_computed_and_takes_no_more_than_its_share(monkeypatch):
    machine, notes = FakeMachine(monkeypatch, FREE), []
    polite = asked(notes, max_cpu=25)
    for _ in range(5):  # steps of half a second on both cores
        machine.now_s, machine.computed = machine.now_s + 0.5, machine.computed + 1.0
        polite.wait(1)
    assert machine.computed / (2 * (machine.now_s - 1000)) == pytest.approx(0.25, rel=0.02)
    machine.looks[0] = FREE._replace(others=0.125)  # others take half of that share
    for _ in range(9):
        before_s = machine.now_s
        machine.now_s, machine.computed = machine.now_s + 0.5, machine.computed + 1.0
        polite.wait(1)
    assert 0.5 / (machine.now_s - before_s) == pytest.approx(0.125, rel=0.02)
    assert len(notes) == 1 and "--max-cpu 25" in notes[0]


def test_what_psutil_reports_is_read_and_absent_sensors_are_absent(monkeypatch):
    def reading(value: float) -> SimpleNamespace:
        return SimpleNamespace(current=value)

    sensors = {"nvme": [reading(88.0)], "k10temp": [reading(61.0), reading(64.0)]}
    power = SimpleNamespace(power_plugged=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: power, raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 40.0)
    watch = surroundings.Watch()
    monkeypatch.setattr(watch, "computed_s", lambda: watch._computed_s)
    assert watch.look() == Surroundings(True, 64.0, 0.4)
    del sensors["k10temp"]
    assert surroundings.celsius() == 88.0
    monkeypatch.delattr(psutil, "sensors_temperatures")
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None)
    assert surroundings.celsius() is None and surroundings.on_battery() is None


def test_what_a_machine_cannot_tell_is_refused_or_said(monkeypatch, bench, edgezo, tmp_path):
    FakeMachine(monkeypatch, Surroundings(None, None, 0.0))
    args = ["finetune", *bench.arguments(out=tmp_path / "run", train="scales")]
    code, out, err = edgezo(*args, "--max-temp", 80)
    assert code == 2 and out == "" and "no temperature" in err and "--max-cpu 50" in err
    assert not (tmp_path / "run").exists()
    code, _, err = edgezo(*args, "--when", "plugged-in")
    assert code == 0 and "no battery" in err
    notes: list[str] = []
    asked(notes, max_temp=80).check_machine(resume=True)
    assert "--max-temp has no effect" in notes[0]
    with pytest.raises(UsageError, match="Leave the option out"):
        asked(max_temp=80).check_machine(resume=False)


# ------------------------------------------------------------------------------- the same bits

STEPS = 20
POLITE = {"when": "plugged-in", "max_temp": 80, "max_cpu": 90}


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run that does not pause."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return finetune(make_config(request_of(bench, out)))


def request_of(bench: Bench, out: Path, **more: Any) -> dict[str, Any]:
    return bench.settings(out=str(out), steps=STEPS, eval_limit=300, train="lowrank+probe", **more)


def changing() -> Iterator[Surroundings]:
    while True:
        yield from (FREE, HOT, ON_BATTERY, BUSY)


def test_pauses_and_resumes_between_any_two_steps_change_no_bit(
    bench, whole, monkeypatch, tmp_path
):
    machine = FakeMachine(monkeypatch, FREE)
    states = changing()
    monkeypatch.setattr(machine, "look", lambda: next(states))
    monkeypatch.setattr(manners, "NEXT_LOOK_S", 0.0)
    cfg = make_config(request_of(bench, tmp_path / "run", **POLITE))
    pauses, stops = 0, 0

    def stop_at_times() -> None:
        nonlocal pauses, stops
        pauses += 1
        if pauses % 10 == 0:
            stops += 1
            signal.raise_signal(signal.SIGINT)

    machine.at_sleep = stop_at_times
    summary, resume = None, False
    while summary is None:
        try:
            summary = finetune(cfg, resume=resume)
        except Interrupted as stopped:  # Ctrl-C in a pause
            assert "--resume" in str(stopped)
        resume = True
    assert pauses >= 20 and stops >= 2
    same_run(Path(summary["run"]), summary, whole)


def test_the_passes_before_the_first_step_pause_between_their_batches(
    deep_bench, monkeypatch, tmp_path
):
    settings = {"train": "lowrank", "blocks": "2", "precision": "fp32"}
    plain = finetune(make_config(deep_bench.settings(out=str(tmp_path / "plain"), **settings)))
    for file in states_folder().glob("*.states"):
        file.unlink()  # so that the rows pass again
    machine = FakeMachine(monkeypatch, FREE, ON_BATTERY, ON_BATTERY, FREE)
    machine.now_s += 10
    settings |= {"when": "plugged-in", "out": str(tmp_path / "run")}
    at_sleep: list[bool] = []
    machine.at_sleep = lambda: at_sleep.append((tmp_path / "run" / "metrics.jsonl").exists())
    monkeypatch.setattr(manners, "NEXT_LOOK_S", 0.0)
    same_run(tmp_path / "run", finetune(make_config(deep_bench.settings(**settings))), plain)
    assert at_sleep and not any(at_sleep)


def same_run(run: Path, summary: dict[str, Any], whole: dict[str, Any]) -> None:
    for name in ("trained_sha256", "eval_before", "eval_after", "loss_first", "loss_last", "steps"):
        assert summary[name] == whole[name], name
    assert (run / "journal.bin").read_bytes() == Path(whole["run"], "journal.bin").read_bytes()


def test_a_process_that_is_stopped_and_continued_changes_no_bit(
    bench, whole, edgezo_json, tmp_path
):
    run = tmp_path / "run"
    settings = request_of(bench, run)
    args = [part for name, value in settings.items() for part in option(name, value)]
    running = forks.start(["finetune", *args], tmp_path / "printed")
    forks.watch(running, run / "journal.bin", 1)
    process = psutil.Process(running.process.pid)
    running.signal(signal.SIGSTOP)
    while process.status() != psutil.STATUS_STOPPED:
        assert process.is_running()
    size = (run / "journal.bin").stat().st_size
    running.signal(signal.SIGCONT)
    assert running.end()[0] == 0 and size < (run / "journal.bin").stat().st_size
    _, summary = edgezo_json("finetune", "--resume", "--out", run)
    same_run(run, summary, whole)


def option(name: str, value: object) -> tuple[str, str]:
    from edgezo.plan.fields import flag

    return flag(name), str(value)


# ------------------------------------------------------------------------------------ --for


@pytest.mark.parametrize("whole_command", [True, False])
def test_a_pause_is_inside_the_time_of_the_command_but_no_training(
    whole_command, bench, monkeypatch, tmp_path
):
    """On battery for 45 s before the third step, in a box of 60 s."""
    machine = FakeMachine(monkeypatch, *[FREE] * 4, *[ON_BATTERY] * 45, FREE)

    def tick() -> float:
        machine.now_s += 0.25
        return machine.now_s

    for module in (clock, train):
        monkeypatch.setattr(module, "now_s", tick)
    request = {"train": "lowrank", "when": "plugged-in", "steps": None, "for_s": 60.0}
    cfg = make_config(bench.settings(out=str(tmp_path / "run"), **request))
    summary = finetune(cfg, began_s=1000.0 if whole_command else None)
    assert sum(machine.slept) == 45 and summary["steps"] > 3
    if whole_command:
        assert machine.now_s < 1062 and summary["train_s"] < 20
    else:
        assert machine.now_s > 1105 and 60 <= summary["train_s"] < 65
