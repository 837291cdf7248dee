"""Call every kernel of a library that was compiled with sanitizers, on memory that ends where its numbers end.

    python sanitized_kernels.py LIBRARY      with the sanitizers' library preloaded; prints the names of what it called

test_sanitized_kernels.py compiles the library and starts this. Each array is memory of its own from malloc, which the
address sanitizer surrounds with bytes that nobody may touch. Arrays begin at a multiple of their element's size, as
tensors do, and not of a vector's. They are empty, shorter than a vector, a little longer, and longer than a thread's
turn. Their bits are random, so numbers are of every kind, NaN and infinity too.

Standard library only: torch and numpy keep freed memory, which hides faults.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from itertools import product
from typing import Any

SIZES = (0, 1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65)  # of vectors: 16 and 32 numbers
ROWS = (0, 1, 2, 3, 4, 5, 7, 9)
LONG = 3 * 4096 + 17  # of a thread's turn: 4096 numbers
THREADS = (1, 2)

_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = c_void_p, (ctypes.c_size_t,)
_libc.free.argtypes = (c_void_p,)


class Memory:
    """Arrays of random bits, until ``free``."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self._all: list[int] = []

    def array(self, count: int, size: int) -> int:
        """The address of ``count`` elements of ``size`` bytes; they begin with the first byte, or one element later."""
        return self.holding(self.random.randbytes(count * size), size)

    def holding(self, data: bytes, size: int) -> int:
        offset = size * self.random.randrange(2)
        start = _libc.malloc(offset + len(data))
        self._all.append(start)
        ctypes.memmove(start + offset, data, len(data))
        return start + offset

    def numbers(self, count: int) -> int:
        """fp32 numbers that are finite."""
        values = (c_float * count)(*(self.random.gauss(0, 1) for _ in range(count)))
        return self.holding(bytes(values), 4)

    def places(self, values: list[int]) -> int:
        return self.holding(bytes((c_int64 * len(values))(*values)), 8)

    def free(self) -> None:
        for start in self._all:
            _libc.free(start)
        self._all = []


class Attention(ctypes.Structure):
    """``Attention`` of kernels.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, c_int64) for name in ("heads", "kv_heads", "dim")),
        *(("scale", c_float), ("causal", c_int), ("window", c_int64), ("bf16", c_int)),
    )


class Thin(ctypes.Structure):
    """``Thin`` of kernels.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("y", "left", "right", "weight", "rows", "example")),
        *((name, c_int64) for name in ("n", "m", "k")),
    )


Arguments = tuple[Any, ...]
KERNELS: dict[str, Callable[[Memory], Iterator[Arguments]]] = {}


def kernel(
    cases: Callable[[Memory], Iterator[Arguments]],
) -> Callable[[Memory], Iterator[Arguments]]:
    """Let the function yield the arguments of the calls of ``edgezo_<its name>``."""
    KERNELS[cases.__name__] = cases
    return cases


def _of(bf16: int) -> int:
    return 2 if bf16 else 4


def _shapes() -> Iterator[tuple[int, int, int]]:
    """(rows, columns, threads)."""
    for (n, d), threads in product(((3, d) for d in SIZES), THREADS):
        yield n, d, threads
    for n in ROWS:
        yield n, 17, 2
    yield 2, LONG, 2


@kernel
def rms_norm(memory: Memory) -> Iterator[Arguments]:
    for (n, d, threads), (x, weight), each in product(
        _shapes(), ((0, 0), (1, 1), (1, 0)), (False, True)
    ):
        weights = memory.array(d * (n if each else 1), _of(weight))
        tensors = (memory.array(n * d, _of(x)), weights, memory.array(n * d, _of(x)))
        stride = d if each else 0
        yield *tensors, n, d, stride, c_float(1e-5), c_float(1.0), x, weight, threads


@kernel
def gate(memory: Memory) -> Iterator[Arguments]:
    for n, bf16, tanh, threads in product((*SIZES, LONG), (0, 1), (0, 1), THREADS):
        yield memory.array(n, _of(bf16)), memory.array(n, _of(bf16)), n, tanh, bf16, threads


@kernel
def attention(memory: Memory) -> Iterator[Arguments]:
    lengths: tuple[list[int], ...] = ([], [0], [1], [5, 0, 33], [31, 32, 65])
    for rows, dim, (heads, kv), causal, window, bf16, threads in product(
        lengths, (2, 16, 33, 64), ((1, 1), (4, 2)), (0, 1), (0, 7), (0, 1), THREADS
    ):
        n = sum(rows)
        starts = memory.places([sum(rows[:i]) for i in range(len(rows) + 1)])
        padded, wide = (-(-size // 32) * 32 for size in (max(rows, default=0), dim))
        stride = (dim + wide) * padded + 4 * (padded + dim)
        tensors = [memory.array(n * count * dim, _of(bf16)) for count in (heads, kv, kv, heads)]
        strides = [count * dim for count in (heads, kv, kv, heads)]
        a = Attention(*tensors, *strides, heads, kv, dim, 0.125, causal, window, bf16)
        yield ctypes.byref(a), starts, len(rows), memory.array(threads * stride, 4), stride, threads


@kernel
def rotate(memory: Memory) -> Iterator[Arguments]:
    for n, heads, dim, bf16, threads in product((0, 1, 7), (1, 3), (0, 2, 16, 34), (0, 1), THREADS):
        tensors = [memory.array(n * count * dim, _of(bf16)) for count in (heads, 1, 1)]
        yield *tensors, n, heads * dim, heads, dim, bf16, threads


@kernel
def thin_product(memory: Memory) -> Iterator[Arguments]:
    for (n, d, threads), r, bf16 in product(_shapes(), (1, 3, 8), (0, 1)):
        x, basis, out = (
            memory.array(n * d, _of(bf16)),
            memory.numbers(r * d),
            memory.array(n * r, 4),
        )
        yield x, basis, out, n, d, r, bf16, threads


@kernel
def thin_sum(memory: Memory) -> Iterator[Arguments]:
    for (n, m, threads), r, bf16 in product(_shapes(), (8, 16), (0, 1)):
        x, left, out = memory.array(n * m, _of(bf16)), memory.numbers(n * r), memory.numbers(r * m)
        yield x, left, out, n, m, r, bf16, threads


@kernel
def dots_by_example(memory: Memory) -> Iterator[Arguments]:
    for (n, d, threads), bf16 in product(_shapes(), (0, 1)):
        example = memory.places([memory.random.randrange(3) for _ in range(n)])
        x, cols = memory.array(n * d, _of(bf16)), memory.array(3 * d, _of(bf16))
        yield x, cols, example, memory.array(n, 4), n, d, bf16, threads


@kernel
def add_thin(memory: Memory) -> Iterator[Arguments]:
    for (n, m, threads), k, bf16, weighted in product(_shapes(), (0, 1, 5), (0, 1), (False, True)):
        y, left, right = (
            memory.array(n * m, _of(bf16)),
            memory.numbers(n * k),
            memory.numbers(k * m),
        )
        more: list[int | None] = [None] * 3
        if weighted:
            example = memory.places([memory.random.randrange(3) for _ in range(n)])
            more = [memory.numbers(n), memory.array(3 * m, _of(bf16)), example]
        yield ctypes.byref(Thin(y, left, right, *more, n, m, k)), bf16, threads


@kernel
def expand_int8(memory: Memory) -> Iterator[Arguments]:
    for (n, cols, threads), bf16 in product(_shapes(), (0, 1)):
        codes, scale, out = (
            memory.array(n * cols, 1),
            memory.array(n, 4),
            memory.array(n * cols, _of(bf16)),
        )
        yield codes, scale, out, n, cols, bf16, threads


@kernel
def expand_int4(memory: Memory) -> Iterator[Arguments]:
    for (n, size, threads), groups, nibble, bf16 in product(_shapes(), (1, 3), (0, 4), (0, 1)):
        count = n * groups * size
        packed, out = memory.array(count, 1), memory.array(count, _of(bf16))
        scale, shift = memory.array(n * groups, 4), memory.array(n * groups, 4)
        yield packed, nibble, scale, shift, out, n, groups, size, bf16, threads


@kernel
def read_plane(memory: Memory) -> Iterator[Arguments]:
    for n, threads in product((*SIZES, LONG), THREADS):
        yield memory.array(n, 2), memory.array(n, 1), memory.array(n, 4), n, threads


@kernel
def write_plane(memory: Memory) -> Iterator[Arguments]:
    for n, threads in product((*SIZES, LONG), THREADS):
        yield memory.array(n, 4), memory.array(n, 2), memory.array(n, 1), n, threads


@kernel
def snap_plane(memory: Memory) -> Iterator[Arguments]:
    for n, threads in product((*SIZES, LONG), THREADS):
        yield memory.array(n, 4), n, threads


def _noise(memory: Memory, entries: int, size: int, made: int) -> Iterator[Arguments]:
    widths = (*SIZES, 255, 256, 257, 1000)
    for width, rows, first, threads in product(widths, (0, 1, 3), (0, 2**40), THREADS):
        words = [memory.array(count, 8) for count in (2, 3)]
        table, out = memory.array(entries, size), memory.array(rows * width, made)
        yield *words, table, out, first, rows, width, threads


@kernel
def signs(memory: Memory) -> Iterator[Arguments]:
    return _noise(memory, 256, 8, 1)


@kernel
def levels(memory: Memory) -> Iterator[Arguments]:
    return _noise(memory, 65536, 4, 4)


@kernel
def crc32(memory: Memory) -> Iterator[Arguments]:
    sizes = (*range(0, 130), 255, 256, 257, LONG)
    for n, rows, start, threads in product(sizes, (0, 1, 3), (0, 0xDEADBEEF), THREADS):
        yield memory.array(n * rows, 1), rows, n, c_uint32(start), memory.array(rows, 4), threads


@kernel
def crc32_is_fast(memory: Memory) -> Iterator[Arguments]:
    yield ()


@kernel
def source(memory: Memory) -> Iterator[Arguments]:
    yield ()


def _as_c(value: Any) -> Any:
    """Whole numbers as 64 bits: those of 32 are then right too, and addresses are whole."""
    return c_int64(value) if isinstance(value, int) else value


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    fast = library.edgezo_crc32_is_fast()
    for name, cases in KERNELS.items():
        memory, calls = Memory(len(name)), 0
        for arguments in cases(memory) if fast or name != "crc32" else ():
            getattr(library, f"edgezo_{name}")(*map(_as_c, arguments))
            memory.free()
            calls += 1
        print(name, calls, flush=True)


if __name__ == "__main__":
    main()
