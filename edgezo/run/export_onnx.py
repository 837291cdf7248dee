"""``--format onnx``: a run's result as an ONNX graph with its weights beside it, for onnxruntime and the like.

    model.onnx         the graph (onnx_graph.py): a decoder with a key-value cache; of a run that tells labels apart a
                       classifier, from tokens to probabilities, its linear probe or label words inside
    model.onnx.data    the weights, written a tile at a time: fp32, fp16, or matrices as codes of 8 or 4 bits

``onnx.checker`` looks at what was written, and where onnxruntime is installed it answers a text as the run does, or
nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from edgezo import __version__
from edgezo.data.batches import Example, Row, collate
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.limits import MOST_CODE
from edgezo.network.generate import write_one
from edgezo.network.loader import ModelFiles, build_meta
from edgezo.network.onnx_graph import (
    BLOCKS_END,
    IR_VERSION,
    OPSET,
    OWN_DOMAIN,
    SCALE_END,
    ZERO_END,
    Codes,
    Decoder,
    Graph,
)
from edgezo.network.onnx_pieces import Pieces
from edgezo.network.readout import LEAST_SPREAD
from edgezo.run.merged import Merged, rounded_to

GRAPH_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"
_TORCH_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
}


class WeightForm(NamedTuple):
    """What --dtype stands for."""

    float_type: int  # of weights and hidden states
    bits: int | None = None  # of the codes of matrices
    block: int | None = None  # weights that share a scale, with onnxruntime's own operators


WEIGHT_FORMS = {
    "fp32": WeightForm(TensorProto.FLOAT),
    "fp16": WeightForm(TensorProto.FLOAT16),
    "int8": WeightForm(TensorProto.FLOAT, bits=8),
    "int8-blocks": WeightForm(TensorProto.FLOAT, bits=8, block=64),
    "int4": WeightForm(TensorProto.FLOAT, bits=4, block=32),
}
_ALIGNMENT = 4096  # of each tensor in the file, so that it can be mapped
_CODED_AT_ONCE = 1 << 18  # weights
_TRIED_BYTES = (
    64 << 20
)  # in fp32, of the weights that onnxruntime has at once when the graph is tried
_STEPS = 3  # tokens that the run and the file are compared over
# How far answers may be from the run's in the mean, as a share of their spread: in the same arithmetic, in another one,
# or over codes. Answers of another model are farther by their whole spread.
_CLOSE, _ROUGH = 1e-3, 0.2
_WORD_ROWS = "label_words"  # the rows of the head that label words have


def check_base(files: ModelFiles, dtype: str | None) -> None:
    """UsageError where the graph has no place for the model, or weights of that type."""
    if dtype is not None and dtype not in WEIGHT_FORMS:
        raise UsageError(f"--format onnx writes {', '.join(WEIGHT_FORMS)}, not {dtype}")
    if files.kind == "masked":
        raise UsageError(
            f"--format onnx has no place for a model of the type {files.config.model_type}.\nUse --format hf."
        )
    Decoder(Graph(TensorProto.FLOAT), build_meta(files), cached=False)


@dataclass
class OnnxExporter(Merged):
    """Writes a run as an ONNX graph."""

    made: dict[str, Tensor] = field(default_factory=dict)  # weights that no parameter is
    # Shape of each weight, and where it begins and how long it is in the file.
    offsets: dict[str, tuple[tuple[int, ...], int, int]] = field(default_factory=dict)

    def write(self, folder: Path, asked: str | None) -> dict[str, Any]:
        """Write model.onnx and its weights. Raises EdgezoError where they do not answer as the run."""
        form = WEIGHT_FORMS[asked or "fp32"]
        graph = Graph(form.float_type, form.bits, form.block)
        classifies = self.probed or self.rebuilt.planned.opened.dataset.kind == "label"
        if classifies:
            self._classifier(graph)
        else:
            self._decoder(graph)
        self._check_moved(graph)
        size = self._write_weights(graph, folder / WEIGHTS_FILE)
        _save(graph, folder / GRAPH_FILE, self.offsets)
        onnx.checker.check_model(str(folder / GRAPH_FILE))
        notes = self._check_answers(folder / GRAPH_FILE, asked, classifies)
        return {
            "tensors": len(graph.weights),
            "weight_bytes": size,
            "dtype": asked or "fp32",
            "graph": "classifier" if classifies else "decoder",
            "notes": notes,
        }

    # -- graphs -------------------------------------------------------------------------------------------

    def _decoder(self, graph: Graph) -> None:
        decoder = Decoder(graph, self.meta, cached=True)
        past = ["batch", decoder.kv_heads, "past", decoder.width]
        present = ["batch", decoder.kv_heads, "total", decoder.width]
        graph.inputs = [_ids("input_ids", "length"), _ids("attention_mask", "total")]
        graph.outputs = [helper.make_tensor_value_info("logits", 1, ["batch", "length", "vocab"])]
        for layer in range(decoder.layers):
            for part in ("key", "value"):
                name = f"{layer}.{part}"
                kind = graph.float_type
                graph.inputs.append(
                    helper.make_tensor_value_info(f"past_key_values.{name}", kind, past)
                )
                graph.outputs.append(
                    helper.make_tensor_value_info(f"present.{name}", kind, present)
                )
        decoder.begin()
        x = decoder.embed()
        for layer in range(decoder.layers):
            x = decoder.block(x, layer)
        vocab, width = self.meta.get_output_embeddings().weight.shape
        head = self.output if self._has_head else self.table
        logits = graph.product(decoder.end(x), head, (int(vocab), int(width)))
        shape = graph.op("Concat", decoder.batch, decoder.length, graph.const([int(vocab)]), axis=0)
        shaped = graph.op("Reshape", decoder.capped(str(logits)), shape)
        graph.nodes.append(helper.make_node("Identity", [shaped], ["logits"]))

    @property
    def table(self) -> str:
        """The name of the embedding's weight."""
        return f"{self.name_of(self.meta.get_input_embeddings())}.weight"

    @property
    def _has_head(self) -> bool:
        """Whether the head is another matrix than the embedding."""
        return not self.tied or self.rebuilt.model.exact is not None

    def _classifier(self, graph: Graph) -> None:
        decoder, readout = Decoder(graph, self.meta, cached=False), self.rebuilt.model.readout
        graph.inputs = [_ids("input_ids", "length"), _ids("attention_mask", "length")]
        graph.outputs = [helper.make_tensor_value_info("probabilities", 1, ["batch", "classes"])]
        decoder.begin()
        at = _last_places(graph, decoder)
        x, logits = decoder.embed(), ""
        weights = None if readout is None else readout.weights
        blocks = range(decoder.layers) if weights is None else range(max(weights.blocks) + 1)
        for layer in blocks:
            x = decoder.block(x, layer)
            if weights is not None and layer in weights.blocks:
                number = weights.blocks.index(layer)
                state = _unit(graph, graph.wide(str(graph.op("Gather", x, at))))
                matrix = graph.const(weights.weight[number].numpy(), np.float32)
                scores = str(graph.op("Gemm", state, matrix, transB=1))
                logits = scores if not logits else str(graph.op("Add", logits, scores))
        if weights is not None:
            logits = str(graph.op("Add", logits, graph.const(weights.bias.numpy(), np.float32)))
        else:
            state = graph.op("Gather", decoder.end(x), at)
            self.made[_WORD_ROWS] = self.word_rows()
            words = graph.weight(_WORD_ROWS, tuple(self.made[_WORD_ROWS].shape))
            logits = decoder.capped(str(graph.op("Gemm", state, words, transB=1)))
        graph.nodes.append(helper.make_node("Softmax", [logits], ["probabilities"], axis=-1))

    # -- weights ------------------------------------------------------------------------------------------

    def _write_weights(self, graph: Graph, path: Path) -> int:
        """Write every weight that the graph names; returns their bytes."""
        size, dtype = 0, _TORCH_TYPES[graph.float_type]
        with path.open("xb") as file:
            for name, shape in graph.weights.items():
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                start, beside = file.tell(), list[Coded]()
                codes = graph.codes.get(name)
                source = name if codes is None else codes.source
                for piece in [self.made.pop(name)] if name in self.made else self.rows(source):
                    if codes is not None:
                        made = coded(piece, codes)
                        file.write(made.raw)
                        beside.append(made._replace(raw=b""))
                    else:
                        file.write(rounded_to(piece, dtype, name).contiguous().numpy().tobytes())
                if beside:  # these are the next weights
                    self.made[name + SCALE_END] = torch.cat([made.scales for made in beside])
                    self.made[name + ZERO_END] = torch.cat([made.zeros for made in beside])
                self.offsets[name] = (shape, start, file.tell() - start)
                size += file.tell() - start
        return size

    def _check_moved(self, graph: Graph) -> None:
        """EdgezoError where no weight differs from the base's, though steps have trained some."""
        changed = [name for name in self.parameters() if self.changed(name)]
        if not changed or not self.rebuilt.steps:
            return
        if any(self.moved(name, partial(_stored, graph, name)) for name in changed):
            return
        raise EdgezoError(
            f"the weights would be those of the base, though {self.rebuilt.steps} steps have trained "
            f"{'+'.join(self.rebuilt.planned.cfg.train)}: what they moved is smaller than the type of the weights can "
            "hold. Nothing is kept. Give --dtype fp32."
        )

    # -- answers ------------------------------------------------------------------------------------------

    def _check_answers(self, path: Path, asked: str | None, classifies: bool) -> list[str]:
        """Notes; EdgezoError unless onnxruntime answers a text as the run does, with the graph run in pieces."""
        if find_spec("onnxruntime") is None:
            return ["onnxruntime is not installed here, so that the graph was checked, and not run"]
        session = Pieces(path, _TRIED_BYTES)
        ids = self._sample_ids()
        if classifies:
            ours, theirs, spread = self._shares(ids), _shares_of(session, ids), 1.0
        else:
            ours, tokens = self._logits(ids)
            theirs, spread = decoded(session, ids, _STEPS, tokens), float(ours.std())
        same_arithmetic = (
            asked in (None, "fp32") and self.rebuilt.planned.plan.compute_dtype == "fp32"
        )
        most = _CLOSE if same_arithmetic else _ROUGH
        far = float(np.abs(ours - theirs).mean())
        if not far <= most * spread:
            raise EdgezoError(
                f"the ONNX graph answers otherwise than the run (by {far:.3g}). Nothing is kept. Use --format hf."
            )
        return []

    def _sample_ids(self) -> list[int]:
        vocab = self.rebuilt.planned.opened.files.shape.vocab
        return [(7 * i * i + 11 * i + 5) % vocab for i in range(12)]

    def _shares(self, ids: list[int]) -> np.ndarray:
        batch = collate([Example((Row(ids, (len(ids) - 1,), ()),), 0)], [0])
        return torch.softmax(self.rebuilt.model.answers(batch), -1).numpy()

    def _logits(self, ids: list[int]) -> tuple[np.ndarray, list[int]]:
        """Logits after the text and after each of the likeliest tokens that follow, (steps, vocabulary); the tokens."""
        kept: list[Tensor] = []

        def choose(logits: Tensor) -> Tensor:
            kept.append(logits[0].clone())
            return logits.argmax(-1)

        tokens = list(write_one(self.rebuilt.model, ids, _STEPS, choose))
        return torch.stack(kept).numpy(), tokens


def decoded(
    session: Any, ids: Sequence[int], steps: int, follow: Sequence[int] | None = None
) -> np.ndarray:
    """Logits of a decoder in onnxruntime after a text and each token that follows it, (steps, vocabulary).

    ``follow`` are these tokens; without it the likeliest ones.
    """
    past: dict[str, np.ndarray] = {}
    for given in session.get_inputs():
        if given.name.startswith("past_key_values"):
            kind = np.float16 if "float16" in given.type else np.float32
            past[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), kind)
    names = [made.name for made in session.get_outputs()]
    fed, seen, kept = np.array([ids], np.int64), len(ids), []
    for step in range(steps):
        mask = np.ones((1, seen), np.int64)
        outputs = session.run(names, {"input_ids": fed, "attention_mask": mask, **past})
        logits = outputs[0][0, -1]
        kept.append(logits)
        past = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names[1:], outputs[1:], strict=True)
        }
        token = int(logits.argmax()) if follow is None else follow[step]
        fed, seen = np.array([[token]], np.int64), seen + 1
    return np.stack(kept)


def _shares_of(session: Any, ids: list[int]) -> np.ndarray:
    fed = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
    }
    shares: np.ndarray = session.run(["probabilities"], fed)[0]
    return shares


def _ids(name: str, length: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])


def _last_places(graph: Graph, decoder: Decoder) -> str:
    """Where each row's last token is among the flat hidden states, (b,): rows may be padded on either side."""
    size = graph.op("Squeeze", decoder.length)
    places = graph.op("Range", graph.const(0), size, graph.const(1))
    last = graph.op(
        "ReduceMax", graph.op("Mul", "attention_mask", places), graph.const([1]), keepdims=0
    )
    rows = graph.op("Range", graph.const(0), graph.op("Squeeze", decoder.batch), graph.const(1))
    return str(graph.op("Add", graph.op("Mul", rows, size), last))


def _unit(graph: Graph, state: str) -> str:
    """States at unit root mean square (readout.unit)."""
    mean = graph.op("ReduceMean", graph.op("Mul", state, state), graph.const([-1]), keepdims=1)
    root = graph.op("Max", graph.op("Sqrt", mean), graph.const(LEAST_SPREAD, np.float32))
    return str(graph.op("Div", state, root))


class Coded(NamedTuple):
    """Rows as codes. Scales and zeros are fp32, one for each block of each row."""

    raw: bytes
    scales: Tensor
    zeros: Tensor  # the code of 0, of codes of 4 bits; else empty


def coded(rows: Tensor, codes: Codes) -> Coded:
    """Rows (n, cols) fp32 as codes.

    A code of 8 bits is round(w / scale), and a scale the largest magnitude of its block over MOST_CODE. A code of 4
    bits is round((w - least) / scale), where the scale is a fifteenth of the block's range; so weights of Q4_0 and Q4_1
    keep their grid. Codes of 8 bits in blocks are stored plus 128; two codes of 4 bits stand in a byte, the first one
    below.
    """
    pieces = [_coded(piece, codes) for piece in rows.split(max(1, _CODED_AT_ONCE // rows.shape[1]))]
    return Coded(
        b"".join(piece.raw for piece in pieces),
        torch.cat([piece.scales for piece in pieces]),
        torch.cat([piece.zeros for piece in pieces]),
    )


def _coded(rows: Tensor, codes: Codes) -> Coded:
    block = codes.block or rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block)).unflatten(1, (-1, block))
    if codes.bits == 4:
        least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        scales = (most - least) / 15
        scales = scales.where(scales > 0, most.abs().clamp(min=LEAST_SPREAD))
        numbers = ((rows - least) / scales).round_().clamp_(0, 15).to(torch.uint8)
        raw = (numbers[..., 0::2] | (numbers[..., 1::2] << 4)).numpy().tobytes()
        return Coded(raw, scales.reshape(-1), (-least / scales).reshape(-1))
    scales = rows.abs().amax(-1, keepdim=True) / MOST_CODE
    numbers = (rows / scales.clamp(min=1e-30)).round_().clamp_(-MOST_CODE, MOST_CODE)
    if codes.block is None:
        raw = numbers.to(torch.int8).numpy().tobytes()
    else:
        raw = numbers.add_(128).to(torch.uint8).numpy().tobytes()
    return Coded(raw, scales.reshape(-1), torch.empty(0))


def _stored(graph: Graph, name: str, rows: Tensor) -> Tensor:
    """Rows as the file has them, to be compared."""
    codes = graph.codes.get(name) or graph.codes.get(name + BLOCKS_END)
    if codes is None:
        return rows.to(_TORCH_TYPES[graph.float_type])
    return torch.frombuffer(bytearray(coded(rows.contiguous(), codes).raw), dtype=torch.uint8)


def _save(
    graph: Graph,
    path: Path,
    offsets: Mapping[str, tuple[tuple[int, ...], int, int]],
) -> None:
    """Write the graph; its weights are named by where they are in the other file."""
    tensors = list(graph.constants.values())
    for name, (shape, start, size) in offsets.items():
        kind = graph.float_type
        if name in graph.codes:
            kind = TensorProto.INT8 if graph.codes[name].block is None else TensorProto.UINT8
        tensor = TensorProto(name=name, data_type=kind, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS_FILE), ("offset", start), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    body = helper.make_graph(graph.nodes, "edgezo", graph.inputs, graph.outputs, tensors)
    model = helper.make_model(
        body,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(OWN_DOMAIN, 1)][
            : 2 if graph.block else 1
        ],
        ir_version=IR_VERSION,
        producer_name="edgezo",
        producer_version=__version__,
    )
    path.write_bytes(model.SerializeToString(deterministic=True))
