"""Sizes, the machine as /proc and /sys describe it, the meter, the guard and the allocator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgezo import memory
from edgezo.errors import BudgetExceeded, UsageError
from edgezo.memory import Guard, Meter, format_bytes, parse_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
glibc = pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc")
MB = 1_000_000


def in_subprocess(code: str, **environment: str) -> dict:
    """Run `code` in a fresh interpreter; the JSON object that it prints last."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "THP_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**clean, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("12GB", 12_000_000_000),
        ("12GiB", 12 * 1024**3),
        ("12Gi", 12 * 1024**3),
        ("700MB", 700_000_000),
        ("700mb", 700_000_000),
        ("1.5g", 1_500_000_000),
        (".5G", 500_000_000),
        ("1.G", 1_000_000_000),
        (" 2 GB ", 2_000_000_000),
        ("64K", 64_000),
        ("64KiB", 65_536),
        ("0.1MiB", 104_857),
        ("2TB", 2 * 10**12),
        ("1tib", 1024**4),
        ("700000000", 700_000_000),
        ("512B", 512),
        (700_000_000, 700_000_000),
        ("1.005GB", 1_005_000_000),  # 1.005 * 10**9 in floats is 1004999999.99...
    ],
)
def test_a_size_is_read_as_people_write_it(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "GB",
            "12XB",
            "12 G B",
            "1,5GB",
            "1_000",
            "50%",
            "12GB/s",
            "1.5",
            "1e9",
            "nan",
            "inf",
        ),
        *("-1GB", -1, 0, "0", "0.0000000001KB", "9" * 5000 + "GB", True, None, 1.5),
        "\N{ARABIC-INDIC DIGIT THREE}GB",
    ],
)
def test_anything_else_is_a_usage_error_that_names_the_accepted_forms(text):
    with pytest.raises(UsageError, match=r"12GB.*GiB") as caught:
        parse_bytes(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (999_949, "999.9 KB"),
        (999_999, "1.0 MB"),
        (700_000_000, "700.0 MB"),
        (999_999_999, "1.00 GB"),
        (12_345_000_000, "12.35 GB"),
        (5 * 10**12, "5.00 TB"),
        (-4_000_000, "-4.0 MB"),
    ],
)
def test_a_size_is_printed_in_the_units_that_are_read(n_bytes, text):
    assert format_bytes(n_bytes) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_what_is_printed_reads_back_within_its_rounding(n_bytes):
    assert parse_bytes(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.05)


# --- trees of /proc and /sys on disk ---------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2_MOUNT = (
    "24 1 0:22 / /sys rw,nosuid - sysfs sysfs rw\n"
    "25 24 0:23 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
)
V1_MOUNT = (
    "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw shared:10 - cgroup none rw,memory\n"
)
V1_NONE = "9223372036854771712\n"  # no limit, on 4 KiB pages
V1_NONE_64K = "9223372036854710272\n"  # on 64 KiB pages


def test_a_version_2_limit_of_a_parent_counts(tmp_path):
    "The slice above is limited, the group itself is not: the slice's limit holds."
    slice_ = "sys/fs/cgroup/user.slice"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/run.scope\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/", at="/sys/fs/cgroup"),
            f"{slice_}/run.scope/memory.max": "max\n",
            f"{slice_}/run.scope/memory.high": "max\n",
            f"{slice_}/run.scope/memory.current": "1000\n",
            f"{slice_}/memory.max": "2000000000\n",
            f"{slice_}/memory.current": "900000000\n",
            f"{slice_}/memory.stat": "anon 500\ninactive_file 300000000\nactive_file 100000000\n",
            f"{slice_}/cpu.max": "150000 100000\n",
            f"{slice_}/run.scope/cpu.max": "max 100000\n",
        },
    )
    level = memory.cgroup_memory(root)
    assert level is not None
    assert (level.limit_bytes, level.usage_bytes) == (2_000_000_000, 900_000_000)
    assert level.reclaimable_bytes == 400_000_000
    assert level.available_bytes == 1_500_000_000
    assert level.path.endswith("user.slice")
    assert memory.cgroup_cpu_quota(root) == 1.5


def test_memory_high_is_a_limit_too(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/", at="/sys/fs/cgroup"),
            "sys/fs/cgroup/memory.max": "3000\n",
            "sys/fs/cgroup/memory.high": "2000\n",
            "sys/fs/cgroup/memory.current": "500\n",
        },
    )
    assert memory.cgroup_memory(root).available_bytes == 1500


def test_the_level_with_the_least_left_wins_not_the_lowest_limit(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/", at="/sys/fs/cgroup"),
            "sys/fs/cgroup/a/b/memory.max": "1000\n",
            "sys/fs/cgroup/a/b/memory.current": "100\n",
            "sys/fs/cgroup/a/memory.max": "5000\n",
            "sys/fs/cgroup/a/memory.current": "4900\n",
        },
    )
    assert memory.cgroup_memory(root).available_bytes == 100


@pytest.mark.parametrize("none", [V1_NONE, V1_NONE_64K])
def test_a_hybrid_host_is_read_from_version_1_and_its_sentinel_is_no_limit(tmp_path, none):
    "systemd's version 2 tree has no memory files here; the memory controller is version 1."
    files = {
        "proc/self/cgroup": "4:memory:/jobs/x\n1:cpu,cpuacct:/jobs\n9:name=systemd:/\n0::/u\n",
        "proc/self/mountinfo": V1_MOUNT.format(root="/")
        + V2_MOUNT.format(root="/", at="/sys/fs/cgroup/unified"),
        "sys/fs/cgroup/unified/u/cgroup.procs": "1\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": none,
        "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": none,
        "sys/fs/cgroup/memory/jobs/x/memory.limit_in_bytes": none,
        "sys/fs/cgroup/memory/jobs/x/memory.usage_in_bytes": "600000000\n",
        "sys/fs/cgroup/memory/jobs/x/memory.stat": (
            f"cache 7\ninactive_file 1\nhierarchical_memory_limit {none}"
            "total_inactive_file 50000000\ntotal_active_file 50000000\n"
        ),
        "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us": "100000\n",
    }
    root = tree(tmp_path, files)
    assert memory.cgroup_memory(root) is None
    assert memory.cgroup_cpu_quota(root) is None
    files["sys/fs/cgroup/memory/jobs/x/memory.limit_in_bytes"] = "1000000000\n"
    files["sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us"] = "400000\n"
    root = tree(tmp_path, files)
    assert memory.cgroup_memory(root).available_bytes == 500_000_000
    assert memory.cgroup_cpu_quota(root) == 4


def test_a_limit_above_the_container_s_view_is_seen_in_version_1(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n",
            "proc/self/mountinfo": V1_MOUNT.format(root="/"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "10\n",
            "sys/fs/cgroup/memory/memory.stat": "hierarchical_memory_limit 4096000\n",
        },
    )
    assert memory.cgroup_memory(root).limit_bytes == 4_096_000


@pytest.mark.parametrize(
    ("mounted", "own"),
    [
        ("/docker/abc", "/docker/abc"),  # no namespace: the host's path, part of the tree mounted
        ("/docker/abc", "/docker/abcdef"),  # another group with a like name
        ("/", "/../../elsewhere"),  # outside of the namespace
        ("/", "/gone"),  # moved after the mount
    ],
)
def test_a_container_finds_its_limit_at_the_mount(tmp_path, mounted, own):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": f"4:memory:{own}\n",
            "proc/self/mountinfo": V1_MOUNT.format(root=mounted),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "8192\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "192\n",
        },
    )
    assert memory.cgroup_memory(root).available_bytes == 8000


def test_usage_over_the_limit_leaves_nothing_rather_than_less_than_nothing(tmp_path):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/", at="/sys/fs/cgroup"),
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "1500\n",
        },
    )
    assert memory.cgroup_memory(root).available_bytes == 0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/\n"},
        {"proc/self/cgroup": "garbage\n\n:::\n", "proc/self/mountinfo": "x\n - \n1 2 - cgroup\n"},
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/", at="/sys/fs/cgroup"),
            "sys/fs/cgroup/memory.max": "\n",
            "sys/fs/cgroup/cpu.max": "max\n",
        },
    ],
)
def test_a_tree_that_says_nothing_means_no_limit(tmp_path, files):
    root = tree(tmp_path, files)
    assert memory.cgroup_memory(root) is None
    assert memory.cgroup_cpu_quota(root) is None
    assert not memory.bf16_fast(root)
    assert memory.read_status(root) == {}


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("fpu avx2 avx512f avx512_bf16 amx_tile", True),
        ("fpu amx_bf16 amx_tile", True),
        ("fpu avx2 avx512f avx512bw avx512_vnni", False),
    ],
)
def test_bf16_is_fast_where_the_cpu_has_the_instructions(tmp_path, flags, fast):
    info = f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\nbugs\t\t: avx512_bf16\n"
    assert memory.bf16_fast(tree(tmp_path, {"proc/cpuinfo": info})) is fast


def test_the_machine_takes_the_smaller_of_ram_and_group(tmp_path):
    ram = psutil.virtual_memory().total
    root = tree(
        tmp_path,
        {
            "proc/cpuinfo": "flags : amx_bf16\n",
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/", at="/sys/fs/cgroup"),
            "sys/fs/cgroup/memory.max": "30000000\n",
            "sys/fs/cgroup/memory.current": "10000000\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
    )
    limited = memory.machine(root)
    assert (limited.total_bytes, limited.available_bytes) == (30_000_000, 20_000_000)
    assert limited.cores == 1 and limited.bf16_fast
    assert any("30.0 MB" in note for note in limited.notes)
    (root / "sys/fs/cgroup/memory.max").write_text(f"{ram * 4}\n")
    free = memory.machine(root)
    assert free.total_bytes == ram and free.cgroup is None


def test_this_machine_can_be_read():
    here = memory.machine()
    assert 0 < here.available_bytes <= here.total_bytes
    assert 1 <= here.cores <= (os.cpu_count() or 1)


def test_status_sizes_are_in_bytes(tmp_path):
    text = (
        "Name:\tVmRSS: 9 kB\nVmHWM:\t  1616 kB\nVmRSS:\t    1600 kB\nRssAnon:\t 100 kB\n"
        "RssFile:\t 1400 kB\nRssShmem:\t 100 kB\nThreads:\t1\n"
    )
    root = tree(tmp_path, {"proc/self/status": text})
    assert memory.rss_bytes(root) == 1600 * 1024
    assert memory.anon_file_bytes(root) == (100 * 1024, 1500 * 1024)


def test_without_proc_the_readings_come_from_psutil_and_resource(tmp_path):
    rss_bytes, peak_bytes = memory.rss_bytes(tmp_path), memory.peak_rss_bytes(tmp_path)
    assert rss_bytes > 5 * MB and peak_bytes >= rss_bytes
    assert memory.anon_file_bytes(tmp_path)[1] == 0
    assert not memory.reset_peak(tmp_path)


# --- this process ----------------------------------------------------------------------------


@linux
def test_an_allocation_raises_the_peak_by_its_size_and_stays_known_after_a_reset():
    out = in_subprocess(
        """
import json
from edgezo import memory
meter = memory.Meter(reset=True)
meter.mark("base")
block = bytearray(80_000_000)
del block
meter.mark("load")
block = bytearray(20_000_000)
anon = memory.anon_file_bytes()[0]
meter.mark("run")
can = memory.reset_peak()
print(json.dumps(meter.summary() | {"can": can, "anon_in_run": anon}))
"""
    )
    near = pytest.approx
    assert out["can"]
    assert out["load_peak_rss_bytes"] - out["base_rss_bytes"] == near(80 * MB, abs=2 * MB)
    assert out["load_rss_bytes"] - out["base_rss_bytes"] == near(0, abs=2 * MB)
    assert out["run_peak_rss_bytes"] - out["load_rss_bytes"] == near(20 * MB, abs=2 * MB)
    assert out["peak_rss_bytes"] == out["load_peak_rss_bytes"]
    assert out["anon_in_run"] > 20 * MB


@linux
def test_without_a_reset_a_program_outside_sees_the_same_peak_as_the_meter():
    out = in_subprocess(
        """
import json, pathlib
from edgezo import memory
meter = memory.Meter()
meter.mark("base")
block = bytearray(60_000_000)
del block
meter.mark("load")
meter.mark("run")
kernel = memory.read_status()["VmHWM"]
print(json.dumps(meter.summary() | {"kernel": kernel}))
"""
    )
    assert out["kernel"] == pytest.approx(out["peak_rss_bytes"], abs=MB)
    assert out["load_peak_rss_bytes"] - out["base_rss_bytes"] == pytest.approx(60 * MB, abs=2 * MB)
    assert out["base_peak_rss_bytes"] < out["run_peak_rss_bytes"]


def test_a_phase_that_comes_back_keeps_its_highest_peak():
    meter = Meter()
    first = meter.mark("eval")
    second = meter.mark("eval")
    assert [phase.name for phase in meter.phases] == ["eval"]
    assert second.peak_rss_bytes >= first.peak_rss_bytes
    assert meter.summary()["peak_rss_bytes"] >= second.rss_bytes


@glibc
def test_the_allocator_policy_gives_the_memory_of_freed_layers_back():
    "The same churn of layer-sized blocks with small survivors between them, with and without."
    code = """
import json, sys
from edgezo import memory
said = memory.allocator_policy() if sys.argv[1:] or POLICY else ""
import numpy as np
rng = np.random.default_rng(0)
before = memory.anon_file_bytes()[0]
kept = []
for layer in range(12):
    layers = [np.ones(int(n), np.uint8) for n in rng.integers(300_000, 6_000_000, 12)]
    kept.append(np.ones(100_000, np.uint8))
    del layers
kept_bytes = sum(a.nbytes for a in kept)
grown = memory.anon_file_bytes()[0] - before - kept_bytes
print(json.dumps({"grown": grown, "said": said}))
"""
    without = in_subprocess("POLICY = False\n" + code)
    with_policy = in_subprocess("POLICY = True\n" + code)
    assert "mmap threshold 128 KiB" in with_policy["said"]
    assert with_policy["grown"] < 3 * MB
    assert without["grown"] > 4 * max(with_policy["grown"], MB), "the churn no longer shows it"


@glibc
def test_the_user_s_own_allocator_settings_are_left_alone():
    code = """
import json, os
from edgezo import memory
said = memory.allocator_policy()
print(json.dumps({"said": said, "thp": os.environ.get("THP_MEM_ALLOC_ENABLE")}))
"""
    out = in_subprocess(code, MALLOC_MMAP_THRESHOLD_="65536", THP_MEM_ALLOC_ENABLE="0")
    assert "MALLOC_MMAP_THRESHOLD_=65536 kept" in out["said"]
    assert "huge pages" not in out["said"] and out["thp"] == "0"
    assert "2 arenas" in out["said"]


def test_a_foreign_allocator_is_left_alone(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert "jemalloc" in memory.allocator_policy()


def test_a_system_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert memory.allocator_policy() == "allocator left alone: not glibc"
    assert memory.malloc_trim() is False


def test_the_module_does_not_import_torch_or_numpy():
    out = in_subprocess(
        "import json, sys, edgezo.memory\n"
        "print(json.dumps({m: m in sys.modules for m in ('torch', 'numpy')}))"
    )
    assert out == {"torch": False, "numpy": False}


# --- the guard -------------------------------------------------------------------------------


def test_the_guard_allows_exactly_up_to_cap_minus_margin():
    guard = Guard(100 * MB, 10 * MB, rss=lambda: 60 * MB)
    assert guard.room_bytes() == 30 * MB
    guard.check(30 * MB, "logits")
    with pytest.raises(BudgetExceeded):
        guard.check(30 * MB + 1, "logits")


def test_the_guard_s_message_names_the_item_the_numbers_and_the_way_on():
    guard = Guard(700 * MB, 16 * MB, rss=lambda: 650 * MB)
    with pytest.raises(BudgetExceeded) as caught:
        guard.check(40 * MB, "the logits of 8 rows")
    message = str(caught.value)
    for part in ("the logits of 8 rows", "40.0 MB", "650.0 MB", "700.0 MB", "6.0 MB too much"):
        assert part in message
    assert "--resume and --max-mem 706MB" in message
    assert caught.value.exit_code == 4
    Guard(706 * MB, 16 * MB, rss=lambda: 650 * MB).check(40 * MB, "the logits of 8 rows")


def test_the_guard_hands_free_heap_back_before_it_gives_up(monkeypatch):
    held = [95 * MB]
    monkeypatch.setattr(memory, "malloc_trim", lambda: held.__setitem__(0, 50 * MB) or True)
    Guard(100 * MB, 10 * MB, rss=lambda: held[0]).check(40 * MB, "a layer")
    assert held == [50 * MB]


@linux
def test_a_process_that_asks_the_guard_never_crosses_its_cap():
    out = in_subprocess(
        """
import json
from edgezo import memory
from edgezo.errors import BudgetExceeded
cap = memory.rss_bytes() + 50_000_000
guard = memory.Guard(cap, 5_000_000)
blocks = []
try:
    while True:
        guard.check(8_000_000, "a block")
        blocks.append(bytearray(8_000_000))
except BudgetExceeded as error:
    said = str(error)
print(json.dumps({"blocks": len(blocks), "said": said, "cap": cap} | memory.Meter().summary()))
"""
    )
    assert out["blocks"] == 5 and "a block" in out["said"]
    assert out["peak_rss_bytes"] <= out["cap"]
