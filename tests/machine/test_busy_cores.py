"""How OpenMP's threads wait beside other programs. What it gains is measured by benchmarks/busy.py."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

from edgezo.machine import busy_cores
from edgezo.machine.busy_cores import CoreTimes, SpinGovernor, beside_others

SECOND_NS = 1_000_000_000


class Gomp:
    """A library that only counts."""

    def __init__(self) -> None:
        self.teams: list[tuple[str, int]] = []

    def omp_get_thread_num(self) -> int:
        raise AssertionError("the team calls it, not Python")

    def GOMP_parallel(self, function: object, argument: object, threads: int, flags: int) -> None:
        self.teams.append((threading.current_thread().name, threads))


def governor(monkeypatch: pytest.MonkeyPatch) -> tuple[SpinGovernor, Gomp]:
    monkeypatch.setattr(CoreTimes, "now", staticmethod(lambda: CoreTimes(0, 0)))
    library = Gomp()
    return SpinGovernor(library, 3), library  # type: ignore[arg-type]


def test_threads_spin_less_from_when_they_wait_for_a_core_until_they_do_not(monkeypatch):
    decides, library = governor(monkeypatch)
    ran = waited = 0
    for share, spins_less in (
        *((0.0, False), (0.1, False), (0.2, True), (0.08, True), (0.5, True), (0.01, False)),
        *((0.11, False), (0.9, True)),
    ):
        ran, waited = ran + round(SECOND_NS * (1 - share)), waited + round(SECOND_NS * share)
        decides.look(CoreTimes(ran, waited))
        assert decides.spins_less == spins_less, share
    assert library.teams == [("sleeping team", 3)] * 2
    decides.rest()
    assert not decides.spins_less
    assert "sleeping team" not in {thread.name for thread in threading.enumerate()}


def test_threads_that_hardly_ran_or_have_ended_tell_nothing(monkeypatch):
    decides, library = governor(monkeypatch)
    for times in ((1000, 9000), (0, 0), (SECOND_NS, 0), (SECOND_NS // 2, 5), (SECOND_NS, 0)):
        decides.look(CoreTimes(*times))
    assert library.teams == []


def test_times_of_this_process_only_grow():
    before = CoreTimes.now()
    assert before.ran_ns > 0
    sum(range(10**6))
    after = CoreTimes.now()
    assert after.ran_ns > before.ran_ns and after.waited_ns >= before.waited_ns


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_who_has_chosen_how_threads_wait_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "PASSIVE" if "POLICY" in name else "10")
    with beside_others():
        assert "busy cores" not in {thread.name for thread in threading.enumerate()}


def test_the_real_library_makes_a_team_and_its_threads_end():
    import torch  # noqa: F401  (it loads libgomp)

    path = busy_cores._libgomp()
    if path is None:
        pytest.skip("this PyTorch computes without libgomp")
    tasks = Path("/proc/self/task")
    before = {task.name for task in tasks.iterdir()}
    decides = SpinGovernor(ctypes.CDLL(path), 3)
    ran, waited = CoreTimes.now()
    decides.look(CoreTimes(ran + SECOND_NS, waited + SECOND_NS))
    more = {task.name for task in tasks.iterdir()} - before
    assert decides.spins_less
    assert len(more) == 3  # the thread that holds the team, and two of libgomp's
    decides.rest()
    for _ in range(1_000_000):  # libgomp's end by themselves, soon
        if not any((tasks / name).exists() for name in more):
            break
        os.sched_yield()
    assert not any((tasks / name).exists() for name in more)


def test_without_a_report_of_the_system_nothing_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(busy_cores, "THREADS", tmp_path / "absent")
    with beside_others():
        assert "busy cores" not in {thread.name for thread in threading.enumerate()}
