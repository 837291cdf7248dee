"""The k x k matrix that orthogonalises a step's update of one trained matrix, from all rows that the step moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgezo.weights.tile import Tile, moved_tiles
from edgezo.weights.trainable import Trainable
from edgezo.zo.directions import Directions
from edgezo.zo.noise import Key
from edgezo.zo.orthogonal import inverse_root, whole_coordinates
from edgezo.zo.recipe import Recipe


@dataclass
class InverseRoots:
    """Makes the matrices; the last one is kept, since every tile of a trained matrix needs it."""

    last: tuple[Trainable, Recipe] | None = None  # what the last one was made for
    root: Tensor = field(default_factory=lambda: torch.empty(0))
    moved: int = 0

    def of(self, tile: Tile, directions: Directions, key: Key) -> tuple[Tensor, int]:
        """(M (k, k) fp32 with N M = msign(N), number of rows that the step moves) of the tile's matrix."""
        trainable, recipe = tile.trainable, tile.recipe
        if self.last is None or self.last[0] is not trainable or self.last[1] is not recipe:
            most = float(np.abs(recipe.coefficients).sum(dtype=np.float64)) or 1.0
            gram = torch.zeros(directions.rank, directions.rank, dtype=torch.float64)
            moved = 0
            for part in moved_tiles(trainable, recipe, tile.coefficients):
                n = directions.weighted_coordinates(
                    key, trainable.target, tile.coefficients, part.rows, part.member
                )
                whole = whole_coordinates(n.cpu(), most)
                gram += whole.T @ whole
                moved += len(whole)
            root = inverse_root(gram, most).to(tile.coefficients.device)
            self.last, self.root, self.moved = (trainable, recipe), root, moved
        return self.root, self.moved
