"""edgezo doctor: each finding in words, each problem with its fix, nothing left behind, and no need of torch."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import tree

from edgezo.cli import doctor
from edgezo.machine import checkup, rates
from edgezo.machine.checkup import Finding
from edgezo.machine.hardware import CgroupMemory, Gpu, Machine, cgroup_oom_kills
from edgezo.weights import quantisation_check

LEVELS = {"ok", "note", "problem"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small measurements."""
    monkeypatch.setattr(rates, "SHAPE", (16, 64, 64))
    monkeypatch.setattr(rates, "LEAST_S", 0.0)
    monkeypatch.setattr(rates, "MOVED_BYTES", 1 << 20)
    monkeypatch.setattr(checkup, "SAMPLE_S", 0.01)


def test_every_finding_has_a_level_and_every_problem_a_fix_and_nothing_is_left(
    quick, own_cache, edgezo, edgezo_json, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    before = sorted(own_cache.rglob("*"))
    code, found = edgezo_json("doctor")
    findings = found["findings"]
    assert {f["level"] for f in findings} <= LEVELS
    problems = [f for f in findings if f["level"] == "problem"]
    assert code == (len(problems) > 0) == (found["problems"] > 0)
    assert all(f["fix"] for f in problems)
    about = {f["about"]: f for f in findings}
    assert {
        "versions",
        "torch build",
        "processor",
        "products",
        "memory speed",
        "quantisation",
    } <= set(about)
    assert {"memory", "out of memory", "swap", "allocator", "cache", "GPU", "C kernels"} <= set(
        about
    )
    assert about["quantisation"]["level"] == "ok"
    assert about["products"]["figures"]["fp32_flops_s"] > 0
    assert about["versions"]["figures"]["torch"] == metadata.version("torch")
    assert not list(tmp_path.iterdir()) and sorted(own_cache.rglob("*")) == before
    _, out, _ = edgezo("doctor")
    assert all(name in out for name in about)


def test_without_torch_the_rest_is_still_looked_at(
    quick, edgezo_json, monkeypatch, own_cache, tmp_path
):
    monkeypatch.chdir(tmp_path)
    version = metadata.version

    def without(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found = edgezo_json("doctor")
    texts = [f"{f['about']}: {f['text']} {f.get('fix', '')}" for f in found["findings"]]
    assert code == 1 and found["problems"] == 2
    assert any("PyTorch is not installed" in text and "CPU build" in text for text in texts)
    assert any(text.startswith("current directory: ") for text in texts)
    assert not any("could not be looked at" in text for text in texts)


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(
    quick, edgezo_json, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)

    def broken() -> Finding:
        raise ZeroDivisionError("of a sensor")

    monkeypatch.setattr(checkup, "swap", broken)
    _, found = edgezo_json("doctor")
    texts = {f["about"]: f["text"] for f in found["findings"]}
    assert texts["swap"] == "this could not be looked at: ZeroDivisionError: of a sensor"
    assert "memory" in texts and "GPU" in texts


# ------------------------------------------------------------------------------ in words

GPU = Gpu(0, "H100", 80 << 30, 79 << 30, "GPU-1")
LIMIT = CgroupMemory(500_000_000, 100_000_000, 0, "/sys/fs/cgroup/box")


def machine(**changes: Any) -> Machine:
    usual: dict[str, Any] = {"total_bytes": 8 * 10**9, "available_bytes": 6 * 10**9, "cores": 2}
    usual |= {"bf16_fast": False, "flops_s": 1e11, "bf16_flops_s": 2e11, "c_kernels": True}
    usual |= {"cgroup": None, "gpu": None, "notes": ("GPU: none",)}
    return Machine(**usual | changes)


def only(result: Any) -> Finding:
    """The one finding that is not ok, or the last one."""
    findings = [result] if isinstance(result, Finding) else list(result)
    return next((f for f in findings if f.level != "ok"), findings[-1])


def with_swap(used: int) -> Any:
    return lambda: SimpleNamespace(total=10**9, used=used)


# name -> (what is changed: (owner, attribute, value); the check; level; words; words of the fix)
STATES: dict[str, tuple[list[tuple[Any, str, Any]], Any, str, str, str]] = {
    "a CUDA build without a GPU": (
        [(checkup, "torch_has_cuda", lambda: True), (checkup, "nvidia_gpus", lambda: ())],
        checkup.torch_build, "problem", "741.0 MB", "CPU build",
    ),
    "a GPU and a CPU build": (
        [(checkup, "torch_has_cuda", lambda: False), (checkup, "nvidia_gpus", lambda: (GPU,))],
        checkup.torch_build, "note", "the H100 is not used", "pip install --force-reinstall",
    ),
    "a package too old": (
        [(metadata, "version", lambda name: "0.1")],
        lambda: checkup.versions("1"), "problem", "0.1 is installed, and edgezo needs", "pip install '",
    ),
    "no kernels": (
        [(checkup, "kernels_library", lambda root: None), (checkup, "cpu_flags", lambda root: {"avx2"})],
        checkup.c_kernels, "problem", "not compiled", "pip install --no-deps",
    ),
    "more threads than cores": (
        [("env", "OMP_NUM_THREADS", "64")],
        lambda: checkup.threads(2), "problem", "64 on 2 cores", "unset OMP_NUM_THREADS",
    ),
    "no sensors": (
        [(checkup, "on_battery", lambda: None), (checkup, "celsius", lambda: None)],
        checkup.sensors, "ok", "no temperature, no battery: --max-temp is refused", "",
    ),
    "sensors": (
        [(checkup, "on_battery", lambda: False), (checkup, "celsius", lambda: 54.0)],
        checkup.sensors, "ok", "54 C, a battery, on mains", "",
    ),
    "fewer threads than cores": (
        [("env", "OMP_NUM_THREADS", "1")],
        lambda: checkup.threads(2), "note", "=1, of 2 cores", "unset OMP_NUM_THREADS",
    ),
    "kernels turned off": (
        [("env", "EDGEZO_KERNELS", "0")], checkup.c_kernels, "note", "turned off", "unset EDGEZO_KERNELS",
    ),
    "a small container": (
        [], lambda: checkup.memory(machine(available_bytes=4 * 10**8, cgroup=LIMIT)),
        "problem", "the control group /sys/fs/cgroup/box", "docker update",
    ),
    "little memory": (
        [], lambda: checkup.memory(machine(available_bytes=10**8)), "problem", "100.0 MB of it free", "ps -eo",
    ),
    "swap in use": (
        [(psutil, "swap_memory", with_swap(6 * 10**8))], checkup.swap, "note", "600.0 MB of 1.00 GB", "--max-mem",
    ),
    "swap that is free": ([(psutil, "swap_memory", with_swap(0))], checkup.swap, "ok", "0 B of", ""),
    "another allocator": (
        [("env", "LD_PRELOAD", "/usr/lib/libjemalloc.so.2")], checkup.allocator, "note", "jemalloc", "unset LD_PRELOAD",
    ),
    "a full disk": (
        [(checkup.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))],
        checkup.disks, "problem", "100.0 MB free", "EDGEZO_CACHE",
    ),
    "a busy machine": (
        [(psutil, "cpu_percent", lambda: 80.0), (checkup, "SAMPLE_S", 0.01)],
        checkup.neighbours, "note", "80% of the CPU", "--when idle",
    ),
    "slow bf16": (
        [(doctor, "cpu_flags", lambda: frozenset({"avx2"}))],
        lambda: doctor._products({"fp32": 133e9, "bf16": 1.7e9, "int8": 1.7e9}),
        "note", "fp32 133, bf16 1.7, int8 1.7 GFLOP/s. This processor has no instructions for bf16, and "
        "PyTorch's bf16 products are 78 x slower", "",
    ),
    "bf16 that ought to be fast": (
        [(doctor, "cpu_flags", lambda: frozenset({"amx_bf16"}))],
        lambda: doctor._products({"fp32": 133e9, "bf16": 1.7e9}), "note", "though", "--precision fp32",
    ),
    "fast bf16": ([], lambda: doctor._products({"fp32": 1e11, "bf16": 3e11}), "ok", "bf16 300", ""),
    "another quanto": (
        [(quantisation_check, "disagreement", lambda: "int8 codes differ")],
        doctor._quantisation, "problem", "int8 codes differ", "optimum-quanto",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_the_machine_is_told_in_words(name, monkeypatch, own_cache):
    changes, check, level, words, fix = STATES[name]
    for owner, attribute, value in changes:
        if owner == "env":
            monkeypatch.setenv(attribute, value)
        else:
            monkeypatch.setattr(owner, attribute, value)
    found = only(check())
    assert (found.level, words in found.text, fix in found.fix) == (level, True, True), found


VMSTAT = {"proc/vmstat": "nr_free_pages 5\noom_kill 3\n"}
V2 = {
    "proc/self/mountinfo": "25 24 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "proc/self/cgroup": "0::/box\n",
    "sys/fs/cgroup/box/memory.events": "low 0\nmax 9\noom 2\noom_kill 2\n",
}
V1 = {
    "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup none rw,memory\n",
    "proc/self/cgroup": "4:memory:/box\n",
    "sys/fs/cgroup/memory/box/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
}


@pytest.mark.parametrize(
    ("files", "here", "words"),
    [
        ({}, None, "does not tell"),
        (VMSTAT, None, "started: 3, in this control group: 0"),
        (VMSTAT | V2, 2, "started: 3, in this control group: 2"),
        (V1, 1, "in this control group: 1"),
        ({"proc/vmstat": "oom_kill 0\n"}, None, "no process was killed"),
    ],
)
def test_processes_that_were_killed_for_memory_are_counted(files, here, words, tmp_path):
    root = tree(tmp_path, files)
    found = checkup.out_of_memory(root)
    assert words in found.text and (found.level == "note") is ("started:" in found.text)
    assert cgroup_oom_kills(root) == here


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkup, "disk_rates", refuse)
    found = checkup._disk("cache", tmp_path / "none" / "deep", "export EDGEZO_CACHE=X")
    assert (
        found.level == "problem"
        and "Permission denied" in found.text
        and "EDGEZO_CACHE" in found.fix
    )


def test_a_quanto_with_other_codes_is_noticed(monkeypatch):
    import optimum.quanto as quanto

    class Other(quanto.AbsmaxOptimizer):
        def optimize(self, base: Any, qtype: Any, axis: Any = None) -> Any:
            return super().optimize(base, qtype, axis) * 1.5

    assert quantisation_check.disagreement() == ""
    monkeypatch.setattr(
        quantisation_check.Int8, "quantise", lambda weight: quantised(weight, Other())
    )
    assert "int8 codes of edgezo and of optimum-quanto differ" in quantisation_check.disagreement()


def quantised(weight: Any, optimizer: Any) -> Any:
    import optimum.quanto as quanto

    from edgezo.weights.layouts import Int8

    scale = optimizer(weight, quanto.qint8, 0)
    return Int8((weight / scale).round().clamp(-128, 127).char(), scale)
