"""Where a run computes, and the memory there that ``--max-mem`` caps: the process's, or that of one GPU.

On a GPU it bounds what PyTorch's allocator reserves and what the driver keeps for this process (its context). The
allocator refuses what would go above the bound, so the cap is not crossed, and what is refused is treated as memory
that is short anywhere else.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from edgezo.errors import BudgetExceeded
from edgezo.machine import kernels
from edgezo.machine.hardware import Gpu, Machine, format_bytes
from edgezo.machine.limits import CONTEXT_BYTES, GUARD_MARGIN_BYTES
from edgezo.machine.process_memory import malloc_trim, peak_rss_bytes, rss_bytes


class Memory(Protocol):
    """The memory that a run's cap is on, in bytes."""

    margin_bytes: int  # kept free for what nobody announces
    unit: str  # in the names of figures: rss or cuda
    load_peak_bytes: int

    def held_bytes(self) -> int: ...

    def peak_bytes(self) -> int:
        """The most that was held so far."""
        ...

    def trim(self) -> None:
        """Give back what is held and not in use."""
        ...

    def short(self, item: str) -> AbstractContextManager[None]:
        """A block in which ``item`` is computed: BudgetExceeded where the memory has no room for it."""
        ...

    def loaded(self) -> None:
        """All weights are in their places."""
        ...

    def look_again(self) -> None:
        """Take in what a first step has shown."""
        ...

    def figures(self) -> dict[str, int]:
        """What a summary says of it beside the resident memory of the process."""
        ...


class ProcessMemory:
    """The resident memory of this process."""

    margin_bytes, unit, load_peak_bytes = GUARD_MARGIN_BYTES, "rss", 0

    def held_bytes(self) -> int:
        return rss_bytes()

    def peak_bytes(self) -> int:
        return peak_rss_bytes()

    def trim(self) -> None:
        malloc_trim()

    @contextmanager
    def short(self, item: str) -> Iterator[None]:
        yield

    def loaded(self) -> None:
        self.load_peak_bytes = self.peak_bytes()

    def look_again(self) -> None: ...

    def figures(self) -> dict[str, int]:
        return {}


class CudaMemory:
    """The memory of the GPU as far as it is this process's."""

    margin_bytes, unit, load_peak_bytes = 0, "cuda", 0

    def __init__(self, cap_bytes: int, gpu: Gpu | None):
        global _free_before_bytes
        self.cap_bytes = cap_bytes
        if not torch.cuda.is_initialized():
            _free_before_bytes = gpu.available_bytes if gpu is not None else None
            _grow_by_pages()
        # Sums of an update are exact in fp32, and in nothing less.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.empty(1, device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.context_bytes = 0
        self.look_again()

    def loaded(self) -> None:
        self.trim()  # what converting the weights took
        self.load_peak_bytes = self.peak_bytes()

    def look_again(self) -> None:
        """Measure the context, which grows with the kernels that are loaded, and leave the rest to the allocator."""
        self.trim()
        self.context_bytes = max(self.context_bytes, _context_bytes())
        total_bytes = torch.cuda.mem_get_info()[1]
        room_bytes = self.cap_bytes - self._kept_bytes
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, room_bytes / total_bytes)))

    @property
    def _kept_bytes(self) -> int:
        """For the context; what was planned, even where less has been seen so far."""
        return max(self.context_bytes, CONTEXT_BYTES)

    def held_bytes(self) -> int:
        return self._kept_bytes + torch.cuda.memory_reserved()

    def peak_bytes(self) -> int:
        return self.context_bytes + torch.cuda.max_memory_reserved()

    def trim(self) -> None:
        torch.cuda.empty_cache()

    @contextmanager
    def short(self, item: str) -> Iterator[None]:
        try:
            yield
            return
        except torch.OutOfMemoryError as problem:
            # What was computed so far hangs on the frames of the traceback.
            traceback.clear_frames(problem.__traceback__)
            wanted = str(problem).partition(". ")[0]
        torch.cuda.empty_cache()
        raise BudgetExceeded(
            f"stopped before --max-mem {format_bytes(self.cap_bytes)} of the GPU was crossed by {item}: "
            f"{wanted}. Go on with --resume and a larger --max-mem."
        )

    def figures(self) -> dict[str, int]:
        return {
            "cuda_peak_bytes": self.peak_bytes(),
            "cuda_context_bytes": self.context_bytes,
            "cuda_peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "cuda_peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        }


_free_before_bytes: int | None = None  # on the GPU, before this process had a context there


def _context_bytes() -> int:
    """What the driver keeps for this process. The planned figure where it can't be told apart from other processes'."""
    if _free_before_bytes is None:
        return CONTEXT_BYTES
    free_bytes = torch.cuda.mem_get_info()[0]
    found = _free_before_bytes - free_bytes - torch.cuda.memory_reserved()
    return found if 0 < found < 2 * CONTEXT_BYTES else CONTEXT_BYTES


def _grow_by_pages() -> None:
    """Let the allocator grow one segment by pages: fixed segments leave holes that no plan could count."""
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ:
        return  # the user's choice
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    set_allocator = newer or torch.cuda.memory._set_allocator_settings
    set_allocator("expandable_segments:True")


def open_memory(device: str, cap_bytes: int, machine: Machine) -> Memory:
    """That of ``device`` (cpu or cuda), ready to be computed in."""
    return ProcessMemory() if device == "cpu" else CudaMemory(cap_bytes, machine.gpu)


def confirmed(machine: Machine) -> Machine:
    """The machine without what PyTorch, imported by now, cannot use: its GPU, the C kernels."""
    gpu = machine.gpu if torch.cuda.is_available() else None
    return replace(machine, gpu=gpu, c_kernels=kernels.loaded())
