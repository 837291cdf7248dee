"""A decoder as ONNX graphs that can be trained by forward passes: low-rank factors and sign vectors are inputs.

    embed.onnx       input_ids (n,)                          -> states (n, width)
    block-graph-N    states (n, width), how rows lie, weights, factors, directions -> states (n, width)
    end.onnx         states (n, width), index (p,)           -> ended (p, width): what the head reads there
    rows.onnx        ids (k,)                                -> rows (k, width) of the head, of label words
    head.onnx        ended (p, width)                        -> logits (p, vocabulary), without a soft cap

A block takes its weights as inputs, so that all blocks share a graph: a run may begin at any of them, map and release
them one by one, and read states between them. Tokens of all rows and of both sides lie packed in one axis, n. Only
attention sees rows: ``padded`` (rows*s,) says which token stands at each place of the padded rows, ``packed`` (n,)
where each token stands there, ``seen`` (rows, 1, s, s) bool whom each place looks at; ``cosine`` and ``sine`` (1 or
rows, 1, s, rotated) turn the places. A linear then computes, as network/perturb.py does,

    y = W x + A (V x) + c * r_i * (t_i . V x)     c = +-sigma of a token, i its example

    factors (R, k) fp32         A of the block's linears, one below the other
    row_signs (R, b) int8       r_i
    col_signs (b, L, k) fp32    t_i, of L linears
    basis (k, C) int8           the signs of V, side by side; basis_scale (1,) fp32: 1/sqrt(k)
    by_example (n, b) fp32      c in the column of a token's example, 0 elsewhere; example (n,) int64 that column

so rank, seed, batch and sigma are free, and the graph holds frozen weights alone.

A block has a second graph for writing, over the same weights (block-writing-N.onnx): tokens see those before them by
the inputs past_key and past_value (rows, kv heads, p, head_dim), ``seen`` is (rows, 1, s, p+s), and the outputs key and
value (rows, kv heads, p+s, head_dim) are what the next tokens see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, helper

from edgezo.errors import UsageError
from edgezo.machine.limits import head_rows
from edgezo.network.onnx_graph import SCALE_END, Decoder, Graph
from edgezo.network.rotary import BY_LENGTH, rope_tables

TRAINABLE_FAMILIES = (*("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"),)
_FLOAT, _INT64, _INT8, _BOOL = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.INT8,
    TensorProto.BOOL,
)
_USE_TORCH = "Use --engine torch, which trains it."


class Linear(NamedTuple):
    """One linear of a block, whose low-rank factor is trained."""

    name: str  # of its weight: the noise of its directions is addressed by it
    rows: int
    cols: int


def check_trainable(module: Any) -> None:
    """UsageError for a model that these graphs do not compute."""
    kind = module.config.model_type
    if kind not in TRAINABLE_FAMILIES:
        raise UsageError(
            f"--trainable writes {', '.join(TRAINABLE_FAMILIES)}, not {kind}.\n{_USE_TORCH}"
        )
    by_length = {str(t.get("rope_type")) for t in rope_tables(module.config).values()} & BY_LENGTH
    if by_length:
        raise UsageError(
            f"--trainable has no place for rotary positions of the kind {', '.join(sorted(by_length))}, whose "
            f"frequencies change with the length of a row.\n{_USE_TORCH}"
        )
    Decoder(Graph(_FLOAT), module, cached=False)


class TrainableDecoder(Decoder):
    """The parts of a decoder in graphs of their own. ``linears`` are those of the graph that is being written."""

    def __init__(self, graph: Graph, module: Any, cached: bool = False):
        super().__init__(graph, module, cached=cached)
        self.linears: list[Linear] = []

    # -- graphs -------------------------------------------------------------------------------------------

    def embed_graph(self) -> None:
        """tokens -> states."""
        g = self.g
        g.inputs = [_input("input_ids", _INT64, ["n"])]
        self.put_out(self.embed(), "states", ["n", self.c.hidden_size])

    def block_graph(self, layer: int) -> None:
        """states -> states."""
        g, width = self.g, self.c.hidden_size
        g.inputs = [
            _input("states", _FLOAT, ["n", width]),
            *(_input(name, _FLOAT, ["turns", 1, "s", "rotated"]) for name in ("cosine", "sine")),
            _input("seen", _BOOL, ["rows", 1, "s", "all" if self.cached else "s"]),
            _input("padded", _INT64, ["places"]),
            _input("packed", _INT64, ["n"]),
            _input("factors", _FLOAT, ["R", "rank"]),
            _input("row_signs", _INT8, ["R", "b"]),
            _input("col_signs", _FLOAT, ["b", "L", "rank"]),
            _input("basis", _INT8, ["rank", "C"]),
            _input("basis_scale", _FLOAT, [1]),
            _input("by_example", _FLOAT, ["n", "b"]),
            _input("example", _INT64, ["n"]),
        ]
        past, present = self.kept_names(layer)
        if self.cached:
            kept = ["rows", self.kv_heads, "p", self.width]
            g.inputs += [_input(name, _FLOAT, kept) for name in past]
        shape = g.op("Shape", "seen")
        self.batch, self.length = (g.op("Gather", shape, g.const([i])) for i in (0, 2))
        zero, least = g.const(0.0, np.float32), g.const(-3e38, np.float32)
        self._mask = str(g.op("Where", "seen", zero, least))
        self._taken = str(g.op("Gather", "col_signs", "example", axis=0))  # (n, L, k)
        self._rows = self._cols = 0
        self.linears = []
        self.put_out(self.block("states", layer), "out", ["n", width])
        if self.cached:
            kept = ["rows", self.kv_heads, "all", self.width]
            g.outputs += [_input(name, _FLOAT, kept) for name in present]

    def end_graph(self) -> None:
        """states at the places that are read -> what the head reads."""
        g, width = self.g, self.c.hidden_size
        g.inputs = [_input("states", _FLOAT, ["n", width]), _input("index", _INT64, ["p"])]
        self.put_out(
            self.end(str(g.op("Gather", "states", "index", axis=0))), "ended", ["p", width]
        )

    def rows_graph(self, head: str) -> None:
        """ids -> rows of the head."""
        self.g.inputs = [_input("ids", _INT64, ["k"])]
        rows = self.g.gather(head, self.shapes[head], "ids")
        self.put_out(rows, "rows", ["k", self.shapes[head][1]])

    def head_graph(self, head: str) -> None:
        """what the head reads -> logits without a soft cap, from codes that are expanded some rows at a time."""
        g, (vocab, width) = self.g, self.shapes[head]
        g.inputs = [_input("ended", _FLOAT, ["p", width])]
        if g.bits is None:
            logits = g.product("ended", head, (vocab, width))
        else:
            codes = g.coded(head, (vocab, width))
            pieces, step = [], head_rows(vocab, width)
            for start in range(0, vocab, step):
                stop = min(start + step, vocab)
                part, scale = (
                    g.op("Slice", name, g.const([start]), g.const([stop]), g.const([0]))
                    for name in (codes, codes + SCALE_END)
                )
                zeros = g.zeros_of("ended", stop - start)
                expanded = g.op("DequantizeLinear", part, scale, zeros, axis=0)
                pieces.append(g.op("Gemm", "ended", expanded, transB=1))
            logits = str(g.op("Concat", *pieces, axis=1))
        self.put_out(logits, "logits", ["p", vocab])

    def put_out(self, made: str, name: str, shape: list[Any]) -> None:
        """Give a result its name."""
        self.g.nodes.append(helper.make_node("Identity", [made], [name]))
        self.g.outputs = [helper.make_tensor_value_info(name, _FLOAT, shape)]

    # -- parts that differ from the decoder with a cache --------------------------------------------------

    def linear(self, x: str, name: str) -> str:
        """(n, in) -> (n, out), perturbed by the step's directions."""
        g, base = self.g, super().linear(x, name)
        rows, cols = self.shapes[f"{name}.weight"]
        number = len(self.linears)
        self.linears.append(Linear(f"{name}.weight", rows, cols))

        def part(of: str, start: int, size: int, axis: int) -> str:
            ends = g.const([start]), g.const([start + size])
            return str(g.op("Slice", of, *ends, g.const([axis])))

        basis = g.op("Cast", part("basis", self._cols, cols, 1), to=_FLOAT)
        z = g.op("Mul", g.op("Gemm", x, basis, transB=1), "basis_scale")  # V x, (n, k)
        t = g.op("Squeeze", part(self._taken, number, 1, 1), g.const([1]))
        dots = g.op("ReduceSum", g.op("Mul", z, t), g.const([1]), keepdims=1)
        left = g.op("Concat", z, g.op("Mul", dots, "by_example"), axis=1)
        signs = g.op("Cast", part("row_signs", self._rows, rows, 0), to=_FLOAT)
        right = g.op("Concat", part("factors", self._rows, rows, 0), signs, axis=1)
        self._rows, self._cols = self._rows + rows, self._cols + cols
        return str(g.op("Gemm", left, right, base, transB=1))

    def kept_names(self, layer: int) -> tuple[Sequence[str], Sequence[str]]:
        return ("past_key", "past_value"), ("key", "value")

    def split(self, x: str, heads: int) -> str:
        return super().split(str(self.g.op("Gather", x, "padded", axis=0)), heads)

    def tokens(self, y: str) -> str:
        return str(self.g.op("Gather", y, "packed", axis=0))

    def mask(self, window: int) -> str:
        return self._mask

    def rotation(self, kind: str) -> tuple[str, str]:
        return "cosine", "sine"

    def kind_of(self, layer: int) -> str:
        """The kind of a block's attention, which its rotary positions and its window depend on."""
        kinds = getattr(self.c, "layer_types", None)
        return str(kinds[layer]) if kinds else "full_attention"

    def frequencies(self, kind: str) -> dict[str, Any]:
        """The rotary frequencies of blocks of a kind, and what cosine and sine are multiplied by."""
        rotary = self.module.base_model.rotary_emb
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        inverse = getattr(rotary, f"{prefix}inv_freq").double().tolist()
        return {
            "inverse": inverse,
            "scaling": float(getattr(rotary, f"{prefix}attention_scaling", 1.0)),
        }


def _input(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


Write = Callable[[TrainableDecoder], None]
