"""Matrix products in a few shapes, so that memory does not grow with every batch.

For every shape of a bf16 product (strides included) oneDNN compiles kernels and keeps them: 0.63 MB each with AVX-512
BF16, 0.28 MB of it even with its cache off. Every packed batch has another number of tokens, so a run of 25 steps grew
by 340 MB (benchmarks/log/2026-11-23-why-did-memory-grow-with-bf16-products.md). Here rows are multiplied in pieces of a
few sizes (``PRODUCT_ROWS``). Other products (fp32 on a CPU, all on a GPU) compile nothing and are made in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from edgezo.machine import gpu_kernels, kernels
from edgezo.machine.gpu_kernels import SignRows
from edgezo.machine.limits import PANEL, PRODUCT_ROWS, THIN

# One more product costs about as much as this many rows, since it lays out the weight anew.
CALL_ROWS = 32


def mm(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x (n, k) @ w (k, m), into ``out`` (n, m) where it is given, as torch.mm. The result may be a view."""
    if not compiled(x):
        return torch.mm(x, w, out=out) if out is not None else torch.mm(x, w)
    n, m = len(x), w.shape[1]
    x, w = _by_rows(_even(x, 1)), _even(_even(w, 0), 1)
    product = out if out is not None and w.shape[1] == m else x.new_empty(n, w.shape[1])
    for start, size in pieces(n):
        if n >= size:
            # The last piece ends with the last row, even if it begins before its start: some rows are multiplied twice.
            rows = slice(min(start, n - size), min(start + size, n))
            torch.mm(x[rows], w, out=product[rows])
        else:
            product.copy_(torch.mm(_filled(x, 0, size), w)[:n])
    if out is not None and product is not out:
        out.copy_(product[:, :m])
        return out
    return product[:, :m]


def keep_panel(columns: int) -> None:
    """Let the matrix library make the largest buffer that fp32 products of up to ``columns`` columns need.

    MKL packs a block of the weights for each product and keeps the buffer. One that is too small for the next product
    is kept as well, so that rows in growing numbers took up to five buffers: 50 MB in place of 10 for 8,960 columns.
    """
    rows, most, terms = PANEL
    torch.mm(torch.zeros(rows, terms), torch.zeros(min(columns, most), terms).T)


def addmm_(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y (n, m) += left (n, k) @ right (k, m), rounded once."""
    if not compiled(y):
        return y.addmm_(left, right)
    left, right = _by_rows(_even(left, 1)), _even(right, 0)
    for start, size in pieces(len(y)):
        rows = slice(start, start + size)
        if len(y) >= start + size:
            y[rows].addmm_(left[rows], right)
        else:
            whole = _filled(y[rows], 0, size).addmm_(_filled(left[rows], 0, size), right)
            y[rows] = whole[: len(y) - start]
    return y


def along(left: Tensor, x: Tensor) -> Tensor:
    """left (m, n) @ x (n, k), a sum over n tokens, (m, k) fp32."""
    if not compiled(x):
        return torch.mm(left, x).float()
    m = len(left)
    left = _even(left, 0)
    total = torch.zeros(len(left), x.shape[1])
    for start, size in pieces(len(x)):
        part = left[:, start : start + size]
        part = part.contiguous() if part.stride(1) == 1 else part  # a row's stride would be n
        total += torch.mm(_filled(part, 1, size), _filled(x[start : start + size], 0, size))
    return total[:m]


class ByExample(NamedTuple):
    """A left factor (n, b) with one value in each row: row t has ``values[t]`` in column ``example[t]``."""

    values: Tensor  # (n,) fp32
    example: Tensor  # (n,) int64


class Signed(NamedTuple):
    """A left factor (n, b) as in ``ByExample``, with the right factor (b, m) of signs that a GPU makes as it adds."""

    values: Tensor  # (n,) fp32
    example: Tensor  # (n,) int64
    drawn: SignRows


Term = tuple[Tensor | ByExample, Tensor]  # left (n, k), right (k, m)


def thin_product(x: Tensor, basis: Tensor) -> Tensor:
    """x (n, d) @ basis (r, d)^T, r small: fp32 where there is a kernel for it, else in the dtype of x."""
    product = kernels.thin_product(x, basis) if len(basis) <= THIN else None
    return mm(x, basis.T) if product is None else product


def thin_sum(left: Tensor, x: Tensor) -> Tensor:
    """left (n, r)^T @ x (n, m), a sum over n tokens, as fp32 (r, m); left fp32, r small."""
    total = kernels.thin_sum(left, x) if left.shape[1] <= THIN else None
    return left.T @ x.float() if total is None else total


def dots_by_example(
    x: Tensor, cols: Tensor, example: Tensor, mask: Tensor, side: Tensor
) -> Tensor | ByExample:
    """(x @ cols^T) * mask as a left factor (n, b): row t is 0 but for side[t] * x_t . cols[example[t]].

    x (n, d), cols (b, d), example (n,) int64, side (n,). ``mask`` (n, b) has side[t] in column example[t].
    """
    values = kernels.dots_by_example(x, cols.to(x.dtype), example)
    if values is None:
        return mm(x.to(cols.dtype), cols.T).mul_(mask)
    return ByExample(values.mul_(side), example)


def fill_thin(y: Tensor, terms: Sequence[Term | Signed]) -> None:
    """y (n, m) = the sum of the terms, on a device that has kernels for them (gpu_kernels.usable)."""
    _by_gpu(y, terms, read=False)


def _by_gpu(y: Tensor, terms: Sequence[Term | Signed], *, read: bool) -> None:
    """y (n, m) [+]= the sum of the terms, by the kernels of a GPU: rounded once for each ``Signed``, once at least."""
    signed = [term for term in terms if isinstance(term, Signed)]
    dense = [term for term in terms if not isinstance(term, Signed)]
    left, right = y.new_empty(len(y), 0), y.new_empty(0, y.shape[1])
    if dense:
        left, right = (_joined([_tensor(p[side]) for p in dense], 1 - side) for side in (0, 1))
    if len(right) > THIN:
        mm(left.to(y.dtype), right.to(y.dtype), y) if not read else addmm_(
            y, left.to(y.dtype), right.to(y.dtype)
        )
        left, right, read = left[:, :0], right[:0], True
        if not signed:
            return
    left, right = left.float().contiguous(), right.float().contiguous()
    gpu_kernels.add_signed(y, left, right, *(signed[0] if signed else ()), read=read)
    for term in signed[1:]:
        gpu_kernels.add_signed(y, left[:, :0].contiguous(), right[:0], *term)


def _tensor(factor: Tensor | ByExample) -> Tensor:
    assert isinstance(factor, Tensor)  # a GPU makes no ByExample
    return factor


def add_thin(y: Tensor, terms: Sequence[Term | Signed]) -> None:
    """y (n, m) += the sum of left @ right over the terms, rounded once; once more for each ``ByExample`` but one."""
    if terms and gpu_kernels.takes(y):
        _by_gpu(y, terms, read=True)
    else:
        _by_cpu(y, [term for term in terms if not isinstance(term, Signed)])


def _by_cpu(y: Tensor, terms: Sequence[Term]) -> None:
    """``add_thin`` by kernels.c or by torch."""
    by_example = [(left, right) for left, right in terms if isinstance(left, ByExample)]
    dense = [(left, right) for left, right in terms if isinstance(left, Tensor)]
    lefts, rights = [left for left, _ in dense], [right for _, right in dense]
    if dense and not (sum(len(right) for right in rights) <= THIN and kernels.takes(y)):
        addmm_(y, _joined(lefts, 1).to(y.dtype), _joined(rights, 0).to(y.dtype))
        lefts, rights = [], []
    if not lefts and not by_example:
        return
    n, m = y.shape
    if lefts:
        left, right = (_joined(p, a).float().contiguous() for p, a in ((lefts, 1), (rights, 0)))
    else:
        left, right = (y.new_empty(size, dtype=torch.float32) for size in ((n, 0), (0, m)))
    more = [(one.values, rows, one.example) for one, rows in by_example]
    done = kernels.add_thin(y, left, right, *(more[0] if more else ()))
    for term in more[1:]:
        done = done and kernels.add_thin(y, left[:, :0].contiguous(), right[:0], *term)
    assert done


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([p.float() for p in parts], axis)


def compiled(x: Tensor) -> bool:
    """Whether a kernel is compiled for each shape of a product of such a tensor."""
    return x.dtype is torch.bfloat16 and x.device.type == "cpu"


def pieces(n: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each piece that n rows are multiplied in; the last may end after row n."""
    start, largest = 0, PRODUCT_ROWS[-1]
    while n - start > largest:
        yield start, largest
        start += largest
    for size in _split(n - start)[1]:
        yield start, size
        start += size


@cache
def _split(n: int) -> tuple[int, tuple[int, ...]]:
    """(cost in rows, sizes) of the cheapest pieces for n rows, at most PRODUCT_ROWS[-1] of them."""
    if not n:
        return 0, ()
    above = next(size for size in PRODUCT_ROWS if size >= n)
    splits: list[tuple[int, tuple[int, ...]]] = [(above + CALL_ROWS, (above,))]
    for size in PRODUCT_ROWS:
        if size < n:
            cost, rest = _split(n - size)
            # The largest first: then only the last piece can be longer than the rows that remain.
            sizes = tuple(sorted((size, *rest), reverse=True))
            splits.append((size + CALL_ROWS + cost, sizes))
    return min(splits)


def _even(x: Tensor, axis: int) -> Tensor:
    """``x`` filled with zeros to a multiple of 16 along a thin axis (examples of a micro-batch, a rank)."""
    n, unit = x.shape[axis], PRODUCT_ROWS[0]
    return _filled(x, axis, -(-n // unit) * unit) if n <= THIN else x


def _by_rows(x: Tensor) -> Tensor:
    """``x`` (n, k) laid out row by row. A kernel is compiled for its strides, and that of a column would be n."""
    return x if x.stride(1) == 1 else x.contiguous()


def _filled(x: Tensor, axis: int, n: int) -> Tensor:
    """``x`` filled with zeros to length n along ``axis``."""
    missing = n - x.shape[axis]
    if not missing:
        return x
    shape = list(x.shape)
    shape[axis] = missing
    return torch.cat([x, x.new_zeros(shape)], axis)
