"""Requests whose settings are fine alone and mean nothing together: tables of conditions, each with its message."""

from __future__ import annotations

import re

from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS, OBJECTIVES
from edgezo.plan.fields import DEFAULT_BATCH, UNROUNDED
from edgezo.plan.obstacles import (
    SEEDED_MASKS,
    Conflict,
    cannot_measure_step,
    cannot_requantise,
    drawn,
    messages,
    needs_memory,
    one_basis,
)
from edgezo.zo.axes import CREDITS, DIRECTIONS, MASKS, PER_WEIGHT, ROUNDINGS, RULES, in_span
from edgezo.zo.parts import PARTS
from edgezo.zo.presets import FIRST_ORDER, FirstOrder, preset_of


def conflicts(cfg: RunConfig, need_data: bool) -> list[str]:
    """What is wrong with a request. ``need_data``: a request without data is wrong too."""
    tables = (MISSING, MISSING_DATA if need_data else (), _of_estimator(cfg), GENERAL)
    return [message for table in tables for message in messages(table, cfg)]


def _of_estimator(cfg: RunConfig) -> tuple[Conflict, ...]:
    """The table for what the estimator follows: gradients or directions."""
    if cfg.backward:
        return OF_GRADIENTS
    return LORA_WITHOUT_GRADIENTS if cfg.parts.adapters else OF_DIRECTIONS


# ---------------------------------------------------------------------------------------------
# Parts of conditions and messages


def train_option(cfg: RunConfig) -> str:
    return f"--train {'+'.join(cfg.train)}"


def _credit(cfg: RunConfig) -> str:
    """The option that chose the credit: the estimator, or the credit itself."""
    chosen = preset_of(cfg.estimator).credit == cfg.credit
    return f"--estimator {cfg.estimator}" if chosen else f"--credit {cfg.credit}"


def _requantises(cfg: RunConfig) -> bool:
    """Whether codes are to be made anew from base and journal."""
    return ROUNDINGS[cfg.rounding or ""].requantised


def _of_batch() -> str:
    """The directions that are one for the whole batch."""
    return ", ".join(name for name, entry in DIRECTIONS.items() if not entry.per_example)


def _lacks_parts(cfg: RunConfig) -> bool:
    """Whether a first-order estimator is asked for other parts than it trains."""
    entry = FIRST_ORDER[cfg.estimator]
    return not set(entry.train) <= set(cfg.train) <= {*entry.train, *entry.beside}


def _trained_by(entry: FirstOrder) -> str:
    """What a first-order estimator trains, and what may stand beside that."""
    trains = "+".join(entry.train)
    if not entry.beside:
        return f"{trains} alone"
    return f"{trains}, or {'+'.join((*entry.train, *entry.beside))}"


def _beside_full(part: str) -> Conflict:
    """Full weights trained together with a part that they contain."""
    return Conflict(
        lambda cfg: cfg.parts.weights and part in cfg.train,
        f"--train full+{part}: full weights already hold what {part} would train",
    )


# ---------------------------------------------------------------------------------------------
# What is missing

MISSING = (
    Conflict(
        lambda cfg: cfg.model is None,
        "--model is missing: a card (see edgezo models), a directory, a .gguf file or a hub id",
    ),
    Conflict(
        lambda cfg: cfg.data_root is not None and cfg.task is None,
        "--data-root is where --task looks for its data; without --task give --data",
    ),
)
MISSING_DATA = (
    Conflict(
        lambda cfg: cfg.data is None and cfg.task is None,
        "--data or --task is missing: there is nothing to learn from",
    ),
    Conflict(
        lambda cfg: cfg.mask == "block" and cfg.finetuner is None and cfg.probing,
        "--mask block needs --finetuner FILE: edgezo meta-train makes one, and "
        "edgezo convert-finetuner reads a published one",
    ),
)

# ---------------------------------------------------------------------------------------------
# The method

OF_GRADIENTS = (
    Conflict(
        _lacks_parts,
        lambda cfg: (
            f"{train_option(cfg)} with --estimator {cfg.estimator}: "
            f"it trains {_trained_by(FIRST_ORDER[cfg.estimator])}"
        ),
    ),
)
LORA_WITHOUT_GRADIENTS = (
    Conflict(
        lambda cfg: True, "--train lora is trained by its gradient: it needs --estimator lora"
    ),
)
OF_DIRECTIONS = (
    Conflict(
        lambda cfg: CREDITS[cfg.credit].per_example and not drawn(cfg).per_example,
        lambda cfg: (
            f"--directions {cfg.directions} with {_credit(cfg)}: the credit compares one direction per example, "
            "and these are one for the whole batch; with them use --estimator mezo, or --credit mean"
        ),
    ),
    Conflict(
        lambda cfg: not CREDITS[cfg.credit].per_example and drawn(cfg).per_example,
        lambda cfg: (
            f"--directions {cfg.directions} with {_credit(cfg)}: the credit is for one direction for the whole batch; "
            f"use one of {_of_batch()}"
        ),
    ),
    Conflict(
        lambda cfg: (
            drawn(cfg).echoes
            and (cfg.credit not in ("mean", "group") or cfg.mask != "none" or cfg.parts.weights)
        ),
        lambda cfg: (
            f"--directions {cfg.directions} take up directions of past steps, each as a whole: they need --credit mean "
            "or group, --mask none, and --train lowrank, norms or scales; --train full moves only the rows of an "
            "embedding table that a step has used"
        ),
    ),
    Conflict(
        lambda cfg: (
            "vote" in (cfg.credit, cfg.rule)
            and ((cfg.credit, cfg.rule, cfg.mask) != ("vote", "vote", "none") or drawn(cfg).dense)
        ),
        "--credit vote and --rule vote belong together: votes of +-1 along sign vectors are counted; "
        "they need --directions signs or rank-signs of rank 1, and --mask none",
    ),
    Conflict(
        lambda cfg: (
            cfg.rule == "orthogonal"
            and not (in_span(cfg.directions) and cfg.mask in ("none", "layers"))
        ),
        "--rule orthogonal works in the coordinates of a low-rank basis: it needs --directions lowrank-strict or "
        "lowrank-shared, and --mask none or layers",
    ),
    Conflict(
        lambda cfg: drawn(cfg).echoes and RULES[cfg.rule].looks_back,
        lambda cfg: (
            f"--rule {cfg.rule} with --directions {cfg.directions}: both look back on past steps; use one of them"
        ),
    ),
    Conflict(
        lambda cfg: drawn(cfg).summed and cfg.mask not in ("none", "layers", "block"),
        lambda cfg: (
            f"--mask {cfg.mask} with --directions {cfg.directions}: the mask shapes one factor of a direction, "
            "and these are sums of several; use --directions signs"
        ),
    ),
    Conflict(
        lambda cfg: cfg.mask == "sparse" and not cfg.parts.weights,
        "--mask sparse chooses among the weights of a matrix by their size; it needs --train full",
    ),
    Conflict(
        lambda cfg: cfg.mask == "quantized" and cfg.directions not in ("gaussian", "shared"),
        lambda cfg: (
            f"--mask quantized with --directions {cfg.directions}: the mask rounds Gaussian values; "
            "use --directions gaussian or shared"
        ),
    ),
    Conflict(
        lambda cfg: cfg.mask == "block" and RULES[cfg.rule].step == PER_WEIGHT,
        lambda cfg: (
            f"--mask block with --rule {cfg.rule}: the rule moves weights by the same distance, however long "
            "a direction is, so the scales would be lost; use --rule sgd or momentum"
        ),
    ),
    Conflict(
        lambda cfg: (
            MASKS[cfg.mask].forwards and (cfg.credit != "mean" or cfg.directions != "shared")
        ),
        lambda cfg: (
            f"--mask {cfg.mask} measures the curvature along one direction of the whole batch: "
            "it needs --credit mean and --directions shared"
        ),
    ),
    Conflict(
        lambda cfg: (
            cfg.anchored and (cfg.directions, cfg.mask, cfg.rule) != ("shared", "none", "sgd")
        ),
        lambda cfg: (
            f"{_credit(cfg)} compares the losses of one direction at two points: "
            "it needs --directions shared, --mask none and --rule sgd"
        ),
    ),
    Conflict(
        lambda cfg: cfg.anchored and (cfg.parts.weights or cfg.parts.head),
        lambda cfg: (
            f"{_credit(cfg)} keeps a second copy of what is trained, and needs the loss there: "
            "--train full would keep the model twice, and the exact head has no anchor; "
            "use --train lowrank, norms or scales"
        ),
    ),
    Conflict(
        lambda cfg: cfg.rule == "adam" and drawn(cfg).refreshed,
        lambda cfg: (
            f"--rule adam with --directions {cfg.directions}: second moments cannot follow a basis "
            "that is drawn anew; use --rule sgd or momentum"
        ),
    ),
    Conflict(
        lambda cfg: (
            RULES[cfg.rule].looks_back
            and (drawn(cfg).refreshed or drawn(cfg).guided or cfg.mask not in SEEDED_MASKS)
        ),
        lambda cfg: (
            f"--rule {cfg.rule} with --directions {cfg.directions} and --mask {cfg.mask}: the rule makes past "
            f"steps anew from seeds alone; use other directions, and a mask of {', '.join(SEEDED_MASKS)}"
        ),
    ),
    Conflict(
        lambda cfg: (cfg.rule == "centred") != (cfg.directions == "centred"),
        "--directions centred and --rule centred are two halves of ZO-AdaMU: "
        "the rule scales by the parts that the direction is made of; use both or neither",
    ),
    Conflict(
        lambda cfg: drawn(cfg).guided and not (cfg.parts.weights or cfg.parts.factors),
        lambda cfg: (
            f"--directions {cfg.directions} are made from the inputs of matrices; they need --train full or lowrank"
        ),
    ),
    Conflict(
        lambda cfg: drawn(cfg).guided and cfg.mask not in ("none", "layers"),
        lambda cfg: (
            f"--mask {cfg.mask} with --directions {cfg.directions}: the mask shapes weight-sized noise, "
            "and these directions have none"
        ),
    ),
    Conflict(
        lambda cfg: one_basis(cfg) and (cfg.parts.factors or RULES[cfg.rule].state),
        lambda cfg: (
            f"--directions {cfg.directions} have a basis that changes at every step, which neither the state of a rule "
            "nor low-rank factors can follow; use --rule sgd and --train full"
        ),
    ),
    Conflict(
        lambda cfg: drawn(cfg).guided and cfg.tries,
        lambda cfg: (
            f"--directions {cfg.directions} with {_credit(cfg)}: the credit tries each direction on every example, "
            "but these are made for one example each"
        ),
    ),
    Conflict(
        lambda cfg: cfg.residency in ("disk", "host") and needs_memory(cfg),
        lambda cfg: f"--residency {cfg.residency} with --train full: {needs_memory(cfg)}",
    ),
)

# ---------------------------------------------------------------------------------------------
# The rest

GENERAL = (
    Conflict(
        lambda cfg: cfg.step_auto and cannot_measure_step(cfg),
        lambda cfg: f"--step auto: {cannot_measure_step(cfg)}; give --step a number",
    ),
    Conflict(
        lambda cfg: (
            cfg.objective not in OBJECTIVES and not re.fullmatch(r"[\w.]+:[\w.]+", cfg.objective)
        ),
        lambda cfg: (
            f"--objective {cfg.objective!r} is not one of {', '.join(OBJECTIVES)}, nor module:function, "
            "a Python function (prediction, row) -> float"
        ),
    ),
    Conflict(
        lambda cfg: cfg.objective != LOSS and cfg.backward,
        lambda cfg: (
            f"--estimator {cfg.estimator} with --objective {cfg.objective}: it follows the gradient of a loss, "
            "and a score of predictions has none; use a forward-only estimator"
        ),
    ),
    Conflict(
        lambda cfg: cfg.objective != LOSS and not cfg.backward and cfg.parts.head,
        lambda cfg: (
            f"{train_option(cfg)} with --objective {cfg.objective}: the exact head follows the gradient "
            "of a loss, and a score of predictions has none; leave out head"
        ),
    ),
    Conflict(
        lambda cfg: cfg.parts.weights and cfg.precision == "int4",
        "--train full with --precision int4: int4 codes are frozen; "
        "train lowrank, norms, scales or head there, or use int8 or bf16",
    ),
    *(_beside_full(part.name) for part in PARTS.values() if part.perturbed and not part.weights),
    Conflict(
        lambda cfg: cfg.parts.weights and cfg.parts.readout,
        "--train full+probe: a linear probe takes the head's place, so no loss would depend on the head's weights; "
        "use full, full+head, or lowrank+probe",
    ),
    Conflict(
        lambda cfg: cfg.rounding is not None and not cfg.parts.weights,
        "--rounding says how full weights keep small steps; it needs --train full",
    ),
    Conflict(
        lambda cfg: cfg.rounding is not None and cfg.precision in UNROUNDED,
        lambda cfg: (
            f"--rounding with --precision {cfg.precision}: {UNROUNDED[cfg.precision or '']}"
        ),
    ),
    Conflict(
        lambda cfg: (
            (cfg.precision, cfg.mask) == ("int8", "quantized")
            and ROUNDINGS[cfg.rounding or ""].plane
        ),
        lambda cfg: (
            "--mask quantized moves codes by whole steps of their grid; "
            f"--rounding {cfg.rounding} has a finer one: use --rounding stochastic"
        ),
    ),
    Conflict(
        lambda cfg: _requantises(cfg) and cfg.precision not in ("int8", *UNROUNDED),
        lambda cfg: (
            f"--rounding {cfg.rounding} re-quantises int8 codes from base and journal; it needs --precision int8"
        ),
    ),
    Conflict(
        lambda cfg: _requantises(cfg) and cfg.precision == "int8" and cannot_requantise(cfg),
        lambda cfg: (
            f"--rounding {cfg.rounding}: {cannot_requantise(cfg)}; use --rounding stochastic"
        ),
    ),
    Conflict(
        lambda cfg: cfg.residency == "host" and cfg.device == "cpu",
        "--residency host keeps blocks in the RAM beside a GPU; with --device cpu use disk",
    ),
    Conflict(
        lambda cfg: cfg.residency == "disk" and cfg.device == "cuda",
        "--residency disk with --device cuda: blocks reach a GPU from the RAM; "
        "use --residency host, or --device cpu",
    ),
    Conflict(
        lambda cfg: (cfg.batch_size or DEFAULT_BATCH) % cfg.samples,
        lambda cfg: (
            f"--samples {cfg.samples} with --batch-size {cfg.batch_size or DEFAULT_BATCH}: a batch has each of its "
            "rows so often, so its size has to be a multiple of that"
        ),
    ),
    Conflict(
        lambda cfg: (
            cfg.micro_batch is not None and cfg.micro_batch > (cfg.batch_size or cfg.micro_batch)
        ),
        lambda cfg: (
            f"--micro-batch {cfg.micro_batch} is more than --batch-size {cfg.batch_size}, which it splits"
        ),
    ),
)
