"""Which rows of a trained tensor a step moves, and along which of its directions.

Most tensors move as a whole, a tile of rows at a time. An embedding table moves by example: example i moves only the
rows that it used, so that each row has directions of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgezo.machine.limits import tiles
from edgezo.weights.trainable import Trainable
from edgezo.zo.recipe import Recipe


class Tile(NamedTuple):
    """Some rows of one trained tensor in one step: all that the update of these rows is made from."""

    trainable: Trainable
    recipe: Recipe
    coefficients: Tensor  # (K,) fp32, the recipe's on the store's device
    rows: slice | Tensor  # n rows; as numbers (n,) int64 on the store's device
    member: Tensor | None = None  # (K or 1, n) 0/1: which directions move which rows; None: all
    # The rule's state of these rows, by name, (n, cols) fp32, where it is made anew; None: the trainable keeps it.
    state: dict[str, Tensor] | None = None


def tile_rows(trainable: Trainable) -> Iterable[slice | Tensor]:
    """The rows that a step may move, a bounded number at a time."""
    if trainable.fixed_rows is not None:
        return [trainable.fixed_rows]
    return tiles(trainable.target.rows, trainable.target.cols)


def moves_by_example(trainable: Trainable) -> bool:
    """Whether a step leaves alone the rows that no example used. With a state (momentum, say) those move as well."""
    return trainable.touched_offset is not None and not (trainable.state or trainable.every_row)


def rows_by_direction(trainable: Trainable, recipe: Recipe) -> list[np.ndarray]:
    """The rows of an embedding table that each direction moves, ascending, counted from the table's first row."""
    assert trainable.touched_offset is not None
    start = trainable.touched_offset
    stop = start + trainable.target.rows
    return [rows[(rows >= start) & (rows < stop)] - start for rows in recipe.touched]


def union_of(by_direction: Sequence[np.ndarray]) -> np.ndarray:
    """Rows that any direction moves, ascending and each once."""
    return np.unique(np.concatenate(by_direction)) if by_direction else np.empty(0, np.int64)


def membership(
    by_direction: Sequence[np.ndarray], rows: np.ndarray, device: torch.device
) -> Tensor:
    """(K, n) 0/1 fp32: which of K directions moves which of ``rows`` (n,). All row numbers ascend."""
    member = np.zeros((len(by_direction), len(rows)), np.float32)
    for line, moved in zip(member, by_direction, strict=True):
        place = np.searchsorted(rows, moved)
        place = place[place < len(rows)]  # rows behind the last one are at the end of ``moved``
        line[place[rows[place] == moved[: len(place)]]] = 1.0
    return torch.from_numpy(member).to(device)


def member_of(
    trainable: Trainable, recipe: Recipe, rows: slice | Tensor, device: torch.device
) -> Tensor | None:
    """``membership`` of a tile; None where every direction moves every row."""
    if trainable.touched_offset is None:
        return None
    assert isinstance(rows, slice)
    numbers = np.arange(rows.start, rows.stop)
    return membership(rows_by_direction(trainable, recipe), numbers, device)


def touched_tiles(trainable: Trainable, recipe: Recipe, coefficients: Tensor) -> Iterator[Tile]:
    """Tiles of the rows of an embedding table that any example of the step used."""
    device = coefficients.device
    by_direction = rows_by_direction(trainable, recipe)
    touched = union_of(by_direction)
    for part in tiles(len(touched), trainable.target.cols):
        rows = touched[part]
        numbers = torch.from_numpy(rows.astype(np.int64)).to(device)
        member = membership(by_direction, rows, device)
        yield Tile(trainable, recipe, coefficients, numbers, member)


def moved_tiles(trainable: Trainable, recipe: Recipe, coefficients: Tensor) -> Iterator[Tile]:
    """Tiles of all rows that a step moves."""
    if moves_by_example(trainable):
        yield from touched_tiles(trainable, recipe, coefficients)
        return
    for rows in tile_rows(trainable):
        member = member_of(trainable, recipe, rows, coefficients.device)
        yield Tile(trainable, recipe, coefficients, rows, member)
