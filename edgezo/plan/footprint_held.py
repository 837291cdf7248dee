"""What lies in memory throughout a run, or while it loads: the process, weights, what is trained, their state. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgezo.data.token_stats import TokenStats
from edgezo.machine.limits import PAGE_BYTES, QUANTISE_BYTES, SLOTS, TILE_BYTES
from edgezo.plan.calibration import (
    BASE_BYTES,
    BASE_VOCAB,
    HEAD_COPIES,
    NETWORK,
    READ_PIECE_BYTES,
    TOKENIZER_BYTES_PER_WORD,
    Item,
)
from edgezo.plan.conflicts import cannot_anchor
from edgezo.plan.fields import QUANTIZED, UNROUNDED
from edgezo.plan.request import RunConfig
from edgezo.plan.shapes import BYTES_PER_WEIGHT, MatrixShape, ModelShape
from edgezo.zo.presets import DIRECTIONS, MASKS, RULES, in_span


def compute_dtype(precision: str, bf16_fast: bool) -> tuple[str, str]:
    """(dtype of activations and products, reason)."""
    if precision == "fp32":
        return "fp32", "the weights are fp32"
    if bf16_fast:
        return "bf16", "this CPU multiplies bf16 matrices in hardware"
    return "fp32", "this CPU has no bf16 matrix instructions; weights are expanded tile by tile"


def _of_tables(precision: str) -> str:
    """What embedding tables are stored in where linears are in ``precision``."""
    return "int8" if precision in QUANTIZED else precision


def rounding_of(cfg: RunConfig, precision: str) -> tuple[str | None, str]:
    """(how full weights keep small steps, reason); None where nothing is rounded."""
    if "full" not in cfg.train or precision in UNROUNDED:
        return None, ""
    if cfg.rounding is not None:
        return cfg.rounding, "as given"
    if precision == "int8":
        if why := cannot_anchor(cfg.to_dict()):
            return "stochastic", f"rounding adds up, but {why}"
        return "anchored", "codes are made anew from base and journal, before rounding adds up"
    return "plane", "8 more bits beside each weight; rounding alone would lose small steps"


@dataclass(frozen=True)
class Held:
    """One request with everything that its size depends on, but for precision and split; see `footprint.Footprint`."""

    shape: ModelShape
    cfg: RunConfig
    tokens: TokenStats
    bf16_fast: bool
    c_kernels: bool
    base_bytes: int | None  # the process as measured; None: the constant above

    elsewhere: ClassVar[str] = "disk"  # where blocks are that do not stay in memory

    def compute_dtype(self, precision: str) -> tuple[str, str]:
        """(dtype of activations and products, reason)."""
        return compute_dtype(precision, self.bf16_fast)

    def _compute_bytes(self, precision: str) -> int:
        return {"fp32": 4, "bf16": 2}[self.compute_dtype(precision)[0]]

    def stored_bytes(self, matrices: Sequence[MatrixShape], precision: str) -> int:
        """Matrices as they are stored, with their low-order plane where there is one."""
        plane = self._plane_bytes(precision)
        return sum(m.stored_bytes(precision) + m.numel * plane for m in matrices)

    def block_bytes(self, precision: str) -> int:
        """One decoder layer."""
        return self.stored_bytes(self.shape.block, precision)

    def _plane_bytes(self, precision: str) -> int:
        """Of the low-order plane, a weight."""
        return 1 if rounding_of(self.cfg, precision)[0] == "plane" else 0

    def disk_bytes(self, precision: str, on_disk: int) -> int:
        """What the overlay takes on disk."""
        if not on_disk:
            return 0
        pages = PAGE_BYTES * (1 + 3 * len(self.shape.block))
        tables = self.stored_bytes(self.shape.tables, _of_tables(precision))
        return on_disk * (self.block_bytes(precision) + pages) + tables

    def host_bytes(self, precision: str, on_disk: int) -> int:
        """What blocks take of the RAM beside the memory that is planned."""
        return 0

    def _base(self) -> Item:
        if self.base_bytes is not None:
            reason = "Python, PyTorch, transformers and the tokenizer, measured"
            return Item("base process", self.base_bytes, reason)
        words = self.shape.vocab
        size = BASE_BYTES + max(0, words - BASE_VOCAB) * TOKENIZER_BYTES_PER_WORD
        reason = f"Python, PyTorch, transformers, a tokenizer of {words:,} words"
        return Item("base process", size, reason)

    def _weights(self, precision: str, on_disk: int) -> list[Item]:
        shape = self.shape
        count = shape.elements
        vectors = Item(
            "norms and biases",
            4 * shape.vector_elements,
            f"{shape.vector_elements:,} values in fp32",
        )
        if on_disk:
            return [*self._slots(precision, on_disk), vectors]
        return [
            Item(
                "linear weights",
                shape.layers * self.block_bytes(precision)
                + self.stored_bytes(shape.outside, precision),
                f"{count:,} weights in {shape.layers} blocks: {self._detail(precision)}",
            ),
            self._tables(precision),
            vectors,
        ]

    def _tables(self, precision: str) -> Item:
        tables, stored = self.shape.tables, _of_tables(precision)
        words = sum(t.numel for t in tables)
        tied = "tied with the head" if self.shape.tied else "with the untied head"
        reason = f"{words:,} weights, {tied}: {self._detail(stored)}"
        return Item("embedding", self.stored_bytes(tables, stored), reason)

    def _detail(self, precision: str) -> str:
        """How a weight is stored."""
        plane = " + 1 for the low plane" if self._plane_bytes(precision) else ""
        if precision in QUANTIZED:
            scales = {"int8": "a scale per row", "int4": "scale and shift per group"}[precision]
            return f"{precision} codes, {scales}{plane}"
        return f"{precision}, {BYTES_PER_WEIGHT[precision]} bytes each{plane}"

    def _slots(self, precision: str, on_disk: int) -> list[Item]:
        """The weights where blocks and tables are on disk."""
        shape = self.shape
        here, block = shape.layers - on_disk, self.block_bytes(precision)
        outside = self.stored_bytes(shape.outside, precision)
        items = []
        if here or outside:
            reason = f"the first {here} blocks, and what is beside the blocks: {precision}"
            items.append(Item("linear weights", here * block + outside, reason))
        pages = PAGE_BYTES * 3 * len(shape.block)
        reason = f"{SLOTS} blocks of {on_disk} that are on disk: one at work, one being read"
        items.append(Item("slots", SLOTS * (block + pages), reason))
        rows = sum(t.d_out for t in shape.tables)
        reason = f"the tables are on disk: a checksum for each of {rows:,} rows, and rows in use"
        # With label words the rows in use are the hidden states, or among what an update holds.
        in_use = 0 if self.tokens.kind == "label" else TILE_BYTES
        items.append(Item("embedding", 16 * rows + in_use, reason))
        return items

    def _staged_bytes(self, precision: str) -> int:
        """One matrix as the base gives it, to make a block on disk (again)."""
        largest = max(m.numel for m in self.shape.kinds)
        if precision in QUANTIZED:  # in fp32 beside its codes, and a tile being quantised
            return 5 * largest + min(TILE_BYTES, QUANTISE_BYTES * largest)
        return largest * (BYTES_PER_WEIGHT[precision] + 1)

    def _trained(self, compute_bytes: int) -> list[Item]:
        """What training keeps beside the weights; ``full`` is in the weights themselves."""
        shape, cfg = self.shape, self.cfg
        items = []
        if "lowrank" in cfg.train:
            factor = shape.rows * cfg.rank
            basis = shape.cols * cfg.rank
            size = 4 * factor + compute_bytes * basis
            reason = f"rank {cfg.rank}: {factor:,} trained values in fp32 and their fixed basis"
            items.append(Item("low-rank factors", size, reason))
        if "norms" in cfg.train:
            n = shape.vector_elements
            items.append(Item("trained norms and biases", 4 * n, f"{n:,} values, fp32 copies"))
        if "scales" in cfg.train:
            n = shape.rows
            items.append(Item("trained scales", 4 * n, f"a gain per output row: {n:,} in fp32"))
        if "head" in cfg.train:
            items.append(self._head())
        if DIRECTIONS[cfg.directions].guided:
            widths = shape.cols if "full" in cfg.train else 0
            widths += len(shape.matrices) * cfg.rank if "lowrank" in cfg.train else 0
            size = (cfg.batch_size or 1) * widths * compute_bytes
            reason = f"v_i of {cfg.batch_size} examples for each matrix, until the update"
            items.append(Item("guides", size, reason))
        return [*items, *self._state()]

    def _state(self) -> list[Item]:
        """What mask and rule keep beside each trained value."""
        shape, cfg, items = self.shape, self.cfg, []
        rows = in_matrices = vectors = 0
        if "full" in cfg.train:
            rows += shape.rows + sum(t.d_out for t in shape.tables)
            in_matrices += shape.elements + sum(t.numel for t in shape.tables)
        if "lowrank" in cfg.train:
            rows += shape.rows
            in_matrices += shape.rows * cfg.rank
        if {"full", "norms"} & set(cfg.train):
            vectors += shape.vector_elements
        if "scales" in cfg.train:
            vectors += shape.rows
        values = vectors + in_matrices
        if cfg.mask == "block":
            blocks = len(shape.matrices) + len(shape.tables) + shape.vector_elements // shape.hidden
            reason = f"--finetuner: {blocks} networks of {NETWORK} values, float64"
            items.append(Item("finetuner", 8 * NETWORK * blocks, reason))
        if (n := MASKS[cfg.mask].state) and values:
            by_row = MASKS[cfg.mask].by_row
            held, what = (vectors + rows, "rows") if by_row else (values, "trained values")
            reason = f"--mask {cfg.mask}: {n} in fp32 for each of {held:,} {what}"
            items.append(Item("mask state", 4 * n * held, reason))
        if cfg.anchored and values:
            reason = f"--credit {cfg.credit}: another copy of {values:,} trained values, fp32"
            items.append(Item("anchor", 4 * values, reason))
        if n := RULES[cfg.rule].state:
            reason = f"--rule {cfg.rule}: {n} in fp32 for each of {values:,} trained values"
            if in_span(cfg.directions):  # coordinates, and which basis they are in
                values = vectors + rows * (cfg.rank + 1)
                reason = f"--rule {cfg.rule}: {values:,} coordinates in rank {cfg.rank}, fp32"
            if values:
                items.append(Item("rule state", 4 * n * values, reason))
        return items

    def _head(self) -> Item:
        shape, what = self.shape, "change, gradient and Adam's moments"
        if self.tokens.kind == "label":
            k = self.tokens.label_words
            size = 4 * HEAD_COPIES * k * shape.hidden
            return Item("exact head", size, f"{k} label words x {shape.hidden}: {what}")
        rank = self.cfg.rank
        size = 4 * rank * (HEAD_COPIES * shape.vocab + shape.hidden)
        return Item("exact head", size, f"{shape.vocab:,} words x rank {rank}: {what}")

    def _load(self, precision: str, on_disk: int) -> Item:
        if on_disk:
            reason = (
                "rows of a table, or a matrix of a block, as they are read, converted and written"
            )
            return Item(
                "load staging", max(TILE_BYTES, self._staged_bytes(precision)), reason, "load"
            )
        if precision not in QUANTIZED:
            reason = "a piece of one tensor, as it is read"
            return Item("load staging", READ_PIECE_BYTES, reason, "load")
        # Codes are made from fp32, a tile with its copies (QUANTISE_BYTES) at a time; tables are read so.
        reason = "one matrix in fp32 beside its codes, and a tile being quantised"
        return Item("load staging", self._largest_base() + TILE_BYTES, reason, "load")

    def _largest_base(self) -> int:
        """A matrix of a block as a checkpoint gives it: fp32 at most."""
        return 4 * max(m.numel for m in self.shape.kinds)
