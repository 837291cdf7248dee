"""``edgezo export MODEL --format onnx --trainable``: a frozen base as graphs that --engine onnx trains.

A directory gets the graphs of network/onnx_trainable.py, the weights of each in a file beside it, the tokenizer, and
manifest.json, which says what every input means and has the digest of every file. Journals of both engines name the
base by its content, and directions by the names of its tensors, so that they mean the same on each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from edgezo import __version__
from edgezo.errors import UsageError
from edgezo.machine.files import atomic_folder, to_json, user_path
from edgezo.machine.limits import PAGE_BYTES, tiles
from edgezo.machine.ownership import check_new
from edgezo.network.cards import find_card, resolve
from edgezo.network.loader import (
    ModelFiles,
    build_meta,
    load_tokenizer,
    open_model,
    source_names,
)
from edgezo.network.onnx_graph import (
    BLOCKS_END,
    IR_VERSION,
    OPSET,
    OWN_DOMAIN,
    SCALE_END,
    ZERO_END,
    Codes,
    Graph,
)
from edgezo.network.onnx_manifest import FORM, GRAPH_TOKENIZER, MANIFEST_FILE, VERSION, sha256_of
from edgezo.network.onnx_trainable import TrainableDecoder, check_trainable
from edgezo.run.export_onnx import coded
from edgezo.weights.gguf_file import GgufSource

_CODED_TOGETHER = 32  # weights that share a scale, of int4
_KIND_OF: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int8): TensorProto.INT8,
}
_KIND_OF[np.dtype(np.uint8)] = TensorProto.UINT8
_DTYPE_OF = {kind: dtype.name for dtype, kind in _KIND_OF.items()}


class Precision(NamedTuple):
    """How the frozen weights are stored."""

    bits: int | None  # of the codes of matrices; None: fp32
    block: int | None = None  # weights that share a scale; None: those of a row


TRAINABLE_PRECISIONS = {
    "fp32": Precision(None),
    "int8": Precision(8),
    "int4": Precision(4, _CODED_TOGETHER),
}


class _Placed(NamedTuple):
    """Where a tensor lies."""

    file: str
    start: int
    size: int
    shape: tuple[int, ...]
    kind: int


def export_trainable(model: str, out: Path, dtype: str | None = None) -> dict[str, Any]:
    """Write ``model`` as trainable graphs to the new directory ``out``: all of it or nothing.

    ``dtype``: fp32, int8 (the default) or int4. Raises UsageError for a model that the graphs do not compute, or where
    ``out`` is there already.
    """
    precision = dtype or "int8"
    if precision not in TRAINABLE_PRECISIONS:
        raise UsageError(
            f"--trainable writes {', '.join(TRAINABLE_PRECISIONS)}, not {precision}: the sides of a step differ by "
            "less than the rounding of fp16."
        )
    files = open_model(resolve(model))
    if files.kind == "masked":
        raise UsageError("--trainable writes causal models.\nUse --engine torch for this one.")
    module = build_meta(files)
    check_trainable(module)
    check_new(out)
    out = out.resolve()
    with atomic_folder(out) as folder:
        writer = _Writer(files, module, TRAINABLE_PRECISIONS[precision], folder)
        values = writer.write()
        known = find_card(model) is not None or not user_path(model).exists()
        values["base"] = {
            "model": model if known else str(user_path(model).resolve()),
            "sha256": files.content_hash,
        }
        values["precision"] = precision
        values["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(folder.iterdir())
        }
        (folder / MANIFEST_FILE).write_text(to_json(values) + "\n", encoding="utf-8")
    return {
        "model": model,
        "out": str(out),
        "format": "onnx",
        "trainable": True,
        "precision": precision,
        "tensors": len(writer.placed),
        "weight_bytes": sum(placed.size for placed in writer.placed.values()),
        "base_sha256": files.content_hash,
        "notes": [*files.notes],
    }


@dataclass
class _Writer:
    """Writes the graphs of one model, and the weights of each into its file."""

    files: ModelFiles
    module: Any
    precision: Precision
    folder: Path
    placed: dict[str, _Placed] = field(default_factory=dict)
    graphs: dict[bytes, str] = field(default_factory=dict)  # of blocks, by what they are

    def __post_init__(self) -> None:
        self.sources = source_names(self.files, self.module)
        names: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self.alike = {name: some[0] for some in names.values() for name in some}

    def write(self) -> dict[str, Any]:
        """Every file but the manifest, whose values it returns."""
        module, config = self.module, self.module.config
        table, output = (
            f"{self._name_of(part)}.weight"
            for part in (module.get_input_embeddings(), module.get_output_embeddings())
        )
        head = self.alike[output]
        rows = {"table": self._rows("embed", lambda d: d.embed_graph(), "table.data")}
        blocks, kinds = [], dict[str, Any]()
        for layer in range(config.num_hidden_layers):
            decoder, files, weights = self._block(layer)
            kind = decoder.kind_of(layer)
            kinds.setdefault(kind, decoder.frequencies(kind))
            blocks.append(
                {
                    **files,
                    "data": f"block-{layer:02d}.data",
                    "weights": weights,
                    "linears": [list(linear) for linear in decoder.linears],
                    "kind": kind,
                    "window": decoder.window(kind),
                }
            )
        self._one("end", lambda d: d.end_graph(), "end.data")
        data = "table.data" if head == self.alike[table] else "head.data"
        rows["head"] = self._rows("rows", lambda d: d.rows_graph(head), data)
        self._one("head", lambda d: d.head_graph(head), data, by_row=True)
        cap = getattr(config, "final_logit_softcapping", None)
        return {
            "form": FORM,
            "version": VERSION,
            "written_by": f"edgezo {__version__}",
            "family": config.model_type,
            "shape": asdict(self.files.shape),
            "blocks": blocks,
            "rotary": kinds,
            "softcap": cap,
            "tied": head == self.alike[table],
            "head_data": data,
            "rows": rows,
            "end_ids": self.files.end_ids,
            "tokenizer": self._tokenizer(),
            "inputs": _INPUTS,
        }

    def _name_of(self, part: Any) -> str:
        return next(name for name, other in self.module.named_modules() if other is part)

    def _block(self, layer: int) -> tuple[TrainableDecoder, dict[str, str], list[list[Any]]]:
        """Write a block: (its decoder, the files of its graphs, where each weight lies that is an input of it).

        Blocks that compute the same share a graph. A session takes a megabyte, so one for each would take more than
        the codes of some.
        """
        decoder = self._block_decoder(layer)
        graph, prefix = decoder.g, f"{decoder.base}.layers.{layer}."
        with (self.folder / f"block-{layer:02d}.data").open("xb") as file:
            for weight, shape in graph.weights.items():
                if weight not in self.placed:
                    self._place(graph, weight, shape, file)
        places = list[list[Any]]()
        for weight in graph.weights:
            placed = self.placed[weight]
            name = weight.removeprefix(prefix)
            places.append([name, placed.start, list(placed.shape), _DTYPE_OF[placed.kind]])
        files = {
            "file": self._shared(graph, prefix, "block-graph"),
            "writing": self._shared(
                self._block_decoder(layer, cached=True).g, prefix, "block-writing"
            ),
        }
        return decoder, files, places

    def _block_decoder(self, layer: int, cached: bool = False) -> TrainableDecoder:
        """A decoder whose graph is that of a block. ``cached``: of one that sees the tokens before."""
        bits, block = self.precision
        graph = Graph(TensorProto.FLOAT, bits, block, exact=True)
        decoder = TrainableDecoder(graph, self.module, cached)
        decoder.block_graph(layer)
        return decoder

    def _shared(self, graph: Graph, prefix: str, name: str) -> str:
        """The file of a block's graph, which takes its weights as inputs; blocks that compute the same have one."""
        for weight in graph.weights:
            placed = self.placed[weight]
            given = weight.removeprefix(prefix)
            graph.inputs.append(helper.make_tensor_value_info(given, placed.kind, placed.shape))
        for node in graph.nodes:
            for number, given in enumerate(node.input):
                node.input[number] = given.removeprefix(prefix)
        made = self._model(graph, "block", [])
        if made not in self.graphs:
            count = sum(file.startswith(name) for file in self.graphs.values())
            self.graphs[made] = f"{name}-{count}.onnx"
            path = self.folder / self.graphs[made]
            path.write_bytes(made)
            onnx.checker.check_model(str(path))
        return self.graphs[made]

    def _rows(self, name: str, fill: Any, data: str) -> dict[str, Any]:
        """Write a graph that takes some rows of a table as inputs: where the table, and the scales of codes, lie.

        Mapped, the whole table would come into memory, since the kernel maps pages around those that are touched.
        """
        coded_rows = None if self.precision.bits is None else 8
        graph = Graph(TensorProto.FLOAT, coded_rows)
        fill(TrainableDecoder(graph, self.module))
        with (self.folder / data).open("ab") as file:
            for weight, shape in graph.weights.items():
                if weight not in self.placed:
                    self._place(graph, weight, shape, file)
        table = next(iter(graph.weights))
        names = {weight: weight.replace(table, "table") for weight in graph.weights}
        places = list[list[Any]]()
        for weight, given in names.items():
            placed = self.placed[weight]
            places.append([given, placed.start, list(placed.shape), _DTYPE_OF[placed.kind]])
            axes: list[Any] = ["u", *placed.shape[1:]]
            graph.inputs.append(helper.make_tensor_value_info(given, placed.kind, axes))
        for node in graph.nodes:
            for number, weight in enumerate(node.input):
                node.input[number] = names.get(weight, weight)
        path = self.folder / f"{name}.onnx"
        path.write_bytes(self._model(graph, name, []))
        onnx.checker.check_model(str(path))
        return {"data": data, "weights": places}

    def _one(self, name: str, fill: Any, data: str, by_row: bool = False) -> TrainableDecoder:
        """Write a graph and the weights that it names. ``by_row``: codes of a table, which are read row by row."""
        bits, block = self.precision
        graph = Graph(TensorProto.FLOAT, bits, block, exact=True)
        if by_row and bits is not None:
            graph.bits, graph.block = 8, None
        decoder = TrainableDecoder(graph, self.module)
        fill(decoder)
        with (self.folder / data).open("ab") as file:
            for weight, shape in graph.weights.items():
                if weight not in self.placed:
                    self._place(graph, weight, shape, file)
        self._save(graph, self.folder / f"{name}.onnx")
        return decoder

    # -- weights ------------------------------------------------------------------------------------------

    def _place(self, graph: Graph, name: str, shape: tuple[int, ...], file: Any) -> None:
        """Write one weight; of a coded matrix its scales and zeros as well."""
        codes = graph.codes.get(name)
        if codes is None:
            values = np.concatenate([piece.numpy() for piece in self._pieces(name)])
            self._put(name, values.reshape(shape), file)
            return
        raws, scales, zeros = [], [], []
        start = self._align(file)
        for piece in self._pieces(codes.source):
            made = _with_whole_zeros(piece, codes) if codes.bits == 4 else coded(piece, codes)
            file.write(made.raw)
            scales.append(made.scales.numpy())
            zeros.append(made.zeros.numpy())
            raws.append(len(made.raw))
        kind = TensorProto.INT8 if codes.block is None else TensorProto.UINT8
        self.placed[name] = _Placed(Path(file.name).name, start, sum(raws), shape, kind)
        self._put(name + SCALE_END, np.concatenate(scales).astype(np.float32), file)
        if codes.bits == 4:
            self._put(name + ZERO_END, np.concatenate(zeros), file)

    def _put(self, name: str, values: np.ndarray, file: Any) -> None:
        start = self._align(file) if values.nbytes >= PAGE_BYTES else file.tell()
        file.write(np.ascontiguousarray(values).tobytes())
        kind = _KIND_OF[values.dtype]
        self.placed[name] = _Placed(
            Path(file.name).name, start, values.nbytes, tuple(values.shape), kind
        )

    @staticmethod
    def _align(file: Any) -> int:
        file.write(b"\0" * (-file.tell() % PAGE_BYTES))
        return int(file.tell())

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """Rows (n, cols) or values (n,) of a parameter of the base, fp32."""
        source, origin = self.files.source, self.sources[self.alike[name.removesuffix(BLOCKS_END)]]
        shape = source.shape(origin)
        if len(shape) == 2 and (not isinstance(source, GgufSource) or source.by_rows(origin)):
            for part in tiles(*shape):
                yield source.read(origin, torch.float32, part)
            return
        values = source.read(origin, torch.float32)
        yield from values.split(max(1, (4 << 20) // max(1, math.prod(shape[1:]))))

    # -- files --------------------------------------------------------------------------------------------

    def _save(self, graph: Graph, path: Path) -> None:
        tensors = []
        for name in graph.weights:
            placed = self.placed[name]
            tensor = TensorProto(name=name, data_type=placed.kind, dims=placed.shape)
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": placed.file, "offset": placed.start, "length": placed.size}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
        path.write_bytes(self._model(graph, path.stem, tensors))
        onnx.checker.check_model(str(path))

    @staticmethod
    def _model(graph: Graph, name: str, weights: list[Any]) -> bytes:
        """A graph as a file has it."""
        tensors = [*graph.constants.values(), *weights]
        body = helper.make_graph(graph.nodes, name, graph.inputs, graph.outputs, tensors)
        domains = [helper.make_opsetid("", OPSET)]
        if graph.block is not None:
            domains.append(helper.make_opsetid(OWN_DOMAIN, 1))
        made = helper.make_model(
            body,
            opset_imports=domains,
            ir_version=IR_VERSION,
            producer_name="edgezo",
            producer_version=__version__,
        )
        return bytes(made.SerializeToString(deterministic=True))

    def _tokenizer(self) -> dict[str, Any]:
        """What a program without transformers has to know of the tokenizer, beside tokenizer.json."""
        tokenizer = load_tokenizer(self.files.path)
        tokenizer.backend_tokenizer.save(str(self.folder / GRAPH_TOKENIZER))
        template = tokenizer.chat_template
        return {
            "roles": {
                role: str(token)
                for role, token in tokenizer.special_tokens_map.items()
                if isinstance(token, str)
            },
            "added": sorted(str(token) for token in tokenizer.added_tokens_decoder.values()),
            "chat_template": template if isinstance(template, str) else None,
            "notes": list(tokenizer.edgezo_notes),
        }


_INPUTS = {
    "factors": "(R, rank) fp32: A of the block's linears, one below the other; A of NAME is trained as NAME#lowrank",
    "row_signs": "(R, b) int8: r_i, stream 0 of NAME#lowrank",
    "col_signs": "(b, L, rank) fp32: t_i, stream 1 of NAME#lowrank",
    "basis": "(rank, C) int8: the signs of V, stream 4 of NAME at step 0",
    "basis_scale": "(1,) fp32: 1/sqrt(rank)",
    "by_example": "(n, b) fp32: +sigma or -sigma in the column of a token's example",
    "example": "(n,) int64: that column",
    "past_key, past_value": "(rows, kv heads, p, head_dim) fp32, of the graphs for writing: of the tokens before",
}


class _WholeZeros(NamedTuple):
    """Rows as codes of 4 bits whose zero points are codes too; two of each in a byte, the first one below."""

    raw: bytes
    scales: Tensor  # (rows*blocks,) fp32
    zeros: Tensor  # (rows*bytes,) uint8


def _with_whole_zeros(rows: Tensor, codes: Codes) -> _WholeZeros:
    """Rows (n, cols) fp32 as round(w/scale) + zero, with scale and zero by block of a row."""
    block = codes.block or rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block)).unflatten(1, (-1, block))
    least = rows.amin(-1, keepdim=True).clamp(max=0)
    most = rows.amax(-1, keepdim=True).clamp(min=0)
    scales = ((most - least) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = (-least / scales).round_()
    numbers = ((rows / scales).round_() + zeros).clamp_(0, 15).to(torch.uint8)
    raw = (numbers[..., 0::2] | (numbers[..., 1::2] << 4)).numpy().tobytes()
    points = zeros.squeeze(-1).to(torch.uint8)  # (n, blocks)
    points = torch.nn.functional.pad(points, (0, points.shape[1] % 2))
    return _WholeZeros(
        raw, scales.reshape(-1), (points[:, 0::2] | (points[:, 1::2] << 4)).reshape(-1)
    )
