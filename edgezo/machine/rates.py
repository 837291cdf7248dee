"""How fast this machine is, measured in a second or two: matrix products, copies in memory, a file on a disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgezo.machine.clock import now_s

if TYPE_CHECKING:
    from torch import Tensor

LEAST_S = 0.05  # for so long a product or a copy is repeated, and the fastest time counts
SHAPE = (128, 512, 1024)  # rows, terms, columns: 0.13 GFLOP
MOVED_BYTES = 64 << 20  # more than a cache of the processor holds
FILE_BYTES = 4 << 20


def _fastest_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls; at least two, of which the first one prepares."""
    begun_s, best_s = now_s(), float("inf")
    work()
    while True:
        before_s = now_s()
        work()
        after_s = now_s()
        best_s = min(best_s, after_s - before_s)
        if after_s - begun_s >= LEAST_S:
            return max(best_s, 1e-9)


def products_flops_s() -> dict[str, float]:
    """Operations a second of PyTorch's products with all of its threads, by dtype: fp32, bf16, int8.

    A dtype that PyTorch has no product for is left out.
    """
    import torch

    n, k, m = SHAPE
    left, right = torch.randn(n, k), torch.randn(k, m)
    pairs: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
        "fp32": (torch.mm, left, right),
        "bf16": (torch.mm, left.bfloat16(), right.bfloat16()),
        "int8": (torch._int_mm, left.mul(20).char(), right.mul(20).char()),
    }
    rates = {}
    for name, (product, x, w) in pairs.items():
        try:
            rates[name] = 2 * n * k * m / _fastest_s(lambda p=product, x=x, w=w: p(x, w))  # type: ignore[misc]
        except RuntimeError:  # there is none for a CPU
            continue
    return rates


def memory_bytes_s() -> float:
    """Bytes a second that one thread reads and writes while it copies."""
    source = bytearray(MOVED_BYTES)
    goal = memoryview(bytearray(MOVED_BYTES))

    def copy() -> None:
        goal[:] = source

    return 2 * MOVED_BYTES / _fastest_s(copy)


class DiskRates(NamedTuple):
    """Bytes a second of a disk."""

    write_bytes_s: float
    read_bytes_s: float


def disk_rates(folder: Path) -> DiskRates:
    """Of the disk that ``folder`` is on, by a file of ``FILE_BYTES`` that is gone afterwards. Raises OSError."""
    block = os.urandom(FILE_BYTES)  # which no disk can make smaller
    # On Linux the file never has a name, so that nothing remains of it even after a kill.
    with tempfile.TemporaryFile(dir=folder, prefix=".edgezo-") as file:
        begun_s = now_s()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written_s = now_s()
        if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        asked_s = now_s()
        file.read()
        read_s = now_s()
    write_s, read_back_s = max(written_s - begun_s, 1e-9), max(read_s - asked_s, 1e-9)
    return DiskRates(FILE_BYTES / write_s, FILE_BYTES / read_back_s)
