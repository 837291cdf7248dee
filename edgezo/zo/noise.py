"""Noise as torch tensors: what zo/bits.py makes at an address (seed, step, tensor, stream, place).

signs     one bit an element      ->  -1 or +1
normals   16 bits an element      ->  N(0, 1) quantised to 65,536 equally probable levels, variance exactly 1
uniform   16 bits an element      ->  (k + 1/2) / 65,536

A CPU makes it with kernels.c or numpy. Any other device makes its noise itself, so that nothing is copied there:
``_MAKERS`` says how. The bits are equal everywhere. Rows may be asked for in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from edgezo.machine import gpu_kernels, kernels, philox
from edgezo.machine.philox import CPU
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
    "address_of",
    "exact_grid",
    "normals",
    "normals_on",
    "order_on",
    "permutation",
    "signs",
    "tensor_id",
    "uniform",
    "words",
]


Table = Callable[[], np.ndarray]
# (table, key, tensor, stream, rows of the matrix, its width, device) -> (n, width) int8 signs or fp32 levels
Maker = Callable[[Table, Key, int, int, slice | Tensor, int, torch.device], Tensor]


def _on_cpu(
    table: Table,
    key: Key,
    tensor: int,
    stream: int,
    rows: slice | Tensor,
    width: int,
    device: torch.device,
) -> Tensor:
    """Noise made by the C kernels or by numpy."""
    if isinstance(rows, Tensor):
        runs = [slice(row, row + 1) for row in rows.tolist()] or [slice(0, 0)]
        return torch.cat([_on_cpu(table, key, tensor, stream, run, width, device) for run in runs])
    made = kernels.noise(address_of(key, tensor, stream), table(), rows, width)
    if made is not None:
        return made
    address, threads = (key, tensor, stream, rows, width), torch.get_num_threads()
    if table is sign_table:
        return torch.from_numpy(signs_by_numpy(*address, threads))
    return torch.from_numpy(levels_by_numpy(*address, table(), threads))


@functools.cache
def _table_on(table: Table, device: torch.device) -> Tensor:
    """A table on a device: (256,) int64 or (65536,) fp32."""
    values = table()
    values = values.view(np.int64) if values.dtype == np.uint64 else values
    return torch.from_numpy(values.copy()).to(device)


def normals_on(device: torch.device) -> Tensor:
    """(65536,) fp32 on ``device``: the levels that normals take, by their codes."""
    return _table_on(normal_table, device)


def _by_torch(
    table: Table,
    key: Key,
    tensor: int,
    stream: int,
    rows: slice | Tensor,
    width: int,
    device: torch.device,
) -> Tensor:
    """Noise made on ``device`` by torch's integer operations."""
    return philox.noise_of(address_of(key, tensor, stream), _table_on(table, device), rows, width)


def _by_triton(
    table: Table,
    key: Key,
    tensor: int,
    stream: int,
    rows: slice | Tensor,
    width: int,
    device: torch.device,
) -> Tensor:
    """Noise made on ``device`` by a Triton kernel, by torch where Triton is not installed."""
    make = gpu_kernels.noise_of if gpu_kernels.usable(device) else philox.noise_of
    return make(address_of(key, tensor, stream), _table_on(table, device), rows, width)


# How noise is made, by kind of device; by ``_by_torch`` on a kind that is not named.
_MAKERS: Mapping[str, Maker] = {"cpu": _on_cpu, "cuda": _by_triton}


def _draw(
    table: Table,
    key: Key,
    tensor: int,
    stream: int,
    rows: slice | Tensor,
    width: int,
    device: torch.device,
) -> Tensor:
    make = _MAKERS.get(device.type, _by_torch)
    return make(table, key, tensor, stream, rows, width, device)


def signs(
    key: Key,
    tensor: int,
    stream: int,
    rows: slice | Tensor,
    width: int,
    device: torch.device = CPU,
) -> Tensor:
    """``rows`` of a matrix of independent fair signs, (n, width) int8: consecutive ones, or (n,) int64 numbers."""
    return _draw(sign_table, key, tensor, stream, rows, width, device)


def normals(
    key: Key,
    tensor: int,
    stream: int,
    rows: slice | Tensor,
    width: int,
    device: torch.device = CPU,
) -> Tensor:
    """``rows`` of a matrix of independent standard normals, (n, width) fp32; ``rows`` as in ``signs``."""
    return _draw(normal_table, key, tensor, stream, rows, width, device)


def uniform(
    key: Key,
    tensor: int,
    stream: int,
    rows: slice | Tensor,
    width: int,
    device: torch.device = CPU,
) -> Tensor:
    """``rows`` of a matrix of uniforms in (0, 1), (n, width) fp32, multiples of 2**-17; ``rows`` as in ``signs``."""
    return _draw(uniform_table, key, tensor, stream, rows, width, device)


def order_on(key: Key, tensor: int, stream: int, size: int, device: torch.device = CPU) -> Tensor:
    """``permutation`` as (size,) int64 on ``device``, where it is made."""
    if device.type == "cpu":
        return torch.from_numpy(permutation(key, tensor, stream, size))
    blocks = torch.arange(-(-size // 4), device=device)
    drawn = philox.words_of(address_of(key, tensor, stream), blocks).reshape(-1)[:size]
    return torch.argsort(drawn ^ torch.iinfo(torch.int64).min, stable=True)  # as unsigned numbers
