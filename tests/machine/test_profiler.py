"""The profiler with a simulated clock and memory, and in whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import tree

from edgezo.machine import hardware as machine
from edgezo.machine import profiler
from edgezo.machine.ownership import claim
from edgezo.machine.process_memory import Resident
from edgezo.machine.profiler import MAX_SHARE, Profiler
from edgezo.run import short_memory

MB = 1_000_000
PHASES = {"import", "load", "forward", "update", "eval", "save"}
PEAKS = ("peak_rss_bytes", "peak_anon_bytes", "peak_file_bytes")


class World:
    """Simulated time, CPU time and memory, which only move when a test moves them. A reading costs ``cost_s``."""

    def __init__(self, cost_s: float = 0.0) -> None:
        self.now_s = self.cpu_s = 0.0
        self.cost_s = cost_s
        self.held = Resident(5 * MB, 3 * MB, 2 * MB)
        self.readings_s: list[float] = []

    def read(self) -> Resident:
        self.readings_s.append(self.now_s)
        self.cpu_s += self.cost_s
        return self.held

    def hold(self, anon_mb: int, file_mb: int = 0) -> None:
        self.held = Resident((anon_mb + file_mb) * MB, anon_mb * MB, file_mb * MB)

    def profiler(self, **more: int) -> Profiler:
        return Profiler(clock=lambda: self.now_s, cpu=lambda: self.cpu_s, read=self.read, **more)

    def watch(self, sampler: Profiler, end_s: float) -> None:
        """Do what the profiler's thread does until ``end_s``."""

        def wait(timeout_s: float) -> bool:
            self.now_s += timeout_s
            return self.now_s >= end_s

        sampler._ended = SimpleNamespace(wait=wait)  # type: ignore[assignment]
        sampler._watch()


# --- phases ------------------------------------------------------------------------------------


def test_phases_nest_and_each_has_its_own_time_and_peak():
    world = World()
    sampler = world.profiler()
    sampler.enter("update")
    world.now_s += 1.0
    world.hold(100, 10)
    sampler.sample()
    sampler.enter("save")
    world.now_s += 0.25
    world.hold(40, 60)
    sampler.sample()
    sampler.leave()
    world.hold(30)
    world.now_s += 2.0
    sampler.leave()
    world.now_s += 4.0
    phases = sampler.phases()
    assert {n: p["spent_s"] for n, p in phases.items()} == {"other": 4, "update": 3, "save": 0.25}
    assert [phases["update"][name] for name in PEAKS] == [110 * MB, 100 * MB, 10 * MB]
    assert [phases["save"][name] for name in PEAKS] == [100 * MB, 40 * MB, 60 * MB]
    assert phases["other"]["peak_rss_bytes"] == 30 * MB
    assert all(p["entries"] == 1 for p in phases.values())


def test_a_phase_ends_where_its_block_ends_however_that_ends(monkeypatch):
    sampler = World().profiler()
    monkeypatch.setattr(profiler, "_running", sampler)

    @profiler.phase("save")
    def save() -> None:
        raise OSError

    for _ in range(3):
        with profiler.phase("update"), pytest.raises(OSError):
            save()
        assert sampler._stack == ["other"]
    assert {n: p["entries"] for n, p in sampler.phases().items()} == {
        "other": 1,
        "update": 3,
        "save": 3,
    }


def test_a_phase_that_no_thread_sees_has_a_peak():
    world = World()
    sampler = world.profiler()
    for name in PHASES:
        sampler.enter(name)
        sampler.leave()
    assert all(p["peak_rss_bytes"] == 5 * MB for p in sampler.phases().values())


def test_without_a_profiler_a_phase_is_nothing_and_profiling_does_not_nest():
    with profiler.phase("forward"):
        assert profiler.running() is None
    with profiler.profiling(False):
        assert profiler.running() is None
    with profiler.profiling(True):
        outer = profiler.running()
        with profiler.profiling(True):
            assert profiler.running() is outer is not None
        assert profiler.running() is outer
    assert profiler.running() is None
    assert not outer._thread.is_alive()


# --- samples -----------------------------------------------------------------------------------


def test_samples_stay_within_their_memory_and_keep_the_highest():
    world = World()
    sampler = world.profiler(max_samples=16)
    sampler.enter("forward")
    for number in range(1000):
        world.now_s += profiler.INTERVAL_S
        world.hold(900 if number == 777 else 100 + number % 7)
        sampler.sample()
    report = sampler.report()
    samples = report["samples"]
    assert {len(column) for column in samples.values()} == {len(samples["t_s"])}
    assert 4 <= len(samples["t_s"]) <= 16
    assert samples["t_s"] == sorted(samples["t_s"])
    assert samples["t_s"][-1] > 0.9 * world.now_s and samples["t_s"][0] < 0.1 * world.now_s
    assert max(samples["rss_bytes"]) == 900 * MB
    assert samples["phase"][-1] == "forward"
    doublings = report["interval_s"] / profiler.INTERVAL_S
    assert doublings >= 1000 / 16 and doublings == 2 ** (int(doublings).bit_length() - 1)


def test_phases_that_turn_faster_than_the_interval_do_not_fill_the_curve():
    world = World()
    sampler = world.profiler(max_samples=64)
    for _ in range(200):
        sampler.enter("forward")
        world.now_s += profiler.INTERVAL_S / 20
        sampler.leave()
    report = sampler.report()
    assert len(report["samples"]["t_s"]) <= 2 * 200 / 20 + 1
    assert report["interval_s"] == profiler.INTERVAL_S
    assert report["phases"]["forward"]["entries"] == 200


# --- what it costs -----------------------------------------------------------------------------


def test_cheap_samples_are_taken_at_the_interval():
    world = World(cost_s=20e-6)
    sampler = world.profiler()
    world.watch(sampler, 1.0)
    assert len(world.readings_s) == pytest.approx(1.0 / profiler.INTERVAL_S, abs=2)
    assert sampler.interval_s == profiler.INTERVAL_S


@pytest.mark.parametrize("cost_s", [0.5e-3, 2e-3, 20e-3])
def test_dear_samples_are_taken_less_often_and_stay_within_their_share(cost_s):
    world = World(cost_s)
    sampler = world.profiler()
    world.watch(sampler, 60.0)
    taken = len(world.readings_s)
    assert taken == pytest.approx(60.0 * MAX_SHARE / cost_s, rel=0.2, abs=2)
    for number, at_s in enumerate(world.readings_s[1:], 2):  # the first one shows what they cost
        assert number * cost_s <= MAX_SHARE * at_s * (1 + 1e-9)
    overhead = sampler.report()["overhead"]
    assert overhead["cpu_s"] == pytest.approx(len(world.readings_s) * cost_s)
    assert overhead["share"] <= MAX_SHARE * (1 + 1e-9)


def test_samples_at_the_turn_of_a_phase_are_in_the_share():
    world = World(cost_s=1e-3)
    sampler = world.profiler()
    for _ in range(10_000):
        sampler.enter("forward")
        world.now_s += 1e-3
        sampler.leave()
    assert (
        len(world.readings_s) <= MAX_SHARE * world.now_s / world.cost_s + 2
    )  # one a phase is free
    assert sampler.phases()["forward"]["spent_s"] == pytest.approx(10.0)


# --- the group and the device --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "peak_bytes"),
    [
        (
            {
                "proc/self/cgroup": "0::/user.slice/run.scope\n",
                "proc/self/mountinfo": "25 24 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
                "sys/fs/cgroup/user.slice/run.scope/memory.peak": "700\n",
                "sys/fs/cgroup/user.slice/memory.peak": "9000\n",
            },
            700,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/jobs\n0::/\n",
                "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup c rw,memory\n",
                "sys/fs/cgroup/memory/jobs/memory.max_usage_in_bytes": "800\n",
            },
            800,
        ),
        (
            {  # a kernel without memory.peak
                "proc/self/cgroup": "0::/\n",
                "proc/self/mountinfo": "25 24 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
                "sys/fs/cgroup/memory.max": "max\n",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_the_group_s_own_peak_is_read_where_the_kernel_keeps_it(files, peak_bytes, tmp_path):
    assert machine.cgroup_peak_bytes(tree(tmp_path, files)) == peak_bytes


def test_cuda_s_peak_goes_to_the_phase_that_raised_it(monkeypatch):
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        max_memory_reserved=lambda: 0,
        memory_reserved=lambda: 0,
        max_memory_allocated=lambda: 50,
        memory_allocated=lambda: 40,
    )
    monkeypatch.setitem(sys.modules, "torch.cuda", cuda)
    world = World()
    sampler = world.profiler()
    sampler.enter("forward")
    cuda.max_memory_reserved, cuda.memory_reserved = (lambda: 900), (lambda: 100)
    sampler.leave()
    sampler.enter("update")
    sampler.leave()
    report = sampler.report()
    assert report["phases"]["forward"]["cuda_reserved_bytes"] == 900
    assert report["phases"]["update"]["cuda_reserved_bytes"] == 100
    assert report["phases"]["update"]["cuda_allocated_bytes"] == 40
    assert report["cuda_peak_allocated_bytes"] == 50
    assert report["cuda_peak_reserved_bytes"] == 900


def test_cuda_that_is_not_there_or_not_yet_used_is_left_out(monkeypatch):
    for half_imported in (
        SimpleNamespace(),
        SimpleNamespace(is_initialized=lambda: False),
        None,
    ):
        monkeypatch.setitem(sys.modules, "torch.cuda", half_imported)
        report = World().profiler().report()
        assert report["cuda_peak_reserved_bytes"] is None
        assert "cuda_reserved_bytes" not in report["phases"]["other"]


def test_the_profiler_does_not_import_torch_or_numpy():
    code = (
        "import sys, edgezo.machine.profiler\n"
        "with edgezo.machine.profiler.profiling(True):\n"
        "    edgezo.machine.profiler.running().report()\n"
        "bad = {'torch', 'numpy'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# --- runs --------------------------------------------------------------------------------------


def check_profile(report: dict) -> None:
    assert set(report) == {
        "interval_s",
        "elapsed_s",
        "process_cpu_s",
        "samples",
        "phases",
        "overhead",
        "peak_rss_bytes",
        "cgroup_peak_bytes",
        "cuda_peak_reserved_bytes",
        "cuda_peak_allocated_bytes",
    }
    samples = report["samples"]
    assert set(samples) == {"t_s", "phase", "rss_bytes", "anon_bytes", "file_bytes"}
    assert len({len(column) for column in samples.values()}) == 1 and samples["t_s"]
    assert set(samples["phase"]) <= set(report["phases"]) <= PHASES | {"fit", "other"}
    assert 0 < report["overhead"]["cpu_s"] and 0 < report["overhead"]["share"] < 1
    assert report["elapsed_s"] >= sum(p["spent_s"] for p in report["phases"].values()) * 0.999
    # Since Linux 6.2 the kernel's peak may lag: three counters (anonymous, file and shared pages), each by under
    # max(32, 2 x cores) pages on every core (mm/percpu_counter.c), where a reading sums them exactly since 6.17.
    cores = os.cpu_count() or 1
    limit_bytes = report["peak_rss_bytes"] + 3 * max(32, 2 * cores) * cores * os.sysconf(
        "SC_PAGE_SIZE"
    )
    assert max(samples["rss_bytes"]) <= limit_bytes
    for name, figures in report["phases"].items():
        assert 0 < figures["peak_rss_bytes"] <= limit_bytes, name
        assert figures["peak_anon_bytes"] > 0 and figures["entries"] > 0, name


def test_a_profiled_run_has_every_phase_with_a_peak_below_the_kernel_s(
    bench, edgezo_json, tmp_path
):
    run, plain = tmp_path / "run", tmp_path / "plain"
    args = bench.arguments(train="lowrank+head", steps=6, snapshot_every=2)
    code, summary = edgezo_json("finetune", *args, "--out", run, "--profile")
    assert code == 0
    report = json.loads((run / "profile.json").read_text())
    check_profile(report)
    assert set(report["phases"]) >= PHASES
    assert set(summary["phases"]) >= PHASES
    assert report["phases"]["update"]["entries"] == 6
    assert report["phases"]["save"]["entries"] == 4  # three snapshots, and the end
    code, other = edgezo_json("finetune", *args, "--out", plain)
    assert code == 0 and "phases" not in other and not (plain / "profile.json").exists()
    assert other["trained_sha256"] == summary["trained_sha256"]
    assert (run / "journal.bin").read_bytes() == (plain / "journal.bin").read_bytes()


def test_every_run_ends_with_planned_measured_inference_and_cap(bench, edgezo, tmp_path):
    run = tmp_path / "run"
    code, out, _ = edgezo("finetune", *bench.arguments(out=run))
    assert code == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["load_peak_rss_bytes"] <= summary["inference_peak_rss_bytes"]
    assert summary["inference_peak_rss_bytes"] <= summary["peak_rss_bytes"]
    last = " ".join(out[out.index("peak memory") :].split())
    ratio = summary["peak_rss_bytes"] / summary["inference_peak_rss_bytes"]
    for part in ("planned ", "measured ", f"{ratio:.2f} x inference ", "cap 8.00 GB kept"):
        assert part in last


def test_the_profile_of_a_run_that_the_guard_stops_is_written_and_a_resume_may_end_profiling(
    bench, edgezo, edgezo_json, monkeypatch, tmp_path
):
    run = tmp_path / "run"
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        real = short_memory.Guard
        late = lambda: 10**9 if next(calls) < 8 else 10**11  # noqa: E731
        patch.setattr(short_memory, "Guard", lambda cap, margin, **_: real(cap, margin, late))
        code, _, err = edgezo("finetune", *bench.arguments(steps=6, out=run), "--profile")
    assert code == 4 and "peak memory: planned" in err and " x inference " in err
    check_profile(json.loads((run / "profile.json").read_text()))
    first = (run / "profile.json").read_bytes()
    code, summary = edgezo_json("finetune", "--resume", "--out", run, "--no-profile")
    assert code == 0 and "phases" not in summary
    assert (run / "profile.json").read_bytes() == first
    code, again = edgezo_json("finetune", "--resume", "--out", run, "--profile")
    assert code == 0 and again == summary  # nothing was left to do, and so to profile
    assert (run / "profile.json").read_bytes() == first


def test_a_folder_in_the_place_of_the_profile_is_refused_before_the_run_begins(
    bench, edgezo, tmp_path
):
    run = tmp_path / "run"
    claim(run, "run")
    (run / "profile.json").mkdir()
    code, _, err = edgezo("finetune", *bench.arguments(out=run), "--profile")
    assert code == 1 and "profile.json" in err.replace("\n", "")
    assert not (run / "journal.bin").exists() and (run / "profile.json").is_dir()
