"""The perturbed operations: what a linear, an embedding and a norm do while examples are probed.

Tokens of all rows lie packed in one axis, n = 2N of them: the first N belong to side +sigma, the last N to side
-sigma of the same rows, so one pass over the weights serves both. With c = +-sigma per token and i its example,

    Linear       y += c * r_i * (s_i . x)          = ((x S^T) * mask) R         mask (n, b) = c * [example = i]
                 y += c * r_i * (U (s_i * x))      for a dense factor U
    low rank     y += A (V x) + c * r_i * (t_i . V x)
    activation   the same, with a v_i made from all x (or V x) of example i in place of s_i (or t_i)
    gain         y  = (1 + g + c * r_i) * (W x)
    bias         y += c * r_i
    norm         y += c * r_i * xhat               (r_i the direction of its weight)
    Embedding    e += c * r_i[token] * s_i         a tied head uses the same r_i, s_i

No weight is changed here. The classes are put in place of the module's own (``module.__class__``), so a subclass
that scales or offsets its embedding (Gemma, OPT) keeps doing so through ``super()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.machine.limits import TILE_BYTES, tiles
from edgezo.machine.matmul import Own, Term, add_thin, addmm_, along, few, mm, own
from edgezo.network.fused import Norm
from edgezo.weights.layouts import CPU, Layout
from edgezo.weights.trainable import Trainable
from edgezo.zo.directions import Directions, on_grid
from edgezo.zo.masks import Mask
from edgezo.zo.noise import COLUMN, Key, signs, tensor_id

TOKENS = tensor_id("tokens of an example")
MOST_SLOTS = 1024  # of a group: the noise of a token does not depend on how many there are
SPUN_PIECES = 4  # of a tile: what is added at once
UNSCALED: Mapping[str, float] = MappingProxyType({})


class Probe:
    """Who is perturbed how, for the tokens of one packed forward."""

    def __init__(
        self,
        directions: Directions,
        key: Key,
        sigma: float,
        slots: Sequence[int],  # (b,) slots of the directions in this micro-batch
        example: Tensor,  # (n,) int64 index into slots of each token
        side: Tensor,  # (n,) compute dtype, +1, -1 or 0
        *,
        mask: Mask | None = None,
        signs: Sequence[int] = (1, -1),  # of the equal consecutive parts that the tokens are in
        owners: Sequence[int] | None = None,  # slots of the batch's examples; () for all of them
        scales: Mapping[str, float] = UNSCALED,  # of the tensors, where the mask takes any
    ):
        self.directions, self.key, self.sigma, self.slots = directions, key, sigma, tuple(slots)
        self.mask_of, self.signs = mask or Mask(), tuple(signs)
        self.owners = self.slots if owners is None else tuple(owners)
        self.scales = scales
        self.example, self.side = example, side * sigma
        one_hot = F.one_hot(example, len(self.slots)).to(side.dtype)
        self.mask = one_hot.mul_(self.side[:, None])  # (n, b)

    def at(self, index: Tensor) -> Probe:
        """The same probe for the tokens ``index``."""
        sign = torch.sign(self.side[index])
        return Probe(
            self.directions,
            self.key,
            self.sigma,
            self.slots,
            self.example[index],
            sign,
            mask=self.mask_of,
            signs=self.signs,
            owners=self.owners,
            scales=self.scales,
        )

    def scale(self, row: Trainable) -> float:
        """What the tensor's direction is multiplied by."""
        told = self.scales.get(row.target.name, 1.0)
        return self.mask_of.scale(self.key, row, told)

    def moves(self, row: Trainable | None) -> TypeGuard[Trainable]:
        """Whether a trained tensor is perturbed in this step."""
        return row is not None and self.scale(row) != 0.0

    def parts(self, n: int) -> Iterator[tuple[slice, int]]:
        """The tokens of each part, and its sign."""
        size = n // len(self.signs)
        for number, sign in enumerate(self.signs):
            yield slice(number * size, (number + 1) * size), sign

    def rows(self, row: Trainable) -> Tensor:
        found = self._here(self.directions.row_signs(self.key, row.target, self.slots))
        scale = self.scale(row)
        return found if scale == 1.0 else found * scale

    def cols(self, row: Trainable, x: Tensor | None = None) -> Tensor:
        """s_i of a tensor, (b, cols); or v_i, made from what its product reads, ``x`` (n, cols)."""
        if row.guides is None or x is None:
            return self._here(self.directions.col_signs(self.key, row.target, self.slots))
        n = len(self.tokens[0])
        assert n * len(self.signs) == len(x)
        v = sum(along(self.tokens, x[part]) for part, _ in self.parts(len(x)))
        assert isinstance(v, Tensor)
        found = on_grid(v / v.norm(dim=1, keepdim=True)).to(x.dtype)
        row.guides.update(zip(self.slots, found, strict=True))
        return found

    def own(self, x: Tensor, cols: Tensor) -> Tensor | Own:
        """c * (s_i . x) of each token, as a left factor (n, b)."""
        return own(x, cols, self.example, self.mask, self.side)

    def learn(self, row: Trainable, x: Tensor) -> None:
        """One power iteration of a shared basis on what a product reads, ``x`` (n, cols): X^T (X V)."""
        if row.basis is None:
            return
        seen = sum(x[part] for part, _ in self.parts(len(x)))
        assert isinstance(seen, Tensor)
        found = along(seen.T, mm(seen, row.basis.T))
        row.sketch = found if row.sketch is None else row.sketch + found

    @cached_property
    def tokens(self) -> Tensor:
        """z, (b, n/sides) in the compute dtype: a sign for each token of each example, 0 for those of others.

        A token is known by its example and its place there, so a group may be split in any way.
        """
        n = len(self.example) // len(self.signs)
        example = self.example[:n].cpu()
        order = torch.argsort(example, stable=True)
        counts = torch.bincount(example, minlength=len(self.slots))
        place = torch.empty_like(order)
        place[order] = torch.arange(n) - (counts.cumsum(0) - counts)[example[order]]
        longest = int(counts.max())
        table = signs(self.key, TOKENS, COLUMN, slice(0, longest), MOST_SLOTS)
        found = torch.zeros(len(self.slots), n, dtype=torch.int8)
        slot = torch.tensor(self.slots)[example]
        found[example, torch.arange(n)] = table[place, slot]
        return self._here(found)

    def spread(self, row: Trainable) -> bool:
        """Whether the direction has a factor of the weight's size."""
        return self.directions.dense is not None or self.mask_of.shapes(row)

    def thin(self, row: Trainable) -> bool:
        """Whether that factor is a product of thin ones, which need not be multiplied out."""
        return self.directions.of_rank and not self.mask_of.shapes(row)

    def dense(self, row: Trainable, rows: slice | Tensor) -> Tensor:
        """Rows of U as the mask leaves them."""
        return self._scaled(row, self._masked(row, rows))

    def factors(self, row: Trainable) -> tuple[Tensor, Tensor]:
        """U = left @ right^T, (rows, k) and (cols, k)."""
        left, right, scale = self.directions.factors(self.key, row.target, row.basis)
        return self._scaled(row, left * scale), self._here(right)

    def vector(self, row: Trainable) -> Tensor:
        """D_i of a vector, (b, rows)."""
        if not self.mask_of.shapes(row):
            found = self._here(self.directions.vectors(self.key, row.target, self.slots))
            scale = self.scale(row)
            return found if scale == 1.0 else found * scale
        u = self.dense(row, slice(0, row.target.rows)).T
        return u * self.rows(row) if self.directions.factored else u.expand(len(self.slots), -1)

    def _scaled(self, row: Trainable, u: Tensor) -> Tensor:
        """U in the compute dtype; where there is an r_i, that has the mask's scale."""
        scale = 1.0 if self.directions.factored else self.scale(row)
        return self._here(u if scale == 1.0 else u * scale)

    def _masked(self, row: Trainable, rows: slice | Tensor) -> Tensor:
        u = self.directions.dense_at(self.key, row.target, rows, row.basis)
        if not self.mask_of.shapes(row):
            return u

        u = u.to(self.mask.device)

        def seen() -> Tensor:
            return row.layout.expand(rows, torch.empty_like(u))

        return self.mask_of.shape(u, self.key, row, rows, seen, probing=True)

    def _here(self, noise: Tensor) -> Tensor:
        """Moved as it was made, signs as bytes, and only then widened."""
        return noise.to(self.mask.device).to(self.mask.dtype)


@dataclass
class Context:
    """What every perturbed module of one model shares."""

    dtype: torch.dtype  # compute dtype
    device: torch.device = CPU
    probe: Probe | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    touched: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # (slot, row) pairs

    def buffer(self, name: str, rows: int, cols: int) -> Tensor:
        """A reused (rows, cols) tile of the compute dtype."""
        held = self.scratch.get(name)
        if held is None or held.numel() < rows * cols:
            self.scratch[name] = held = torch.empty(
                rows * cols, dtype=self.dtype, device=self.device
            )
        return held[: rows * cols].view(rows, cols)

    def note_touched(self, ids: Tensor, offset: int) -> None:
        """Remember which rows of an embedding table each example used."""
        assert self.probe is not None
        ids = ids.cpu()  # of all parts: what they write themselves differs
        slot = torch.zeros_like(ids)
        if self.probe.owners:
            slot = torch.tensor(self.probe.owners)[self.probe.example.cpu()]
        self.touched.append((slot.numpy(), ids.numpy() + offset))


@dataclass
class Matrix:
    """A weight matrix as the forward uses it: its layout and, if it is trained itself, its row of the store."""

    layout: Layout
    context: Context
    full: Trainable | None = None

    def tile(self, rows: slice | Tensor) -> Tensor:
        """Rows of W in the compute dtype, (k, cols); valid until the next call."""
        whole = self.layout.direct(self.context.dtype)
        if whole is not None:
            return whole[rows]
        n = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        return self.layout.expand(rows, self.context.buffer("expand", n, self.layout.shape[1]))

    def product(self, x: Tensor, rows: slice, out: Tensor) -> None:
        """out (n, k) = x (n, cols) @ W[rows]^T, dense factors of a probe included."""
        probe, w, full = self.context.probe, self.tile(rows), self.full
        if probe is None or not probe.moves(full) or not probe.spread(full):
            mm(x, w.T, out)
            return
        if probe.thin(full):
            mm(x, w.T, out)
            left, right = probe.factors(full)
            if probe.directions.factored:
                turned = x if probe.directions.strict else x * probe.cols(full)[probe.example]
                _add_spun(out, mm(turned, right), left[rows], probe.mask, probe.rows(full)[:, rows])
            else:
                addmm_(out, mm(x, right).mul_(probe.side[:, None]), left[rows].T)
            return
        u = probe.dense(full, rows)
        if not probe.directions.factored:
            # One direction for all: W + sigma*U and W - sigma*U, each for its side, at no extra product.
            moved = self.context.buffer("moved", *w.shape)
            for part, sign in probe.parts(len(x)):
                torch.add(w, u, alpha=sign * probe.sigma, out=moved)
                mm(x[part], moved.T, out[part])
            return
        mm(x, w.T, out)
        spun = x * probe.cols(full)[probe.example]
        _add_spun(out, spun, u, probe.mask, probe.rows(full)[:, rows])

    def thin(self, x: Tensor) -> list[Term]:
        """Rank-b factors ((n, b), (b, rows)) that sign directions add to the product."""
        probe = self.context.probe
        if probe is None or not probe.moves(self.full):
            return []
        probe.learn(self.full, x)
        if probe.spread(self.full):
            return []
        return [(probe.own(x, probe.cols(self.full, x)), probe.rows(self.full))]


def _add_spun(y: Tensor, spun: Tensor, dense: Tensor, mask: Tensor, rows: Tensor) -> None:
    """y (n, k) += (spun @ dense^T) * (mask @ rows), some columns at a time: each factor is as large as y."""
    most = TILE_BYTES // (SPUN_PIECES * len(y) * y.element_size())
    width = 1 << max(0, most.bit_length() - 1)  # few different ones (machine/matmul.py)
    for start in range(0, len(dense), width):
        part = slice(start, start + width)
        y[:, part].addcmul_(mm(spun, dense[part].T), mm(mask, rows[:, part]))


class PerturbedLinear(nn.Module):
    """y = (1 + g) * (W x) + A (V x) + b, each part with its probe. Also stands for GPT-2's Conv1D (W transposed)."""

    matrix: Matrix
    context: Context
    bias_vector: Tensor | None
    bias_row: Trainable | None
    gain_row: Trainable | None
    lowrank_row: Trainable | None
    basis: Tensor | None  # V (rank, d_in) in the compute dtype

    def forward(self, x: Tensor) -> Tensor:
        shape, probe = x.shape, self.context.probe
        x = x.reshape(-1, shape[-1])
        rows, cols = self.matrix.layout.shape
        y = torch.empty(len(x), rows, dtype=self.context.dtype, device=x.device)
        for tile in tiles(rows, cols, y.element_size()):
            self.matrix.product(x, tile, y[:, tile])
        thin = self.matrix.thin(x)
        if self.gain_row is not None:
            add_thin(y, thin)
            thin = []
            gain = self.gain_row.values.T.to(y.dtype) + 1
            if probe is not None and probe.moves(self.gain_row):
                gain = mm(probe.mask, probe.vector(self.gain_row)).add_(gain)
            y.mul_(gain)
        if self.lowrank_row is not None:
            thin += self._lowrank(x, y)
        if self.bias_row is not None:
            y.add_(self.bias_row.values.T.to(y.dtype))
            if probe is not None and probe.moves(self.bias_row):
                thin.append((probe.mask, probe.vector(self.bias_row)))
        elif self.bias_vector is not None:
            y.add_(self.bias_vector)
        add_thin(y, thin)
        return y.view(*shape[:-1], rows)

    def _lowrank(self, x: Tensor, y: Tensor) -> list[Term]:
        row, probe = self.lowrank_row, self.context.probe
        assert row is not None and self.basis is not None
        u = few(x, self.basis)  # (n, rank)
        thin: list[Term] = [(u, row.values.T)]
        if probe is None or not probe.moves(row):
            return thin
        if not probe.directions.factored:
            dense = probe.dense(row, slice(0, row.target.rows))
            return [*thin, (u * probe.side[:, None], dense.T)]
        if not probe.spread(row):
            return [*thin, (probe.own(u, probe.cols(row, u.to(y.dtype))), probe.rows(row))]
        dense = probe.dense(row, slice(0, row.target.rows))
        turned = u.to(y.dtype) * probe.cols(row)[probe.example]
        _add_spun(y, turned, dense, probe.mask, probe.rows(row))
        return thin


class PerturbedHead(nn.Module):
    """The output embedding. Called by the model it passes hidden states through; ``logits`` reads rows of it."""

    matrix: Matrix
    context: Context
    bias_vector: Tensor | None
    bias_row: Trainable | None

    def forward(self, x: Tensor) -> Tensor:
        return x

    def logits(self, hidden: Tensor, rows: slice | Tensor, probe: Probe | None) -> Tensor:
        """Logits of the vocabulary ``rows`` (k,), (n, k) in the compute dtype; ``probe`` is that of the n tokens."""
        w = self.matrix.tile(rows)
        y = mm(hidden, w.T)
        full = self.matrix.full
        if probe is not None and probe.moves(full):
            if not probe.directions.factored:
                addmm_(y, hidden * probe.side[:, None], probe.dense(full, rows).T)
            elif not probe.spread(full):
                left = mm(hidden, probe.cols(full).T).mul_(probe.mask)
                addmm_(y, left, probe.rows(full)[:, rows])
            else:
                spun = hidden * probe.cols(full)[probe.example]
                dense = probe.dense(full, rows)
                _add_spun(y, spun, dense, probe.mask, probe.rows(full)[:, rows])
        if self.bias_row is not None:
            y.add_(self.bias_row.values[rows].T.to(y.dtype))
            if probe is not None and probe.moves(self.bias_row):
                addmm_(y, probe.mask, probe.vector(self.bias_row)[:, rows])
        elif self.bias_vector is not None:
            y.add_(self.bias_vector[rows])
        return y


class PerturbedEmbedding(nn.Embedding):
    """Rows of a table; the table's directions are keyed by token id."""

    matrix: Matrix
    context: Context

    def forward(self, input: Tensor) -> Tensor:
        ids = input.reshape(-1)
        cols = self.matrix.layout.shape[1]
        out = torch.empty(len(ids), cols, dtype=self.context.dtype, device=ids.device)
        self.matrix.layout.expand(ids, out)
        full, probe = self.matrix.full, self.context.probe
        if probe is not None and full is not None:
            if full.touched_offset is not None:
                self.context.note_touched(ids, full.touched_offset)
            if probe.moves(full):
                self._perturb(ids, out, full, probe)
        return out.view(*input.shape, cols)

    @staticmethod
    def _perturb(ids: Tensor, out: Tensor, full: Trainable, probe: Probe) -> None:
        if probe.directions.factored:
            weight = probe.rows(full)[:, ids].T.mul(probe.mask)  # (n, b): c * r_i[token]
            moved = mm(weight, probe.cols(full))
        else:
            moved = probe.side[:, None].expand(out.shape)
        if probe.spread(full):
            unique, inverse = torch.unique(ids, return_inverse=True)
            moved = moved * probe.dense(full, unique)[inverse]
        out.add_(moved)


class PerturbedNorm(nn.Module):
    """y = weight * xhat + bias, both trained; ``norm`` is how the module's own normalises."""

    context: Context
    norm: Norm
    weight_row: Trainable
    bias_row: Trainable | None

    def forward(self, x: Tensor) -> Tensor:
        probe = self.context.probe
        weight = self.weight_row.values[:, 0]
        moved: Tensor | None = None
        if probe is not None and probe.moves(self.weight_row):
            moved = mm(probe.mask, probe.vector(self.weight_row)).float().add_(weight)
        if self.bias_row is None:
            found = self.norm.fused(x, weight if moved is None else moved)
            if found is not None:
                return found
        hat = self.norm(x)
        scale = weight if moved is None else self._as_tokens(moved, x)
        y = hat * (scale + self.norm.offset).to(hat.dtype)
        if self.bias_row is not None:
            y = y + self.bias_row.values[:, 0].to(hat.dtype)
            if probe is not None and probe.moves(self.bias_row):
                y = y + self._as_tokens(mm(probe.mask, probe.vector(self.bias_row)), x)
        return y.to(x.dtype)

    @staticmethod
    def _as_tokens(values: Tensor, like: Tensor) -> Tensor:
        """(n, d) values, shaped to go with an activation that has tokens on one of its axes.

        Norms of queries and keys see (1, n, heads, d) or its transpose (1, heads, n, d). Projections write
        token by token, so where both axes are n long the tokens are on the one with the larger stride.
        """
        n, d = values.shape
        axes = [axis for axis in range(like.dim() - 1) if like.shape[axis] == n]
        tokens = max(axes, key=like.stride)
        shape = [1] * (like.dim() - 1) + [d]
        shape[tokens] = n
        return values.view(shape)
