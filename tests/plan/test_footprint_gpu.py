"""Plans for a machine with a GPU, none of which is needed for them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgezo.data.token_stats import TokenStats
from edgezo.errors import UsageError
from edgezo.machine.hardware import Gpu
from edgezo.network.cards import cards
from edgezo.plan.budget import portable
from edgezo.plan.config import RunConfig
from edgezo.plan.plan import Plan, PlanDoesNotFit
from edgezo.plan.planner import make_plan
from edgezo.plan.request import from_toml, make_config

MB = 1_000_000
SMOL, LARGE = "smollm2-135m-instruct", "smollm2-1.7b-instruct"
SST2 = TokenStats("label", (70, 69, 66, *[60] * 61), 1, 2)
GPU = Gpu(0, "NVIDIA H100 80GB HBM3", 85_000 * MB, 84_000 * MB, "GPU-1")
CPU_ONLY = SimpleNamespace(
    total_bytes=64_000 * MB,
    available_bytes=60_000 * MB,
    cores=16,
    bf16_fast=False,
    flops_s=1e12,
    bf16_flops_s=2e12,
    c_kernels=False,
    gpu=None,
)
MACHINE = SimpleNamespace(**{**vars(CPU_ONLY), "gpu": GPU})


def request(**asked: object) -> RunConfig:
    return make_config({"model": SMOL, "task": "sst2", **asked})


def plan(model: str = SMOL, machine: object = MACHINE, **asked: object) -> Plan:
    return make_plan(cards()[model], request(model=model, **asked), machine, SST2)


def item(planned: Plan, name: str) -> int:
    return sum(i.bytes for i in planned.items if i.name == name)


def test_the_gpu_is_used_where_there_is_one_and_the_process_is_not_counted_on_it():
    planned = plan()
    assert (planned.device, planned.residency, planned.compute_dtype) == (
        "cuda",
        "resident",
        "bf16",
    )
    assert planned.max_mem_bytes == GPU.available_bytes - GPU.total_bytes // 10 or (
        planned.max_mem_bytes == GPU.available_bytes * 8 // 10
    )
    assert item(planned, "base process") == 0 < item(planned, "CUDA context")
    assert plan(precision="fp32").compute_dtype == "fp32"
    assert planned.settle(request()).device == "cuda"


def test_without_one_or_where_the_cpu_is_asked_for_the_plan_is_that_of_the_cpu():
    cap = {"max_mem_bytes": 2000 * MB}
    planned = plan(machine=CPU_ONLY, **cap)
    assert planned.device == "cpu"
    assert plan(device="cpu", **cap).items == planned.items
    assert plan(residency="disk", **cap).device == "cpu"


@pytest.mark.parametrize("asked", [{"device": "cuda"}, {"residency": "host"}])
def test_a_gpu_that_is_asked_for_has_to_be_there(asked):
    with pytest.raises(UsageError, match="--device cpu"):
        plan(machine=CPU_ONLY, **asked)


def test_blocks_that_do_not_fit_lie_in_the_ram_and_as_many_as_fit_do_not():
    asked = {"precision": "bf16", "train": "full", "micro_batch": 4}
    resident = plan(LARGE, **asked)
    assert (resident.residency, resident.host_bytes) == ("resident", 0)
    least = plan(LARGE, **asked, residency="host")
    assert (least.blocks_in_host, least.blocks_on_disk, least.disk_bytes) == (24, 0, 0)
    block = 3 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
    assert 24 * block < least.host_bytes < 24 * 1.01 * block
    assert 2 * block < item(least, "slots") < 2.02 * block
    previous = 25
    for cap in range(least.needed_bytes, resident.needed_bytes, 100 * MB):
        planned = plan(LARGE, **asked, max_mem_bytes=cap)
        assert planned.residency == "host" and planned.needed_bytes <= cap
        assert planned.blocks_in_host <= previous, "more memory never sends more away"
        previous = planned.blocks_in_host
    assert previous < 4
    reason = next(d.reason for d in least.decisions if d.name == "residency")
    assert "reads at least" in reason and "writes" in reason


def test_blocks_that_the_ram_has_no_room_for_are_refused():
    little = SimpleNamespace(**{**vars(MACHINE), "available_bytes": 3000 * MB})
    with pytest.raises(PlanDoesNotFit, match="of RAM"):
        plan(LARGE, little, precision="bf16", train="full", residency="host")


def test_a_refusal_speaks_of_the_gpu():
    with pytest.raises(PlanDoesNotFit) as caught:
        plan(max_mem_bytes=300 * MB)
    assert "CUDA context" in str(caught.value) and "disk" not in str(caught.value)


@given(low=st.integers(600, 6000), more=st.integers(0, 4000))
@settings(deadline=None, max_examples=40)
def test_more_memory_never_gives_less(low, more):
    def rank(cap: int) -> tuple[int, bool, int]:
        try:
            planned = plan(LARGE, max_mem_bytes=cap * MB)
        except PlanDoesNotFit as error:
            assert error.smallest_bytes > cap * MB
            return (-1, False, 0)
        assert planned.needed_bytes <= cap * MB
        order = ("int4", "int8", "bf16")
        return (
            order.index(planned.precision),
            planned.residency == "resident",
            planned.micro_batch,
        )

    assert rank(low) <= rank(low + more)


def test_a_run_of_a_gpu_can_be_read_without_one():
    run = request(device="cuda", residency="host", max_mem_bytes=3000 * MB)
    planned = portable(run, CPU_ONLY)
    assert (planned.device, planned.residency, planned.max_mem_bytes) == ("cpu", None, None)
    assert portable(run, MACHINE) == run


def test_a_run_from_before_devices_is_one_of_the_cpu():
    text = replace(request(), device="auto").to_toml()
    assert from_toml(text).device == "auto"
    before = "".join(line + "\n" for line in text.splitlines() if not line.startswith("device"))
    assert from_toml(before).device == "cpu"


def test_a_plan_for_a_gpu_imports_no_torch(tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '0, NVIDIA H100, 81559, 81078, GPU-1'\n")
    script.chmod(0o755)
    code = (
        "import os, sys\n"
        f"os.environ['PATH'] = {str(tmp_path)!r} + os.pathsep + os.environ['PATH']\n"
        "os.environ.pop('CUDA_VISIBLE_DEVICES', None)\n"
        "from edgezo.cli import main as cli\n"
        "from edgezo.machine import hardware as machine\n"
        "machine.torch_has_cuda = lambda: True\n"
        f"code = cli.run(['plan', '--model', {SMOL!r}, '--json'])\n"
        "assert code == 0 and 'torch' not in sys.modules, (code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"device": "cuda"' in done.stdout
