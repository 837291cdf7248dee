"""ONNX exports: the checker passes, and onnxruntime gives the tokens and the labels of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
import torch
from conftest import Bench, Families
from test_runs import run_of

import edgezo as package
from edgezo.errors import EdgezoError
from edgezo.network.onnx_pieces import Pieces
from edgezo.network.onnx_sessions import session_options
from edgezo.run import export_onnx
from edgezo.run.export import export

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE = {"step": 0.5, "sigma": 0.05}
FAMILIES = tuple(family for family in tiny_models.FAMILIES if family != "roberta")
PROMPTS = ("a warm film", "film 3 is cold and long and long. Verdict:", "The year 2024")
MOST = 6


@pytest.fixture(scope="module")
def families(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(bench, tmp_path_factory.mktemp("families"), layers=3)


@pytest.fixture(scope="module")
def onnxruntime() -> Any:
    return pytest.importorskip(
        "onnxruntime", reason="pip install 'edgezo[onnx]' brings onnxruntime"
    )


def session_of(onnxruntime: Any, folder: Path) -> Any:
    return onnxruntime.InferenceSession(
        str(folder / "model.onnx"), session_options(), providers=["CPUExecutionProvider"]
    )


def written_by_run(run: Path) -> list[list[int]]:
    with package.load(run, max_new_tokens=MOST, precision="fp32") as used:
        return [
            [*(ids := list(used.prompt_ids(prompt))), *used.model.tokens_after(ids, MOST, None)]
            for prompt in PROMPTS
        ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["full", "lowrank+head"])
def test_a_decoder_writes_the_tokens_of_the_run(
    families: Any, family: str, train: str, onnxruntime: Any, tmp_path: Path
) -> None:
    bench = families(family)
    run_of(bench, tmp_path / "run", kind="completion", train=train, **LARGE)
    made = export(tmp_path / "run", "onnx", tmp_path / "out")
    assert made["graph"] == "decoder" and made["notes"] == []
    onnx.checker.check_model(str(tmp_path / "out/model.onnx"), full_check=True)
    session = session_of(onnxruntime, tmp_path / "out")
    for ids in written_by_run(tmp_path / "run"):
        logits = export_onnx.decoded(session, ids[:-MOST], MOST)
        assert logits.argmax(-1).tolist() == ids[-MOST:]
    domains = {
        node.domain
        for node in onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.node
    }
    assert domains == {""}, "standard operators only"


def test_rows_of_a_batch_do_not_touch_each_other(
    families: Any, onnxruntime: Any, tmp_path: Path
) -> None:
    """Padding on the left moves no position, and what is masked is not read."""
    run_of(families("llama"), tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    export(tmp_path / "run", "onnx", tmp_path / "out")
    session = session_of(onnxruntime, tmp_path / "out")
    past = {
        i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    rows = [[5, 9, 31, 7, 200], [77, 3]]
    ids, mask = np.full((2, 5), 4, np.int64), np.zeros((2, 5), np.int64)
    for at, row in enumerate(rows):
        ids[at, 5 - len(row) :], mask[at, 5 - len(row) :] = row, 1
    together = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **past})[0]
    for at, row in enumerate(rows):
        alone = export_onnx.decoded(session, row, 1)[0]
        assert np.allclose(together[at, -1], alone, atol=1e-4)


KINDS = {
    "linear probe": "lowrank+probe",
    "label words": "lowrank",
    "exact head": "lowrank+head",
    "norms": "lowrank+norms+scales",
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_classifier_has_the_probabilities_of_the_run(
    families: Any, family: str, name: str, onnxruntime: Any, tmp_path: Path
) -> None:
    bench = families(family)
    run_of(bench, tmp_path / "run", train=KINDS[name], **LARGE)
    made = export(tmp_path / "run", "onnx", tmp_path / "out")
    assert made["graph"] == "classifier" and made["predicts_as_run"] is True
    session = session_of(onnxruntime, tmp_path / "out")
    texts = [
        f"film {i} is {'warm' if i % 2 else 'cold'}" + " and long" * (i % 4) for i in range(12)
    ]
    with package.load(tmp_path / "run") as used:
        from edgezo.data.row_files import Problems, Record

        asked = used.asker.ask([Record("", {"text": text}) for text in texts], Problems())
        wanted = np.array([list(p["probabilities"].values()) for p in used.predict(texts)])
    rows = [list(a.example.rows[0].ids) for a in asked]
    width = max(map(len, rows))
    for right in (True, False):  # rows may be padded on either side
        ids, mask = np.zeros((12, width), np.int64), np.zeros((12, width), np.int64)
        for at, row in enumerate(rows):
            part = slice(0, len(row)) if right else slice(width - len(row), width)
            ids[at, part], mask[at, part] = row, 1
        shares = session.run(["probabilities"], {"input_ids": ids, "attention_mask": mask})[0]
        assert np.allclose(shares, wanted, atol=1e-4)
    assert np.ptp(wanted[:, 0]) > 1e-3


def test_a_probe_that_reads_words_of_several_tokens_becomes_a_classifier(
    families: Any, onnxruntime: Any, tmp_path: Path
) -> None:
    run_of(families("llama"), tmp_path / "run", kind="choice", train="lowrank+probe", **LARGE)
    assert export(tmp_path / "run", "onnx", tmp_path / "out")["graph"] == "classifier"
    with package.load(tmp_path / "run") as used:
        from edgezo.data.row_files import Problems, Record

        (asked,) = used.asker.ask([Record("", {"text": "film 3 is warm"})], Problems())
        (wanted,) = used.predict(["film 3 is warm"])
        ids = np.array([used.model.model.reads([asked.example])[0].rows[0].ids], np.int64)
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (shares,) = session_of(onnxruntime, tmp_path / "out").run(["probabilities"], fed)[0]
    assert np.allclose(shares, list(wanted["probabilities"].values()), atol=1e-4)


def test_half_the_bytes(families: Any, onnxruntime: Any, tmp_path: Path) -> None:
    run_of(families("llama"), tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    for dtype in ("fp32", "fp16"):
        export(tmp_path / "run", "onnx", tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / d / "model.onnx.data").stat().st_size for d in ("fp32", "fp16")]
    assert sizes[1] < 0.75 * sizes[0]  # tensors begin at multiples of a page
    ids = [5, 9, 31, 7]
    whole, half = (
        export_onnx.decoded(session_of(onnxruntime, tmp_path / d), ids, 1)[0]
        for d in ("fp32", "fp16")
    )
    assert np.abs(whole - half).max() < 0.05 * whole.std()


def unpacked(tensors: dict[str, Any], name: str, cols: int, bits: int) -> tuple[Any, Any]:
    """Codes and scales of a matrix, (rows, cols) float32 each."""
    scales = onnx.numpy_helper.to_array(tensors[f"{name}_scale"])
    codes = onnx.numpy_helper.to_array(tensors[name])
    if codes.ndim == 2:  # a scale a row
        return codes.astype(np.float32), np.broadcast_to(scales[:, None], codes.shape)
    zero: Any = 128.0
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1)
        zero = onnx.numpy_helper.to_array(tensors[f"{name}_zero"])
    rows = len(codes)
    codes = codes.reshape(rows, -1).astype(np.float32)
    block = codes.size // scales.size
    each, zero = (
        np.broadcast_to(part, scales.shape).reshape(rows, -1).repeat(block, axis=1)
        for part in (scales, zero)
    )
    return (codes - zero)[:, :cols], each[:, :cols]


@pytest.mark.parametrize(
    ("dtype", "bits", "far"), [("int8", 8, 0.1), ("int8-blocks", 8, 0.1), ("int4", 4, 0.8)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_codes_are_the_weights_to_their_rounding(
    families: Any,
    family: str,
    dtype: str,
    bits: int,
    far: float,
    onnxruntime: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        export_onnx, "_ROUGH", 1.0
    )  # random weights in 4 bits are far from themselves
    wide = (
        {"hidden_size": 64, "intermediate_size": 104}  # no multiple of a block
        if family == "llama"
        else {"n_embd": 96, "n_inner": 64}
    )
    heads = {"num_attention_heads": 8} if family == "llama" else {}
    bench = families(family, **wide, **heads)
    run_of(bench, tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    export(tmp_path / "run", "onnx", tmp_path / "whole")
    export(tmp_path / "run", "onnx", tmp_path / dtype, dtype=dtype)
    model = onnx.load(tmp_path / dtype / "model.onnx")
    onnx.checker.check_model(str(tmp_path / dtype / "model.onnx"), full_check=True)
    tensors = {t.name: t for t in model.graph.initializer}
    whole = {t.name: t for t in onnx.load(tmp_path / "whole/model.onnx").graph.initializer}
    named = [n for n in tensors if f"{n}_scale" in tensors]
    assert len(named) > 4
    for name in named:
        wanted = onnx.numpy_helper.to_array(whole[name.removesuffix("_blocks")])
        of_name = bits if name.endswith("_blocks") else 8
        codes, each = unpacked(tensors, name, wanted.shape[1], of_name)
        assert (np.abs(codes * each - wanted) <= 0.501 * each).all(), name
    ids = [5, 9, 31, 7]
    first, second = (
        export_onnx.decoded(session_of(onnxruntime, tmp_path / d), ids, 1)[0]
        for d in ("whole", dtype)
    )
    assert np.abs(first - second).mean() < far * first.std()


def test_a_file_runs_without_torch(families: Any, onnxruntime: Any, tmp_path: Path) -> None:
    run_of(families("llama"), tmp_path / "run", train="lowrank+probe", **LARGE)
    export(tmp_path / "run", "onnx", tmp_path / "out")
    program = (
        "import sys, numpy as np, onnxruntime\n"
        "from tokenizers import Tokenizer\n"
        "ids = np.array([Tokenizer.from_file(sys.argv[1] + '/tokenizer.json').encode('a warm film It was').ids])\n"
        "session = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx')\n"
        "print(session.run(None, {'input_ids': ids, 'attention_mask': np.ones_like(ids)})[0].tolist()[0])\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with package.load(tmp_path / "run") as used:
        (prediction,) = used.predict(["a warm film"])
    assert json.loads(done.stdout) == pytest.approx(
        [*prediction["probabilities"].values()], abs=1e-4
    )


def test_two_processes_write_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    made = []
    for seed in ("1", "2"):  # of the hash of strings and bytes, which Python draws for each process
        out = tmp_path / seed
        command = [sys.executable, "-m", "edgezo", "export", tmp_path / "run", "--format", "onnx"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*command, "--out", out], check=True, env=environment)
        made.append([(out / name).read_bytes() for name in ("model.onnx", "model.onnx.data")])
    assert made[0] == made[1]


def test_weights_on_disk_are_exported(bench: Bench, onnxruntime: Any, tmp_path: Path) -> None:
    request = {"train": "full", "residency": "disk", "kind": "completion", **LARGE}
    run_of(bench, tmp_path / "run", **request)
    export(tmp_path / "run", "onnx", tmp_path / "out")
    session = session_of(onnxruntime, tmp_path / "out")
    for ids in written_by_run(tmp_path / "run"):
        assert export_onnx.decoded(session, ids[:-MOST], MOST).argmax(-1).tolist() == ids[-MOST:]


# ---------------------------------------------------------------------------------------------
# Without onnxruntime


def test_without_onnxruntime_a_note_says_that_nothing_was_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run_of(bench, tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    made = export(tmp_path / "run", "onnx", tmp_path / "out")
    assert "not run" in made["notes"][0]
    onnx.checker.check_model(str(tmp_path / "out/model.onnx"), full_check=True)
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    table = next(t for t in graph.initializer if t.name == "model.embed_tokens.weight")
    module = tiny_models.auto_class("llama").from_pretrained(bench.model)
    written = torch.from_numpy(onnx.numpy_helper.to_array(table).copy())
    assert torch.equal(written, module.get_input_embeddings().weight)


def test_what_the_graph_cannot_hold_is_refused(families: Any, edgezo: Any, tmp_path: Path) -> None:
    padding = {"pad_token_id": 299, "max_position_embeddings": 430}
    run_of(families("roberta", **padding), tmp_path / "masked", train="lowrank")
    run_of(families("llama"), tmp_path / "run", train="lowrank")
    for run, more, why in (
        ("masked", (), "the type roberta"),
        ("run", ("--dtype", "q8_0"), "fp32, fp16, int8"),
    ):
        out = tmp_path / "out"
        code, _, err = edgezo("export", tmp_path / run, "--format", "onnx", *more, "--out", out)
        assert code == 2 and why in err and not out.exists(), err


def test_a_graph_that_answers_otherwise_is_not_kept(
    bench: Bench, onnxruntime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(bench, tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    monkeypatch.setattr(export_onnx.Decoder, "scale", lambda self: 1.0)
    with pytest.raises(EdgezoError, match="answers otherwise than the run"):
        export(tmp_path / "run", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_that_the_type_cannot_hold_is_said(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank", step=1e-9, sigma=1e-3)
    with pytest.raises(EdgezoError, match="would be those of the base"):
        export(tmp_path / "run", "onnx", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["completion", "label"])
@pytest.mark.parametrize("dtype", list(export_onnx.WEIGHT_FORMS))
def test_a_graph_in_pieces_answers_as_the_whole(
    bench: Bench,
    onnxruntime: Any,
    dtype: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export_onnx, "_ROUGH", 1.0)  # codes of 4 bits move random weights far
    run_of(bench, tmp_path / "run", kind=kind, train="lowrank", **LARGE)
    export(tmp_path / "run", "onnx", tmp_path / "out", dtype=dtype)
    whole, ids = session_of(onnxruntime, tmp_path / "out"), [5, 9, 31, 7, 200]
    for most_bytes in (1, 20_000):  # every node alone and every product by rows, or a few of them
        pieces = Pieces(tmp_path / "out/model.onnx", most_bytes)
        ports = [(port.name, port.type) for port in whole.get_inputs()]
        assert [(port.name, port.type) for port in pieces.get_inputs()] == ports
        if kind == "completion":
            ours, theirs = (export_onnx.decoded(s, ids, 3, [7, 8, 9]) for s in (pieces, whole))
        else:
            ours, theirs = (export_onnx._shares_of(s, ids) for s in (pieces, whole))
        assert np.allclose(ours, theirs, atol=2e-2 * np.abs(theirs).max()), np.abs(
            ours - theirs
        ).max()
        if dtype in ("fp32", "int8"):
            assert np.allclose(ours, theirs, atol=1e-5)
    assert not list((tmp_path / "out").glob("piece*")), "nothing of it stays"
