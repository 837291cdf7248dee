"""Directions: along what each example perturbs the weights. The first of the five choices of a method.

A trained tensor is a matrix (rows, cols) or a vector (rows,). Example i of the group perturbs it along D_i:

    signs            D_i = r_i s_i^T                    no weight-sized noise at all (a vector: r_i)
    rank-signs       D_i = sum_k r_ik s_ik^T/sqrt(rank)     EGGROLL, arXiv 2511.16652; of rank 1: signs
    rademacher       D_i = U * (r_i s_i^T)              U of +-1, one for the group
    gaussian         D_i = U * (r_i s_i^T)              U of N(0,1): GRZO as published, arXiv 2606.02857
    shared           D   = U of N(0,1)                  one direction for the whole batch: MeZO, arXiv 2305.17333
    lowrank          D_i = (A V^T)/sqrt(k) * (r_i s_i^T)    LO-GRZO
    lowrank-strict   D_i = diag(r_i) A V^T / sqrt(k)        LO-GRZO with s = 1: every update lies in span V
    lowrank-shared   D   = A V^T / sqrt(k)                  LOZO, arXiv 2410.07698
    subspace         D   = sqrt(rows*cols)/k P Z Q^T        SubZero, arXiv 2410.08989
    aligned, cone    D   = sum_k w_k z_k of past steps' z   DAP, arXiv 2510.19975; ConMeZO, arXiv 2511.02757 (echoes.py)
    aligned-signs    D_i = r_i s_i^T + b_i g            the same for GRZO, g of the last step's directions
    centred          D   = m, their own moving average      ZO-AdaMU, arXiv 2312.15184
    activation       D_i = r_i v_i^T, |v_i| = 1             AGZO with a direction for each example
    activation-shared    D   = A V^T, V orthonormal         AGZO, arXiv 2601.17261

with r_i in {-1,+1}^rows and s_i in {-1,+1}^cols. All but ``centred`` have E[D_jk D_lm] = [j=l][k=m], so (D.g)D is an
unbiased estimate of g. Everything here is pure: a direction is a function of (key, tensor, example slot).

The two ``activation`` kinds are the exception, since a linear's gradient lies in the span of its inputs: v_i is a
random combination of example i's inputs to the layer, V a basis of the whole batch's inputs in the step before.
network/perturb.py makes them in the forward; here they are passed in as ``guides``. An embedding table multiplies no
vectors, so its directions are then ``signs`` and ``lowrank-shared``.

In the low-rank kinds A (rows, k) is drawn every step, V (cols, k) every ``refresh`` steps. Both are signs, not normals,
so that A V^T is a sum of integers and has the same bits from every tile. In ``subspace`` P (rows, k) and Q (cols, k)
have orthonormal columns and are drawn every ``refresh`` steps, Z of N(0,1) every step. Each row of P has one entry:
rows are dealt out to the k columns in a random order, with a random sign over the root of the column's count (a sparse
embedding, in place of a QR decomposition, whose last bits differ between libraries). Vectors have no low rank: their
U is of N(0,1). In ``rank-signs`` a vector's direction is r_i1 alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgezo.machine.philox import CPU, count_of
from edgezo.machine.transfers import uploaded
from edgezo.zo import noise
from edgezo.zo.noise import Key

# ZO-AdaMU's constants a and b: the variance of fresh noise, and the weight of the centred part in the average.
FRESH, KEPT = 0.5, 0.1
EXACT_PIECES = 8  # a tile is multiplied in fp64 in so many pieces, one after the other
_GRID = 2.0**20
_MEMORY_STEPS = 8  # KEPT ** 8 is below fp32's resolution

MaskU = Callable[[Tensor], Tensor]  # rows of U -> the same rows as a mask shapes them


class Target(NamedTuple):
    """What a direction is drawn from: name and shape of a trained tensor."""

    name: str  # its hash addresses the noise
    rows: int
    cols: int  # 1 for a vector
    vector: bool

    @property
    def id(self) -> int:
        """The tensor's number in the noise (noise.tensor_id)."""
        return noise.tensor_id(self.name)


class ThinFactors(NamedTuple):
    """A low-rank U = scale * left @ right^T that is not multiplied out."""

    left: Tensor  # (rows, k) fp32
    right: Tensor  # (cols, k) fp32
    scale: float


class Directions(NamedTuple):
    """One kind of direction: ``dense`` names the weight-sized factor U, ``factored`` says whether r and s exist."""

    name: str
    factored: bool
    dense: str | None  # None, "signs", "normals", "lowrank", "subspace" or "centred"
    strict: bool = False  # s_i is all ones
    rank: int = 8  # k of the low-rank kinds
    refresh: int = 50  # V, P and Q are drawn anew every so many steps
    guided: bool = False  # made from the layer's inputs, so that no seed gives them again
    # What a step's directions take up of past ones (echoes.py): w_k of this step's noise and that of the steps before
    # it; of factored directions b_i, then the coefficients of g. (): nothing.
    echo: tuple[float, ...] = ()
    summed: bool = False  # a sum of ``rank`` products r_ik s_ik^T

    @property
    def terms(self) -> int:
        """How many products r_ik s_ik^T a direction of a matrix is the sum of; it is divided by the root of that."""
        return self.rank if self.summed else 1

    def row_signs(
        self,
        key: Key,
        target: Target,
        slots: Sequence[int],
        device: torch.device = CPU,
        term: int = 0,
    ) -> Tensor:
        """r_ik of the examples in ``slots``, k = ``term``, (len(slots), rows) int8."""
        places = self._places(slots, term)
        return _of_slots(key, target.id, noise.ROW, places, target.rows, device)

    def col_signs(
        self,
        key: Key,
        target: Target,
        slots: Sequence[int],
        device: torch.device = CPU,
        term: int = 0,
    ) -> Tensor:
        """s_ik of the examples in ``slots``, k = ``term``, (len(slots), cols) int8."""
        if self.strict:
            return torch.ones(len(slots), target.cols, dtype=torch.int8, device=device)
        places = self._places(slots, term)
        return _of_slots(key, target.id, noise.COLUMN, places, target.cols, device)

    def _places(self, slots: Sequence[int], term: int) -> Sequence[int]:
        """Rows of the table of sign vectors: an example has ``terms`` of them, one after the other."""
        return slots if self.terms == 1 else [slot * self.terms + term for slot in slots]

    def dense_rows(
        self,
        key: Key,
        target: Target,
        rows: slice | Tensor,
        basis: Tensor | None = None,
        device: torch.device = CPU,
    ) -> Tensor:
        """Rows of U in any order, (n, cols) fp32; ones where there is no U. ``basis``: as in ``factors``."""
        if self.dense is None:
            return torch.ones(count_of(rows), target.cols, device=device)
        kind = "normals" if target.vector and self.of_rank else self.dense
        if self.of_rank and not target.vector:
            return self._low_rank(key, target, rows, basis, device)
        if kind == "centred":
            return centred(key, target, rows, device)[0]
        if self.echo and not self.factored:
            return self._echoed(key, target, rows, device)
        draw = noise.normals if kind == "normals" else noise.signs
        return draw(key, target.id, noise.DENSE, rows, target.cols, device).float()

    def _echoed(
        self, key: Key, target: Target, rows: slice | Tensor, device: torch.device
    ) -> Tensor:
        """sum_k w_k z_k on ``rows``, (n, cols) fp32: noise of this step, and of those before it."""
        total = torch.zeros(count_of(rows), target.cols, device=device)
        for back, weight in enumerate(self.echo):
            if weight:
                then = Key(key.seed, key.step - back)
                drawn = noise.normals(then, target.id, noise.DENSE, rows, target.cols, device)
                total += drawn.mul_(weight)
        return total

    @property
    def leans(self) -> Tensor | None:
        """b_i (B,) fp32 of factored directions that lean on g; None where they do not."""
        if not (self.echo and self.factored):
            return None
        return torch.tensor(self.echo[: len(self.echo) // 2])

    def leant_on(self, key: Key, target: Target, device: torch.device = CPU) -> ThinFactors:
        """g = sum_j a_j r_j s_j^T of the last step's directions: (rows, B) with a_j, (cols, B)."""
        last, slots = Key(key.seed, key.step - 1), range(len(self.echo) // 2)
        a = torch.tensor(self.echo[len(slots) :]).to(device)
        left = self.row_signs(last, target, slots, device).T.float().mul_(a)
        right = self.col_signs(last, target, slots, device).T.float()
        return ThinFactors(left, right, 1.0)

    @property
    def of_rank(self) -> bool:
        """Whether a matrix's U is a product of thin factors."""
        return self.dense in ("lowrank", "subspace")

    def basis(self, key: Key, target: Target, device: torch.device = CPU) -> Tensor:
        """V, (cols, k) fp32 signs: updates along strict and shared low-rank directions lie in its span."""
        epoch = Key(key.seed, key.step // self.refresh)
        rank = slice(0, self.rank)
        return noise.signs(epoch, target.id, noise.SPAN, rank, target.cols, device).T.float()

    def coordinates(self, key: Key, target: Target, device: torch.device = CPU) -> Tensor:
        """A, (rows, k) fp32 signs, drawn every step."""
        rank = slice(0, self.rank)
        return noise.signs(key, target.id, noise.LEFT, rank, target.rows, device).T.float()

    def factors(
        self, key: Key, target: Target, basis: Tensor | None = None, device: torch.device = CPU
    ) -> ThinFactors:
        """U of a low-rank kind. ``basis``: V^T (k, cols) of a guided direction; None where V is drawn."""
        if basis is not None:
            left = self.coordinates(key, target, basis.device)[:, : len(basis)]
            return ThinFactors(left, basis.float().T, 1.0)
        if self.dense == "lowrank":
            left = self.coordinates(key, target, device)
            right = self.basis(key, target, device)
            return ThinFactors(left, right, self.rank**-0.5)
        rank = min(self.rank, target.rows, target.cols)
        epoch = Key(key.seed, key.step // self.refresh)
        p = _dealt(epoch, target.id, noise.SPAN, target.rows, rank, device)
        q = _dealt(epoch, target.id, noise.BASIS, target.cols, rank, device)
        z = noise.normals(key, target.id, noise.LEFT, slice(0, rank), rank, device)
        # Rows of P and Q have one entry each, so neither product sums anything and rounding depends on no order.
        return ThinFactors(p @ z, q, 1.0)

    def _low_rank(
        self,
        key: Key,
        target: Target,
        rows: slice | Tensor,
        basis: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        left, right, scale = self.factors(key, target, basis, device)
        if isinstance(rows, Tensor):
            rows = rows.to(left.device)
        return (left[rows] @ right.T).mul_(scale)

    def vectors(
        self, key: Key, target: Target, slots: Sequence[int], device: torch.device = CPU
    ) -> Tensor:
        """D_i of a vector target, (len(slots), rows) fp32."""
        if self.factored:
            d = self.row_signs(key, target, slots, device).float()
        else:
            d = torch.ones(len(slots), target.rows, device=device)
        if self.dense is not None:
            # A vector is a (rows, 1) matrix: one row of U for each element.
            d = d * self.dense_rows(key, target, slice(0, target.rows), device=device).T
        if (leans := self.leans) is not None:
            left = self.leant_on(key, target, device).left
            d = d + leans[list(slots), None].to(device) * left.sum(1)
        return d

    def weighted_sum(
        self,
        key: Key,
        target: Target,
        coefficients: Tensor,
        rows: slice | Tensor,
        member: Tensor | None = None,
        mask_u: MaskU | None = None,
        guides: Tensor | None = None,
    ) -> Tensor:
        """sum_i c_i D_i on ``rows``, (n, cols) fp32, for ``coefficients`` (B,) fp32 on ``noise.exact_grid``.

        ``member``: (B or 1, n) 0/1, which examples move which of the rows; None: all of them. ``guides``: v_i (B, cols)
        in place of s_i, or V^T (k, cols) of a direction for the whole batch.

        Sums of signs times coefficients of the exact grid have no rounding, so the result does not depend on the
        tile, the device or the order in which a matrix product adds.
        """
        total = self._outer(key, target, coefficients, rows, member, guides)
        total = total.expand(count_of(rows), target.cols)
        if self.dense is not None or mask_u is not None:
            u = self.dense_rows(key, target, rows, guides, coefficients.device)
            total = total * (u if mask_u is None else mask_u(u))
        if (leans := self.leans) is not None:
            # One number, from a sum whose order does not depend on the tile; a_j are on a grid as the coefficients are.
            lean = float(coefficients.cpu().double() @ leans.double())
            left, right, _ = self.leant_on(key, target, coefficients.device)
            g = left[rows] @ right.T if not target.vector else left[rows].sum(1, keepdim=True)
            total = total + g.mul_(lean)
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
        """sum_i c_i r_i s_i^T on ``rows``: (n, cols), or (n, 1) where all columns are equal."""
        if not self.factored:
            if member is None:
                return coefficients.sum().reshape(1, 1)
            return (coefficients[:, None] * member).sum(0)[:, None]
        slots, device = range(len(coefficients)), coefficients.device

        def left_factor(term: int) -> Tensor:
            """c_i r_ik on ``rows``, (B, n)."""
            left = self.row_signs(key, target, slots, device, term)[:, rows].float()
            if member is not None:
                left = left * member
            return left * coefficients[:, None]

        if guides is not None:
            return _exact_product(left_factor(0).T, guides)
        if target.vector or self.strict:
            return left_factor(0).sum(0)[:, None]

        def product(term: int) -> Tensor:
            cols = self.col_signs(key, target, slots, device, term).float()
            return left_factor(term).T @ cols

        total = product(0)
        for term in range(1, self.terms):  # each exact; rounded where they are added, in one order
            total += product(term)
        return total if self.terms == 1 else total.mul_(self.terms**-0.5)

    def weighted_coordinates(
        self,
        key: Key,
        target: Target,
        coefficients: Tensor,
        rows: slice | Tensor,
        member: Tensor | None,
    ) -> Tensor:
        """Coordinates of ``weighted_sum`` in ``basis``, (n, k) fp32, for strict and shared low-rank directions."""
        total = self._outer(key, target, coefficients, rows, member)
        return total * self.coordinates(key, target, total.device)[rows]


def _exact_product(left: Tensor, guides: Tensor) -> Tensor:
    """left (n, B) @ guides (B, cols) in fp32, the same from any order of adding.

    Guides are multiples of 2**-20 (``on_grid``) and coefficients on a grid as well: fp64 sums have no rounding.
    """
    out = torch.empty(len(left), guides.shape[1], device=left.device)
    wide = guides.double()
    pieces = max(1, len(left) // EXACT_PIECES)
    for start in range(0, len(left), pieces):
        part = slice(start, start + pieces)
        out[part] = left[part].double() @ wide
    return out


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of ``columns`` (n, k), transposed: (k, n) fp32, rounded by ``on_grid``."""
    return on_grid(torch.linalg.qr(columns.float())[0].T.contiguous())


def on_grid(v: Tensor) -> Tensor:
    """``v`` (n, cols), of at most 1 in size, rounded to multiples of 2**-20; NaN and Inf become 0.

    Rounding such values to bf16 gives multiples of 2**-20 again.
    """
    return torch.nan_to_num(v, 0.0, 0.0, 0.0).mul_(_GRID).round_().div_(_GRID)


def _of_slots(
    key: Key,
    tensor: int,
    stream: int,
    slots: Sequence[int],
    width: int,
    device: torch.device = CPU,
) -> Tensor:
    """(len(slots), width) int8: the signs of these slots."""
    if isinstance(slots, range) and slots.step == 1:
        return noise.signs(key, tensor, stream, slice(slots.start, slots.stop), width, device)
    first, last = min(slots), max(slots) + 1
    table = noise.signs(key, tensor, stream, slice(first, last), width, device)
    if list(slots) == list(range(first, last)):
        return table
    return table[places_of(tuple(slot - first for slot in slots), device)]


@functools.lru_cache(maxsize=4)  # those of one micro-batch are asked for by each tensor
def places_of(places: tuple[int, ...], device: torch.device) -> Tensor:
    """``places`` as (n,) int64 on ``device``."""
    return uploaded(torch.tensor(places), device)


def _dealt(
    key: Key, tensor: int, stream: int, size: int, rank: int, device: torch.device
) -> Tensor:
    """(size, rank) fp32 with one entry in each row, and orthogonal columns of length sqrt(size/rank)."""
    place = torch.arange(size, device=device)
    column = torch.empty_like(place)
    column[noise.order_on(key, tensor, stream, size, device)] = place % rank
    sign = noise.signs(key, tensor, noise.CHOICE + stream, slice(0, 1), size, device)[0].float()
    few, more = size // rank, size % rank  # the first ``more`` columns have one row more
    lengths = [float(np.float32(np.sqrt(size / (rank * n)))) for n in (few + 1, few)]
    length = torch.where(column < more, lengths[0], lengths[1])
    matrix = torch.zeros(size, rank, device=device)
    matrix[place, column] = sign * length
    return matrix


def centred(
    key: Key, target: Target, rows: slice | Tensor, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """ZO-AdaMU's (m, v) of a step on ``rows``, each (n, cols) fp32 (arXiv 2312.15184), from the last steps' seeds.

        z1 ~ N(0, a)    z2 ~ N(m, 1 - a)    m <- (1-b) z1 + b z2    v <- (1-b) z1^2 + b z2^2

    with variances a = FRESH and 1 - a, and b = KEPT. Steps more than ``_MEMORY_STEPS`` ago no longer show in m.
    """
    m = torch.zeros(count_of(rows), target.cols, device=device)
    v = m
    for step in range(max(0, key.step + 1 - _MEMORY_STEPS), key.step + 1):
        then = Key(key.seed, step)
        z1 = noise.normals(then, target.id, noise.DENSE, rows, target.cols, device)
        z1 = z1.mul_(FRESH**0.5)
        z2 = noise.normals(then, target.id, noise.CENTRE, rows, target.cols, device)
        z2 = z2.mul_((1 - FRESH) ** 0.5).add_(m)
        v = z1.square().mul_(1 - KEPT).add_(z2.square().mul_(KEPT))
        m = z1.mul_(1 - KEPT).add_(z2.mul_(KEPT))
    return m, v


DIRECTION_KINDS = {
    d.name: d
    for d in (
        Directions("signs", factored=True, dense=None),
        Directions("rank-signs", factored=True, dense=None, summed=True),
        Directions("rademacher", factored=True, dense="signs"),
        Directions("gaussian", factored=True, dense="normals"),
        Directions("shared", factored=False, dense="normals"),
        Directions("lowrank", factored=True, dense="lowrank"),
        Directions("lowrank-strict", factored=True, dense="lowrank", strict=True),
        Directions("lowrank-shared", factored=False, dense="lowrank"),
        Directions("subspace", factored=False, dense="subspace"),
        Directions("centred", factored=False, dense="centred"),
        Directions("aligned", factored=False, dense="normals"),
        Directions("cone", factored=False, dense="normals"),
        Directions("aligned-signs", factored=True, dense=None),
        Directions("activation", factored=True, dense=None, guided=True),
        Directions("activation-shared", factored=False, dense="lowrank", guided=True),
    )
}
