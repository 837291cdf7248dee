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


def governor(
    monkeypatch: pytest.MonkeyPatch, cores: frozenset[int] = frozenset()
) -> tuple[SpinGovernor, Gomp]:
    monkeypatch.setattr(CoreTimes, "now", staticmethod(lambda cores: CoreTimes(0, 0)))
    library = Gomp()
    return SpinGovernor(library, 3, cores), library  # type: ignore[arg-type]


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


def allowed() -> list[frozenset[int]]:
    """The cores that each thread of this process may run on."""
    return [
        frozenset(os.sched_getaffinity(int(task.name)))
        for task in Path("/proc/self/task").iterdir()
    ]


def after(times: CoreTimes, *seconds: float) -> CoreTimes:
    """A second of two cores later: how long the process ran and waited, and how long the cores worked."""
    more = [round(SECOND_NS * s) for s in (*seconds, 2.0)]
    return CoreTimes(*(a + b for a, b in zip(times, more, strict=True)))


# Of a second of two cores: how long this process ran and waited for a core, and how long the cores worked in all. Then
# whether it spins less and keeps to half of the cores.
LOOKS = [
    ("alone", 2.0, 0.0, 2.0, False, False),
    ("beside two programs, first", 1.3, 0.7, 2.0, True, False),
    ("beside them, spinning less", 0.7, 0.6, 2.0, True, True),
    ("on a core that nobody else uses", 1.0, 0.5, 2.0, True, True),
    ("they have hardly anything to do", 1.0, 0.5, 1.4, True, False),
    ("back on both cores, alone", 2.0, 0.0, 2.0, False, False),
    ("beside two that leave much", 1.4, 0.3, 2.0, True, False),
    ("as before", 1.4, 0.3, 2.0, True, False),
    ("alone again", 2.0, 0.0, 2.0, False, False),
    ("beside four programs, at once", 0.9, 1.1, 2.0, True, True),
    ("alone, and on half of the cores", 1.0, 0.9, 1.0, True, False),
    ("they wait for this one, it does not", 0.9, 0.05, 2.0, True, False),
]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="cores are kept to under Linux")
def test_a_run_keeps_to_half_of_the_cores_while_others_use_half(monkeypatch):
    cores = frozenset(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core")
    decides, _ = governor(monkeypatch, cores)
    times = CoreTimes(0, 0, 0, 0)
    try:
        for what, *seconds, spins_less, leaves_cores in LOOKS:
            times = after(times, *seconds)
            decides.look(times)
            assert (decides.spins_less, decides.leaves_cores) == (spins_less, leaves_cores), what
            expected = (len(cores) + 1) // 2 if leaves_cores else len(cores)
            assert {len(of_thread) for of_thread in allowed()} == {expected}, what
        decides.look(after(times, 1.0, 1.0, 2.0))
        assert decides.leaves_cores
    finally:
        decides.rest()
    assert set(allowed()) == {cores}


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="cores are kept to under Linux")
def test_a_thread_that_somebody_moved_stays_and_products_have_the_same_bits():
    import torch

    cores = frozenset(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core")
    moved, end = frozenset([min(cores)]), threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    os.sched_setaffinity(other.native_id, moved)
    a, b = torch.randn(300, 700), torch.randn(700, 500)
    before = a @ b
    half = busy_cores.HalfOfCores(cores)
    try:
        assert os.sched_getaffinity(other.native_id) == moved
        assert len(os.sched_getaffinity(0)) == (len(cores) + 1) // 2
        assert torch.equal(a @ b, before)
    finally:
        half.leave()
        kept = os.sched_getaffinity(other.native_id)
        end.set()
        other.join()
    assert os.sched_getaffinity(0) == cores
    # With two cores nobody can tell it from a thread of the half that was drawn.
    assert kept == moved or len(cores) == 2


def test_cores_work_while_this_process_does():
    cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    if not cores or not Path("/proc/stat").exists():
        pytest.skip("the system does not say how long cores have worked")
    before = CoreTimes.now(cores)
    sum(range(10**7))
    after = CoreTimes.now(cores)
    assert after.worked_ns > before.worked_ns and after.passed_ns > before.passed_ns
    assert 0 <= after.others_since(before)
    assert after._replace(ran_ns=0).others_since(before) == 0  # threads have ended


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
    ran, waited, *_ = CoreTimes.now()
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
