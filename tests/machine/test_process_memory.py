"""The memory of a process: its readings, the meter, the guard and the allocator."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import tree

from edgezo.errors import BudgetExceeded
from edgezo.machine import process_memory
from edgezo.machine.process_memory import GROWN_BYTES, Guard, Heap, Meter

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
glibc = pytest.mark.skipif(process_memory._glibc() is None, reason="the C library is not glibc")
MB = 1_000_000


def in_subprocess(code: str, **environment: str) -> dict:
    """Run ``code`` in a fresh interpreter; returns the JSON object that it prints last."""
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


# --- this process ----------------------------------------------------------------------------


def test_status_sizes_are_in_bytes(tmp_path):
    text = (
        "Name:\tVmRSS: 9 kB\nVmHWM:\t  1616 kB\nVmRSS:\t    1600 kB\nRssAnon:\t 100 kB\n"
        "RssFile:\t 1400 kB\nRssShmem:\t 100 kB\nThreads:\t1\n"
    )
    root = tree(tmp_path, {"proc/self/status": text})
    assert process_memory.rss_bytes(root) == 1600 * 1024
    assert process_memory.resident(root) == (1600 * 1024, 100 * 1024, 1500 * 1024)


def test_without_proc_the_readings_come_from_psutil_and_resource(tmp_path):
    rss_bytes, peak_bytes = (
        process_memory.rss_bytes(tmp_path),
        process_memory.peak_rss_bytes(tmp_path),
    )
    assert rss_bytes > 5 * MB and peak_bytes >= rss_bytes
    assert process_memory.read_status(tmp_path) == {}
    whole = process_memory.resident(tmp_path)
    assert whole.file_bytes == 0 and whole.anon_bytes == whole.rss_bytes > 5 * MB
    assert not process_memory.reset_peak(tmp_path)


@linux
def test_an_allocation_raises_the_peak_by_its_size_and_stays_known_after_a_reset():
    out = in_subprocess(
        """
import json
from edgezo.machine import process_memory as memory
meter = memory.Meter(reset=True)
meter.mark("base")
block = bytearray(80_000_000)
del block
meter.mark("load")
block = bytearray(20_000_000)
anon = memory.resident().anon_bytes
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
from edgezo.machine import process_memory as memory
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
from edgezo.machine import process_memory as memory
policy = memory.allocator_policy() if sys.argv[1:] or POLICY else ""
import numpy as np
rng = np.random.default_rng(0)
before = memory.resident().anon_bytes
kept = []
for layer in range(12):
    layers = [np.ones(int(n), np.uint8) for n in rng.integers(300_000, 6_000_000, 12)]
    kept.append(np.ones(100_000, np.uint8))
    del layers
kept_bytes = sum(a.nbytes for a in kept)
grown = memory.resident().anon_bytes - before - kept_bytes
print(json.dumps({"grown": grown, "policy": policy}))
"""
    without = in_subprocess("POLICY = False\n" + code)
    with_policy = in_subprocess("POLICY = True\n" + code)
    assert "mmap threshold 128 KiB" in with_policy["policy"]
    assert with_policy["grown"] < 3 * MB
    assert without["grown"] > 4 * max(with_policy["grown"], MB), "the churn no longer shows it"


@glibc
def test_the_user_s_own_allocator_settings_are_left_alone():
    code = """
import json, os
from edgezo.machine import process_memory as memory
policy = memory.allocator_policy()
print(json.dumps({"policy": policy, "thp": os.environ.get("THP_MEM_ALLOC_ENABLE")}))
"""
    out = in_subprocess(code, MALLOC_MMAP_THRESHOLD_="65536", THP_MEM_ALLOC_ENABLE="0")
    assert "MALLOC_MMAP_THRESHOLD_=65536 kept" in out["policy"]
    assert "huge pages" not in out["policy"] and out["thp"] == "0"
    assert "2 arenas" in out["policy"]


def test_a_foreign_allocator_is_left_alone(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert "jemalloc" in process_memory.allocator_policy()


def test_a_system_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(process_memory, "_glibc", lambda: None)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert process_memory.allocator_policy() == "allocator left alone: not glibc"
    assert process_memory.malloc_trim() is False


def test_the_module_does_not_import_torch_or_numpy():
    out = in_subprocess(
        "import json, sys, edgezo.machine.process_memory, edgezo.machine.hardware\n"
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
    resident = [95 * MB]
    monkeypatch.setattr(
        process_memory, "malloc_trim", lambda: resident.__setitem__(0, 50 * MB) or True
    )
    Guard(100 * MB, 10 * MB, rss=lambda: resident[0]).check(40 * MB, "a layer")
    assert resident == [50 * MB]


@linux
def test_the_heap_is_emptied_of_holes_above_the_plan_and_not_before(monkeypatch):
    trimmed: list[int] = []
    monkeypatch.setattr(process_memory, "malloc_trim", lambda: trimmed.append(1))
    for resident, wanted in ((75, 0), (85, 1)):
        guard = Guard(100 * MB, 10 * MB, rss=lambda: resident * MB, planned_bytes=80 * MB)  # noqa: B023
        guard.check_again(5 * MB, "a layer")
        assert len(trimmed) == wanted


def test_a_process_that_asks_the_guard_never_crosses_its_cap():
    out = in_subprocess(
        """
import json
from edgezo.machine import process_memory as memory
from edgezo.errors import BudgetExceeded
cap = memory.rss_bytes() + 50_000_000
guard = memory.Guard(cap, 5_000_000)
blocks = []
try:
    while True:
        guard.check(8_000_000, "a block")
        blocks.append(bytearray(8_000_000))
except BudgetExceeded as error:
    message = str(error)
print(json.dumps({"blocks": len(blocks), "message": message, "cap": cap} | memory.Meter().summary()))
"""
    )
    assert out["blocks"] == 5 and "a block" in out["message"]
    assert out["peak_rss_bytes"] <= out["cap"]


@linux
@glibc
def test_temporaries_of_a_long_batch_are_given_back_and_those_of_a_short_one_kept():
    code = """
import json
from edgezo.machine.process_memory import Heap, allocator_policy, rss_bytes
allocator_policy()
import numpy as np
np.ones(1)
def grown(tokens):
    heap.expect(tokens)
    before = rss_bytes()
    arrays = [np.ones(4_000_000 // 8) for _ in range(8)]
    top = rss_bytes()
    arrays.clear()
    return top - before, rss_bytes() - before
heap = Heap(100, trims=True)
short, long = grown(100), grown(101)
before = rss_bytes()
with heap.updating():
    arrays = [np.ones(4_000_000 // 8) for _ in range(8)]
    top = rss_bytes() - before
    arrays.clear()
print(json.dumps({"short": short, "long": long, "update": (top, rss_bytes() - before)}))
"""
    out = in_subprocess(code)
    assert out["short"][0] > 30 * MB and out["short"][1] > 25 * MB, "kept for the next one"
    assert out["long"][0] > 30 * MB and out["long"][1] < 5 * MB, "what was kept is gone as well"
    assert out["update"][0] > 30 * MB and out["update"][1] < 5 * MB


@linux
@glibc
def test_holes_go_back_where_the_planned_peak_is_near():
    code = """
import json
import numpy as np
from edgezo.machine.process_memory import NEAR_BYTES, Heap, allocator_reuse, rss_bytes
np.ones(1)
allocator_reuse()
def left(spare):
    arrays = [np.ones(1_000_000 // 8) for _ in range(32)]
    kept = arrays[::2]  # every second array is a hole
    arrays.clear()
    before = rss_bytes()
    for heap in (Heap(100), Heap(100, planned_bytes=before + NEAR_BYTES + spare)):
        heap.keep_to_plan()
    return before - rss_bytes(), sum(map(len, kept))
print(json.dumps([left(2_000_000)[0], left(-2_000_000)[0]]))
"""
    far, near = in_subprocess(code)
    assert far < MB, "without need nothing is given back, nor where there is no plan"
    assert near > 12 * MB


@linux
@glibc
def test_fp32_products_of_any_number_of_rows_use_the_block_that_was_made_first():
    """Without ``keep_panel`` MKL kept one more for each of these numbers: 23 MB in all.

    With one thread: several divide the block among them, on some processors in another way for each number of rows.
    """
    kept, grown = in_subprocess(
        """
import json
import torch
from edgezo.machine.matmul import keep_panel, mm
from edgezo.machine.process_memory import malloc_trim, resident

def anon():
    malloc_trim()
    return resident().anon_bytes

torch.set_num_threads(1)
x, w = torch.zeros(1024, 1000), torch.zeros(1000, 3000)
y = torch.zeros(1024, 3000).fill_(1)
mm(x[:16, :8], w[:8, :8].contiguous())
start = anon()
keep_panel(3000)
kept = anon()
for n in (16, 48, 96, 192, 512, 1024):
    mm(x[:n], w, out=y[:n])
print(json.dumps([kept - start, anon() - kept]))
"""
    )
    assert kept < 16_000_000
    assert grown < 2_000_000


@pytest.mark.parametrize(
    ("before", "name", "call", "sets"),
    [
        ("", "load", "", True),
        ("", "finetune", "('model', 'data')", True),
        ("", "make_config", "", False),
        ("sys.modules['torch'] = None", "load", "", False),
    ],
)
def test_the_allocator_is_set_before_torch_is_imported(
    before: str, name: str, call: str, sets: bool
) -> None:
    program = (
        "import sys\n"
        "from edgezo.machine import process_memory\n"
        "def policy():\n"
        "    assert 'torch' not in sys.modules\n"
        "    raise SystemExit('set')\n"
        "process_memory.allocator_policy = policy\n"
        f"{before}\n"
        "import edgezo\n"
        "try:\n"
        f"    edgezo.{name}{call}\n"
        "except ImportError:\n"
        "    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stderr.strip() == "set") is sets, done.stderr


def test_between_blocks_there_is_room_for_what_the_next_one_maps(monkeypatch):
    trims: list[int] = []
    monkeypatch.setattr(process_memory, "rss_bytes", lambda: 60 * MB)
    monkeypatch.setattr(process_memory, "malloc_trim", lambda: trims.append(len(trims)))
    monkeypatch.setattr(process_memory, "allocator_reuse", lambda *_: True)
    heap = Heap(100, planned_bytes=100 * MB, block_bytes=50 * MB)
    for tokens, wanted in ((100, 0), (101, 2)):  # the first trim of the longer batch: it is mapped
        heap.expect(tokens)
        heap.keep_to_plan()
        assert len(trims) == wanted, tokens
    with heap.updating():
        trims.clear()
        heap.keep_to_plan()
    assert not trims, "tiles of an update lie in the heap"


def test_after_a_trim_the_process_must_grow_before_the_next_but_where_room_is_asked_for(
    monkeypatch,
):
    trims: list[int] = []
    held = [100 << 20]
    monkeypatch.setattr(process_memory, "rss_bytes", lambda: held[0])
    monkeypatch.setattr(process_memory, "malloc_trim", lambda: trims.append(len(trims)))
    heap = Heap(planned_bytes=100 << 20)
    for _ in range(8):
        heap.keep_to_plan()
    assert len(trims) == 1, "nothing went back, and nothing came"
    held[0] += GROWN_BYTES
    heap.keep_to_plan()
    heap.keep_to_plan()
    assert len(trims) == 2
    assert heap.make_room(1) == 0 and len(trims) == 3
    held[0] = 90 << 20
    assert heap.make_room(0) is None and Heap().make_room(1) is None
