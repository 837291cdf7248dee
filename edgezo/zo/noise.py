"""Noise as torch tensors: what zo/bits.py makes at an address (seed, step, tensor, stream, place).

signs     one bit an element      ->  -1 or +1
normals   16 bits an element      ->  N(0, 1) quantised to 65,536 equally probable levels, variance exactly 1
uniform   16 bits an element      ->  (k + 1/2) / 65,536
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgezo.machine import kernels
from edgezo.zo.bits import (
    BASIS,
    CENTRE,
    CHOICE,
    COLUMN,
    DENSE,
    LEFT,
    ORDER,
    PROBE_GRID,
    ROUNDING,
    ROW,
    SPAN,
    UPDATE_GRID,
    Key,
    address_of,
    exact_grid,
    levels_by_numpy,
    normal_table,
    permutation,
    sign_table,
    signs_by_numpy,
    tensor_id,
    uniform_table,
    words,
)

__all__ = [
    "BASIS",
    "CENTRE",
    "CHOICE",
    "COLUMN",
    "DENSE",
    "LEFT",
    "ORDER",
    "PROBE_GRID",
    "ROUNDING",
    "ROW",
    "SPAN",
    "UPDATE_GRID",
    "Key",
    "exact_grid",
    "normals",
    "permutation",
    "signs",
    "tensor_id",
    "uniform",
    "uniform_at",
    "words",
]


def signs(key: Key, tensor: int, stream: int, rows: slice, width: int) -> Tensor:
    """``rows`` of a matrix of independent fair signs, (n, width) int8."""
    generated = kernels.noise(address_of(key, tensor, stream), sign_table(), rows, width)
    if generated is not None:
        return generated
    made = signs_by_numpy(key, tensor, stream, rows, width, torch.get_num_threads())
    return torch.from_numpy(made)


def _levels(
    key: Key, tensor: int, stream: int, rows: slice, width: int, table: np.ndarray
) -> Tensor:
    """(n, width) fp32: for each element the value of ``table`` (65536,) that its 16 bits number."""
    generated = kernels.noise(address_of(key, tensor, stream), table, rows, width)
    if generated is not None:
        return generated
    threads = torch.get_num_threads()
    return torch.from_numpy(levels_by_numpy(key, tensor, stream, rows, width, table, threads))


def normals(key: Key, tensor: int, stream: int, rows: slice, width: int) -> Tensor:
    """``rows`` of a matrix of independent standard normals, (n, width) fp32."""
    return _levels(key, tensor, stream, rows, width, normal_table())


def uniform(key: Key, tensor: int, stream: int, rows: slice, width: int) -> Tensor:
    """``rows`` of a matrix of uniforms in (0, 1), (n, width) fp32, all of them multiples of 2**-17."""
    return _levels(key, tensor, stream, rows, width, uniform_table())


def uniform_at(key: Key, tensor: int, stream: int, rows: slice | Tensor, width: int) -> Tensor:
    """``uniform`` of rows in any order: a slice, or (n,) numbers."""
    if isinstance(rows, slice):
        return uniform(key, tensor, stream, rows, width)
    single = [uniform(key, tensor, stream, slice(r, r + 1), width) for r in rows.tolist()]
    return torch.cat(single) if single else torch.zeros(0, width)
