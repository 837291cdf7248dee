"""On a GPU: updates have the bits of a CPU's, losses are close to a CPU's, memory stays under the cap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bench, make_model

from edgezo.errors import BudgetExceeded
from edgezo.network.model import Model
from edgezo.plan.request import make_config
from edgezo.run.step import Stepper
from edgezo.run.train import finetune
from edgezo.weights.layouts import moved, place
from edgezo.weights.saved import saved_sha256, saved_tensors
from edgezo.weights.store import WeightStore
from edgezo.zo.directions import DIRECTION_KINDS
from edgezo.zo.noise import exact_grid
from edgezo.zo.recipe import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
MB = 1_000_000


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench with a model of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return Bench(make_model(folder / "model", num_hidden_layers=4), bench.data)


def run_of(deep: Bench, out: Path, kind: str = "label", **changes: Any) -> dict[str, Any]:
    request = {"device": "cuda", "max_mem_bytes": 4000 * MB, **changes}
    return finetune(make_config(deep.settings(kind, out=str(out), **request)))


@pytest.mark.parametrize("directions", DIRECTION_KINDS)
@pytest.mark.parametrize(
    ("precision", "rounding"),
    [("fp32", None), ("bf16", "plane"), ("bf16", "stochastic"), ("fp16", "plane")],
)
def test_updates_are_those_of_the_cpu_bit_for_bit(directions, precision, rounding):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 333, generator=generator) * 0.1
    start = torch.randn(700, generator=generator)
    digests = set()
    for device in (torch.device("cpu"), torch.device("cuda")):
        store = WeightStore(5, 8, DIRECTION_KINDS[directions], device)
        layout = place(weight.clone(), precision, table=False, rounding=rounding, trained=True)
        store.train("w", moved(layout, device))
        store.train_vector("b", start)
        table = place(weight.clone(), precision, table=True, rounding=rounding, trained=True)
        store.train("t", moved(table, device), touched_offset=0)
        for step in range(3):
            raw = torch.randn(16, generator=torch.Generator().manual_seed(step)).numpy() * 1e-3
            touched = tuple((torch.arange(3) * 7 + i).numpy() for i in range(16))
            store.apply([Recipe(step, exact_grid(raw), 1e-4, touched)])
        digests.add(saved_sha256(saved_tensors(store)))
    assert len(digests) == 1


STORES = [
    ("full", "fp32"),
    ("full", "bf16"),
    ("lowrank+head", "int8"),
    ("lowrank", "int4"),
    ("norms+scales", "bf16"),
]


@pytest.mark.parametrize("kind", ["label", "choice", "completion"])
@pytest.mark.parametrize(("train", "precision"), STORES)
def test_losses_are_close_to_those_of_the_cpu(deep, tmp_path, train, precision, kind):
    request = {"train": train, "precision": precision, "steps": 1}
    cpu = run_of(deep, tmp_path / "cpu", kind, **request, device="cpu")
    gpu = run_of(deep, tmp_path / "gpu", kind, **request)
    assert (cpu["device"], gpu["device"]) == ("cpu", "cuda")
    tolerance = 2e-5 if precision == "fp32" else 0.1  # bf16 products; a CPU may compute in fp32
    assert gpu["loss_first"] == pytest.approx(cpu["loss_first"], rel=tolerance)
    before = [run["eval_before"]["loss"] for run in (gpu, cpu)]
    assert before[0] == pytest.approx(before[1], rel=tolerance)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "qwen3", "opt", "gpt2", "roberta"])
def test_every_family_runs_there(bench, tmp_path, family):
    changes = {"num_hidden_layers": 3} if family == "gemma3_text" else {}
    model = Bench(make_model(tmp_path / "model", family, **changes), bench.data)
    template = {"template": "{text} It was{mask}"} if family == "roberta" else {}
    cpu = run_of(model, tmp_path / "cpu", **template, device="cpu", steps=1, train="full")
    gpu = run_of(model, tmp_path / "gpu", **template, steps=1, train="full")
    assert gpu["loss_first"] == pytest.approx(cpu["loss_first"], rel=1e-4)


@pytest.mark.parametrize("kind", ["label", "text"])
def test_two_runs_have_the_same_bits(deep, tmp_path, kind):
    request = {"train": "full+head", "precision": "bf16", "steps": 6}
    first, second = (run_of(deep, tmp_path / name, kind, **request) for name in "ab")
    assert first["trained_sha256"] == second["trained_sha256"]


@pytest.mark.parametrize("train", ["full", "lowrank+head"])
def test_a_replay_on_either_device_has_the_bits_of_the_run(deep, tmp_path, edgezo_json, train):
    for device in ("cuda", "cpu"):
        made = tmp_path / device
        summary = run_of(deep, made, train=train, precision="bf16", device=device)
        for other in ("cuda", "cpu"):
            with pytest.MonkeyPatch.context() as patch:
                if other == "cpu":
                    patch.setenv("PATH", "")  # no nvidia-smi: no GPU
                else:
                    _forget_device(made)
                code, replayed = edgezo_json(
                    "replay", made, "--out", tmp_path / f"{device}-{other}"
                )
            assert (code, replayed.get("trained_sha256")) == (0, summary["trained_sha256"]), (
                replayed
            )


def _forget_device(run: Path) -> None:
    """Remove the device from the run's config, so that it is replayed where there is most memory."""
    lines = (run / "config.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("device", "max_mem_bytes"))]
    (run / "config.toml").write_text("\n".join([*kept, 'device = "auto"']) + "\n")


def test_a_run_goes_on_on_another_device(deep, tmp_path, edgezo):
    real = Stepper.step

    def stepped(self: Stepper, step: int, *more: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step, *more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stepper, "step", stepped)
        run_of(deep, tmp_path / "run", steps=6, train="full", precision="bf16")
    code, out, err = edgezo(
        "finetune", "--resume", "--out", tmp_path / "run", "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["device"] == "cpu"
    assert "before on cuda" in err


def test_the_memory_reserved_stays_under_the_cap(deep, tmp_path):
    request = {"train": "full", "precision": "bf16", "batch_size": 64, "steps": 3}
    least = run_of(deep, tmp_path / "a", **request, micro_batch=64)
    cap = least["planned_peak_bytes"]
    capped = run_of(deep, tmp_path / "b", **request, micro_batch=64, max_mem_bytes=cap)
    assert capped["cuda_peak_reserved_bytes"] + capped["cuda_context_bytes"] <= cap
    assert capped["cuda_peak_allocated_bytes"] <= capped["cuda_peak_reserved_bytes"]
    assert capped["cuda_peak_bytes"] <= capped["planned_peak_bytes"]
    assert capped["trained_sha256"] == least["trained_sha256"]


@pytest.mark.parametrize("kind", ["label", "text"])
@pytest.mark.parametrize(("train", "precision"), STORES)
def test_blocks_in_the_ram_give_the_bits_of_a_run_without(deep, tmp_path, train, precision, kind):
    request = {"train": train, "precision": precision, "steps": 5, "eval_every": 2}
    whole = run_of(deep, tmp_path / "whole", kind, **request)
    parted = run_of(deep, tmp_path / "parted", kind, **request, residency="host")
    assert parted["residency"] == "host"
    for name in ("trained_sha256", "eval_before", "eval_after", "loss_first", "loss_last"):
        assert parted[name] == whole[name], name


def _greedy(patch: pytest.MonkeyPatch, room: int, after: int = 0) -> None:
    """Let forwards over more than ``room`` examples ask for more memory than there is, from call ``after`` on."""
    real, calls = Model.losses, []

    def losses(self: Model, batch: Any, *args: Any, **more: Any) -> Any:
        calls.append(len(batch.slots))
        if len(calls) > after and len(batch.slots) > room:
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
        return real(self, batch, *args, **more)

    patch.setattr(Model, "losses", losses)


def test_where_the_gpu_is_full_the_micro_batch_shrinks(deep, tmp_path):
    request = {"batch_size": 8, "eval_limit": 2}
    whole = run_of(deep, tmp_path / "whole", **request, micro_batch=2)
    with pytest.MonkeyPatch.context() as patch:
        _greedy(patch, room=2)
        shrunk = run_of(deep, tmp_path / "run", **request, micro_batch=8)
    assert shrunk["micro_batch"] == 2
    assert shrunk["trained_sha256"] == whole["trained_sha256"]


def test_where_not_even_one_example_fits_the_state_is_saved(deep, tmp_path):
    request = {"batch_size": 4, "micro_batch": 1, "eval_limit": 2, "steps": 30}
    whole = run_of(deep, tmp_path / "whole", **request)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BudgetExceeded, match="--resume"):
        _greedy(patch, room=0, after=8)
        run_of(deep, tmp_path / "run", **request)
    settings = deep.settings(out=str(tmp_path / "run"), **request, device="cuda")
    resumed = finetune(make_config(settings, {"max_mem_bytes": 4000 * MB}), resume=True)
    assert resumed["trained_sha256"] == whole["trained_sha256"]
