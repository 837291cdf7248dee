"""Directions: the shape of the random perturbation that each example sees (design: "one family, five choices").

A trained tensor is a matrix (rows, cols) or a vector (rows,). Example i of the group perturbs it along D_i:

    signs        D_i = r_i s_i^T              no weight-sized noise at all (a vector: r_i)
    rademacher   D_i = U * (r_i s_i^T)        U of +-1, one for the group
    gaussian     D_i = U * (r_i s_i^T)        U of N(0,1): GRZO as published, arXiv 2606.02857
    shared       D_i = U of N(0,1)            one direction for the whole batch: MeZO, arXiv 2305.17333

with r_i in {-1,+1}^rows and s_i in {-1,+1}^cols. All have E[D_jk D_lm] = [j=l][k=m], so (D.g)D is an unbiased
estimate of g. Everything here is pure: a direction is a function of (key, tensor, example slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edgezo import noise
from edgezo.noise import Key


class Target(NamedTuple):
    """What a direction needs to know of a trained tensor."""

    name: str
    rows: int
    cols: int  # 1 for a vector
    vector: bool

    @property
    def id(self) -> int:
        return noise.tensor_id(self.name)


class Directions(NamedTuple):
    """One kind of direction. ``dense`` names the weight-sized factor U, ``factored`` says whether r and s exist."""

    name: str
    factored: bool
    dense: str | None  # None, "signs" or "normals"

    def row_signs(self, key: Key, target: Target, slots: Sequence[int]) -> Tensor:
        """r_i of the group's examples ``slots``, (len(slots), rows) int8."""
        return _of_slots(key, target.id, noise.ROW, slots, target.rows)

    def col_signs(self, key: Key, target: Target, slots: Sequence[int]) -> Tensor:
        """s_i of the group's examples ``slots``, (len(slots), cols) int8."""
        return _of_slots(key, target.id, noise.COLUMN, slots, target.cols)

    def dense_rows(self, key: Key, target: Target, rows: slice) -> Tensor:
        """Rows of U, (n, cols) fp32."""
        if self.dense == "normals":
            return noise.normals(key, target.id, noise.DENSE, rows, target.cols)
        return noise.signs(key, target.id, noise.DENSE, rows, target.cols).float()

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
        member: Tensor | None = None,  # (B, n) 0/1: which examples touched which of the rows
    ) -> Tensor:
        """sum_i c_i D_i on ``rows``, (n, cols) fp32.

        Sums of signs times coefficients of the exact grid have no rounding, so the result does not depend on the
        tile, the device or the order in which a matrix product adds.
        """
        n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        device = coefficients.device
        if self.factored:
            slots = range(len(coefficients))
            left = self.row_signs(key, target, slots).to(device)[:, rows].float()  # (B, n)
            if member is not None:
                left = left * member
            left = left * coefficients[:, None]
            if target.vector:
                total = left.sum(0)[:, None]
            else:
                total = left.T @ self.col_signs(key, target, slots).to(device).float()
        else:
            if member is not None:
                total = (coefficients[:, None] * member).sum(0)[:, None]
            else:
                total = coefficients.sum().expand(n, 1)
            total = total.expand(n, target.cols)
        if self.dense is not None:
            total = total * self.dense_at(key, target, rows).to(device)
        return total

    def dense_at(self, key: Key, target: Target, rows: slice | Tensor) -> Tensor:
        """Rows of U, (n, cols) fp32 on the CPU."""
        if isinstance(rows, slice):
            return self.dense_rows(key, target, rows)
        return torch.cat([self.dense_rows(key, target, slice(r, r + 1)) for r in rows.tolist()])


def _of_slots(key: Key, tensor: int, stream: int, slots: Sequence[int], width: int) -> Tensor:
    last = max(slots) + 1
    table = noise.signs(key, tensor, stream, slice(0, last), width)
    return table if list(slots) == list(range(last)) else table[list(slots)]


DIRECTIONS = {
    d.name: d
    for d in (
        Directions("signs", factored=True, dense=None),
        Directions("rademacher", factored=True, dense="signs"),
        Directions("gaussian", factored=True, dense="normals"),
        Directions("shared", factored=False, dense="normals"),
    )
}
