"""The memory of this process: what it holds, how its allocator keeps it, and a guard that stops before the cap.

Three kinds of number, all in bytes:

=========  ===========================================================  =======================
number     Linux                                                        elsewhere
=========  ===========================================================  =======================
resident   ``VmRSS`` of ``/proc/self/status`` (kB = 1024 bytes)         psutil ``rss`` / ``wset``
peak       ``VmHWM``, else ``ru_maxrss`` (KiB)                          macOS ``ru_maxrss``
                                                                        (bytes), Windows
                                                                        ``peak_wset`` (bytes)
split      ``RssAnon`` and ``RssFile`` + ``RssShmem``                   not split: all anonymous
=========  ===========================================================  =======================

The kernel updates ``VmHWM`` at every page fault, so it misses nothing; the profiler samples only what the kernel keeps
no peak of. It includes mapped file pages. ``ru_maxrss`` is only the fallback on Linux: a child of a large parent starts
with the parent's value there. Since Linux 6.2 the three counters behind all of these (anonymous, file and shared pages)
are kept per core, and each may lag by about 128 KiB a core; since 6.17 a reading of the current size sums them exactly,
and only the peak lags.

Every reader of ``/proc`` and ``/sys`` takes the root of the tree, so that tests can pass one that they made. Nothing
here imports torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from edgezo.errors import BudgetExceeded, DoesNotFit, EdgezoError
from edgezo.machine.hardware import ROOT, format_bytes, read_text
from edgezo.machine.limits import GUARD_MARGIN_BYTES

# ---------------------------------------------------------------------------------------------
# The allocator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc malloc.h
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, else None: musl, macOS and Windows have no ``mallopt``."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL(None)
    except OSError:
        return None
    names = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return libc if all(hasattr(libc, name) for name in names) else None


def allocator_policy(
    mmap_threshold_bytes: int = 128 * 1024, trim_threshold_bytes: int = 1024 * 1024, arenas: int = 2
) -> str:
    """Make freed memory go back to the system. Call it before torch is imported. Returns what was set, for the user.

    glibc gives a large block a map of its own and unmaps it when it is freed. But each freed block raises the size that
    counts as large, up to 32 MiB, and from then on freed layers stay in the heap, in pieces (143 MB grew to 948 MB with
    nothing alive). Setting the threshold keeps it at 128 KiB, where glibc starts. There are fewer arenas because the
    arena of every thread keeps freed pages as well.

    Fresh maps cost page faults, 10-20 % of a forward; huge pages for torch's allocations (``THP_MEM_ALLOC_ENABLE``,
    only for blocks of 2 MiB and more) win nearly all of that back without a higher peak. ``MALLOC_*`` variables and
    ``THP_MEM_ALLOC_ENABLE`` that the user has set are kept.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    other = next((name for name in _OTHER_ALLOCATORS if name in preloaded), None)
    libc = _glibc()
    if other is not None:
        return f"allocator left alone: {other} is preloaded"
    if libc is None:
        return "allocator left alone: not glibc"
    done = []
    for option, value, variable, text in (
        (
            _M_MMAP_THRESHOLD,
            mmap_threshold_bytes,
            "MALLOC_MMAP_THRESHOLD_",
            f"mmap threshold {mmap_threshold_bytes // 1024} KiB",
        ),
        (
            _M_TRIM_THRESHOLD,
            trim_threshold_bytes,
            "MALLOC_TRIM_THRESHOLD_",
            f"trim threshold {trim_threshold_bytes // 1024} KiB",
        ),
        (_M_ARENA_MAX, arenas, "MALLOC_ARENA_MAX", f"{arenas} arenas"),
    ):
        if variable in os.environ:
            done.append(f"{variable}={os.environ[variable]} kept")
        elif libc.mallopt(option, value) == 1:
            done.append(text)
    if "THP_MEM_ALLOC_ENABLE" not in os.environ and _huge_pages_on_request():
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        done.append("huge pages for tensors from 2 MiB")
    return "glibc: " + ", ".join(done)


# A temporary of this size or more gets a map of its own, where there are many tokens.
MAPPED_BYTES = 256 << 10
NEVER_MAPPED_BYTES = 32 << 20  # the highest such size that glibc accepts


def allocator_reuse(map_from_bytes: int = NEVER_MAPPED_BYTES, keep_bytes: int = 1 << 30) -> bool:
    """From now on keep freed temporaries below ``map_from_bytes`` in the heap. False where that cannot be set.

    This is for the steps after loading. They allocate the same activations again and again, and a fresh map costs a
    page fault every 4 KiB (5 us each on a virtual machine: more than the arithmetic of an elementwise pass). The heap
    keeps at most what was in use at once, and ``Guard`` trims it near the cap. But large temporaries of many sizes
    leave holes, so those of long batches are mapped (``Heap``). Weights were mapped one by one before this, and stay
    so. ``keep_bytes``: so much free memory may stay at the end of the heap.
    """
    libc = _glibc()
    if libc is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, map_from_bytes)
        and libc.mallopt(_M_TRIM_THRESHOLD, keep_bytes)
    )


# A process whose plan ends within so many bytes gives free memory back between two blocks.
NEAR_BYTES = 4 << 20
GROWN_BYTES = 2 << 20  # less growth since it last did gives little back


@dataclass
class Heap:
    """Where the temporaries of a step lie: in the heap while they are small, else each in a map of its own.

    So a batch of few tokens is spared the page faults of fresh maps, and the longest batch, which makes the peak,
    leaves no holes in the heap.
    """

    # Temporaries of forwards over at most so many tokens, of all sides, stay in the heap. None: the allocator is left
    # as it is.
    reused_tokens: int | None = None
    trims: bool = False  # an update gives its temporaries back, because longer batches may follow
    # The peak of the plan: holes of the heap must not take the process above it. None: there is no plan.
    planned_bytes: int | None = None
    # What a block of the longest batch takes, and the holes that it leaves. In maps a block comes on top of the rest.
    block_bytes: int = 0
    hole_bytes: int = 0
    _mapped: bool = field(default=False, init=False)
    _held_bytes: int = field(default=0, init=False)  # after free memory last went back

    def expect(self, tokens: int) -> None:
        """Prepare the allocator for a forward over ``tokens`` packed tokens."""
        if self.reused_tokens is None:
            return
        self._mapped = tokens > self.reused_tokens
        if self._mapped:
            malloc_trim()
        allocator_reuse(MAPPED_BYTES if self._mapped else NEVER_MAPPED_BYTES)

    def give_back(self) -> None:
        """Give free memory back: what follows has temporaries of other sizes, which would not fit into the holes."""
        if self.reused_tokens is not None:
            malloc_trim()

    @contextmanager
    def apart(self, tokens: int) -> Iterator[None]:
        """A block in a forward over ``tokens`` whose allocations outlive it: large ones get maps of their own."""
        if self.reused_tokens is None or tokens > self.reused_tokens:  # then they are mapped anyway
            yield
            return
        allocator_reuse(MAPPED_BYTES)
        try:
            yield
        finally:
            allocator_reuse()

    def keep_to_plan(self) -> None:
        """Between two blocks, or two tiles of an update: give free memory back where the planned peak is near.

        Not before the process has grown by ``GROWN_BYTES`` since it last did: until then little would go back.
        """
        if self.planned_bytes is None or rss_bytes() < self._held_bytes + GROWN_BYTES:
            return
        mapped_bytes = self.block_bytes if self._mapped else 0
        if self.make_room(NEAR_BYTES + self.hole_bytes + mapped_bytes) is not None:
            self._held_bytes = rss_bytes()

    def make_room(self, need_bytes: int) -> int | None:
        """Give free memory back where ``need_bytes`` more would go above the planned peak.

        Returns the bytes that went back; None where there was room, or is no plan.
        """
        if self.planned_bytes is None:
            return None
        held_bytes = rss_bytes()
        if held_bytes + need_bytes <= self.planned_bytes:
            return None
        malloc_trim()
        return held_bytes - rss_bytes()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """A block that makes an update: many tiles of one size, which the heap uses again."""
        if self.reused_tokens is not None:
            allocator_reuse()
            self._mapped = False
        if self.trims:
            malloc_trim()
        try:
            yield
        finally:
            if self.trims:
                malloc_trim()


def _huge_pages_on_request(root: Path = ROOT) -> bool:
    text = read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return "[madvise]" in text or "[always]" in text


def malloc_trim() -> bool:
    """Hand free heap pages back to the system (glibc); True if any were released."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


# ---------------------------------------------------------------------------------------------
# This process

# The highest peak that a reset has wiped from the kernel's counter. It belongs to the process, as that counter does.
_peak_before_reset_bytes = 0


def read_status(root: Path = ROOT, process: int | str = "self") -> dict[str, int]:
    """The sizes in ``/proc/<process>/status`` in bytes (``VmHWM``, ``VmRSS``, ...); {} where there is no such file."""
    sizes = {}
    for line in read_text(root / f"proc/{process}/status").splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdecimal():
            sizes[key] = int(words[0]) * 1024
    return sizes


def rss_bytes(root: Path = ROOT) -> int:
    """Resident memory of this process now."""
    size = read_status(root).get("VmRSS")
    return psutil.Process().memory_info().rss if size is None else size


def peak_rss_bytes(root: Path = ROOT) -> int:
    """The most resident memory that this process has had since it started, whether or not ``reset_peak`` was called."""
    return max(_peak_before_reset_bytes, _peak_since_reset_bytes(root))


def _peak_since_reset_bytes(root: Path = ROOT) -> int:
    size = read_status(root).get("VmHWM")
    if size is not None:
        return size
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return max(info.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class Resident(NamedTuple):
    """Resident memory of a process at one moment. The kernel keeps no peak of the two parts."""

    rss_bytes: int
    anon_bytes: int  # anonymous: cannot be reclaimed without swap
    file_bytes: int  # file-backed and shared


def resident(root: Path = ROOT) -> Resident:
    """Resident memory of this process now; where the system does not tell the parts, all of it counts as anonymous."""
    status = read_status(root)
    if "RssAnon" not in status:
        whole_bytes = rss_bytes(root)
        return Resident(whole_bytes, whole_bytes, 0)
    file_bytes = status.get("RssFile", 0) + status.get("RssShmem", 0)
    return Resident(status["VmRSS"], status["RssAnon"], file_bytes)


def reset_peak(root: Path = ROOT) -> bool:
    """Set the kernel's peak back to the present size; False where that cannot be done.

    ``peak_rss_bytes`` still knows the earlier peak, but no program outside does: ``/usr/bin/time -v`` and other readers
    of ``VmHWM`` then report less than the process once held.
    """
    global _peak_before_reset_bytes
    if "VmHWM" not in read_status(root):
        return False
    before = _peak_since_reset_bytes(root)
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    _peak_before_reset_bytes = max(_peak_before_reset_bytes, before)
    return True


@dataclass(frozen=True)
class Phase:
    """Memory at the end of a phase of the run, and its peak."""

    name: str
    rss_bytes: int
    peak_rss_bytes: int  # while the phase ran; if the peak is not reset, since the process started
    anon_bytes: int
    file_bytes: int


class Meter:
    """Peak memory by phase: ``meter.mark("load")`` ends the phase that has run since the last mark.

    By default the kernel's peak is not reset, so a phase's peak is the highest so far: exact for every phase that goes
    above the ones before it, and a bound for the others. With ``reset=True`` each phase has its own peak, but programs
    outside see only that of the last phase (see ``reset_peak``). Either way ``peak_rss_bytes`` in the summary is that
    of the whole life of the process.
    """

    def __init__(self, reset: bool = False):
        self._phases: dict[str, Phase] = {}
        self._reset = reset

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(self._phases.values())

    def mark(self, name: str) -> Phase:
        """End a phase. A phase whose name comes back keeps its highest peak and its latest end."""
        peak_bytes = _peak_since_reset_bytes() if self._reset else peak_rss_bytes()
        before = self._phases.get(name)
        if before is not None:
            peak_bytes = max(peak_bytes, before.peak_rss_bytes)
        now = resident()
        phase = Phase(name, now.rss_bytes, peak_bytes, now.anon_bytes, now.file_bytes)
        self._phases[name] = phase
        if self._reset:
            reset_peak()
        return phase

    def summary(self) -> dict[str, int]:
        """``<phase>_rss_bytes`` and ``<phase>_peak_rss_bytes`` of each phase, and the present ``peak_rss_bytes``,
        ``rss_bytes``, ``anon_bytes`` and ``file_bytes``."""
        table: dict[str, int] = {}
        for phase in self.phases:
            table[f"{phase.name}_rss_bytes"] = phase.rss_bytes
            table[f"{phase.name}_peak_rss_bytes"] = phase.peak_rss_bytes
        return table | {"peak_rss_bytes": peak_rss_bytes(), **resident()._asdict()}


class Guard:
    """Refuses an allocation before it happens, when it would take the process over its cap.

    ``margin_bytes`` of the cap stay free for what is not announced: small allocations, and the lag of the kernel's
    counters. ``rss`` tells what is held, ``trim`` gives back what is held but not in use. ``planned_bytes`` is the peak
    of the plan (None: the cap). Temporaries of many sizes leave holes in the heap, which could take the process
    above its planned peak.
    """

    def __init__(
        self,
        cap_bytes: int,
        margin_bytes: int,
        rss: Callable[[], int] = rss_bytes,
        planned_bytes: int | None = None,
        trim: Callable[[], object] = lambda: malloc_trim(),
    ) -> None:
        self.cap_bytes = cap_bytes
        self.margin_bytes = margin_bytes
        self._rss, self._trim = rss, trim
        self._planned_bytes = cap_bytes if planned_bytes is None else planned_bytes

    def room_bytes(self) -> int:
        """What may still be allocated; negative where the margin is already being used."""
        return self.cap_bytes - self.margin_bytes - self._rss()

    def check_again(self, need_bytes: int, item: str) -> None:
        """``check`` for ``item`` when it has run before, so that most of what it needs is still in the heap.

        If the margin is already in use, the heap is trimmed and the whole need is checked. If the process has come
        above its planned peak, the heap is trimmed only.
        """
        room_bytes = self.room_bytes()
        if room_bytes < 0:
            self._trim()
            self.check(need_bytes, item)
        elif self.cap_bytes - self.margin_bytes - room_bytes > self._planned_bytes:
            self._trim()

    def check(self, need_bytes: int = 0, item: str = "the next step") -> None:
        """Raise BudgetExceeded if ``need_bytes`` more for ``item`` would go above cap - margin.

        Before that, free memory is given back once, in case this is enough.
        """
        if need_bytes <= self.room_bytes():
            return
        self._trim()
        room_bytes = self.room_bytes()
        if need_bytes <= room_bytes:
            return
        held_bytes = self.cap_bytes - self.margin_bytes - room_bytes
        raise self._refusal(held_bytes, need_bytes, need_bytes - room_bytes, item)

    def _refusal(self, held_bytes: int, need_bytes: int, over_bytes: int, item: str) -> EdgezoError:
        """The error for ``item``, which would go over by ``over_bytes``."""
        return BudgetExceeded(
            f"stopped before --max-mem {format_bytes(self.cap_bytes)} was crossed: "
            f"{format_bytes(held_bytes)} are resident, {item} needs {format_bytes(need_bytes)} "
            f"and {format_bytes(self.margin_bytes)} are kept free: "
            f"{format_bytes(over_bytes)} too much. Go on with --resume and --max-mem "
            f"{-(-(self.cap_bytes + over_bytes) // 1_000_000)}MB or more."
        )


# A process may read so much although it holds more than its cap already: the planner refuses such a cap, and knows the
# smallest that would do.
READING_ROOM_BYTES = 128 << 20


class ReadingGuard(Guard):
    """The guard of a process before its plan: while files are read, templates rendered and rows tokenised.

    It is asked at bounded intervals, and before whatever may be large; ``item`` names the file and the row.
    """

    def __init__(
        self,
        cap_bytes: int | None = None,  # None: no cap
        rss: Callable[[], int] = rss_bytes,
        trim: Callable[[], object] = lambda: malloc_trim(),
    ) -> None:
        self.peak_before_bytes = peak_rss_bytes()
        least_bytes = rss() + READING_ROOM_BYTES
        enough_bytes = 1 << 60 if cap_bytes is None else max(cap_bytes, least_bytes)
        super().__init__(enough_bytes, GUARD_MARGIN_BYTES, rss, trim=trim)

    def _refusal(self, held_bytes: int, need_bytes: int, over_bytes: int, item: str) -> EdgezoError:
        needs = f"needs up to {format_bytes(need_bytes)} more" if need_bytes else "is being read"
        return DoesNotFit(
            f"{item} {needs}, {format_bytes(held_bytes)} are resident and {format_bytes(self.margin_bytes)} are kept "
            f"free: more than --max-mem {format_bytes(self.cap_bytes)}. Nothing was started. Give --max-mem "
            f"{-(-(self.cap_bytes + over_bytes) // 1_000_000)}MB or more, or fewer or shorter rows."
        )


def check_cap_kept(cap_bytes: int, peak_bytes: int, before_bytes: int, done: str) -> None:
    """Raise BudgetExceeded where a process has taken more than its cap, so that it does not end as if it had kept it.

    ``before_bytes`` is the peak from before the cap was set, which does not count; ``done`` says what is saved.
    """
    if peak_bytes > cap_bytes and peak_bytes > before_bytes:
        raise BudgetExceeded(
            f"{done}, but the peak of memory was {format_bytes(peak_bytes)}, more than --max-mem "
            f"{format_bytes(cap_bytes)}. Give --max-mem {-(-peak_bytes // 1_000_000)}MB or more."
        )
