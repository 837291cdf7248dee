"""The weight store: every matrix of the model in its layout, what is trained beside them, and the one mutator.

Nothing but ``WeightStore.apply`` changes a weight. What is trained is a flat table of ``Trainable`` rows, whatever
its kind, so an update is one loop:

    lowrank   A (d_out, rank) fp32 beside a linear, y += A (V x), V = +-1/sqrt(rank) fixed by the seed
    full      the matrix itself (dense, or int8 codes: requantise.py), biases and norms as vectors
    norms     norm weights and all biases, fp32 vectors
    scales    one relative gain g >= -1 per output row of a linear, y = (1 + g) * (W x); folds into quantisation scales
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine.limits import tiles
from edgezo.weights import requantise
from edgezo.weights.layouts import CPU, Dense, Int8, Layout, TrainedLayout
from edgezo.weights.trainable import Saved, Trainable
from edgezo.zo import noise
from edgezo.zo.directions import Directions, Target, centred, orthonormal
from edgezo.zo.masks import Mask
from edgezo.zo.noise import Key
from edgezo.zo.recipe import Recipe
from edgezo.zo.rules import RULES, Rule

RECIPES_AT_ONCE = 64  # one sweep over the weights for so many past steps

if TYPE_CHECKING:
    from edgezo.weights.residency import Residency


@dataclass
class WeightStore:
    """All weights of a model. ``layouts`` holds matrices by parameter name, ``vectors`` the frozen 1-D tensors."""

    seed: int
    rank: int
    directions: Directions
    device: torch.device = CPU
    mask: Mask = field(default_factory=Mask)
    rule: Rule = RULES["sgd"]
    anchored: bool = False  # each trained tensor's values of an earlier step are kept beside it
    layouts: dict[str, Layout] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    trainables: dict[str, Trainable] = field(default_factory=dict)
    residency: Residency | None = None  # where there are blocks elsewhere
    # Of mask block, in the step that is being probed: what each tensor's direction is multiplied by. Updates have
    # the scales of their own step in the recipe.
    scales: Mapping[str, float] = field(default_factory=dict)
    # The recipes of steps [first, stop), for a replay and for blocks elsewhere that lack them.
    history: Callable[[int, int], Iterable[Recipe]] | None = None

    def train(
        self,
        name: str,
        layout: TrainedLayout,
        *,
        vector: bool = False,
        touched_offset: int | None = None,
        fixed_rows: Tensor | None = None,
    ) -> Trainable:
        """Register ``layout`` as trained under ``name`` and return its row."""
        target = Target(name, layout.shape[0], layout.shape[1], vector)
        row = Trainable(target, layout, touched_offset, fixed_rows)
        self.trainables[name] = row
        return row

    def train_vector(self, name: str, start: Tensor) -> Trainable:
        """Register a 1-D tensor, trained in fp32 from ``start`` (n,)."""
        return self.train(
            name, Dense(start.to(self.device, torch.float32, copy=True).reshape(-1, 1)), vector=True
        )

    def prepare(self) -> None:
        """Make the state of mask and rule, when every trained tensor has the base's values."""
        for row in self.trainables.values():
            self.mask.prepare(row)
            rows, cols = row.layout.shape
            width = self.directions.rank if self._in_span(row) else cols
            wide = 1 if self.mask.by_row else cols
            row.state = {n: torch.ones(rows, wide, device=self.device) for n in self.mask.states}
            for name in self.rule.states:
                row.state[name] = torch.zeros(rows, width, device=self.device)
            if self.anchored:
                row.state["anchor"] = row.values.clone()
            if self._in_span(row):  # which basis the coordinates are in
                row.state["epoch"] = torch.zeros(rows, 1, device=self.device)

    def keep_only(self, names: Collection[str]) -> None:
        """Train nothing else from now on, before the first step: no loss depends on the others."""
        self.trainables = {name: row for name, row in self.trainables.items() if name in names}
        self.__dict__.pop("_places", None)

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Inside, what is trained has the values that it had at the anchor."""
        self._swap_anchor()
        try:
            yield
        finally:
            self._swap_anchor()

    def _swap_anchor(self) -> None:
        for row in self.trainables.values():
            assert isinstance(row.layout, Dense)
            row.layout.values, row.state["anchor"] = row.state["anchor"], row.layout.values

    def _in_span(self, row: Trainable) -> bool:
        """Whether the rule works on coordinates in a basis, not on the weights' own."""
        d = self.directions
        in_basis = d.dense == "lowrank" and (d.strict or not d.factored)
        return bool(self.rule.states) and in_basis and not row.target.vector

    def basis(self, name: str, cols: int) -> Tensor:
        """V of a low-rank factor, (rank, cols) fp32 on the CPU: signs over sqrt(rank), a function of the seed alone.

        With this scale sigma * r t^T V has the same Frobenius norm as the full-weight direction sigma * r s^T.
        """
        key, tensor = Key(self.seed, 0), noise.tensor_id(name)
        signs = noise.signs(key, tensor, noise.BASIS, slice(0, self.rank), cols)
        return signs.float() / self.rank**0.5

    @torch.no_grad()
    def apply(self, recipes: Sequence[Recipe]) -> None:
        """Apply consecutive steps' updates, tile by tile; several at once give the same bits as one by one.

        A block that is elsewhere takes them when it is next bound, from ``history``.
        """
        here = [row for row in self.trainables.values() if not row.away]
        anchored = [row for row in here if row.base is not None]
        for some in requantise.between(recipes) if anchored else (recipes,):
            self._apply_to(here, some)
            if anchored and requantise.due(stop := some[-1].step + 1):
                self._renew(anchored, stop)
        if self.residency is not None and recipes:
            self.residency.target = recipes[-1].step + 1

    @torch.no_grad()
    def replay(self, stop: int) -> None:
        """Bring weights that are as loaded to where steps before ``stop`` of ``history`` left them, many a sweep.

        What rounding did to anchored codes before their last anchor is gone by then, so it is not repeated.
        """
        here = [row for row in self.trainables.values() if not row.away]
        anchored = [row for row in here if row.base is not None]
        at = requantise.last(stop) if anchored else 0
        for recipes in self.past(0, at):
            self._apply_to([row for row in here if row.base is None], recipes)
        self._renew(anchored, at)
        for recipes in self.past(at, stop):
            self._apply_to(here, recipes)
        if self.residency is not None and stop:
            self.residency.target = stop

    def finish(self, stop: int) -> None:
        """Anchor codes at ``stop``, the end of a run; not to be trained on from there."""
        if not requantise.due(stop):  # else they are anchored there already
            self._renew([row for row in self.trainables.values() if row.base is not None], stop)

    @torch.no_grad()
    def _renew(self, rows: Sequence[Trainable], stop: int) -> None:
        for row in rows if stop else ():
            assert isinstance(row.layout, Int8)
            row.layout.fill(requantise.Replayed(self, row, stop))

    def catch_up(self, names: Sequence[str], first: int) -> None:
        """Apply the updates from step ``first`` on to matrices of a block that has just been bound."""
        assert self.residency is not None
        rows = [self.trainables[name] for name in names]
        for recipes in self.past(first, self.residency.target):
            self._apply_to(rows, recipes)

    def past(self, first: int, stop: int) -> Iterator[list[Recipe]]:
        """The recipes of steps [first, stop), as many at once as one sweep over the weights takes."""
        assert self.history is not None
        recipes = iter(self.history(first, stop))
        while some := list(islice(recipes, RECIPES_AT_ONCE)):
            yield some

    def _apply_to(self, rows: Sequence[Trainable], recipes: Sequence[Recipe]) -> None:
        live = [r for r in recipes if r.decay or np.any(r.coefficients) or r.anchor is not None]
        coefficients = [torch.from_numpy(r.coefficients).to(self.device) for r in live]
        for row in rows if live else ():
            if row.touched_offset is not None and not row.state:
                for recipe, c in zip(live, coefficients, strict=True):
                    self._apply_touched(row, recipe, c)
                continue
            for part in _row_sets(row):
                values = row.layout.read(part)
                for recipe, c in zip(live, coefficients, strict=True):
                    # With a state, untouched rows move as well.
                    member = self._members(row, recipe, part)
                    values = self._move(row, recipe, c, part, values, member)
                row.layout.write(part, values)

    def _move(
        self,
        row: Trainable,
        recipe: Recipe,
        coefficients: Tensor,
        rows: slice | Tensor,
        values: Tensor,
        member: Tensor | None = None,
    ) -> Tensor:
        if not self.moved(row, recipe, coefficients, rows, values, member):
            return values
        return row.layout.snap(values, Key(self.seed, recipe.step), row.target.id, rows)

    def moved(
        self,
        row: Trainable,
        recipe: Recipe,
        coefficients: Tensor,
        rows: slice | Tensor,
        values: Tensor,
        member: Tensor | None = None,
    ) -> bool:
        """Take ``values``, (n, cols) fp32 of some rows, one step on, in place and with no rounding to a grid.

        False where the step leaves the tensor alone.
        """
        scale = self.scale(row, recipe)
        if scale == 0.0:
            return False
        if self._in_span(row):
            u, change = None, self._in_basis(row, recipe, coefficients, rows, member)
        else:
            change, u = self._sum(row, recipe, coefficients, rows, values, member)
            change = change if scale == 1.0 else change * scale
            if self.rule.name != "sgd":
                change = self._ruled(row, recipe, change, rows)
        if self.mask.states:
            told = torch.full((1, 1), recipe.curvature, device=self.device)
            if member is not None:
                told = told * member.amax(0)[:, None]
            assert u is not None
            self.mask.learn(row, rows, u, told)
        if recipe.anchor == recipe.step:
            row.state["anchor"][rows] = values
        elif recipe.pull:
            pull = torch.tensor([recipe.pull], device=self.device)
            then = Key(self.seed, recipe.anchor or 0)
            change = change + self.directions.weighted_sum(then, row.target, pull, rows)
        if recipe.decay:
            values.mul_(1.0 - recipe.decay)
        values.sub_(change)
        if row.least is not None:
            values.clamp_(min=row.least)
        return True

    def scale(self, row: Trainable, recipe: Recipe) -> float:
        """What a tensor's direction was multiplied by in the recipe's step."""
        told = 1.0 if recipe.scales is None else float(recipe.scales[self._places[row.target.name]])
        return self.mask.scale(Key(self.seed, recipe.step), row, told)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """Places of the trained tensors in a recipe's scales: by name, wherever they lie."""
        return {name: place for place, name in enumerate(sorted(self.trainables))}

    def _sum(
        self,
        row: Trainable,
        recipe: Recipe,
        coefficients: Tensor,
        rows: slice | Tensor,
        values: Tensor,
        member: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """sum_i c_i D_i of some rows, and the rows of U that the mask has seen."""
        key = Key(self.seed, recipe.step)
        before: list[Tensor] = []

        def shape(u: Tensor) -> Tensor:
            before.append(u)
            seen = functools.partial(row.layout.as_read, rows, values)
            return self.mask.shape(u, key, row, rows, seen, probing=False)

        shaped = shape if self.mask.shapes(row) else None
        guides = recipe.guides.get(row.target.name)
        g = self.directions.weighted_sum(
            key, row.target, coefficients, rows, member, shaped, guides
        )
        return g, before[0] if before else None

    @torch.no_grad()
    def estimate(self, recipe: Recipe) -> Iterator[tuple[Trainable, slice | Tensor, Tensor]]:
        """sum_i c_i D_i tile by tile, before any rule; nothing changes. Not for blocks on disk."""
        c = torch.from_numpy(recipe.coefficients).to(self.device)
        for row in self.trainables.values():
            scale = self.scale(row, recipe)
            for part in _row_sets(row) if scale else ():
                member = self._members(row, recipe, part)
                found, _ = self._sum(row, recipe, c, part, row.layout.read(part), member)
                yield row, part, found * scale

    def _ruled(self, row: Trainable, recipe: Recipe, g: Tensor, rows: slice | Tensor) -> Tensor:
        """The rule's step for the estimate ``g`` of some rows, whose state it changes."""
        state = {name: row.state[name][rows] for name in self.rule.states}
        found = self.rule.step(state, g, recipe.step + 1) * recipe.rate
        for name, part in state.items():
            row.state[name][rows] = part
        if self.directions.dense == "centred":
            found = found / self._centred_scale(row, recipe, rows)
        return found

    def _centred_scale(self, row: Trainable, recipe: Recipe, rows: slice | Tensor) -> Tensor:
        key, target = Key(self.seed, recipe.step), row.target
        lines = [rows] if isinstance(rows, slice) else [slice(r, r + 1) for r in rows.tolist()]
        v = torch.cat([centred(key, target, line)[1] for line in lines]).to(self.device)
        return v.add_(1e-8).sqrt_()

    def _in_basis(
        self,
        row: Trainable,
        recipe: Recipe,
        coefficients: Tensor,
        rows: slice | Tensor,
        member: Tensor | None,
    ) -> Tensor:
        """A rule's step in coordinates: N V^T/sqrt(k), where N is a rule's step for the estimate's coordinates.

        When the basis is drawn anew, N goes with it: N <- N V_old^T V_new/cols (LOZO-M).
        """
        key, target, d = Key(self.seed, recipe.step), row.target, self.directions
        basis, epoch = d.basis(key, target), recipe.step // d.refresh
        last = int(row.state["epoch"][rows][0])
        if last != epoch:
            turn = d.basis(Key(self.seed, last * d.refresh), target).T @ basis / target.cols
            turn = turn.to(self.device)
            for name in self.rule.states:
                row.state[name][rows] = _combination(row.state[name][rows], turn)
            row.state["epoch"][rows] = epoch
        g = d.weighted_coordinates(key, target, coefficients, rows, member)
        if (scale := self.scale(row, recipe)) != 1.0:
            g = g * scale
        return _combination(self._ruled(row, recipe, g, rows), basis.T.to(self.device)).mul_(
            d.rank**-0.5
        )

    @staticmethod
    def own_rows(row: Trainable, recipe: Recipe) -> list[np.ndarray]:
        """Rows of this table that each direction moves."""
        assert row.touched_offset is not None
        start, stop = row.touched_offset, row.touched_offset + row.target.rows
        return [ids[(ids >= start) & (ids < stop)] - start for ids in recipe.touched]

    def _members(self, row: Trainable, recipe: Recipe, part: slice | Tensor) -> Tensor | None:
        """`membership` of a tile of rows; None where every direction moves all of them."""
        if row.touched_offset is None:
            return None
        assert isinstance(part, slice)
        return self.membership(self.own_rows(row, recipe), np.arange(part.start, part.stop))

    def membership(self, own: Sequence[np.ndarray], rows: np.ndarray) -> Tensor:
        """(B, n) 0/1: which directions move which of ``rows``, ascending."""
        found = np.zeros((len(own), len(rows)), np.float32)
        for line, ids in zip(found, own, strict=True):
            at = np.searchsorted(rows, ids)
            at = at[at < len(rows)]
            line[at[rows[at] == ids[: len(at)]]] = (
                1.0  # both ascend: what lies behind is at the end
            )
        return torch.from_numpy(found).to(self.device)

    def _apply_touched(self, row: Trainable, recipe: Recipe, coefficients: Tensor) -> None:
        """Embedding tables: example i moves only the rows that it used."""
        own = self.own_rows(row, recipe)
        union = np.unique(np.concatenate(own)) if own else np.empty(0, np.int64)
        for tile in tiles(len(union), row.target.cols):
            rows = union[tile]
            index = torch.from_numpy(rows.astype(np.int64)).to(self.device)
            values = row.layout.read(index)
            member = self.membership(own, rows)
            values = self._move(row, recipe, coefficients, index, values, member)
            row.layout.write(index, values)

    def nbytes(self) -> int:
        held = {id(layout): layout.nbytes() for layout in self.layouts.values()}
        held |= {id(row.layout): row.layout.nbytes() for row in self.trainables.values()}
        return sum(held.values()) + sum(t.nbytes for t in self.vectors.values())

    def saved(self) -> list[Saved]:
        """Everything that training has changed (low-order planes included), wherever its bytes are."""
        return [
            Saved(
                row.target.name + suffix,
                tuple(tensor.shape),
                tensor.dtype,
                functools.partial(self._pieces, row, suffix),
            )
            for row in self.trainables.values()
            for suffix, tensor in row.layout.tensors().items()
        ]

    def _pieces(self, row: Trainable, suffix: str) -> Iterator[Tensor]:
        if row.away:
            assert self.residency is not None
            self.residency.bind_owner(row.target.name)
        for rows in tiles(*row.layout.shape):
            yield row.layout.raw(rows)[suffix]

    def take_guides(self, *, learn: bool = True) -> dict[str, Tensor]:
        """What the directions of the step were made from, by trained tensor; the next step starts anew.

        The v_i of all examples, (B, cols); of a shared direction its basis, (k, cols), which then turns to the
        inputs that were seen, unless they were no step's (``learn``).
        """
        found = {}
        for row in self.trainables.values():
            if row.basis is not None:
                found[row.target.name] = row.basis
                if learn and row.sketch is not None and bool(row.sketch.isfinite().all()):
                    row.basis = orthonormal(row.sketch).to(row.basis.dtype)
                row.sketch = None
            if row.guides:
                found[row.target.name] = torch.stack([row.guides[i] for i in sorted(row.guides)])
                row.guides.clear()
        return found

    def kept(self) -> dict[str, Tensor]:
        """All that training has changed, the rule's state included, in memory and by name."""
        states = {
            f"{row.target.name}@{name}": tensor
            for row in self.trainables.values()
            for name, tensor in row.state.items()
        }
        bases = {f"{r.target.name}@basis": r.basis for r in self.trainables.values()}
        return self.trained_tensors() | states | {n: b for n, b in bases.items() if b is not None}

    def trained_tensors(self) -> dict[str, Tensor]:
        """The same in memory, by name; not for blocks elsewhere."""
        return {
            row.target.name + suffix: tensor
            for row in self.trainables.values()
            for suffix, tensor in row.layout.tensors().items()
        }

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Take the values that ``trained_tensors`` gave in another process. Raises EdgezoError on any mismatch."""
        own = self.trained_tensors()
        for name, held in own.items():
            given = tensors.get(name)
            if given is None or given.shape != held.shape or given.dtype != held.dtype:
                found = "missing" if given is None else f"{tuple(given.shape)} {given.dtype}"
                raise EdgezoError(
                    f"the trained tensor {name} should be {tuple(held.shape)} {held.dtype}, but it is {found}.\n"
                    "The file belongs to another model, precision or --train choice."
                )
            held.copy_(given)


def _combination(coordinates: Tensor, basis: Tensor) -> Tensor:
    """(n, k) @ (k, cols), one sum at a time: a product's order of adding may depend on the tile."""
    found = torch.zeros(len(coordinates), basis.shape[1], device=coordinates.device)
    for k in range(basis.shape[0]):
        found += coordinates[:, k : k + 1] * basis[k]
    return found


def _row_sets(row: Trainable) -> Iterable[slice | Tensor]:
    if row.fixed_rows is not None:
        return [row.fixed_rows]
    return tiles(row.target.rows, row.target.cols)


def saved_sha256(saved: Iterable[Saved]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in name order: equal exactly when every bit is equal."""
    digest = hashlib.sha256()
    for tensor in sorted(saved, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}\n".encode())
        for piece in tensor.bytes():
            digest.update(piece)
    return digest.hexdigest()
