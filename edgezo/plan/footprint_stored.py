"""Memory that a run takes from its start to its end, or while it loads: the process, weights, what is trained. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from edgezo.data.token_stats import TokenStats
from edgezo.machine.limits import (
    PADDED_TOKENS,
    PAGE_BYTES,
    PANEL,
    QUANTISE_BYTES,
    READOUT_BLOCKS,
    SCORE_COPIES,
    SLOTS,
    TILE_BYTES,
    head_rows,
)
from edgezo.plan.budget import mb
from edgezo.plan.calibration import (
    ADAPTER_COPIES,
    BASE_BYTES,
    BASE_VOCAB,
    BLOCK_STEP_BYTES,
    CALLING,
    CANDIDATE_BYTES,
    COMPUTE,
    FIRST_STEP_BYTES,
    FIT_COPIES,
    GRAM_COPIES,
    HEAD_COPIES,
    LATER_BYTES,
    LATER_STEPS,
    LIBRARY_BYTES,
    NETWORK,
    NO_CALLER,
    PANEL_BYTES,
    QUANTO_BYTES,
    READ_PIECE_BYTES,
    ROW_ORDER_BYTES,
    RUN_BYTES,
    SCORED_WORD_BYTES,
    TOKENIZER_BYTES_PER_WORD,
    Caller,
    Item,
    phase_bytes,
)
from edgezo.plan.config import Batched
from edgezo.plan.fields import QUANTIZED
from edgezo.plan.numbers import compute_dtype, rounding_of
from edgezo.plan.shapes import BYTES_PER_WEIGHT, MatrixShape, ModelShape
from edgezo.zo.axes import DIRECTIONS, MASKS, ROUNDINGS, RULES, in_span


def table_precision(precision: str) -> str:
    """What embedding tables are stored in where linears are in ``precision``."""
    return "int8" if precision in QUANTIZED else precision


@dataclass(frozen=True)
class StoredFootprint:
    """A request with all that its size depends on, except precision and split; see `footprint.Footprint`."""

    shape: ModelShape
    cfg: Batched
    tokens: TokenStats
    bf16_fast: bool
    c_kernels: bool
    base_bytes: int | None  # the process as measured; None: BASE_BYTES
    source_bytes: int = 4  # of a weight as the checkpoint has it
    read_peak_bytes: int = 0  # its peak until then, as measured; 0: not known
    frozen_blocks: int = 0  # blocks in memory, the first ones, that are not trained
    above_cut: bool = False  # only the trained blocks are in memory, and what is above them
    caller: Caller = NO_CALLER  # a part of ``base_bytes``

    product_kinds = 1  # products with a weight: 2 where a backward pass takes its transpose too
    elsewhere: ClassVar[str] = "disk"  # where blocks are that do not stay in memory

    @cached_property
    def trained_shape(self) -> ModelShape:
        """The model without its frozen blocks."""
        return replace(self.shape, layers=self.shape.layers - self.frozen_blocks)

    @property
    def trained_tables(self) -> tuple[MatrixShape, ...]:
        """The tables that full weights train: embeddings are frozen together with blocks."""
        if not (self.frozen_blocks or self.above_cut):
            return self.shape.tables
        return () if self.shape.tied else self.shape.tables[1:2]

    @property
    def label_rows_only(self) -> bool:
        """Whether of the head only the rows of the label words are in memory (network/assemble.py)."""
        frozen = self.shape.tied or not self.cfg.parts.weights
        reads_words = self.tokens.kind == "label" and not self.shape.masked_head
        return self.above_cut and reads_words and frozen

    def compute_dtype(self, precision: str) -> tuple[str, str]:
        """(dtype of activations and products, reason)."""
        return compute_dtype(precision, self.bf16_fast)

    def compute_bytes(self, precision: str) -> int:
        """Bytes of an activation."""
        return {"fp32": 4, "bf16": 2}[self.compute_dtype(precision)[0]]

    def stored_bytes(self, matrices: Sequence[MatrixShape], precision: str) -> int:
        """Bytes of matrices as they are stored, with their low-order plane where there is one."""
        plane = self._plane_bytes(precision)
        return sum(m.stored_bytes(precision) + m.numel * plane for m in matrices)

    def block_bytes(self, precision: str) -> int:
        """Bytes of one decoder layer's matrices."""
        return self.stored_bytes(self.shape.block, precision)

    def _plane_bytes(self, precision: str) -> int:
        """Bytes of the low-order plane for each weight."""
        return int(ROUNDINGS[rounding_of(self.cfg, precision)[0] or ""].plane)

    def disk_bytes(self, precision: str, on_disk: int) -> int:
        """What the overlay takes on disk."""
        if not on_disk:
            return 0
        pages = PAGE_BYTES * (1 + 3 * len(self.shape.block))
        kept = () if self.label_rows_only else self.shape.tables
        tables = self.stored_bytes(kept, table_precision(precision))
        return on_disk * (self.block_bytes(precision) + pages) + tables

    def host_bytes(self, precision: str, on_disk: int) -> int:
        """What blocks take of the RAM beside the memory that is planned."""
        return 0

    # ------------------------------------------------------------------ the process and the weights

    def _base(self) -> Item:
        if self.base_bytes is not None:
            what = "Python, PyTorch, transformers, the tokenizer and the tokens of all rows"
            return Item("base process", self.base_bytes - self.caller.bytes, f"{what}, measured")
        words, rows_bytes = self.shape.vocab, self.tokens.stored_bytes
        size = BASE_BYTES + max(0, words - BASE_VOCAB) * TOKENIZER_BYTES_PER_WORD + rows_bytes
        reason = f"Python, PyTorch, transformers, a tokenizer of {words:,} words"
        if rows_bytes:
            reason += f", {mb(rows_bytes)} of tokens"
        return Item("base process", size, reason)

    def process(self) -> list[Item]:
        """The process before any weight: the cap is on all of it, whoever holds it."""
        if self.caller == NO_CALLER:
            return [self._base()]
        data, files = mb(self.caller.data_bytes), mb(self.caller.file_bytes)
        reason = f"held when it called edgezo: {data} of data, {files} of files such as libraries"
        return [self._base(), Item(CALLING, self.caller.bytes, reason)]

    def _run(self) -> Item:
        order_bytes = ROW_ORDER_BYTES * (self.tokens.examples or 0)
        reason = "buffers; the records are on disk"
        if order_bytes >= RUN_BYTES:
            reason += f"; random orders of the rows, {mb(order_bytes)}"
        return Item("journal and metrics", RUN_BYTES + order_bytes, reason)

    def _reading(self, items: Sequence[Item]) -> list[Item]:
        """What reading has taken more than the permanent ``items`` do, most of which came later."""
        more = self.read_peak_bytes - phase_bytes(items, "read")
        if not self.read_peak_bytes or more <= 0:
            return []
        reason = "rows were read and tokenised before anything else: more than all that stays takes"
        return [Item("reading", more, reason, "read")]

    def _code(self, precision: str) -> list[Item]:
        """What the libraries take while weights are loaded, and from the first forward on."""
        columns = self.panel_columns(precision)
        loaded = LIBRARY_BYTES + PANEL_BYTES * min(columns, PANEL[1])
        loaded += QUANTO_BYTES if precision in QUANTIZED else 0
        first = FIRST_STEP_BYTES[self.compute_dtype(precision)[0]]
        first += BLOCK_STEP_BYTES * self.shape.layers
        first += SCORED_WORD_BYTES * self.head_rows if self.tokens.kind != "label" else 0
        first += CANDIDATE_BYTES * self.cfg.candidates if self.cfg.tries else 0
        reason = "the model's modules, what loading them touches, packed panels"
        return [
            Item("model code", loaded, reason),
            Item("step code", first, "kernels and buffers that the first step uses", COMPUTE),
        ]

    def panel_columns(self, precision: str) -> int:
        """Columns of the widest product in fp32, whose packed block the matrix library keeps; 0: products are in bf16.

        A backward pass takes the product with the transpose too.
        """
        if self.compute_dtype(precision)[0] != "fp32":
            return 0
        columns = [m.d_out for m in self.shape.kinds]
        columns += [m.d_in for m in self.shape.kinds] if self.product_kinds > 1 else []
        columns += [self.head_rows] if self.tokens.kind != "label" else []
        return max(columns)

    @property
    def _share_of_later(self) -> float:
        """How much of what later steps add so many steps do."""
        steps = self.cfg.steps
        return min(1.0, (steps - 1) / LATER_STEPS) if steps else 1.0

    def _later(self) -> Item:
        """What later steps take more than the first one."""
        steps = self.cfg.steps or LATER_STEPS
        size = int(LATER_BYTES * self._share_of_later)
        reason = f"holes in the heap, and buffers for batches of other sizes, after {steps:,} steps"
        return Item("later steps", size, reason, COMPUTE)

    def _weights(self, precision: str, on_disk: int) -> list[Item]:
        shape = self.shape
        vectors = shape.vector_elements
        norms = Item("norms and biases", 4 * vectors, f"{vectors:,} values in fp32")
        if on_disk:
            return [*self._slots(precision, on_disk), norms]
        linears = Item(
            "linear weights",
            shape.layers * self.block_bytes(precision)
            + self.stored_bytes(shape.outside, precision),
            f"{shape.elements:,} weights in {shape.layers} blocks: {self._storage(precision)}",
        )
        return [linears, self._tables(precision), norms]

    def _tables(self, precision: str) -> Item:
        tables, stored = self.shape.tables, table_precision(precision)
        if self.label_rows_only:
            rows = MatrixShape("label words", self.tokens.label_words, self.shape.embed_width)
            reason = f"{rows.d_out} rows of the head, those of the label words"
            return Item("head", self.stored_bytes((rows,), stored), reason)
        weights = sum(t.numel for t in tables)
        tied = "tied with the head" if self.shape.tied else "with the untied head"
        reason = f"{weights:,} weights, {tied}: {self._storage(stored)}"
        return Item("embedding", self.stored_bytes(tables, stored), reason)

    @property
    def head_rows(self) -> int:
        """Rows of the head that scores are computed of at once."""
        return head_rows(self.shape.vocab, self.shape.embed_width)

    def _storage(self, precision: str) -> str:
        """How a weight is stored, in words."""
        plane = " + 1 for the low plane" if self._plane_bytes(precision) else ""
        if precision in QUANTIZED:
            scales = {"int8": "a scale per row", "int4": "scale and shift per group"}[precision]
            return f"{precision} codes, {scales}{plane}"
        return f"{precision}, {BYTES_PER_WEIGHT[precision]} bytes each{plane}"

    def _slots(self, precision: str, on_disk: int) -> list[Item]:
        """The weights where the last ``on_disk`` blocks and the tables are on disk."""
        shape = self.shape
        in_memory, block = shape.layers - on_disk, self.block_bytes(precision)
        outside = self.stored_bytes(shape.outside, precision)
        items = []
        if in_memory or outside:
            reason = f"the first {in_memory} blocks, and linears outside the blocks: {precision}"
            items.append(Item("linear weights", in_memory * block + outside, reason))
        pages = PAGE_BYTES * 3 * len(shape.block)
        reason = f"{SLOTS} blocks of {on_disk} that are on disk: one computes, one is read"
        items.append(Item("slots", SLOTS * (block + pages), reason))
        rows = sum(t.d_out for t in shape.tables)
        reason = f"the tables are on disk: a checksum for each of {rows:,} rows, and rows in use"
        # With label words the rows in use are the hidden states, or counted with the tiles of an update.
        in_use = 0
        if self.tokens.kind != "label":
            # Rows that scores are computed of; or a tile that an update moves.
            head = MatrixShape("rows of the head", self.head_rows, shape.embed_width)
            as_read = self.stored_bytes((head,), table_precision(precision))
            # As they are read, and in the compute dtype.
            computed = self.compute_bytes(precision) * head.numel
            in_use = TILE_BYTES if self.cfg.parts.weights else as_read + computed
        items.append(Item("embedding", 8 * rows + in_use, reason))
        return items

    # -----------------------------------------------------------------------------------------
    # What is trained

    def _trained(self, compute_bytes: int) -> list[Item]:
        """What training keeps beside the weights throughout a run."""
        items = [i for i in self._of_parts(compute_bytes) if i.phase == "always"]
        return [*items, *self._of_directions(compute_bytes)]

    def _of_parts(self, compute_bytes: int) -> list[Item]:
        """The items of every trained part, whatever their phase."""
        return [i for part in self.cfg.train for i in ITEMS_OF_PART[part](self, compute_bytes)]

    def _of_directions(self, compute_bytes: int) -> list[Item]:
        """What directions, mask, credit and rule keep beside the trained values."""
        return [*self._guides(compute_bytes), *self._mask_state(), *self._rule_state()]

    def _guides(self, compute_bytes: int) -> list[Item]:
        """Directions that are made from what a layer reads; they are kept until the update."""
        shape, cfg = self.trained_shape, self.cfg
        if not DIRECTIONS[cfg.directions].guided:
            return []
        widths = shape.cols if cfg.parts.weights else 0
        widths += len(shape.matrices) * cfg.rank if cfg.parts.factors else 0
        reason = f"v_i of {cfg.batch_size} examples for each matrix, until the update"
        return [Item("guides", cfg.batch_size * widths * compute_bytes, reason)]

    def _perturbed_sizes(self) -> tuple[int, int, int]:
        """What is trained along directions: (values in matrices, rows of matrices, values in vectors)."""
        shape, rank, parts = self.trained_shape, self.cfg.rank, self.cfg.parts
        values = rows = vectors = 0
        if parts.weights:
            rows += shape.rows + sum(t.d_out for t in self.trained_tables)
            values += shape.elements + sum(t.numel for t in self.trained_tables)
        if parts.factors:
            rows += shape.rows
            values += shape.rows * rank
        if parts.vectors:
            vectors += shape.vector_elements
        if parts.gains:
            vectors += shape.rows
        return values, rows, vectors

    def _mask_state(self) -> list[Item]:
        shape, cfg, items = self.trained_shape, self.cfg, []
        in_matrices, rows, vectors = self._perturbed_sizes()
        values = in_matrices + vectors
        if cfg.mask == "block":
            blocks = len(shape.matrices) + len(shape.tables) + shape.vector_elements // shape.hidden
            reason = f"--finetuner: {blocks} networks of {NETWORK} values, float64"
            items.append(Item("finetuner", 8 * NETWORK * blocks, reason))
        if (n := MASKS[cfg.mask].state) and values:
            by_row = MASKS[cfg.mask].by_row
            count, what = (rows + vectors, "rows") if by_row else (values, "trained values")
            reason = f"--mask {cfg.mask}: {n} in fp32 for each of {count:,} {what}"
            items.append(Item("mask state", 4 * n * count, reason))
        return items

    def _rule_state(self) -> list[Item]:
        cfg, items = self.cfg, []
        in_matrices, rows, vectors = self._perturbed_sizes()
        values = in_matrices + vectors
        if cfg.anchored and values:
            reason = f"--credit {cfg.credit}: another copy of {values:,} trained values, fp32"
            items.append(Item("anchor", 4 * values, reason))
        if cfg.weight_decay_to == "base" and cfg.parts.vectors:
            reason = "--weight-decay-to base: norm weights and biases as they were"
            items.append(Item("start", 4 * self.trained_shape.vector_elements, reason))
        if n := RULES[cfg.rule].state:
            reason = f"--rule {cfg.rule}: {n} in fp32 for each of {values:,} trained values"
            if in_span(cfg.directions):  # coordinates, and which basis they are in
                values = vectors + rows * (cfg.rank + 1)
                reason = f"--rule {cfg.rule}: {values:,} coordinates in rank {cfg.rank}, fp32"
            if values:
                items.append(Item("rule state", 4 * n * values, reason))
        return items

    def _attention(self, n_tokens: int) -> list[Item]:
        """What attention takes beside a block's temporaries, where no kernel of its own computes it."""
        items = []
        longest = max(self.tokens.tokens[0], self.tokens.evaluated)
        if self.tokens.kind == "choice":
            # Which tokens of a tree of options each of them looks at (data/trees.py), and attention's copy in fp32.
            size = n_tokens * longest + 4 * longest * longest
            reason = f"whom each token looks at, of options as a tree of up to {longest:,} tokens"
            items.append(Item("option masks", size, reason, "forward"))
        if self.shape.softcapped:
            padded = max(PADDED_TOKENS, longest)
            size = min(TILE_BYTES, SCORE_COPIES * 4 * self.shape.heads * padded * longest)
            reason = "softcapped scores of a piece of the queries"
            items.append(Item("attention scores", size, reason, "forward"))
        return items

    # -----------------------------------------------------------------------------------------
    # Loading

    def _load(self, precision: str, on_disk: int) -> Item:
        if on_disk:
            # Tables are written before there are slots.
            reason = "rows of a table or a matrix of a block: read, converted and written"
            block_bytes = self.block_bytes(precision)
            staged = self._staged_bytes(precision)
            if precision not in QUANTIZED:
                staged -= block_bytes  # one slot is not used yet
            size = max(TILE_BYTES - SLOTS * block_bytes, staged, 0)
            return Item("load staging", size, reason, "load")
        if precision not in QUANTIZED:
            reason = "a piece of one tensor that is being read"
            return Item("load staging", READ_PIECE_BYTES, reason, "load")
        return self._quantising(precision)

    def _quantising(self, precision: str) -> Item:
        """A matrix of the base and a tile being quantised, less the weights read after it: the largest come first."""
        largest_first = sorted(self.shape.modules, key=lambda m: -m.numel)
        size = later = 0
        for matrix in reversed(largest_first):
            tile = min(TILE_BYTES, QUANTISE_BYTES * matrix.numel)
            size = max(size, self.source_bytes * matrix.numel + tile - later)
            later += self.shape.layers * matrix.stored_bytes(precision)
        if not self.shape.tied:  # the head is read last, a tile at a time
            size = max(size - self.shape.tables[1].stored_bytes("int8"), TILE_BYTES)
        reason = "one matrix of the base beside its codes, and a tile being quantised"
        return Item("load staging", size, reason, "load")

    def _staged_bytes(self, precision: str) -> int:
        """One matrix as it is in the base, beside the form in which a block on disk has it."""
        largest = max(m.numel for m in self.shape.kinds)
        if precision in QUANTIZED:  # beside its codes, and a tile being quantised
            codes_bytes = largest
            tile_bytes = min(TILE_BYTES, QUANTISE_BYTES * largest)
            return self.source_bytes * largest + codes_bytes + tile_bytes
        return largest * (BYTES_PER_WEIGHT[precision] + 1)

    def _largest_base(self) -> int:
        """Bytes of the largest matrix of a block as a checkpoint has it: fp32 at most."""
        return 4 * max(m.numel for m in self.shape.kinds)


# ---------------------------------------------------------------------------------------------
# What each part takes. The second argument is the bytes of an activation.


def _nothing(f: StoredFootprint, compute_bytes: int) -> list[Item]:
    """Full weights are trained where they are stored."""
    return []


def _factors(f: StoredFootprint, compute_bytes: int) -> list[Item]:
    rank = f.cfg.rank
    values, basis = f.trained_shape.rows * rank, f.trained_shape.cols * rank
    reason = f"rank {rank}: {values:,} trained values in fp32 and their fixed basis"
    return [Item("low-rank factors", 4 * values + compute_bytes * basis, reason)]


def _norms(f: StoredFootprint, compute_bytes: int) -> list[Item]:
    n = f.trained_shape.vector_elements
    return [Item("trained norms and biases", 4 * n, f"{n:,} values, fp32 copies")]


def _gains(f: StoredFootprint, compute_bytes: int) -> list[Item]:
    n = f.trained_shape.rows
    return [Item("trained scales", 4 * n, f"a gain per output row: {n:,} in fp32")]


def _head(f: StoredFootprint, compute_bytes: int) -> list[Item]:
    shape, rank, what = f.shape, f.cfg.rank, "change, gradient and Adam's moments"
    if f.tokens.kind == "label":
        words = f.tokens.label_words
        size = int(4 * HEAD_COPIES * words * shape.hidden)
        return [Item("exact head", size, f"{words} label words x {shape.hidden}: {what}")]
    size = int(4 * rank * (HEAD_COPIES * shape.vocab + shape.hidden))
    return [Item("exact head", size, f"{shape.vocab:,} words x rank {rank}: {what}")]


def _readout(f: StoredFootprint, compute_bytes: int) -> list[Item]:
    """A linear probe: its fit to the states of one block, and the states that a pass collects of all blocks."""
    if not f.tokens.classes:
        return []
    shape, cfg = f.shape, f.cfg
    n, d = cfg.readout_rows(f.tokens.examples), shape.hidden
    if cfg.parent is not None:
        size = 4 * READOUT_BLOCKS * f.tokens.classes * d
        return [Item("linear probe", size, "that of the run it goes on from")]
    # States, and their transpose; the Gram matrix of the smaller side, its eigenvectors and their work space.
    fit = 4 * (FIT_COPIES * n * d + GRAM_COPIES * min(n, d) ** 2)
    # Scores of the held-out rows by each block's fit, and the weights of the fits.
    fit += 4 * (READOUT_BLOCKS + 1) * f.tokens.classes * (2 * n + d)
    reason = f"ridge regression on up to {n:,} rows x {d}, one block at a time"
    states = 4 * cfg.batch_size * f.trained_shape.layers * d
    return [
        Item("linear probe", fit, reason, "fit"),
        Item("block states", states, "of all blocks, at the scored positions", "forward"),
    ]


def _adapters(f: StoredFootprint, compute_bytes: int) -> list[Item]:
    rank = f.cfg.rank
    values = (f.trained_shape.rows + f.trained_shape.cols) * rank
    reason = f"rank {rank}: {values:,} trained values, their gradient and AdamW's two moments, fp32"
    return [Item("adapters", 4 * ADAPTER_COPIES * values, reason)]


ITEMS_OF_PART: dict[str, Callable[[StoredFootprint, int], list[Item]]] = {
    "lowrank": _factors,
    "full": _nothing,
    "norms": _norms,
    "scales": _gains,
    "head": _head,
    "probe": _readout,
    "lora": _adapters,
}
