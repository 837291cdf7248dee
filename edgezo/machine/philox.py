"""Philox4x64-10 as plain torch operations on integers, for a device that has no kernel for it (zo/noise.py).

torch multiplies 64-bit integers modulo 2**64 and has no logical shift to the right, so the upper half of a product is
put together from four products of 32 bits. Bits and tables are those of a CPU, on any device with 64-bit integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU = torch.device("cpu")
ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
INCREMENTS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B  # of the key, from one round to the next
SIGN_BLOCK, LEVEL_BLOCK = 256, 16  # elements of a row that one block of 4 words makes
_MADE_AT_ONCE = 1 << 20  # made at once: temporaries are a few bytes an element
_HALF = (1 << 32) - 1


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit ``word``."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _upper(x: Tensor) -> Tensor:
    """The upper 32 bits of int64 bits, as a number."""
    return (x >> 32) & _HALF


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(upper, lower) 64 bits of the product of a 64-bit ``a`` and the bits of ``b`` (n,) int64."""
    a0, a1, b0, b1 = a & _HALF, a >> 32, b & _HALF, _upper(b)
    low = a0 * b0
    middle = a1 * b0 + _upper(low)
    rest = a0 * b1 + (middle & _HALF)
    return a1 * b1 + _upper(middle) + _upper(rest), _signed(a) * b


def words_of(address: tuple[int, ...], blocks: Tensor) -> Tensor:
    """The words of ``blocks`` (n,) int64, (n, 4) int64 on their device.

    ``address``: Philox's key (2 words), then its counter's last three. numpy counts before it generates, so the words
    of block b are those of counter b + 1.
    """
    k0, k1, *rest = address
    c0 = blocks + 1
    c1, c2, c3 = (torch.full_like(blocks, _signed(word)) for word in rest)
    for _ in range(ROUNDS):
        upper, lower = _product(MULTIPLIERS[0], c0)
        upper_2, lower_2 = _product(MULTIPLIERS[1], c2)
        c0, c1 = upper_2 ^ c1 ^ _signed(k0), lower_2
        c2, c3 = upper ^ c3 ^ _signed(k1), lower
        k0, k1 = k0 + INCREMENTS[0], k1 + INCREMENTS[1]
    return torch.stack([c0, c1, c2, c3], 1)


def count_of(rows: slice | Tensor) -> int:
    """How many rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def row_numbers(rows: slice | Tensor, device: torch.device) -> Tensor:
    """(n,) int64 numbers of ``rows`` on ``device``."""
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, device=device)
    return rows.to(device)


def noise_of(address: tuple[int, ...], table: Tensor, rows: slice | Tensor, width: int) -> Tensor:
    """Rows of a matrix of noise, (n, width) on the device of ``table``.

    ``table``: (256,) int64, the eight signs of each byte, gives int8; (65536,) fp32 gives its values. ``rows``:
    consecutive ones, or (n,) int64 numbers.
    """
    signs, device = len(table) == 256, table.device
    numbers = row_numbers(rows, device)
    made = torch.empty(
        len(numbers), width, dtype=torch.int8 if signs else torch.float32, device=device
    )
    blocks = -(-width // (SIGN_BLOCK if signs else LEVEL_BLOCK))
    column = torch.arange(blocks, device=device)
    for part in _parts(len(numbers), width):
        of_part = (numbers[part, None] * blocks + column).reshape(-1)
        raw = words_of(address, of_part).view(len(of_part) // blocks, 4 * blocks)
        codes = raw.view(torch.uint8).int() if signs else raw.view(torch.int16).int() & 0xFFFF
        drawn = table.index_select(0, codes.reshape(-1)).view(codes.shape)
        made[part] = (drawn.view(torch.int8) if signs else drawn)[:, :width]
    return made


def _parts(rows: int, width: int) -> Iterator[slice]:
    """Consecutive slices of rows that are made at once."""
    step = max(1, _MADE_AT_ONCE // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
