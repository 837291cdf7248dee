"""Sizes; and the machine as psutil, nvidia-smi, /proc and /sys describe it."""

from __future__ import annotations

import os

import psutil
import pytest
from conftest import tree
from hypothesis import given
from hypothesis import strategies as st

from edgezo.errors import UsageError
from edgezo.machine import hardware as machine
from edgezo.machine.hardware import format_bytes, parse_bytes

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
    level = machine.cgroup_memory(root)
    assert level is not None
    assert (level.limit_bytes, level.usage_bytes) == (2_000_000_000, 900_000_000)
    assert level.reclaimable_bytes == 400_000_000
    assert level.available_bytes == 1_500_000_000
    assert level.path.endswith("user.slice")
    assert machine.cgroup_cpu_quota(root) == 1.5


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
    assert machine.cgroup_memory(root).available_bytes == 1500


def test_the_group_with_the_least_available_counts_not_the_lowest_limit(tmp_path):
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
    assert machine.cgroup_memory(root).available_bytes == 100


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
    assert machine.cgroup_memory(root) is None
    assert machine.cgroup_cpu_quota(root) is None
    files["sys/fs/cgroup/memory/jobs/x/memory.limit_in_bytes"] = "1000000000\n"
    files["sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us"] = "400000\n"
    root = tree(tmp_path, files)
    assert machine.cgroup_memory(root).available_bytes == 500_000_000
    assert machine.cgroup_cpu_quota(root) == 4


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
    assert machine.cgroup_memory(root).limit_bytes == 4_096_000


@pytest.mark.parametrize(
    ("mounted", "group"),
    [
        ("/docker/abc", "/docker/abc"),  # no namespace: the host's path, part of the tree mounted
        ("/docker/abc", "/docker/abcdef"),  # another group with a like name
        ("/", "/../../elsewhere"),  # outside of the namespace
        ("/", "/gone"),  # moved after the mount
    ],
)
def test_a_container_finds_its_limit_at_the_mount(tmp_path, mounted, group):
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": f"4:memory:{group}\n",
            "proc/self/mountinfo": V1_MOUNT.format(root=mounted),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "8192\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "192\n",
        },
    )
    assert machine.cgroup_memory(root).available_bytes == 8000


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
    assert machine.cgroup_memory(root).available_bytes == 0


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
    assert machine.cgroup_memory(root) is None
    assert machine.cgroup_cpu_quota(root) is None
    assert not machine.bf16_fast(root)


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
    assert machine.bf16_fast(tree(tmp_path, {"proc/cpuinfo": info})) is fast


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
    limited = machine.machine(root)
    assert (limited.total_bytes, limited.available_bytes) == (30_000_000, 20_000_000)
    assert limited.cores == 1 and limited.bf16_fast
    assert any("30.0 MB" in note for note in limited.notes)
    (root / "sys/fs/cgroup/memory.max").write_text(f"{ram * 4}\n")
    free = machine.machine(root)
    assert free.total_bytes == ram and free.cgroup is None


def test_this_machine_can_be_read():
    this = machine.machine()
    assert 0 < this.available_bytes <= this.total_bytes
    assert 1 <= this.cores <= (os.cpu_count() or 1)


# ---------------------------------------------------------------------------------------------
# GPUs

TWO_GPUS = """0, NVIDIA H100 80GB HBM3, 81559, 81078, GPU-11111111-aaaa
1, NVIDIA A2, 15356, 14000, GPU-22222222-bbbb
2, NVIDIA GB10, [N/A], [N/A], GPU-33333333-cccc
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A fake nvidia-smi on the PATH that prints what it is given, and a PyTorch that would use its GPUs."""

    def give(text: str, status: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    return give


def test_gpus_are_what_nvidia_smi_says(smi):
    smi(TWO_GPUS)
    first, second = machine.nvidia_gpus()
    assert (first.index, first.name, first.total_bytes) == (0, "NVIDIA H100 80GB HBM3", 81559 << 20)
    assert second.available_bytes == 14000 << 20
    computer = machine.machine()
    assert computer.gpu == first
    assert any("H100" in note for note in computer.notes)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-22222222-bbbb", [1]),
        ("GPU-2", [1]),
        ("", []),
        ("-1", []),
        ("0,7,1", [0]),
        ("GPU-", []),
    ],
)
def test_only_visible_gpus_count_in_their_order(smi, monkeypatch, visible, indices):
    smi(TWO_GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in machine.nvidia_gpus()] == indices


@pytest.mark.parametrize("text", ["", "No devices were found\n", "0, H100, lots, of, it\n"])
def test_an_answer_that_is_none_gives_no_gpu(smi, text):
    smi(text)
    assert machine.machine().gpu is None


def test_an_nvidia_smi_that_fails_or_is_not_there_gives_no_gpu(smi, monkeypatch, tmp_path):
    smi(TWO_GPUS, status=9)
    assert machine.nvidia_gpus() == ()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine.nvidia_gpus() == ()


def test_a_gpu_that_pytorch_is_not_built_for_is_named_and_not_used(smi, monkeypatch):
    smi(TWO_GPUS)
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: False)
    computer = machine.machine()
    assert computer.gpu is None
    assert any("H100" in note and "CPUs only" in note for note in computer.notes)


def test_what_pytorch_is_built_for_is_known_without_importing_it():
    import torch

    assert machine.torch_has_cuda() == (torch.version.cuda is not None)


@pytest.mark.parametrize(
    ("answer", "ram_bytes", "share_bytes"),
    [
        ("echo 12000", 16 << 30, 12000 << 20),
        ("echo 0", 18 << 30, 12 << 30),
        ("echo 0", 64 << 30, 48 << 30),
        ("exit 1", 18 << 30, 12 << 30),
    ],
)
def test_what_an_apple_gpu_may_take_of_the_ram(
    monkeypatch, tmp_path, answer, ram_bytes, share_bytes
):
    script = tmp_path / "sysctl"
    script.write_text(f'#!/bin/sh\n[ "$2" = iogpu.wired_limit_mb ] && {answer}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    ram = psutil.virtual_memory()._replace(total=ram_bytes)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: ram)
    assert machine.mps_limit_bytes() == share_bytes
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    gpu, note = machine._usable_gpu()
    assert gpu is None and format_bytes(share_bytes) in note
