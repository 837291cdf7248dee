"""Orthogonalising an update in the coordinates of a low-rank basis: ZO-Muon (arXiv 2602.17155).

A step's estimate is N V^T, N (rows, k) the coordinates of its directions. Muon's update has the singular vectors of N
and singular values of 1: msign(N) = N (N^T N)^(-1/2). N is never whole: its Gram matrix G = N^T N is summed tile by
tile, the inverse root is found by Newton and Schulz's iteration on k x k matrices, and each tile is multiplied by it.

    X <- X (3 I - X^T X)/2 from X = N/|N|_F, that is M <- M (3 I - M^T G M)/2 from M = I/|N|_F, N M -> msign(N)

The entries of N are rounded to 16 bits of the largest that they could be, so that sums of their products are exact, and
products of k x k matrices are added up in one order: no tile and no thread count changes a bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

COORDINATE_LEVELS = 2.0**15
ITERATIONS = 24  # singular values above 1e-3 of the norm become 1 to fp32's precision; smaller ones grow towards it


def whole_coordinates(n: Tensor, most: float) -> Tensor:
    """Coordinates (n, k) in units of ``most``/2**15, rounded, fp64; ``most`` bounds their size and is above 0."""
    return n.double().mul_(COORDINATE_LEVELS / most).round_()


def inverse_root(gram: Tensor, most: float) -> Tensor:
    """M (k, k) fp32 with N M = msign(N), from the Gram matrix (k, k) fp64 of ``whole_coordinates``; zeros for N = 0."""
    k = len(gram)
    norm = float(gram.trace()) ** 0.5
    if norm == 0.0:
        return torch.zeros(k, k)
    gram = gram / norm**2
    m = torch.eye(k, dtype=torch.float64)
    for _ in range(ITERATIONS):
        square = _product(m.T, _product(gram, m))
        m = _product(m, 1.5 * torch.eye(k, dtype=torch.float64) - 0.5 * square)
    return (m * (COORDINATE_LEVELS / most / norm)).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of small matrices, one sum at a time."""
    total = torch.zeros(len(a), b.shape[1], dtype=a.dtype)
    for j in range(a.shape[1]):
        total += a[:, j : j + 1] * b[j : j + 1]
    return total
