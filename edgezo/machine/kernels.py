"""The hot loops of a CPU in C (kernels.c), each beside what torch does where there is no such library.

The package's build compiles the file where it finds GCC (scripts/build_kernels.py); everything runs without it, slower.
``EDGEZO_KERNELS=0`` leaves it alone. Noise, codes and updates have the same bits either way. A forward is equal
to rounding: a norm or a gate rounds once here, where torch rounds between its operations.
"""

from __future__ import annotations

import ctypes
import functools
import os
import zlib
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgezo.machine.hardware import kernels_library

_GRAIN = 1 << 15  # elements below which a second thread costs more than it does
_STRIP, _QUERIES = 32, 4  # of kernels.c
LONGEST = 1024  # tokens of a row whose attention is made here; longer ones have torch's blocks


class _Attention(ctypes.Structure):
    """``Attention`` of kernels.c."""

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
    """``Thin`` of kernels.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("y", "left", "right", "own", "rows", "example")),
        *((name, c_int64) for name in ("n", "m", "k")),
    )


_P, _N, _I, _F = c_void_p, c_int64, c_int, c_float
_SIGNATURES = {
    "rms_norm": (_P, _P, _P, _N, _N, _N, _F, _F, _I, _I, _I),
    "gate": (_P, _P, _N, _I, _I, _I),
    "attention": (_P, _P, _N, _P, _N, _I),
    "rotate": (_P, _P, _P, _N, _N, _N, _N, _I, _I),
    "few": (_P, _P, _P, _N, _N, _N, _I, _I),
    "own": (_P, _P, _P, _P, _N, _N, _I, _I),
    "add_thin": (_P, _I, _I),
    "expand_int8": (_P, _P, _P, _N, _N, _I, _I),
    "expand_int4": (_P, _I, _P, _P, _P, _N, _N, _N, _I, _I),
    "read_plane": (_P, _P, _P, _N, _I),
    "write_plane": (_P, _P, _P, _N, _I),
    "snap_plane": (_P, _N, _I),
    "signs": (_P, _P, _P, _P, _N, _N, _N, _I),
    "levels": (_P, _P, _P, _P, _N, _N, _N, _I),
}


@functools.cache
def _library() -> Any:
    """The loaded library; None without one that fits this source and the runtime of torch's threads."""
    file = kernels_library()
    if file is None:
        return None
    try:
        found = ctypes.CDLL(str(file))
        found.edgezo_source.restype = ctypes.c_uint32
        if found.edgezo_source() != zlib.crc32(file.with_name("kernels.c").read_bytes()):
            return None
        for name, types in _SIGNATURES.items():
            function = getattr(found, f"edgezo_{name}")
            function.argtypes, function.restype = types, None
    except (OSError, AttributeError):
        return None
    return found


def loaded() -> bool:
    return _library() is not None


def _reachable(*tensors: Tensor) -> bool:
    """Whether a library is there, they lie in CPU memory, and no gradient is asked for."""
    tracked = torch.is_grad_enabled()
    return loaded() and not any(
        t.is_cuda or t.is_meta or (tracked and t.requires_grad) for t in tensors
    )


def usable(*tensors: Tensor) -> bool:
    """Whether these may be passed as they lie in memory: reachable, and dense."""
    return _reachable(*tensors) and all(t.is_contiguous() for t in tensors)


def takes(*tensors: Tensor) -> bool:
    """Whether these may be passed, and are of one kind that there are loops for."""
    return usable(*tensors) and _floats(*tensors)


def _floats(*tensors: Tensor) -> bool:
    """Whether they are all fp32 or all bf16."""
    (dtype, *others) = {t.dtype for t in tensors}
    return not others and dtype in (torch.float32, torch.bfloat16)


_forked = False


def _after_fork() -> None:
    """A child has none of its parent's threads, and OpenMP waits for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(elements: int) -> int:
    """One or all: a team of another size ends the threads of the last one, which are made anew for the next."""
    return 1 if _forked or elements < 2 * _GRAIN else torch.get_num_threads()


def _bf16(x: Tensor) -> int:
    return int(x.dtype is torch.bfloat16)


# ------------------------------------------------------------------------------- forward


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor | None:
    """x/sqrt(mean(x^2) + eps) * (weight + offset) over the last axis of x (..., d), in its dtype.

    ``weight``, in that dtype or fp32, is (d,), or (n, d) with one for each of the n rows of x. None where there is no
    kernel for it.
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


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.silu,
    functools.partial(F.gelu, approximate="tanh"),
)


def gate(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """act(gate) * up, of one shape; ``activation`` is a place in ``ACTIVATIONS``. ``up`` may be overwritten."""
    if not takes(gate, up):
        return ACTIVATIONS[activation](gate) * up
    n = up.numel()
    shape = (n, activation, _bf16(up), _threads(n))
    _library().edgezo_gate(gate.data_ptr(), up.data_ptr(), *shape)
    return up


def attention(
    query: Tensor,  # (n, heads, dim): token by token, the heads of a token together
    key: Tensor,  # (n, kv_heads, dim)
    value: Tensor,
    starts: Tensor,  # (rows + 1,) int64, ascending
    longest: int,  # tokens of the longest row
    scale: float,
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """Attention within the rows of a packed axis, (n, heads, dim); None where there is no kernel for it."""
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
    asked = _Attention(
        *(t.data_ptr() for t in (*parts, out)),
        *(_token_stride(t) for t in parts),
        *(heads * dim, heads, key.shape[1], dim),
        *(scale, int(causal), window or 0, _bf16(query)),
    )
    place = (starts.data_ptr(), rows, scratch.data_ptr(), stride, threads)
    _library().edgezo_attention(ctypes.byref(asked), *place)
    return out


def _token_stride(x: Tensor) -> int | None:
    """Elements from a token to the next; None where the heads of a token do not lie together."""
    return x.stride(0) if x.stride(2) == 1 and x.stride(1) == x.shape[2] else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """x cos + (-x2, x1) sin, in place, x = (x1, x2) along the last axis; False where there is no kernel for it.

    x is (1, heads, n, dim), token by token in memory; cos and sin are (1, n, dim) in its dtype.
    """
    tokens, dim = x[0].transpose(0, 1), x.shape[3]
    stride = _token_stride(tokens)
    if len(x) != 1 or stride is None or not _reachable(x) or not usable(cos, sin):
        return False
    if not _floats(x, cos, sin):
        return False
    if cos.shape != (1, x.shape[2], dim) or sin.shape != cos.shape or dim % 2:
        return False
    held = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
    shape = (x.shape[2], stride, x.shape[1], dim, _bf16(x), _threads(x.numel()))
    _library().edgezo_rotate(*held, *shape)
    return True


def few(x: Tensor, basis: Tensor) -> Tensor | None:
    """x (n, d) @ basis (r, d)^T of one dtype, r small, as fp32; None where there is no kernel for it."""
    if not takes(x, basis):
        return None
    (n, d), r = x.shape, len(basis)
    basis, out = basis.float(), x.new_empty(n, r, dtype=torch.float32)
    held = (x.data_ptr(), basis.data_ptr(), out.data_ptr())
    _library().edgezo_few(*held, n, d, r, _bf16(x), _threads(n * d))
    return out


def own(x: Tensor, cols: Tensor, example: Tensor) -> Tensor | None:
    """x_t . cols[example_t] of each row of x (n, d), (n,) fp32; cols (b, d). None where there is no kernel for it."""
    if not usable(example) or not takes(x, cols):
        return None
    n, d = x.shape
    out = x.new_empty(n, dtype=torch.float32)
    held = (x.data_ptr(), cols.data_ptr(), example.data_ptr(), out.data_ptr())
    _library().edgezo_own(*held, n, d, _bf16(x), _threads(n * d))
    return out


def add_thin(
    y: Tensor,  # (n, m), changed
    left: Tensor,  # (n, k) fp32
    right: Tensor,  # (k, m) fp32
    own: Tensor | None = None,  # (n,) fp32
    rows: Tensor | None = None,  # (b, m) in the dtype of y
    example: Tensor | None = None,  # (n,) int64
) -> bool:
    """y += left @ right + own * rows[example], rounded once; False where there is no kernel for it."""
    given = [t for t in (left, right, own, rows, example) if t is not None]
    if not usable(y, *given) or not _floats(y, *([] if rows is None else [rows])):
        return False
    (n, m), k = y.shape, left.shape[1]
    held = (None if t is None else t.data_ptr() for t in (y, left, right, own, rows, example))
    asked = _Thin(*held, n, m, k)
    _library().edgezo_add_thin(ctypes.byref(asked), _bf16(y), _threads(n * m))
    return True


# -------------------------------------------------------------------------- codes, updates


def expand_int8(codes: Tensor, scale: Tensor, out: Tensor) -> bool:
    """out (n, cols) = codes (n, cols) * scale (n, 1); False where there is no kernel for it."""
    if not usable(codes, scale) or not takes(out):
        return False
    shape = (*codes.shape, _bf16(out), _threads(out.numel()))
    _library().edgezo_expand_int8(codes.data_ptr(), scale.data_ptr(), out.data_ptr(), *shape)
    return True


def expand_int4(packed: Tensor, nibble: int, scale: Tensor, shift: Tensor, out: Tensor) -> bool:
    """out (n, cols) = code * scale - shift, codes in the bits from ``nibble`` on of packed (n, cols).

    scale and shift are (n, groups, 1). False where there is no kernel for it.
    """
    if not usable(packed, scale, shift) or not takes(out):
        return False
    (n, cols), groups = out.shape, scale.shape[1]
    held = (scale.data_ptr(), shift.data_ptr(), out.data_ptr())
    shape = (n, groups, cols // groups, _bf16(out), _threads(out.numel()))
    _library().edgezo_expand_int4(packed.data_ptr(), nibble, *held, *shape)
    return True


def read_plane(high: Tensor, low: Tensor, out: Tensor) -> bool:
    """out (n, cols) fp32 = bf16 weights and their low-order plane (layouts.Dense); False without a kernel for it."""
    return high.dtype is torch.bfloat16 and _plane("read", high, low, out)


def write_plane(values: Tensor, high: Tensor, low: Tensor) -> bool:
    """The other way, to the nearest; False without a kernel for it."""
    return high.dtype is torch.bfloat16 and _plane("write", values, high, low)


def snap_plane(values: Tensor) -> bool:
    """``values`` fp32 to what is read after they have been written, in place; False without a kernel for it."""
    return _plane("snap", values)


def _plane(what: str, *parts: Tensor) -> bool:
    """One pass over tensors of as many elements each."""
    if not usable(*parts):
        return False
    n = parts[0].numel()
    run = getattr(_library(), f"edgezo_{what}_plane")
    run(*(part.data_ptr() for part in parts), n, _threads(n))
    return True


# ------------------------------------------------------------------------------------ noise


def noise(
    address: tuple[int, ...],  # key (2 words), then the counter's last three
    table: np.ndarray,  # (256,) uint64 of eight signs each; or (65536,) fp32
    rows: slice,
    width: int,
) -> Tensor | None:
    """Rows of a matrix of signs (n, width) int8, or of the table's levels (n, width) fp32; None without a library."""
    library = _library()
    if library is None:
        return None
    signs, n = len(table) == 256, rows.stop - rows.start
    dtype = torch.int8 if signs else torch.float32
    made = torch.empty(n, width, dtype=dtype, device="cpu")
    words = (c_uint64 * 5)(*address)
    draw = library.edgezo_signs if signs else library.edgezo_levels
    shape = (made.data_ptr(), rows.start, n, width, _threads(made.numel()))
    at = ctypes.addressof(words)
    draw(at, at + 16, table.ctypes.data, *shape)
    return made
