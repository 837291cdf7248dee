"""About how long a step and an evaluation take, from the machine's estimated speed. Pure, as planner.py."""

from __future__ import annotations

import math

from edgezo.machine.limits import EVAL_TOKENS
from edgezo.plan.choices import Choice, moved_bytes
from edgezo.plan.data_fields import LOSS
from edgezo.plan.footprint_gpu import CudaFootprint

SHARE_OF_PEAK = 0.4  # of the machine's estimated speed that a whole step reaches


def step_s(choice: Choice) -> float:
    """Seconds of a step: two floating-point operations for each weight and token, on every side of every example."""
    cfg, tokens = choice.footprint.cfg, choice.footprint.tokens
    # A linear probe reads prompts, and no label word behind them. Elsewhere the whole vocabulary may be scored, once
    # more for the exact head's gradient.
    probed = tokens.prompt_mean if cfg.parts.readout else 0.0
    scorings = 0 if probed else 2 if cfg.parts.head else 1
    written = tokens.written if cfg.objective != LOSS else 0
    length = probed or tokens.mean or tokens.tokens[0]
    each = _products(choice, length, scorings, written, cfg.mean_passes)
    passes = math.ceil(cfg.batch_size / choice.option.micro_batch)
    return _seconds(choice, 2 * cfg.batch_size * each, passes)


def evaluation_s(choice: Choice) -> float | None:
    """Seconds of an evaluation by label words, options or written answers; None where no data was given."""
    tokens = choice.footprint.tokens
    if not tokens.evaluations:
        return None
    length = tokens.evaluated_mean or tokens.evaluated
    each = _products(choice, length, 1, tokens.written)
    passes = math.ceil(tokens.evaluations * length / EVAL_TOKENS)
    return _seconds(choice, 2 * tokens.evaluations * each, passes)


def pass_row_s(choice: Choice) -> float:
    """Seconds that a row takes through frozen blocks whose output is kept; 0 where none is."""
    footprint = choice.footprint
    if footprint.below is None:
        return 0.0
    length = footprint.tokens.mean or footprint.tokens.tokens[0]
    return _seconds(choice, 2 * footprint.below.shape.elements * length, 0)


def _seconds(choice: Choice, operations: float, passes: int) -> float:
    """Seconds of so many floating-point operations, in so many forward passes."""
    footprint, option = choice.footprint, choice.option
    cfg = footprint.cfg
    if isinstance(footprint, CudaFootprint):
        gpu = footprint.gpu
        launching_s = passes * footprint.shape.layers * gpu.block_s
        copied_bytes = passes * moved_bytes(footprint, option)
        return launching_s + operations / gpu.flops_s + copied_bytes / gpu.copy_bytes_s
    machine = choice.machine
    low = footprint.compute_dtype(option.precision)[0] == "bf16"
    speed = (machine.bf16_flops_s if low else machine.flops_s) * SHARE_OF_PEAK
    if cfg.threads is not None:
        speed *= min(1.0, cfg.threads / machine.cores)
    return operations / speed


def _products(
    choice: Choice, length: float, scorings: int, written: int, passes: float = 1.0
) -> float:
    """Weights that an example of ``length`` tokens is multiplied by in so many forward passes, summed over its tokens.

    The whole vocabulary is scored so many times, unless label words are scored; and so many tokens are ``written``.
    Frozen blocks in memory run once, and not for each pass.
    """
    footprint, tokens = choice.footprint, choice.footprint.tokens
    shape = footprint.trained_shape
    products = shape.elements * (length + written)
    vocabulary = shape.tables[0].numel
    if not tokens.label_words:
        products += scorings * vocabulary * min(tokens.scored, length)
    frozen = (footprint.shape.elements - shape.elements) * length
    return passes * (products + vocabulary * written) + frozen
