"""The library of C kernels (kernels.c), loaded without torch: what noise needs of it, and kernels.py all the rest.

The package's build compiles it where it finds GCC. Without it noise is made by numpy, with the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import os
import zlib
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from typing import Any

import numpy as np

from edgezo.machine.hardware import kernels_library

_GRAIN = 1 << 15  # a second thread costs more than it saves for fewer elements than twice this
_P, _N, _I, _F = c_void_p, c_int64, c_int, c_float
SIGNATURES = {
    "rms_norm": (_P, _P, _P, _N, _N, _N, _F, _F, _I, _I, _I),
    "gate": (_P, _P, _N, _I, _I, _I),
    "attention": (_P, _P, _N, _P, _N, _I),
    "rotate": (_P, _P, _P, _N, _N, _N, _N, _I, _I),
    "thin_product": (_P, _P, _P, _N, _N, _N, _I, _I),
    "thin_sum": (_P, _P, _P, _N, _N, _N, _I, _I),
    "dots_by_example": (_P, _P, _P, _P, _N, _N, _I, _I),
    "add_thin": (_P, _I, _I),
    "expand_int8": (_P, _P, _P, _N, _N, _I, _I),
    "expand_int4": (_P, _I, _P, _P, _P, _N, _N, _N, _I, _I),
    "read_plane": (_P, _P, _P, _N, _I),
    "write_plane": (_P, _P, _P, _N, _I),
    "snap_plane": (_P, _N, _I),
    "signs": (_P, _P, _P, _P, _N, _N, _N, _I),
    "levels": (_P, _P, _P, _P, _N, _N, _N, _I),
    "crc32": (_P, _N, _N, ctypes.c_uint32, _P, _I),
}


@functools.cache
def library() -> Any:
    """The loaded library; None where there is none, or none that was compiled from the kernels.c beside it."""
    file = kernels_library()
    if file is None:
        return None
    try:
        loaded = ctypes.CDLL(str(file))
        loaded.edgezo_source.restype = ctypes.c_uint32
        if loaded.edgezo_source() != zlib.crc32(file.with_name("kernels.c").read_bytes()):
            return None
        for name, types in SIGNATURES.items():
            function = getattr(loaded, f"edgezo_{name}")
            function.argtypes, function.restype = types, None
    except (OSError, AttributeError):
        return None
    return loaded


_forked = False


def _after_fork() -> None:
    """From now on use one thread: a forked child has none of its parent's, and OpenMP would wait for them for ever."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_for(elements: int, most: int) -> int:
    """How many threads to use: one or all, since OpenMP ends and restarts its threads when their number changes."""
    return 1 if _forked or elements < 2 * _GRAIN else most


def draw_noise(
    address: tuple[int, ...], table: np.ndarray, rows: slice, width: int, out: int, threads: int
) -> None:
    """Write rows of a matrix of noise (zo/bits.py), (n, width), to the memory at ``out``; there must be a library.

    ``address``: Philox's key (2 words), then its counter's last three. ``table``: (256,) uint64, the eight signs of
    each byte, gives int8; (65536,) fp32 gives its values.
    """
    words = (c_uint64 * 5)(*address)
    draw = library().edgezo_signs if len(table) == 256 else library().edgezo_levels
    key = ctypes.addressof(words)
    counter = key + 16  # the key is two words of 8 bytes
    shape = (out, rows.start, rows.stop - rows.start, width, threads)
    draw(key, counter, table.ctypes.data, *shape)


def crc32(data: memoryview | np.ndarray, start: int = 0) -> int:
    """``zlib.crc32`` of flat bytes, beginning with the CRC ``start``: five times as fast with a library."""
    flat = np.frombuffer(data, np.uint8)
    if not folds():
        return zlib.crc32(flat.data, start)
    return int(sums_of_rows(flat.reshape(1, -1), start, threads=1)[0])


def folds() -> bool:
    """Whether there is a library, and the CPU has what its checksum needs."""
    loaded = library()
    return loaded is not None and bool(loaded.edgezo_crc32_is_fast())


def sums_of_rows(rows: np.ndarray, start: int, threads: int) -> np.ndarray:
    """(n,) uint32: the CRCs of rows (n, bytes) uint8, each beginning with ``start``; there must be a library."""
    sums = np.empty(len(rows), np.uint32)
    library().edgezo_crc32(rows.ctypes.data, *rows.shape, start, sums.ctypes.data, threads)
    return sums
