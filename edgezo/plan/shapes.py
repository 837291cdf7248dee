"""What the planner knows of a model and of data: matrices and their sizes, examples and their tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from edgezo.data.tasks import TASKS
from edgezo.data.token_stats import TokenStats
from edgezo.machine.limits import int4_group
from edgezo.plan.config import RunConfig

# Of the dense precisions.
BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "fp16": 2}
UNKNOWN_LABEL_WORDS = 16  # planned for where labels have not been read yet


# Vectors of a norm: its scale, and with "layer" its bias. With "rms+1" the scale is 1 + weight.
NORMS = {"rms": 1, "rms+1": 1, "layer": 2, "none": 0}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """All that the planner needs of a model to count bytes without weights. Counts are elements, not bytes."""

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
    norm: str = "rms"  # one of NORMS
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
    softcapped: bool = False  # attention scores have a soft cap
    fused: bool = False  # one matrix for q, k and v, and one for gate and up

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
        """Elements of the output head beside the embeddings: none where it is tied."""
        elements = 0 if self.tied else self.vocab * self.embed_width
        if self.masked_head:
            elements += self.hidden * self.hidden + 3 * self.hidden + self.vocab
        return elements

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
        return NORMS[self.norm]


@dataclass(frozen=True, kw_only=True)
class NamedShape(Shape):
    """A shape with the name of its model."""

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
        """Bytes in the layouts of weights/layouts.py; int4 stores an odd number of rows as int8."""
        if precision in BYTES_PER_WEIGHT:
            return self.numel * BYTES_PER_WEIGHT[precision]
        if precision == "int8" or self.d_out % 2:
            return self.numel + 4 * self.d_out
        group = int4_group(self.d_in)
        return self.numel // 2 + 8 * self.d_out * (self.d_in // group)


@dataclass(frozen=True, kw_only=True)
class ModelShape(NamedShape):
    """A model as the planner counts it: its matrices, and their sizes.

    A plan compares thousands of footprints, so sums over the matrices are computed once.
    """

    @staticmethod
    def of(shape: Shape, name: str) -> ModelShape:
        """From a card, or from ``loader.ModelFiles.shape``."""
        return ModelShape(name=name, **{f.name: getattr(shape, f.name) for f in fields(Shape)})

    @property
    def attention_width(self) -> int:
        """Width of the queries, and of what attention returns."""
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @cached_property
    def block(self) -> tuple[MatrixShape, ...]:
        """The matrices of one block."""
        return tuple(MatrixShape(*matrix) for matrix in self.layer_matrices)

    @cached_property
    def modules(self) -> tuple[MatrixShape, ...]:
        """The matrices of one block as the model has them: q, k and v in one where they are fused."""
        if not self.fused:
            return self.block
        fused = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
        rows: dict[tuple[str, int], int] = {}
        for matrix in self.block:
            name = fused.get(matrix.name, matrix.name), matrix.d_in
            rows[name] = rows.get(name, 0) + matrix.d_out
        return tuple(MatrixShape(name, d_out, d_in) for (name, d_in), d_out in rows.items())

    @cached_property
    def outside(self) -> tuple[MatrixShape, ...]:
        """Linears outside the blocks (OPT's and RoBERTa's)."""
        width, hidden = self.embed_width, self.hidden
        matrices = []
        if width != hidden:
            matrices.append(MatrixShape("project_in", hidden, width))
            matrices.append(MatrixShape("project_out", width, hidden))
        if self.masked_head:
            matrices.append(MatrixShape("head.dense", hidden, hidden))
        return tuple(matrices)

    @cached_property
    def tables(self) -> tuple[MatrixShape, ...]:
        """Embeddings, and the head where it is not tied."""
        tables = [MatrixShape("embedding", self.vocab, self.embed_width)]
        if not self.tied:
            tables.append(MatrixShape("head", self.vocab, self.embed_width))
        if self.positions:
            tables.append(MatrixShape("positions", self.positions, self.hidden))
        if self.type_rows:
            tables.append(MatrixShape("token types", self.type_rows, self.hidden))
        return tuple(tables)

    @property
    def matrices(self) -> tuple[MatrixShape, ...]:
        """Every linear of the model, block by block."""
        return self.block * self.layers + self.outside

    @property
    def kinds(self) -> tuple[MatrixShape, ...]:
        """One of each linear that there is: enough to look for the largest."""
        return self.modules + self.outside

    @cached_property
    def vector_elements(self) -> int:
        """Values of all norms and biases."""
        return self.parameters - self.elements - sum(t.numel for t in self.tables)

    @cached_property
    def elements(self) -> int:
        """Weights of all linears."""
        return sum(m.numel for m in self.matrices)

    @cached_property
    def rows(self) -> int:
        """Sum of d_out over all linears."""
        return sum(m.d_out for m in self.matrices)

    @cached_property
    def cols(self) -> int:
        """Sum of d_in over all linears."""
        return sum(m.d_in for m in self.matrices)


def assumed_tokens(cfg: RunConfig) -> TokenStats:
    """The lengths that are planned for without data: every row as long as --max-length allows."""
    n = cfg.max_length
    task = TASKS.get(cfg.task or "")
    if task is not None and task.generation is not None:
        most = cfg.max_new_tokens or task.generation.most
        return TokenStats("completion", (n,), n, 0, 0.0, False, n, most, n, n)
    if cfg.task is not None or cfg.labels is not None:
        return TokenStats("label", (n,), 1, UNKNOWN_LABEL_WORDS, known=False)
    return TokenStats("text", (n,), n, 0, known=False)
