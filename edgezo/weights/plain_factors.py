"""Low-rank factors as numpy arrays, with the one place where a step of the ONNX engine changes them.

What weights/store.py is to the torch engine, for the part that graphs take as inputs: y = W x + A (V x), A (d_out,
rank) fp32 and zero at the start, V of signs over sqrt(rank) by the seed, directions r_i t_i^T (``signs``). The same
recipe gives the same bits of A on both engines: coefficients lie on a grid on which sums are exact (bits.exact_grid).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from edgezo.zo.bits import BASIS, COLUMN, ROW, Key, sign_rows, tensor_id
from edgezo.zo.recipe import Recipe

FACTOR_END = "#lowrank"  # of a factor's name, behind that of its matrix


class FrozenMatrix(Protocol):
    """The matrix beside which a factor is trained."""

    @property
    def name(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def cols(self) -> int: ...


class BlockSigns(NamedTuple):
    """The directions of a block's factors for b examples."""

    rows: np.ndarray  # (R, b) int8, r_i of its linears, one below the other
    cols: np.ndarray  # (b, L, rank) fp32, t_i


@dataclass
class PlainFactors:
    """The trained factors of a run, by block."""

    linears: Mapping[int, Sequence[FrozenMatrix]]  # of each block that is trained
    seed: int
    rank: int
    threads: int = 1
    values: dict[int, np.ndarray] = field(default_factory=dict)  # (R, rank) fp32 by block

    def __post_init__(self) -> None:
        for block, linears in self.linears.items():
            rows = sum(linear.rows for linear in linears)
            self.values[block] = np.zeros((rows, self.rank), np.float32)

    def keep_only(self, last: int) -> None:
        """Train nothing above block ``last``: no loss depends on it. To be called before the first step."""
        self.linears = {block: some for block, some in self.linears.items() if block <= last}
        self.values = {block: some for block, some in self.values.items() if block <= last}

    def bases(self, linears: Sequence[FrozenMatrix]) -> np.ndarray:
        """The signs of V of these linears side by side, (rank, C) int8."""
        key, rank = Key(self.seed, 0), slice(0, self.rank)
        made = [sign_rows(key, tensor_id(x.name), BASIS, rank, x.cols) for x in linears]
        return np.concatenate(made, axis=1)

    def signs(self, key: Key, block: int, slots: Sequence[int]) -> BlockSigns:
        """r_i and t_i of the examples in ``slots``."""
        linears = self.linears[block]
        rows = [self._drawn(key, x, ROW, slots, x.rows) for x in linears]
        cols = [self._drawn(key, x, COLUMN, slots, self.rank) for x in linears]
        stacked = np.ascontiguousarray(np.concatenate(rows, axis=1).T)
        return BlockSigns(stacked, np.stack(cols, axis=1).astype(np.float32))

    def _drawn(
        self, key: Key, linear: FrozenMatrix, stream: int, slots: Sequence[int], width: int
    ) -> np.ndarray:
        """(len(slots), width) int8: the signs of these slots."""
        last = max(slots) + 1
        tensor = tensor_id(linear.name + FACTOR_END)
        table = sign_rows(key, tensor, stream, slice(0, last), width, self.threads)
        return table if list(slots) == list(range(last)) else table[list(slots)]

    # -- steps --------------------------------------------------------------------------------------------

    def apply(self, recipes: Iterable[Recipe]) -> None:
        """theta <- (1 - decay) theta - sum_i c_i r_i t_i^T, recipe by recipe."""
        for recipe in recipes:
            if recipe.decay or np.any(recipe.coefficients):
                self._advance(recipe)

    def _advance(self, recipe: Recipe) -> None:
        key, slots = Key(self.seed, recipe.step), range(len(recipe.coefficients))
        for _, linear, theta in self._named():
            rows = self._drawn(key, linear, ROW, slots, linear.rows).astype(np.float32)
            cols = self._drawn(key, linear, COLUMN, slots, self.rank).astype(np.float32)
            rows *= recipe.coefficients[:, None]
            if recipe.decay:
                theta *= np.float32(1.0 - recipe.decay)
            theta -= rows.T @ cols

    def _named(self) -> Iterator[tuple[str, FrozenMatrix, np.ndarray]]:
        """(name, matrix, values (rows, rank)) of each factor; the values are those that are trained."""
        for block, linears in self.linears.items():
            start = 0
            for linear in linears:
                stop = start + linear.rows
                yield linear.name + FACTOR_END, linear, self.values[block][start:stop]
                start = stop

    # -- beside the update --------------------------------------------------------------------------------

    def tensors(self) -> dict[str, np.ndarray]:
        """Every factor by name, the stored values themselves."""
        return {name: values for name, _, values in self._named()}

    @property
    def n_bytes(self) -> int:
        return sum(values.nbytes for values in self.values.values())


def tensors_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """What ``saved.saved_sha256`` gives for the same fp32 tensors: SHA-256 (hex) over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"{name} {values.shape} torch.{values.dtype}\n".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
