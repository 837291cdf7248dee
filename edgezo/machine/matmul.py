"""Matrix products whose numbers of rows repeat.

For every shape of a bf16 product (strides included) oneDNN compiles kernels and keeps them: 0.63 MB each with AVX-512
BF16, 0.28 MB of it even with its cache off. Packed batches have as many numbers of tokens as there are batches, so that
a run of 25 steps grew by 340 MB (benchmarks/LOG.md, 2026-11-23). Here rows are passed in pieces of a few sizes. Other
products (fp32 on a CPU, all on a GPU) compile nothing and pass whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from edgezo.machine import kernels
from edgezo.machine.limits import PRODUCT_ROWS as SIZES
from edgezo.machine.limits import THIN

CALL_ROWS = 32  # about what one more product costs, in rows (a weight is laid out anew for each)


def mm(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x (n, k) @ w (k, m), as torch.mm; what is returned may be a view."""
    if not compiled(x):
        return torch.mm(x, w, out=out) if out is not None else torch.mm(x, w)
    n, m = len(x), w.shape[1]
    x, w = _by_rows(_even(x, 1)), _even(_even(w, 0), 1)
    found = out if out is not None and w.shape[1] == m else x.new_empty(n, w.shape[1])
    for at, size in pieces(n):
        if n >= size:
            # Where a piece is longer than what is left it ends with it: some rows are multiplied twice.
            rows = slice(min(at, n - size), min(at + size, n))
            torch.mm(x[rows], w, out=found[rows])
        else:
            found.copy_(torch.mm(_filled(x, 0, size), w)[:n])
    if out is not None and found is not out:
        out.copy_(found[:, :m])
        return out
    return found[:, :m]


def addmm_(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y (n, m) += left (n, k) @ right (k, m), rounded once."""
    if not compiled(y):
        return y.addmm_(left, right)
    left, right = _by_rows(_even(left, 1)), _even(right, 0)
    for at, size in pieces(len(y)):
        rows = slice(at, at + size)
        if len(y) >= at + size:
            y[rows].addmm_(left[rows], right)
        else:
            whole = _filled(y[rows], 0, size).addmm_(_filled(left[rows], 0, size), right)
            y[rows] = whole[: len(y) - at]
    return y


def along(left: Tensor, x: Tensor) -> Tensor:
    """left (m, n) @ x (n, k) in fp32, n tokens."""
    if not compiled(x):
        return torch.mm(left, x).float()
    m = len(left)
    left = _even(left, 0)
    found = torch.zeros(len(left), x.shape[1])
    for at, size in pieces(len(x)):
        part = left[:, at : at + size]
        part = part.contiguous() if part.stride(1) == 1 else part  # else rows that are n apart
        found += torch.mm(_filled(part, 1, size), _filled(x[at : at + size], 0, size))
    return found[:m]


class Own(NamedTuple):
    """A left factor (n, b) with one value in each row, in the column of its example."""

    values: Tensor  # (n,) fp32
    example: Tensor  # (n,) int64


Term = tuple[Tensor | Own, Tensor]  # left (n, k), right (k, m)


def few(x: Tensor, basis: Tensor) -> Tensor:
    """x (n, d) @ basis (r, d)^T, r small: fp32 where there is a kernel for it, else in the dtype of x."""
    found = kernels.few(x, basis) if len(basis) <= THIN else None
    return mm(x, basis.T) if found is None else found


def own(x: Tensor, cols: Tensor, example: Tensor, mask: Tensor, side: Tensor) -> Tensor | Own:
    """(x @ cols^T) * mask, (n, b): in each row what its ``example`` (n,) has of ``side`` (n,)."""
    values = kernels.own(x, cols.to(x.dtype), example)
    if values is None:
        return mm(x.to(cols.dtype), cols.T).mul_(mask)
    return Own(values.mul_(side), example)


def add_thin(y: Tensor, terms: Sequence[Term]) -> None:
    """y (n, m) += the sum of left @ right over the terms; rounded once, and once more for each ``Own`` but one."""
    owned = [(left, right) for left, right in terms if isinstance(left, Own)]
    dense = [(left, right) for left, right in terms if isinstance(left, Tensor)]
    lefts, rights = [left for left, _ in dense], [right for _, right in dense]
    if dense and not (sum(len(right) for right in rights) <= THIN and kernels.takes(y)):
        addmm_(y, _joined(lefts, 1).to(y.dtype), _joined(rights, 0).to(y.dtype))
        lefts, rights = [], []
    if not lefts and not owned:
        return
    n, m = y.shape
    if lefts:
        left, right = (_joined(p, a).float().contiguous() for p, a in ((lefts, 1), (rights, 0)))
    else:
        left, right = (y.new_empty(size, dtype=torch.float32) for size in ((n, 0), (0, m)))
    more = [(o.values, rows, o.example) for o, rows in owned]
    done = kernels.add_thin(y, left, right, *(more[0] if more else ()))
    for own_term in more[1:]:
        done = done and kernels.add_thin(y, left[:, :0].contiguous(), right[:0], *own_term)
    assert done


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([p.float() for p in parts], axis)


def compiled(x: Tensor) -> bool:
    """Whether products of such a tensor have kernels of their own for each shape."""
    return x.dtype is torch.bfloat16 and not x.is_cuda


def pieces(n: int) -> Iterator[tuple[int, int]]:
    """(first row, rows of the product) for n rows; the last may end after them."""
    at = 0
    while n - at > SIZES[-1]:
        yield at, SIZES[-1]
        at += SIZES[-1]
    for size in _split(n - at)[1]:
        yield at, size
        at += size


@cache
def _split(n: int) -> tuple[int, tuple[int, ...]]:
    """(cost in rows, sizes) of the cheapest pieces for up to SIZES[-1] rows."""
    if not n:
        return 0, ()
    above = next(size for size in SIZES if size >= n)
    found: list[tuple[int, tuple[int, ...]]] = [(above + CALL_ROWS, (above,))]
    for size in SIZES:
        if size < n:
            cost, rest = _split(n - size)
            # The largest first: what is missing is then always of the last, for no whole piece is missing.
            sizes = tuple(sorted((size, *rest), reverse=True))
            found.append((size + CALL_ROWS + cost, sizes))
    return min(found)


def _even(x: Tensor, axis: int) -> Tensor:
    """``x`` with zeros up to a multiple of 16 along a short axis: examples of a micro-batch, a rank."""
    n = x.shape[axis]
    return _filled(x, axis, -(-n // SIZES[0]) * SIZES[0]) if n <= THIN else x


def _by_rows(x: Tensor) -> Tensor:
    """``x`` (n, k), row by row: strides belong to what a kernel is compiled for, and columns would be n apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _filled(x: Tensor, axis: int, n: int) -> Tensor:
    """``x`` with zeros up to n along ``axis``."""
    missing = n - x.shape[axis]
    if not missing:
        return x
    shape = list(x.shape)
    shape[axis] = missing
    return torch.cat([x, x.new_zeros(shape)], axis)
