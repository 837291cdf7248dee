"""About how long a step takes, from the machine's estimated speed. Pure, as planner.py."""

from __future__ import annotations

import math

from edgezo.plan.choices import Choice, moved_bytes
from edgezo.plan.data_fields import LOSS
from edgezo.plan.footprint_gpu import CudaFootprint

SHARE_OF_PEAK = 0.4  # of the machine's estimated speed that a whole step reaches
# On a GPU: seconds that a step takes for each block, however small (noise is made on the CPU); how many operations a
# second it computes, and how many bytes a second it copies from the RAM (roughly, by three short runs on an H100).
GPU_BLOCK_S, GPU_FLOPS_S, GPU_COPY_BYTES_S = 1.2e-2, 2e14, 2e10


def step_s(choice: Choice) -> float:
    """Seconds of a step: two floating-point operations for each weight and token, on every side of every example."""
    footprint, option = choice.footprint, choice.option
    cfg = footprint.cfg
    operations = 2 * cfg.batch_size * _operations_per_example(choice)
    if isinstance(footprint, CudaFootprint):
        passes = math.ceil(cfg.batch_size / option.micro_batch)
        launching_s = passes * footprint.shape.layers * GPU_BLOCK_S
        copied_bytes = passes * moved_bytes(footprint, option)
        return launching_s + operations / GPU_FLOPS_S + copied_bytes / GPU_COPY_BYTES_S
    machine = choice.machine
    low = footprint.compute_dtype(option.precision)[0] == "bf16"
    speed = (machine.bf16_flops_s if low else machine.flops_s) * SHARE_OF_PEAK
    if cfg.threads is not None:
        speed *= min(1.0, cfg.threads / machine.cores)
    return operations / speed


def _operations_per_example(choice: Choice) -> float:
    """Weights that an example of mean length is multiplied by in a step, summed over its tokens on all sides."""
    footprint = choice.footprint
    shape, cfg, tokens = footprint.trained_shape, footprint.cfg, footprint.tokens
    length = tokens.mean or tokens.tokens[0]
    operations = shape.elements * length
    if not tokens.label_words:
        # The whole vocabulary is scored, once more for the exact head's gradient.
        passes = 2 if cfg.parts.head else 1
        operations += passes * shape.tables[0].numel * min(tokens.scored, length)
    if cfg.objective != LOSS:
        operations += (shape.elements + shape.tables[0].numel) * tokens.written
    frozen = (footprint.shape.elements - shape.elements) * length  # once, not on each side
    return cfg.mean_passes * operations + frozen
