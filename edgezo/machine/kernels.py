"""Loops in C for a CPU (kernels.c): norms, gates, attention, thin products, codes, noise, checksums.

Codes and planes on a GPU go on to its kernels (gpu_kernels.py).

The package's build compiles the file where it finds GCC (scripts/build_kernels.py). Without the library, or with
``EDGEZO_KERNELS=0``, everything runs on torch, numpy and zlib alone, slower: a function here then returns None or
False, or does with them what it says. Noise, codes, updates and checksums have the same bits either way. A forward is
equal but for rounding: a norm or a gate rounds once here, where torch rounds between its operations.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgezo.machine import gpu_kernels
from edgezo.machine.kernel_library import SIGNATURES as _SIGNATURES  # noqa: F401 (the tests ask it)
from edgezo.machine.kernel_library import crc32 as crc32  # beside the others
from edgezo.machine.kernel_library import draw_noise, folds, sums_of_rows, threads_for
from edgezo.machine.kernel_library import library as _library
from edgezo.machine.limits import LONGEST

_STRIP, _QUERIES, _FEW = 32, 4, 8  # STRIP, QUERIES and FEW of kernels.c


class _Attention(ctypes.Structure):
    """Arguments of edgezo_attention: ``Attention`` of kernels.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, c_int64) for name in ("heads", "kv_heads", "dim")),
        ("scale", c_float),
        ("causal", c_int),
        ("window", c_int64),
        ("bf16", c_int),
    )


class _Thin(ctypes.Structure):
    """Arguments of edgezo_add_thin: ``Thin`` of kernels.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("y", "left", "right", "weight", "rows", "example")),
        *((name, c_int64) for name in ("n", "m", "k")),
    )


def loaded() -> bool:
    """Whether there is a library, which the first call loads."""
    return _library() is not None


def _reachable(*tensors: Tensor) -> bool:
    """Whether there is a library, the tensors lie in CPU memory, and none of them needs a gradient."""
    tracked = torch.is_grad_enabled()
    return loaded() and not any(
        t.device.type != "cpu" or (tracked and t.requires_grad) for t in tensors
    )


def usable(*tensors: Tensor) -> bool:
    """Whether the library may be given these tensors: it can reach them, and they are contiguous."""
    return _reachable(*tensors) and all(t.is_contiguous() for t in tensors)


def takes(*tensors: Tensor) -> bool:
    """Whether the library may be given these tensors, and has loops for their one dtype: fp32 or bf16."""
    return usable(*tensors) and _floats(*tensors)


def _floats(*tensors: Tensor) -> bool:
    """Whether the tensors are all fp32 or all bf16."""
    (dtype, *others) = {t.dtype for t in tensors}
    return not others and dtype in (torch.float32, torch.bfloat16)


def _on_gpu(*tensors: Tensor) -> bool:
    """Whether the tensors go on to the kernels of a GPU."""
    return gpu_kernels.takes(*tensors)


def _threads(elements: int) -> int:
    """How many threads to use: one or all, since OpenMP ends and restarts its threads when their number changes."""
    return threads_for(elements, torch.get_num_threads())


def _bf16(x: Tensor) -> int:
    return int(x.dtype is torch.bfloat16)


# ------------------------------------------------------------------------------- forward


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor | None:
    """x/sqrt(mean(x^2) + eps) * (weight + offset) over the last axis of x (..., d), in the dtype of x.

    ``weight``, in that dtype or fp32, is (d,), or (n, d) with one row for each of the n rows of x. None where no kernel
    takes these tensors.
    """
    d = x.shape[-1]
    n = x.numel() // d
    if not takes(x) or not usable(weight) or weight.dtype not in (x.dtype, torch.float32):
        return None
    if weight.shape not in ((d,), (n, d)):
        return None
    y = torch.empty_like(x)
    stride = d if weight.dim() > 1 else 0
    shape = (n, d, stride, eps, offset, _bf16(x), _bf16(weight), _threads(x.numel()))
    _library().edgezo_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *shape)
    return y


# Activations that there are kernels for, by their number.
GATE_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.silu,
    functools.partial(F.gelu, approximate="tanh"),
)


def gate(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """act(gate) * up, tensors of one shape. ``activation``: index into ``GATE_ACTIVATIONS``.

    ``up`` may be overwritten.
    """
    if not takes(gate, up):
        return GATE_ACTIVATIONS[activation](gate) * up
    n = up.numel()
    shape = (n, activation, _bf16(up), _threads(n))
    _library().edgezo_gate(gate.data_ptr(), up.data_ptr(), *shape)
    return up


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """Attention within each of the rows that are packed in one axis of n tokens, (n, heads, dim).

    ``query`` is (n, heads, dim), ``key`` and ``value`` (n, kv_heads, dim); the heads of a token lie together in memory.
    ``starts``: (rows + 1,) int64, where each row begins. ``longest``: tokens of the longest row. ``window``: how many
    tokens a token sees; None: all. None is returned where no kernel takes these tensors.
    """
    n, heads, dim = query.shape
    parts = (query, key, value)
    if longest > LONGEST or not _reachable(*parts) or not _floats(*parts):
        return None
    if any(_token_stride(t) is None for t in parts):
        return None
    out = query.new_empty(n, heads, dim)
    rows, threads = len(starts) - 1, _threads(n * heads * longest)
    padded, wide = (-(-size // _STRIP) * _STRIP for size in (longest, dim))
    stride = (dim + wide) * padded + _QUERIES * (padded + dim)
    scratch = query.new_empty(threads * stride, dtype=torch.float32)
    arguments = _Attention(
        *(t.data_ptr() for t in (*parts, out)),
        *(_token_stride(t) for t in parts),
        *(heads * dim, heads, key.shape[1], dim),
        *(scale, int(causal), window or 0, _bf16(query)),
    )
    more = (starts.data_ptr(), rows, scratch.data_ptr(), stride, threads)
    _library().edgezo_attention(ctypes.byref(arguments), *more)
    return out


def _token_stride(x: Tensor) -> int | None:
    """Elements from one token to the next in x (n, heads, dim); None where a token's heads do not lie together."""
    return x.stride(0) if x.stride(2) == 1 and x.stride(1) == x.shape[2] else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """x cos + (-x2, x1) sin in place, where x = (x1, x2) along the last axis: rotary positions.

    x is (1, heads, n, dim), token by token in memory; cos and sin are (1, n, dim) in its dtype. False, and x as it was,
    where no kernel takes these tensors.
    """
    tokens, dim = x[0].transpose(0, 1), x.shape[3]
    stride = _token_stride(tokens)
    if len(x) != 1 or stride is None or not _reachable(x) or not usable(cos, sin):
        return False
    if not _floats(x, cos, sin):
        return False
    if cos.shape != (1, x.shape[2], dim) or sin.shape != cos.shape or dim % 2:
        return False
    pointers = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
    shape = (x.shape[2], stride, x.shape[1], dim, _bf16(x), _threads(x.numel()))
    _library().edgezo_rotate(*pointers, *shape)
    return True


def thin_product(x: Tensor, basis: Tensor) -> Tensor | None:
    """x (n, d) @ basis (r, d)^T as fp32, r small, basis in the dtype of x or fp32; None where no kernel takes them."""
    if not takes(x) or not usable(basis) or basis.dtype not in (x.dtype, torch.float32):
        return None
    (n, d), r = x.shape, len(basis)
    basis, out = basis.float(), x.new_empty(n, r, dtype=torch.float32)
    pointers = (x.data_ptr(), basis.data_ptr(), out.data_ptr())
    _library().edgezo_thin_product(*pointers, n, d, r, _bf16(x), _threads(n * d))
    return out


def thin_sum(left: Tensor, x: Tensor) -> Tensor | None:
    """left (n, r)^T @ x (n, m) as fp32 (r, m), r small, left fp32; None where no kernel takes them."""
    if not takes(x) or not usable(left) or left.dtype is not torch.float32:
        return None
    (n, m), r = x.shape, left.shape[1]
    wide = -(-r // _FEW) * _FEW
    if wide != r:
        left = F.pad(left, (0, wide - r))
    out = x.new_zeros(wide, m, dtype=torch.float32)
    pointers = (x.data_ptr(), left.data_ptr(), out.data_ptr())
    _library().edgezo_thin_sum(*pointers, n, m, wide, _bf16(x), _threads(n * m))
    return out[:r]


def dots_by_example(x: Tensor, cols: Tensor, example: Tensor) -> Tensor | None:
    """x_t . cols[example_t] for each row x_t of x (n, d), (n,) fp32; cols is (b, d), example (n,) int64.

    None where no kernel takes these tensors.
    """
    if not usable(example) or not takes(x, cols):
        return None
    n, d = x.shape
    out = x.new_empty(n, dtype=torch.float32)
    pointers = (x.data_ptr(), cols.data_ptr(), example.data_ptr(), out.data_ptr())
    _library().edgezo_dots_by_example(*pointers, n, d, _bf16(x), _threads(n * d))
    return out


def add_thin(
    y: Tensor,  # (n, m), changed
    left: Tensor,  # (n, k) fp32
    right: Tensor,  # (k, m) fp32
    weight: Tensor | None = None,  # (n,) fp32
    rows: Tensor | None = None,  # (b, m) in the dtype of y
    example: Tensor | None = None,  # (n,) int64
) -> bool:
    """y += left @ right + weight * rows[example], rounded once; False where no kernel takes these tensors."""
    given = [t for t in (left, right, weight, rows, example) if t is not None]
    if not usable(y, *given) or not _floats(y, *([] if rows is None else [rows])):
        return False
    (n, m), k = y.shape, left.shape[1]
    tensors = (y, left, right, weight, rows, example)
    arguments = _Thin(*(None if t is None else t.data_ptr() for t in tensors), n, m, k)
    _library().edgezo_add_thin(ctypes.byref(arguments), _bf16(y), _threads(n * m))
    return True


# -------------------------------------------------------------------------- codes, updates


def expand_int8(codes: Tensor, scale: Tensor, out: Tensor) -> bool:
    """out (n, cols) = codes (n, cols) * scale (n, 1); False where no kernel takes these tensors."""
    if _on_gpu(codes, scale, out) and _floats(out):
        gpu_kernels.expand_int8(codes, scale, out)
        return True
    if not usable(codes, scale) or not takes(out):
        return False
    shape = (*codes.shape, _bf16(out), _threads(out.numel()))
    _library().edgezo_expand_int8(codes.data_ptr(), scale.data_ptr(), out.data_ptr(), *shape)
    return True


def expand_int4(packed: Tensor, nibble: int, scale: Tensor, shift: Tensor, out: Tensor) -> bool:
    """out (n, cols) = code * scale - shift, scale and shift (n, groups, 1).

    A code is the four bits of packed (n, cols) from bit ``nibble`` (0 or 4) on. False where no kernel takes these
    tensors.
    """
    if _on_gpu(packed, scale, shift, out) and _floats(out):
        gpu_kernels.expand_int4(packed, nibble, scale, shift, out)
        return True
    if not usable(packed, scale, shift) or not takes(out):
        return False
    (n, cols), groups = out.shape, scale.shape[1]
    pointers = (scale.data_ptr(), shift.data_ptr(), out.data_ptr())
    shape = (n, groups, cols // groups, _bf16(out), _threads(out.numel()))
    _library().edgezo_expand_int4(packed.data_ptr(), nibble, *pointers, *shape)
    return True


def read_plane(high: Tensor, low: Tensor, out: Tensor) -> bool:
    """out (n, cols) fp32 = bf16 weights and their low-order plane (layouts.Dense); False where no kernel takes them."""
    return high.dtype is torch.bfloat16 and _plane("read", high, low, out)


def write_plane(values: Tensor, high: Tensor, low: Tensor) -> bool:
    """Split fp32 ``values`` into bf16 weights and their plane, to the nearest; False where no kernel takes them."""
    return high.dtype is torch.bfloat16 and _plane("write", values, high, low)


def snap_plane(values: Tensor) -> bool:
    """Round fp32 ``values`` in place to what ``read_plane`` gives after ``write_plane``; False without a kernel."""
    return _plane("snap", values)


def _plane(what: str, *parts: Tensor) -> bool:
    """Call edgezo_<what>_plane on tensors that all have the same number of elements."""
    if _on_gpu(*parts):
        gpu_kernels.plane(what, *parts)
        return True
    if not usable(*parts):
        return False
    n = parts[0].numel()
    run = getattr(_library(), f"edgezo_{what}_plane")
    run(*(part.data_ptr() for part in parts), n, _threads(n))
    return True


# ------------------------------------------------------------------------------------ noise


def noise(
    address: tuple[int, ...],
    table: np.ndarray,
    rows: slice,
    width: int,
) -> Tensor | None:
    """Rows of a matrix of noise (zo/noise.py), (n, width); None without a library.

    ``address``: Philox's key (2 words), then its counter's last three. ``table``: (256,) uint64, the eight signs of
    each byte, gives int8; (65536,) fp32 gives its values.
    """
    if not loaded():
        return None
    signs, n = len(table) == 256, rows.stop - rows.start
    dtype = torch.int8 if signs else torch.float32
    made = torch.empty(n, width, dtype=dtype, device="cpu")
    draw_noise(address, table, rows, width, made.data_ptr(), _threads(made.numel()))
    return made


# -------------------------------------------------------------------------------- checksums


def crc32_rows(rows: np.ndarray) -> np.ndarray:
    """(n,) uint32: ``zlib.crc32`` of each row of (n, bytes) uint8, contiguous."""
    if not folds():
        return np.fromiter((zlib.crc32(row.data) for row in rows), np.uint32, len(rows))
    return sums_of_rows(rows, 0, _threads(rows.size))
