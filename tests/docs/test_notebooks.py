"""The notebooks of docs/ and README's snippet run in a kernel that holds 480 MB: a tiny model, tiny rows, few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, write_rows
from pages import ROOT, fences

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
# What stands in a notebook, and what is run in its place.
SMALLER = {
    '"smollm2-135m-instruct"': '"my-model"',
    'task="example"': 'data="rows.jsonl", template="{text}. It was", labels="0=bad,1=good"',
    "steps=60": "steps=2, batch_size=4",
    "steps=30": "steps=2, batch_size=4",
}
HOLDING = """
held = bytearray(480_000_000)
held[::4096] = bytes([1]) * len(held[::4096])
"""


def shown(cell: Any) -> str:
    """What stands below a cell, as text."""
    parts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    ]
    return "\n".join(parts)


@pytest.fixture(scope="module")
def folder(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    make_model(folder / "my-model")
    words = ("good", "bad")
    rows = [{"text": f"film {i} is {words[i % 2]}", "label": int(i % 2 == 0)} for i in range(40)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


def test_notebooks_and_readme_run_in_a_kernel_that_holds_480_mb(folder, monkeypatch):
    """One after the other in one kernel, which imports PyTorch once: the second holds what the first has left, too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.v4.new_notebook()
    book.cells.append(nbformat.v4.new_code_cell(HOLDING))
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), f"{path.name} has outputs"
        book.cells += notebook.cells
    snippets = [s for s in fences("python") if s.page.name == "README.md"]
    book.cells += [nbformat.v4.new_code_cell(snippet.text) for snippet in snippets]
    for cell in book.cells:
        for before, instead in SMALLER.items():
            cell.source = cell.source.replace(before, instead)
    client = nbclient.NotebookClient(
        book, timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    texts = [shown(cell) for cell in book.cells if cell.cell_type == "code"]
    assert any("step 2/2" in text for text in texts), texts  # the live line, as it was drawn last
    assert any("calling program: held when it called edgezo" in text for text in texts)
    assert snippets and 'max_mem="1500MB"' in snippets[0].text
    for name in ("first", "own", "my-model-rows"):
        plan = json.loads((folder / "runs" / name / "plan.json").read_text())
        sizes = {item["name"]: item["bytes"] for item in plan["items"]}
        assert 1_500_000_000 == plan["max_mem_bytes"] > plan["needed_bytes"]
        assert sizes["calling program"] > 480_000_000
        if name == "first":  # before PyTorch is imported, which is none of the program's
            assert sizes["calling program"] < 650_000_000
    assert (folder / "own.edgezo").exists()
