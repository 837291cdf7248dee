"""What a plan says about itself: the reason of each choice, what is trained, and why nothing fits. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from edgezo.plan.budget import budget, choose_device, mb
from edgezo.plan.calibration import CALLING
from edgezo.plan.choices import (
    PRECISIONS_TRIED,
    Choice,
    Option,
    best_within,
    least_bytes,
    least_in_memory,
    micro_batches,
    moved_bytes,
    precisions,
)
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.plan.footprint import Footprint
from edgezo.plan.method import LoraBeside, estimator_reason, method
from edgezo.plan.numbers import rounding_of
from edgezo.plan.plan import Decision, PlanDoesNotFit
from edgezo.plan.shapes import MatrixShape, ModelShape
from edgezo.zo.axes import ROUNDINGS
from edgezo.zo.parts import PARTS
from edgezo.zo.presets import DEFAULT, DEFAULT_PRESET, DEFAULT_TRAIN, PRESETS


def decisions(choice: Choice) -> tuple[Decision, ...]:
    """Everything that was chosen, by the user or by the planner, each with its reason."""
    request, footprint, option = choice.request, choice.footprint, choice.option
    cfg, precision = footprint.cfg, option.precision
    compute, compute_reason = footprint.compute_dtype(precision)
    rounding, rounding_reason = rounding_of(cfg, precision)
    lora = LoraBeside.of(footprint, choice.cap_bytes)
    made = [
        method(cfg, footprint.tokens, lora),
        Decision("device", choice.device, choose_device(request, choice.machine)[1]),
        Decision("max_mem_bytes", choice.cap_bytes, budget(request, choice.machine)[1]),
        Decision("precision", precision, _precision_reason(footprint, precision)),
        Decision("compute_dtype", compute, compute_reason),
        Decision("estimator", cfg.estimator, estimator_reason(cfg)),
        Decision("train", "+".join(cfg.train), _trained_reason(cfg)),
        Decision("batch_size", cfg.batch_size, _batch_reason(request)),
        Decision("micro_batch", option.micro_batch, _micro_batch_reason(footprint, option)),
        Decision(
            "residency",
            footprint.elsewhere if option.on_disk else "resident",
            _residency_reason(footprint, option),
        ),
    ]
    made += choice.blocks.decisions
    if cfg.short_tokens is not None:
        reason = _short_tokens_reason(footprint, cfg.short_tokens)
        made.append(Decision("short_tokens", cfg.short_tokens, reason))
    if not cfg.parts.adapters:
        made.append(lora.decision())
    if rounding is not None:
        made.append(Decision("rounding", rounding, rounding_reason))
    return tuple(made)


def flags_of(option: Option, elsewhere: str) -> str:
    """The options of the command line that ask for an option of the planner."""
    away = f" --residency {elsewhere}" if option.on_disk else ""
    return f"--precision {option.precision} --micro-batch {option.micro_batch}{away}"


# ---------------------------------------------------------------------------------------------
# Memory


def _precision_reason(footprint: Footprint, precision: str) -> str:
    cfg = footprint.cfg
    if cfg.precision is not None:
        return "as given"
    order = precisions(cfg)
    if len(order) == 1:
        return "full weights are trained in bf16 unless --precision names another"
    higher = order[: order.index(precision)]
    if not higher:
        return "the highest that is tried, and it fits"
    needs = ", ".join(f"{p} needs {mb(least_in_memory(footprint, (p,)))}" for p in higher)
    return f"the highest that fits: {needs}"


def _batch_reason(request: RunConfig) -> str:
    if request.batch_size is not None:
        return "as given"
    if request.micro_batch is not None and request.micro_batch > DEFAULT_BATCH:
        return "as large as --micro-batch"
    return "the default; micro-batches make a larger batch cost time, not memory"


def _micro_batch_reason(footprint: Footprint, option: Option) -> str:
    if footprint.cfg.micro_batch is not None:
        return "as given"
    larger = [m for m in micro_batches(footprint.cfg) if m > option.micro_batch]
    if not larger:
        most, sides = footprint.most_tokens(option.precision), footprint.sides
        pieces = f", in pieces of up to {most * sides:,} tokens" if most is not None else ""
        return f"the whole batch fits{pieces or ' at once'}"
    needs = footprint.needed_bytes(*option._replace(micro_batch=larger[-1]))
    return f"{larger[-1]} at once would need {mb(needs)}"


def _residency_reason(footprint: Footprint, option: Option) -> str:
    """Where the weights are, and how much a step moves where some are not in memory."""
    if not option.on_disk:
        return "all weights stay in memory"
    cfg, n_bytes = footprint.cfg, moved_bytes(footprint, option)
    passes = math.ceil(cfg.batch_size / option.micro_batch)
    moved = f"a step reads at least {mb(passes * n_bytes)}"
    if cfg.parts.weights:
        moved += f" and writes {mb(n_bytes)}"
    where = {"disk": "and the tables are on disk", "host": "are in the RAM"}[footprint.elsewhere]
    blocks = f"{option.on_disk} of {footprint.shape.layers} blocks {where}"
    why = ""
    if cfg.residency is None:
        why = f"in memory it would need {mb(least_in_memory(footprint, precisions(cfg)))}; "
    return f"{why}{blocks}: {moved}"


# ---------------------------------------------------------------------------------------------
# The method


def _trained_reason(cfg: RunConfig) -> str:
    return "; ".join(PARTS[part].reason.format(rank=cfg.rank) for part in cfg.train)


def _short_tokens_reason(footprint: Footprint, short_tokens: int) -> str:
    """How much of the data addax takes the gradient of."""
    tokens = footprint.tokens
    if tokens.tokens[0] <= short_tokens:
        return "every example is short enough for backpropagation"
    if tokens.known and tokens.mean > short_tokens:
        return "most examples are longer, and perturbed"
    return "longer examples are perturbed"


# ---------------------------------------------------------------------------------------------
# What is trained


def groups(shape: ModelShape, cfg: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(trained, frozen): each parameter of the model is in one of the two, what is trained beside it in the first."""
    weights = [f"{name} ({m.d_out} x {m.d_in})" for name, m in _linears(shape)]
    weights += [f"{m.name} ({m.d_out} x {m.d_in})" for m in shape.tables]
    vectors = [f"norms and biases ({shape.vector_elements:,} values)"]
    trained: list[str] = []
    frozen: list[str] = []
    (trained if cfg.parts.weights else frozen).extend(weights)
    (trained if cfg.parts.vectors else frozen).extend(vectors)
    for part in cfg.train:
        trained += TENSORS_OF_PART[part](shape, cfg.rank) if part in TENSORS_OF_PART else []
    return tuple(trained), tuple(frozen)


def _linears(shape: ModelShape) -> list[tuple[str, MatrixShape]]:
    in_blocks = [(f"{shape.layers} x {m.name}", m) for m in shape.block]
    return in_blocks + [(m.name, m) for m in shape.outside]


# What each part trains beside the parameters of the model, by the model's shape and the rank.
TENSORS_OF_PART: dict[str, Callable[[ModelShape, int], list[str]]] = {
    "lowrank": lambda shape, rank: [
        f"{name}, low-rank ({m.d_out} x {rank})" for name, m in _linears(shape)
    ],
    "scales": lambda shape, rank: [
        f"{name}, output gains ({m.d_out})" for name, m in _linears(shape)
    ],
    "head": lambda shape, rank: ["a change of the head's scored rows, by its exact gradient"],
    "probe": lambda shape, rank: [
        "a linear probe, which takes the head's place where it predicts better"
    ],
    "lora": lambda shape, rank: [
        f"{name}, A ({rank} x {m.d_in}) and B ({m.d_out} x {rank})" for name, m in _linears(shape)
    ],
}


# ---------------------------------------------------------------------------------------------
# Refusals


def refusal(footprint: Footprint, cap: int, smallest_bytes: int) -> PlanDoesNotFit:
    """The error of a request that fits in no way: the numbers, the largest items, and what would work."""
    best = best_within(footprint, smallest_bytes)
    items = footprint.items(*best)
    lines = [
        f"{footprint.shape.name} needs at least {mb(smallest_bytes)} ({flags_of(best, footprint.elsewhere)}), "
        f"but --max-mem is {mb(cap)}."
    ]
    base, *called = (item for item in items if item.name in (items[0].name, CALLING))
    process_bytes = base.bytes + sum(item.bytes for item in called)
    if cap < process_bytes:
        lines.append(
            f"The process alone takes {mb(process_bytes)} before any weight: {base.reason}."
        )
    lines += [
        f"The cap is on the whole process. Of that the calling program has {mb(item.bytes)}, {item.reason}. "
        "Let go of what it does not need, or train in a process of its own: edgezo finetune."
        for item in called
    ]
    largest = sorted(items, key=lambda item: -item.bytes)[:4]
    parts = ", ".join(f"{item.name} {mb(item.bytes)}" for item in largest)
    lines.append(f"Largest items: {parts}.")
    fits: list[str] = []
    nearer: list[str] = []
    for flags, other in _alternatives(footprint):
        size = least_bytes(other)
        if size is not None and size < smallest_bytes:
            (fits if size <= cap else nearer).append(f"{flags} would need {mb(size)}")
    if fits:
        lines.append(f"What fits: {'; '.join(fits)}.")
    elif nearer:
        lines.append(f"Nearer, but still above the cap: {'; '.join(nearer)}.")
    lines.append(f"The smallest budget that works as asked: --max-mem {mb(smallest_bytes)}")
    return PlanDoesNotFit("\n".join(lines), smallest_bytes, items)


def ram_refusal(
    footprint: Footprint, option: Option, host_bytes: int, free: int, smallest: int
) -> PlanDoesNotFit:
    """The error of a request whose blocks have room neither on the GPU nor in the RAM."""
    return PlanDoesNotFit(
        f"{footprint.shape.name}: blocks that the GPU has no room for take {mb(host_bytes)} of RAM, but only "
        f"{mb(free)} are free. Give the GPU more (--max-mem), or use a lower --precision.",
        smallest,
        footprint.items(*option),
    )


def _alternatives(footprint: Footprint) -> Iterator[tuple[str, Footprint]]:
    """(flags, request with them): changes that may take less."""
    cfg = footprint.cfg

    def changed(**changes: Any) -> Footprint:
        return replace(footprint, cfg=replace(cfg, **changes))

    if cfg.parts.weights:
        train = DEFAULT_TRAIN if cfg.estimator == DEFAULT else PRESETS[DEFAULT_PRESET].train
        yield f"--train {'+'.join(train)}", changed(train=train, rounding=None, precision=None)
        if ROUNDINGS[rounding_of(cfg, cfg.precision or "bf16")[0] or ""].plane:
            yield "--rounding stochastic", changed(rounding="stochastic")
    elif cfg.precision is not None:
        for precision in PRECISIONS_TRIED:
            if precision != cfg.precision:
                yield f"--precision {precision}", changed(precision=precision)
    if (cfg.parts.factors or cfg.parts.adapters) and cfg.rank > 1:
        yield "--rank 1", changed(rank=1)
    if cfg.parts.factors and not cfg.backward and not cfg.mixed:
        yield "--train head", changed(train=("head",))
    if cfg.residency == "resident":
        away = footprint.elsewhere
        yield f"--residency {away}", changed(residency=away)
    if cfg.micro_batch is not None and cfg.micro_batch > 1:
        yield "--micro-batch 1", changed(micro_batch=1)
    tokens = footprint.tokens
    half = max(64, tokens.tokens[0] // 2)
    if half < tokens.tokens[0] and tokens.kind != "choice":
        shorter = replace(
            tokens,
            tokens=tuple(min(n, half) for n in tokens.tokens),
            scored=min(tokens.scored, half),
        )
        yield f"--max-length {half}", replace(footprint, tokens=shorter)
