"""Directions: the shape of the random perturbation that each example sees (design: "one family, five choices").

A trained tensor is a matrix (rows, cols) or a vector (rows,). Example i of the group perturbs it along D_i:

    signs            D_i = r_i s_i^T                    no weight-sized noise at all (a vector: r_i)
    rademacher       D_i = U * (r_i s_i^T)              U of +-1, one for the group
    gaussian         D_i = U * (r_i s_i^T)              U of N(0,1): GRZO as published, arXiv 2606.02857
    shared           D   = U of N(0,1)                  one direction for the whole batch: MeZO, arXiv 2305.17333
    lowrank          D_i = (A V^T)/sqrt(k) * (r_i s_i^T)    LO-GRZO
    lowrank-strict   D_i = diag(r_i) A V^T / sqrt(k)        LO-GRZO with s = 1: every update lies in span V
    lowrank-shared   D   = A V^T / sqrt(k)                  LOZO, arXiv 2410.07698
    subspace         D   = sqrt(rows*cols)/k P Z Q^T        SubZero, arXiv 2410.08989
    centred          D   = m, their own moving average      ZO-AdaMU, arXiv 2312.15184
    activation       D_i = r_i v_i^T, |v_i| = 1             AGZO with a direction for each example
    activation-shared    D   = A V^T, V orthonormal         AGZO, arXiv 2601.17261

with r_i in {-1,+1}^rows and s_i in {-1,+1}^cols. But for ``centred`` all have E[D_jk D_lm] = [j=l][k=m], so (D.g)D
is an unbiased estimate of g. Everything here is pure: a direction is a function of (key, tensor, example slot).

The last two are the exception: v_i is a random combination of example i's inputs to the layer, V a basis of what the
whole batch gave it in the step before; network/perturb.py makes them in the forward (a gradient of a linear lies in the
span of its inputs). They are passed in as ``guides``. Tables read no vectors; along those their directions are
``signs`` and ``lowrank-shared``.

Of rank k: A (rows, k) is drawn every step, V (cols, k) every ``refresh`` steps. Both are signs, not normals, so that
A V^T is a sum of integers and has the same bits from every tile. P (rows, k) and Q (cols, k) are orthonormal and
drawn every ``refresh`` steps, Z of N(0,1) every step. Each row of P has one entry: rows are dealt out to the k columns
in a random order, with a random sign over the root of the column's count (a sparse embedding, in place of a QR
decomposition, whose last bits differ between libraries). Vectors have no low rank; they take U of N(0,1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgezo.zo import noise
from edgezo.zo.noise import Key

# ZO-AdaMU's constants: share of fresh noise, and the weight of its centred part in the average.
FRESH, KEPT = 0.5, 0.1
EXACT_PIECES = 8  # of a tile that are in fp64 one after the other
_GRID = 2.0**20
_MEMORY_STEPS = 8  # KEPT ** 8 is below fp32's resolution

Shape = Callable[[Tensor], Tensor]  # what a mask makes of rows of U


class Target(NamedTuple):
    """What a direction needs to know of a trained tensor."""

    name: str
    rows: int
    cols: int  # 1 for a vector
    vector: bool

    @property
    def id(self) -> int:
        return noise.tensor_id(self.name)


class Factors(NamedTuple):
    """U = scale * left @ right^T without ever being made."""

    left: Tensor  # (rows, k) fp32
    right: Tensor  # (cols, k) fp32
    scale: float


class Directions(NamedTuple):
    """One kind of direction: ``dense`` names the weight-sized factor U, ``factored`` says whether r and s exist."""

    name: str
    factored: bool
    dense: str | None  # None, "signs", "normals", "lowrank", "subspace" or "centred"
    strict: bool = False  # s = 1
    rank: int = 8
    refresh: int = 50
    guided: bool = False

    def row_signs(self, key: Key, target: Target, slots: Sequence[int]) -> Tensor:
        """r_i of the group's examples ``slots``, (len(slots), rows) int8."""
        return _of_slots(key, target.id, noise.ROW, slots, target.rows)

    def col_signs(self, key: Key, target: Target, slots: Sequence[int]) -> Tensor:
        """s_i of the group's examples ``slots``, (len(slots), cols) int8."""
        if self.strict:
            return torch.ones(len(slots), target.cols, dtype=torch.int8)
        return _of_slots(key, target.id, noise.COLUMN, slots, target.cols)

    def dense_rows(
        self, key: Key, target: Target, rows: slice, basis: Tensor | None = None
    ) -> Tensor:
        """Rows of U, (n, cols) fp32."""
        kind = "normals" if target.vector and self.of_rank else self.dense
        if self.of_rank and not target.vector:
            return self._low_rank(key, target, rows, basis)
        if kind == "centred":
            return centred(key, target, rows)[0]
        draw = noise.normals if kind == "normals" else noise.signs
        return draw(key, target.id, noise.DENSE, rows, target.cols).float()

    @property
    def of_rank(self) -> bool:
        """Whether a matrix's U is a product of thin factors."""
        return self.dense in ("lowrank", "subspace")

    def basis(self, key: Key, target: Target) -> Tensor:
        """V, (cols, k) fp32 signs: what updates of strict and shared low-rank directions are combinations of."""
        epoch = Key(key.seed, key.step // self.refresh)
        rank = slice(0, self.rank)
        return noise.signs(epoch, target.id, noise.SPAN, rank, target.cols).T.float()

    def coordinates(self, key: Key, target: Target) -> Tensor:
        """A, (rows, k) fp32 signs."""
        rank = slice(0, self.rank)
        return noise.signs(key, target.id, noise.LEFT, rank, target.rows).T.float()

    def factors(self, key: Key, target: Target, basis: Tensor | None = None) -> Factors:
        """``basis``: V^T (k, cols) of directions that are not from seeds alone."""
        if basis is not None:
            left = self.coordinates(key, target)[:, : len(basis)].to(basis.device)
            return Factors(left, basis.float().T, 1.0)
        if self.dense == "lowrank":
            left, right = self.coordinates(key, target), self.basis(key, target)
            return Factors(left, right, self.rank**-0.5)
        rank = min(self.rank, target.rows, target.cols)
        epoch = Key(key.seed, key.step // self.refresh)
        p = _dealt(epoch, target.id, noise.SPAN, target.rows, rank)
        q = _dealt(epoch, target.id, noise.BASIS, target.cols, rank)
        z = noise.normals(key, target.id, noise.LEFT, slice(0, rank), rank)
        # Rows of P and Q have one entry each, so neither product adds anything up.
        return Factors(p @ z, q, 1.0)

    def _low_rank(
        self, key: Key, target: Target, rows: slice | Tensor, basis: Tensor | None
    ) -> Tensor:
        left, right, scale = self.factors(key, target, basis)
        if isinstance(rows, Tensor):
            rows = rows.to(left.device)
        return (left[rows] @ right.T).mul_(scale)

    def vectors(self, key: Key, target: Target, slots: Sequence[int]) -> Tensor:
        """D_i of a vector target, (len(slots), rows) fp32."""
        found = torch.ones(len(slots), target.rows)
        if self.factored:
            found = self.row_signs(key, target, slots).float()
        if self.dense is not None:
            # One row of U per element: its stream is addressed as a (rows, 1) matrix.
            found = found * self.dense_rows(key, target, slice(0, target.rows)).T
        return found

    def weighted_sum(
        self,
        key: Key,
        target: Target,
        coefficients: Tensor,  # (B,) fp32 on noise.exact_grid
        rows: slice | Tensor,
        member: Tensor | None = None,  # (B or 1, n) 0/1: which examples touched which of the rows
        shape: Shape | None = None,
        guides: Tensor
        | None = None,  # (B, cols) in place of s_i; of a shared direction (k, cols): V^T
    ) -> Tensor:
        """sum_i c_i D_i on ``rows``, (n, cols) fp32.

        Sums of signs times coefficients of the exact grid have no rounding, so the result does not depend on the
        tile, the device or the order in which a matrix product adds.
        """
        n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        device = coefficients.device
        total = self._outer(key, target, coefficients, rows, member, guides)
        total = total.expand(n, target.cols)
        if self.dense is not None or shape is not None:
            u = self.dense_at(key, target, rows, guides).to(device)
            total = total * (u if shape is None else shape(u))
        return total

    def _outer(
        self,
        key: Key,
        target: Target,
        coefficients: Tensor,
        rows: slice | Tensor,
        member: Tensor | None,
        guides: Tensor | None = None,
    ) -> Tensor:
        """sum_i c_i r_i s_i^T on ``rows``, (n, cols) or (n, 1) where all columns are the same."""
        if not self.factored:
            if member is None:
                return coefficients.sum().reshape(1, 1)
            return (coefficients[:, None] * member).sum(0)[:, None]
        slots, device = range(len(coefficients)), coefficients.device
        left = self.row_signs(key, target, slots).to(device)[:, rows].float()  # (B, n)
        if member is not None:
            left = left * member
        left = left * coefficients[:, None]
        if guides is not None:
            return _exact_product(left.T, guides)
        if target.vector or self.strict:
            return left.sum(0)[:, None]
        return left.T @ self.col_signs(key, target, slots).to(device).float()

    def weighted_coordinates(
        self,
        key: Key,
        target: Target,
        coefficients: Tensor,
        rows: slice | Tensor,
        member: Tensor | None,
    ) -> Tensor:
        """The sum's coordinates in ``basis``, (n, k) fp32, for directions that are in its span."""
        total = self._outer(key, target, coefficients, rows, member)
        return total * self.coordinates(key, target).to(total.device)[rows]

    def dense_at(
        self, key: Key, target: Target, rows: slice | Tensor, basis: Tensor | None = None
    ) -> Tensor:
        """Rows of U in any order, (n, cols) fp32 on the CPU; ones where there is no U."""
        if self.dense is None:
            n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
            return torch.ones(n, target.cols)
        if isinstance(rows, slice):
            return self.dense_rows(key, target, rows, basis)
        if self.of_rank and not target.vector:
            return self._low_rank(key, target, rows, basis)
        lines = [self.dense_rows(key, target, slice(r, r + 1)) for r in rows.tolist()]
        return torch.cat(lines) if lines else torch.zeros(0, target.cols)


def _exact_product(left: Tensor, guides: Tensor) -> Tensor:
    """left (n, B) @ guides (B, cols), fp32: on the grid of ``on_grid`` fp64 sums have no rounding, in any order."""
    out = torch.empty(len(left), guides.shape[1], device=left.device)
    wide = guides.double()
    pieces = max(1, len(left) // EXACT_PIECES)
    for start in range(0, len(left), pieces):
        part = slice(start, start + pieces)
        out[part] = left[part].double() @ wide
    return out


def orthonormal(columns: Tensor) -> Tensor:
    """A basis of the span of ``columns`` (n, k), transposed: (k, n) fp32 on the grid of ``on_grid``."""
    return on_grid(torch.linalg.qr(columns.float())[0].T.contiguous())


def on_grid(v: Tensor) -> Tensor:
    """(n, cols) values of at most 1 as multiples of 2**-20, which bf16 keeps multiples; what is not finite is 0."""
    return torch.nan_to_num(v, 0.0, 0.0, 0.0).mul_(_GRID).round_().div_(_GRID)


def _of_slots(key: Key, tensor: int, stream: int, slots: Sequence[int], width: int) -> Tensor:
    last = max(slots) + 1
    table = noise.signs(key, tensor, stream, slice(0, last), width)
    return table if list(slots) == list(range(last)) else table[list(slots)]


def _dealt(key: Key, tensor: int, stream: int, size: int, rank: int) -> Tensor:
    """(size, rank) fp32 with orthogonal columns of length sqrt(size/rank), one entry in each row."""
    order = noise.permutation(key, tensor, stream, size)
    column = np.empty(size, np.int64)
    column[order] = np.arange(size) % rank
    sign = noise.signs(key, tensor, noise.CHOICE + stream, slice(0, 1), size)[0].float()
    count = np.bincount(column, minlength=rank)[column]
    length = torch.from_numpy(np.sqrt(size / (rank * count)).astype(np.float32))
    found = torch.zeros(size, rank)
    found[torch.arange(size), torch.from_numpy(column)] = sign * length
    return found


def centred(key: Key, target: Target, rows: slice) -> tuple[Tensor, Tensor]:
    """ZO-AdaMU's (m, v) of a step on ``rows``, each (n, cols) fp32, from the seeds of the last steps alone.

        z1 ~ N(0, a)    z2 ~ N(m, 1 - a)    m <- (1-b) z1 + b z2    v <- (1-b) z1^2 + b z2^2

    with variances a = FRESH and 1 - a, and b = KEPT. What is older than ``_MEMORY_STEPS`` no longer shows in m.
    """
    n = rows.stop - rows.start
    m = torch.zeros(n, target.cols)
    v = m
    for step in range(max(0, key.step + 1 - _MEMORY_STEPS), key.step + 1):
        then = Key(key.seed, step)
        z1 = noise.normals(then, target.id, noise.DENSE, rows, target.cols).mul_(FRESH**0.5)
        z2 = noise.normals(then, target.id, noise.CENTRE, rows, target.cols)
        z2 = z2.mul_((1 - FRESH) ** 0.5).add_(m)
        v = z1.square().mul_(1 - KEPT).add_(z2.square().mul_(KEPT))
        m = z1.mul_(1 - KEPT).add_(z2.mul_(KEPT))
    return m, v


DIRECTIONS = {
    d.name: d
    for d in (
        Directions("signs", factored=True, dense=None),
        Directions("rademacher", factored=True, dense="signs"),
        Directions("gaussian", factored=True, dense="normals"),
        Directions("shared", factored=False, dense="normals"),
        Directions("lowrank", factored=True, dense="lowrank"),
        Directions("lowrank-strict", factored=True, dense="lowrank", strict=True),
        Directions("lowrank-shared", factored=False, dense="lowrank"),
        Directions("subspace", factored=False, dense="subspace"),
        Directions("centred", factored=False, dense="centred"),
        Directions("activation", factored=True, dense=None, guided=True),
        Directions("activation-shared", factored=False, dense="lowrank", guided=True),
    )
}
