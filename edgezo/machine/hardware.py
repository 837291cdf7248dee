"""What the machine has: memory, cores, speed, GPUs; and sizes such as 12GB, read and printed.

RAM is what psutil reports, or less where a control group (version 1, version 2 or both) limits this process. GPUs are
what ``nvidia-smi`` reports. Every reader of ``/proc`` and ``/sys`` takes the root of the tree, so that tests can pass
one that they made. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import psutil

from edgezo.errors import UsageError

ROOT = Path("/")

# ---------------------------------------------------------------------------------------------
# Sizes

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}{s}": 1000**i for i, p in enumerate("kmgt", 1) for s in ("", "b")},
    **{f"{p}i{s}": 1024**i for i, p in enumerate("kmgt", 1) for s in ("", "b")},
}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})\s*([a-zA-Z]*)", re.ASCII)
# A text of digits alone is bytes. Nobody means so few of them: with up to 64 it is gigabytes, with more megabytes.
LEAST_BARE_BYTES, MOST_BARE_GB = 1_000_000, 64
_SIZE_FORMS = "use a size such as 12GB, 700MB, 1.5g (powers of 1000) or 12GiB (powers of 1024)"


def parse_bytes(text: str | int) -> int:
    """Bytes from ``12GB``, ``12GiB``, ``700MB``, ``1.5g``, ``700000000`` or an int; in upper or lower case.

    K, M, G, T with or without B are powers of 1000; with ``i`` (KiB, Gi) powers of 1024. A fraction of a byte is
    dropped. Raises UsageError for anything else, and for less than one byte.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise UsageError(f"{text!r} is not a size in bytes; {_SIZE_FORMS}")
    match = _SIZE.fullmatch(str(text).strip())
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS or (unit == "" and "." in match.group(1)):
        raise UsageError(f"'{text}' is not a size in bytes; {_SIZE_FORMS}")
    n_bytes = int(Decimal(match.group(1)) * _UNITS[unit])
    if unit == "" and isinstance(text, str) and 0 < n_bytes < LEAST_BARE_BYTES:
        likely = "GB" if n_bytes <= MOST_BARE_GB else "MB"
        raise UsageError(
            f"'{text}' would be {n_bytes} bytes; did you mean {n_bytes}{likely}? {_SIZE_FORMS}"
        )
    if n_bytes < 1:
        raise UsageError(f"'{text}' is less than one byte; {_SIZE_FORMS}")
    return n_bytes


def format_bytes(n_bytes: int) -> str:
    """``512 B``, ``12.3 KB``, ``700.0 MB``, ``1.50 GB``: powers of 1000, as ``--max-mem`` reads them."""
    sign, size = ("-", -n_bytes) if n_bytes < 0 else ("", n_bytes)
    if size < 1000:
        return f"{sign}{size} B"
    for power, unit, digits in ((1, "KB", 1), (2, "MB", 1), (3, "GB", 2)):
        # Compared after rounding, so that 999,999 bytes are 1.0 MB and not 1000.0 KB.
        if round(size / 1000**power, digits) < 1000:
            return f"{sign}{size / 1000**power:.{digits}f} {unit}"
    return f"{sign}{size / 1000**4:.2f} TB"


# ---------------------------------------------------------------------------------------------
# The machine


@dataclass(frozen=True)
class CgroupMemory:
    """The control group with the least memory available, among this process's group and its parents."""

    limit_bytes: int
    usage_bytes: int
    reclaimable_bytes: int  # file pages, which the kernel drops before it kills a process
    path: str

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.usage_bytes + self.reclaimable_bytes)


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as ``nvidia-smi`` reports it."""

    index: int
    name: str
    total_bytes: int
    available_bytes: int  # free at this moment
    uuid: str


BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Machine:
    """What this process may use."""

    total_bytes: int  # RAM, or the control group's limit where that is smaller
    available_bytes: int  # can be taken now without swapping or being killed
    cores: int  # usable at once, by affinity and CPU quota
    bf16_fast: bool  # has instructions for bf16 products; without them bf16 is slower than fp32
    flops_s: float  # fp32 matrix products on all cores, estimated from clock and vector width
    bf16_flops_s: float  # bf16 matrix products, likewise
    c_kernels: bool  # kernels.c is compiled and used (kernels.py)
    cgroup: CgroupMemory | None  # None where no control group limits the memory
    # The first one that this process may use; None also where PyTorch could not use it.
    gpu: Gpu | None
    notes: tuple[str, ...]  # where each number comes from, for the user


def machine(root: Path = ROOT) -> Machine:
    """Look at the machine now: ``available_bytes`` is that of this moment."""
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
        limit = None  # a limit above the RAM has no effect
    cores = usable = _affinity_cores()
    notes.append(f"cores: {cores} in this process's affinity")
    quota = cgroup_cpu_quota(root)
    if quota is not None and quota < cores:
        # Rounded up: of the time of 1.5 cores two threads get all, one thread would get two thirds.
        usable = max(1, -int(-quota // 1))
        notes.append(f"cores: the control group's quota is {quota:g}")
    flags = cpu_flags(root)
    fast = not BF16_FLAGS.isdisjoint(flags)
    notes.append(
        f"bf16: {'' if fast else 'no '}matrix instructions (avx512_bf16 or amx_bf16) in this CPU"
    )
    flops_s = usable * _clock_hz() * _flops_per_cycle(flags)
    notes.append(f"speed: about {flops_s / 1e9:.0f} GFLOP/s, from clock and vector width")
    gpu, about_gpu = _usable_gpu()
    notes.append(about_gpu)
    speeds = (flops_s, flops_s * _bf16_speed_up(flags))
    c_kernels = kernels_library() is not None
    notes.append(f"C kernels: {'' if c_kernels else 'none '}compiled and used")
    memory = (total_bytes, available_bytes)
    return Machine(*memory, usable, fast, *speeds, c_kernels, limit, gpu, tuple(notes))


# ---------------------------------------------------------------------------------------------
# GPUs

_QUERY = "--query-gpu=index,name,memory.total,memory.free,uuid"
_QUERY_TIMEOUT_S = 10  # without a persistent driver the first answer takes seconds


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES allows this process, in its order; () where there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:  # found without a child: to make one of a large process takes milliseconds
        return ()
    command = [program, _QUERY, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [gpu for line in done.stdout.splitlines() if (gpu := _gpu(line)) is not None]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(gpus)
    visible = []
    for word in map(str.strip, wanted.split(",")):
        named = [g for g in gpus if word == str(g.index) or (word[4:] and g.uuid.startswith(word))]
        if not named:
            break  # CUDA, too, ignores everything from the first unknown name on
        visible.append(named[0])
    return tuple(visible)


def _gpu(line: str) -> Gpu | None:
    """One line of the query's answer; None where a size is "[N/A]": the GPU shares the RAM."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != 5 or not all(words[i].isdecimal() for i in (0, 2, 3)):
        return None
    index, name, total_mib, free_mib, uuid = words
    return Gpu(int(index), name, int(total_mib) << 20, int(free_mib) << 20, uuid)


def torch_has_cuda() -> bool:
    """Whether the installed PyTorch is built for CUDA, as its version file says: importing PyTorch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = read_text(Path(spec.origin).with_name("version.py"))
    version = re.search(r"^cuda\b[^=\n]*=\s*(\S+)", text, re.MULTILINE)
    return version is not None and version[1] != "None"


def _usable_gpu() -> tuple[Gpu | None, str]:
    """(the GPU that a run would use, a note for the user)."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        shared = format_bytes(mps_limit_bytes())
        return None, f"GPU: it shares the RAM and may take {shared} of it; edgezo uses the CPU"
    gpus = nvidia_gpus()
    if not gpus:
        return None, "GPU: nvidia-smi shows none to this process"
    gpu = gpus[0]
    if not torch_has_cuda():
        return None, f"GPU: {gpu.name}, not used: the installed PyTorch is for CPUs only"
    free, total = format_bytes(gpu.available_bytes), format_bytes(gpu.total_bytes)
    return gpu, f"GPU: {gpu.name}, {free} of its {total} free"


def mps_limit_bytes() -> int:
    """Bytes of the RAM that the GPU of an Apple machine may take (MPS): what ``sysctl`` sets, else Metal's default.

    The default is two thirds of a RAM of up to 36 GiB, and three quarters of a larger one.
    """
    command = ["sysctl", "-n", "iogpu.wired_limit_mb"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S)
        if (limit_mb := int(done.stdout)) > 0:  # 0 where it is not set
            return limit_mb << 20
    total_bytes = psutil.virtual_memory().total
    return total_bytes * 3 // 4 if total_bytes > 36 << 30 else total_bytes * 2 // 3


def _affinity_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """The CPU's features by ``/proc/cpuinfo``; empty where there is no such file."""
    for line in read_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def bf16_fast(root: Path = ROOT) -> bool:
    """Whether ``/proc/cpuinfo`` lists avx512_bf16 or amx_bf16; False also where there is no such file."""
    return not BF16_FLAGS.isdisjoint(cpu_flags(root))


def _clock_hz() -> float:
    """The CPU's highest clock; 2.5 GHz where it is not known."""
    try:
        clock = psutil.cpu_freq()
    except (OSError, RuntimeError):  # some systems and containers do not tell
        clock = None
    clock_mhz = (clock.max or clock.current) if clock is not None else 0
    return 1e6 * clock_mhz if clock_mhz > 100 else 2.5e9


def _flops_per_cycle(flags: frozenset[str]) -> int:
    """fp32 operations of one core in a cycle: two fused multiply-adds of a vector."""
    return 64 if "avx512f" in flags else 32 if "avx2" in flags else 16


def _bf16_speed_up(flags: frozenset[str]) -> int:
    """How much faster bf16 products are than fp32 ones, as measured with AMX and with AVX-512 alone."""
    return 5 if "amx_bf16" in flags else 2


def kernels_library(root: Path = ROOT) -> Path | None:
    """The compiled kernels.c; None where the package was built without it or this CPU is not faster with it."""
    file = Path(__file__).with_name("_kernels.so")
    if os.environ.get("EDGEZO_KERNELS") == "0" or not file.exists():
        return None
    # Without AVX2 its loops are narrower than torch's.
    slow = platform.machine() == "x86_64" and "avx2" not in cpu_flags(root)
    return None if slow else file


def cgroup_memory(root: Path = ROOT) -> CgroupMemory | None:
    """The control group with the least memory available, of version 2, version 1 or both; None: no limit."""
    levels: list[CgroupMemory] = []
    for version, directories in _cgroup_directories(root, "memory"):
        read = _memory_v2 if version == 2 else _memory_v1
        levels.extend(level for d in directories if (level := read(d)) is not None)
    return min(levels, key=lambda level: level.available_bytes, default=None)


def cgroup_cpu_quota(root: Path = ROOT) -> float | None:
    """How many cores' time this process may use: the least of its control groups; None: no quota."""
    quotas: list[float] = []
    for version, directories in _cgroup_directories(root, "cpu"):
        for d in directories:
            if version == 2:
                words = read_text(d / "cpu.max").split()
            else:
                words = [read_text(d / f"cpu.cfs_{w}_us").strip() for w in ("quota", "period")]
            if len(words) == 2 and all(w.isdecimal() and int(w) > 0 for w in words):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cgroup_peak_bytes(root: Path = ROOT) -> int | None:
    """The most memory that this process's control group has held, its page cache and other processes included.

    None where the kernel does not tell: version 2 does since Linux 5.19, but not for the root group.
    """
    for version, directories in _cgroup_directories(root, "memory"):
        name = "memory.peak" if version == 2 else "memory.max_usage_in_bytes"
        for d in directories:
            if (peak_bytes := _number(d / name)) is not None:
                return peak_bytes
    return None


def cgroup_oom_kills(root: Path = ROOT) -> int | None:
    """Processes of this process's control group that were killed for memory; None where the kernel does not tell."""
    for version, directories in _cgroup_directories(root, "memory"):
        for d in directories:
            file = d / ("memory.events" if version == 2 else "memory.oom_control")
            if (kills := _table(file).get("oom_kill")) is not None:
                return kills
    return None


# Version 1 reports 2**63, rounded down to a page, where there is no limit.
_NO_LIMIT_BYTES = 1 << 60


def _memory_v2(directory: Path) -> CgroupMemory | None:
    # Going above memory.high does not kill a process, but slows it down until it is useless.
    limits = [_number(directory / name) for name in ("memory.max", "memory.high")]
    return _level(directory, limits, "memory.current", prefix="")


def _memory_v1(directory: Path) -> CgroupMemory | None:
    stat = _table(directory / "memory.stat")
    # The hierarchical limit includes those of parents that a container cannot see.
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
    """(version, directory of this process's group and its parents up to the mount) of each tree with ``controller``.

    Hybrid hosts mount both versions, and only one of the two has the controller's files.
    """
    mounts = _cgroup_mounts(root)
    trees = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        key = controller if names else ""
        if key not in mounts:
            continue
        mounted, mount_point = mounts[key]
        # A container without a cgroup namespace reads the host's path here, but has only a part of the tree mounted.
        # A path outside of that part stands for the mount itself.
        prefix = mounted.rstrip("/")
        inside = path.removeprefix(prefix) if f"{path}/".startswith(f"{prefix}/") else "/"
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:
            parts = []
        top = root / mount_point.lstrip("/")
        levels = [top.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]
        trees.append((1 if names else 2, [d for d in levels if d.is_dir()]))
    return trees


def _cgroup_mounts(root: Path) -> dict[str, tuple[str, str]]:
    """Controller of version 1, or "" for version 2 -> (part of the tree that is mounted, mount point)."""
    mounts: dict[str, tuple[str, str]] = {}
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        mount, separator, file_system = line.partition(" - ")
        fields, kinds = mount.split(), file_system.split()
        if not separator or len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2":
            mounts.setdefault("", (fields[3], fields[4]))
        elif kinds[0] == "cgroup":
            for name in kinds[2].split(","):
                mounts.setdefault(name, (fields[3], fields[4]))
    return mounts


# ---------------------------------------------------------------------------------------------
# Small files of the kernel


def read_text(path: Path) -> str:
    """The text of a file, or "" where it is absent or must not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in read_text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
