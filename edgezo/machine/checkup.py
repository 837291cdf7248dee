"""What ``edgezo doctor`` looks at beside PyTorch itself. Each function gives findings; a problem names its fix.

Nothing here imports torch, so that it works where torch is missing. Readers of ``/proc`` and ``/sys`` take the root of
the tree.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil

from edgezo.errors import EdgezoError
from edgezo.machine.downloads import cache_dir
from edgezo.machine.hardware import (
    ROOT,
    Machine,
    cgroup_oom_kills,
    cpu_flags,
    format_bytes,
    kernels_library,
    nvidia_gpus,
    read_text,
    torch_has_cuda,
)
from edgezo.machine.process_memory import allocator_policy
from edgezo.machine.rates import disk_rates
from edgezo.machine.surroundings import celsius, on_battery

Level = Literal["ok", "note", "problem"]

ENGINE_PACKAGES = {"torch": "torch", "onnx": "onnxruntime"}  # by the extra that brings an engine
SHOWN = ("torch", "transformers", "optimum-quanto", "accelerate")
# Features of a processor that products of matrices gain from: x86-64, then ARM.
FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "sve", "bf16", "i8mm"),
)  # fmt: skip
# A process of PyTorch's two builds, before anything is loaded (docs/index.md).
CUDA_BUILD_BYTES, CPU_BUILD_BYTES = 741_000_000, 390_000_000
# What the smallest bundled model takes to train in int4 is less, but the base process alone takes two thirds of this.
LEAST_MEMORY_BYTES = 600_000_000
LEAST_DISK_BYTES, LITTLE_DISK_BYTES = 500_000_000, 5_000_000_000
SAMPLE_S = 0.3  # for so long other programs are watched
BUSY_SHARE = 0.25
CPU_BUILD = (
    "install PyTorch's CPU build: the install page of pytorch.org gives the command for 'CPU'"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    about: str
    level: Level
    text: str
    fix: str = ""  # the command that mends it, or what to do
    figures: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the text says in words, for programs

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v not in ("", {})}


# ---------------------------------------------------------------------------------------------
# What is installed


def versions(edgezo_version: str) -> Iterator[Finding]:
    """Python, edgezo, and the packages that it needs."""
    known = {"python": platform.python_version(), "edgezo": edgezo_version}
    try:
        wanted = metadata.requires("edgezo") or []
    except metadata.PackageNotFoundError:
        wanted = [*SHOWN]
    for stated in wanted:
        if not _is_needed(stated):
            continue
        requirement = stated.partition(";")[0].strip()
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        install = f"{sys.executable} -m pip install '{requirement}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", "problem", f"{name} is not installed", install)
            continue
        if not _is_in_range(version, requirement):
            text = f"{name} {version} is installed, and edgezo needs {requirement}"
            yield Finding("packages", "problem", text, install)
        if name in SHOWN:
            known[name] = version
    shown = ", ".join(f"{name} {version}" for name, version in known.items())
    yield Finding("versions", "ok", shown, figures=known)


def _is_needed(requirement: str) -> bool:
    """Whether every process needs it, or an engine that is installed does."""
    extra = re.search(r"extra == ['\"](\w+)", requirement)
    engine = ENGINE_PACKAGES.get(extra[1]) if extra else None
    return extra is None or (engine is not None and find_spec(engine) is not None)


def _is_in_range(version: str, requirement: str) -> bool:
    try:
        from packaging.requirements import Requirement  # comes with transformers
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)


def torch_build() -> Finding:
    """Which build of PyTorch is installed, and what it costs here."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        text = "PyTorch is not installed: nothing can be trained, and its speed is not measured"
        return Finding("torch build", "problem", text, CPU_BUILD)
    plain, cuda, gpus = version.partition("+")[0], torch_has_cuda(), nvidia_gpus()
    figures = {"version": version, "cuda": cuda}
    reinstall = f"{sys.executable} -m pip install --force-reinstall --no-deps torch=={plain}"
    if cuda and not gpus:
        text = (
            f"torch {version} is built for CUDA, and no GPU can be used here: each process takes about "
            f"{format_bytes(CUDA_BUILD_BYTES)} before anything is loaded, and about "
            f"{format_bytes(CPU_BUILD_BYTES)} with the CPU build"
        )
        return Finding("torch build", "problem", text, CPU_BUILD, figures)
    if gpus and not cuda:
        text = f"torch {version} is built for CPUs, so the {gpus[0].name} is not used"
        return Finding("torch build", "note", text, reinstall, figures)
    kind = "CUDA" if cuda else "CPUs"
    return Finding("torch build", "ok", f"torch {version}, built for {kind}", figures=figures)


def quanto_reinstall() -> str:
    """The command that installs the version of optimum-quanto that edgezo is made for."""
    wanted = next(r for r in metadata.requires("edgezo") or [] if r.startswith("optimum-quanto"))
    return f"{sys.executable} -m pip install --force-reinstall --no-deps '{wanted}'"


def c_kernels(root: Path = ROOT) -> Finding:
    """Whether kernels.c is compiled for this machine. Whether it loads and is of this source is asked of kernels.py."""
    about = "C kernels"
    if os.environ.get("EDGEZO_KERNELS") == "0":
        return Finding(
            about,
            "note",
            "turned off by EDGEZO_KERNELS=0: steps are slower",
            "unset EDGEZO_KERNELS",
        )
    if not sys.platform.startswith("linux"):
        return Finding(about, "note", "they are made for Linux; PyTorch does their work, slower")
    if platform.machine() == "x86_64" and "avx2" not in cpu_flags(root):
        return Finding(
            about, "note", "this processor has no AVX2, without which PyTorch is as fast"
        )
    if kernels_library(root) is None:
        return Finding(
            about, "problem", "they are not compiled: steps are slower", compile_command()
        )
    return Finding(about, "ok", "compiled and used")


def compile_command() -> str:
    """The command that compiles kernels.c."""
    source = Path(__file__).parents[2]
    where = f"-e {source}" if (source / "pyproject.toml").exists() else "--force-reinstall edgezo"
    compiler = "" if shutil.which("cc") else "sudo apt-get install gcc && "
    return f"{compiler}{sys.executable} -m pip install --no-deps {where}"


# ---------------------------------------------------------------------------------------------
# The processor


def processor(machine: Machine, root: Path = ROOT) -> Finding:
    """Its name, cores and features."""
    text = read_text(root / "proc/cpuinfo")
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    features = [feature for feature in FEATURES if feature in cpu_flags(root)]
    named = name[1] if name else platform.processor() or platform.machine()
    shown = f"{named}, {machine.cores} cores to use, {' '.join(features) or 'no known features'}"
    figures = {"name": named, "cores": machine.cores, "features": features}
    return Finding("processor", "ok", shown, figures=figures)


def sensors() -> Finding:
    """What ``--max-temp`` and ``--when plugged-in`` can go by."""
    battery, heat = on_battery(), celsius()
    power = {None: "no battery", True: "on its battery", False: "a battery, on mains"}[battery]
    heat_text = "no temperature" if heat is None else f"{heat:.0f} C"
    options = [] if heat is not None else ["--max-temp is refused"]
    options += [] if battery is not None else ["--when plugged-in has no effect"]
    text = f"{heat_text}, {power}{': ' if options else ''}{', '.join(options)}"
    return Finding("sensors", "ok", text, figures={"celsius": heat, "on_battery": battery})


def threads(cores: int) -> Iterator[Finding]:
    """Environment variables that decide over threads, beside the cores that there are."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > cores:
            text = f"{name}={value} on {cores} cores: threads wait for each other, and steps take longer"
            yield Finding("threads", "problem", text, f"unset {name}")
        elif value:
            yield Finding("threads", "note", f"{name}={value}, of {cores} cores", f"unset {name}")


def neighbours() -> Finding:
    """What other programs compute, watched for a moment."""
    before = _cpu_seconds()
    psutil.cpu_percent()
    time.sleep(SAMPLE_S)
    share, after = psutil.cpu_percent() / 100, _cpu_seconds()
    used = {pid: now - before[pid][0] for pid, (now, _) in after.items() if pid in before}
    most = sorted(used, key=lambda pid: -used[pid])[:3]
    named = [
        f"{after[pid][1]} ({used[pid] / SAMPLE_S:.0%} of a core)"
        for pid in most
        if used[pid] >= SAMPLE_S / 10
    ]
    figures = {"share": round(share, 3)}
    if share < BUSY_SHARE:
        return Finding("other programs", "ok", f"they take {share:.0%} of the CPU", figures=figures)
    names = f" ({', '.join(named)})" if named else ""
    text = f"they take {share:.0%} of the CPU{names}; the rates below are of what is left"
    return Finding(
        "other programs", "note", text, "edgezo finetune --when idle waits for them", figures
    )


def _cpu_seconds() -> dict[int, tuple[float, str]]:
    """(seconds of CPU time, name) of each other process, by its id."""
    seconds = {}
    for process in psutil.process_iter(["cpu_times", "name"]):
        times = process.info["cpu_times"]
        if times is not None and process.pid != os.getpid():
            seconds[process.pid] = (times.user + times.system, str(process.info["name"]))
    return seconds


# ---------------------------------------------------------------------------------------------
# Memory


def memory(machine: Machine) -> Finding:
    """What there is, what limits it, and what is free."""
    free = format_bytes(machine.available_bytes)
    text = f"{format_bytes(machine.total_bytes)}, {free} of it free"
    figures = {"total_bytes": machine.total_bytes, "available_bytes": machine.available_bytes}
    if machine.cgroup is not None:
        text += f"; the control group {machine.cgroup.path} sets the limit"
        figures["cgroup_limit_bytes"] = machine.cgroup.limit_bytes
    if machine.available_bytes >= LEAST_MEMORY_BYTES:
        return Finding("memory", "ok", text, figures=figures)
    fix = "close other programs (ps -eo rss,comm --sort=-rss | head)"
    if machine.cgroup is not None:
        fix = "give the container more (docker update --memory 2g --memory-swap 2g CONTAINER), or close programs in it"
    least = f": the smallest model needs about {format_bytes(LEAST_MEMORY_BYTES)}"
    return Finding("memory", "problem", text + least, fix, figures)


def out_of_memory(root: Path = ROOT) -> Finding:
    """Processes that the kernel has killed for memory, of this control group and of the machine."""
    words = dict(line.split()[:2] for line in read_text(root / "proc/vmstat").splitlines() if line)
    every = int(words["oom_kill"]) if words.get("oom_kill", "").isdecimal() else None
    here = cgroup_oom_kills(root)
    figures = {"oom_kills": every, "cgroup_oom_kills": here}
    if not every and not here:
        text = "no process was killed for memory since the machine started"
        if every is None and here is None:
            text = "this system does not tell whether processes were killed for memory"
        return Finding("out of memory", "ok", text, figures=figures)
    killed = max(every or 0, here or 0)
    text = f"processes killed for memory since the machine started: {killed}, in this control group: {here or 0}"
    return Finding(
        "out of memory",
        "note",
        text,
        "sudo dmesg | grep -i 'killed process' names them; give a smaller --max-mem",
        figures,
    )


def swap() -> Finding:
    """Swap, and whether it is in use."""
    try:
        now = psutil.swap_memory()
    except (OSError, RuntimeError):
        return Finding("swap", "ok", "this system does not tell")
    figures = {"total_bytes": now.total, "used_bytes": now.used}
    if not now.total:
        return Finding(
            "swap",
            "ok",
            "none: a process that takes more memory than there is gets killed",
            figures=figures,
        )
    text = f"{format_bytes(now.used)} of {format_bytes(now.total)} in use"
    if now.used < now.total / 10:
        return Finding("swap", "ok", text, figures=figures)
    return Finding(
        "swap",
        "note",
        f"{text}: what is swapped out runs many times slower",
        "close programs, or give a smaller --max-mem",
        figures,
    )


def allocator() -> Finding:
    """What edgezo could set so that freed memory goes back to the system."""
    text = allocator_policy()
    if text.startswith("glibc"):
        return Finding("allocator", "ok", text)
    fix = "unset LD_PRELOAD" if "preloaded" in text else ""
    return Finding("allocator", "note", f"{text}; freed memory may stay with the process", fix)


# ---------------------------------------------------------------------------------------------
# Disks, GPUs


def disks() -> Iterator[Finding]:
    """Room and rate of the disks of the cache and of the current directory."""
    try:
        cache = cache_dir()
    except EdgezoError as problem:
        yield Finding("cache", "problem", str(problem), "export EDGEZO_CACHE=/a/directory")
    else:
        yield _disk("cache", cache, "export EDGEZO_CACHE=/a/directory/on/another/disk")
    yield _disk("current directory", Path.cwd(), "change to another directory, or give --out DIR")


def _disk(about: str, folder: Path, elsewhere: str) -> Finding:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        free_bytes = shutil.disk_usage(there).free
        rates = disk_rates(there)
    except OSError as problem:
        text = f"{folder} cannot be written: {problem.strerror or problem}"
        return Finding(about, "problem", text, elsewhere)
    figures = {"path": str(folder), "free_bytes": free_bytes, **rates._asdict()}
    text = (
        f"{folder}: {format_bytes(free_bytes)} free, writes {format_bytes(round(rates.write_bytes_s))}/s, "
        f"reads {format_bytes(round(rates.read_bytes_s))}/s"
    )
    if free_bytes < LEAST_DISK_BYTES:
        return Finding(about, "problem", text, f"free some space, or {elsewhere}", figures)
    level: Level = "note" if free_bytes < LITTLE_DISK_BYTES else "ok"
    fix = f"a model of 1.5 billion weights takes 3 GB: free some space, or {elsewhere}"
    return Finding(about, level, text, fix if level == "note" else "", figures)


def gpu(machine: Machine) -> Finding:
    """The GPU that a run would use, and its driver."""
    text = next(note for note in machine.notes if note.startswith("GPU: "))[5:]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = ""
    if machine.gpu is not None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            driver = done.stdout.strip().partition("\n")[0]
        except (OSError, subprocess.SubprocessError):
            pass
    figures = {"name": machine.gpu.name, "driver": driver} if machine.gpu is not None else {}
    return Finding("GPU", "ok", text + (f", driver {driver}" if driver else ""), figures=figures)
