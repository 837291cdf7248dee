"""Memory that a run takes, itemised in bytes, before any weight is read. Pure: no files, no torch, no clock."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from edgezo.machine.limits import (
    EVAL_TOKENS,
    GUARD_MARGIN_BYTES,
    LONGEST,
    PRODUCT_ROWS,
    REUSED_BYTES,
    THIN,
    TILE_BYTES,
    states_at_once,
)
from edgezo.plan.calibration import (
    ACTIVATIONS,
    ATTENDING_TOKENS,
    ATTENTION_SHARE,
    CODES_UPDATE_TILES,
    COMPUTE,
    EVAL_KEPT_TOKENS,
    EXPANDED,
    FIRST_NUMBERS,
    FORWARD_HOLES,
    GATE_COPIES,
    HEAD_TEMPORARIES,
    HEAP_SHARE,
    HIDDEN_COPIES,
    KERNEL_BYTES,
    KEY_COPIES,
    LEAST_PIECE_TOKENS,
    MLP_COPIES,
    MOST_KEPT_TOKENS,
    PIECE_HOLES,
    QUERY_COPIES,
    REQUANTISE_TILES,
    RESERVE,
    ROUNDED_UPDATE_TILES,
    SLACK_BYTES,
    SOON,
    TABLE_ON_DISK_TILES,
    UNGATED_COPIES,
    UPDATE_HOLES,
    UPDATE_TILES,
    Item,
    needed_bytes,
    peak_bytes,
    phase_bytes,
)
from edgezo.plan.data_fields import LOSS
from edgezo.plan.footprint_stored import StoredFootprint, table_precision
from edgezo.plan.numbers import rounding_of
from edgezo.plan.shapes import BYTES_PER_WEIGHT, MatrixShape
from edgezo.zo.axes import DIRECTIONS, MASKS, ROUNDINGS, RULES


def _numbers_of_rows(n: int) -> int:
    """Numbers of rows that bf16 products over up to ``n`` rows are computed in (machine/matmul.py)."""
    return bisect_left(PRODUCT_ROWS, min(n, PRODUCT_ROWS[-1])) + 1


@dataclass(frozen=True)
class Footprint(StoredFootprint):
    """A request with all that its size depends on, except precision and split: every byte that a run takes."""

    correction_bytes: int = 0  # added to a forward, as measured
    kept_tokens: int = EVAL_KEPT_TOKENS  # tokens whose keys and values an evaluation keeps
    below: Footprint | None = None  # the frozen blocks, where they pass before others are loaded

    def needed_bytes(self, precision: str, micro_batch: int, on_disk: int = 0) -> int:
        """The smallest cap that this fits under."""
        return needed_bytes(self.items(precision, micro_batch, on_disk))

    def with_short_tokens(
        self, precision: str, micro_batch: int, on_disk: int, cap: int
    ) -> Footprint:
        """The footprint with --short-tokens decided, where the request leaves that open: as ``cap`` bytes allow."""
        return self

    def with_kept_tokens(self, precision: str, spare_bytes: int) -> Footprint:
        """The footprint with more tokens that an evaluation keeps, in memory that nothing else needs."""
        if not self.tokens.written:
            return self
        more = spare_bytes // self._kept_token_bytes(self.compute_bytes(precision))
        return replace(self, kept_tokens=min(MOST_KEPT_TOKENS, self.kept_tokens + more))

    def items(self, precision: str, micro_batch: int, on_disk: int = 0) -> tuple[Item, ...]:
        """Every item, with the last ``on_disk`` blocks on disk, and then the tables too."""
        compute_bytes = self.compute_bytes(precision)
        items = (
            *self.process(),
            *self._weights(precision, on_disk),
            *self._trained(compute_bytes),
            self._run(),
            *self._code(precision),
            *self._compiled(precision, micro_batch),
            self._later(),
            Item("allocator slack", SLACK_BYTES, "freed small blocks that stay in the heap"),
            self._load(precision, on_disk),
            *self._forward(precision, micro_batch, compute_bytes),
            *self._holes(precision, micro_batch, compute_bytes),
            self._update(precision, micro_batch, on_disk),
            *self._update_holes(precision),
            *self._head_step(),
            *(i for i in self._of_parts(compute_bytes) if i.phase != "always"),
        )
        items = (*items, *self._reading(items), *self._passing(items, precision))
        return (*items, *self._reserves(items, precision, micro_batch, on_disk))

    def pass_from_disk(self, precision: str) -> bool:
        """Whether frozen blocks pass one by one from disk: where all of them in memory would raise the smallest cap."""
        if self.below is None:
            return False
        least_bytes = replace(self, below=None).needed_bytes(precision, 1)
        return self.below.needed_bytes(precision, 1) > least_bytes

    def _passing(self, items: Sequence[Item], precision: str) -> list[Item]:
        """What the frozen blocks take while rows pass them, beyond the permanent ``items``."""
        if self.below is None:
            return []
        layers = self.below.shape.layers
        on_disk = layers if self.pass_from_disk(precision) else 0
        more = peak_bytes(self.below.items(precision, 1, on_disk)) - phase_bytes(items, "pass")
        where = f"one by one from the {self.elsewhere}" if on_disk else "in memory"
        reason = f"{layers} frozen blocks, {where}, before the others are loaded"
        return [Item("frozen blocks", more, reason, "pass")] if more > 0 else []

    def _reserves(
        self, items: tuple[Item, ...], precision: str, micro_batch: int, on_disk: int
    ) -> list[Item]:
        """What a cap must have above the peak of these items."""
        reason = "kept free: nearer to the cap, a run stops"
        reserves = [Item("guard margin", GUARD_MARGIN_BYTES, reason, RESERVE)]
        if on_disk:
            # Made again between the forwards of two blocks.
            repaired = self._hidden_bytes(precision, micro_batch) + self._staged_bytes(precision)
            more = phase_bytes(items, "always") + repaired - peak_bytes(items)
            reason = "a block that is damaged on disk is made again from the base during a step"
            reserves += [Item("repair", more, reason, RESERVE)] if more > 0 else []
        return reserves

    def _compiled(self, precision: str, micro_batch: int) -> list[Item]:
        """What the matrix library compiles for the shapes of bf16 products, and keeps (machine/matmul.py)."""
        if self.compute_dtype(precision)[0] != "bf16":
            return []
        cfg, parts = self.cfg, self.cfg.parts
        matrices = self.shape.kinds
        d_in, d_out = {m.d_in for m in matrices}, {m.d_out for m in matrices}
        # Thin products with a basis or directions, and sums into the outputs. C kernels compute those that are narrow
        # enough, except those of the table and of norms. The width is what is added at once: factors, one direction
        # of all, and biases where they are trained.
        width = 2 * cfg.rank + (cfg.batch_size if parts.vectors else 0)
        in_c = self.c_kernels and width <= THIN
        thin = 0
        if parts.weights:
            thin += 3 if in_c else len(d_in) + len(d_out)
        if parts.factors and not in_c:
            thin += len(d_in) + 2 * len(d_out) + 1
        shapes = len({(m.d_in, m.d_out) for m in matrices}) * self.product_kinds + thin
        n_tokens = self._tokens_at_once(precision, micro_batch)
        numbers = _numbers_of_rows(n_tokens)
        late = (1 - SOON) * (1 - self._share_of_later) * max(0, numbers - FIRST_NUMBERS)
        count = shapes * (numbers - late)
        # Products with the head: of a chunk of its rows and of those that remain, with some of the scored states.
        scored = min(self.sides * micro_batch * self.tokens.scored, n_tokens)
        if self.tokens.kind == "label":
            count += _numbers_of_rows(scored)
        else:
            chunks = 1 + bool(self.shape.vocab % self.head_rows)
            count += chunks * _numbers_of_rows(min(scored, states_at_once(self.head_rows)))
        reason = f"oneDNN's kernels for {shapes} bf16 products of {numbers} numbers of rows, and those with the head"
        return [Item("compiled products", int(KERNEL_BYTES * count), reason, COMPUTE)]

    # -----------------------------------------------------------------------------------------
    # Tokens that pass at once

    @property
    def sides(self) -> int:
        """Forwards over the batch in a step, all in one pass."""
        return self.cfg.planned_sides

    def _longest_tokens(self, micro_batch: int, most: int | None = None) -> int:
        """Tokens of the longest batch that runs at once: of training on all sides, or of an evaluation.

        ``most``: tokens of one side in a piece, where micro-batches are split into pieces.
        """
        evaluating = self.tokens.evaluated_at_once(EVAL_TOKENS)
        return max(self.sides * self.tokens.at_once(micro_batch, most), evaluating)

    def _tokens_at_once(self, precision: str, micro_batch: int) -> int:
        return self._longest_tokens(micro_batch, self.most_tokens(precision))

    def most_tokens(self, precision: str) -> int | None:
        """Tokens, of one side, of the pieces that a micro-batch is split into; None where it is not split.

        Temporaries that stay in the heap save more time than reading the weights once more costs, and are small. Wide
        models have such temporaries for so few tokens that nothing would be gained. Pieces are alike wherever blocks
        are: other pieces would give losses that are equal to rounding only.
        """
        reused = self.reused_tokens(precision)
        return reused // self.sides if reused >= LEAST_PIECE_TOKENS else None

    def maps(self, precision: str, micro_batch: int) -> bool:
        """Whether there are batches whose temporaries are mapped one by one (`process_memory.Heap`)."""
        n_tokens = self._tokens_at_once(precision, micro_batch)
        size = self._temporaries(n_tokens, self.compute_bytes(precision), in_heap=True)
        return size > REUSED_BYTES

    def reused_tokens(self, precision: str) -> int:
        """Tokens, of all sides, whose temporaries stay in the heap."""
        return self._reused_tokens[self.compute_bytes(precision)]

    @cached_property
    def _reused_tokens(self) -> dict[int, int]:
        """``reused_tokens`` by the bytes of an activation; computed once for all options that a plan compares."""
        most = range(REUSED_BYTES)
        return {
            size: bisect_right(
                most,
                REUSED_BYTES,
                key=partial(self._temporaries, compute_bytes=size, in_heap=True),
            )
            - 1
            for size in (2, 4)
        }

    # ---------------------------------------------------------------------------------------- a forward

    def _forward(self, precision: str, micro_batch: int, compute_bytes: int) -> list[Item]:
        shape, tokens = self.shape, self.tokens
        n_tokens, sides = self._tokens_at_once(precision, micro_batch), self.sides
        whole = sides * tokens.longest(micro_batch)
        if n_tokens == whole:
            what = f"{micro_batch} examples x {sides} sides ({tokens.source})"
        elif n_tokens < whole:
            what = f"a piece of {micro_batch} examples x {sides} sides, {whole:,} ({tokens.source})"
        else:
            what = "an evaluation batch, which is more than a micro-batch of training"
        reason = f"{n_tokens:,} tokens of {what}, one block at a time"
        items = [Item(ACTIVATIONS, self._activations(n_tokens, compute_bytes), reason, "forward")]
        items += self._expanded(precision, compute_bytes)
        items += self._attention(n_tokens)
        # A mask, its making from 64-bit integers, and the thin products that go with it.
        size = self._drawn(micro_batch) * (4 * n_tokens + self._widest()) * compute_bytes
        items += self._perturbing(micro_batch, size)
        scored = min(sides * micro_batch * tokens.scored, n_tokens)
        logits, what = self._logits(scored, precision)
        # The blocks' temporaries have gone back when scores are computed (Heap.give_back).
        states = (4 * scored + 2 * compute_bytes * n_tokens) * shape.hidden  # those scored in fp32
        scores = logits + states - items[0].bytes
        reason = f"hidden states and logits of {scored:,} scored positions, {what}: more than a block takes"
        if scores > 0:
            items.append(Item("scores", scores, reason, "forward"))
        return [*items, *self._beside(micro_batch, compute_bytes)]

    def _drawn(self, micro_batch: int) -> int:
        """Directions in a forward."""
        return self.cfg.candidates if self.cfg.tries else micro_batch

    def _widest(self) -> int:
        """Values of the factors of a direction for the widest matrix."""
        return self.cfg.terms * max(m.d_out + m.d_in for m in self.shape.kinds)

    def _perturbing(self, micro_batch: int, size: int) -> list[Item]:
        """Directions of ``size`` bytes, and a tile of noise where they are dense."""
        reason = (
            f"signs of {micro_batch} examples for the widest matrix, and the side of each token"
        )
        items = [Item("directions", size, reason, "forward")]
        if noise := self._noise_tile():
            reason = "weight-sized noise of one tile, with what it is made from"
            items.append(Item("noise", noise, reason, "forward"))
        return items

    def _noise_tile(self) -> int:
        """Bytes of the rows of U beside a tile of weights: random bits, fp32 values and what a mask makes of them."""
        shape, cfg = self.shape, self.cfg
        matrices = cfg.parts.factors or cfg.parts.weights
        if not matrices or not (DIRECTIONS[cfg.directions].dense or MASKS[cfg.mask].dense):
            return 0
        largest = max(m.d_out for m in shape.kinds) * cfg.rank
        if cfg.parts.weights:
            sizes = [m.numel for m in shape.kinds]
            largest = max(*sizes, *(self._rows_in_use(t) * t.d_in for t in shape.tables))
        copies = 3 + MASKS[cfg.mask].noise_tiles + self._past_noise()
        # Tiles of the forward are cut in the compute dtype: in fp32 they are up to twice as large.
        return int(copies * min(2 * TILE_BYTES, 4 * largest))

    def _past_noise(self) -> int:
        """Tiles of noise of earlier steps, beside that of the step."""
        echoes = DIRECTIONS[self.cfg.directions].echoes
        return 2 if self.cfg.directions == "centred" else int(echoes)

    def _expanded(self, precision: str, compute_bytes: int) -> list[Item]:
        """A tile of weights in the compute dtype, where they are stored in another one."""
        if BYTES_PER_WEIGHT.get(precision) == compute_bytes:
            return []
        largest = max(m.numel for m in self.shape.kinds) * compute_bytes
        compute = self.compute_dtype(precision)[0]
        reason = f"{precision} weights become {compute} a tile at a time"
        return [Item(EXPANDED, self._expanded_bytes(largest), reason, "forward")]

    def _expanded_bytes(self, largest: int) -> int:
        """What is taken to expand a matrix of ``largest`` bytes."""
        return min(largest, TILE_BYTES)

    def _logits(self, scored: int, precision: str) -> tuple[int, str]:
        """Logits of so many positions: (bytes, over which words)."""
        if self.tokens.kind == "label":
            return 4 * scored * self.tokens.label_words, "label words only"
        compute_bytes, rows = self.compute_bytes(precision), self.head_rows
        # Products in bf16 have a few numbers of rows: a smaller one is filled up.
        states = next((n for n in PRODUCT_ROWS if n >= scored), scored)
        # Logits in the compute dtype, and in fp32, where the error takes their place.
        size = min(states_at_once(rows), states) * rows * (4 + compute_bytes)
        if BYTES_PER_WEIGHT.get(precision) != compute_bytes:
            size += rows * self.shape.embed_width * compute_bytes
        if self.product_kinds > 1:
            # The gradient by the states is a product with these rows in fp32.
            size += 4 * rows * self.shape.embed_width
        return size, "the vocabulary in chunks"

    def _beside(self, micro_batch: int, compute_bytes: int) -> list[Item]:
        """What a forward takes beside its temporaries: keys and values, and what a measurement adds."""
        items = self._keys_and_values(micro_batch, compute_bytes)
        if self.correction_bytes:
            reason = "by a measurement of the longest batch, beside what is counted"
            items.append(Item("correction", self.correction_bytes, reason, "forward"))
        return items

    def _keys_and_values(self, micro_batch: int, compute_bytes: int) -> list[Item]:
        """Keys and values of every token that answers are written after (generate.KeyValues)."""
        tokens, most = self.tokens, self.tokens.written
        if not most:
            return []
        a_row = tokens.evaluated_prompt + most
        kept = max(self.kept_tokens, a_row)
        if tokens.evaluations:
            kept = min(kept, tokens.evaluations * a_row)
        what = "of an evaluation"
        training = self.sides * micro_batch * (tokens.prompt + most)
        if self.cfg.objective != LOSS and training > kept:
            kept, what = training, f"of {micro_batch} examples x {self.sides} sides"
        size = kept * self._kept_token_bytes(compute_bytes)
        reason = f"{kept:,} tokens {what}, in {self.shape.layers} blocks"
        return [Item("keys and values", size, reason, "forward")]

    def _kept_token_bytes(self, compute_bytes: int) -> int:
        """Keys and values of a token. Those of one layer are copied where rows have ended."""
        shape = self.shape
        return (shape.layers + 1) * (shape.qkv_width - shape.attention_width) * compute_bytes

    def _activations(self, n_tokens: int, compute_bytes: int) -> int:
        """Bytes of one block's temporaries over ``n_tokens`` tokens: while it attends, or while its MLP runs.

        In the heap a share of the smaller of the two is still there beside the larger. Mapped ones leave nothing.
        """
        in_heap = self._temporaries(n_tokens, compute_bytes, in_heap=True) <= REUSED_BYTES
        if not self.c_kernels:
            return self._temporaries(n_tokens, compute_bytes, in_heap)
        shape = self.shape
        keys = (shape.qkv_width - shape.attention_width) // 2
        # C kernels rotate queries and keys in place and attend to packed rows.
        parts = 2 * shape.attention_width + 2 * keys  # queries, keys, values and the result
        attending = (HIDDEN_COPIES - 1) * shape.hidden + parts
        if self.tokens.kind == "choice":
            attending += parts  # those of the trunks of trees, apart
        if self.tokens.longest(1) > LONGEST:
            attending += parts + 2 * shape.attention_width  # torch's, row by row, and what it packs
        copies = GATE_COPIES if shape.gated and not shape.fused else UNGATED_COPIES
        mlp = HIDDEN_COPIES * shape.hidden + copies * shape.intermediate
        kept = HEAP_SHARE * min(attending, mlp) if in_heap else 0
        width = max(attending, mlp) + int(kept) + 2 * shape.head_dim
        return int(n_tokens * width * compute_bytes)

    def _temporaries(self, n_tokens: int, compute_bytes: int, in_heap: bool) -> int:
        """Bytes of one block's temporaries: while it attends, or while its MLP runs.

        As torch computes them, without C kernels. This decides about the pieces of a micro-batch, and so about the bits
        of losses: it stays as it is. In the heap, a share of what attention took is there beside the MLP's temporaries.
        """
        shape = self.shape
        keys = (shape.qkv_width - shape.attention_width) // 2
        queries = shape.attention_width
        # Half of the queries are negated to rotate them: a temporary of that size.
        at_once = QUERY_COPIES * queries + KEY_COPIES * keys + queries // 2
        attending = at_once * min(n_tokens, ATTENDING_TOKENS)
        # Tokens beyond a padded group have only what is made before and after it: rotated, and the result.
        attending += (4 * queries + 2 * keys) * max(0, n_tokens - ATTENDING_TOKENS)
        attending += n_tokens * shape.hidden * (HIDDEN_COPIES - 1)
        mlp = n_tokens * (
            HIDDEN_COPIES * shape.hidden + MLP_COPIES[shape.gated] * shape.intermediate
        )
        rotary = 2 * shape.head_dim  # cosine and sine
        kept = int(ATTENTION_SHARE * n_tokens * at_once) if in_heap else 0
        return (max(attending, mlp + kept) + n_tokens * rotary) * compute_bytes

    # ------------------------------------------------------------------------------------- an update
    def _update_tiles(self, precision: str) -> int:
        rounds = self.cfg.parts.weights and precision != "fp32"
        copies = ROUNDED_UPDATE_TILES if rounds else UPDATE_TILES
        if rounds and precision == "int8":
            copies = CODES_UPDATE_TILES
        cfg = self.cfg
        copies += RULES[cfg.rule].remade + MASKS[cfg.mask].tiles + (cfg.weight_decay_to == "base")
        copies += DIRECTIONS[cfg.directions].guided
        return copies * min(TILE_BYTES, self._largest_trained())

    def _holes(self, precision: str, micro_batch: int, compute_bytes: int) -> list[Item]:
        """Holes in the heap (calibrated): tiles of full weights leave them in about one run in five, and always several
        forwards of other lengths in a step, with scores over the vocabulary between them.
        """
        n_tokens = self._tokens_at_once(precision, micro_batch)
        size = self._activations(n_tokens, compute_bytes)
        if self.cfg.parts.weights:
            size = min(self._update_tiles(precision), size)
            return [Item("holes", size, "in the heap, between updates and forwards", "forward")]
        several = self.sides * self.tokens.longest(self.cfg.batch_size) > n_tokens
        others = several and self.tokens.kind != "label"
        size = int(PIECE_HOLES * size * (others or MASKS[self.cfg.mask].forwards > 0))
        made = Item(FORWARD_HOLES, size, "in the heap, of forwards of other lengths", "forward")
        return [made] if size else []

    def _update(self, precision: str, micro_batch: int, on_disk: int) -> Item:
        size = self._update_tiles(precision)
        reason = "weights, direction and change of one tile, in fp32"
        if ROUNDINGS[rounding_of(self.cfg, precision)[0] or ""].requantised:
            # A matrix as the base has it, beside a tile that is made from it (QUANTISE_BYTES).
            size = max(size, self._largest_base() + REQUANTISE_TILES * TILE_BYTES)
            reason += "; or a matrix of the base, and a tile that is replayed and quantised"
        if on_disk and self.cfg.parts.weights and self.trained_tables:
            stored = TABLE_ON_DISK_TILES * BYTES_PER_WEIGHT[table_precision(precision)] / 4
            size += int(stored * min(TILE_BYTES, self._largest_trained()))
        if on_disk:
            size += self._hidden_bytes(precision, micro_batch)
            reason += (
                "; and the hidden states, since a block is updated when the forward comes to it"
            )
        return Item("update tiles", size, reason, "update")

    def _hidden_bytes(self, precision: str, micro_batch: int) -> int:
        """Hidden states between the forwards of two blocks."""
        n_tokens = self._tokens_at_once(precision, micro_batch)
        return HIDDEN_COPIES * n_tokens * self.shape.hidden * self.compute_bytes(precision)

    def _update_holes(self, precision: str) -> list[Item]:
        cfg, drawn = self.cfg, DIRECTIONS[self.cfg.directions]
        based = MASKS[cfg.mask].dense or drawn.refreshed or drawn.guided
        stays = precision == "int8" or based
        scored = cfg.parts.head and self.tokens.kind != "label"
        if not cfg.parts.weights or not (stays or scored):
            return []  # nothing that stays is made between tiles
        reason = "in the heap, between tiles of matrices of all sizes"
        size = int(UPDATE_HOLES * self._update_tiles(precision))
        return [Item("holes", size, reason, "update")]

    def _head_step(self) -> list[Item]:
        """Temporaries of the exact head's own update, which comes after that of the tiles."""
        shape, cfg = self.shape, self.cfg
        if not cfg.parts.head or self.tokens.kind == "label":
            return []
        size = 4 * HEAD_TEMPORARIES * cfg.rank * shape.vocab
        reason = "the scale of an Adam step, as large as what it moves"
        return [Item("head update", size, reason, "update")]

    def _largest_trained(self) -> int:
        """Bytes in fp32 of the largest tensor that an update moves."""
        shape, cfg = self.shape, self.cfg
        sizes = [shape.hidden]
        if cfg.parts.factors:
            sizes += [m.d_out * cfg.rank for m in shape.kinds]
        if cfg.parts.weights:
            sizes += [m.numel for m in shape.kinds]
            sizes += [self._moved_rows(t) * t.d_in for t in self.trained_tables]
        return 4 * max(sizes)

    def _moved_rows(self, table: MatrixShape) -> int:
        """Rows of a table that one update may move."""
        if RULES[self.cfg.rule].states or MASKS[self.cfg.mask].state:
            return table.d_out
        return self._rows_in_use(table)

    def _rows_in_use(self, table: MatrixShape) -> int:
        """Rows of a table that a step uses: with label words those of its examples, and the words'."""
        tokens = self.tokens
        if tokens.kind != "label":
            return table.d_out
        used = tokens.longest(self.cfg.batch_size) + tokens.label_words
        return min(table.d_out, used)
