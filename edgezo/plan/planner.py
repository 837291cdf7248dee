"""``make_plan(shape, request, machine) -> Plan``: fits a request into ``--max-mem``.

Pure: no files, no torch, no clock. The planner picks the precision (the highest that fits), the
batch and the micro-batch, gives each decision its reason, and knows the smallest budget that would
work. What things take is counted in footprint.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from edgezo.data.token_stats import TokenStats
from edgezo.errors import UsageError
from edgezo.machine.limits import MB
from edgezo.plan.budget import budget, choose_device, mb
from edgezo.plan.conflicts import needs_memory
from edgezo.plan.fields import LOSS
from edgezo.plan.footprint import Footprint
from edgezo.plan.footprint_backward import BackwardFootprint, MixedFootprint
from edgezo.plan.footprint_gpu import CudaFootprint
from edgezo.plan.footprint_held import rounding_of
from edgezo.plan.plan import Decision, Plan, PlanDoesNotFit
from edgezo.plan.request import RunConfig, as_estimator
from edgezo.plan.shapes import ModelShape, assumed_tokens
from edgezo.zo.presets import AUTO, FIRST_ORDER, PRESETS, step_meaning

if TYPE_CHECKING:
    from edgezo.machine.hardware import Machine
    from edgezo.plan.shapes import NamedShape, Shape

DEFAULT_BATCH = 16  # directions a step: more take too long on a small machine, fewer are noisy
SHARE_OF_PEAK = 0.4  # of the estimated speed that a whole step reaches
# On a GPU: what a step takes a block, however small (noise is made on the CPU), and how fast it multiplies and copies
# from the RAM (roughly, by three short runs on an H100).
GPU_BLOCK_S, GPU_FLOPS_S, GPU_COPY_BYTES_S = 1.2e-2, 2e14, 2e10
# Footprints of estimators with a backward pass.
BACKWARD: dict[str, type[Footprint]] = {"lora": BackwardFootprint, "addax": MixedFootprint}
PRECISIONS_TRIED = ("bf16", "int8", "int4")  # from the left; fp32 and fp16 only when asked for


def make_plan(
    shape: Shape,
    cfg: RunConfig,
    machine: Machine,
    tokens: TokenStats | None = None,
    *,
    base_bytes: int | None = None,
    correction_bytes: int = 0,
) -> Plan:
    """Fit the request into its budget; more memory never gives a lower precision.

    ``shape`` is a card or that of opened files. Without ``tokens`` every row is taken to be as long
    as --max-length. ``base_bytes`` is the resident process as measured, if it was; ``correction_bytes`` what a
    forward took more than planned (or less, where negative).
    Raises PlanDoesNotFit with the smallest budget that would work and the flags that would help, UsageError where
    the device that is asked for is not there.
    """
    if cfg.estimator == AUTO:
        return _best_that_fits(
            shape, cfg, machine, tokens, base_bytes=base_bytes, correction_bytes=correction_bytes
        )
    device, device_reason = choose_device(cfg, machine)
    cap, cap_reason = budget(cfg, machine)
    name = cfg.model.rstrip("/").rsplit("/", 1)[-1]
    batch_size, batch_reason = _batch(cfg)
    cfg = replace(cfg, batch_size=batch_size)
    here = BACKWARD.get(cfg.estimator, Footprint)
    footprint = (CudaFootprint if device == "cuda" else here)(
        shape=ModelShape.of(shape, name),
        cfg=cfg,
        tokens=tokens or assumed_tokens(cfg),
        bf16_fast=machine.bf16_fast,
        c_kernels=machine.c_kernels,
        base_bytes=base_bytes,
        correction_bytes=correction_bytes,
    )
    layers = footprint.shape.layers
    options = list(_options(cfg, layers))
    chosen = next((option for option in options if footprint.peak_bytes(*option) <= cap), None)
    smallest_bytes = min(footprint.peak_bytes(*option) for option in options)
    if chosen is None:
        raise _refusal(footprint, cap, smallest_bytes)

    chosen = _keep_blocks(footprint, chosen, cap)
    asked, footprint = footprint, footprint.filled(*chosen, cap)
    cfg = footprint.cfg
    precision, micro_batch, away = chosen
    host_bytes = footprint.host_bytes(precision, away)
    if host_bytes > machine.available_bytes:
        raise PlanDoesNotFit(
            f"{name}: blocks that the GPU has no room for take {mb(host_bytes)} of RAM, but only "
            f"{mb(machine.available_bytes)} are free. Give the GPU more (--max-mem), or use a lower --precision.",
            smallest_bytes,
            footprint.items(*chosen),
        )
    roomy = footprint.keeping(precision, cap - footprint.peak_bytes(*chosen))
    on_disk = away if footprint.elsewhere == "disk" else 0
    compute, compute_reason = footprint.compute_dtype(precision)
    rounding, rounding_reason = rounding_of(cfg, precision)
    decisions = [
        Decision("device", device, device_reason),
        Decision("max_mem_bytes", cap, cap_reason),
        Decision("precision", precision, _precision_reason(footprint, precision)),
        Decision("compute_dtype", compute, compute_reason),
        Decision("estimator", cfg.estimator, _estimator_reason(cfg)),
        Decision("train", "+".join(cfg.train), _trained_reason(cfg)),
        Decision("batch_size", batch_size, batch_reason),
        Decision("micro_batch", micro_batch, _micro_reason(footprint, chosen)),
        Decision(
            "residency",
            footprint.elsewhere if away else "resident",
            _residency_reason(footprint, chosen),
        ),
    ]
    if cfg.short_tokens is not None:
        decisions.append(Decision("short_tokens", cfg.short_tokens, _short_reason(footprint)))
    if "lora" not in cfg.train:
        decisions.append(_first_order(footprint, batch_size, cap))
    if rounding is not None:
        decisions.append(Decision("rounding", rounding, rounding_reason))
    trained, frozen = _groups(footprint.shape, cfg)
    return Plan(
        model=name,
        device=device,
        max_mem_bytes=cap,
        estimator=cfg.estimator,
        short_tokens=cfg.short_tokens,
        precision=precision,
        rounding=rounding,
        compute_dtype=compute,
        batch_size=batch_size,
        micro_batch=micro_batch,
        trained=trained,
        frozen=frozen,
        items=roomy.items(*chosen),
        decisions=tuple(decisions),
        smallest_bytes=smallest_bytes,
        smallest_flags=_flags(_best_within(asked, smallest_bytes), asked.elsewhere),
        step_s=_step_s(footprint, machine, chosen, batch_size),
        blocks_on_disk=on_disk,
        disk_bytes=footprint.disk_bytes(precision, on_disk),
        reused_tokens=footprint.reused_tokens(precision),
        most_tokens=footprint.most_tokens(precision),
        blocks_in_host=away - on_disk,
        host_bytes=host_bytes,
        kept_tokens=roomy.kept_tokens,
    )


FIRST_CHOICE, LAST_CHOICE = "lora", "grzo"  # of --estimator auto
# With fewer, a linear probe on label words does as well or better (benchmarks/LOG.md, 2026-11-23, eighth entry).
FIRST_ORDER_STEPS = 100


def _best_that_fits(
    shape: Shape, cfg: RunConfig, machine: Machine, tokens: TokenStats | None, **known: Any
) -> Plan:
    """The plan of ``--estimator auto``: first-order LoRA where it fits and has the time, else the default."""
    forward_only = as_estimator(cfg, LAST_CHOICE)
    kind = (tokens or assumed_tokens(cfg)).kind
    probed = kind == "label" and "probe" in forward_only.train
    asked_gpu = cfg.device == "cuda" or cfg.residency == "host"
    if cfg.objective != LOSS:
        why = f"a score of predictions ({cfg.objective}) has no gradient"
    elif asked_gpu or (machine.gpu is not None and choose_device(cfg, machine)[0] == "cuda"):
        why = f"{FIRST_CHOICE}'s backward pass is for the CPU, and there is a GPU to use"
    else:
        # Weights that come from the disk three times a step are no gain in time over twice forwards alone.
        wanted = replace(cfg, residency=cfg.residency or "resident")
        try:
            plan = make_plan(shape, as_estimator(wanted, FIRST_CHOICE), machine, tokens, **known)
            steps = cfg.steps or int((cfg.for_s or 0.0) / plan.step_s)
            if not probed or steps >= FIRST_ORDER_STEPS:
                room = f"{mb(plan.planned_peak_bytes)} of {mb(plan.max_mem_bytes)}"
                why = f"first-order, and fits: {room}; forwards alone reach less in as many steps"
                return _because(plan, why)
            why = f"{FIRST_CHOICE} fits, but a linear probe is better than its first {steps} steps"
        except PlanDoesNotFit as problem:
            why = f"first-order {FIRST_CHOICE} needs {mb(problem.smallest_bytes)}"
    plan = make_plan(shape, forward_only, machine, tokens, **known)
    return _because(plan, f"{why}, so forwards alone")


def _because(plan: Plan, why: str) -> Plan:
    """The plan with what auto has to say before the estimator's own reason."""
    told = tuple(
        replace(d, reason=f"auto: {why}. {d.reason}") if d.name == "estimator" else d
        for d in plan.decisions
    )
    return replace(plan, decisions=told)


def largest_card(cards: Iterable[NamedShape], cfg: RunConfig, machine: Machine) -> Plan | None:
    """The plan of the card with the most parameters that the budget of the request has room for.

    Cards of the same kind (causal or masked) should be given. The precision is free; without data, rows
    count as long as --max-length. None where not even the smallest fits.
    """
    for card in sorted(cards, key=lambda card: -card.parameters):
        # From disk almost anything would fit, at a price in time that nobody asked for.
        request = replace(cfg, model=card.name, precision=None, residency="resident")
        try:
            return make_plan(card, request, machine)
        except PlanDoesNotFit:
            continue
    return None


def _step_s(footprint: Footprint, machine: Machine, chosen: Option, batch_size: int) -> float:
    """Two floating-point operations a weight and token, on both sides of every example."""
    shape, cfg, tokens = footprint.shape, footprint.cfg, footprint.tokens
    sides = cfg.mean_passes
    length = tokens.mean or tokens.tokens[0]
    operations = shape.elements * length
    if not tokens.label_words:
        # The whole vocabulary is scored, once more for the exact head's gradient.
        passes = 2 if "head" in cfg.train else 1
        operations += passes * shape.tables[0].numel * min(tokens.scored, length)
    if cfg.objective != LOSS:
        operations += (shape.elements + shape.tables[0].numel) * tokens.written
    if isinstance(footprint, CudaFootprint):
        passes = math.ceil(batch_size / chosen.micro_batch)
        copied = passes * _moved_bytes(footprint, chosen)
        launching = passes * shape.layers * GPU_BLOCK_S
        return (
            launching
            + 2 * sides * batch_size * operations / GPU_FLOPS_S
            + copied / GPU_COPY_BYTES_S
        )
    low = footprint.compute_dtype(chosen.precision)[0] == "bf16"
    speed = (machine.bf16_flops_s if low else machine.flops_s) * SHARE_OF_PEAK
    if cfg.threads is not None:
        speed *= min(1.0, cfg.threads / machine.cores)
    return 2 * sides * batch_size * operations / speed


# ---------------------------------------------------------------------------------------------
# What may be chosen, best first


class Option(NamedTuple):
    precision: str
    micro_batch: int
    on_disk: int  # blocks; of a GPU's plan, those in the RAM


def _options(cfg: RunConfig, layers: int) -> Iterator[Option]:
    """The most wanted first: memory before disk, precision before speed."""
    if cfg.residency in (None, "resident"):
        for precision in _precisions(cfg):
            for micro_batch in _micro_batches(cfg):
                yield Option(precision, micro_batch, 0)
    if cfg.residency != "resident" and not needs_memory(cfg.to_dict()):
        # From disk the smallest precision that is tried, so that less memory never gives a higher one.
        precision = _precisions(cfg)[-1]
        for micro_batch in _micro_batches(cfg):
            yield Option(precision, micro_batch, layers)


def _keep_blocks(footprint: Footprint, option: Option, cap: int) -> Option:
    """As many blocks in memory as there is room for; with --residency disk or host none."""
    if not option.on_disk or footprint.cfg.residency == footprint.elsewhere:
        return option
    layers = footprint.shape.layers
    fewer = (option._replace(on_disk=n) for n in range(1, layers))
    return next((o for o in fewer if footprint.peak_bytes(*o) <= cap), option)


def _precisions(cfg: RunConfig) -> tuple[str, ...]:
    if cfg.precision is not None:
        return (cfg.precision,)
    return ("bf16",) if "full" in cfg.train else PRECISIONS_TRIED


def _batch(cfg: RunConfig) -> tuple[int, str]:
    if cfg.batch_size is not None:
        return cfg.batch_size, "as given"
    if cfg.micro_batch is not None and cfg.micro_batch > DEFAULT_BATCH:
        return cfg.micro_batch, "as large as --micro-batch"
    return DEFAULT_BATCH, "directions a step; micro-batches make it cost time, not memory"


def _micro_batches(cfg: RunConfig) -> list[int]:
    """Descending: the whole batch, its halves, its thirds, ..., one example."""
    if cfg.micro_batch is not None:
        return [cfg.micro_batch]
    batch_size, _ = _batch(cfg)
    parts = range(1, batch_size + 1)
    return sorted({math.ceil(batch_size / n) for n in parts}, reverse=True)


def _best_within(footprint: Footprint, n_bytes: int) -> Option:
    """The first option that fits where ``n_bytes``, as ``mb`` prints it, are given."""
    cap = math.ceil(n_bytes / MB) * MB
    options = _options(footprint.cfg, footprint.shape.layers)
    return next(o for o in options if footprint.peak_bytes(*o) <= cap)


def _flags(option: Option, elsewhere: str) -> str:
    away = f" --residency {elsewhere}" if option.on_disk else ""
    return f"--precision {option.precision} --micro-batch {option.micro_batch}{away}"


def _precision_reason(footprint: Footprint, precision: str) -> str:
    cfg = footprint.cfg
    if cfg.precision is not None:
        return "as given"
    order = _precisions(cfg)
    if len(order) == 1:
        return "full weights are trained in a dense store"
    above = order[: order.index(precision)]
    if not above:
        return "the highest that is tried, and it fits"
    least = {p: min(footprint.peak_bytes(p, m) for m in _micro_batches(cfg)) for p in above}
    needs = ", ".join(f"{p} needs {mb(n)}" for p, n in least.items())
    return f"the highest that fits: {needs}"


def _micro_reason(footprint: Footprint, option: Option) -> str:
    if footprint.cfg.micro_batch is not None:
        return "as given"
    larger = [m for m in _micro_batches(footprint.cfg) if m > option.micro_batch]
    if not larger:
        most, sides = footprint.most_tokens(option.precision), footprint.sides
        pieces = f", in pieces of up to {most * sides:,} tokens" if most is not None else ""
        return f"the whole batch fits{pieces or ' at once'}"
    needs = footprint.peak_bytes(*option._replace(micro_batch=larger[-1]))
    return f"{larger[-1]} at once would need {mb(needs)}"


def _residency_reason(footprint: Footprint, option: Option) -> str:
    """Where the weights are, and what a step moves where that is not the memory."""
    if not option.on_disk:
        return "all weights stay in memory"
    cfg, moved_bytes = footprint.cfg, _moved_bytes(footprint, option)
    passes = math.ceil(_batch(cfg)[0] / option.micro_batch)
    moved = f"a step reads at least {mb(passes * moved_bytes)}"
    if "full" in cfg.train:
        moved += f" and writes {mb(moved_bytes)}"
    where = {"disk": "and the tables are on disk", "host": "are in the RAM"}[footprint.elsewhere]
    blocks = f"{option.on_disk} of {footprint.shape.layers} blocks {where}"
    why = ""
    if cfg.residency is None:
        least = min(
            footprint.peak_bytes(p, m) for p in _precisions(cfg) for m in _micro_batches(cfg)
        )
        why = f"in memory it would need {mb(least)}; "
    return f"{why}{blocks}: {moved}"


def _moved_bytes(footprint: Footprint, option: Option) -> int:
    """Of one pass over the blocks that are not in memory."""
    return option.on_disk * footprint.block_bytes(option.precision)


def _first_order(footprint: Footprint, batch_size: int, cap: int) -> Decision:
    """What first-order LoRA would take: where it fits it reaches more, and the user should know."""
    usual = mb(footprint.first_order_bytes(batch_size))
    written = f"as people write it (bf16 base, AdamW, {batch_size} examples at once) about {usual}"
    try:
        cfg = as_estimator(replace(footprint.cfg, device="cpu", residency="resident"), FIRST_CHOICE)
    except UsageError:
        cfg = None
    if cfg is None or isinstance(footprint, CudaFootprint):
        return Decision("first-order LoRA", f"about {usual}", "as people write it")
    known = ("shape", "tokens", "bf16_fast", "c_kernels", "base_bytes")
    other = BackwardFootprint(cfg=cfg, **{name: getattr(footprint, name) for name in known})
    sizes = [(o, other.peak_bytes(*o)) for o in _options(cfg, footprint.shape.layers)]
    fits = next(((o, size) for o, size in sizes if size <= cap), None)
    if fits is None:
        least = min(size for _, size in sizes)
        reason = f"--estimator lora does not fit, a block at a time; {written}"
        return Decision("first-order LoRA", mb(least), reason)
    option, size = fits
    reason = (
        f"fits with --estimator lora, a block at a time in {option.precision}, and given time reaches a higher "
        f"accuracy; {written}"
    )
    return Decision("first-order LoRA", mb(size), reason)


def _short_reason(footprint: Footprint) -> str:
    """How much of the data a mixed estimator has the gradient of."""
    short, tokens = footprint.cfg.short_tokens or 0, footprint.tokens
    if tokens.tokens[0] <= short:
        return "every example is short enough to go back through"
    if tokens.known and tokens.mean > short:
        return "most examples are longer, and probed"
    return "longer examples are probed"


def _estimator_reason(cfg: RunConfig) -> str:
    """Its choices on the axes, and what the step means with them."""
    if (first := FIRST_ORDER.get(cfg.estimator)) is not None:
        return f"{first.equation}; --step {cfg.step:g} is the {first.step_meaning}"
    chosen = [f"{cfg.directions} directions", f"{cfg.credit} credit", f"rule {cfg.rule}"]
    if cfg.mask != "none":
        chosen.insert(1, f"mask {cfg.mask}")
    step = "--step auto begins from" if cfg.step_auto else "--step"
    meaning = step_meaning(cfg.credit, cfg.rule)
    return f"{', '.join(chosen)}; {step} {cfg.step:g}{', ' if cfg.step_auto else ' is '}{meaning}"


def _trained_reason(cfg: RunConfig) -> str:
    reasons = {
        "lowrank": f"rank-{cfg.rank} factors in fp32 beside frozen weights",
        "full": "every weight",
        "norms": "norm weights and biases",
        "scales": "one gain per output row",
        "head": "the head exactly, from the same forward",
        "probe": "a linear probe on the blocks that know most, by one forward over the rows",
        "lora": f"rank-{cfg.rank} A and B in fp32 beside frozen weights, by their gradient",
    }
    return "; ".join(reasons[part] for part in cfg.train)


def _groups(shape: ModelShape, cfg: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(trained, frozen): a parameter is perturbed and updated, or neither."""
    n = shape.layers
    weights = [f"{n} x {m.name} ({m.d_out} x {m.d_in})" for m in shape.block]
    weights += [f"{m.name} ({m.d_out} x {m.d_in})" for m in (*shape.outside, *shape.tables)]
    vectors = f"norms and biases ({shape.vector_elements:,} values)"
    trained: list[str] = []
    frozen: list[str] = []
    (trained if "full" in cfg.train else frozen).extend(weights)
    (trained if {"full", "norms"} & set(cfg.train) else frozen).append(vectors)
    linears = [(f"{n} x {m.name}", m) for m in shape.block]
    linears += [(m.name, m) for m in shape.outside]
    if "lowrank" in cfg.train:
        trained += [f"{name}, low-rank ({m.d_out} x {cfg.rank})" for name, m in linears]
    if "lora" in cfg.train:
        trained += [
            f"{name}, A ({cfg.rank} x {m.d_in}) and B ({m.d_out} x {cfg.rank})"
            for name, m in linears
        ]
    if "scales" in cfg.train:
        trained += [f"{name}, output gains ({m.d_out})" for name, m in linears]
    if "head" in cfg.train:
        trained.append("a change of the head's scored rows, by its exact gradient")
    if "probe" in cfg.train:
        trained.append("a linear probe, which takes the head's place where it predicts better")
    return tuple(trained), tuple(frozen)


# ---------------------------------------------------------------------------------------------
# Refusal


def _refusal(footprint: Footprint, cap: int, smallest_bytes: int) -> PlanDoesNotFit:
    """What happened, the number, the items that are to blame, and what would work."""
    best = _best_within(footprint, smallest_bytes)
    items = footprint.items(*best)
    base = items[0]
    lines = [
        f"{footprint.shape.name} needs at least {mb(smallest_bytes)} ({_flags(best, footprint.elsewhere)}), "
        f"but --max-mem is {mb(cap)}."
    ]
    if cap < base.bytes:
        lines.append(f"The process alone takes {mb(base.bytes)} before any weight: {base.reason}.")
    largest = sorted(items, key=lambda item: -item.bytes)[:4]
    parts = ", ".join(f"{item.name} {mb(item.bytes)}" for item in largest)
    lines.append(f"Largest items: {parts}.")
    fits: list[str] = []
    nearer: list[str] = []
    for flags, other in _alternatives(footprint):
        options = _options(other.cfg, footprint.shape.layers)
        size = min(other.peak_bytes(*option) for option in options)
        if size < smallest_bytes:
            (fits if size <= cap else nearer).append(f"{flags} would need {mb(size)}")
    if fits:
        lines.append(f"What fits: {'; '.join(fits)}.")
    elif nearer:
        lines.append(f"Nearer, but still above the cap: {'; '.join(nearer)}.")
    lines.append(f"The smallest budget that works as asked: --max-mem {mb(smallest_bytes)}")
    return PlanDoesNotFit("\n".join(lines), smallest_bytes, items)


def _alternatives(footprint: Footprint) -> Iterator[tuple[str, Footprint]]:
    """(flags, request): changes that may take less."""
    cfg = footprint.cfg

    def changed(**changes: Any) -> Footprint:
        return replace(footprint, cfg=replace(cfg, **changes))

    if "full" in cfg.train:
        train = PRESETS["grzo"].train
        yield f"--train {'+'.join(train)}", changed(train=train, rounding=None, precision=None)
        if rounding_of(cfg, cfg.precision or "bf16")[0] == "plane":
            yield "--rounding stochastic", changed(rounding="stochastic")
    elif cfg.precision is not None:
        for precision in PRECISIONS_TRIED:
            if precision != cfg.precision:
                yield f"--precision {precision}", changed(precision=precision)
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
