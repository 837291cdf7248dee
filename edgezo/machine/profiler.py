"""``--profile``: where the memory goes during a run. A thread samples it, and each phase of the run has its peaks.

Samples miss what rises and falls between two of them. The kernel's peak (``process_memory.peak_rss_bytes``) misses
nothing and stays the number that a run is judged by; the profile tells when and where. It has to be sampled because the
kernel keeps no peak of anonymous memory, of file pages or of a part of the run.

A phase is a block of code with a name: ``with phase("forward"):``, or ``@phase("forward")`` above a function. Phases
nest: time and memory belong to the innermost one, or to ``other`` outside of all. Without a profiler a phase costs
about a microsecond. Nothing here imports torch.
"""

from __future__ import annotations

import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import psutil

from edgezo.machine.clock import now_s
from edgezo.machine.hardware import cgroup_peak_bytes
from edgezo.machine.process_memory import Resident, peak_rss_bytes, resident

INTERVAL_S = 0.01  # between two samples, at first
MAX_SHARE = 0.01  # CPU seconds that sampling may take, for each second of the run
MAX_SAMPLES = 4096
OUTSIDE = "other"  # the phase outside of all others


class CudaBytes(NamedTuple):
    """Bytes of PyTorch's CUDA allocator."""

    reserved: int
    allocated: int


@dataclass
class PhaseFigures:
    """Time and peaks of one phase so far, without the phases inside it."""

    entries: int = 0
    spent_s: float = 0.0
    peak_rss_bytes: int = 0
    peak_anon_bytes: int = 0
    peak_file_bytes: int = 0
    cuda_reserved_bytes: int | None = None  # None: no CUDA in this process
    cuda_allocated_bytes: int | None = None  # the part of the reserved bytes that is in use


class Profiler:
    """Samples of this process's memory, at most ``max_samples`` of them, and the figures of each phase.

    ``clock`` gives seconds, ``cpu`` the CPU seconds of the thread that calls it, ``read`` the resident memory.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = now_s,
        cpu: Callable[[], float] = time.thread_time,
        read: Callable[[], Resident] = resident,
        max_samples: int = MAX_SAMPLES,
    ):
        self._clock, self._cpu, self._read = clock, cpu, read
        self._phases: dict[str, PhaseFigures] = {}
        self._stack: list[str] = []
        # The samples as columns, full-size from the start, so that memory does not grow during the run.
        self._t_s = array("d", bytes(8 * max_samples))
        self._phase = array("B", bytes(max_samples))
        self._sizes = [array("q", bytes(8 * max_samples)) for _ in Resident._fields]
        self._kept = 0
        self.interval_s = INTERVAL_S
        self.cost_s = 0.0  # CPU seconds that sampling has taken
        self._readings = 0
        self._cuda_peaks = CudaBytes(0, 0)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edgezo-profiler", daemon=True)
        self._begun_s = self._since_s = clock()
        self._push(OUTSIDE)

    def start(self) -> None:
        """Start the sampling thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, which cannot be started again. ``report`` still works after it."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        spent_s = self._cpu()
        while not self._ended.wait(self.wait_s()):
            self.sample()
            now_s = self._cpu()
            with self._lock:
                self.cost_s += now_s - spent_s  # what waiting takes is included
            spent_s = now_s

    def wait_s(self) -> float:
        """Seconds until the next sample: the interval, or longer where sampling would exceed ``MAX_SHARE``."""
        return max(self.interval_s, self._due_s() - self._clock())

    def _due_s(self) -> float:
        """The time from which on another sample, at the mean cost of one, stays within ``MAX_SHARE``."""
        mean_s = self.cost_s / max(1, self._readings)
        return self._begun_s + (self.cost_s + mean_s) / MAX_SHARE

    # -- phases -------------------------------------------------------------------------------------------

    def enter(self, name: str) -> None:
        """Begin a phase inside the current one."""
        with self._lock:
            self._turn()
            self._push(name)

    def leave(self) -> None:
        """End the innermost phase; the one around it goes on."""
        with self._lock:
            self._turn()
            self._stack.pop()

    def _push(self, name: str) -> None:
        self._stack.append(name)
        self._phases.setdefault(name, PhaseFigures()).entries += 1

    def _turn(self) -> None:
        """Add up the time of the current phase, and sample it if the thread has not."""
        figures, now_s = self._phases[self._stack[-1]], self._clock()
        figures.spent_s += now_s - self._since_s
        self._since_s = now_s
        if now_s >= self._due_s() or not figures.peak_rss_bytes:
            before_s = self._cpu()
            self._take(now_s)
            self.cost_s += self._cpu() - before_s

    # -- samples ------------------------------------------------------------------------------------------

    def sample(self) -> None:
        """Read the memory now, for the current phase."""
        with self._lock:  # so that the phase does not change before the reading is noted
            self._take(self._clock())

    def _take(self, now_s: float) -> None:
        reading, figures = self._read(), self._phases[self._stack[-1]]
        self._readings += 1
        figures.peak_rss_bytes = max(figures.peak_rss_bytes, reading.rss_bytes)
        figures.peak_anon_bytes = max(figures.peak_anon_bytes, reading.anon_bytes)
        figures.peak_file_bytes = max(figures.peak_file_bytes, reading.file_bytes)
        if (cuda := self._cuda_bytes()) is not None:
            figures.cuda_reserved_bytes = max(figures.cuda_reserved_bytes or 0, cuda.reserved)
            figures.cuda_allocated_bytes = max(figures.cuda_allocated_bytes or 0, cuda.allocated)
        self._keep(now_s - self._begun_s, reading)

    def _keep(self, t_s: float, reading: Resident) -> None:
        """Add a reading to the samples. Of readings within half an interval only the highest is kept."""
        last = self._kept - 1
        if self._kept and t_s - self._t_s[last] < self.interval_s / 2:
            # Phases may change far more often than the interval.
            if reading.rss_bytes <= self._sizes[0][last]:
                return
            place = last
        else:
            if self._kept == len(self._t_s):
                self._halve()
            place, self._kept = self._kept, self._kept + 1
            self._t_s[place] = t_s
        self._phase[place] = list(self._phases).index(self._stack[-1])
        for column, size in zip(self._sizes, reading, strict=True):
            column[place] = size

    def _halve(self) -> None:
        """Keep the higher one of every two samples, and from now on sample half as often."""
        rss = self._sizes[0]
        self._kept //= 2
        for to in range(self._kept):
            source = 2 * to + (rss[2 * to + 1] > rss[2 * to])
            self._t_s[to], self._phase[to] = self._t_s[source], self._phase[source]
            for column in self._sizes:
                column[to] = column[source]
        self.interval_s *= 2

    def _cuda_bytes(self) -> CudaBytes | None:
        """What CUDA's allocator holds on the current device now, or its peak where that has just risen."""
        cuda = sys.modules.get("torch.cuda")
        initialized = getattr(cuda, "is_initialized", None)  # absent while torch is being imported
        if cuda is None or initialized is None or not initialized():
            return None
        peaks = CudaBytes(int(cuda.max_memory_reserved()), int(cuda.max_memory_allocated()))
        now = CudaBytes(int(cuda.memory_reserved()), int(cuda.memory_allocated()))
        before, self._cuda_peaks = self._cuda_peaks, peaks
        return CudaBytes(*(p if p > b else n for p, b, n in zip(peaks, before, now, strict=True)))

    # -- results ------------------------------------------------------------------------------------------

    def phases(self) -> dict[str, dict[str, Any]]:
        """The figures of each phase up to now, named as in ``PhaseFigures``; those of CUDA only where it is used."""
        with self._lock:
            self._turn()
            table = {name: asdict(figures) for name, figures in self._phases.items()}
        return {n: {k: v for k, v in row.items() if v is not None} for n, row in table.items()}

    def report(self) -> dict[str, Any]:
        """The content of profile.json. ``samples`` are columns; ``t_s`` is in seconds since the profiler was made.

        ``peak_rss_bytes`` is the kernel's peak. ``cgroup_peak_bytes`` is that of the whole control group, its page
        cache and other processes included; null where the kernel does not tell.
        """
        phases = self.phases()
        with self._lock:
            n, names = self._kept, list(self._phases)
            columns = dict(zip(Resident._fields, self._sizes, strict=True))
            samples: dict[str, list[Any]] = {
                "t_s": self._t_s[:n].tolist(),
                "phase": [names[i] for i in self._phase[:n]],
                **{name: column[:n].tolist() for name, column in columns.items()},
            }
            elapsed_s = self._clock() - self._begun_s
            share = self.cost_s / elapsed_s if elapsed_s else 0.0
        times = psutil.Process().cpu_times()
        cuda = self._cuda_bytes() is not None
        return {
            "interval_s": self.interval_s,
            "elapsed_s": elapsed_s,
            "process_cpu_s": times.user + times.system,
            "samples": samples,
            "phases": phases,
            "overhead": {"cpu_s": self.cost_s, "share": share},
            "peak_rss_bytes": peak_rss_bytes(),
            "cgroup_peak_bytes": cgroup_peak_bytes(),
            "cuda_peak_reserved_bytes": self._cuda_peaks.reserved if cuda else None,
            "cuda_peak_allocated_bytes": self._cuda_peaks.allocated if cuda else None,
        }


# ---------------------------------------------------------------------------------------------
# The profiler of this process

# One at a time: phases all over the code report to it without being given it.
_running: Profiler | None = None


@contextmanager
def profiling(on: bool) -> Iterator[None]:
    """Profile the block, if ``on``. Inside another such block, the profiler of that one goes on."""
    global _running
    if not on or _running is not None:
        yield
        return
    _running = Profiler()
    _running.start()
    try:
        yield
    finally:
        _running.stop()
        _running = None


def running() -> Profiler | None:
    """The profiler of this process; None where it is not being profiled."""
    return _running


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark the block as a phase of the run, for the profiler if there is one. Also a decorator."""
    profiler = _running
    if profiler is None:
        yield
        return
    profiler.enter(name)
    try:
        yield
    finally:
        profiler.leave()
