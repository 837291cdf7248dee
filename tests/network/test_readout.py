"""The linear probe: its equation against a slow twin, what it reads, and runs with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from safetensors.torch import load_file

from edgezo.data.batches import Example, collate
from edgezo.data.trees import Row
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.limits import READOUT_BLOCKS
from edgezo.network import loader
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import decoder_layers
from edgezo.network.plain_readout import tried_blocks
from edgezo.network.readout import (
    RIDGES,
    ReadoutWeights,
    StateFile,
    Taps,
    fit,
    fit_block,
    unit,
)
from edgezo.network.state_file import DamagedRow
from edgezo.plan.request import make_config
from edgezo.run.readout_pass import ReadoutPass
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(n: int, hidden: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States that depend on their labels, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, hidden, generator=generator)
    return unit(centres[labels] + 2 * torch.randn(n, hidden, generator=generator)), labels


def twin(x: torch.Tensor, labels: torch.Tensor, classes: int, ridge: float) -> dict[str, Any]:
    """Ridge regression by its normal equations in float64, and every row predicted by a fit without it.

    States are standardised and targets centred by all rows, as in the method.
    """
    x = x.double()
    z = (x - x.mean(0)) / x.std(0, unbiased=False)
    targets = F.one_hot(labels, classes).double()
    share = targets.mean(0)
    n, d = z.shape

    def solve(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(d, K) weights and (K,) intercept, which is not shrunk, of a fit to ``rows``."""
        inputs = torch.cat([z[rows], torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        shrink = n * ridge * torch.eye(d + 1, dtype=torch.float64)
        shrink[d, d] = 0.0
        solution = torch.linalg.solve(
            inputs.T @ inputs + shrink, inputs.T @ (targets[rows] - share)
        )
        return solution[:d], solution[d]

    held_out = torch.empty(n, classes, dtype=torch.float64)
    for row in range(n):
        weight, intercept = solve(torch.tensor([r for r in range(n) if r != row]))
        held_out[row] = z[row] @ weight + intercept + share
    weight, intercept = solve(torch.arange(n))
    return {"held_out": held_out, "scores": z @ weight + intercept + share, "targets": targets}


@pytest.mark.parametrize(("n", "hidden"), [(60, 16), (24, 48)])
def test_a_block_is_fitted_as_the_normal_equations_have_it_and_held_out_rows_as_fits_without_them(
    n, hidden
):
    x, labels = rows(n, hidden, 3)
    fitted = fit_block(x.clone(), labels, 3)
    errors = {}
    for ridge in RIDGES:
        slow = twin(x, labels, 3, ridge)
        errors[ridge] = float((slow["held_out"] - slow["targets"]).square().mean())
    assert fitted.ridge == min(errors, key=lambda ridge: errors[ridge])
    slow = twin(x, labels, 3, fitted.ridge)
    assert torch.allclose(fitted.held_out.double(), slow["held_out"], atol=1e-4)
    assert fitted.error == pytest.approx(errors[fitted.ridge], rel=1e-3)
    scores = x @ fitted.weight.T + fitted.bias
    assert torch.allclose(scores.double(), slow["scores"], atol=1e-4)


@pytest.mark.parametrize(("n", "hidden"), [(60, 16), (24, 48)])
def test_a_single_block_is_fitted_without_an_intercept_and_without_the_mean_of_a_state(n, hidden):
    x, labels = rows(n, hidden, 3)
    x = unit(x + torch.linspace(0, 3, hidden))  # what states have in common stands for an intercept
    fitted = fit_block(x.clone(), labels, 3, single=True)
    z = x.double() - x.double().mean(1, keepdim=True)
    z = z / z.std(0, unbiased=False)
    targets = F.one_hot(labels, 3).double() - 1 / 3

    def solve(kept: torch.Tensor) -> torch.Tensor:
        inputs = z[kept]
        shrunk = inputs.T @ inputs + n * fitted.ridge * torch.eye(hidden, dtype=torch.float64)
        return torch.linalg.solve(shrunk, inputs.T @ targets[kept])

    every = torch.arange(n)
    held_out = torch.stack([z[row] @ solve(every[every != row]) for row in range(n)]) + 1 / 3
    assert torch.allclose(fitted.held_out.double(), held_out, atol=1e-4)
    assert torch.allclose((x @ fitted.weight.T).double(), z @ solve(every), atol=1e-4)
    assert not fitted.bias.any()
    assert float(fitted.weight.mean(1).abs().max()) < 1e-6 * float(fitted.weight.abs().max()) * n
    known = fit(lambda i: x.clone() if i else torch.randn(n, hidden), (3, 5), labels, 3, True)
    assert known.readout.blocks == (5,)


def test_the_best_blocks_are_averaged_and_their_factor_is_the_one_of_least_held_out_loss():
    known, labels = rows(90, 12, 3)
    noise = [unit(torch.randn(90, 12, generator=torch.Generator().manual_seed(s))) for s in (1, 2)]
    states = {4: noise[0], 5: known, 6: noise[1], 7: known, 8: known, 9: known, 10: known}
    blocks = tuple(states)
    fitted = fit(lambda i: states[blocks[i]].clone(), blocks, labels, 3)
    assert (
        fitted.readout.blocks == (5, 7, 8, 9, 10) and len(fitted.readout.blocks) == READOUT_BLOCKS
    )
    one = fit_block(known.clone(), labels, 3)
    losses = {k: float(F.cross_entropy(one.held_out * 2 ** (k / 4), labels)) for k in range(29)}
    assert fitted.loss == pytest.approx(min(losses.values()), rel=1e-5)
    factor = 2 ** (min(losses, key=lambda k: losses[k]) / 4)
    logits = fitted.readout.logits([known] * READOUT_BLOCKS)
    assert torch.allclose(logits, (known @ one.weight.T + one.bias) * factor, atol=1e-4)
    assert fitted.accuracy == float((one.held_out.argmax(1) == labels).double().mean())


@pytest.mark.parametrize("hidden", [8, 200])
def test_states_that_are_all_alike_give_a_finite_probe(hidden):
    labels = torch.arange(20) % 2
    fitted = fit(lambda i: torch.ones(20, hidden), (0,), labels, 2)
    assert torch.isfinite(fitted.readout.weight).all() and torch.isfinite(fitted.readout.bias).all()
    assert fitted.loss == pytest.approx(0.6931, abs=0.05)


def test_a_class_that_no_row_has_is_never_predicted():
    x, labels = rows(60, 16, 3)
    fitted = fit(lambda i: x.clone(), (0,), labels, 5)
    assert set(fitted.readout.logits([x]).argmax(1).tolist()) == {0, 1, 2}


RUN, OTHER_RUN = "ab" * 32, "cd" * 32


def filled(path: Path, rows: int = 6, of_run: str = RUN) -> tuple[StateFile, list[torch.Tensor]]:
    """A file of 2 blocks and 3 numbers with so many rows, and the states in it."""
    states = StateFile(path, 2, 3, of_run)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, rows, 3, generator=generator)
    states.keep(0)
    states.append(list(values[:, :4]), torch.arange(min(rows, 4)).float(), 0)
    if rows > 4:
        states.append(list(values[:, 4:]), torch.arange(4.0, rows), 4)
    return states, list(values.half().float())


def test_states_are_kept_row_by_row_and_what_was_cut_off_is_forgotten(tmp_path):
    states, values = filled(tmp_path / "states")
    assert states.rows() == states.written() == 6
    with open(states.path, "ab") as file:
        file.write(b"torn")
    assert states.rows() == 6
    for number in range(2):
        assert torch.equal(states.block(number, 6), values[number])
    assert states.losses(6).tolist() == [0, 1, 2, 3, 4, 5]
    states.keep(4)
    assert states.rows() == states.written() == 4
    states.append([value[4:] for value in values], torch.arange(4.0, 6), 4)
    assert states.rows() == 6 and torch.equal(states.block(1, 6), values[1])


def test_every_flipped_bit_of_the_states_shows_and_rows_before_it_stay(tmp_path):
    states, values = filled(tmp_path / "states")
    whole, head = states.path.read_bytes(), len(states.head)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        states.path.write_bytes(damaged)
        row = (bit // 8 - head) // states.row_bytes if bit // 8 >= head else 0
        assert states.rows() == row, bit
        if bit // 8 < head:
            continue
        number = min((bit // 8 - head) % states.row_bytes // 10, 2)  # a piece of 3 fp16 and its CRC
        with pytest.raises(DamagedRow, match=f"row {row}$"):
            states.losses(6) if number == 2 else states.block(number, 6)
        assert torch.equal(states.block(0, row), values[0][:row])


def test_pieces_in_anothers_place_rows_of_another_run_and_files_of_an_earlier_version_are_not_used(
    tmp_path,
):
    states, _ = filled(tmp_path / "states")
    whole, head = states.path.read_bytes(), len(states.head)
    size = states.row_bytes
    first, second = whole[head : head + size], whole[head + size : head + 2 * size]
    for exchanged in (second + first, first[10:20] + first[:10] + first[20:] + second):
        states.path.write_bytes(whole[:head] + exchanged + whole[head + 2 * size :])
        assert states.rows() == 0
    states.path.write_bytes(whole[:head] + second + whole[head + size :])
    assert states.rows() == 0  # shifted
    other, _ = filled(tmp_path / "other", of_run=OTHER_RUN)
    states.path.write_bytes(other.path.read_bytes())
    assert states.rows() == 0
    states.path.write_bytes(whole[:head] + other.path.read_bytes()[head:])
    assert states.rows() == 0
    for foreign in (b"", b"\x00" * 500, whole[:head], whole[head:], whole[: head + 3]):
        states.path.write_bytes(foreign)
        assert states.rows() == 0
    states.path.unlink()
    assert states.rows() == states.written() == 0


# ---------------------------------------------------------------------------------------------
# In a model


def small_model(folder: Path, family: str, train: str = "lowrank", layers: int = 3) -> Any:
    files = loader.open_model(make_model(folder, family, num_hidden_layers=layers))
    spec = ModelSpec("fp32", tuple(train.split("+")), "signs", 0, kind="label", label_ids=(5, 6))
    return files, assemble(files, spec)


def batch_of(lengths: tuple[int, ...]) -> Any:
    examples = [
        Example((Row([3 + (k * 7 + n) % 40 for n in range(length)], [length - 1], ()),), k % 2)
        for k, length in enumerate(lengths)
    ]
    return collate(examples, range(len(examples)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_the_states_are_those_that_transformers_puts_out_for_each_block(family, tmp_path):
    files, model = small_model(tmp_path, family)
    batch = batch_of((5, 9, 3))
    model.taps = Taps.on(decoder_layers(model.module, 3)[1], range(3))
    model.losses(batch)
    states = model.taps.take()
    module = loader.model_class(files).from_pretrained(files.path).eval()
    start = 0
    for row, length in enumerate(batch.lengths):
        ids = batch.ids[start : start + length][None]
        with torch.no_grad():
            whole = module(input_ids=ids, output_hidden_states=True).hidden_states
        start += length
        # The last of the hidden states is after the final norm in most families, so it is not compared.
        for block in range(2):
            expected = unit(whole[block + 1][0, -1:])
            assert torch.allclose(states[block][row], expected[0], atol=1e-4), (family, block)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_with_a_probe_later_blocks_are_neither_run_nor_trained(family, tmp_path):
    files, model = small_model(tmp_path, family, "lowrank+norms")
    prefix, layers = decoder_layers(model.module, 3)
    ran: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *given, number=number: ran.append(number))
    weights = ReadoutWeights((0, 1), torch.randn(2, 2, files.shape.hidden), torch.zeros(2))
    before = set(model.store.trainables)
    model.classify_by(weights)
    losses, predicted = model.losses(batch_of((4, 6)))
    assert ran == [0, 1] and losses.shape == predicted.shape == (1, 2)
    trained = set(model.store.trainables)
    assert trained < before and all(f"{prefix}.2." not in name for name in trained)
    assert {n for n in before if f"{prefix}.0." in n or f"{prefix}.1." in n} <= trained
    assert all(n.startswith(prefix) or "emb" in n for n in trained)


def test_a_probe_of_a_larger_model_is_refused(tmp_path):
    _, model = small_model(tmp_path, "llama")
    with pytest.raises(EdgezoError, match="block 7, but the model has 3"):
        model.classify_by(ReadoutWeights((7,), torch.zeros(1, 2, 16), torch.zeros(2)))


def test_the_lower_third_of_the_blocks_is_not_looked_at():
    assert tried_blocks(30) == tuple(range(10, 30))
    assert tried_blocks(1) == (0,) and tried_blocks(2) == (0, 1)


# ---------------------------------------------------------------------------------------------
# In a run


def run_of(bench, out: Path, kind: str = "label", **changes: Any) -> dict[str, Any]:
    return finetune(make_config(bench.settings(kind, out=str(out), **changes)))


def of_evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: evaluation[name] for name in ("metric", "value", "n", "loss")}


def test_a_run_with_a_probe_is_evaluated_replayed_and_resumed_as_one_run(
    bench, edgezo_json, tmp_path
):
    run, copy = tmp_path / "run", tmp_path / "copy"
    summary = run_of(bench, run, train="lowrank+probe", steps=6)
    assert summary["trained"] == "lowrank+probe" and summary["steps"] == 6
    readout = summary["probe"]
    assert readout["used"] and readout["rows"] == 24 and readout["blocks"] == [0]
    code, evaluation = edgezo_json("eval", "--model", run)
    assert code == 0 and of_evaluation(evaluation) == of_evaluation(summary["eval_after"])
    code, replayed = edgezo_json("replay", run, "--out", copy)
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]
    code, evaluation = edgezo_json("eval", "--model", copy)
    assert code == 0 and of_evaluation(evaluation) == of_evaluation(summary["eval_after"])
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again == json.loads((run / "summary.json").read_text())
    assert not (run / "probe.states").exists()


def test_a_probe_alone_is_fitted_to_as_many_rows_as_steps_say_and_takes_no_step(
    bench, edgezo_json, tmp_path
):
    run = tmp_path / "run"
    summary = run_of(bench, run, train="probe", steps=5)
    assert summary["steps"] == 0 and summary["probe"]["rows"] == 20
    assert summary["train_s"] >= summary["probe"]["fit_s"] > 0
    before = (run / "summary.json").read_text()
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again == json.loads(before)
    code, output = edgezo_json("eval", "--model", run)
    assert code == 0 and of_evaluation(output) == of_evaluation(summary["eval_after"])
    code, output = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and output["trained_sha256"] == summary["trained_sha256"]


def test_every_row_is_shown_once_however_many_steps_there_are(bench, tmp_path):
    assert run_of(bench, tmp_path / "run", train="probe", steps=500)["probe"]["rows"] == 36


def test_a_probe_that_predicts_worse_than_the_label_words_is_left_out(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("edgezo.run.readout_pass.fit", _useless)
    summary = run_of(bench, tmp_path / "run", train="lowrank+head+probe")
    assert not summary["probe"]["used"] and summary["trained"] == "lowrank+head"
    assert (tmp_path / "run" / "head.safetensors").exists()
    alone = run_of(bench, tmp_path / "alone", train="lowrank+probe")
    assert alone["probe"]["used"]


def _useless(*given: Any, **more: Any) -> Any:
    return fit(*given, **more)._replace(loss=99.0)


def test_rows_without_classes_are_trained_by_the_head(bench, tmp_path):
    summary = run_of(bench, tmp_path / "run", "completion", train="lowrank+head+probe")
    assert summary["trained"] == "lowrank+head" and "probe" not in summary
    with pytest.raises(UsageError, match="tells classes apart"):
        run_of(bench, tmp_path / "alone", "text", train="probe")


def test_a_probe_beside_full_weights_is_refused(bench):
    with pytest.raises(UsageError, match="takes the head's place"):
        make_config(bench.settings(train="full+probe"))


def test_micro_batches_show_the_same_states_up_to_rounding(bench, tmp_path):
    summaries = [
        run_of(bench, tmp_path / f"{size}", train="probe", micro_batch=size) for size in (1, 4)
    ]
    files = [load_file(tmp_path / f"{size}" / "probe.safetensors") for size in (1, 4)]
    assert summaries[0]["probe"]["rows"] == summaries[1]["probe"]["rows"]
    assert torch.allclose(files[0]["probe.weight"], files[1]["probe.weight"], rtol=0.05, atol=0.05)


def test_rows_whose_states_are_damaged_pass_again(bench, edgezo_json, tmp_path):
    """Rows pass in groups of eight. One of the second group is damaged before a resume, and while a pass goes on."""
    request = {"train": "lowrank+probe", "steps": 6}
    whole = run_of(bench, tmp_path / "whole", **request)
    real = ReadoutPass._pass_group

    def groups(out: Path, stop: bool) -> list[int]:
        """The first rows of the groups that pass, where a row is damaged before the third one does."""
        passed: list[int] = []
        spoilt: list[int] = []

        def watched(self: Any, group: Any, first: int) -> float:
            if len(passed) == 2 and not spoilt:
                _spoil_states(self.states, row=9)
                spoilt.append(9)
                if stop:
                    raise KeyboardInterrupt
            passed.append(first)
            return real(self, group, first)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ReadoutPass, "_pass_group", watched)
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    run_of(bench, out, **request)
                assert edgezo_json("finetune", "--resume", "--out", out)[0] == 0
            else:
                run_of(bench, out, **request)
        return passed

    assert groups(tmp_path / "a", stop=True) == [0, 8, 8, 16]
    assert groups(tmp_path / "b", stop=False) == [0, 8, 16, 8, 16]
    for name in "ab":
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["trained_sha256"] == whole["trained_sha256"]


def _spoil_states(states: StateFile, row: int) -> None:
    data = bytearray(states.path.read_bytes())
    data[len(states.head) + row * states.row_bytes + 3] ^= 16
    states.path.write_bytes(data)


def test_a_disk_that_damages_the_states_again_and_again_is_named(bench, tmp_path):
    real = StateFile.append

    def append(self: StateFile, *given: Any) -> None:
        real(self, *given)
        if self.written() > 5:
            _spoil_states(self, row=5)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EdgezoError, match="3 times"):
        patch.setattr(StateFile, "append", append)
        run_of(bench, tmp_path / "run", train="probe", steps=6)


def test_a_lost_or_damaged_probe_is_named_and_nothing_is_computed_with_another(
    bench, edgezo_json, tmp_path
):
    run = tmp_path / "run"
    run_of(bench, run, train="lowrank+probe")
    file = run / "probe.safetensors"
    whole = file.read_bytes()
    (run / "summary.json").unlink()
    for damage in (None, whole[: len(whole) // 2], b"garbage"):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        commands = [("eval", "--model", run), ("finetune", "--resume", "--out", run)]
        commands.append(("replay", run, "--out", tmp_path / "copy"))
        for command in commands:
            code, output = edgezo_json(*command)
            assert code == 1 and "probe.safetensors" in output["error"]
        file.write_bytes(whole)
    assert edgezo_json("finetune", "--resume", "--out", run)[0] == 0
