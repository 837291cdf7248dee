"""A run on a GPU that is none (fake_gpu.py): what it copies, what it waits for, and what it does at the cap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bench, make_model
from fake_gpu import FakeGpu, There

from edgezo.errors import BudgetExceeded
from edgezo.machine import hardware
from edgezo.machine.gpu_figures import REFERENCE_CARD
from edgezo.machine.hardware import Gpu
from edgezo.plan.request import make_config
from edgezo.run.step import Stepper
from edgezo.run.train import finetune
from edgezo.weights import ram
from edgezo.zo import noise

MB = 1_000_000
CARD = Gpu(0, "NVIDIA GeForce RTX 4080 Laptop GPU", 12_000 * MB, 11_000 * MB, "GPU-1")


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench with a model of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return Bench(make_model(folder / "model", num_hidden_layers=4), bench.data)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setattr(hardware, "_usable_gpu", lambda: (CARD, f"GPU: {CARD.name}"))
    monkeypatch.setattr(noise, "_MAKERS", {"cpu": noise._on_cpu, "cuda": _made_there})
    with FakeGpu(CARD.total_bytes).installed() as made:
        yield made


def _made_there(*address: Any) -> torch.Tensor:
    """Noise as a GPU makes it (test_noise_on_devices.py has its bits), with no copy; faster than by torch."""
    *where, rows, width, _ = address
    rows = rows.here if isinstance(rows, There) else rows
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        made = noise._on_cpu(*where, rows, width, noise.CPU)
    return FakeGpu.current.wrap(made)


def run_of(deep: Bench, out: Path, kind: str = "label", **changes: Any) -> dict[str, Any]:
    request = {"device": "cuda", "max_mem_bytes": 4000 * MB, "eval_limit": 2, **changes}
    return finetune(make_config(deep.settings(kind, out=str(out), **request)))


def watched(gpu: FakeGpu, patch: pytest.MonkeyPatch) -> list[tuple[list[str], list[int]]]:
    """Of each step from now on: what the process waited for, and the bytes of each copy to the GPU."""
    steps: list[tuple[list[str], list[int]]] = []
    real = Stepper.step

    def step(self: Stepper, *args: Any) -> Any:
        waits, uploads = len(gpu.waits), len(gpu.uploads)
        record = real(self, *args)
        steps.append((gpu.waits[waits:], gpu.uploads[uploads:]))
        return record

    patch.setattr(Stepper, "step", step)
    return steps


def test_a_step_waits_once_and_copies_no_noise(deep, tmp_path, gpu, monkeypatch):
    steps = watched(gpu, monkeypatch)
    run_of(deep, tmp_path / "run", train="lowrank+head", steps=3, batch_size=4, micro_batch=2)
    assert steps
    for waits, uploads in steps:
        assert len(waits) == 1, waits
        assert max(uploads) < 4000


@pytest.mark.parametrize("kind", ["completion", "choice"])
def test_losses_are_added_up_there(deep, tmp_path, gpu, monkeypatch, kind):
    steps = watched(gpu, monkeypatch)
    request = {"train": "lowrank+head", "precision": "fp32", "steps": 2, "batch_size": 4}
    there = run_of(deep, tmp_path / "gpu", kind, **request)
    assert all(len(waits) == 1 for waits, _ in steps)
    here = run_of(deep, tmp_path / "cpu", kind, **request, device="cpu")
    for name in ("loss_first", "loss_last"):
        assert there[name] == pytest.approx(here[name], rel=2e-5)


# ---------------------------------------------------------------------------------------------
# The allocator's limit

REQUEST = {"train": "lowrank", "precision": "fp32", "steps": 3, "batch_size": 4, "seed": 3}
WITH_ROOM: dict[int, dict[str, Any]] = {}  # summaries by micro-batch, each made once


def _reserved(gpu: FakeGpu, deep: Bench, out: Path, micro_batch: int) -> tuple[int, dict[str, Any]]:
    """What a run with room reserves at most, and its summary."""
    if micro_batch not in WITH_ROOM:
        WITH_ROOM[micro_batch] = run_of(deep, out, **REQUEST, micro_batch=micro_batch)
    summary = WITH_ROOM[micro_batch]
    return summary["cuda_peak_reserved_bytes"], summary


def test_a_cap_is_what_is_reserved_with_the_context(deep, tmp_path, gpu):
    reserved, summary = _reserved(gpu, deep, tmp_path / "run", 4)
    assert summary["cuda_peak_bytes"] == reserved + summary["cuda_context_bytes"]
    assert summary["cuda_peak_bytes"] <= summary["planned_peak_bytes"] <= summary["max_mem_bytes"]
    assert REFERENCE_CARD.context_bytes <= summary["cuda_context_bytes"]


def test_where_the_allocator_refuses_the_micro_batch_shrinks(deep, tmp_path, gpu):
    most, _ = _reserved(gpu, deep, tmp_path / "four", 4)
    less, whole = _reserved(gpu, deep, tmp_path / "two", 2)
    assert less < most
    gpu.at_most_bytes = (less + most) // 2
    shrunk = run_of(deep, tmp_path / "run", **REQUEST, micro_batch=4)
    assert shrunk["micro_batch"] == 2
    assert shrunk["cuda_peak_reserved_bytes"] <= gpu.at_most_bytes
    assert shrunk["trained_sha256"] == whole["trained_sha256"]


@pytest.mark.parametrize("others", [False, True], ids=["the cap", "other programs"])
def test_where_not_one_example_fits_the_state_is_saved(deep, tmp_path, gpu, monkeypatch, others):
    _, whole = _reserved(gpu, deep, tmp_path / "whole", 1)
    real = Stepper.step

    def step(self: Stepper, number: int, *args: Any) -> Any:
        if number == 2:  # from here on there is no room for anything
            if others:
                gpu.others_bytes = gpu.limit_bytes - gpu.context_bytes - gpu.live_bytes
            else:
                gpu.at_most_bytes = gpu.live_bytes
        return real(self, number, *args)

    monkeypatch.setattr(Stepper, "step", step)
    text = "other programs" if others else "a larger --max-mem"
    with pytest.raises(BudgetExceeded, match=text):
        run_of(deep, tmp_path / "run", **REQUEST, micro_batch=1)
    monkeypatch.setattr(Stepper, "step", real)
    gpu.others_bytes, gpu.at_most_bytes = 0, gpu.limit_bytes
    settings = deep.settings(out=str(tmp_path / "run"), **REQUEST, micro_batch=1, device="cuda")
    more = {"max_mem_bytes": 4000 * MB, "eval_limit": 2}
    resumed = finetune(make_config(settings | more), resume=True)
    assert resumed["trained_sha256"] == whole["trained_sha256"]


def test_blocks_in_the_ram_have_the_bits_of_a_run_without(deep, tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(ram.HostBuffer, "reserve", _reserve)
    request = {**REQUEST, "train": "full", "micro_batch": 2}
    whole = run_of(deep, tmp_path / "whole", **request)
    parted = run_of(deep, tmp_path / "parted", **request, residency="host")
    assert parted["residency"] == "host" and parted["host_read_bytes"] > 0
    assert parted["trained_sha256"] == whole["trained_sha256"]
    assert parted["cuda_peak_allocated_bytes"] < whole["cuda_peak_allocated_bytes"]


def _reserve(self: ram.HostBuffer) -> None:
    self._data = torch.empty(self.data_bytes, dtype=torch.uint8)
    self._pinned = False
