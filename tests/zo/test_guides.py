"""Activation-guided directions: what they are made from, and what a run saves because no seed gives them again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from preset_trials import SEED, SIGMA, Maker
from safetensors import safe_open
from torch import Tensor

from edgezo.data.batches import collate
from edgezo.errors import BudgetExceeded, UsageError
from edgezo.network.model import Model
from edgezo.network.perturb import PerturbedLinear
from edgezo.network.probe import MOST_SLOTS, TOKENS
from edgezo.plan.request import make_config
from edgezo.run.train import finetune
from edgezo.zo import noise
from edgezo.zo.directions import on_grid
from edgezo.zo.noise import Key


def inputs_of(model: Model, examples: Any, step: int) -> dict[str, Tensor]:
    """The inputs of each linear in the forward of a step, (n, d_in) by weight name. The guides stay in the store."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(f"{name}.weight", args[0].clone())
        )
        for name, module in model.module.named_modules()
        if isinstance(module, PerturbedLinear)
    ]
    batch = collate(examples, range(len(examples)))
    model.losses(batch, model.probe(batch, Key(SEED, step), SIGMA), sides=2)
    for hook in hooks:
        hook.remove()
    return {name: x.reshape(-1, x.shape[-1]) for name, x in inputs.items()}


@pytest.mark.parametrize("train", ["full", "lowrank"])
def test_a_guide_is_a_random_combination_of_the_example_s_own_inputs(
    train: str, maker: Maker
) -> None:
    trial = maker.trial("ag-grzo", train=train)
    read = inputs_of(trial.model, trial.examples, 4)
    guides = trial.model.store.take_guides()
    assert len(guides) == len(read) == 14
    lengths = [sum(len(row.ids) for row in example.rows) for example in trial.examples]
    slot_of = np.repeat(np.arange(len(lengths)), lengths)
    table = noise.signs(
        Key(SEED, 4), TOKENS, noise.COLUMN, slice(0, max(lengths)), MOST_SLOTS
    ).double()
    for name, v in guides.items():
        weight = name.partition("#")[0]
        x = read[weight].double()
        if train == "lowrank":
            x = x @ trial.model.store.basis(weight, x.shape[1]).double().T
        plus, minus = x.chunk(2)
        for slot, length in enumerate(lengths):
            at = torch.from_numpy(np.flatnonzero(slot_of == slot))
            wanted = table[:length, slot] @ (plus + minus)[at]
            wanted = wanted / wanted.norm()
            torch.testing.assert_close(v[slot].double(), wanted, atol=2e-6, rtol=0)
            # It depends on the order of an example's tokens, and on these tokens alone.
            assert abs(float(v[slot].double().norm()) - 1) < 1e-4
    assert not trial.model.store.take_guides()


def test_micro_batches_make_the_same_guides(maker: Maker) -> None:
    trial = maker.trial("ag-grzo")
    trial.losses(2)
    whole = trial.model.store.take_guides()
    for size in (1, 3):
        trial.losses(2, size)
        for name, v in trial.model.store.take_guides().items():
            torch.testing.assert_close(v, whole[name], atol=1e-4, rtol=0)


def test_a_shared_basis_turns_to_what_the_layers_read(maker: Maker) -> None:
    trial = maker.trial("agzo", rank=4)
    trainables = {n: r for n, r in trial.model.store.trainables.items() if r.basis is not None}
    assert len(trainables) == 14
    read = inputs_of(trial.model, trial.examples, 0)
    for step in range(1, 12):
        trial.model.store.take_guides()
        read = inputs_of(trial.model, trial.examples, step)
    for name, trainable in trainables.items():
        x = sum(read[name].double().chunk(2))
        before = trainable.basis.double()
        torch.testing.assert_close(before @ before.T, torch.eye(4).double(), atol=1e-5, rtol=0)
        top = torch.linalg.svd(x)[2][:4]
        # The share of the inputs in the span of the basis: after some turns about the largest that four vectors have.
        caught, most = (x @ before.T).square().sum(), (x @ top.T).square().sum()
        assert float(caught / most) > 0.95, name
    used = trial.model.store.take_guides()
    for name, trainable in trainables.items():
        assert not torch.equal(used[name], trainable.basis)
    bases = {n: r.basis.clone() for n, r in trainables.items()}
    inputs_of(trial.model, trial.examples, 12)
    trial.model.store.take_guides(learn=False)  # a forward that belongs to no step
    assert all(torch.equal(bases[n], r.basis) for n, r in trainables.items())


def test_the_grid_of_guides_is_kept_by_bf16_and_holds_only_finite_values() -> None:
    v = torch.randn(40, 700)
    v[0, 0], v[1, 1], v[2, 2] = torch.inf, torch.nan, 0
    v = on_grid(v / 30)
    assert torch.isfinite(v).all() and torch.equal(v * 2**20, (v * 2**20).round())
    low = v.bfloat16().float() * 2**20
    assert torch.equal(low, low.round())


def test_a_snapshot_holds_the_weights_and_a_lost_one_is_made_again(
    bench: Any, edgezo_json: Any, tmp_path: Any
) -> None:
    run = tmp_path / "run"
    request = bench.settings(estimator="ag-grzo", train="full", precision="bf16", steps=3)
    whole = finetune(make_config({**request, "out": str(run)}))
    with safe_open(run / "head.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(name.endswith("mlp.down_proj.weight") for name in names)
    code, answer = edgezo_json("eval", "--model", run)
    assert code == 0 and answer["value"] == whole["eval_after"]["value"]
    whole_file = (run / "head.safetensors").read_bytes()
    (run / "head.safetensors").write_bytes(whole_file[: len(whole_file) // 2])
    code, answer = edgezo_json("eval", "--model", run)
    assert code == 1 and "head.safetensors cannot be read" in answer["error"]
    (run / "head.safetensors").unlink()
    code, answer = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 1 and "--resume" in answer["error"]
    (run / "summary.json").unlink()
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again["trained_sha256"] == whole["trained_sha256"]
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"train": "norms"}, "inputs of matrices"),
        ({"mask": "sparse"}, "--mask sparse"),
        ({"credit": "candidates"}, "made for one example each"),
        ({"residency": "disk"}, "from seeds"),
        ({"estimator": "agzo", "train": "full+lowrank"}, "changes at every step"),
        ({"estimator": "agzo", "rule": "momentum"}, "changes at every step"),
    ],
)
def test_what_no_guide_can_be_made_for_is_refused(changes: dict[str, str], word: str) -> None:
    request = {"model": "m", "task": "t", "estimator": "ag-grzo"}
    with pytest.raises(UsageError, match=word):
        make_config({**request, **changes})


@pytest.mark.parametrize("name", ["agzo", "ag-grzo"])
def test_a_step_that_is_begun_anew_forgets_what_its_first_micro_batch_made(
    name: str, bench: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, real = [], Model.losses
    for struck in (
        4,
        5,
    ):  # the first or the second micro-batch of step 1; before them step 0 and the longest
        calls = 0

        def losses(self: Model, batch: Any, probe: Any = None, **more: Any) -> Any:
            nonlocal calls
            calls += probe is not None
            if probe is not None and calls == struck:  # noqa: B023
                raise BudgetExceeded("as if memory were short")
            return real(self, batch, probe, **more)

        request = bench.settings(estimator=name, train="full", precision="fp32", steps=3)
        request |= {"batch_size": 4, "micro_batch": 2, "out": str(tmp_path / str(struck))}
        with monkeypatch.context() as patch:
            patch.setattr(Model, "losses", losses)
            summary = finetune(make_config(request))
        assert summary["micro_batch"] == 1
        ends.append(summary["trained_sha256"])
    assert ends[0] == ends[1]
