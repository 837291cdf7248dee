"""Sizes that the plan counts with and the runtime obeys: each stands here once, so that the two cannot differ.

Standard library only, so that planning needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

MB = 1_000_000


# No temporary of the weights is larger, whatever the largest matrix.
TILE_BYTES = 16 << 20


# A weight being quantised: in fp32, with the copies that rounding it takes; of a tile so many bytes are held.
QUANTISE_BYTES = 16


PAGE_BYTES = 4096


# Slots that blocks on disk are read into: one computes or is written back, the other is read into.
SLOTS = 2


# memory.Guard stops a run that comes nearer to the cap than this.
GUARD_MARGIN_BYTES = 16 << 20


# Activations of this size in all stay in the heap, which saves their page faults; what attention has left there is
# used again in part only (calibrated). Larger ones are mapped and given back one by one (memory.Heap).
REUSED_BYTES = 40 * MB


EVAL_TOKENS = 512  # packed tokens of an evaluation batch, unless one example is longer


# Blocks that a linear probe averages: one alone is up to 3 points worse, and its choice is noisy (LOG.md).
PROBED_BLOCKS = 5


PROBE_SHARE = 0.7  # of a run's time for a linear probe, where something else is trained after it


MOST_PROBE_ROWS = 4096


# Of a bf16 product on a CPU: its rows pass in pieces of these sizes (machine/matmul.py).
PRODUCT_ROWS = (16, 64, 128, 256, 512, 1024, 2048)


THIN = 64  # up to here an axis may be the examples of a group, or a rank


def int4_group(cols: int) -> int:
    """Weights of a row that share a scale and a shift: 32 where it divides the row, else the whole row.

    quanto's default is 128; with 32 they cost 2 bits a weight more, and a base that comes from a GGUF
    Q4 file, whose blocks are 32 as well, stays as it is.
    """
    return 32 if cols % 32 == 0 else cols


# The driver's context with the kernels of a run, cuBLAS's among them (calibrated on one GPU, an H100).
CONTEXT_BYTES = 742 * MB


def tiles(rows: int, cols: int, bytes_per_element: int = 4) -> Iterator[slice]:
    """Row slices of at most ``TILE_BYTES`` each (one row at least)."""
    step = max(1, TILE_BYTES // max(1, cols * bytes_per_element))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


MOST_CODE = 127  # symmetric: a direction's two sides have the same room
