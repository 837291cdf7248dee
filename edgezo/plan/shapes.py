"""What the planner sees of a model and of data: matrices and their sizes, examples and their tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from edgezo.data.tasks import TASKS
from edgezo.data.token_stats import TokenStats
from edgezo.machine.limits import int4_group
from edgezo.plan.request import RunConfig

BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "fp16": 2}
UNKNOWN_LABEL_WORDS = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All that a planner needs to count bytes without weights. Counts are elements, not bytes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    gated: bool = True  # MLP with gate and up (fused or not) instead of one up matrix
    norm: str = "rms"  # "rms" | "rms+1" (scale is 1 + weight) | "layer" (with bias) | "none"
    layer_norms: int = 2  # norms of width hidden in each layer
    final_norm: bool = True
    qk_norm: bool = False  # one norm of width head_dim for q and one for k in each layer
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    positions: int = 0  # rows of a learned position embedding; 0: rotary
    type_rows: int = 0  # rows of a token type embedding
    embed_dim: int = 0  # width of the token embedding where it is not hidden (OPT-350m)
    masked_head: bool = False  # dense + norm + output bias before the tied decoder (RoBERTa)
    sliding_window: int = 0  # tokens; 0: none

    @property
    def embed_width(self) -> int:
        return self.embed_dim or self.hidden

    @property
    def layer_matrices(self) -> tuple[tuple[str, int, int], ...]:
        """``(role, d_out, d_in)`` of the matrices of one layer, q, k, v and gate, up unfused."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = (("gate", self.intermediate, self.hidden),) if self.gated else ()
        return (
            ("q", q, self.hidden),
            ("k", kv, self.hidden),
            ("v", kv, self.hidden),
            ("o", self.hidden, q),
            *mlp,
            ("up", self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
        )

    @property
    def layer_vectors(self) -> int:
        """Elements of the norms and biases of one layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            self.layer_norms * self.hidden * self._norm_vectors
            + (2 * self.head_dim if self.qk_norm else 0)
            + (q + 2 * kv if self.qkv_bias else 0)
            + (self.hidden if self.o_bias else 0)
            + (self.intermediate * (2 if self.gated else 1) + self.hidden if self.mlp_bias else 0)
        )

    @property
    def embedding_elements(self) -> int:
        """Token, position and type embeddings, and OPT-350m's projections."""
        width = self.embed_width
        projections = 2 * width * self.hidden if width != self.hidden else 0
        return self.vocab * width + (self.positions + self.type_rows) * self.hidden + projections

    @property
    def head_elements(self) -> int:
        """What the output head adds to the embeddings: nothing where it is tied."""
        own = 0 if self.tied else self.vocab * self.embed_width
        if self.masked_head:
            own += self.hidden * self.hidden + 3 * self.hidden + self.vocab
        return own

    @property
    def parameters(self) -> int:
        """Parameters of the module, tied ones counted once."""
        matrices = sum(rows * columns for _, rows, columns in self.layer_matrices)
        outer_norms = int(self.final_norm) + int(self.masked_head)  # RoBERTa: after the embeddings
        return (
            self.layers * (matrices + self.layer_vectors)
            + self.embedding_elements
            + self.head_elements
            + outer_norms * self.hidden * self._norm_vectors
        )

    @property
    def _norm_vectors(self) -> int:
        return {"rms": 1, "rms+1": 1, "layer": 2, "none": 0}[self.norm]


@dataclass(frozen=True, kw_only=True)
class NamedShape(Shape):
    """The shape of a model that has a name."""

    name: str


class MatrixShape(NamedTuple):
    """One weight matrix, (d_out, d_in) = (out_features, in_features)."""

    name: str
    d_out: int
    d_in: int

    @property
    def numel(self) -> int:
        return self.d_out * self.d_in

    def stored_bytes(self, precision: str) -> int:
        """In the layouts of weights/layouts.py; int4 keeps an odd number of rows in int8."""
        if precision in BYTES_PER_WEIGHT:
            return self.numel * BYTES_PER_WEIGHT[precision]
        if precision == "int8" or self.d_out % 2:
            return self.numel + 4 * self.d_out
        group = int4_group(self.d_in)
        return self.numel // 2 + 8 * self.d_out * (self.d_in // group)


@dataclass(frozen=True)
class ModelShape:
    """A model as the planner counts it: which matrices there are and how large."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    tied: bool
    head_dim: int
    attention_width: int  # heads * head_dim: what attention puts out
    qkv_width: int  # queries, keys and values together
    gated: bool  # the MLP's activation multiplies a second product
    block: tuple[MatrixShape, ...]  # the matrices of one block
    outside: tuple[MatrixShape, ...]  # linears beside the blocks (OPT's and RoBERTa's)
    tables: tuple[MatrixShape, ...]  # embeddings, and the head where it is not tied
    vector_elements: int  # norms and biases of the whole model

    @staticmethod
    def of(shape: Shape, name: str) -> ModelShape:
        """From a card, or from ``loader.ModelFiles.shape``."""
        width = shape.embed_width
        outside = []
        tables = [MatrixShape("embedding", shape.vocab, width)]
        if not shape.tied:
            tables.append(MatrixShape("head", shape.vocab, width))
        if shape.positions:
            tables.append(MatrixShape("positions", shape.positions, shape.hidden))
        if shape.type_rows:
            tables.append(MatrixShape("token types", shape.type_rows, shape.hidden))
        if width != shape.hidden:
            outside.append(MatrixShape("project_in", shape.hidden, width))
            outside.append(MatrixShape("project_out", width, shape.hidden))
        if shape.masked_head:
            outside.append(MatrixShape("head.dense", shape.hidden, shape.hidden))
        block = tuple(MatrixShape(*matrix) for matrix in shape.layer_matrices)
        in_matrices = shape.layers * sum(m.numel for m in block)
        in_matrices += sum(m.numel for m in (*outside, *tables))
        return ModelShape(
            name=name,
            layers=shape.layers,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            vocab=shape.vocab,
            tied=shape.tied,
            head_dim=shape.head_dim,
            attention_width=shape.heads * shape.head_dim,
            qkv_width=(shape.heads + 2 * shape.kv_heads) * shape.head_dim,
            gated=shape.gated,
            block=block,
            outside=tuple(outside),
            tables=tuple(tables),
            vector_elements=shape.parameters - in_matrices,
        )

    @property
    def matrices(self) -> tuple[MatrixShape, ...]:
        """Every linear of the model, block by block."""
        return self.block * self.layers + self.outside

    # A plan is made of thousands of footprints, so what they count with is added up once.

    @property
    def kinds(self) -> tuple[MatrixShape, ...]:
        """One of each linear that there is: all that a largest one is looked for in."""
        return self.block + self.outside

    @cached_property
    def elements(self) -> int:
        """Of all linears."""
        return sum(m.numel for m in self.matrices)

    @cached_property
    def rows(self) -> int:
        """d_out of all linears."""
        return sum(m.d_out for m in self.matrices)

    @cached_property
    def cols(self) -> int:
        """d_in of all linears."""
        return sum(m.d_in for m in self.matrices)


def assumed_tokens(cfg: RunConfig) -> TokenStats:
    """Without data: every row as long as --max-length allows."""
    n = cfg.max_length
    task = TASKS.get(cfg.task or "")
    if task is not None and task.generation is not None:
        most = cfg.max_new_tokens or task.generation.most
        return TokenStats("completion", (n,), n, 0, 0.0, False, n, most, n, n)
    if cfg.task is not None or cfg.labels is not None:
        return TokenStats("label", (n,), 1, UNKNOWN_LABEL_WORDS, known=False)
    return TokenStats("text", (n,), n, 0, known=False)
