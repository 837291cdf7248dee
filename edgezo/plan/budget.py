"""Which memory a request is planned for, the machine's or its GPU's, and how much of it. Pure, as planner.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from edgezo.errors import UsageError
from edgezo.machine.limits import MB
from edgezo.plan.config import RunConfig

if TYPE_CHECKING:
    from edgezo.machine.hardware import Gpu, Machine


def choose_device(cfg: RunConfig, machine: Machine) -> tuple[str, str]:
    """(cpu or cuda, reason). Raises UsageError where a GPU is asked for and there is none."""
    gpu = machine.gpu
    if cfg.device == "cpu" or cfg.residency == "disk":
        return "cpu", "as given" if cfg.device == "cpu" else "weights on disk are for the CPU"
    if gpu is not None:
        free = f"{gpu.name}, {mb(gpu.available_bytes)} of it free"
        return "cuda", f"as given: {free}" if cfg.device == "cuda" else free
    if cfg.device == "auto" and cfg.residency != "host":
        return "cpu", "there is no GPU that PyTorch could use"
    asked = "--device cuda" if cfg.device == "cuda" else "--residency host"
    raise UsageError(
        f"{asked}: there is no GPU that PyTorch could use. nvidia-smi has to show one, CUDA_VISIBLE_DEVICES has to "
        "allow it, and PyTorch has to be built for CUDA.\nUse --device cpu, with a --max-mem for the machine's memory."
    )


def default_budget(memory: Machine | Gpu) -> tuple[int, str]:
    """(bytes, reason) of ``--max-mem`` where it is not given.

    80 % of what is free, or less where otherwise less than 2 GB, or 10 % of the memory if that is more, would stay
    free for others. At least half of what is free, however little that is.
    """
    free = memory.available_bytes
    headroom = max(2000 * MB, memory.total_bytes // 10)
    budget = max(free // 2, min(free * 8 // 10, free - headroom))
    share = round(100 * budget / free) if free else 0
    return budget, f"--max-mem not given: {share} % of the {free // MB}MB available now"


def portable(cfg: RunConfig, machine: Machine) -> RunConfig:
    """The request of a run for this machine: where the run's GPU is missing, on the CPU under its default cap."""
    if cfg.device != "cuda" or machine.gpu is not None:
        return cfg
    return replace(cfg, device="cpu", max_mem_bytes=None, residency=None)


def budget(cfg: RunConfig, machine: Machine) -> tuple[int, str]:
    """(bytes, reason) of the request's cap: of the RAM, or of the GPU's memory where the GPU computes."""
    on_gpu = machine.gpu is not None and choose_device(cfg, machine)[0] == "cuda"
    if cfg.max_mem_bytes is None:
        return default_budget(machine.gpu if on_gpu and machine.gpu is not None else machine)
    if on_gpu and machine.gpu is not None and cfg.max_mem_bytes > machine.gpu.available_bytes:
        free_bytes, total_bytes = machine.gpu.available_bytes, machine.gpu.total_bytes
        return free_bytes, (
            f"{mb(cfg.max_mem_bytes)} were given, but {mb(total_bytes - free_bytes)} of the GPU's {mb(total_bytes)} "
            "are not free: the display and other programs hold them"
        )
    return cfg.max_mem_bytes, "as given"


def mb(n_bytes: int) -> str:
    """Bytes in MB, rounded up, so that the number is enough when it is given as --max-mem."""
    return f"{math.ceil(n_bytes / MB)}MB"
