"""An ONNX graph that runs in pieces, in the memory of a few matrices: an export is tried where the model has no room.

Nodes stand in the order in which they can run. A piece is a few of them: it becomes a graph of its own, over the same
file of weights, and what later pieces read is kept. A product with a matrix too large for a piece, such as the head, is
computed some rows of the matrix at a time: here, or by onnxruntime where only it knows the codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgezo.network.onnx_sessions import quiet_options, runtime

_PIECE_FILE = "piece.onnx"
_CODED = "MatMulNBits"  # onnxruntime's own product with codes in blocks
_FP32_BYTES = 4
_TYPE_NAMES = {"float32": "float"}  # of types, where onnxruntime has another one than numpy


class Port(NamedTuple):
    """An input or output, as onnxruntime's sessions describe theirs."""

    name: str
    type: str
    shape: list[Any]


class _Rows(NamedTuple):
    """A matrix (n, cols) that is read some rows at a time, with a scale for each row where it has codes."""

    values: str
    scales: str | None = None


@dataclass
class Pieces:
    """The graph in ``path``, with the part of a session that exports are tried by: ports, and ``run``.

    ``most_bytes`` in fp32 of weights are in a piece, or those of one node.
    """

    path: Path
    most_bytes: int

    @cached_property
    def _model(self) -> Any:
        return onnx.load(str(self.path), load_external_data=False)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._model.graph.initializer}

    def get_inputs(self) -> list[Port]:
        return [_port(value) for value in self._model.graph.input]

    def get_outputs(self) -> list[Port]:
        return [_port(value) for value in self._model.graph.output]

    def run(self, names: Sequence[str], fed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs ``names`` of the graph for its inputs."""
        values, pieces = dict(fed), list(self._pieces(names))
        reads = [{name for node in piece for name in self._reads(node)} for piece in pieces]
        for number, piece in enumerate(pieces):
            if self._is_large(piece[0]):
                by_rows = self._coded_product if piece[0].op_type == _CODED else self._product
                values[piece[0].output[0]] = by_rows(piece[0], values)
                continue
            later = {*names, *(name for some in reads[number + 1 :] for name in some)}
            made = [name for node in piece for name in node.output if name in later]
            values |= zip(made, self._run(piece, made, values), strict=True)
        return [values[name] for name in names]

    # -- pieces -------------------------------------------------------------------------------------------

    def _pieces(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """The nodes that ``names`` depend on, in pieces."""
        wanted, needed = set(names), list[Any]()
        for node in reversed(self._model.graph.node):
            if wanted.intersection(node.output):
                needed.append(node)
                wanted.update(self._reads(node))
        piece, held_bytes = list[Any](), 0
        for node in reversed(needed):
            size = self._weight_bytes(node)
            alone = self._is_large(node)
            if piece and (alone or held_bytes + size > self.most_bytes):
                yield piece
                piece, held_bytes = [], 0
            piece, held_bytes = [*piece, node], held_bytes + size
            if alone:
                yield piece
                piece, held_bytes = [], 0
        if piece:
            yield piece

    def _reads(self, node: Any) -> Sequence[str]:
        """What has to be there before a node runs: not a matrix that it reads from the file, some rows at a time."""
        if self._by_rows(node) is None:
            return list(node.input)
        return [node.input[0], *node.input[2:]]

    def _weight_bytes(self, node: Any) -> int:
        """What the weights of a node take in fp32; a table takes its rows in use only."""
        names = node.input[1:] if node.op_type == "Gather" else node.input
        sizes = (math.prod(self._tensors[name].dims) for name in names if name in self._tensors)
        return _FP32_BYTES * sum(sizes)

    @cached_property
    def _expanded(self) -> dict[str, _Rows]:
        """Matrices of one scale a row, by the name of what they are expanded to."""
        nodes = [n for n in self._model.graph.node if n.op_type == "DequantizeLinear"]
        return {n.output[0]: _Rows(n.input[0], n.input[1]) for n in nodes}

    def _by_rows(self, node: Any) -> _Rows | None:
        """The matrix of a product that is too large for a piece."""
        if node.op_type != "Gemm":
            return None
        rows = self._expanded.get(node.input[1]) or _Rows(node.input[1])
        tensor = self._tensors.get(rows.values)
        if tensor is None or _FP32_BYTES * math.prod(tensor.dims) <= self.most_bytes:
            return None
        return rows

    def _is_large(self, node: Any) -> bool:
        """Whether a product has a matrix that is too large for a piece."""
        if node.op_type == _CODED:
            return _numbers(node)["N"] * _numbers(node)["K"] * _FP32_BYTES > self.most_bytes
        return self._by_rows(node) is not None

    # -- running ------------------------------------------------------------------------------------------

    def _run(
        self,
        piece: Sequence[Any],
        made: Sequence[str],
        values: Mapping[str, np.ndarray],
        parts: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[np.ndarray]:
        """The outputs ``made`` of a few nodes; ``parts`` are weights that stand for those of the file."""
        tensors = {**self._tensors, **parts}
        inside = {name for node in piece for name in node.output}
        read = dict.fromkeys(name for node in piece for name in node.input if name)
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape
            )
            for name in read
            if name not in inside and name not in tensors
        ]
        graph = helper.make_graph(
            list(piece),
            "piece",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in made],
            [tensors[name] for name in read if name in tensors],
        )
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        file = self.path.with_name(_PIECE_FILE)  # beside the weights that it names
        file.write_bytes(model.SerializeToString())
        try:
            session = runtime().InferenceSession(
                str(file),
                quiet_options(),
                ["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"],
            )
            result: list[np.ndarray] = session.run(
                list(made), {value.name: values[value.name] for value in inputs}
            )
        finally:
            file.unlink()
        return result

    def _product(self, node: Any, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """``x @ matrix.T`` and the bias, with the matrix read some rows at a time."""
        rows = self._by_rows(node)
        assert rows is not None
        matrix = self._tensors[rows.values]
        count, cols = matrix.dims
        at_once = max(1, self.most_bytes // (2 * _FP32_BYTES * cols))
        x = values[node.input[0]].astype(np.float32)
        scales = None if rows.scales is None else self._read(self._tensors[rows.scales])
        parts = []
        for first in range(0, count, at_once):
            some = self._read(matrix, slice(first, min(count, first + at_once)))
            if scales is not None:
                some = some * scales[first : first + len(some), None]
            parts.append(x @ some.T)
        product = np.concatenate(parts, axis=1)
        if len(node.input) > 2 and node.input[2]:
            bias = node.input[2]
            product += self._read(self._tensors[bias]) if bias in self._tensors else values[bias]
        return product.astype(values[node.input[0]].dtype)

    def _coded_product(self, node: Any, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """A product with codes in blocks, by onnxruntime with some rows of the matrix at a time."""
        sizes = _numbers(node)
        at_once = max(2, self.most_bytes // (_FP32_BYTES * sizes["K"]) // 2 * 2)
        products = []
        for first in range(0, sizes["N"], at_once):
            count = min(at_once, sizes["N"] - first)
            some = onnx.NodeProto.FromString(node.SerializeToString())
            next(part for part in some.attribute if part.name == "N").i = count
            parts = {
                name: _share_of(self._tensors[name], first, count, sizes["N"])
                for name in node.input[1:]
                if name in self._tensors
            }
            products += self._run([some], list(node.output), values, parts)
        return np.concatenate(products, axis=-1)

    def _read(self, tensor: Any, rows: slice | None = None) -> np.ndarray:
        """A weight in fp32, or some of its rows."""
        if tensor.data_location != TensorProto.EXTERNAL:
            whole = numpy_helper.to_array(tensor)
            return (whole if rows is None else whole[rows]).astype(np.float32)
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape, start = list(tensor.dims), int(where["offset"])
        if rows is not None:
            start += rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape[0] = rows.stop - rows.start
        with (self.path.parent / where["location"]).open("rb") as file:
            file.seek(start)
            read = np.fromfile(file, dtype, math.prod(shape))
        return read.reshape(shape).astype(np.float32)


def _numbers(node: Any) -> dict[str, int]:
    """The whole numbers among a node's attributes."""
    return {part.name: part.i for part in node.attribute if part.type == onnx.AttributeProto.INT}


def _share_of(tensor: Any, first: int, count: int, rows: int) -> Any:
    """What of a weight in the file belongs to ``count`` of a matrix's ``rows``, which stand one after the other."""
    share = TensorProto.FromString(tensor.SerializeToString())
    share.dims[0] = tensor.dims[0] * count // rows
    where = {entry.key: entry for entry in share.external_data}
    row_bytes = int(where["length"].value) // rows
    where["offset"].value = str(int(where["offset"].value) + first * row_bytes)
    where["length"].value = str(count * row_bytes)
    return share


def _port(value: Any) -> Port:
    of_tensor = value.type.tensor_type
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(of_tensor.elem_type)).name
    dims = [dim.dim_param or dim.dim_value for dim in of_tensor.shape.dim]
    return Port(value.name, f"tensor({_TYPE_NAMES.get(kind, kind)})", dims)
