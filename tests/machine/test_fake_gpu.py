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
from edgezo.machine.hardware import Gpu
from edgezo.network.model import Model
from edgezo.plan.request import make_config
from edgezo.run.step import Stepper
from edgezo.run.train import finetune
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
    table, where, rows, width, _ = address
    rows = rows.here if isinstance(rows, There) else rows
    with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        made = noise._on_cpu(table, where, rows, width, noise.CPU)
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


def test_at_the_cap_the_micro_batch_shrinks_and_the_bits_stay(deep, tmp_path, gpu):
    """The allocator refuses what would cross the cap; the run goes on with less at once."""
    request = {"train": "lowrank+head", "precision": "fp32", "steps": 2, "batch_size": 4}
    whole = run_of(deep, tmp_path / "whole", **request, micro_batch=2)
    with pytest.MonkeyPatch.context() as patch:
        _less_than_planned(patch, gpu, room=2)
        shrunk = run_of(deep, tmp_path / "run", **request, micro_batch=4)
    assert shrunk["micro_batch"] == 2
    assert shrunk["trained_sha256"] == whole["trained_sha256"]
    assert shrunk["cuda_peak_bytes"] <= shrunk["max_mem_bytes"]


def test_where_nothing_fits_the_state_is_saved_and_others_are_named(deep, tmp_path, gpu):
    request = {"train": "lowrank", "precision": "fp32", "steps": 3, "batch_size": 2}
    for others_bytes, text in ((0, "a larger --max-mem"), (CARD.total_bytes, "other programs")):
        gpu.others_bytes = 0
        with pytest.MonkeyPatch.context() as patch, pytest.raises(BudgetExceeded, match=text):
            _less_than_planned(patch, gpu, room=0, others_bytes=others_bytes)
            run_of(deep, tmp_path / str(others_bytes), **request, micro_batch=1)


def _less_than_planned(
    patch: pytest.MonkeyPatch, gpu: FakeGpu, room: int, others_bytes: int = 0
) -> None:
    """Let forwards over more than ``room`` examples ask for more than the GPU may reserve."""
    real = Model.losses

    def losses(self: Model, batch: Any, *args: Any, **more: Any) -> Any:
        if len(batch.slots) > room:
            gpu.others_bytes = others_bytes
            torch.empty(gpu.may_reserve_bytes // 1000, dtype=torch.uint8, device="cuda")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
        return real(self, batch, *args, **more)

    patch.setattr(Model, "losses", losses)
