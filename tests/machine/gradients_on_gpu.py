"""Backward passes on a GPU that is none. test_gradients_on_gpu.py runs this where PyTorch takes "cuda" for a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_fake_gpu import _reserve, run_of, watched

from edgezo.network.first_order import AdamW
from edgezo.weights import ram

pytest_plugins = ["test_fake_gpu"]  # its fixtures
REQUEST: dict[str, Any] = {"steps": 3, "batch_size": 4, "seed": 3}
OF_THE_CARD = {"CUDA context", "cuBLAS workspace", "allocator slack"}  # items that no tensor takes


def trained_in(out: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}


class Followed:
    """The updates of a run: where they began, and the gradients and the rate of each, on the CPU."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.starts: dict[str, torch.Tensor] = {}
        self.decay = 0.0
        self.steps: list[tuple[dict[str, torch.Tensor], float]] = []
        real = AdamW.update

        def update(optimizer: AdamW, rate: float, known: Any = None) -> None:
            if not self.steps:
                self.starts, self.decay = _copies(optimizer.values), optimizer.decay
            gradients = {name: value.grad for name, value in optimizer.values.items()}
            self.steps.append((_copies(gradients), rate))
            real(optimizer, rate, known)

        patch.setattr(AdamW, "update", update)

    def ended(self) -> dict[str, torch.Tensor]:
        """Values and moments that the same gradients lead to on a CPU."""
        optimizer = AdamW(self.decay)
        for name, start in self.starts.items():
            optimizer.train(name, start)
        for gradients, rate in self.steps:
            for name, value in optimizer.values.items():
                value.grad = gradients[name].clone()
            optimizer.update(rate)
        return optimizer.tensors()


def _copies(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def plan_of(out: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((out / "plan.json").read_text())
    return plan


@pytest.mark.parametrize(
    ("estimator", "kind"), [("lora", "label"), ("lora", "choice"), ("addax", "completion")]
)
def test_a_run_ends_as_on_a_cpu(deep, tmp_path, gpu, kind, estimator):
    request = {**REQUEST, "estimator": estimator, "precision": "fp32"}
    with pytest.MonkeyPatch.context() as patch:
        of_gpu = Followed(patch)
        there = run_of(deep, tmp_path / "gpu", kind, **request)
    with pytest.MonkeyPatch.context() as patch:
        of_cpu = Followed(patch)
        here = run_of(deep, tmp_path / "cpu", kind, **request, device="cpu")
    for name in ("loss_first", "loss_last"):
        assert there[name] == pytest.approx(here[name], rel=2e-5)
    # AdamW divides a gradient by its own size, and so rounding errors by rounding errors where it is next to 0: one
    # gradient of 2e-9 beside 4e-9 moves a value by 5e-5. So gradients are compared with a CPU's, and values with those
    # that the same gradients lead to there.
    assert len(of_gpu.steps) == len(of_cpu.steps) == REQUEST["steps"]
    for (ours, rate), (theirs, other) in zip(of_gpu.steps, of_cpu.steps, strict=True):
        assert rate == other and ours.keys() == theirs.keys() and ours
        for name, gradient in ours.items():
            bound = 1e-4 * theirs[name].abs().max().item()
            torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=bound)
    saved, expected = trained_in(tmp_path / "gpu"), of_gpu.ended()
    assert saved.keys() == trained_in(tmp_path / "cpu").keys() == of_cpu.ended().keys() and saved
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("estimator", "precision"), [("lora", "int8"), ("lora", "bf16"), ("addax", "int4")]
)
def test_tensors_take_no_more_than_planned(deep, tmp_path, gpu, precision, estimator):
    request = {**REQUEST, "estimator": estimator, "precision": precision, "batch_size": 16}
    summary = run_of(deep, tmp_path / "run", **request)
    planned_bytes = {item["name"]: item["bytes"] for item in plan_of(tmp_path / "run")["items"]}
    card_bytes = sum(planned_bytes[name] for name in OF_THE_CARD)
    tensors_bytes = summary["planned_peak_bytes"] - card_bytes
    assert summary["cuda_peak_allocated_bytes"] <= tensors_bytes


@pytest.mark.parametrize("estimator", ["lora", "addax"])
def test_a_step_waits_for_its_losses_and_its_gradient(deep, tmp_path, gpu, monkeypatch, estimator):
    steps = watched(gpu, monkeypatch)
    run_of(deep, tmp_path / "run", **REQUEST, estimator=estimator)
    assert steps
    for waits, uploads in steps:
        assert len(waits) <= 2, waits
        assert max(uploads) < 4000


@pytest.mark.parametrize("estimator", ["lora", "grzo"])
def test_blocks_in_the_ram_have_the_bits_of_a_run_without(
    deep, tmp_path, gpu, monkeypatch, estimator
):
    monkeypatch.setattr(ram.HostBuffer, "reserve", _reserve)
    request = {**REQUEST, "estimator": estimator, "precision": "bf16"}
    whole = run_of(deep, tmp_path / "whole", **request)
    parted = run_of(deep, tmp_path / "parted", **request, residency="host")
    assert parted["residency"] == "host" and parted["host_read_bytes"] > 0
    assert parted["trained_sha256"] == whole["trained_sha256"]


@pytest.mark.parametrize("estimator", ["lora", "grzo"])
def test_upper_blocks_from_kept_states(deep, tmp_path, gpu, monkeypatch, estimator):
    monkeypatch.setattr(ram.HostBuffer, "reserve", _reserve)
    request = {**REQUEST, "estimator": estimator, "precision": "fp32", "blocks": "2", "steps": 8}
    there = run_of(deep, tmp_path / "gpu", **request)
    here = run_of(deep, tmp_path / "cpu", **request, device="cpu")
    assert plan_of(tmp_path / "gpu")["states"] == plan_of(tmp_path / "cpu")["states"]
    for name in ("loss_first", "loss_last"):
        assert there[name] == pytest.approx(here[name], rel=2e-5)
