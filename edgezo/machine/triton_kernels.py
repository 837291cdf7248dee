"""The bodies of the Triton kernels; gpu_kernels.py launches them and says what each does.

Triton is imported with this module, so only gpu_kernels.py imports it, where there is a GPU (or TRITON_INTERPRET=1,
with which the kernels run in Python on a CPU). Bits are those of kernels.c:

- Philox's words come from 64-bit integers; a program makes some blocks of 256 bits and takes their bits apart.
- bf16 numbers are read and written as their 16 bits and rounded by integer arithmetic, as kernels.c does it.
- No product and sum become one operation (``enable_fp_fusion=False`` at every launch), and powers of two are
  multiplied, never divided by, so that every result is rounded where the CPU rounds it.

The arguments seed, name and step are 64-bit words in two signed halves, so that no value of theirs compiles anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, SIGNS, NORMALS = (tl.constexpr(kind) for kind in range(3))  # of a dense factor U
_BLOCK_SIGNS = tl.constexpr(256)  # signs of a block of noise
_FIRST = tl.constexpr(0xD2E7470EE14C6C93)
_SECOND = tl.constexpr(0xCA5A826395121157)
_FIRST_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_SECOND_STEP = tl.constexpr(0xBB67AE8584CAA73B)
_VERSION = tl.constexpr(1)  # noise._LAYOUT_VERSION
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: a small number added to it loses its fraction
FREE = ("seed_0", "seed_1", "name_0", "name_1", "step_0", "step_1", "first", "n", "stream")


# ---------------------------------------------------------------------------------------------
# Noise


@triton.jit
def _word(low, high):
    return low.to(tl.uint32).to(tl.uint64) | (high.to(tl.uint32).to(tl.uint64) << 32)


@triton.jit
def _words(block, stream, seed_0, seed_1, name_0, name_1, step_0, step_1, N: tl.constexpr):
    """The words of ``block`` (N,) uint64 as (N, 8) uint32, the lower half of each first."""
    c0 = block + 1
    zero = c0 - c0
    c1 = zero + stream.to(tl.uint64)
    c2 = zero + _word(step_0, step_1)
    c3 = zero + _VERSION
    k0 = zero + _word(seed_0, seed_1)
    k1 = zero + _word(name_0, name_1)
    first = tl.full((N,), _FIRST, tl.uint64)
    second = tl.full((N,), _SECOND, tl.uint64)
    first_step = tl.full((N,), _FIRST_STEP, tl.uint64)
    second_step = tl.full((N,), _SECOND_STEP, tl.uint64)
    for _ in tl.static_range(10):
        upper = tl.umulhi(first, c0)
        lower = first * c0
        upper_2 = tl.umulhi(second, c2)
        lower_2 = second * c2
        c0 = upper_2 ^ c1 ^ k0
        c2 = upper ^ c3 ^ k1
        c1 = lower_2
        c3 = lower
        k0 += first_step
        k1 += second_step
    # join puts its second argument behind its first along a new last axis.
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (N, 4))
    return tl.reshape(tl.join(words.to(tl.uint32), (words >> 32).to(tl.uint32)), (N, 8))


@triton.jit
def _minus(words, N: tl.constexpr):
    """(N, 256) uint32 of (N, 8) words: the sign bit of an fp32 number where a sign is -1, else 0."""
    shift = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    return tl.reshape(((words ^ 0xFFFFFFFF)[:, :, None] >> shift) << 31, (N, 256))


@triton.jit
def _times_signs(x, minus):
    """fp32 x with the signs of ``minus``."""
    return (x.to(tl.uint32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)


@triton.jit
def _signs(words, N: tl.constexpr):
    """(N, 256) fp32 signs of (N, 8) words."""
    return _times_signs(tl.full((N, 256), 1.0, tl.float32), _minus(words, N))


@triton.jit
def _codes(words, N: tl.constexpr):
    """(N, 16) int32: the 16-bit numbers of (N, 8) words."""
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (N, 16)).to(tl.int32)


@triton.jit(do_not_specialize=FREE)
def noise_kernel(
    out, numbers, table, first, n, width, blocks, stream,
    seed_0, seed_1, name_0, name_1, step_0, step_1,
    LEVELS: tl.constexpr, NUMBERED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Rows of noise, (n, width) int8 or fp32; N pairs of a row and one of its blocks in each program."""
    pair = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    row = pair // blocks
    column = pair % blocks
    inside = row < n
    if NUMBERED:
        number = tl.load(numbers + row, mask=inside, other=0)
    else:
        number = first + row
    block = (number * blocks + column).to(tl.uint64)
    words = _words(block, stream, seed_0, seed_1, name_0, name_1, step_0, step_1, N)
    if LEVELS:
        at = column[:, None] * 16 + tl.arange(0, 16)[None, :]
        value = tl.load(table + _codes(words, N))
    else:
        at = column[:, None] * _BLOCK_SIGNS + tl.arange(0, 256)[None, :]
        value = 1 - (_minus(words, N) >> 30).to(tl.int8)
    tl.store(out + row[:, None] * width + at, value, mask=inside[:, None] & (at < width))


# ---------------------------------------------------------------------------------------------
# Numbers


@triton.jit
def _wide(bits):
    """fp32 of the 16 bits of a bf16 number, in an int16."""
    return (bits.to(tl.uint16).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(x):
    """The bits of the nearest bf16 number, ties to even, in an int16; NaN stays one."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, 0x7FC0, rounded).to(tl.uint16).to(tl.int16)


@triton.jit
def _get(x, at, mask, BF16: tl.constexpr):
    if BF16:
        return _wide(tl.load(x + at, mask=mask, other=0))
    else:
        return tl.load(x + at, mask=mask, other=0.0)


@triton.jit
def _put(x, at, value, mask, BF16: tl.constexpr):
    if BF16:
        tl.store(x + at, _narrow(value), mask=mask)
    else:
        tl.store(x + at, value, mask=mask)


@triton.jit
def _power(e):
    """2**e as fp32, e int32 from -126 to 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(x, e):
    """x * 2**e, e int32 from -250 to 250: in two products, neither of which over- or underflows."""
    half = e >> 1
    return x * _power(half) * _power(e - half)


@triton.jit
def _spacing(high):
    """The exponent of the distance between bf16 numbers at ``high`` (layouts.Dense)."""
    field = ((high.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32)
    return tl.maximum(field - 134, -133)


@triton.jit
def _split(value):
    """(bits of the nearest bf16 number, what remains in 256ths of its spacing, as fp32)."""
    bits = _narrow(value)
    high = _wide(bits)
    code = _scaled((value - high) * 256.0, -_spacing(high))
    code = (code + _ROUND) - _ROUND  # to the nearest, ties to even
    return bits, tl.minimum(tl.maximum(code, -127.0), 127.0)


@triton.jit
def _joined(bits, code):
    """The number that a bf16 number and its low-order code stand for."""
    high = _wide(bits)
    return high + _scaled(code, _spacing(high) - 8)


# ---------------------------------------------------------------------------------------------
# The forward


@triton.jit(do_not_specialize=FREE)
def signed_dots_kernel(
    x, example, slots, side, out, n, d, stride, blocks, stream,
    seed_0, seed_1, name_0, name_1, step_0, step_1,
    BF16: tl.constexpr, BF16_SIDE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out (n,) fp32 = side * (s_i . x), s_i the signs of the example of each of N tokens."""
    token = tl.program_id(0) * N + tl.arange(0, N)
    inside = token < n
    slot = tl.load(slots + tl.load(example + token, mask=inside, other=0))
    total = tl.zeros((N,), tl.float32)
    for column in range(blocks):
        block = (slot * blocks + column).to(tl.uint64)
        words = _words(block, stream, seed_0, seed_1, name_0, name_1, step_0, step_1, N)
        at = column * _BLOCK_SIGNS + tl.arange(0, 256)
        place = token.to(tl.int64)[:, None] * stride + at[None, :]
        value = _get(x, place, inside[:, None] & (at < d)[None, :], BF16)
        total += tl.sum(_times_signs(value, _minus(words, N)), 1)
    total *= _get(side, token, inside, BF16_SIDE)
    tl.store(out + token, total, mask=inside)


@triton.jit(do_not_specialize=FREE)
def add_signed_kernel(
    y, left, right, weight, example, slots, n, m, stride, k, blocks, scale, stream,
    seed_0, seed_1, name_0, name_1, step_0, step_1,
    READ: tl.constexpr, SIGNED: tl.constexpr, BF16: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y (n, m) = [y +] left @ right [+ scale * weight * r_i], rounded once; N tokens, 256 columns a program."""
    token = tl.program_id(0) * N + tl.arange(0, N)
    column = tl.program_id(1)
    at = column * _BLOCK_SIGNS + tl.arange(0, 256)
    inside = (token < n)[:, None] & (at < m)[None, :]
    place = token.to(tl.int64)[:, None] * stride + at[None, :]
    if READ:
        total = _get(y, place, inside, BF16)
    else:
        total = tl.zeros((N, 256), tl.float32)
    if SIGNED:
        slot = tl.load(slots + tl.load(example + token, mask=token < n, other=0))
        block = (slot * blocks + column).to(tl.uint64)
        words = _words(block, stream, seed_0, seed_1, name_0, name_1, step_0, step_1, N)
        size = tl.load(weight + token, mask=token < n, other=0.0) * scale
        total += _times_signs(tl.broadcast_to(size[:, None], (N, 256)), _minus(words, N))
    for j in range(k):
        one = tl.load(left + token * k + j, mask=token < n, other=0.0)
        line = tl.load(right + j * m + at, mask=at < m, other=0.0)
        total += one[:, None] * line[None, :]
    _put(y, place, total, inside, BF16)


# ---------------------------------------------------------------------------------------------
# Updates


@triton.jit
def _sum_of_directions(
    coefficients, row, column, count, row_blocks, blocks, row_stream, col_stream,
    seed_0, seed_1, name_0, name_1, step_0, step_1, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """sum_i c_i r_i s_i^T of ROWS rows from ``row`` on, which lie in one block of r, and a block of columns: fp32."""
    total = tl.zeros((ROWS, 256), tl.float32)
    for start in range(0, count, B):
        i = start + tl.arange(0, B)
        c = tl.load(coefficients + i, mask=i < count, other=0.0)
        block = (i.to(tl.int64) * row_blocks + row // 256).to(tl.uint64)
        words = _words(block, row_stream, seed_0, seed_1, name_0, name_1, step_0, step_1, B)
        # ROWS divides 256, so that the rows are one part of the block's signs.
        parts = tl.reshape(_signs(words, B), (B, 256 // ROWS, ROWS))
        chosen = (tl.arange(0, 256 // ROWS) == (row % 256) // ROWS)[None, :, None]
        r = tl.sum(tl.where(chosen, parts, 0.0), 1) * c[:, None]  # (B, ROWS)
        block = (i.to(tl.int64) * blocks + column).to(tl.uint64)
        words = _words(block, col_stream, seed_0, seed_1, name_0, name_1, step_0, step_1, B)
        total += tl.dot(tl.trans(r), _signs(words, B), input_precision="ieee")
    return total


@triton.jit
def _dense_factor(
    table, row, column, cols, stream, seed_0, seed_1, name_0, name_1, step_0, step_1,
    DENSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """U of ROWS rows and a block of columns, (ROWS, 256) fp32."""
    if DENSE == SIGNS:
        numbers = row.to(tl.int64) + tl.arange(0, ROWS)
        block = (numbers * ((cols + 255) // 256) + column).to(tl.uint64)
        words = _words(block, stream, seed_0, seed_1, name_0, name_1, step_0, step_1, ROWS)
        return _signs(words, ROWS)
    else:
        pair = tl.arange(0, ROWS * 16)
        numbers = row.to(tl.int64) + pair // 16
        block = (numbers * ((cols + 15) // 16) + column * 16 + pair % 16).to(tl.uint64)
        words = _words(block, stream, seed_0, seed_1, name_0, name_1, step_0, step_1, ROWS * 16)
        return tl.reshape(tl.load(table + _codes(words, ROWS * 16)), (ROWS, 256))


@triton.jit(do_not_specialize=FREE)
def update_kernel(
    values, low, coefficients, table, first, n, cols, count, row_blocks, blocks, kept, scale,
    row_stream, col_stream, stream, seed_0, seed_1, name_0, name_1, step_0, step_1,
    FACTORED: tl.constexpr, DENSE: tl.constexpr, SCALED: tl.constexpr, DECAYED: tl.constexpr,
    PLANE: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """theta <- kept * theta - scale * sum_i c_i D_i of rows first to first + n, in place, rounded to their grid.

    ``values`` (rows, cols) fp32, or with PLANE the bits of bf16 numbers whose low-order codes are ``low``. Without
    FACTORED ``coefficients`` has one number, their sum.
    """
    # Programs begin at multiples of ROWS, so that their rows lie in one block of r.
    row = (first // ROWS + tl.program_id(0)) * ROWS
    column = tl.program_id(1)
    if FACTORED:
        g = _sum_of_directions(
            coefficients, row, column, count, row_blocks, blocks, row_stream, col_stream,
            seed_0, seed_1, name_0, name_1, step_0, step_1, ROWS, B,
        )  # fmt: skip
    else:
        g = tl.zeros((ROWS, 256), tl.float32) + tl.load(coefficients)
    if DENSE != NONE:
        g = g * _dense_factor(
            table, row, column, cols, stream, seed_0, seed_1, name_0, name_1, step_0, step_1,
            DENSE, ROWS,
        )  # fmt: skip
    if SCALED:
        g = g * scale
    rows = row + tl.arange(0, ROWS)
    at = column * _BLOCK_SIGNS + tl.arange(0, 256)
    inside = ((rows >= first) & (rows < first + n))[:, None] & (at < cols)[None, :]
    place = rows.to(tl.int64)[:, None] * cols + at[None, :]
    if PLANE:
        bits = tl.load(values + place, mask=inside, other=0)
        code = tl.load(low + place, mask=inside, other=0).to(tl.float32)
        theta = _joined(bits, code)
    else:
        theta = tl.load(values + place, mask=inside, other=0.0)
    if DECAYED:
        theta = theta * kept
    theta = theta - g
    if PLANE:
        bits, code = _split(theta)
        bits, code = _split(_joined(bits, code))  # as rounding and then writing does
        tl.store(values + place, bits, mask=inside)
        tl.store(low + place, code.to(tl.int8), mask=inside)
    else:
        tl.store(values + place, theta, mask=inside)


# ---------------------------------------------------------------------------------------------
# Codes and planes


@triton.jit
def expand_int8_kernel(codes, scale, out, cols, BF16: tl.constexpr, N: tl.constexpr):
    """out = code * scale of N columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * N + tl.arange(0, N)
    inside = at < cols
    code = tl.load(codes + row * cols + at, mask=inside, other=0).to(tl.float32)
    _put(out, row * cols + at, code * tl.load(scale + row), inside, BF16)


@triton.jit
def expand_int4_kernel(
    packed, scale, shift, out, cols, size, NIBBLE: tl.constexpr, BF16: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """out = code * scale - shift of N columns of a row, rounded twice; groups of ``size`` columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * N + tl.arange(0, N)
    inside = at < cols
    code = (tl.load(packed + row * cols + at, mask=inside, other=0) >> NIBBLE) & 15
    group = row * (cols // size) + at // size
    value = code.to(tl.float32) * tl.load(scale + group, mask=inside, other=0.0)
    if BF16:
        value = _wide(_narrow(value))
    value = value - tl.load(shift + group, mask=inside, other=0.0)
    _put(out, row * cols + at, value, inside, BF16)


@triton.jit
def read_plane_kernel(high, low, out, n, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    code = tl.load(low + at, mask=at < n, other=0).to(tl.float32)
    tl.store(out + at, _joined(tl.load(high + at, mask=at < n, other=0), code), mask=at < n)


@triton.jit
def write_plane_kernel(values, high, low, n, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    bits, code = _split(tl.load(values + at, mask=at < n, other=0.0))
    tl.store(high + at, bits, mask=at < n)
    tl.store(low + at, code.to(tl.int8), mask=at < n)


@triton.jit
def snap_plane_kernel(values, n, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    bits, code = _split(tl.load(values + at, mask=at < n, other=0.0))
    tl.store(values + at, _joined(bits, code), mask=at < n)
