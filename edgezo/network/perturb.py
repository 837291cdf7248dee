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

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgezo.machine import gpu_kernels
from edgezo.machine.limits import TILE_BYTES, tiles
from edgezo.machine.matmul import (
    Signed,
    Term,
    add_thin,
    addmm_,
    fill_thin,
    mm,
    thin_product,
)
from edgezo.machine.philox import CPU
from edgezo.network.fused import Norm
from edgezo.network.probe import Probe
from edgezo.weights.layouts import Layout
from edgezo.weights.trainable import Trainable

DENSE_TERM_PIECES = 4  # a dense term is added in pieces of this share of a tile


class Touched(NamedTuple):
    """Rows of an embedding table that the tokens of one forward used."""

    owners: tuple[int, ...]  # slots of the examples; () if they share directions
    example: Tensor  # (n,) int64, index into ``owners``
    rows: Tensor  # (n,) int64, as ``Recipe.touched`` numbers them

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(slot, row) of each token, (n,) int64. Waits for the device."""
        rows = self.rows.cpu().numpy()
        slot = np.zeros_like(rows)
        if self.owners:
            slot = np.array(self.owners)[self.example.cpu().numpy()]
        return slot, rows


EXPANDED = "expand"  # the buffer of a tile in the compute dtype


@dataclass
class Context:
    """What every perturbed module of one model shares."""

    dtype: torch.dtype  # compute dtype
    device: torch.device = CPU
    probe: Probe | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    touched: list[Touched] = field(default_factory=list)  # since they were last taken

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
        """Remember which rows of an embedding table each example used; nothing waits for the device here."""
        assert self.probe is not None
        # Of all sides: where sides write text, their tokens differ.
        self.touched.append(Touched(self.probe.owners, self.probe.example, ids + offset))


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

    def sign_terms(self, x: Tensor) -> list[Term | Signed]:
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
        if self._fills_first(x):
            return self._filled(x, y).view(*shape[:-1], rows)
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

    def _fills_first(self, x: Tensor) -> bool:
        """Whether the thin terms are written first, so that W x is added to them: on a GPU a pass over y less."""
        probe = self.context.probe
        if self.trained_gain is not None or not gpu_kernels.takes(x):
            return False
        trained = (self.matrix.trained, self.trained_factor)
        return probe is None or not any(
            probe.moves(t) and probe.has_dense_factor(t) for t in trained
        )

    def _filled(self, x: Tensor, y: Tensor) -> Tensor:
        """W x and all thin terms in ``y`` (n, rows), which has any values."""
        probe, terms = self.context.probe, self.matrix.sign_terms(x)
        if self.trained_factor is not None:
            terms += self._factor_terms(x, y)
        bias = self.frozen_bias
        if self.trained_bias is not None:
            bias = self.trained_bias.values[:, 0]
            if probe is not None and probe.moves(self.trained_bias):
                terms.append((probe.by_example, probe.vector(self.trained_bias)))
        if bias is not None:
            terms.append((x.new_ones(len(x), 1), bias[None]))
        if terms:
            fill_thin(y, terms)
        for tile in tiles(*self.matrix.layout.shape, y.element_size()):
            w = self.matrix.tile(tile)
            addmm_(y[:, tile], x, w.T) if terms else mm(x, w.T, y[:, tile])
        return y

    def _factor_terms(self, x: Tensor, y: Tensor) -> list[Term | Signed]:
        """A (V x) and its perturbation, as factors of what is added to ``y``; a dense factor's part is added here."""
        factor, probe = self.trained_factor, self.context.probe
        assert factor is not None and self.basis is not None
        vx = thin_product(x, self.basis)  # (n, rank)
        terms: list[Term | Signed] = [(vx, factor.values.T)]
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
        if not probe.has_dense_factor(trained):
            out.add_(change)
        elif ids.device.type == "cpu":
            unique, inverse = torch.unique(ids, return_inverse=True)
            out.add_(change * probe.dense_rows(trained, unique)[inverse])
        else:  # how many different tokens there are, only waiting for the device would tell
            for part in tiles(*out.shape):
                out[part].add_(change[part] * probe.dense_rows(trained, ids[part]))


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
