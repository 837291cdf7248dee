"""The memory that ``--max-mem`` caps: that of the process (device cpu), or that of one GPU (device cuda).

On a GPU the cap bounds what PyTorch's allocator reserves plus what the driver keeps for this process (its context). The
allocator refuses what would go above it, so the cap is never crossed; such a refusal is handled as short memory is
handled on a CPU.
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
from edgezo.machine.gpu_figures import REFERENCE_CARD
from edgezo.machine.hardware import Gpu, Machine, format_bytes
from edgezo.machine.limits import GUARD_MARGIN_BYTES
from edgezo.machine.process_memory import malloc_trim, peak_rss_bytes, rss_bytes


class Memory(Protocol):
    """The memory that a run's cap applies to."""

    margin_bytes: int  # kept free for allocations that are not announced to the guard
    unit: str  # in the names of figures: "rss" or "cuda"
    load_peak_bytes: int  # the peak when loading ended; 0 before that

    def held_bytes(self) -> int:
        """What is held now."""
        ...

    def peak_bytes(self) -> int:
        """The most that was held so far."""
        ...

    def trim(self) -> None:
        """Give back memory that is held but not in use."""
        ...

    def short(self, item: str) -> AbstractContextManager[None]:
        """A block that computes ``item``. Raises BudgetExceeded where the memory has no room for it."""
        ...

    def loaded(self) -> None:
        """Note the peak of loading, when all weights are in their places."""
        ...

    def measure_context(self) -> None:
        """Re-measure the driver's context after the first step, and leave the rest of the cap to the allocator."""
        ...

    def figures(self) -> dict[str, int]:
        """Figures for the summary beside the resident memory of the process, in bytes."""
        ...


class ProcessMemory:
    """The resident memory of this process: device cpu."""

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

    def measure_context(self) -> None: ...

    def figures(self) -> dict[str, int]:
        return {}


class CudaMemory:
    """What this process holds of a GPU's memory: device cuda. The first one made starts CUDA."""

    margin_bytes, unit, load_peak_bytes = 0, "cuda", 0

    def __init__(self, cap_bytes: int, gpu: Gpu | None):
        global _free_before_bytes
        self.cap_bytes = cap_bytes
        # At least so much is kept for the context: as planned, even where it has been smaller so far.
        self.least_context_bytes = (
            gpu.figures if gpu is not None else REFERENCE_CARD
        ).context_bytes
        if not torch.cuda.is_initialized():
            _free_before_bytes = gpu.available_bytes if gpu is not None else None
            _grow_by_pages()
        # The sums of an update are exact in fp32; TF32 would round them.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.empty(1, device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.context_bytes = 0
        self.measure_context()

    def loaded(self) -> None:
        self.trim()  # the temporaries of converting the weights
        self.load_peak_bytes = self.peak_bytes()

    def measure_context(self) -> None:
        self.trim()
        self.context_bytes = max(self.context_bytes, _context_bytes(self.least_context_bytes))
        total_bytes = torch.cuda.mem_get_info()[1]
        room_bytes = self.cap_bytes - self._kept_bytes
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, room_bytes / total_bytes)))

    @property
    def _kept_bytes(self) -> int:
        return max(self.context_bytes, self.least_context_bytes)

    def held_bytes(self) -> int:
        return self._kept_bytes + torch.cuda.memory_reserved()

    def peak_bytes(self) -> int:
        return self.context_bytes + torch.cuda.max_memory_reserved()

    def free_bytes(self) -> int:
        """What no program holds of the GPU."""
        return torch.cuda.mem_get_info()[0]

    def trim(self) -> None:
        torch.cuda.empty_cache()

    @contextmanager
    def short(self, item: str) -> Iterator[None]:
        try:
            yield
            return
        except torch.OutOfMemoryError as problem:
            # The frames of the traceback keep alive what was computed so far.
            traceback.clear_frames(problem.__traceback__)
            wanted = str(problem).partition(". ")[0]
        torch.cuda.empty_cache()
        free_bytes = self.free_bytes()
        if self.held_bytes() + free_bytes < self.cap_bytes:
            raise BudgetExceeded(
                f"stopped: {item} found the GPU full ({wanted}). This run holds {format_bytes(self.held_bytes())} of "
                f"its --max-mem {format_bytes(self.cap_bytes)}, and other programs have left "
                f"{format_bytes(free_bytes)}. Close them, or go on with --resume and a smaller --max-mem."
            )
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


# Free memory of the GPU before this process had a context there; None where nvidia-smi did not tell. It belongs to the
# process, as the context does.
_free_before_bytes: int | None = None


def _context_bytes(planned_bytes: int) -> int:
    """Bytes that the driver keeps for this process; the planned number where other processes obscure it."""
    if _free_before_bytes is None:
        return planned_bytes
    free_bytes = torch.cuda.mem_get_info()[0]
    context_bytes = _free_before_bytes - free_bytes - torch.cuda.memory_reserved()
    return context_bytes if 0 < context_bytes < 2 * planned_bytes else planned_bytes


def _grow_by_pages() -> None:
    """Let PyTorch's allocator grow one segment page by page: fixed segments leave holes that no plan can count."""
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ:
        return  # the user has chosen
    newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    set_allocator = newer or torch.cuda.memory._set_allocator_settings
    set_allocator("expandable_segments:True")


def open_memory(device: str, cap_bytes: int, machine: Machine) -> Memory:
    """The memory of ``device`` ("cpu" or "cuda") under this cap, ready to compute in."""
    return ProcessMemory() if device == "cpu" else CudaMemory(cap_bytes, machine.gpu)


def confirmed(machine: Machine) -> Machine:
    """``machine`` without a GPU or C kernels that turn out, now that PyTorch is imported, not to be usable."""
    gpu = machine.gpu if torch.cuda.is_available() else None
    if gpu is not None and torch.cuda.is_initialized():
        # What this process holds there already is not taken by others.
        held_bytes = torch.cuda.memory_reserved() + _context_bytes(gpu.figures.context_bytes)
        gpu = replace(gpu, available_bytes=min(gpu.total_bytes, gpu.available_bytes + held_bytes))
    return replace(machine, gpu=gpu, c_kernels=kernels.loaded())
