"""Updates that one kernel of a GPU makes: read, summed, rounded and written at once (machine/gpu_kernels.py).

What no kernel is made for (masks, rules with a state, tables that move by example, codes, vectors) is updated tile by
tile, as on a CPU. The bits are equal either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from edgezo.machine import gpu_kernels
from edgezo.weights.layouts import Dense
from edgezo.weights.trainable import Trainable
from edgezo.zo import noise
from edgezo.zo.directions import Directions
from edgezo.zo.masks import Mask
from edgezo.zo.noise import Key
from edgezo.zo.recipe import Recipe
from edgezo.zo.rules import Rule


class Updates(Protocol):
    """What these updates ask of the weight store (store.py)."""

    seed: int
    directions: Directions
    device: torch.device
    mask: Mask
    rule: Rule
    anchored: bool

    def scale(self, trainable: Trainable, recipe: Recipe) -> float: ...


def fusible(store: Updates, trainable: Trainable, recipes: Sequence[Recipe]) -> bool:
    """Whether one kernel makes the whole update of a tensor, in each of some steps."""
    layout, directions = trainable.layout, store.directions
    if not isinstance(layout, Dense) or not gpu_kernels.takes(layout.values):
        return False
    whole = trainable.touched_offset is None and trainable.fixed_rows is None
    drawn = directions.dense in gpu_kernels.DENSE_KINDS and not directions.strict
    drawn = drawn and directions.terms == 1 and all(r.echo is None for r in recipes)
    as_stored = layout.values.dtype is torch.float32 or (
        layout.values.dtype is torch.bfloat16 and layout.low is not None
    )
    plain = store.rule.name == "sgd" and not store.anchored and trainable.least is None
    shaped = store.mask.shapes(trainable) or bool(store.mask.states)
    guided = directions.guided or trainable.target.vector
    return whole and drawn and as_stored and plain and not shaped and not guided


def update_by_kernel(
    store: Updates, trainable: Trainable, recipe: Recipe, coefficients: Tensor
) -> None:
    """Take a tensor that is ``fusible`` through one step."""
    scale = store.scale(trainable, recipe)
    if scale == 0.0:
        return
    layout, target, directions = trainable.layout, trainable.target, store.directions
    assert isinstance(layout, Dense)
    key = Key(store.seed, recipe.step)
    step = gpu_kernels.Update(
        coefficients,
        recipe.decay,
        scale,
        directions.factored,
        directions.dense,
        rows=noise.address_of(key, target.id, noise.ROW),
        cols=noise.address_of(key, target.id, noise.COLUMN),
        factor=noise.address_of(key, target.id, noise.DENSE),
        table=noise.normals_on(store.device) if directions.dense == "normals" else None,
    )
    gpu_kernels.update(layout.values, layout.low, slice(0, target.rows), step)
