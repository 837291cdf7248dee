"""Triton kernels for a GPU, as kernels.py has loops in C for a CPU: noise, thin products, updates, codes, planes.

Where Triton is not installed, or the device is no NVIDIA GPU, ``usable`` is False and torch does all of it. Noise,
codes and updates have the same bits either way, those of a CPU. Nothing here waits for the GPU, and nothing is copied
to it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgezo.machine.philox import LEVEL_BLOCK, SIGN_BLOCK, count_of

# All threads of a program make each of its blocks of noise, so a program takes as many blocks as its registers allow.
_NOISE_BLOCKS = 32
_TOKENS = 32  # of a program in the forward
_ROWS, _EXAMPLES = (
    32,
    16,
)  # rows of a program of an update; examples that it sums at once, at least 16 for tl.dot
_ELEMENTS_AT_ONCE = 1024  # of a program that works element by element
_LEAST_CAPABILITY = (7, 0)  # of a GPU that Triton compiles for
DENSE_KINDS = {None: 0, "signs": 1, "normals": 2}  # NONE, SIGNS and NORMALS of triton_kernels.py


class SignRows(NamedTuple):
    """Rows of signs that a kernel makes where it needs them: the slots' rows of a matrix of noise."""

    address: tuple[int, ...]  # noise.address_of
    slots: Tensor  # (b,) int64 on the device: which rows
    width: int
    scale: float = 1.0  # what they are multiplied by


@functools.cache
def _kernels() -> Any:
    """The kernels' module; None where Triton is not installed or does not work."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from edgezo.machine import triton_kernels
    except (ImportError, RuntimeError):
        return None
    return triton_kernels


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether there are kernels for ``device``: an NVIDIA GPU, and Triton is installed."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY and _kernels() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether kernels may be given these tensors: they lie contiguous on a GPU, and none of them needs a gradient."""
    tracked = torch.is_grad_enabled()
    return usable(tensors[0].device) and all(
        t.is_contiguous() and not (tracked and t.requires_grad) for t in tensors
    )


def _signed_half(word: int) -> int:
    word &= (1 << 32) - 1
    return word - (1 << 32) if word >> 31 else word


def _halves(address: tuple[int, ...]) -> tuple[int, ...]:
    """The stream, then seed, name and step of an address in signed halves: the last arguments of a kernel."""
    seed, name, stream, step, _ = address
    halves = (part for word in (seed, name, step) for part in (word, word >> 32))
    return stream, *map(_signed_half, halves)


def _bits(x: Tensor) -> Tensor:
    """A bf16 tensor as int16, any other as it is."""
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x


def _is_bf16(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16


def _launch(kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if 0 in grid:
        return
    getattr(_kernels(), f"{kernel}_kernel")[grid](*arguments, **constants, enable_fp_fusion=False)


def _over(n: int, size: int) -> int:
    return -(-n // size)


# ---------------------------------------------------------------------------------------------
# Noise


def noise_of(address: tuple[int, ...], table: Tensor, rows: slice | Tensor, width: int) -> Tensor:
    """``philox.noise_of`` by a kernel."""
    levels, n = len(table) != 256, count_of(rows)
    dtype = torch.float32 if levels else torch.int8
    made = torch.empty(n, width, dtype=dtype, device=table.device)
    blocks = _over(width, LEVEL_BLOCK if levels else SIGN_BLOCK)
    numbered = isinstance(rows, Tensor)
    _launch(
        "noise",
        (_over(n * blocks, _NOISE_BLOCKS),),
        made,
        rows.to(table.device) if isinstance(rows, Tensor) else made,
        table,
        rows.start if isinstance(rows, slice) else 0,
        *(n, width, blocks, *_halves(address)),
        LEVELS=levels,
        NUMBERED=numbered,
        N=_NOISE_BLOCKS,
    )
    return made


# ---------------------------------------------------------------------------------------------
# The forward


def signed_dots(x: Tensor, example: Tensor, side: Tensor, drawn: SignRows) -> Tensor:
    """side_t * (s_i . x_t) of each token t of example i, (n,) fp32; x is (n, d) fp32 or bf16, ``example`` (n,) int64.

    s_i are the signs ``drawn``, which are made here. Sums are fp32, in another order than a CPU's.
    """
    n, d = x.shape
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    stream, *halves = _halves(drawn.address)
    _launch(
        "signed_dots",
        (_over(n, _TOKENS),),
        *(_bits(x), example, drawn.slots, _bits(side), out),
        *(n, d, x.stride(0), _over(d, SIGN_BLOCK), stream, *halves),
        BF16=_is_bf16(x),
        BF16_SIDE=_is_bf16(side),
        N=_TOKENS,
    )
    return out if drawn.scale == 1.0 else out.mul_(drawn.scale)


def add_signed(
    y: Tensor,  # (n, m) fp32 or bf16, changed
    left: Tensor,  # (n, k) fp32
    right: Tensor,  # (k, m) fp32
    weight: Tensor | None = None,  # (n,) fp32
    example: Tensor | None = None,  # (n,) int64
    drawn: SignRows | None = None,
    *,
    read: bool = True,
) -> None:
    """y += left @ right + weight * r_i, rounded once, r_i the signs ``drawn`` of each token's example.

    With ``read=False`` y is only written. Rows of y may be longer than m.
    """
    n, m = y.shape
    signed = drawn is not None and weight is not None and example is not None
    stream, *halves = _halves(drawn.address) if drawn is not None else (0,) * 7
    _launch(
        "add_signed",
        (_over(n, _TOKENS), _over(m, SIGN_BLOCK)),
        *(_bits(y), left, right, weight if signed else left, example if signed else left),
        drawn.slots if drawn is not None else left,
        *(n, m, y.stride(0), left.shape[1], _over(m, SIGN_BLOCK)),
        *(drawn.scale if drawn is not None else 1.0, stream, *halves),
        READ=read,
        SIGNED=signed,
        BF16=_is_bf16(y),
        N=_TOKENS,
    )


# ---------------------------------------------------------------------------------------------
# Updates


class Update(NamedTuple):
    """theta <- (1 - decay) theta - scale * sum_i c_i D_i of one tensor in one step."""

    coefficients: Tensor  # (B,) fp32 on noise.exact_grid
    decay: float
    scale: float
    factored: bool  # D_i has signs r_i s_i^T
    dense: str | None  # its factor U: None, "signs" or "normals"
    # Addresses of r, s and U; what is not used may be any.
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    factor: tuple[int, ...]
    table: Tensor | None = None  # (65536,) fp32 levels of the normals


def update(values: Tensor, low: Tensor | None, rows: slice, step: Update) -> None:
    """Make ``step`` to ``rows`` of a matrix, in place: to fp32 ``values``, or to bf16 ones and their plane ``low``.

    Both are whole matrices (rows, cols). The result has the bits of WeightStore.advance, then rounding and writing.
    """
    total, cols = values.shape
    c = step.coefficients
    row_stream, *halves = _halves(step.rows)
    streams = row_stream, _halves(step.cols)[0], _halves(step.factor)[0]
    first, n = rows.start, rows.stop - rows.start
    grid = (_over(rows.stop, _ROWS) - first // _ROWS, _over(cols, SIGN_BLOCK))
    _launch(
        "update",
        grid if n else (0,),
        *(_bits(values), values if low is None else low),
        c if step.factored else c.sum().reshape(1),
        c if step.table is None else step.table,
        *(first, n, cols, len(c), _over(total, SIGN_BLOCK), grid[1]),
        *(1.0 - step.decay, step.scale, *streams, *halves),
        FACTORED=step.factored,
        DENSE=DENSE_KINDS[step.dense],
        SCALED=step.scale != 1.0,
        DECAYED=step.decay != 0.0,
        PLANE=low is not None,
        ROWS=_ROWS,
        B=_EXAMPLES,
        num_warps=8,
    )


# ---------------------------------------------------------------------------------------------
# Codes and planes: as the functions of the same names in kernels.py


def expand_int8(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    n, cols = codes.shape
    grid = (n, _over(cols, _ELEMENTS_AT_ONCE))
    _launch(
        "expand_int8", grid, codes, scale, _bits(out), cols, BF16=_is_bf16(out), N=_ELEMENTS_AT_ONCE
    )


def expand_int4(packed: Tensor, nibble: int, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    (n, cols), groups = out.shape, scale.shape[1]
    _launch(
        "expand_int4",
        (n, _over(cols, _ELEMENTS_AT_ONCE)),
        *(packed, scale, shift, _bits(out), cols, cols // groups),
        NIBBLE=nibble,
        BF16=_is_bf16(out),
        N=_ELEMENTS_AT_ONCE,
    )


def plane(what: str, *parts: Tensor) -> None:
    """ "read", "write" or "snap" a low-order plane: kernels.read_plane and its like."""
    n = parts[0].numel()
    _launch(
        f"{what}_plane", (_over(n, _ELEMENTS_AT_ONCE),), *map(_bits, parts), n, N=_ELEMENTS_AT_ONCE
    )
