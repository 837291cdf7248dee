"""Blocks and tables that are read from the base's own files have the bits of those that were put together at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bench
from safetensors.torch import save_file

from edgezo.machine import limits
from edgezo.network.placement import StoredMatrix
from edgezo.plan.request import make_config
from edgezo.run import evaluate
from edgezo.run.export import export
from edgezo.run.train import finetune
from edgezo.weights.from_base import BaseBlock, BaseTable
from edgezo.weights.safetensors_file import SafetensorsSource

SHAPE = (46, 64)


def stored(folder: Path, **changes: Any) -> StoredMatrix:
    """A random matrix in a checkpoint."""
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"m": values}, folder / "model.safetensors")
    usual = {"precision": "fp32", "rounding": "plane", "trained": False}
    usual |= {"table": False, "transpose": False}
    return StoredMatrix(SafetensorsSource(folder), "m", **{**usual, **changes})


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_a_block_in_the_base_has_the_bits_of_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, transpose: bool
) -> None:
    monkeypatch.setattr(limits, "TILE_BYTES", 7 * SHAPE[1] * 4)  # the matrix has seven tiles
    matrix = stored(tmp_path, precision=precision, transpose=transpose)
    block = BaseBlock("block", {"m": matrix.vacant()}, {"m": matrix.pieces})
    slot = torch.full((block.data_bytes,), 7, dtype=torch.uint8)
    block.read(slot)
    whole = matrix.make().tensors()
    assert {part.suffix for part in block.parts} == set(whole)
    assert all(torch.equal(part.view(slot), whole[part.suffix]) for part in block.parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_table_in_the_base_reads_like_one_in_memory(tmp_path: Path, precision: str) -> None:
    matrix = stored(tmp_path, precision=precision, table=True)
    table, memory = BaseTable(matrix.vacant(), matrix.make), matrix.make()
    for rows in (slice(3, 40), torch.tensor([9, 3, 45, 9])):
        count = len(range(*rows.indices(SHAPE[0]))) if isinstance(rows, slice) else len(rows)
        ours, theirs = (torch.empty(count, SHAPE[1]) for _ in range(2))
        assert torch.equal(table.expand(rows, ours), memory.expand(rows, theirs))


@pytest.mark.parametrize("form", ["hf", "gguf", "onnx"])
def test_an_export_beside_frozen_weights_copies_no_block(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    changes = {"train": "lowrank", "residency": "disk", "out": str(tmp_path / "run")}
    finetune(make_config(bench.settings("label", **changes)))

    def refused() -> None:
        raise AssertionError("an export made a copy of blocks")

    monkeypatch.setattr(evaluate, "temporary_overlay", refused)
    made = export(tmp_path / "run", form, tmp_path / form)
    assert made["weight_bytes"] > 0
