"""The ONNX engine writes what the torch engine writes: prompts of several lengths, windows, tokens in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_onnx_engine import both, exported

from edgezo.data.tasks import Generation
from edgezo.errors import EdgezoError
from edgezo.network import onnx_writing
from edgezo.network.generate import generate
from edgezo.network.generate import write_one as torch_writes
from edgezo.network.onnx_manifest import Manifest, open_manifest
from edgezo.network.onnx_writing import check_writes, write_all, write_one
from edgezo.network.sampling import Sampler

pytest.importorskip("onnxruntime", reason="pip install 'edgezo[onnx]' brings onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")

MOST = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(4, 300, length).tolist() for length in (23, 5, 40, 11)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_what_is_written_is_what_torch_writes(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = both(folder, family, "completion")

    def over(ids: list[int]) -> bool:
        return ids[-1] % 5 == 0

    (expected,) = generate(model, prompts(), Generation(MOST), over)
    for at_once in (onnx_writing.WRITING_TOKENS, 12):  # prompts pass whole, and in pieces
        monkeypatch.setattr(onnx_writing, "WRITING_TOKENS", at_once)
        assert write_all(plain, prompts(), MOST, over) == expected
        alone = list(write_one(plain, prompts()[2], MOST))
        assert alone == list(map(int, torch_writes(model, prompts()[2], MOST)))


def test_tokens_by_chance_come_again_with_their_seed(folder: Path) -> None:
    _, plain = both(folder, "llama", "completion")

    def by(seed: int) -> list[int]:
        return list(write_one(plain, prompts()[0], MOST, Sampler(1.5, 1.0, seed)))

    assert by(3) == by(3) != by(4)


def test_graphs_of_before_say_that_they_write_nothing(folder: Path) -> None:
    _, graphs = exported(folder, "llama")
    _, plain = both(folder, "llama", "completion")
    check_writes(plain)
    values: dict[str, Any] = dict(open_manifest(graphs).values)
    values["blocks"] = [
        {name: value for name, value in block.items() if name != "writing"}
        for block in values["blocks"]
    ]
    plain.manifest = Manifest(graphs, values)
    with pytest.raises(EdgezoError, match="has no graphs for writing"):
        list(write_one(plain, [1, 2, 3], 2))
