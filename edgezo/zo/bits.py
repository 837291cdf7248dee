"""Noise as a pure function of an address: (seed, step, tensor, stream, place).

Every random number of a run is what the counter-based generator Philox4x64-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) gives at an address; none is drawn from a sequence:

    key     = (run seed, 64-bit hash of the tensor's name)
    counter = (block, stream, step, layout version)         one block = 4 words of 64 bits

so the same bits come back on every device, for every dtype, thread count and tile size, and a slice equals the
slice of the whole. kernels.c generates the words, or numpy's ``Philox`` (its stream is covered by numpy's
compatibility guarantee); ``tests/reference.py`` has the ten rounds in plain Python.

Matrices are addressed row by row. Each row starts with a new block, so any tile of rows can be generated alone.

    signs     one bit an element      ->  -1 or +1
    normals   16 bits an element      ->  N(0, 1) quantised to 65,536 equally probable levels, variance exactly 1
    uniform   16 bits an element      ->  (k + 1/2) / 65,536

The normals come from a table, not from log and cos, because libraries disagree in the last bit of those.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from edgezo.machine.kernel_library import draw_noise, library, threads_for

_LAYOUT_VERSION = 1  # in the counter: a change of how matrices are addressed would change every bit
_BLOCK_BITS = 256
_PART_ELEMENTS = 1 << 18  # generated at a time, so that a part stays in the CPU's cache
_U64 = (1 << 64) - 1

# Streams: independent uses of one tensor's noise within a step. Their numbers never change: journals are replayed with
# them.
ROW, COLUMN, DENSE, ROUNDING, BASIS, ORDER = range(6)
LEFT, SPAN, CENTRE, PROBE_GRID, UPDATE_GRID, CHOICE = range(6, 12)


class Key(NamedTuple):
    """The part of an address that names the step."""

    seed: int  # the run's seed, any integer (taken modulo 2**64)
    step: int  # 0, 1, ...


@functools.lru_cache(maxsize=4096)  # a replay asks for the same names at each step
def tensor_id(name: str) -> int:
    """The 64-bit number of a tensor's name: a hash that stays the same."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def address_of(key: Key, tensor: int, stream: int) -> tuple[int, ...]:
    """Philox's key (2 words), then its counter without the block (3 words)."""
    return key.seed & _U64, tensor & _U64, stream, key.step & _U64, _LAYOUT_VERSION


def words(key: Key, tensor: int, stream: int, block: int, n_blocks: int) -> np.ndarray:
    """Words ``4*block`` to ``4*(block + n_blocks) - 1`` of a stream, (4*n_blocks,) uint64, little-endian."""
    seed, name, *counter = address_of(key, tensor, stream)
    generator = np.random.Philox(
        key=np.array([seed, name], dtype=np.uint64),
        counter=np.array([block, *counter], dtype=np.uint64),
    )
    raw: np.ndarray = generator.random_raw(4 * n_blocks)
    return raw.astype("<u8", copy=False)


def row_words(
    key: Key, tensor: int, stream: int, rows: slice, width_bits: int
) -> tuple[np.ndarray, int]:
    """(n, words of a row) for the ``rows`` of a matrix whose rows take ``width_bits``; and n."""
    blocks = -(-width_bits // _BLOCK_BITS)
    count = rows.stop - rows.start
    raw = words(key, tensor, stream, rows.start * blocks, count * blocks)
    return raw.reshape(count, 4 * blocks), count


@functools.cache
def sign_table() -> np.ndarray:
    """(256,) uint64: the eight signs of a byte, least significant bit first, as eight int8."""
    bit = (np.arange(256)[:, None] >> np.arange(8)) & 1
    table: np.ndarray = (2 * bit - 1).astype(np.int8).view(np.uint64).ravel()
    return table


@functools.cache
def normal_table() -> np.ndarray:
    """(65536,) fp32: the quantiles of N(0,1) at (k + 1/2)/65536, scaled to variance 1; the largest is 4.2."""
    half = np.array([NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(32768, 65536)])
    half /= np.sqrt(np.mean(half**2))
    # The negative half mirrors the positive one exactly, so the mean is exactly zero.
    return np.concatenate([-half[::-1], half]).astype(np.float32)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="noise")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_parts(rows: slice, width: int, fill: Callable[[slice, slice], None], threads: int) -> None:
    """Call ``fill(rows of the matrix, rows of the result)`` part by part, on up to ``threads`` threads where that pays.

    A part fits in a CPU's cache. The bits of a row do not depend on the part that it is in.
    """
    count = rows.stop - rows.start
    step = max(1, _PART_ELEMENTS // max(1, width))
    places = [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def run(share: list[slice]) -> None:
        for place in share:
            fill(slice(rows.start + place.start, rows.start + place.stop), place)

    threads = min(threads, len(places))
    if threads <= 1:
        return run(places)
    size = -(-len(places) // threads)
    list(_pool(threads).map(run, [places[i : i + size] for i in range(0, len(places), size)]))


def sign_rows(
    key: Key, tensor: int, stream: int, rows: slice, width: int, threads: int = 1
) -> np.ndarray:
    """``rows`` of a matrix of independent fair signs, (n, width) int8, made by the library or by numpy."""
    count = rows.stop - rows.start
    if library() is not None:
        made = np.empty((count, width), np.int8)
        address = address_of(key, tensor, stream)
        most = threads_for(made.size, threads)
        draw_noise(address, sign_table(), rows, width, made.ctypes.data, most)
        return made
    return signs_by_numpy(key, tensor, stream, rows, width, threads)


def signs_by_numpy(
    key: Key, tensor: int, stream: int, rows: slice, width: int, threads: int
) -> np.ndarray:
    """``sign_rows`` without the library."""
    made = np.empty((rows.stop - rows.start, 32 * -(-width // _BLOCK_BITS)), np.uint64)

    def fill(part: slice, place: slice) -> None:
        raw, count = row_words(key, tensor, stream, part, width)
        sign_table().take(raw.view(np.uint8).reshape(count, -1), out=made[place], mode="clip")

    in_parts(rows, width, fill, threads)
    return made.view(np.int8)[:, :width]


def levels_by_numpy(
    key: Key,
    tensor: int,
    stream: int,
    rows: slice,
    width: int,
    table: np.ndarray,
    threads: int,
) -> np.ndarray:
    """(n, width) fp32: for each element the value of ``table`` (65536,) that its 16 bits number."""
    made = np.empty((rows.stop - rows.start, width), np.float32)

    def fill(part: slice, place: slice) -> None:
        raw, count = row_words(key, tensor, stream, part, 16 * width)
        codes = raw.view("<u2").reshape(count, -1)[:, :width]
        table.take(codes, out=made[place], mode="clip")

    in_parts(rows, width, fill, threads)
    return made


@functools.cache
def uniform_table() -> np.ndarray:
    """(65536,) fp32: (k + 1/2)/65536."""
    return (np.arange(65536, dtype=np.float32) + np.float32(0.5)) / np.float32(65536)


def permutation(key: Key, tensor: int, stream: int, size: int) -> np.ndarray:
    """A random order of ``range(size)``, (size,) int64."""
    drawn = words(key, tensor, stream, 0, -(-size // 4))[:size]
    return np.argsort(drawn, kind="stable")


def exact_grid(coefficients: np.ndarray) -> np.ndarray:
    """Round (n,) coefficients to multiples of a power of two, so that sums of +-coefficients are exact; (n,) fp32.

    The grid is 2**-16 times the power of two at or below the largest coefficient. Each is then an integer of at most 17
    bits times the grid, and a sum of up to 128 of them stays below 2**24: no order of summation, matrix product, device
    or tile size can change a bit of an update. The rounding is 1.5e-5 of the largest coefficient. Coefficients that
    are not all finite become zeros.
    """
    coefficients = np.asarray(coefficients, dtype=np.float64)
    largest = float(np.max(np.abs(coefficients), initial=0.0))
    if largest == 0.0 or not np.isfinite(largest):
        return np.zeros(coefficients.shape, dtype=np.float32)
    # Groups above 128 examples give up one bit for each doubling.
    extra = max(0, int(np.ceil(np.log2(max(len(coefficients), 1) / 128))))
    grid = 2.0 ** (np.floor(np.log2(largest)) - 16 + extra)
    return (np.round(coefficients / grid) * grid).astype(np.float32)
