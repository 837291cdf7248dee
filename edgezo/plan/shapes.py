"""What the planner sees of a model and of data: matrices and their sizes, examples and their tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from edgezo.data.tasks import TASKS
from edgezo.plan.request import RunConfig

if TYPE_CHECKING:
    from edgezo.data.dataset import Dataset
    from edgezo.network.cards import Shape

BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "fp16": 2}
UNKNOWN_LABEL_WORDS = 16
KEPT_LENGTHS = 1024  # of the longest examples: as many as a batch can hold


def int4_group(cols: int) -> int:
    """Weights of a row that share a scale and a shift: 32 where it divides the row, else the whole row.

    quanto's default is 128; with 32 they cost 2 bits a weight more, and a base that comes from a GGUF
    Q4 file, whose blocks are 32 as well, stays as it is.
    """
    return 32 if cols % 32 == 0 else cols


# Of a bf16 product on a CPU: its rows pass in pieces of these sizes (machine/matmul.py).
PRODUCT_ROWS = (16, 64, 128, 256, 512, 1024, 2048)
THIN = 64  # up to here an axis may be the examples of a group, or a rank


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


@dataclass(frozen=True)
class TokenStats:
    """What the planner needs to know about the data."""

    kind: str  # label, choice, completion or text
    tokens: tuple[int, ...]  # tokens of the longest to train on (all rows of each), descending
    scored: int  # most scored positions of one example
    label_words: int  # K; 0 where the whole vocabulary is scored
    mean: float = 0.0  # tokens of an example; 0: as the longest
    known: bool = True  # False: assumed, because no data was given
    evaluated: int = 0  # tokens of the longest to evaluate on
    # Of answers that the model writes: tokens at most (0: it writes none), and of the longest prompts that they follow.
    written: int = 0
    prompt: int = 0
    evaluated_prompt: int = 0
    examples: int | None = None  # to train on; None: not known

    @staticmethod
    def of(dataset: Dataset) -> TokenStats:
        """Measured on every example, training and validation."""
        examples = [*dataset.train, *dataset.validation]
        scored = max((sum(len(row.score_at) for row in e.rows) for e in examples), default=1)
        writes = dataset.generation
        tokens = sorted((sum(len(row.ids) for row in e.rows) for e in dataset.train), reverse=True)
        return TokenStats(
            kind=dataset.kind,
            tokens=tuple(tokens[:KEPT_LENGTHS]) or (1,),
            scored=scored,
            label_words=len(dataset.label_ids),
            mean=sum(tokens) / max(1, len(tokens)),
            evaluated=max((sum(len(r.ids) for r in e.rows) for e in dataset.validation), default=0),
            written=writes.most if writes else 0,
            prompt=max((len(e.prompt) for e in dataset.train), default=0) if writes else 0,
            evaluated_prompt=max((len(e.prompt) for e in dataset.validation), default=0)
            if writes
            else 0,
            examples=len(dataset.train),
        )

    @staticmethod
    def assumed(cfg: RunConfig) -> TokenStats:
        """Without data: every row as long as --max-length allows."""
        n = cfg.max_length
        task = TASKS.get(cfg.task or "")
        if task is not None and task.generation is not None:
            most = cfg.max_new_tokens or task.generation.most
            return TokenStats("completion", (n,), n, 0, 0.0, False, n, most, n, n)
        if cfg.task is not None or cfg.labels is not None:
            return TokenStats("label", (n,), 1, UNKNOWN_LABEL_WORDS, known=False)
        return TokenStats("text", (n,), n, 0, known=False)

    def longest(self, examples: int) -> int:
        """Tokens of that many of the longest examples together; the longest repeats if need be."""
        found = self.tokens[:examples]
        return sum(found) + self.tokens[0] * (examples - len(found))

    def at_once(self, examples: int, most: int | None) -> int:
        """The same of what passes at once, where a micro-batch is split into pieces of ``most`` tokens."""
        longest = self.longest(examples)
        return longest if most is None else min(longest, max(most, self.tokens[0]))
