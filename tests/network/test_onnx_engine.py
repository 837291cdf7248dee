"""The ONNX engine computes what the torch engine does: losses of both sides, updates, gradients, linear probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from edgezo.data.batches import Example, collate, packed_rows
from edgezo.data.trees import Row
from edgezo.errors import EdgezoError, UsageError
from edgezo.network import plain_readout, readout
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.exact_head import ExactHead
from edgezo.network.loader import load_tokenizer, open_model
from edgezo.network.onnx_engine import OnnxModel, PlainProbe
from edgezo.network.onnx_graph import Codes
from edgezo.network.onnx_manifest import open_manifest
from edgezo.network.onnx_sessions import Sessions
from edgezo.network.plain_losses import PlainHead
from edgezo.network.plain_tokenizer import PlainTokenizer
from edgezo.run import export_trainable as export_trainable_module
from edgezo.run.export_trainable import export_trainable
from edgezo.weights.plain_factors import PlainFactors, tensors_sha256
from edgezo.weights.saved import saved_sha256, saved_tensors
from edgezo.zo.bits import Key, exact_grid
from edgezo.zo.recipe import Recipe

pytest.importorskip("onnxruntime", reason="pip install 'edgezo[onnx]' brings onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")

SEED, RANK, SIGMA, KEY = 5, 3, 0.01, Key(5, 3)
LABEL_IDS = (7, 31, 200)
# Biases, tied and untied heads, norms of 1 + w, windows, soft caps, norms of queries and keys, fused matrices.
CASES = (
    *(("llama", "label"), ("llama", "choice"), ("mistral", "label"), ("phi3", "label")),
    *(("qwen2", "completion"), ("qwen3", "label"), ("gemma2", "completion")),
    *(("gemma3_text", "label"), ("gemma3_text", "choice")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


def exported(folder: Path, family: str, precision: str = "fp32") -> tuple[Path, Path]:
    """A small random model, and its graphs."""
    base, graphs = folder / family, folder / f"{family}-{precision}"
    if not base.exists():
        tiny_models.make(family, base, tokenizer=True)
    if not graphs.exists():
        export_trainable(str(base), graphs, precision)
    return base, graphs


def examples_of(kind: str) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate((5, 17, 9, 12)):
        ids = rng.integers(4, 300, length).tolist()
        targets = rng.integers(4, 300, 4).tolist()
        if kind == "label":
            made.append(Example((Row(ids, (length - 1,), ()),), number % 3))
        elif kind == "completion":
            places = tuple(range(length - 4, length))
            made.append(Example((Row(ids, places, tuple(targets)),), -1))
        else:  # options that begin alike pass as a tree
            options = tuple(
                Row([*ids, *targets[:n]], tuple(range(length - 1, length + n)), (*targets[:n], 9))
                for n in (0, 1, 3)
            )
            made.append(Example(options, number % 3))
    return made


def both(folder: Path, family: str, kind: str, precision: str = "fp32") -> tuple[Any, OnnxModel]:
    """The same model on both engines, after the same two steps."""
    base, graphs = exported(folder, family, precision)
    label_ids = LABEL_IDS if kind == "label" else ()
    spec = ModelSpec(precision, ("lowrank",), "signs", SEED, RANK, kind=kind, label_ids=label_ids)
    model = assemble(open_model(base), spec)
    manifest = open_manifest(graphs)
    linears = {number: block.linears for number, block in enumerate(manifest.blocks)}
    factors = PlainFactors(linears, SEED, RANK)
    plain = OnnxModel(manifest, Sessions(manifest, threads=1), factors, kind, label_ids)
    moves = exact_grid(np.array([0.03, -0.02, 0.01, 0.04]))
    recipes = [Recipe(0, moves, 0.0), Recipe(1, -moves, 0.01)]
    model.store.apply(recipes)
    factors.apply(recipes)
    return model, plain


@pytest.mark.parametrize("family, kind", CASES)
def test_losses_of_a_step_are_those_of_the_torch_engine(folder: Path, family: str, kind: str):
    model, plain = both(folder, family, kind)
    trained = tensors_sha256(plain.factors.tensors())
    assert trained == saved_sha256(saved_tensors(model.store)), "the same bits by the same recipes"
    examples, slots = examples_of(kind), (3, 0, 6, 1)
    tensors, arrays = collate(examples, slots), packed_rows(examples, slots)
    expected, chosen = model.losses(tensors, model.probe(tensors, KEY, SIGMA), sides=2)
    losses, predicted = plain.losses(arrays, PlainProbe(KEY, SIGMA))
    np.testing.assert_allclose(losses, expected.numpy(), atol=2e-5)
    assert np.abs(losses[0] - losses[1]).min() > 1e-4, "the sides differ by what perturbs them"
    if kind != "completion":
        assert (predicted == chosen.numpy()).all()
    np.testing.assert_allclose(plain.losses(arrays)[0], model.losses(tensors)[0].numpy(), atol=2e-5)
    np.testing.assert_allclose(plain.answers(arrays), model.answers(tensors).numpy(), atol=5e-5)


def test_over_int8_codes_the_engines_agree_as_over_fp32(folder: Path):
    """They are the codes of the torch engine."""
    model, plain = both(folder, "gemma3_text", "label", "int8")
    examples = examples_of("label")
    expected = model.losses(collate(examples, range(4)))[0].numpy()
    losses = plain.losses(packed_rows(examples, range(4)))[0]
    np.testing.assert_allclose(losses, expected, atol=2e-5)


def test_int4_codes_are_within_a_step_of_their_weights(folder: Path):
    """Two codes in a byte, zero points too; blocks of 32, the last one padded."""
    rows = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)) + 0.2
    made = export_trainable_module._with_whole_zeros(rows, Codes("w", 4, 32))
    raw = np.frombuffer(made.raw, np.uint8).reshape(5, 3, 16)
    codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(5, 3, 32).astype(np.float32)
    pairs = made.zeros.numpy().reshape(5, 2)
    zeros = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(5, 4)[:, :3, None]
    scales = made.scales.numpy().reshape(5, 3, 1)
    back = ((codes - zeros) * scales).reshape(5, 96)[:, :80]
    step = np.repeat(scales, 32, axis=2).reshape(5, 96)[:, :80]
    assert (np.abs(back - rows.numpy()) <= 1.01 * step).all()
    _, plain = both(folder, "qwen2", "label", "int4")
    losses = plain.losses(packed_rows(examples_of("label"), range(4)), PlainProbe(KEY, SIGMA))[0]
    assert np.isfinite(losses).all() and (losses[0] != losses[1]).all()


def test_a_micro_batch_has_the_losses_that_its_examples_have_in_the_whole(folder: Path):
    _, plain = both(folder, "llama", "label")
    examples, probe = examples_of("label"), PlainProbe(KEY, SIGMA)
    whole = plain.losses(packed_rows(examples, range(4)), probe)[0]
    for slots in ((0, 2), (3,), (1,)):
        part = packed_rows([examples[slot] for slot in slots], slots)
        np.testing.assert_allclose(plain.losses(part, probe)[0], whole[:, list(slots)], atol=1e-5)


def test_frozen_blocks_below_give_the_states_that_the_upper_ones_begin_with(folder: Path):
    _, plain = both(folder, "gemma3_text", "label")
    batch = packed_rows(examples_of("label"), range(4))
    for block in (0, 1):
        del plain.factors.values[block]
    plain.first_trained = 0
    expected = plain.losses(batch, PlainProbe(KEY, SIGMA))[0]
    plain.first_trained = 2
    np.testing.assert_allclose(plain.losses(batch, PlainProbe(KEY, SIGMA))[0], expected, atol=1e-5)
    states = plain.below(batch)
    plain.kept_states = lambda packed: states
    np.testing.assert_allclose(plain.losses(batch, PlainProbe(KEY, SIGMA))[0], expected, atol=1e-5)


@pytest.mark.parametrize("family, kind", [("qwen2", "label"), ("gemma2", "completion")])
def test_the_exact_head_learns_what_it_learns_with_torch(folder: Path, family: str, kind: str):
    model, plain = both(folder, family, kind)
    width, vocab = plain.manifest.shape.hidden, plain.manifest.shape.vocab
    if kind == "label":
        model.scorer.exact, plain.scorer.exact = (
            ExactHead.for_labels(3, width),
            PlainHead.of_words(3, width),
        )
    else:
        model.scorer.exact = ExactHead.for_vocabulary(vocab, width, 4, SEED)
        plain.scorer.exact = PlainHead.of_vocabulary(vocab, width, 4, SEED)
    examples = examples_of(kind)
    tensors, arrays = collate(examples, range(4)), packed_rows(examples, range(4))
    for _ in range(3):
        expected = model.losses(tensors, model.probe(tensors, KEY, SIGMA), sides=2, learn=0.1)[0]
        losses = plain.losses(arrays, PlainProbe(KEY, SIGMA), learn=0.1)[0]
        np.testing.assert_allclose(losses, expected.numpy(), atol=2e-4)
        model.scorer.exact.update(0.5)
        plain.scorer.exact.update(0.5)
    moved = model.scorer.exact.delta.numpy()
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(plain.scorer.exact.delta, moved, atol=5e-3 * np.abs(moved).max())


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("rows", [12, 60])
def test_a_linear_probe_is_the_one_that_torch_fits(rows: int, single: bool):
    rng = np.random.default_rng(rows)
    labels = rng.integers(0, 3, rows)
    states = [
        (rng.standard_normal((rows, 20)) + 0.3 * block * labels[:, None]).astype(np.float32)
        for block in range(3)
    ]
    blocks = (4, 5, 6)
    expected = readout.fit(
        lambda number: torch.from_numpy(states[number].copy()),
        blocks,
        torch.from_numpy(labels),
        3,
        single,
    )
    fitted = plain_readout.fit_readout(
        lambda number: states[number].copy(), blocks, labels, 3, single
    )
    assert fitted.weights.blocks == expected.readout.blocks
    assert fitted.accuracy == expected.accuracy
    assert fitted.loss == pytest.approx(expected.loss, abs=1e-3)
    np.testing.assert_allclose(
        fitted.weights.weight, expected.readout.weight.numpy(), atol=2e-3, rtol=1e-2
    )


def test_the_tokenizer_gives_the_tokens_and_places_of_the_model_s(folder: Path):
    base, graphs = exported(folder, "llama")
    theirs, ours = load_tokenizer(base), PlainTokenizer.of(open_manifest(graphs))
    texts = ["a warm film", "", "film 3 is cold\nand long. Verdict:", "é ☃ <s>"]
    for special in (False, True):
        options = {"add_special_tokens": special, "return_offsets_mapping": True}
        expected, made = theirs(texts, **options), ours(texts, **options)
        assert made["input_ids"] == expected["input_ids"]
        assert made["offset_mapping"] == expected["offset_mapping"]
    ids = theirs(texts[2])["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    for role in ("eos_token_id", "unk_token_id", "pad_token_id", "mask_token_id", "eos_token"):
        assert getattr(ours, role) == getattr(theirs, role)
    assert ours.chat_template == theirs.chat_template


def test_graphs_that_were_changed_or_are_missing_are_refused(folder: Path, tmp_path: Path):
    _, graphs = exported(folder, "qwen2")
    for damage, message in (
        ("missing", "block-01.data is missing"),
        ("changed", "block-01.data is not the file that was written"),
        ("manifest", "no manifest of trainable graphs"),
        ("none", "no trainable export"),
    ):
        copy = tmp_path / damage
        copy.mkdir()
        for file in graphs.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        data = copy / "block-01.data"
        if damage == "missing":
            data.unlink()
        elif damage == "changed":
            data.write_bytes(data.read_bytes()[:-1] + b"\7")
        elif damage == "manifest":
            (copy / "manifest.json").write_text('{"form": "another"}')
        else:
            (copy / "manifest.json").unlink()
        with pytest.raises(EdgezoError, match=message):
            open_manifest(copy).check_files()


def test_a_graph_that_onnxruntime_does_not_know_and_a_missing_provider_are_named(
    folder: Path, tmp_path: Path
):
    _, graphs = exported(folder, "qwen2")
    manifest = open_manifest(graphs)
    with pytest.raises(UsageError, match=r"--provider qnn: .* has no QNNExecutionProvider.*cpu"):
        Sessions(manifest, "qnn")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in graphs.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "end.onnx").write_bytes(
        (graphs / "end.onnx").read_bytes().replace(b"ReduceMean", b"ReduceMoan")
    )
    broken = Sessions(open_manifest(copy), threads=1)
    zeros = {"states": np.zeros((1, 48), np.float32), "index": np.zeros(1, np.int64)}
    with pytest.raises(EdgezoError, match=r"cannot run end.onnx with --provider cpu.*ReduceMoan"):
        broken.run("end.onnx", zeros)


@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta"])
def test_models_without_such_graphs_are_refused(folder: Path, tmp_path: Path, family: str):
    base = tiny_models.make(family, tmp_path / family, tokenizer=True)
    with pytest.raises(UsageError, match=r"--trainable writes (.|\n)*engine torch"):
        export_trainable(str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
