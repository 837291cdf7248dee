"""Weights on disk: a run has the same bits as in memory, despite kills, damage and a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from conftest import Bench, make_model
from forks import Blow
from safetensors import safe_open

from edgezo.errors import EdgezoError
from edgezo.machine.downloads import cache_dir
from edgezo.machine.limits import EVAL_TOKENS
from edgezo.machine.open_files import LOCK_SUFFIX
from edgezo.network.model import Model
from edgezo.plan import footprint
from edgezo.plan.request import make_config
from edgezo.run import session
from edgezo.run.journal import open_journal
from edgezo.run.progress import Silent
from edgezo.run.short_memory import MicroBatchFitter
from edgezo.run.step import Stepper
from edgezo.run.train import finetune
from edgezo.weights.disk import PAGE_BYTES, DiskTable, OverlayFile
from edgezo.weights.home import Traffic
from edgezo.weights.layouts import Dense, place, vacant
from edgezo.weights.saved import Saved, saved_sha256
from edgezo.zo.noise import Key


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench with a model of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return Bench(make_model(folder / "model", num_hidden_layers=4), bench.data)


def run_of(deep: Bench, out: Path, kind: str = "label", **changes: Any) -> dict[str, Any]:
    return finetune(make_config(deep.settings(kind, out=str(out), **changes)))


@pytest.mark.parametrize(
    ("precision", "rounding"),
    [("fp32", None), ("bf16", "plane"), ("fp16", "stochastic"), ("int8", None)],
)
def test_a_table_on_disk_reads_and_writes_like_one_in_memory(tmp_path, precision, rounding):
    weight = torch.randn(23, 10, generator=torch.Generator().manual_seed(0))
    how = {"table": True, "rounding": rounding, "trained": True}
    memory = place(weight, precision, **how)
    empty = vacant((23, 10), precision, **how)
    file = OverlayFile(tmp_path / "t.overlay", "run", {"t": empty}, Traffic())
    file.open()
    table = DiskTable(file, empty)
    table.fill(lambda rows: place(weight[rows], precision, **how))
    every, some = slice(0, 23), torch.tensor([9, 3, 22, 9, 10])
    assert torch.equal(_expanded(table, every, 23), _expanded(memory, every, 23))
    assert torch.equal(_expanded(table, some, 5), _expanded(memory, some, 5))
    if not isinstance(memory, Dense):
        return
    for number, rows in enumerate((torch.tensor([20, 4, 5, 0]), slice(8, 12))):
        key = Key(0, number)
        moved = [layout.snap(layout.read(rows) + 0.01, key, 1, rows) for layout in (memory, table)]
        assert torch.equal(*moved)
        for layout, values in zip((memory, table), moved, strict=True):
            layout.write(rows, values)
    raw = table.raw(every)
    assert all(torch.equal(raw[s], tensor) for s, tensor in memory.tensors().items())
    os.truncate(file.path, file.size_bytes - PAGE_BYTES)
    with pytest.raises(EdgezoError, match="--resume"):
        table.raw(every)


def _expanded(layout: Any, rows: Any, count: int) -> torch.Tensor:
    return layout.expand(rows, torch.empty(count, 10))


STORES = [("full", "fp32"), ("full", "bf16"), ("lowrank+head", "int8"), ("lowrank", "int4")]


@pytest.mark.parametrize("kind", ["label", "text"])
@pytest.mark.parametrize(("train", "precision"), STORES)
def test_a_run_from_disk_has_the_bits_of_one_in_memory(deep, tmp_path, train, precision, kind):
    request = {"train": train, "precision": precision, "steps": 4, "eval_every": 2}
    memory = run_of(deep, tmp_path / "memory", kind, **request)
    disk = run_of(deep, tmp_path / "disk", kind, **request, residency="disk")
    assert (tmp_path / "disk" / "overlay").is_dir()
    for name in ("trained_sha256", "eval_before", "eval_after", "loss_first", "loss_last"):
        assert disk[name] == memory[name], name


def test_pieces_of_a_micro_batch_give_the_same_losses_and_the_same_bits_from_disk(
    deep, tmp_path, monkeypatch
):
    request = {"steps": 3, "train": "full", "precision": "fp32"}
    forwards = []
    plain = Model.losses

    def counted(model, batch, *args, **kwargs):
        forwards.append(len(batch.ids))
        return plain(model, batch, *args, **kwargs)

    monkeypatch.setattr(Model, "losses", counted)
    run_of(deep, tmp_path / "whole", **request)
    whole = [*forwards]
    monkeypatch.setattr(footprint, "REUSED_BYTES", 200_000)
    monkeypatch.setattr(footprint, "LEAST_PIECE_TOKENS", 1)
    forwards.clear()
    pieces = run_of(deep, tmp_path / "pieces", **request)
    plan = json.loads((tmp_path / "pieces" / "plan.json").read_text())
    assert len(forwards) > len(whole)
    assert max(forwards) <= max(plan["most_tokens"], EVAL_TOKENS)
    disk = run_of(deep, tmp_path / "disk", residency="disk", **request)
    assert disk["trained_sha256"] == pieces["trained_sha256"]
    records = []
    for name in ("whole", "pieces", "disk"):
        with open_journal(tmp_path / name / "journal.bin", resume=False) as journal:
            records.append(journal.record(0))
    np.testing.assert_allclose(records[1].losses, records[0].losses, atol=1e-5)
    np.testing.assert_array_equal(records[2].losses, records[1].losses)


def test_a_step_reads_and_writes_each_block_once(deep, tmp_path):
    request = {"train": "full", "precision": "bf16", "steps": 40, "micro_batch": 4}
    summary = run_of(deep, tmp_path / "run", **request, residency="disk")
    blocks = sorted((tmp_path / "run" / "overlay").glob("block-*"))
    block_bytes = sum(file.stat().st_size - PAGE_BYTES for file in blocks)
    assert len(blocks) == 4
    # Beside them the few rows of the table that the batch uses.
    assert block_bytes < summary["disk_written_bytes"] < 1.2 * block_bytes
    assert block_bytes < summary["disk_read_bytes"] < 1.2 * block_bytes
    assert summary["residency"] == "disk"


def test_frozen_codes_are_never_written(deep, tmp_path):
    summary = run_of(deep, tmp_path / "run", precision="int4", residency="disk")
    assert summary["disk_read_bytes"] > 0
    assert summary["disk_written_bytes"] == 0


@pytest.mark.parametrize("first", ["disk", "resident"])
def test_a_run_goes_on_where_there_is_more_or_less_room(deep, tmp_path, first, edgezo_json):
    request = {"train": "full", "precision": "bf16", "steps": 6}
    whole = run_of(deep, tmp_path / "whole", **request)
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _after_step(patch, 3, _interrupt)
        run_of(deep, run, **request, residency=first)
    other = "resident" if first == "disk" else "disk"
    code, summary = edgezo_json("finetune", "--resume", "--out", run, "--residency", other)
    assert (code, summary["trained_sha256"]) == (0, whole["trained_sha256"])
    assert (run / "overlay").exists() == (other == "disk")


def test_blocks_ahead_of_a_journal_that_was_cut_are_made_again(deep, tmp_path, edgezo_json):
    """Without a snapshot a resume begins at step 0. It may itself be interrupted before its first step."""
    request = {"train": "full+head", "precision": "bf16", "steps": 6, "snapshot_every": 100}
    whole = run_of(deep, tmp_path / "whole", **request)
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _after_step(patch, 4, _interrupt)
        run_of(deep, run, **request, residency="disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatchFitter, "longest_first", lambda self: _interrupt(run))
        assert edgezo_json("finetune", "--resume", "--out", run)[0] == 130
    code, resumed = edgezo_json("finetune", "--resume", "--out", run)
    assert (code, resumed["trained_sha256"]) == (0, whole["trained_sha256"])


def test_a_block_that_stays_in_memory_for_a_while_is_not_taken_from_an_old_file(deep, tmp_path):
    settings = deep.settings(train="full", precision="bf16", out=str(tmp_path / "run"))
    run_of(deep, tmp_path / "run", train="full", precision="bf16", residency="disk")
    files = sorted(file.name for file in (tmp_path / "run" / "overlay").glob("block-*"))
    assert files == [f"block-{i:04}.overlay" for i in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        _keep(patch, 3)
        resumed = finetune(make_config(settings, {"residency": "disk"}), resume=True)
    assert resumed["steps"] == 3
    files = [file.name for file in (tmp_path / "run" / "overlay").glob("block-*")]
    assert files == ["block-0003.overlay"]


def _keep(patch: pytest.MonkeyPatch, blocks: int) -> None:
    """Let the plan keep ``blocks`` blocks in memory although --residency disk was asked for."""
    real = session.make_plan
    patch.setattr(
        session,
        "make_plan",
        lambda *args, **more: replace(real(*args, **more), blocks_on_disk=4 - blocks),
    )


def test_folders_that_a_killed_evaluation_left_are_removed_by_the_next(deep, tmp_path, edgezo_json):
    run_of(deep, tmp_path / "run", train="full", precision="bf16", residency="disk")
    leftover = cache_dir() / "overlay" / "tmpleft"
    leftover.mkdir(parents=True)
    (leftover / "block-0000.overlay").touch()
    leftover.with_name(f"tmpleft{LOCK_SUFFIX}").touch()
    assert edgezo_json("eval", "--model", tmp_path / "run")[0] == 0
    assert not leftover.exists()


def test_replay_and_evaluation_take_weights_from_disk_too(deep, tmp_path, edgezo_json):
    request = {"train": "full+head", "precision": "bf16", "residency": "disk"}
    summary = run_of(deep, tmp_path / "run", **request)
    code, answer = edgezo_json("replay", tmp_path / "run", "--out", tmp_path / "again")
    assert (code, answer["trained_sha256"]) == (0, summary["trained_sha256"])
    for made in ("run", "again"):
        code, answer = edgezo_json("eval", "--model", tmp_path / made)
        assert (code, answer["loss"]) == (0, summary["eval_after"]["loss"])
    with safe_open(tmp_path / "again" / "trained.safetensors", "pt") as file:
        saved = [Saved.of(name, file.get_tensor(name)) for name in file.keys()]
    assert saved_sha256(saved) == summary["trained_sha256"]
    leftovers = list((cache_dir() / "overlay").iterdir())
    assert leftovers == [], "temporary overlays are removed"


# ---------------------------------------------------------------------------------------------
# Faults


def _after_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[Path], None]) -> None:
    """Call ``act`` with the run directory after step ``number``."""
    real = Stepper.step

    def stepped(self: Stepper, step: int, *more: Any) -> Any:
        record = real(self, step, *more)
        if step == number:
            act(self.state.files.path)
        return record

    patch.setattr(Stepper, "step", stepped)


def _interrupt(run: Path) -> None:
    raise KeyboardInterrupt


def _flip(run: Path) -> None:
    file = run / "overlay" / "block-0002.overlay"
    data = bytearray(file.read_bytes())
    data[PAGE_BYTES + 77] ^= 4
    file.write_bytes(data)


def _truncate(run: Path) -> None:
    os.truncate(run / "overlay" / "block-0002.overlay", PAGE_BYTES + 100)


@pytest.mark.parametrize("damage", [_flip, _truncate])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_damaged_block_is_made_again_and_named(deep, tmp_path, damage, precision):
    train = "full" if precision == "bf16" else "lowrank"
    request = {"train": train, "precision": precision, "steps": 6}
    whole = run_of(deep, tmp_path / "whole", **request)
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        _after_step(patch, 2, damage)
        config = make_config(deep.settings(out=str(tmp_path / "run"), **request, residency="disk"))
        summary = finetune(config, progress=progress)
    assert summary["trained_sha256"] == whole["trained_sha256"]
    assert summary["eval_after"] == whole["eval_after"]
    assert any("block-0002" in text and "made again" in text for text in notes), notes


def test_a_damaged_table_stops_the_run_and_a_resume_goes_on(deep, tmp_path, edgezo_json):
    request = {"train": "full", "precision": "bf16", "steps": 6}
    whole = run_of(deep, tmp_path / "whole", **request)

    def spoil(run: Path) -> None:
        file = run / "overlay" / "table-0.overlay"
        data = bytearray(file.read_bytes())
        data[PAGE_BYTES:] = bytes(b ^ 1 for b in data[PAGE_BYTES:])
        file.write_bytes(data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EdgezoError, match="--resume"):
        _after_step(patch, 2, spoil)
        run_of(deep, tmp_path / "run", **request, residency="disk")
    code, resumed = edgezo_json("finetune", "--resume", "--out", tmp_path / "run")
    assert (code, resumed["trained_sha256"]) == (0, whole["trained_sha256"])


def test_a_disk_that_fills_up_during_a_write_back_loses_nothing(deep, tmp_path, edgezo_json):
    request = {"train": "full", "precision": "bf16", "steps": 6}
    whole = run_of(deep, tmp_path / "whole", **request)
    real, calls = os.pwrite, 0

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        if calls > 60 and len(data) > PAGE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        calls += 1
        return real(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EdgezoError, match="free"):
        patch.setattr(os, "pwrite", full)
        run_of(deep, tmp_path / "run", **request, residency="disk")
    assert (tmp_path / "run" / "journal.bin").exists()
    code, resumed = edgezo_json("finetune", "--resume", "--out", tmp_path / "run")
    assert (code, resumed["trained_sha256"]) == (0, whole["trained_sha256"])


def test_without_room_for_the_overlay_nothing_begins(deep, tmp_path, edgezo, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    request = deep.arguments(train="full", residency="disk", out=tmp_path / "run")
    code, _, err = edgezo("finetune", *request)
    assert code == 3
    assert "only 1.0 KB are free" in err
    assert not list(tmp_path.rglob("*.overlay"))
    assert not (tmp_path / "run" / "journal.bin").exists()


BLOWS = [
    Blow("overlay", 2, 0.5),  # while it is made
    Blow("overlay", 40, 0),
    Blow("overlay", 7, 0.5),
    Blow("record", 3, 1),
    Blow("update", 5, 1),
    Blow("overlay", 30, 1),
    Blow("summary.json", 1, 0),
]


@pytest.mark.parametrize("train", ["full", "full+head"])
def test_a_run_killed_in_a_write_of_the_overlay_ends_with_the_same_bits(deep, tmp_path, train):
    request = {"train": train, "precision": "bf16", "steps": 12, "snapshot_every": 4}
    whole = run_of(deep, tmp_path / "whole", **request)
    arguments = deep.arguments(**request, residency="disk", out=tmp_path / "run")
    died = 0
    for blow in BLOWS:
        more = ["--resume"] if (tmp_path / "run" / "config.toml").exists() else []
        code, _, err = forks.start(["finetune", *arguments, *more], tmp_path / "o", blow).end()
        assert code in (0, -signal.SIGKILL), err
        died += code != 0
    assert died >= 4
    code, out, err = forks.start(
        ["finetune", *arguments, "--resume", "--json"], tmp_path / "o"
    ).end()
    assert code == 0, err
    summary = json.loads(out)
    assert summary["trained_sha256"] == whole["trained_sha256"]
    assert summary["eval_after"] == whole["eval_after"]
