"""Blocks in host RAM, with this CPU in place of the GPU: a run has the same bits as with all blocks on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bench, make_model

from edgezo.errors import BudgetExceeded
from edgezo.machine.gpu_memory import CudaMemory, ProcessMemory
from edgezo.network.model import Model
from edgezo.plan.request import make_config
from edgezo.run import session
from edgezo.run.short_memory import MicroBatchFitter
from edgezo.run.step import Stepper
from edgezo.run.train import finetune
from edgezo.weights import ram
from edgezo.weights.home import Home
from edgezo.weights.store import WeightStore


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench with a model of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return Bench(make_model(folder / "model", num_hidden_layers=4), bench.data)


@contextmanager
def blocks_in_host(blocks: int) -> Iterator[None]:
    """Let every plan put so many of the four blocks into host RAM, and compute on the CPU."""
    real = session.make_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            session,
            "make_plan",
            lambda *args, **more: replace(real(*args, **more), blocks_in_host=blocks),
        )
        yield


def run_of(deep: Bench, out: Path, kind: str = "label", **changes: Any) -> dict[str, Any]:
    return finetune(make_config(deep.settings(kind, out=str(out), **changes)))


STORES = [("full", "fp32"), ("full", "bf16"), ("lowrank+head", "int8"), ("lowrank", "int4")]


@pytest.mark.parametrize("blocks", [4, 2, 1])
@pytest.mark.parametrize(("train", "precision"), STORES)
def test_a_run_with_blocks_in_the_ram_has_the_bits_of_one_without(
    deep, tmp_path, train, precision, blocks
):
    request = {"train": train, "precision": precision, "steps": 4, "eval_every": 2}
    whole = run_of(deep, tmp_path / "whole", **request)
    with blocks_in_host(blocks):
        parted = run_of(deep, tmp_path / "parted", **request)
    assert parted["residency"] == "host"
    for name in ("trained_sha256", "eval_before", "eval_after", "loss_first", "loss_last"):
        assert parted[name] == whole[name], name


class _Late:
    """Copies made as late as a GPU may make them: a read when it is waited for, a write before the next read."""

    def __init__(self) -> None:
        self.writes: list[Callable[[], None]] = []

    def read(self, home: Home, slot: torch.Tensor) -> _Late.Waiting:
        before, self.writes = self.writes, []
        return _Late.Waiting([*before, lambda: home.read(slot)])

    def write(self, home: Home, slot: torch.Tensor, applied: int) -> _Late.Waiting:
        waiting = _Late.Waiting([lambda: home.write(slot, applied)])
        self.writes.append(waiting.result)
        return waiting

    def close(self) -> None: ...

    class Waiting:
        def __init__(self, work: list[Callable[[], None]]):
            self.work = work

        def done(self) -> bool:
            return not self.work

        def result(self) -> None:
            while self.work:
                self.work.pop(0)()


@pytest.mark.parametrize("blocks", [4, 3, 2, 1])
def test_copies_may_be_as_late_as_their_order_allows(deep, tmp_path, monkeypatch, blocks):
    request = {"train": "full", "precision": "bf16", "steps": 5, "eval_every": 2, "micro_batch": 2}
    whole = run_of(deep, tmp_path / "whole", **request)
    monkeypatch.setattr(ram, "_Thread", _Late)
    with blocks_in_host(blocks):
        parted = run_of(deep, tmp_path / "parted", **request)
    assert parted["trained_sha256"] == whole["trained_sha256"]
    assert parted["eval_after"] == whole["eval_after"]


def test_a_step_moves_each_block_once_and_frozen_ones_only_there(deep, tmp_path):
    with blocks_in_host(4):
        full = run_of(deep, tmp_path / "a", train="full", precision="bf16", micro_batch=4, steps=40)
        frozen = run_of(deep, tmp_path / "b", train="lowrank", precision="int8", micro_batch=4)
    assert full["host_read_bytes"] == full["host_written_bytes"] > 0
    assert frozen["host_read_bytes"] > 0
    assert frozen["host_written_bytes"] == 0
    assert not (tmp_path / "a" / "overlay").exists()


def test_a_resume_makes_the_blocks_again_from_base_and_journal(deep, tmp_path):
    request = {"train": "full+head", "precision": "bf16", "steps": 6, "snapshot_every": 2}
    whole = run_of(deep, tmp_path / "whole", **request)
    real = Stepper.step

    def stepped(self: Stepper, step: int, *more: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, *more)

    with blocks_in_host(3):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Stepper, "step", stepped)
            run_of(deep, tmp_path / "run", **request)
        settings = deep.settings(out=str(tmp_path / "run"), **request)
        resumed = finetune(make_config(settings), resume=True)
    assert resumed["trained_sha256"] == whole["trained_sha256"]


def test_replay_and_evaluation_with_blocks_in_the_ram(deep, tmp_path, edgezo_json):
    request = {"train": "full+head", "precision": "bf16"}
    summary = run_of(deep, tmp_path / "run", **request)
    with blocks_in_host(4):
        code, answer = edgezo_json("replay", tmp_path / "run", "--out", tmp_path / "again")
        assert (code, answer["trained_sha256"]) == (0, summary["trained_sha256"])
        for made in ("run", "again"):
            code, answer = edgezo_json("eval", "--model", tmp_path / made)
            assert (code, answer["loss"]) == (0, summary["eval_after"]["loss"])


def test_an_update_that_is_cut_short_is_taken_from_the_block_as_it_was(deep, tmp_path):
    """Memory may become short while a block is updated in its slot; then the forward is tried again."""
    request = {"train": "full", "precision": "bf16", "steps": 16}
    whole = run_of(deep, tmp_path / "whole", **request)
    real, calls = WeightStore.catch_up, []

    def catch_up(self: WeightStore, names: Any, first: int) -> None:
        calls.append(first)
        if len(calls) == 3:  # of the second step
            real(self, names[:2], first)
            raise BudgetExceeded("short")
        real(self, names, first)

    with blocks_in_host(4), pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightStore, "catch_up", catch_up)
        patch.setattr(MicroBatchFitter, "_shrink", lambda self, step: True)  # tried again as it was
        cut = run_of(deep, tmp_path / "run", **request)
    assert cut["trained_sha256"] == whole["trained_sha256"]


# ---------------------------------------------------------------------------------------------
# A GPU that runs out of memory, as PyTorch reports it


class _Short(ProcessMemory):
    cap_bytes = 10**9
    short = CudaMemory.short  # type: ignore[assignment]

    def free_bytes(self) -> int:
        return self.cap_bytes


def _refuse(patch: pytest.MonkeyPatch, room: int, after: int) -> None:
    """Let forwards over more than ``room`` examples run out of memory, from call ``after`` on."""
    patch.setattr(session, "open_memory", lambda *args: _Short())
    real, calls = Model.losses, []

    def losses(self: Model, batch: Any, *args: Any, **more: Any) -> Any:
        calls.append(len(batch.slots))
        if len(calls) > after and len(batch.slots) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
        return real(self, batch, *args, **more)

    patch.setattr(Model, "losses", losses)


def test_where_a_gpu_is_full_the_micro_batch_shrinks(deep, tmp_path):
    fixed = {"train": "lowrank+head", "batch_size": 8, "eval_limit": 2}
    whole = run_of(deep, tmp_path / "whole", micro_batch=2, **fixed)
    with pytest.MonkeyPatch.context() as patch:
        _refuse(patch, room=2, after=0)
        shrunk = run_of(deep, tmp_path / "run", micro_batch=8, **fixed)
    assert shrunk["micro_batch"] == 2
    assert shrunk["trained_sha256"] == whole["trained_sha256"]


def test_where_not_even_one_example_fits_the_state_is_saved(deep, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BudgetExceeded, match="--resume"):
        _refuse(patch, room=0, after=6)
        run_of(deep, tmp_path / "run", batch_size=4, micro_batch=1, eval_limit=2, steps=30)
    settings = deep.settings(out=str(tmp_path / "run"), batch_size=4, micro_batch=1, steps=30)
    resumed = finetune(make_config(settings, {"eval_limit": 2}), resume=True)
    assert resumed["steps"] == 30


@pytest.mark.parametrize(("device", "residency"), [("cpu", "host"), ("cuda", "disk")])
def test_each_residency_belongs_to_a_device(deep, edgezo, device, residency, tmp_path):
    code, _, err = edgezo(
        "finetune", *deep.arguments(device=device, residency=residency, out=tmp_path / "run")
    )
    assert code == 2
    assert f"--residency {residency}" in err
