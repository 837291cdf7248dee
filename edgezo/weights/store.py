"""The weight store: every matrix of the model, what is trained of it, and the one place where a step's update is made.

Whatever is trained along directions is changed here alone: by ``apply`` at a step, by ``replay``, ``catch_up`` and
``finish`` for steps of the past. (The exact head and LoRA's matrices have a gradient and an ``update`` of their own, in
network/.) A step's recipe is a few numbers; from it and the run's seed every
trained tensor theta is moved, tile by tile:

    theta  <-  start + (1 - decay) * (theta - start)  -  rule(s * sum_i c_i D_i)               ``WeightStore.advance``

    start  0, or with --weight-decay-to base what the base has: anchored decay, arXiv 2605.30148
    D_i    direction of example i, redrawn from its seed (zo/directions.py), as the mask shapes it (zo/masks.py)
    c_i    coefficient of example i, made from its losses (zo/credit.py); in the recipe (zo/recipe.py)
    s      scale that the mask gives the tensor in this step; 0: the tensor stays as it is
    rule   sgd, momentum, adam, ... (zo/rules.py)

What is trained is a flat table of ``Trainable``s, of whatever kind, so that an update is one loop:

    lowrank   A (d_out, rank) fp32 beside a linear, y += A (V x), V = +-1/sqrt(rank) fixed by the seed
    full      the matrix itself (dense, or int8 codes: requantise.py), biases and norm weights as vectors
    norms     norm weights and all biases, fp32 vectors
    scales    one relative gain g >= -1 per output row of a linear, y = (1 + g) * (W x); folds into quantisation scales

Which rows a step moves is in tile.py, how values are rounded in layouts.py, how they are saved in saved.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgezo.machine.philox import CPU
from edgezo.machine.transfers import uploaded
from edgezo.weights.fused_update import fusible, update_by_kernel
from edgezo.weights.inverse_roots import InverseRoots
from edgezo.weights.layouts import Dense, Int8, Layout, TrainedLayout
from edgezo.weights.recent import Recent, is_live
from edgezo.weights.requantise import (
    ReplayedMatrix,
    last_requantised,
    requantise_due,
    split_where_due,
)
from edgezo.weights.tile import (
    Tile,
    member_of,
    moves_by_example,
    tile_rows,
    touched_tiles,
)
from edgezo.weights.trainable import Trainable
from edgezo.zo import noise
from edgezo.zo.directions import Directions, Target, centred
from edgezo.zo.masks import Mask
from edgezo.zo.noise import Key
from edgezo.zo.recipe import Recipe
from edgezo.zo.rules import UPDATE_RULES, Rule, votes_needed

if TYPE_CHECKING:
    from edgezo.weights.residency import Residency

RECIPES_AT_ONCE = 64  # steps that a replay applies in one sweep over the weights


@dataclass
class WeightStore:
    """All weights of a model. ``layouts`` holds matrices by parameter name, ``vectors`` the frozen 1-D tensors."""

    seed: int
    rank: int
    directions: Directions
    device: torch.device = CPU
    mask: Mask = field(default_factory=Mask)
    rule: Rule = UPDATE_RULES["sgd"]
    # SVRG: a copy of each trained tensor, as it was at the anchor, is kept beside it.
    anchored: bool = False
    layouts: dict[str, Layout] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    trainables: dict[str, Trainable] = field(default_factory=dict)
    residency: Residency | None = None  # the blocks that are not in memory; None where all are
    # Mask `block`: the scale of each tensor's direction in the step being probed. An update takes the scales of its
    # step from the recipe.
    scales: Mapping[str, float] = field(default_factory=dict)
    # What the directions of the step being probed take up of past ones (zo/echoes.py); (): nothing.
    echo: tuple[float, ...] = ()
    # (first, stop) -> the recipes of steps [first, stop): for a replay, and for blocks that lack steps.
    history: Callable[[int, int], Iterable[Recipe]] | None = None
    roots: InverseRoots = field(default_factory=InverseRoots)  # of --rule orthogonal
    vote_size: float = 0.0  # how far --rule vote moves a weight that is no code
    recent: Recent = field(default_factory=Recent)  # steps that a rule looks back on
    after_tile: Callable[[], object] = int  # called when a tile of an update has been written

    # -- what is trained ----------------------------------------------------------------------------------

    def train(
        self,
        name: str,
        layout: TrainedLayout,
        *,
        vector: bool = False,
        touched_offset: int | None = None,
        fixed_rows: Tensor | None = None,
    ) -> Trainable:
        """Register ``layout`` as trained under ``name``; the other arguments are fields of ``Trainable``."""
        target = Target(name, layout.shape[0], layout.shape[1], vector)
        trainable = Trainable(target, layout, touched_offset, fixed_rows)
        self.trainables[name] = trainable
        return trainable

    def train_vector(self, name: str, start: Tensor) -> Trainable:
        """Register a 1-D tensor, trained in fp32 from ``start`` (n,)."""
        return self.train(
            name, Dense(start.to(self.device, torch.float32, copy=True).reshape(-1, 1)), vector=True
        )

    def prepare(self) -> None:
        """Make the state of mask and rule. Every trained tensor must have the base's values."""
        for trainable in self.trainables.values():
            self.mask.prepare(trainable)
            rows, cols = trainable.layout.shape
            in_span = self._in_span(trainable)
            mask_cols = 1 if self.mask.by_row else cols
            rule_cols = self.directions.rank if in_span else cols
            state = {n: torch.ones(rows, mask_cols, device=self.device) for n in self.mask.states}
            trainable.every_row = bool(self.rule.states)
            for name in () if self.rule.looks_back else self.rule.states:
                state[name] = torch.zeros(rows, rule_cols, device=self.device)
            if self.anchored:
                state["anchor"] = trainable.values.clone()
            if in_span:  # the number of the basis that the coordinates are in
                state["epoch"] = torch.zeros(rows, 1, device=self.device)
            trainable.state = state

    def keep_only(self, names: Collection[str]) -> None:
        """Train nothing but ``names``: no loss depends on the others. To be called before the first step."""
        self.trainables = {name: t for name, t in self.trainables.items() if name in names}
        self.__dict__.pop("_places", None)

    def basis(self, name: str, cols: int) -> Tensor:
        """V of a low-rank factor, (rank, cols) fp32 on the CPU: signs over sqrt(rank), a function of the seed alone.

        With this scale sigma * r t^T V has the same Frobenius norm as the full-weight direction sigma * r s^T.
        """
        key, tensor = Key(self.seed, 0), noise.tensor_id(name)
        signs = noise.signs(key, tensor, noise.BASIS, slice(0, self.rank), cols)
        return signs.float() / self.rank**0.5

    # -- steps --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, recipes: Sequence[Recipe]) -> None:
        """Make the updates of consecutive steps, tile by tile; several at once give the same bits as one by one.

        A block that is not in memory takes them from ``history`` when it is next loaded.
        """
        trainables = self._in_memory()
        requantised = [t for t in trainables if t.open_base is not None]
        for some in split_where_due(recipes) if requantised else (recipes,):
            self._update(trainables, some)
            if requantised and requantise_due(steps := some[-1].step + 1):
                self._requantise(requantised, steps)
        if self.residency is not None and recipes:
            self.residency.target = recipes[-1].step + 1

    def _update(self, trainables: Sequence[Trainable], recipes: Sequence[Recipe]) -> None:
        """Take ``trainables`` through the steps of ``recipes``. Each tile is read once and written once."""
        live = [r for r in recipes if is_live(r)]
        past = self._looked_back_on(recipes)
        coefficients = [uploaded(torch.from_numpy(r.coefficients), self.device) for r in live]
        for trainable in trainables if live else ():
            layout = trainable.layout
            if fusible(self, trainable, live):
                for recipe, c in zip(live, coefficients, strict=True):
                    update_by_kernel(self, trainable, recipe, c)
                continue
            if moves_by_example(trainable):
                for recipe, c in zip(live, coefficients, strict=True):
                    for tile in touched_tiles(trainable, recipe, c):
                        theta = self._advance_on_grid(tile, layout.read(tile.rows))
                        layout.write(tile.rows, theta)
                        self.after_tile()
                continue
            for rows in tile_rows(trainable):
                theta, state = layout.read(rows), None
                for number, (recipe, c) in enumerate(zip(live, coefficients, strict=True)):
                    member = member_of(trainable, recipe, rows, self.device)
                    tile = Tile(trainable, recipe, c, rows, member)
                    if self.rule.looks_back:
                        if state is None or self.rule.looks_back < math.inf:
                            state = self._state_before(tile, theta, [*past, *live[:number]])
                        tile = tile._replace(state=state)
                    theta = self._advance_on_grid(tile, theta)
                layout.write(rows, theta)
                self.after_tile()
        if self.rule.looks_back:
            self.recent.add(recipes, self.rule.looks_back)

    def _looked_back_on(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """The steps before ``recipes`` whose g the rule goes through."""
        if not (self.rule.looks_back and recipes):
            return []
        first = recipes[0].step
        return self.recent.before(first, self.rule.looks_back, self.history)

    def _state_before(self, tile: Tile, theta: Tensor, past: Sequence[Recipe]) -> dict[str, Tensor]:
        """The rule's state of a tile before its step, made from zeros by the g of the last of ``past``."""
        rows, cols = tile.rows, tile.trainable.target.cols
        n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        state = {name: torch.zeros(n, cols, device=self.device) for name in self.rule.states}
        since = tile.recipe.step - self.rule.looks_back
        for recipe in past:
            scale = self.scale(tile.trainable, recipe)
            if recipe.step < since or scale == 0.0:
                continue
            c = torch.from_numpy(recipe.coefficients).to(self.device)
            member = member_of(tile.trainable, recipe, rows, self.device)
            g, _ = self._weighted_sum(Tile(tile.trainable, recipe, c, rows, member), theta)
            self.rule.step(state, g if scale == 1.0 else g * scale, recipe.step + 1)
        return state

    def _advance_on_grid(self, tile: Tile, theta: Tensor) -> Tensor:
        """``advance``, rounded to the grid on which the tensor is stored. ``theta`` may be overwritten."""
        if not self.advance(tile, theta):
            return theta
        trainable, key = tile.trainable, Key(self.seed, tile.recipe.step)
        return trainable.layout.snap(theta, key, trainable.target.id, tile.rows)

    def advance(self, tile: Tile, theta: Tensor) -> bool:
        """theta <- (1 - decay) theta - rule(s sum_i c_i D_i): one step of some rows, in place, not yet rounded.

        ``theta``: (n, cols) fp32, the rows of ``tile``. False where the step leaves the tensor as it is.
        """
        recipe, trainable = tile.recipe, tile.trainable
        scale = self.scale(trainable, recipe)
        if scale == 0.0:
            return False
        unmasked = None
        if self.rule.name == "orthogonal" and not trainable.target.vector:
            change = self._orthogonal_change(tile)
        elif self._in_span(trainable):
            change = self._change_in_basis(tile, scale)
        else:
            g, unmasked = self._weighted_sum(tile, theta)
            change = self._ruled(tile, g if scale == 1.0 else g * scale)
        if self.mask.states:
            assert unmasked is not None
            self._learn_curvature(tile, unmasked)
        if recipe.anchor == recipe.step:
            trainable.state["anchor"][tile.rows] = theta
        elif recipe.pull:
            change = change + self._anchor_estimate(tile)
        if recipe.decay:
            shrink(theta, recipe.decay, trainable.start(tile.rows))
        theta.sub_(change)
        if trainable.least is not None:
            theta.clamp_(min=trainable.least)
        return True

    def scale(self, trainable: Trainable, recipe: Recipe) -> float:
        """s: what the tensor's direction was multiplied by in the recipe's step."""
        finetuned = 1.0
        if recipe.scales is not None:
            finetuned = float(recipe.scales[self._places[trainable.target.name]])
        return self.mask.scale(Key(self.seed, recipe.step), trainable, finetuned)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """Place of each trained tensor in a recipe's scales: by name, wherever the tensors lie."""
        return {name: place for place, name in enumerate(sorted(self.trainables))}

    def directions_of(self, recipe: Recipe) -> Directions:
        """The directions as the step of a recipe had them."""
        if recipe.echo is None:
            return self.directions
        return self.directions._replace(echo=tuple(recipe.echo.tolist()))

    def _weighted_sum(self, tile: Tile, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """sum_i c_i D_i, (n, cols) fp32, and U before the mask was applied (None without such a mask)."""
        trainable, recipe, coefficients, rows, member, _ = tile
        key = Key(self.seed, recipe.step)
        unmasked: list[Tensor] = []

        def shape(u: Tensor) -> Tensor:
            unmasked.append(u)
            as_read = functools.partial(trainable.layout.as_read, rows, theta)
            return self.mask.shape(u, key, trainable, rows, as_read, probing=False)

        shaped = shape if self.mask.shapes(trainable) else None
        guides = recipe.guides.get(trainable.target.name)
        g = self.directions_of(recipe).weighted_sum(
            key, trainable.target, coefficients, rows, member, shaped, guides
        )
        return g, unmasked[0] if unmasked else None

    @torch.no_grad()
    def estimate(self, recipe: Recipe) -> Iterator[tuple[Trainable, slice | Tensor, Tensor]]:
        """s sum_i c_i D_i, the gradient estimate before any rule, by tile: (trainable, rows, (n, cols) fp32).

        Nothing changes. Not for blocks that are not in memory.
        """
        c = torch.from_numpy(recipe.coefficients).to(self.device)
        for trainable in self.trainables.values():
            scale = self.scale(trainable, recipe)
            for rows in tile_rows(trainable) if scale else ():
                member = member_of(trainable, recipe, rows, self.device)
                tile = Tile(trainable, recipe, c, rows, member)
                g, _ = self._weighted_sum(tile, trainable.layout.read(rows))
                yield trainable, rows, g * scale

    def _ruled(self, tile: Tile, g: Tensor) -> Tensor:
        """rule(g) of some rows, whose state it changes."""
        if self.rule.name == "sgd":
            return g
        if self.rule.name == "vote":
            return self._elected(tile, g)
        trainable, recipe, rows = tile.trainable, tile.recipe, tile.rows
        state = tile.state
        if state is None:
            state = {name: trainable.state[name][rows] for name in self.rule.states}
        change = self.rule.step(state, g, recipe.step + 1) * recipe.rate
        for name, part in state.items() if tile.state is None else ():
            trainable.state[name][rows] = part
        if self.directions.dense == "centred":
            change = change / self._centred_scale(tile)
        return change

    def _elected(self, tile: Tile, g: Tensor) -> Tensor:
        """The change that votes ``g`` (n, cols) are for: a grid step, or sigma, where enough agree (nano-egg)."""
        needed = votes_needed(tile.recipe.rate, float(np.square(tile.recipe.coefficients).sum()))
        unit = tile.trainable.layout.grid_step(tile.rows)
        passed = (g.abs() >= needed) & (g != 0)
        return g.sign() * passed * (self.vote_size if unit is None else unit)

    def _centred_scale(self, tile: Tile) -> Tensor:
        """sqrt(v + 1e-8) of ZO-AdaMU's rule (arXiv 2312.15184), (n, cols) fp32."""
        key, target, rows = Key(self.seed, tile.recipe.step), tile.trainable.target, tile.rows
        v = centred(key, target, rows, self.device)[1]
        return v.add_(1e-8).sqrt_()

    def _learn_curvature(self, tile: Tile, unmasked: Tensor) -> None:
        """Tell the mask the curvature that the step has measured, of the rows that its directions moved."""
        curvature = torch.full((1, 1), tile.recipe.curvature, device=self.device)
        if tile.member is not None:
            curvature = curvature * tile.member.amax(0)[:, None]
        self.mask.learn(tile.trainable, tile.rows, unmasked, curvature)

    # -- a rule's state in coordinates of a basis -----------------------------------------------------------

    def _in_span(self, trainable: Trainable) -> bool:
        """Whether the rule keeps its state in coordinates of a low-rank basis, not one value for each weight."""
        d = self.directions
        in_basis = d.dense == "lowrank" and (d.strict or not d.factored)
        return bool(self.rule.states) and in_basis and not trainable.target.vector

    def _change_in_basis(self, tile: Tile, scale: float) -> Tensor:
        """N V^T/sqrt(k), where N = rule(coordinates of s sum_i c_i D_i in the basis V), (n, k).

        When V is drawn anew the state goes with it: N <- N V_old^T V_new/cols (LOZO-M, arXiv 2410.07698).
        """
        trainable, recipe, coefficients, rows, member, _ = tile
        key, target, d = Key(self.seed, recipe.step), trainable.target, self.directions
        basis, epoch = d.basis(key, target, self.device), recipe.step // d.refresh
        last = int(trainable.state["epoch"][rows][0])
        if last != epoch:
            before = d.basis(Key(self.seed, last * d.refresh), target, self.device)
            turn = before.T @ basis / target.cols
            for name in self.rule.states:
                trainable.state[name][rows] = _combination(trainable.state[name][rows], turn)
            trainable.state["epoch"][rows] = epoch
        g = d.weighted_coordinates(key, target, coefficients, rows, member)
        change = self._ruled(tile, g if scale == 1.0 else g * scale)
        return _combination(change, basis.T).mul_(d.rank**-0.5)

    def _orthogonal_change(self, tile: Tile) -> Tensor:
        """lr sqrt(rows) msign(N) V^T/sqrt(k) on the rows of a tile, (n, cols) fp32 (ZO-Muon, arXiv 2602.17155)."""
        trainable, recipe, coefficients, rows, member, _ = tile
        d, key, target = self.directions, Key(self.seed, recipe.step), trainable.target
        root, moved = self.roots.of(tile, d, key)
        n = d.weighted_coordinates(key, target, coefficients, rows, member)
        basis = d.basis(key, target).T.to(self.device)
        size = recipe.rate * (moved / d.rank) ** 0.5
        return _combination(_combination(n, root), basis).mul_(size)

    # -- the anchor of SVRG ---------------------------------------------------------------------------------

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Inside, everything trained has the values that it had at the anchor (MeZO-SVRG, arXiv 2404.08080)."""
        self._swap_anchor()
        try:
            yield
        finally:
            self._swap_anchor()

    def _swap_anchor(self) -> None:
        for trainable in self.trainables.values():
            layout, state = trainable.layout, trainable.state
            assert isinstance(layout, Dense)
            layout.values, state["anchor"] = state["anchor"], layout.values

    def _anchor_estimate(self, tile: Tile) -> Tensor:
        """pull * D of the anchor's step, (n, cols) fp32: what the anchor's own estimate moves these rows by."""
        recipe = tile.recipe
        pull = torch.tensor([recipe.pull], device=self.device)
        key = Key(self.seed, recipe.anchor or 0)
        return self.directions.weighted_sum(key, tile.trainable.target, pull, tile.rows)

    # -- steps of the past ----------------------------------------------------------------------------------

    @torch.no_grad()
    def replay(self, stop: int) -> None:
        """Bring weights that are as loaded to where the steps before ``stop`` of ``history`` left them.

        One sweep over the weights applies many steps. Re-quantising discards what rounding did before it, so those
        codes skip the steps before they were last made anew.
        """
        trainables = self._in_memory()
        requantised = [t for t in trainables if t.open_base is not None]
        others = [t for t in trainables if t.open_base is None]
        steps = last_requantised(stop) if requantised else 0
        for recipes in self.past(0, steps):
            self._update(others, recipes)
        self._requantise(requantised, steps)
        for recipes in self.past(steps, stop):
            self._update(trainables, recipes)
        if self.residency is not None and stop:
            self.residency.target = stop

    def finish(self, stop: int) -> None:
        """Re-quantise codes at the end of a run of ``stop`` steps. No training may follow."""
        if not requantise_due(stop):  # else that is done already
            trainables = self.trainables.values()
            self._requantise([t for t in trainables if t.open_base is not None], stop)

    @torch.no_grad()
    def _requantise(self, trainables: Sequence[Trainable], steps: int) -> None:
        """Make codes anew from the base and the recipes of the first ``steps`` steps; nothing to do for 0."""
        for trainable in trainables if steps else ():
            assert isinstance(trainable.layout, Int8)
            trainable.layout.fill(ReplayedMatrix(self, trainable, steps))

    def catch_up(self, names: Sequence[str], first: int) -> None:
        """Make the updates from step ``first`` on to matrices of a block that has just been bound."""
        assert self.residency is not None
        trainables = [self.trainables[name] for name in names]
        for recipes in self.past(first, self.residency.target):
            self._update(trainables, recipes)

    def past(self, first: int, stop: int) -> Iterator[list[Recipe]]:
        """The recipes of steps [first, stop), as many at once as one sweep over the weights takes."""
        assert self.history is not None
        recipes = iter(self.history(first, stop))
        while some := list(islice(recipes, RECIPES_AT_ONCE)):
            yield some

    def _in_memory(self) -> list[Trainable]:
        return [t for t in self.trainables.values() if not t.away]

    # -- beside the update ----------------------------------------------------------------------------------

    def take_guides(self, *, learn: bool = True) -> dict[str, Tensor]:
        """What the step's guided directions were made from, by trained tensor; the next step starts anew.

        See ``Trainable.take_guides``. ``learn``: False where the forwards were not those of a step.
        """
        taken = {n: t.take_guides(turn_basis=learn) for n, t in self.trainables.items()}
        return {name: guides for name, guides in taken.items() if guides is not None}


def shrink(theta: Tensor, decay: float, start: Tensor | None) -> None:
    """theta <- start + (1 - decay) (theta - start), in place; ``start`` None is 0."""
    if start is None:
        theta.mul_(1.0 - decay)
        return
    start = start.to(theta.device, theta.dtype)
    theta.sub_(start).mul_(1.0 - decay).add_(start)


def _combination(coordinates: Tensor, basis: Tensor) -> Tensor:
    """(n, k) @ (k, cols), one sum at a time: a product's order of adding may depend on the tile."""
    total = torch.zeros(len(coordinates), basis.shape[1], device=coordinates.device)
    for k in range(basis.shape[0]):
        total += coordinates[:, k : k + 1] * basis[k]
    return total
