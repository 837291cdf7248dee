"""What this process holds, the allocator it holds it with, and a guard that stops before the cap.

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

``VmHWM`` is kept by the kernel at every page fault, so it misses nothing; `profiler` samples only what
the kernel keeps no peak of. It includes mapped file pages. ``ru_maxrss`` is only the fallback on Linux: a child of a
large parent starts with the parent's value there. Since Linux 6.2 the three counters behind all of these (anonymous,
file and shared pages) are kept per core, and each may lag by about 128 KiB a core; since 6.17 a reading of the current
size sums them exactly, and only the peak lags.

Every reader of ``/proc`` and ``/sys`` takes the root of the tree, so that tests can hand in one
made on disk. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from edgezo.errors import BudgetExceeded
from edgezo.machine.hardware import ROOT, format_bytes, read_text

# ---------------------------------------------------------------------------------------------
# The allocator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc malloc.h
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc (musl, macOS and Windows have no ``mallopt`` to call)."""
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
    """Make freed memory go back to the system; call before torch is imported. Says what was set.

    glibc maps a large block on its own and unmaps it when it is freed, but each freed block raises
    the size that counts as large, up to 32 MiB; from then on freed layers stay in the heap, in
    pieces (143 MB grew to 948 MB with nothing live). Setting the threshold keeps it where glibc
    starts, at 128 KiB. Fewer arenas because every thread's own arena keeps freed pages as well.

    Fresh maps cost page faults, 10-20 % of a forward; huge pages in torch's own allocations
    (``THP_MEM_ALLOC_ENABLE``, only blocks of 2 MiB and more) take nearly all of it back without
    a higher peak. A ``MALLOC_*`` variable or ``THP_MEM_ALLOC_ENABLE`` of the user's wins.
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


MAPPED_BYTES = 256 << 10  # of a temporary, where there are many tokens
NEVER_MAPPED_BYTES = 32 << 20  # the highest threshold that glibc takes


def allocator_reuse(map_from_bytes: int = NEVER_MAPPED_BYTES, keep_bytes: int = 1 << 30) -> bool:
    """Keep freed temporaries below ``map_from_bytes`` in the heap from now on; True if the C library took it.

    For the steps after loading: they ask for the same activations again and again, and a fresh map
    costs a page fault every 4 KiB (5 us each on a virtual machine: more than the arithmetic of an
    elementwise pass). What is kept is bounded by what was in use at once, and `Guard` trims it near
    the cap; but large temporaries of many sizes leave holes, so those of long batches are mapped
    (`Heap`). Weights were mapped one by one before this and stay so.
    """
    libc = _glibc()
    if libc is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, map_from_bytes)
        and libc.mallopt(_M_TRIM_THRESHOLD, keep_bytes)
    )


@dataclass(frozen=True)
class Heap:
    """Where the temporaries of a step lie: in the heap while they are small, else each in a map of its own.

    A batch of few tokens goes without the page faults of fresh maps; the longest, which the peak is made of, leaves no
    holes.
    """

    # Of all sides, whose temporaries stay in the heap; None: the heap is left alone.
    reused_tokens: int | None = None
    # Whether longer batches are to be expected: then an update leaves nothing behind.
    trims: bool = False

    def expect(self, tokens: int) -> None:
        """A forward over ``tokens`` packed tokens follows."""
        if self.reused_tokens is None:
            return
        mapped = tokens > self.reused_tokens
        if mapped:
            malloc_trim()
        allocator_reuse(MAPPED_BYTES if mapped else NEVER_MAPPED_BYTES)

    def give_back(self) -> None:
        """What follows has temporaries of other sizes, which would not fit in the holes of those before."""
        if self.reused_tokens is not None:
            malloc_trim()

    @contextmanager
    def apart(self, tokens: int) -> Iterator[None]:
        """What is taken here, in a forward over ``tokens``, outlives it: large blocks get maps of their own."""
        if (
            self.reused_tokens is None or tokens > self.reused_tokens
        ):  # left alone, or mapped anyway
            yield
            return
        allocator_reuse(MAPPED_BYTES)
        try:
            yield
        finally:
            allocator_reuse()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Tiles of an update follow, many of one size."""
        if self.reused_tokens is not None:
            allocator_reuse()
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

_peak_before_reset_bytes = 0  # the highest peak that a reset has wiped from the kernel's counter


def read_status(root: Path = ROOT, process: int | str = "self") -> dict[str, int]:
    """The sizes in ``/proc/<process>/status`` in bytes (``VmHWM``, ``VmRSS``, ...); {} elsewhere."""
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
    """The most this process has held since it started, whatever was reset by `reset_peak`."""
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
    """What a process holds, by one reading. The kernel keeps no peak of the two parts."""

    rss_bytes: int
    anon_bytes: int  # cannot be reclaimed without swap
    file_bytes: int  # file-backed and shared


def resident(root: Path = ROOT) -> Resident:
    """Resident memory of this process now; all of it anonymous where the parts are not told apart."""
    status = read_status(root)
    if "RssAnon" not in status:
        whole_bytes = rss_bytes(root)
        return Resident(whole_bytes, whole_bytes, 0)
    file_bytes = status.get("RssFile", 0) + status.get("RssShmem", 0)
    return Resident(status["VmRSS"], status["RssAnon"], file_bytes)


def reset_peak(root: Path = ROOT) -> bool:
    """Start the kernel's peak over from the present size; False where that cannot be done.

    `peak_rss_bytes` still knows the earlier peak, but nobody outside does: after this,
    ``/usr/bin/time -v`` and a reader of ``VmHWM`` report less than the process once held.
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
    name: str
    rss_bytes: int  # at its end
    peak_rss_bytes: int  # while it ran; since the start of the process if the peak was not reset
    anon_bytes: int  # at its end
    file_bytes: int


class Meter:
    """Peak memory by phase: ``meter.mark("load")`` ends the phase that has run since the last mark.

    By default nothing is reset, so a phase's peak is the highest so far: exact for every phase that
    goes above the ones before it, and a bound for the others. With ``reset=True`` each phase has a
    peak of its own, but programs outside see only the last phase's (see `reset_peak`). Either way
    ``peak_rss_bytes`` in the summary is over the whole life of the process.
    """

    def __init__(self, reset: bool = False):
        self._phases: dict[str, Phase] = {}
        self._reset = reset

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(self._phases.values())

    def mark(self, name: str) -> Phase:
        """End a phase. A name that comes back keeps its highest peak and its latest end."""
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
        """``<phase>_rss_bytes`` and ``<phase>_peak_rss_bytes`` of each phase, and as of now
        ``peak_rss_bytes``, ``rss_bytes``, ``anon_bytes``, ``file_bytes``."""
        table: dict[str, int] = {}
        for phase in self.phases:
            table[f"{phase.name}_rss_bytes"] = phase.rss_bytes
            table[f"{phase.name}_peak_rss_bytes"] = phase.peak_rss_bytes
        return table | {"peak_rss_bytes": peak_rss_bytes(), **resident()._asdict()}


class Guard:
    """Refuses an allocation before it happens, when it would take the process over its cap.

    `margin_bytes` stays free for what nobody announces (the counters' lag, small allocations).
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
        self._rss, self._trim = rss, trim  # what is held, and giving back what is not in use
        # The peak of the plan: temporaries of many sizes leave holes in the heap, which would exceed it.
        self._planned_bytes = cap_bytes if planned_bytes is None else planned_bytes

    def room_bytes(self) -> int:
        """What may still be allocated; negative once the margin is being eaten."""
        return self.cap_bytes - self.margin_bytes - self._rss()

    def check_again(self, need_bytes: int, item: str) -> None:
        """`check` for what has run before: most of what it needs is still in the heap, and not asked for again.

        Only once the margin is being eaten, the heap is emptied and the whole need counts; the heap is also emptied
        of its holes where they have taken the process near its planned peak.
        """
        room_bytes = self.room_bytes()
        if room_bytes < 0:
            self._trim()
            self.check(need_bytes, item)
        elif self.cap_bytes - room_bytes > self._planned_bytes:
            self._trim()

    def check(self, need_bytes: int = 0, item: str = "the next step") -> None:
        """Raise BudgetExceeded if `need_bytes` more for `item` would go above cap - margin.

        Free heap pages are handed back first, once, if that may help.
        """
        if need_bytes <= self.room_bytes():
            return
        self._trim()
        room_bytes = self.room_bytes()
        if need_bytes <= room_bytes:
            return
        held_bytes = self.cap_bytes - self.margin_bytes - room_bytes
        over_bytes = need_bytes - room_bytes
        raise BudgetExceeded(
            f"stopped before --max-mem {format_bytes(self.cap_bytes)} was crossed: "
            f"{format_bytes(held_bytes)} are resident, {item} needs {format_bytes(need_bytes)} "
            f"and {format_bytes(self.margin_bytes)} are kept free: "
            f"{format_bytes(over_bytes)} too much. Go on with --resume and --max-mem "
            f"{-(-(self.cap_bytes + over_bytes) // 1_000_000)}MB or more."
        )
