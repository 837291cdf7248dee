"""OpenMP's threads wait by spinning, which is fastest on a quiet machine and worst on a busy one. Here it is adapted.

Between two products a thread of libgomp spins for up to 10 ms before it sleeps. Beside other programs it spins through
the time that the thread it waits for needs: a step beside two busy programs on two cores took 4.5 times as long
(benchmarks/busy.py). A process that never spins loses a third where nothing else runs. libgomp itself spins a
three-hundredth as long while its teams have more threads than there are cores. So where threads of this process are
found to wait for a core, one more team is kept, of threads that sleep; where they no longer wait, it is dissolved.

The threads of a step also wait for each other. Where each of two shares its core with another program, one of them is
off its core most of the time: a step took 3 times as long. Two threads that share one core take turns there, and the
system moves the other programs to the other core: 1.6 times as long. So where other programs keep half of the cores
busy, this process keeps to the other half. (Measured on two cores.)

As many threads compute as before, so the bits of a run are the same.

Only with libgomp (PyTorch's for Linux), and where Linux says how long threads have waited; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

LOOK_S = 0.5
LEAST_RAN_NS = 50_000_000  # threads that ran for less tell nothing
# Shares of the time of this process's threads that they wait for a core. Between the two nothing is changed.
BUSY, QUIET = 0.12, 0.04
# Shares of all cores that other programs use: from one on this process keeps to half of the cores, until the other.
CROWDED, ALONE = 0.4, 0.25
THREADS = Path("/proc/self/task")
CORES = Path("/proc/stat")
WORKING = (0, 1, 2, 5, 6)  # of its columns: user, nice, system, irq, softirq


class CoreTimes(NamedTuple):
    """Nanoseconds. Of all threads of this process: on a core, and ready but waiting for one. Of the cores that it may
    use: how long they worked for whichever program, and how long there have been any."""

    ran_ns: int
    waited_ns: int
    worked_ns: int = 0
    passed_ns: int = 0

    @staticmethod
    def now(cores: frozenset[int] = frozenset()) -> CoreTimes:
        """Of the threads that there are. Raises OSError or ValueError where the system does not say."""
        ran = waited = 0
        for task in THREADS.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                first, second, *_ = (task / "schedstat").read_text().split()
                ran, waited = ran + int(first), waited + int(second)
        passed = len(cores) * time.monotonic_ns()
        return CoreTimes(ran, waited, _worked_ns(cores) if cores else 0, passed)

    def waiting_since(self, before: CoreTimes) -> float | None:
        """The share of the time between that was waited; None where threads have ended, or hardly ran."""
        ran, waited = self.ran_ns - before.ran_ns, self.waited_ns - before.waited_ns
        return waited / (ran + waited) if ran >= LEAST_RAN_NS and waited >= 0 else None

    def others_since(self, before: CoreTimes) -> float:
        """The share of the cores' time between that other programs used; 0 where threads have ended."""
        ran, worked = self.ran_ns - before.ran_ns, self.worked_ns - before.worked_ns
        passed = self.passed_ns - before.passed_ns
        return max(0.0, (worked - ran) / passed) if ran >= 0 and passed > 0 else 0.0


def _worked_ns(cores: frozenset[int]) -> int:
    """How long these cores have worked, from /proc/stat. Raises OSError or ValueError."""
    tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    ticks = 0
    for line in CORES.read_text(encoding="ascii").splitlines():
        name, *columns = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
            ticks += sum(int(columns[column]) for column in WORKING)
    return ticks * tick_ns


class SleepingTeam:
    """A team of OpenMP threads that do nothing. While there is one, libgomp counts more threads than cores."""

    def __init__(self, library: ctypes.CDLL, threads: int):
        self._end = threading.Event()
        made = threading.Event()
        self._thread = threading.Thread(
            target=self._hold, args=(library, threads, made), name="sleeping team", daemon=True
        )
        self._thread.start()
        made.wait()

    def _hold(self, library: ctypes.CDLL, threads: int, made: threading.Event) -> None:
        # Any function of no argument will do that needs no Python: the team's threads have none.
        library.GOMP_parallel(library.omp_get_thread_num, None, threads, 0)
        made.set()
        self._end.wait()

    def dissolve(self) -> None:
        """End its threads. They end with the one that has made them."""
        self._end.set()
        self._thread.join()


class HalfOfCores:
    """Keeps this process's threads to half of its cores. A half drawn by chance: two such runs end on different ones,
    as both leave where they meet, and draw again. A thread that somebody else has moved stays where it was put."""

    def __init__(self, cores: frozenset[int]):
        self.all = cores
        half = random.SystemRandom().sample(sorted(cores), (len(cores) + 1) // 2)
        self._half = frozenset(half)
        _move(self.all, self._half)

    def leave(self) -> None:
        """Use all of them again."""
        _move(self._half, self.all)


def _move(here: frozenset[int], there: frozenset[int]) -> None:
    """Let those threads that may run on exactly the cores ``here`` run on those of ``there``."""
    for task in THREADS.iterdir():
        with suppress(OSError):  # it has just ended, or the system lets nobody move it
            if os.sched_getaffinity(int(task.name)) == here:
                os.sched_setaffinity(int(task.name), there)


class SpinGovernor:
    """Decides, from one look to the next, whether libgomp's threads are to spin less, and whether to leave cores to
    other programs. ``cores``: those that this process may use; fewer than two are never left."""

    def __init__(self, library: ctypes.CDLL, threads: int, cores: frozenset[int] = frozenset()):
        self._library, self._threads, self.cores = library, threads, cores
        self._team: SleepingTeam | None = None
        self._half: HalfOfCores | None = None
        self._before = CoreTimes.now(cores)

    @property
    def spins_less(self) -> bool:
        """Whether there is a sleeping team."""
        return self._team is not None

    @property
    def leaves_cores(self) -> bool:
        """Whether this process keeps to half of its cores."""
        return self._half is not None

    def look(self, now: CoreTimes) -> None:
        """Take in how long threads have waited since the last look, and what other programs used."""
        others, share = now.others_since(self._before), now.waiting_since(self._before)
        self._before = now
        if share is None:
            return
        if self._half is not None and others < ALONE:
            self._leave_half()
        elif self._half is None and others > CROWDED and share > BUSY and len(self.cores) > 1:
            # Threads that wait little, whatever others have, are on cores of their own.
            self._half = HalfOfCores(self.cores)
        if self._team is None and share > BUSY:
            self._team = SleepingTeam(self._library, self._threads)
        elif self._team is not None and share < QUIET:
            self.rest()

    def rest(self) -> None:
        """Let threads spin as libgomp has them, on all cores."""
        self._leave_half()
        if self._team is not None:
            self._team.dissolve()
            self._team = None

    def _leave_half(self) -> None:
        if self._half is not None:
            self._half.leave()
            self._half = None


@contextmanager
def beside_others() -> Iterator[None]:
    """For the length of the block, threads that compute spin little while others keep the cores busy."""
    governor = _governor()
    if governor is None:
        yield
        return
    end = threading.Event()

    def watch() -> None:
        with suppress(OSError, ValueError):
            while not end.wait(LOOK_S):
                governor.look(CoreTimes.now(governor.cores))

    watcher = threading.Thread(target=watch, name="busy cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        end.set()
        watcher.join()
        governor.rest()


def _governor() -> SpinGovernor | None:
    """None without libgomp, a second thread or waiting times, and where the user has chosen how threads wait."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    path = _libgomp()
    if chosen or path is None or os.environ.get("OMP_NUM_THREADS") == "1":
        return None
    try:
        library = ctypes.CDLL(path)
        library.GOMP_parallel.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        ]
        library.GOMP_parallel.restype = None
        cores = frozenset(os.sched_getaffinity(0))
        # With one more than there are cores it does not matter how many compute.
        return SpinGovernor(library, len(cores) + 1, cores)
    except (AttributeError, OSError, ValueError):
        return None


def _libgomp() -> str | None:
    """The libgomp that this process has loaded: the one whose threads compute."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = [line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line]
    return paths[0] if paths else None
