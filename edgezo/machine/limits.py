"""Sizes that the plan counts with and the runtime obeys: each stands here once, so that the two cannot differ.

Standard library only, so that planning needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

MB = 1_000_000

# -- memory ---------------------------------------------------------------------------------------------

LONGEST = 1024  # tokens of the longest row whose attention the C kernels compute; torch works on longer ones in blocks
PADDED_TOKENS = 4096  # most tokens of a padded group of rows in attention, but one row at least
SCORE_COPIES = 3  # of softcapped attention scores that are there at once
TILE_BYTES = 16 << 20  # no temporary of the weights is larger, whatever the largest matrix
# Rows of the head in fp32, and their logits: scores are computed in such chunks (``head_rows``, ``states_at_once``).
LOGITS_BYTES = TILE_BYTES // 2
# Per weight that is expanded without a C kernel, so that it is done in small pieces: of a product of bf16 and fp32
# torch makes fp32 copies of both factors.
EXPAND_BYTES = 256
QUANTISE_BYTES = 16  # per weight being quantised: its fp32 value and the copies for rounding
PAGE_BYTES = 4096  # raw tensors of a block begin at multiples of this
SLOTS = 2  # memory for so many blocks that do not stay there: one computes or is written back, one is read into
GUARD_MARGIN_BYTES = 8 << 20  # process_memory.Guard keeps so much of the cap free

# Activations of at most this size in all stay in the heap, which saves their page faults; the memory that attention
# frees there is only partly used again (calibrated). Larger ones are mapped and given back one by one
# (process_memory.Heap).
REUSED_BYTES = 40 * MB

# -- products and codes ---------------------------------------------------------------------------------

PRODUCT_ROWS = (16, 64, 128, 256, 512, 1024, 2048)  # rows of a bf16 product's pieces (matmul.py)
# MKL packs blocks of at most so many (rows, columns, terms of a sum) for an fp32 product: 768, 6400 and 384 were
# measured with AVX-512. It divides more terms evenly: a product of 512 terms makes two smaller blocks of 256.
PANEL = (1024, 6400, 384)
THIN = 64  # an axis of at most this length may be the examples of a group, or a rank
MOST_CODE = 127  # codes go from -127 to 127: the two sides of a direction have the same room

# -- evaluation and the linear probe --------------------------------------------------------------------

# Packed tokens that pass the frozen blocks at once, unless one row is longer. The bits of kept states depend on it.
PASS_TOKENS = 1024
PASS_SHARE = (
    1 / 3
)  # of the time that --for gives a run: rows may take so much of it to pass the frozen blocks
WRITING_TOKENS = 256  # of prompts that pass at once before a model writes, on the ONNX engine
EVAL_TOKENS = 512  # packed tokens of an evaluation batch, unless one example is longer
# Blocks that a linear probe averages. One alone is up to 3 points worse, and its choice is noisy
# (benchmarks/log/2026-11-23-which-blocks-should-a-linear-probe-read.md).
READOUT_BLOCKS = 5
# The share of a run's time that the linear probe may take, where something else is trained after it.
READOUT_SHARE = 0.7
# Rows whose label words are scored where these have several tokens, which takes many times as long as the prompts.
WORDS_ROWS = 32
MOST_PASSES = 3  # of the rows of a linear probe, where their states change on disk
PLAIN_FORWARDS = 8  # plain forward passes that a run times, for summary.json's forward_s
MOST_READOUT_ROWS = 4096  # a linear probe is fitted to at most so many rows


def int4_group(cols: int) -> int:
    """Weights of a row that share a scale and a shift: 32 where it divides the row, else the whole row.

    quanto's default is 128. With 32 they cost 2 bits a weight more, and a base from a GGUF Q4 file, whose blocks are 32
    as well, stays as it is.
    """
    return 32 if cols % 32 == 0 else cols


def tiles(rows: int, cols: int, bytes_per_element: int = 4) -> Iterator[slice]:
    """Consecutive slices of ``rows``, of at most ``TILE_BYTES`` each, but one row at least."""
    step = max(1, TILE_BYTES // max(1, cols * bytes_per_element))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def head_rows(vocab: int, width: int) -> int:
    """Rows of a head (vocab, width) of which logits are computed at once."""
    return min(vocab, max(1, LOGITS_BYTES // (4 * width)))


def states_at_once(rows: int) -> int:
    """States of which the logits of so many rows are computed at once."""
    return max(1, LOGITS_BYTES // (4 * rows))
