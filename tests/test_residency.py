"""Weights on disk: the same bits as in memory, through kills, damage and a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Bench, make_model

from edgezo.config import make_config
from edgezo.train import finetune


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The bench with a model of four blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return Bench(make_model(folder / "model", num_hidden_layers=4), bench.data)


def run_of(deep: Bench, out: Path, kind: str = "label", **changes: Any) -> dict[str, Any]:
    return finetune(make_config(deep.settings(kind, out=str(out), **changes)))


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
