"""``make_plan(shape, request, machine) -> Plan``: fits a request into ``--max-mem``.

Pure: no files, no torch, no clock. The planner picks the precision (the highest that fits), the batch, the micro-batch
and where blocks are, gives each decision its reason (reasons.py), and knows the smallest budget that would work. What
a request takes is counted in footprint.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from edgezo.data.token_stats import TokenStats
from edgezo.plan import blocks
from edgezo.plan.blocks import Blocks
from edgezo.plan.budget import budget, choose_device, mb
from edgezo.plan.calibration import NO_CALLER, Caller
from edgezo.plan.choices import (
    Choice,
    Option,
    batch_size_of,
    best_within,
    options,
    with_blocks_in_memory,
)
from edgezo.plan.config import Batched, RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.plan.footprint import Footprint
from edgezo.plan.footprint_backward import BACKWARD, BACKWARD_ON_GPU
from edgezo.plan.footprint_gpu import CudaFootprint
from edgezo.plan.method import FIRST_ORDER_STEPS
from edgezo.plan.numbers import rounding_of
from edgezo.plan.plan import Plan, PlanDoesNotFit
from edgezo.plan.reasons import decisions, flags_of, groups, ram_refusal, refusal
from edgezo.plan.request import as_estimator
from edgezo.plan.shapes import ModelShape, assumed_tokens
from edgezo.plan.step_time import evaluation_s, pass_row_s, step_s
from edgezo.zo.presets import AUTO, DEFAULT

if TYPE_CHECKING:
    from edgezo.machine.hardware import Machine
    from edgezo.plan.shapes import NamedShape, Shape


class _Counted(NamedTuple):
    """What a request is counted with."""

    run: Callable[..., Footprint]
    passing: Callable[..., Footprint]  # rows that pass frozen blocks


# What --estimator auto takes where it fits and has the time, and what it takes otherwise.
FIRST_CHOICE, LAST_CHOICE = "lora", DEFAULT


def make_plan(
    shape: Shape,
    cfg: RunConfig,
    machine: Machine,
    tokens: TokenStats | None = None,
    *,
    base_bytes: int | None = None,
    read_peak_bytes: int = 0,
    source_bytes: int = 4,
    correction_bytes: int = 0,
    states_room_bytes: int | None = None,
    caller: Caller = NO_CALLER,
) -> Plan:
    """Fit the request into its budget; more memory never gives a lower precision.

    ``shape`` is a card or that of opened files. Without ``tokens`` every row is taken to be as long as --max-length.
    ``base_bytes`` is the resident process where it was measured, and ``read_peak_bytes`` its peak until then, while
    rows were read; ``source_bytes`` are those of a weight in the checkpoint; ``correction_bytes`` what a forward took
    more than planned (less, where negative); ``states_room_bytes`` what kept states may take of the disk; ``caller``
    what the calling program held before edgezo began, which is a part of ``base_bytes``.
    Raises PlanDoesNotFit with the smallest budget that would work and the flags that would help, UsageError where the
    device that is asked for is not there.
    """
    known: dict[str, Any] = {
        "base_bytes": base_bytes,
        "read_peak_bytes": read_peak_bytes,
        "source_bytes": source_bytes,
        "correction_bytes": correction_bytes,
        "states_room_bytes": states_room_bytes,
        "caller": caller,
    }
    tokens = tokens or assumed_tokens(cfg)
    if cfg.estimator == AUTO:
        return _best_that_fits(shape, cfg, machine, tokens, **known)
    return _described(_choose(shape, cfg, machine, tokens, **known))


def largest_card(cards: Iterable[NamedShape], cfg: RunConfig, machine: Machine) -> Plan | None:
    """The plan of the card with the most parameters that the budget of the request has room for.

    ``cards`` are of one kind, causal or masked. The precision is chosen anew; rows count as long as
    --max-length. None where not even the smallest card fits.
    """
    for card in sorted(cards, key=lambda card: -card.parameters):
        # With weights on disk almost every card would fit, and a step would take far longer than the user expects.
        request = replace(cfg, model=card.name, precision=None, residency="resident")
        try:
            return make_plan(card, request, machine)
        except PlanDoesNotFit:
            continue
    return None


def _choose(
    shape: Shape,
    cfg: RunConfig,
    machine: Machine,
    tokens: TokenStats,
    states_room_bytes: int | None,
    **known: Any,
) -> Choice:
    """Choose device, cap and the best option that fits. Raises PlanDoesNotFit and UsageError."""
    device, _ = choose_device(cfg, machine)
    cap, _ = budget(cfg, machine)
    model = ModelShape.of(shape, cfg.model.rstrip("/").rsplit("/", 1)[-1])
    batched = Batched.of(cfg, batch_size=batch_size_of(cfg))
    known |= {"bf16_fast": machine.bf16_fast, "c_kernels": machine.c_kernels}
    counted = _Counted(BACKWARD.get(cfg.estimator, Footprint), Footprint)
    if device == "cuda" and machine.gpu is not None:
        counted = _Counted(BACKWARD_ON_GPU.get(cfg.estimator, CudaFootprint), CudaFootprint)
        known["gpu"] = machine.gpu.figures
    decided, footprint, needs = _blocks_that_fit(
        counted, model, batched, tokens, cap, states_room_bytes, known
    )
    smallest_bytes = min(needs.values())
    fits = next((option for option, size in needs.items() if size <= cap), None)
    if fits is None:
        raise refusal(footprint, cap, smallest_bytes)
    option = with_blocks_in_memory(footprint, fits, cap)
    short = footprint.with_short_tokens(*option, cap)
    host_bytes = _host_bytes(short, option)
    if host_bytes > machine.available_bytes:
        raise ram_refusal(short, option, host_bytes, machine.available_bytes, smallest_bytes)
    return Choice(
        request=cfg,
        machine=machine,
        device=device,
        cap_bytes=cap,
        footprint=short,
        option=option,
        smallest=best_within(footprint, smallest_bytes),
        smallest_bytes=smallest_bytes,
        blocks=decided,
    )


def _blocks_that_fit(
    counted: _Counted,
    model: ModelShape,
    cfg: Batched,
    tokens: TokenStats,
    cap: int,
    states_room_bytes: int | None,
    known: dict[str, Any],
) -> tuple[Blocks, Footprint, dict[Option, int]]:
    """The most wanted number of blocks with which all weights fit into the cap, and the bytes of every option.

    If there is none: the most wanted that fits from the disk, else the fewest.
    """
    tried = []
    for number in blocks.numbers(model, cfg, tokens):
        decided = blocks.decide(model, cfg, tokens, states_room_bytes, number)
        footprint = _with_blocks(counted, model, decided, tokens, known)
        ways = options(footprint.cfg, footprint.shape.layers)
        tried.append((decided, footprint, {way: footprint.needed_bytes(*way) for way in ways}))
        if any(size <= cap and not way.on_disk for way, size in tried[-1][2].items()):
            return tried[-1]
    return next((one for one in tried if min(one[2].values()) <= cap), tried[-1])


def _with_blocks(
    counted: _Counted,
    model: ModelShape,
    decided: Blocks,
    tokens: TokenStats,
    known: dict[str, Any],
) -> Footprint:
    """The footprint of a request with its blocks decided."""
    cfg = decided.cfg
    if not cfg.keeps_states:
        frozen = decided.first
        return counted.run(shape=model, cfg=cfg, tokens=tokens, frozen_blocks=frozen, **known)
    below = counted.passing(
        shape=blocks.below(model, decided),
        cfg=blocks.passing_request(cfg),
        tokens=blocks.passing_tokens(tokens),
        **known,
    )
    above = blocks.above(model, decided)
    return counted.run(shape=above, cfg=cfg, tokens=tokens, above_cut=True, below=below, **known)


def _host_bytes(footprint: Footprint, option: Option) -> int:
    """The most that blocks take of the RAM beside a GPU: while rows pass frozen ones, or while others are trained."""
    below, passing_bytes = footprint.below, 0
    if below is not None and footprint.pass_from_disk(option.precision):
        passing_bytes = below.host_bytes(option.precision, below.shape.layers)
    return max(passing_bytes, footprint.host_bytes(option.precision, option.on_disk))


def _described(choice: Choice) -> Plan:
    """The plan that describes a choice."""
    footprint, option = choice.footprint, choice.option
    cfg, precision, away = footprint.cfg, option.precision, option.on_disk
    roomy = footprint.with_kept_tokens(precision, choice.cap_bytes - choice.needed_bytes)
    on_disk = away if footprint.elsewhere == "disk" else 0
    trained, frozen = groups(footprint.shape, cfg)
    return Plan(
        model=footprint.shape.name,
        device=choice.device,
        max_mem_bytes=choice.cap_bytes,
        estimator=cfg.estimator,
        short_tokens=cfg.short_tokens,
        precision=precision,
        rounding=rounding_of(cfg, precision)[0],
        compute_dtype=footprint.compute_dtype(precision)[0],
        batch_size=cfg.batch_size,
        micro_batch=option.micro_batch,
        trained=trained,
        frozen=frozen,
        items=roomy.items(*option),
        decisions=decisions(choice),
        smallest_bytes=choice.smallest_bytes,
        smallest_flags=flags_of(choice.smallest, footprint.elsewhere),
        step_s=step_s(choice),
        evaluation_s=evaluation_s(choice),
        evaluations=footprint.tokens.evaluations,
        pass_row_s=pass_row_s(choice),
        blocks_on_disk=on_disk,
        disk_bytes=footprint.disk_bytes(precision, on_disk),
        reused_tokens=footprint.reused_tokens(precision),
        most_tokens=footprint.most_tokens(precision),
        maps=footprint.maps(precision, option.micro_batch),
        panel_columns=footprint.panel_columns(precision),
        blocks_in_host=away - on_disk,
        host_bytes=footprint.host_bytes(precision, away),
        kept_tokens=roomy.kept_tokens,
        blocks=cfg.blocks,
        states=cfg.states,
        state_rows=cfg.state_rows,
        first_trained=choice.blocks.first,
        pass_from_disk=footprint.pass_from_disk(precision),
    )


# ---------------------------------------------------------------------------------------------
# --estimator auto


def _best_that_fits(
    shape: Shape, cfg: RunConfig, machine: Machine, tokens: TokenStats, **known: Any
) -> Plan:
    """The plan of ``--estimator auto``: first-order LoRA where it fits and has the time, else the default."""
    forward_only = as_estimator(cfg, LAST_CHOICE)
    why = f"a score of predictions ({cfg.objective}) has no gradient"
    if cfg.objective == LOSS:
        # Weights from the disk would be read three times a step, and forward passes alone read them once.
        wanted = as_estimator(replace(cfg, residency=cfg.residency or "resident"), FIRST_CHOICE)
        try:
            plan = make_plan(shape, wanted, machine, tokens, **known)
            steps = cfg.steps or int((cfg.for_s or 0.0) / plan.step_s)
            readout = tokens.classes > 0 and forward_only.parts.readout
            if not readout or steps >= FIRST_ORDER_STEPS:
                room = f"{mb(plan.needed_bytes)} of {mb(plan.max_mem_bytes)}"
                reason = f"first-order, and fits: {room}; and reaches a higher accuracy in the same steps"
                return _because(plan, reason)
            why = f"{FIRST_CHOICE} fits, but in only {steps} steps a linear probe does better"
        except PlanDoesNotFit as problem:
            why = f"first-order {FIRST_CHOICE} needs {mb(problem.smallest_bytes)}"
    plan = make_plan(shape, forward_only, machine, tokens, **known)
    return _because(plan, f"{why}, so forward passes alone")


def _because(plan: Plan, why: str) -> Plan:
    """The plan with the reason of auto in place of the method's."""
    made = tuple(
        replace(d, reason=f"auto: {why}") if d.name == "method" else d for d in plan.decisions
    )
    return replace(plan, decisions=made)
