"""``benchmarks/gpu.py all`` goes through its sections: here on a CPU, with tiny shapes. Its figures are a GPU's."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import Bench

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


def test_a_rehearsal_measures_and_saves_each_figure(bench: Bench, tmp_path, monkeypatch):
    source = ("--tokenizer", bench.model, "--rows", bench.data / "label.jsonl")
    sections = ("noise", "bits", "step", "peak", "host")
    code = run_script(
        monkeypatch, "all", "--rehearse", "--out", tmp_path, *source, "--only", *sections
    )
    made = json.loads((tmp_path / "gpu.json").read_text())
    assert code == 0, made
    assert made["rehearsal"] is True
    by_section = {name: [r for r in made["rows"] if r["section"] == name] for name in sections}
    assert all(row["equal"] for row in by_section["bits"])
    assert {row["kind"] for row in by_section["step"]} == {"signs", "rademacher"}
    assert all(row["step_s"] > 0 and row["goal"] for row in by_section["step"])
    assert by_section["host"][0]["equal"]
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"## {name}" in page for name in sections)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, "all", "--out", tmp_path) == 1
    assert "--rehearse" in capsys.readouterr().out
