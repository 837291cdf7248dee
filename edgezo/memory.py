"""What the machine has, what this process holds, and a guard that stops before the cap.

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

``VmHWM`` is kept by the kernel at every page fault, so it misses nothing and no sampling thread is
needed. It includes mapped file pages. ``ru_maxrss`` is only the fallback on Linux: a child of a
large parent starts with the parent's value there. Since Linux 6.2 the counters behind all of these
are kept per core and may lag by about 128 KiB a core.

Every reader of ``/proc`` and ``/sys`` takes the root of the tree, so that tests can hand in one
made on disk. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import psutil

from edgezo.errors import BudgetExceeded, UsageError

ROOT = Path("/")

# ---------------------------------------------------------------------------------------------
# Sizes as people write them

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}{s}": 1000**i for i, p in enumerate("kmgt", 1) for s in ("", "b")},
    **{f"{p}i{s}": 1024**i for i, p in enumerate("kmgt", 1) for s in ("", "b")},
}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-zA-Z]*)", re.ASCII)
_SIZE_FORMS = "use a size such as 12GB, 700MB, 1.5g (powers of 1000) or 12GiB (powers of 1024)"


def parse_bytes(text: str | int) -> int:
    """Bytes from ``12GB``, ``12GiB``, ``700MB``, ``1.5g``, ``700000000`` or an int; any case.

    K, M, G, T with or without B are powers of 1000; with ``i`` (KiB, Gi) powers of 1024. A fraction
    of a byte is dropped. Raises UsageError for anything else, and for less than one byte.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise UsageError(f"{text!r} is not a size in bytes; {_SIZE_FORMS}")
    match = _SIZE.fullmatch(str(text).strip())
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS or (unit == "" and "." in match.group(1)):
        raise UsageError(f"'{text}' is not a size in bytes; {_SIZE_FORMS}")
    n_bytes = int(Decimal(match.group(1)) * _UNITS[unit])
    if n_bytes < 1:
        raise UsageError(f"'{text}' is less than one byte; {_SIZE_FORMS}")
    return n_bytes


def format_bytes(n_bytes: int) -> str:
    """``512 B``, ``12.3 KB``, ``700.0 MB``, ``1.50 GB``: powers of 1000, as ``--max-mem`` reads."""
    sign, size = ("-", -n_bytes) if n_bytes < 0 else ("", n_bytes)
    if size < 1000:
        return f"{sign}{size} B"
    for power, unit, digits in ((1, "KB", 1), (2, "MB", 1), (3, "GB", 2)):
        # compared after rounding, so that 999,999 bytes are 1.0 MB and not 1000.0 KB
        if round(size / 1000**power, digits) < 1000:
            return f"{sign}{size / 1000**power:.{digits}f} {unit}"
    return f"{sign}{size / 1000**4:.2f} TB"


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


def allocator_reuse(keep_bytes: int = 1 << 30) -> bool:
    """Keep freed temporaries in the heap from now on; True if the C library took it.

    For the steps after loading: they ask for the same activations again and again, and a fresh map
    costs a page fault every 4 KiB (5 us each on a virtual machine: more than the arithmetic of an
    elementwise pass). What is kept is bounded by what was in use at once, and `Guard` trims it near
    the cap. Weights were mapped one by one before this and stay so.
    """
    libc = _glibc()
    if libc is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    # 32 MiB is the highest threshold that glibc takes.
    return bool(
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20) and libc.mallopt(_M_TRIM_THRESHOLD, keep_bytes)
    )


def _huge_pages_on_request(root: Path = ROOT) -> bool:
    text = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return "[madvise]" in text or "[always]" in text


def malloc_trim() -> bool:
    """Hand free heap pages back to the system (glibc); True if any were released."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


# ---------------------------------------------------------------------------------------------
# The machine


@dataclass(frozen=True)
class CgroupMemory:
    """The tightest memory limit on the way from this process's group to the top."""

    limit_bytes: int
    usage_bytes: int
    reclaimable_bytes: int  # file pages the kernel drops before it kills
    path: str

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.usage_bytes + self.reclaimable_bytes)


BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Machine:
    total_bytes: int  # RAM, or the group's limit where that is smaller
    available_bytes: int  # what can be taken now without swapping or being killed
    cores: int  # usable at once: affinity and CPU quota
    bf16_fast: bool  # bf16 matrix products in hardware; without them bf16 is slower than fp32
    flops_s: float  # of fp32 matrix products on all cores, estimated from clock and vector width
    cgroup: CgroupMemory | None
    notes: tuple[str, ...]  # where each number comes from, for people


def machine(root: Path = ROOT) -> Machine:
    """Read now; ``available_bytes`` is of this moment."""
    ram = psutil.virtual_memory()
    total_bytes, available_bytes = ram.total, ram.available
    notes = [
        f"memory: {format_bytes(ram.total)} of RAM, {format_bytes(ram.available)} of it available"
    ]
    limit = cgroup_memory(root)
    if limit is not None and limit.limit_bytes < ram.total:
        total_bytes = limit.limit_bytes
        available_bytes = min(available_bytes, limit.available_bytes)
        notes.append(
            f"memory: the control group {limit.path} is limited to "
            f"{format_bytes(limit.limit_bytes)}, {format_bytes(limit.available_bytes)} available"
        )
    else:
        limit = None  # a limit above the RAM limits nothing
    cores = usable = _affinity_cores()
    notes.append(f"cores: {cores} in this process's affinity")
    quota = cgroup_cpu_quota(root)
    if quota is not None and quota < cores:
        # rounded up: with 1.5 cores' time, two threads get all of it and one thread two thirds
        usable = max(1, -int(-quota // 1))
        notes.append(f"cores: the control group's quota is {quota:g}")
    flags = _cpu_flags(root)
    fast = not BF16_FLAGS.isdisjoint(flags)
    notes.append(
        f"bf16: {'' if fast else 'no '}matrix instructions (avx512_bf16 or amx_bf16) in this CPU"
    )
    flops_s = usable * _clock_hz() * _flops_per_cycle(flags)
    notes.append(f"speed: about {flops_s / 1e9:.0f} GFLOP/s, from clock and vector width")
    return Machine(total_bytes, available_bytes, usable, fast, flops_s, limit, tuple(notes))


def _affinity_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_flags(root: Path) -> frozenset[str]:
    """Of ``/proc/cpuinfo``; empty where there is none."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def bf16_fast(root: Path = ROOT) -> bool:
    """True if ``/proc/cpuinfo`` lists avx512_bf16 or amx_bf16; False where it is not known."""
    return not BF16_FLAGS.isdisjoint(_cpu_flags(root))


def _clock_hz() -> float:
    try:
        found = psutil.cpu_freq()
    except (OSError, RuntimeError):  # not on every system, nor in every container
        found = None
    clock_mhz = (found.max or found.current) if found is not None else 0
    return 1e6 * clock_mhz if clock_mhz > 100 else 2.5e9


def _flops_per_cycle(flags: frozenset[str]) -> int:
    """Of one core in fp32: two fused multiply-adds of a vector."""
    return 64 if "avx512f" in flags else 32 if "avx2" in flags else 16


def cgroup_memory(root: Path = ROOT) -> CgroupMemory | None:
    """The level with the least memory left, in version 2, version 1 or both; None: no limit."""
    found: list[CgroupMemory] = []
    for version, directories in _cgroup_directories(root, "memory"):
        read = _memory_v2 if version == 2 else _memory_v1
        found.extend(level for d in directories if (level := read(d)) is not None)
    return min(found, key=lambda level: level.available_bytes, default=None)


def cgroup_cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time the group may use (the least on the way up); None: no quota."""
    quotas: list[float] = []
    for version, directories in _cgroup_directories(root, "cpu"):
        for d in directories:
            if version == 2:
                words = _read(d / "cpu.max").split()
            else:
                words = [_read(d / f"cpu.cfs_{w}_us").strip() for w in ("quota", "period")]
            if len(words) == 2 and all(w.isdecimal() and int(w) > 0 for w in words):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


_NO_LIMIT_BYTES = 1 << 60  # version 1 says "none" by 2**63 rounded down to a page


def _memory_v2(directory: Path) -> CgroupMemory | None:
    # memory.high does not kill, but a process above it is slowed until it is of no use
    limits = [_number(directory / name) for name in ("memory.max", "memory.high")]
    return _level(directory, limits, "memory.current", prefix="")


def _memory_v1(directory: Path) -> CgroupMemory | None:
    stat = _table(directory / "memory.stat")
    # the hierarchical limit counts parents that a container cannot see
    limits = [
        _number(directory / "memory.limit_in_bytes"),
        stat.get("hierarchical_memory_limit"),
    ]
    return _level(directory, limits, "memory.usage_in_bytes", prefix="total_")


def _level(
    directory: Path, limits: list[int | None], usage: str, prefix: str
) -> CgroupMemory | None:
    real = [limit for limit in limits if limit is not None and limit < _NO_LIMIT_BYTES]
    if not real:
        return None
    stat = _table(directory / "memory.stat")
    usage_bytes = _number(directory / usage) or 0
    file_bytes = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
    return CgroupMemory(min(real), usage_bytes, min(file_bytes, usage_bytes), str(directory))


def _cgroup_directories(root: Path, controller: str) -> list[tuple[int, list[Path]]]:
    """(version, own directory and its parents up to the mount) of each tree with `controller`.

    Hybrid hosts mount both versions, and only one of the two has the controller's files.
    """
    mounts = _cgroup_mounts(root)
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        key = controller if names else ""
        if key not in mounts:
            continue
        mounted, mount_point = mounts[key]
        # Without a namespace of its own a container reads the host's path here and has only its
        # own part of the tree mounted; a path outside the mount leaves the mount itself.
        prefix = mounted.rstrip("/")
        inside = path.removeprefix(prefix) if f"{path}/".startswith(f"{prefix}/") else "/"
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:
            parts = []
        top = root / mount_point.lstrip("/")
        levels = [top.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
        found.append((1 if names else 2, [d for d in levels if d.is_dir()]))
    return found


def _cgroup_mounts(root: Path) -> dict[str, tuple[str, str]]:
    """Version 1 controller name, or "" for version 2 -> (part that is mounted, mount point)."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, separator, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if not separator or len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2":
            mounts.setdefault("", (fields[3], fields[4]))
        elif kinds[0] == "cgroup":
            for name in kinds[2].split(","):
                mounts.setdefault(name, (fields[3], fields[4]))
    return mounts


# ---------------------------------------------------------------------------------------------
# This process

_peak_before_reset_bytes = 0  # the highest peak that a reset has wiped from the kernel's counter


def read_status(root: Path = ROOT) -> dict[str, int]:
    """The sizes in ``/proc/self/status`` in bytes (``VmHWM``, ``VmRSS``, ...); {} elsewhere."""
    sizes = {}
    for line in _read(root / "proc/self/status").splitlines():
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


def anon_file_bytes(root: Path = ROOT) -> tuple[int, int]:
    """(anonymous, file-backed and shared) resident bytes; (rss, 0) where they are not told apart.

    The kernel keeps no peak of either. Anonymous memory cannot be reclaimed without swap.
    """
    status = read_status(root)
    if "RssAnon" not in status:
        return rss_bytes(root), 0
    return status["RssAnon"], status.get("RssFile", 0) + status.get("RssShmem", 0)


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
        anon_bytes, file_bytes = anon_file_bytes()
        phase = Phase(name, rss_bytes(), peak_bytes, anon_bytes, file_bytes)
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
        anon_bytes, file_bytes = anon_file_bytes()
        return table | {
            "peak_rss_bytes": peak_rss_bytes(),
            "rss_bytes": rss_bytes(),
            "anon_bytes": anon_bytes,
            "file_bytes": file_bytes,
        }


class Guard:
    """Refuses an allocation before it happens, when it would take the process over its cap.

    `margin_bytes` stays free for what nobody announces (the counters' lag, small allocations).
    """

    def __init__(
        self, cap_bytes: int, margin_bytes: int, rss: Callable[[], int] = rss_bytes
    ) -> None:
        self.cap_bytes = cap_bytes
        self.margin_bytes = margin_bytes
        self._rss = rss

    def room_bytes(self) -> int:
        """What may still be allocated; negative once the margin is being eaten."""
        return self.cap_bytes - self.margin_bytes - self._rss()

    def check(self, need_bytes: int = 0, item: str = "the next step") -> None:
        """Raise BudgetExceeded if `need_bytes` more for `item` would go above cap - margin.

        Free heap pages are handed back first, once, if that may help.
        """
        if need_bytes <= self.room_bytes():
            return
        malloc_trim()
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
            f"{-(-(self.cap_bytes + over_bytes) // 1_000_000)}MB or more, or with a smaller "
            "--micro-batch or --max-length."
        )


# ---------------------------------------------------------------------------------------------
# Small files of the kernel's


def _read(path: Path) -> str:
    """The text, or "" where the file is absent or may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
