"""Which method a plan takes and why, in one sentence, and what first-order LoRA would take in its place. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from edgezo.data.token_stats import TokenStats
from edgezo.errors import UsageError
from edgezo.plan.budget import mb
from edgezo.plan.choices import Option, options
from edgezo.plan.config import Batched, RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.plan.footprint import Footprint
from edgezo.plan.footprint_backward import BackwardFootprint, CudaBackwardFootprint
from edgezo.plan.footprint_gpu import CudaFootprint
from edgezo.plan.plan import Decision
from edgezo.plan.request import as_estimator
from edgezo.zo.axes import step_meaning
from edgezo.zo.parts import PARTS, without_exact
from edgezo.zo.presets import DEFAULT, DEFAULT_TRAIN, FIRST_ORDER, steps_by

# In fewer steps a linear probe on label words does as well or better
# (benchmarks/log/2026-11-23-is-first-order-lora-worth-it-in-few-steps.md).
FIRST_ORDER_STEPS = 100


class LoraBeside(NamedTuple):
    """What --estimator lora would take in place of a request that is planned."""

    stock: str  # what stock peft and PyTorch would take, in words
    stock_bytes: int
    least_bytes: int | None  # the least it takes; None where it is no request
    fitting: tuple[Option, int] | None  # the first option within the cap, and its bytes

    @staticmethod
    def of(footprint: Footprint, cap: int) -> LoraBeside:
        """It is asked for with its weights in memory: from the disk it would read them three times a step."""
        stock = f"bf16 base, AdamW, {footprint.cfg.batch_size} examples at once"
        usual = _stock_bytes(footprint)
        other = _as_lora(footprint)
        if other is None:
            return LoraBeside(stock, usual, None, None)
        sizes = [(o, other.needed_bytes(*o)) for o in options(other.cfg, other.shape.layers)]
        fitting = next(((option, size) for option, size in sizes if size <= cap), None)
        return LoraBeside(stock, usual, min(size for _, size in sizes), fitting)

    def decision(self) -> Decision:
        """The row of the plan: where LoRA fits it reaches a higher accuracy, and the user should know."""
        name, usual = "first-order LoRA", mb(self.stock_bytes)
        stock = f"with stock peft and PyTorch ({self.stock})"
        if self.least_bytes is None:
            return Decision(name, f"about {usual}", stock)
        stock += f" about {usual}"
        if self.fitting is None:
            reason = f"--estimator lora, a block at a time, does not fit; {stock}"
            return Decision(name, mb(self.least_bytes), reason)
        option, size = self.fitting
        reason = (
            f"fits with --estimator lora, a block at a time in {option.precision}, and given time reaches a higher "
            f"accuracy; {stock}"
        )
        return Decision(name, mb(size), reason)

    def sentence(self) -> str:
        """How it would do beside forward passes alone."""
        if self.least_bytes is None:
            return ""
        if self.fitting is None:
            return (
                f"; --estimator lora would learn more in a step, but needs {mb(self.least_bytes)}"
            )
        size = mb(self.fitting[1])
        return f"; in {FIRST_ORDER_STEPS} steps or more --estimator lora does better, and it fits ({size})"


def is_default(cfg: RunConfig) -> bool:
    """Whether a request has the default's readout and steps. A run may have dropped the readout that its rows lack."""
    perturbed = set(without_exact(DEFAULT_TRAIN))
    return cfg.estimator == DEFAULT and perturbed < set(cfg.train) <= set(DEFAULT_TRAIN)


def method_name(trained: Collection[str], cfg: RunConfig) -> str:
    """What makes a result, part by part: "default (linear probe + GRZO)".

    A readout is never booked under the name of the estimator beside it. ``trained`` names parts of ``--train``.
    """
    parts = [PARTS[name] for name in trained]
    names = {
        "linear probe": any(part.readout for part in parts),
        "exact head": any(part.head for part in parts),
        "LoRA": any(part.adapters for part in parts),
        steps_by(cfg.estimator).upper(): any(part.perturbed for part in parts),
    }
    made = " + ".join(name for name, is_there in names.items() if is_there) or "nothing trained"
    return f"{DEFAULT} ({made})" if is_default(cfg) else made


def method(cfg: RunConfig, tokens: TokenStats, lora: LoraBeside) -> Decision:
    """The method of a run, and in one sentence why it, and what would do better."""
    readout = cfg.parts.readout and tokens.classes > 0
    unused = "head" if readout else "probe"
    if cfg.estimator in FIRST_ORDER:
        why = "a gradient learns more in a step than forward passes alone"
    elif cfg.objective != LOSS:
        why = f"a score of predictions ({cfg.objective}) has no gradient, so forward passes alone"
    elif cfg.estimator != DEFAULT:
        why = f"as --estimator {cfg.estimator} asks{lora.sentence()}"
    elif readout:
        why = f"of all methods a linear probe does best in few steps{lora.sentence()}"
    else:
        why = f"forward passes alone take the least memory{lora.sentence()}"
    return Decision("method", method_name([p for p in cfg.train if p != unused], cfg), why)


def estimator_reason(cfg: RunConfig) -> str:
    """The estimator's choices on the axes, and what --step means with them."""
    if (first_order := FIRST_ORDER.get(cfg.estimator)) is not None:
        return f"{first_order.equation}; --step {cfg.step:g} is the {first_order.step_meaning}"
    axes = [f"{cfg.directions} directions", f"{cfg.credit} credit", f"rule {cfg.rule}"]
    if cfg.mask != "none":
        axes.insert(1, f"mask {cfg.mask}")
    step = "--step auto begins from" if cfg.step_auto else "--step"
    meaning = step_meaning(cfg.credit, cfg.rule)
    return f"{', '.join(axes)}; {step} {cfg.step:g}{', ' if cfg.step_auto else ' is '}{meaning}"


def _as_lora(footprint: Footprint) -> BackwardFootprint | None:
    """The request with --estimator lora in memory, where it is planned; None where that is no request."""
    asked = replace(footprint.cfg, residency="resident")
    try:
        cfg = Batched.of(as_estimator(asked, "lora"))
    except UsageError:
        return None
    known = (
        *("shape", "tokens", "bf16_fast", "c_kernels", "base_bytes", "source_bytes", "caller"),
        *("frozen_blocks", "above_cut", "below"),
    )
    same = {name: getattr(footprint, name) for name in known}
    if isinstance(footprint, CudaFootprint):
        return CudaBackwardFootprint(cfg=cfg, gpu=footprint.gpu, **same)
    return BackwardFootprint(cfg=cfg, **same)


def _stock_bytes(footprint: Footprint) -> int:
    """About the peak of first-order LoRA with stock peft and PyTorch: bf16 base, AdamW, the whole batch at once.

    Backpropagation keeps, of each token in each block, the inputs of both norms in fp32 and their results, inputs
    and result of attention, gate, activation, up and their product, for peft's factors the input of each linear in
    fp32; at the end logits in bf16, three times in fp32, and their gradients (measured: 5.65 GB for 16 x 128 tokens
    of SmolLM2-135M).
    """
    shape = footprint.shape
    tables = sum(t.numel for t in shape.tables)
    weights = 2 * (shape.elements + tables + shape.vector_elements)
    factors = (shape.rows + shape.cols) * footprint.cfg.rank
    kept = (
        16 * shape.hidden + 4 * shape.qkv_width + (8 if shape.gated else 6) * shape.intermediate
    ) + 4 * sum(m.d_in for m in shape.block)
    tokens = footprint.tokens.longest(footprint.cfg.batch_size)
    held = sum(item.bytes for item in footprint.process()) + weights + 16 * factors
    return held + tokens * (shape.layers * kept + 22 * shape.vocab)
