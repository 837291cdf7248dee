"""How the tokens of a packed forward are perturbed: along which directions, how far and on which side.

perturb.py computes with it. Noise is made on the device that the tokens are on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from edgezo.machine import gpu_kernels
from edgezo.machine.gpu_kernels import SignRows
from edgezo.machine.matmul import ByExample, Signed, Term, along, dots_by_example, mm
from edgezo.machine.transfers import uploaded
from edgezo.weights.trainable import Trainable
from edgezo.zo.directions import Directions, on_grid, places_of
from edgezo.zo.masks import Mask
from edgezo.zo.noise import COLUMN, ROW, Key, address_of, signs, tensor_id

TOKENS = tensor_id("tokens of an example")
# Width of the table of token signs, so that fixed, so that a sign does not change with the number of examples.
MOST_SLOTS = 1024
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
        example_here: Tensor | None = None,  # ``example`` on the CPU, where it is at hand
    ):
        self.directions, self.key, self.sigma, self.slots = directions, key, sigma, tuple(slots)
        self.mask, self.signs = mask or Mask(), tuple(signs)
        self.owners = self.slots if owners is None else tuple(owners)
        self.scales, self._example_here = scales, example_here
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
        d, target = self.directions, trainable.target
        r = self._to_compute(d.row_signs(self.key, target, self.slots, self.device, term))
        scale = self.scale(trainable) * d.terms**-0.5
        return r if scale == 1.0 else r * scale

    def col_factor(self, trainable: Trainable, x: Tensor | None = None, term: int = 0) -> Tensor:
        """s_ik, k = ``term``, (b, cols); with guides v_i, made from ``x`` (n, cols) that a product reads, and kept."""
        if trainable.guides is None or x is None:
            d, target = self.directions, trainable.target
            return self._to_compute(d.col_signs(self.key, target, self.slots, self.device, term))
        n = len(self.token_signs[0])
        assert n * len(self.signs) == len(x)
        v = sum(along(self.token_signs, x[part]) for part, _ in self.parts(len(x)))
        assert isinstance(v, Tensor)
        v = on_grid(v / v.norm(dim=1, keepdim=True)).to(x.dtype)
        trainable.guides.update(zip(self.slots, v, strict=True))
        return v

    def sign_products(self, trainable: Trainable, x: Tensor, read: Tensor) -> list[Term | Signed]:
        """What directions without a U add to a product of ``x`` (n, cols); guides are made from ``read``, x as well.

        On a GPU the kernels draw r_i and s_i where they need them.
        """
        if self._draws_in_kernels(trainable, x):
            drawn = self._drawn(trainable, COLUMN, trainable.target.cols)
            values = gpu_kernels.signed_dots(x, self.example, self.side, drawn)
            rows = self._drawn(trainable, ROW, trainable.target.rows)
            return [Signed(values, self.example, rows._replace(scale=self.scale(trainable)))]
        each = range(self.directions.terms)
        cols = [self.col_factor(trainable, read, k) for k in each]
        terms: list[Term | Signed] = [
            (self.col_products(x, cols[k]), self.row_factor(trainable, k)) for k in each
        ]
        if (leans := self.directions.leans) is not None:  # c * b_i * (g x), g = left right^T
            left, right, _ = self.directions.leant_on(self.key, trainable.target, self.device)
            side = mm(self.by_example, self._to_compute(leans[list(self.slots), None]))
            product = mm(x.to(side.dtype), self._to_compute(right)).mul_(side)
            terms.append((product, self._to_compute(left.T)))
        return terms

    def _draws_in_kernels(self, trainable: Trainable, x: Tensor) -> bool:
        """Whether the products with r_i and s_i are made by kernels that draw them."""
        d = self.directions
        drawn = trainable.guides is None and not d.strict and d.terms == 1 and d.leans is None
        return drawn and gpu_kernels.takes(x, self.example)

    def _drawn(self, trainable: Trainable, stream: int, width: int) -> SignRows:
        address = address_of(self.key, trainable.target.id, stream)
        return SignRows(address, places_of(self.slots, self.device), width)

    def col_products(self, x: Tensor, cols: Tensor) -> Tensor | ByExample:
        """c * (s_i . x) of each token, s_i = cols[i], as a left factor (n, b)."""
        return dots_by_example(x, cols, self.example, self.by_example, self.side)

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
        example = (self.example if self._example_here is None else self._example_here)[:n].cpu()
        order = torch.argsort(example, stable=True)
        counts = torch.bincount(example, minlength=len(self.slots))
        place = torch.empty_like(order)
        place[order] = torch.arange(n) - (counts.cumsum(0) - counts)[example[order]]
        longest = int(counts.max())
        table = signs(self.key, TOKENS, COLUMN, slice(0, longest), MOST_SLOTS)
        z = torch.zeros(len(self.slots), n, dtype=torch.int8)
        slot = torch.tensor(self.slots)[example]
        z[example, torch.arange(n)] = table[place, slot]
        return self._to_compute(uploaded(z, self.device))

    def has_dense_factor(self, trainable: Trainable) -> bool:
        """Whether the direction has a factor U of the weight's size."""
        return self.directions.dense is not None or self.mask.shapes(trainable)

    def has_thin_factors(self, trainable: Trainable) -> bool:
        """Whether U is a product of thin factors, which need not be multiplied out."""
        return self.directions.of_rank and not self.mask.shapes(trainable)

    def dense_rows(self, trainable: Trainable, rows: slice | Tensor) -> Tensor:
        """Rows of U after the mask, (k, cols)."""
        target, basis = trainable.target, trainable.basis
        u = self.directions.dense_rows(self.key, target, rows, basis, self.device)
        if self.mask.shapes(trainable):

            def weights() -> Tensor:
                return trainable.layout.expand(rows, torch.empty_like(u))

            u = self.mask.shape(u, self.key, trainable, rows, weights, probing=True)
        return self._scaled(trainable, u)

    def thin_factors(self, trainable: Trainable) -> tuple[Tensor, Tensor]:
        """(left, right) of U = left @ right^T, (rows, k) and (cols, k)."""
        target, basis = trainable.target, trainable.basis
        left, right, scale = self.directions.factors(self.key, target, basis, self.device)
        return self._scaled(trainable, left * scale), self._to_compute(right)

    def vector(self, trainable: Trainable) -> Tensor:
        """D_i of a vector, (b, rows)."""
        target = trainable.target
        if not self.mask.shapes(trainable):
            made = self.directions.vectors(self.key, target, self.slots, self.device)
            d = self._to_compute(made)
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

    @property
    def device(self) -> torch.device:
        """Where the tokens are, and where their noise is made."""
        return self.by_example.device

    def _to_compute(self, noise: Tensor) -> Tensor:
        """Noise on the device in the compute dtype."""
        return noise.to(self.device).to(self.by_example.dtype)
