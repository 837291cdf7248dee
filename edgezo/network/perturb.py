"""The perturbed operations: what a linear, an embedding and a norm compute at theta + sigma*D and theta - sigma*D.

Tokens of all rows lie packed in one axis, n = 2N of them: the first N belong to side +sigma, the last N to side
-sigma of the same rows, so one pass over the weights serves both. With c = +-sigma of a token and i its example,

    Linear       y += c * r_i * (s_i . x)          = ((x S^T) * C) R         C (n, b), C[token, i] = c * [example = i]
                 y += c * r_i * (U (s_i * x))      for a dense factor U
    low rank     y += A (V x) + c * r_i * (t_i . V x)
    activation   as above, with a v_i made from all x (or V x) of example i in place of s_i (or t_i)
    gain         y  = (1 + g + c * r_i) * (W x)
    bias         y += c * r_i
    norm         y += c * r_i * xhat               r_i is the direction of its weight
    Embedding    e += c * r_i[token] * s_i         a tied head uses the r_i and s_i of its embedding

No weight is changed here. The classes are put in place of the module's (``module.__class__``), so a subclass that
scales or offsets its embedding (Gemma, OPT) keeps doing so through ``super()``.
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
from edgezo.machine.matmul import (
    ByExample,
    Term,
    add_thin,
    addmm_,
    along,
    dots_by_example,
    mm,
    thin_product,
)
from edgezo.network.fused import Norm
from edgezo.weights.layouts import CPU, Layout
from edgezo.weights.trainable import Trainable
from edgezo.zo.directions import Directions, on_grid
from edgezo.zo.masks import Mask
from edgezo.zo.noise import COLUMN, Key, signs, tensor_id

TOKENS = tensor_id("tokens of an example")
# Width of the table of token signs, so that fixed, so that a sign does not change with the number of examples.
MOST_SLOTS = 1024
DENSE_TERM_PIECES = 4  # a dense term is added in pieces of this share of a tile
NO_SCALES: Mapping[str, float] = MappingProxyType({})


class Probe:
    """How the tokens of one packed forward are perturbed: along which directions, how far and on which side."""

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
        # One sign for each evaluation; the tokens of one evaluation follow those of the one before it.
        signs: Sequence[int] = (1, -1),
        owners: Sequence[int] | None = None,  # slots of the examples; () if they share directions
        scales: Mapping[str, float] = NO_SCALES,  # by tensor, where a finetuner gives them
    ):
        self.directions, self.key, self.sigma, self.slots = directions, key, sigma, tuple(slots)
        self.mask, self.signs = mask or Mask(), tuple(signs)
        self.owners = self.slots if owners is None else tuple(owners)
        self.scales = scales
        self.example, self.side = example, side * sigma
        one_hot = F.one_hot(example, len(self.slots)).to(side.dtype)
        self.by_example = one_hot.mul_(self.side[:, None])  # C (n, b)

    def at(self, index: Tensor) -> Probe:
        """This probe for the tokens ``index`` (m,) alone."""
        sign = torch.sign(self.side[index])
        return Probe(
            self.directions,
            self.key,
            self.sigma,
            self.slots,
            self.example[index],
            sign,
            mask=self.mask,
            signs=self.signs,
            owners=self.owners,
            scales=self.scales,
        )

    def scale(self, trainable: Trainable) -> float:
        """What the tensor's direction is multiplied by."""
        from_finetuner = self.scales.get(trainable.target.name, 1.0)
        return self.mask.scale(self.key, trainable, from_finetuner)

    def moves(self, trainable: Trainable | None) -> TypeGuard[Trainable]:
        """Whether the tensor is trained, and perturbed in this step."""
        return trainable is not None and self.scale(trainable) != 0.0

    def parts(self, n: int) -> Iterator[tuple[slice, int]]:
        """The tokens of each evaluation, and its sign."""
        size = n // len(self.signs)
        for number, sign in enumerate(self.signs):
            yield slice(number * size, (number + 1) * size), sign

    def row_factor(self, trainable: Trainable, term: int = 0) -> Tensor:
        """r_ik, k = ``term``, times the tensor's scale, over the root of the number of terms: (b, rows)."""
        drawn = self.directions.row_signs(self.key, trainable.target, self.slots, term)
        r = self._to_compute(drawn)
        scale = self.scale(trainable) * self.directions.terms**-0.5
        return r if scale == 1.0 else r * scale

    def col_factor(self, trainable: Trainable, x: Tensor | None = None, term: int = 0) -> Tensor:
        """s_ik, k = ``term``, (b, cols); with guides v_i, made from ``x`` (n, cols) that a product reads, and kept."""
        if trainable.guides is None or x is None:
            s = self.directions.col_signs(self.key, trainable.target, self.slots, term)
            return self._to_compute(s)
        n = len(self.token_signs[0])
        assert n * len(self.signs) == len(x)
        v = sum(along(self.token_signs, x[part]) for part, _ in self.parts(len(x)))
        assert isinstance(v, Tensor)
        v = on_grid(v / v.norm(dim=1, keepdim=True)).to(x.dtype)
        trainable.guides.update(zip(self.slots, v, strict=True))
        return v

    def col_products(self, x: Tensor, cols: Tensor) -> Tensor | ByExample:
        """c * (s_i . x) of each token, s_i = cols[i], as a left factor (n, b)."""
        return dots_by_example(x, cols, self.example, self.by_example, self.side)

    def sign_products(self, trainable: Trainable, x: Tensor, read: Tensor) -> list[Term]:
        """What directions without a U add to a product of ``x`` (n, cols); guides are made from ``read``, x as well."""
        each = range(self.directions.terms)
        cols = [self.col_factor(trainable, read, k) for k in each]
        terms = [(self.col_products(x, cols[k]), self.row_factor(trainable, k)) for k in each]
        if (leans := self.directions.leans) is not None:  # c * b_i * (g x), g = left right^T
            left, right, _ = self.directions.leant_on(self.key, trainable.target)
            side = mm(self.by_example, self._to_compute(leans[list(self.slots), None]))
            product = mm(x.to(side.dtype), self._to_compute(right)).mul_(side)
            terms.append((product, self._to_compute(left.T)))
        return terms

    def sketch_basis(self, trainable: Trainable, x: Tensor) -> None:
        """One power iteration of a shared basis V on what a product reads, ``x`` (n, cols): add X^T (X V)."""
        if trainable.basis is None:
            return
        read = sum(x[part] for part, _ in self.parts(len(x)))
        assert isinstance(read, Tensor)
        more = along(read.T, mm(read, trainable.basis.T))
        trainable.sketch = more if trainable.sketch is None else trainable.sketch + more

    @cached_property
    def token_signs(self) -> Tensor:
        """z (b, n/sides) in the compute dtype: a sign for each token of example i in row i, 0 for other tokens.

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
        z = torch.zeros(len(self.slots), n, dtype=torch.int8)
        slot = torch.tensor(self.slots)[example]
        z[example, torch.arange(n)] = table[place, slot]
        return self._to_compute(z)

    def has_dense_factor(self, trainable: Trainable) -> bool:
        """Whether the direction has a factor U of the weight's size."""
        return self.directions.dense is not None or self.mask.shapes(trainable)

    def has_thin_factors(self, trainable: Trainable) -> bool:
        """Whether U is a product of thin factors, which need not be multiplied out."""
        return self.directions.of_rank and not self.mask.shapes(trainable)

    def dense_rows(self, trainable: Trainable, rows: slice | Tensor) -> Tensor:
        """Rows of U after the mask, (k, cols)."""
        u = self.directions.dense_at(self.key, trainable.target, rows, trainable.basis)
        if self.mask.shapes(trainable):
            u = u.to(self.by_example.device)

            def weights() -> Tensor:
                return trainable.layout.expand(rows, torch.empty_like(u))

            u = self.mask.shape(u, self.key, trainable, rows, weights, probing=True)
        return self._scaled(trainable, u)

    def thin_factors(self, trainable: Trainable) -> tuple[Tensor, Tensor]:
        """(left, right) of U = left @ right^T, (rows, k) and (cols, k)."""
        left, right, scale = self.directions.factors(self.key, trainable.target, trainable.basis)
        return self._scaled(trainable, left * scale), self._to_compute(right)

    def vector(self, trainable: Trainable) -> Tensor:
        """D_i of a vector, (b, rows)."""
        target = trainable.target
        if not self.mask.shapes(trainable):
            d = self._to_compute(self.directions.vectors(self.key, target, self.slots))
            scale = self.scale(trainable)
            return d if scale == 1.0 else d * scale
        u = self.dense_rows(trainable, slice(0, target.rows)).T
        if self.directions.factored:
            return u * self.row_factor(trainable)
        return u.expand(len(self.slots), -1)

    def _scaled(self, trainable: Trainable, u: Tensor) -> Tensor:
        """U in the compute dtype, times the tensor's scale unless r_i has it."""
        scale = 1.0 if self.directions.factored else self.scale(trainable)
        return self._to_compute(u if scale == 1.0 else u * scale)

    def _to_compute(self, noise: Tensor) -> Tensor:
        """Noise on the device in the compute dtype: moved as it was made (signs are bytes), and only then widened."""
        return noise.to(self.by_example.device).to(self.by_example.dtype)


EXPANDED = "expand"  # the buffer of a tile in the compute dtype


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
        memory = self.scratch.get(name)
        if memory is None or memory.numel() < rows * cols:
            memory = torch.empty(rows * cols, dtype=self.dtype, device=self.device)
            self.scratch[name] = memory
        return memory[: rows * cols].view(rows, cols)

    def keep_tile(self, n_bytes: int) -> None:
        """Make memory for tiles of up to ``n_bytes`` before the first forward, so that smaller ones leave no holes."""
        self.buffer(EXPANDED, 1, n_bytes // self.dtype.itemsize)

    def note_touched(self, ids: Tensor, offset: int) -> None:
        """Remember which rows of an embedding table each example used."""
        assert self.probe is not None
        ids = ids.cpu()  # of all sides: where sides write text, their tokens differ
        slot = torch.zeros_like(ids)
        if self.probe.owners:
            slot = torch.tensor(self.probe.owners)[self.probe.example.cpu()]
        self.touched.append((slot.numpy(), ids.numpy() + offset))


@dataclass
class Matrix:
    """A weight matrix as the forward uses it: its layout and, if it is trained itself, its trainable."""

    layout: Layout
    context: Context
    trained: Trainable | None = None

    def tile(self, rows: slice | Tensor) -> Tensor:
        """Rows of W in the compute dtype, (k, cols); valid until the next call."""
        whole = self.layout.direct(self.context.dtype)
        if whole is not None:
            return whole[rows]
        n = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
        return self.layout.expand(rows, self.context.buffer(EXPANDED, n, self.layout.shape[1]))

    def product(self, x: Tensor, rows: slice, out: Tensor) -> None:
        """out (n, k) = x (n, cols) @ W[rows]^T, perturbed by the probe's dense factor U where it has one."""
        probe, w, trained = self.context.probe, self.tile(rows), self.trained
        if probe is None or not probe.moves(trained) or not probe.has_dense_factor(trained):
            mm(x, w.T, out)
            return
        if probe.has_thin_factors(trained):
            mm(x, w.T, out)
            left, right = probe.thin_factors(trained)
            if probe.directions.factored:
                strict = probe.directions.strict
                turned = x if strict else x * probe.col_factor(trained)[probe.example]
                r = probe.row_factor(trained)[:, rows]
                _add_dense_term(out, mm(turned, right), left[rows], probe.by_example, r)
            else:
                addmm_(out, mm(x, right).mul_(probe.side[:, None]), left[rows].T)
            return
        u = probe.dense_rows(trained, rows)
        if not probe.directions.factored:
            # One direction for all: W + sigma*U and W - sigma*U, each for its side, at no extra product.
            moved = self.context.buffer("moved", *w.shape)
            for part, sign in probe.parts(len(x)):
                torch.add(w, u, alpha=sign * probe.sigma, out=moved)
                mm(x[part], moved.T, out[part])
            return
        mm(x, w.T, out)
        turned = x * probe.col_factor(trained)[probe.example]
        _add_dense_term(out, turned, u, probe.by_example, probe.row_factor(trained)[:, rows])

    def sign_terms(self, x: Tensor) -> list[Term]:
        """The product of rank b, as its factors ((n, b), (b, rows)), that directions without a U add."""
        probe = self.context.probe
        if probe is None or not probe.moves(self.trained):
            return []
        probe.sketch_basis(self.trained, x)
        if probe.has_dense_factor(self.trained):
            return []
        return probe.sign_products(self.trained, x, x)


def _add_dense_term(y: Tensor, turned: Tensor, u: Tensor, by_example: Tensor, r: Tensor) -> None:
    """y (n, m) += (turned @ u^T) * (by_example @ r): c * r_i * (U (s_i * x)), where ``turned`` (n, k) is s_i * x.

    Some columns at a time, for each of the two products is as large as y.
    """
    most = TILE_BYTES // (DENSE_TERM_PIECES * len(y) * y.element_size())
    width = 1 << max(
        0, most.bit_length() - 1
    )  # a power of 2: few different shapes (machine/matmul.py)
    for start in range(0, len(u), width):
        part = slice(start, start + width)
        y[:, part].addcmul_(mm(turned, u[part].T), mm(by_example, r[:, part]))


class PerturbedLinear(nn.Module):
    """y = (1 + g) * (W x) + A (V x) + b, each part perturbed. Also stands for GPT-2's Conv1D (W transposed)."""

    matrix: Matrix
    context: Context
    frozen_bias: Tensor | None = None
    trained_bias: Trainable | None = None
    trained_gain: Trainable | None = None
    trained_factor: Trainable | None = None
    basis: Tensor | None = None  # V (rank, d_in) in the compute dtype

    def forward(self, x: Tensor) -> Tensor:
        shape, probe = x.shape, self.context.probe
        x = x.reshape(-1, shape[-1])
        rows, cols = self.matrix.layout.shape
        y = torch.empty(len(x), rows, dtype=self.context.dtype, device=x.device)
        for tile in tiles(rows, cols, y.element_size()):
            self.matrix.product(x, tile, y[:, tile])
        terms = self.matrix.sign_terms(x)
        if self.trained_gain is not None:
            add_thin(y, terms)
            terms = []
            gain = self.trained_gain.values.T.to(y.dtype) + 1
            if probe is not None and probe.moves(self.trained_gain):
                gain = mm(probe.by_example, probe.vector(self.trained_gain)).add_(gain)
            y.mul_(gain)
        if self.trained_factor is not None:
            terms += self._factor_terms(x, y)
        if self.trained_bias is not None:
            y.add_(self.trained_bias.values.T.to(y.dtype))
            if probe is not None and probe.moves(self.trained_bias):
                terms.append((probe.by_example, probe.vector(self.trained_bias)))
        elif self.frozen_bias is not None:
            y.add_(self.frozen_bias)
        add_thin(y, terms)
        return y.view(*shape[:-1], rows)

    def _factor_terms(self, x: Tensor, y: Tensor) -> list[Term]:
        """A (V x) and its perturbation, as factors of what is added to ``y``; a dense factor's part is added here."""
        factor, probe = self.trained_factor, self.context.probe
        assert factor is not None and self.basis is not None
        vx = thin_product(x, self.basis)  # (n, rank)
        terms: list[Term] = [(vx, factor.values.T)]
        if probe is None or not probe.moves(factor):
            return terms
        every_row = slice(0, factor.target.rows)
        if not probe.directions.factored:
            u = probe.dense_rows(factor, every_row)
            return [*terms, (vx * probe.side[:, None], u.T)]
        if not probe.has_dense_factor(factor):
            return [*terms, *probe.sign_products(factor, vx, vx.to(y.dtype))]
        u = probe.dense_rows(factor, every_row)
        turned = vx.to(y.dtype) * probe.col_factor(factor)[probe.example]
        _add_dense_term(y, turned, u, probe.by_example, probe.row_factor(factor))
        return terms


class PerturbedHead(nn.Module):
    """The output embedding. Called as a module it passes hidden states through; ``logits`` computes some logits."""

    matrix: Matrix
    context: Context
    frozen_bias: Tensor | None = None
    trained_bias: Trainable | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x

    def logits(self, hidden: Tensor, rows: slice | Tensor, probe: Probe | None) -> Tensor:
        """Logits (n, k) of the vocabulary's ``rows`` (k,) in the compute dtype; ``probe`` is that of the n states."""
        w = self.matrix.tile(rows)
        y = mm(hidden, w.T)
        trained = self.matrix.trained
        if probe is not None and probe.moves(trained):
            if not probe.directions.factored:
                addmm_(y, hidden * probe.side[:, None], probe.dense_rows(trained, rows).T)
            elif not probe.has_dense_factor(trained):
                for k in range(probe.directions.terms):
                    s, r = probe.col_factor(trained, term=k), probe.row_factor(trained, k)
                    addmm_(y, mm(hidden, s.T).mul_(probe.by_example), r[:, rows])
            else:
                turned = hidden * probe.col_factor(trained)[probe.example]
                u, r = probe.dense_rows(trained, rows), probe.row_factor(trained)[:, rows]
                _add_dense_term(y, turned, u, probe.by_example, r)
        if self.trained_bias is not None:
            y.add_(self.trained_bias.values[rows].T.to(y.dtype))
            if probe is not None and probe.moves(self.trained_bias):
                addmm_(y, probe.by_example, probe.vector(self.trained_bias)[:, rows])
        elif self.frozen_bias is not None:
            y.add_(self.frozen_bias[rows])
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
        trained, probe = self.matrix.trained, self.context.probe
        if probe is not None and trained is not None:
            if trained.touched_offset is not None:
                self.context.note_touched(ids, trained.touched_offset)
            if probe.moves(trained):
                self._perturb(ids, out, trained, probe)
        return out.view(*input.shape, cols)

    @staticmethod
    def _perturb(ids: Tensor, out: Tensor, trained: Trainable, probe: Probe) -> None:
        """Add the direction's rows of ``ids`` (n,) to ``out`` (n, cols)."""
        if probe.directions.factored:
            r = probe.row_factor(trained)[:, ids].T.mul(probe.by_example)  # (n, b): c * r_i[token]
            change = mm(r, probe.col_factor(trained))
            for k in range(1, probe.directions.terms):
                r = probe.row_factor(trained, k)[:, ids].T.mul(probe.by_example)
                addmm_(change, r, probe.col_factor(trained, term=k))
        else:
            change = probe.side[:, None].expand(out.shape)
        if probe.has_dense_factor(trained):
            unique, inverse = torch.unique(ids, return_inverse=True)
            change = change * probe.dense_rows(trained, unique)[inverse]
        out.add_(change)


class PerturbedNorm(nn.Module):
    """y = weight * xhat + bias, both trained; ``norm`` makes xhat as the module does."""

    context: Context
    norm: Norm
    trained_weight: Trainable
    trained_bias: Trainable | None

    def forward(self, x: Tensor) -> Tensor:
        probe = self.context.probe
        weight = self.trained_weight.values[:, 0]
        perturbed: Tensor | None = None  # (n, d), a weight for each token
        if probe is not None and probe.moves(self.trained_weight):
            perturbed = mm(probe.by_example, probe.vector(self.trained_weight)).float().add_(weight)
        if self.trained_bias is None:
            fused = self.norm.fused(x, weight if perturbed is None else perturbed)
            if fused is not None:
                return fused
        hat = self.norm(x)
        scale = weight if perturbed is None else self._as_tokens(perturbed, x)
        y = hat * (scale + self.norm.offset).to(hat.dtype)
        if self.trained_bias is not None:
            y = y + self.trained_bias.values[:, 0].to(hat.dtype)
            if probe is not None and probe.moves(self.trained_bias):
                change = mm(probe.by_example, probe.vector(self.trained_bias))
                y = y + self._as_tokens(change, x)
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
