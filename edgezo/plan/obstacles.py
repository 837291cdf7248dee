"""Why something cannot be done with a request: kept on disk, re-quantised, or measured by perturbations.

A table of conditions for each, with its messages; the first that is true is given. conflicts.py refuses whole requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from edgezo.plan.config import RunConfig
from edgezo.zo.axes import DIRECTIONS, MASKS, RULES, DirectionEntry
from edgezo.zo.presets import AUTO

SEEDED_MASKS = ("none", "layers", "block")  # that depend neither on weights nor on a state
MEASURED_CREDITS = (
    "group",
    "mean",
)  # credits that --step auto has a formula for (run/auto_step.py)

Condition = Callable[[RunConfig], object]
Text = str | Callable[[RunConfig], str]  # a message, or what makes it


class Conflict(NamedTuple):
    """A message for every request of which ``when`` is true."""

    when: Condition
    text: Text


def needs_memory(cfg: RunConfig) -> str:
    """Why full weights have to stay in memory, or ''."""
    return next(messages(NEEDS_MEMORY, cfg), "") if cfg.parts.weights else ""


def cannot_requantise(cfg: RunConfig) -> str:
    """Why int8 codes cannot be re-quantised from base and journal alone, or ''."""
    return next(messages(CANNOT_REQUANTISE, cfg), "")


def cannot_measure_step(cfg: RunConfig) -> str:
    """Why perturbations cannot tell the step of --step auto, or ''."""
    return next(messages(CANNOT_MEASURE_STEP, cfg), "")


def messages(table: Iterable[Conflict], cfg: RunConfig) -> Iterator[str]:
    return (message(conflict.text, cfg) for conflict in table if conflict.when(cfg))


def message(text: Text, cfg: RunConfig) -> str:
    """The message of a table for this request."""
    return text if isinstance(text, str) else text(cfg)


def kept_state(cfg: RunConfig) -> str:
    """The option by which a run keeps a state beside its weights, or ''."""
    if RULES[cfg.rule].state:
        return f"--rule {cfg.rule}"
    return f"--mask {cfg.mask}" if MASKS[cfg.mask].state else ""


def drawn(cfg: RunConfig) -> DirectionEntry:
    """What the table says of the directions."""
    return DIRECTIONS[cfg.directions]


def one_basis(cfg: RunConfig) -> bool:
    """Whether directions are made from the inputs of layers, one for the whole batch."""
    return drawn(cfg).guided and not drawn(cfg).per_example


NEEDS_MEMORY = (
    Conflict(
        kept_state,
        lambda cfg: f"the state of {kept_state(cfg)} is kept beside the weights, in memory",
    ),
    Conflict(
        lambda cfg: cfg.mask == "block",
        "--mask block needs mean and variance of every trained tensor at every step",
    ),
    Conflict(
        lambda cfg: drawn(cfg).guided,
        lambda cfg: (
            f"a block outside memory takes its updates later, from seeds, and --directions {cfg.directions} have none"
        ),
    ),
    Conflict(
        lambda cfg: cfg.mask == "sparse",
        "--mask sparse reads the base's weights once more for its thresholds",
    ),
    Conflict(
        lambda cfg: cfg.precision == "int8",
        "int8 codes that are trained have to stay in memory; use --precision bf16",
    ),
)
CANNOT_REQUANTISE = (
    Conflict(
        lambda cfg: cfg.rule == "vote",
        "--rule vote moves codes by whole steps of their grid, which re-quantising changes",
    ),
    Conflict(
        kept_state,
        lambda cfg: f"the state of {kept_state(cfg)} would have to be rebuilt with the codes",
    ),
    Conflict(
        lambda cfg: RULES[cfg.rule].looks_back,
        lambda cfg: (
            f"every step that is replayed would take --rule {cfg.rule} through all before it"
        ),
    ),
    Conflict(
        lambda cfg: drawn(cfg).guided,
        lambda cfg: f"--directions {cfg.directions} are not in the journal",
    ),
    Conflict(
        lambda cfg: cfg.mask in ("sparse", "quantized"),
        lambda cfg: (
            f"what --mask {cfg.mask} keeps of a direction depends on the codes of that step"
        ),
    ),
)
CANNOT_MEASURE_STEP = (
    Conflict(
        lambda cfg: cfg.backward or cfg.estimator == AUTO,
        lambda cfg: (
            f"--estimator {cfg.estimator} has a learning rate for gradients, "
            "which cannot be estimated from perturbations"
        ),
    ),
    Conflict(
        lambda cfg: cfg.credit not in MEASURED_CREDITS,
        lambda cfg: (
            f"there is no formula for the step of --credit {cfg.credit} (there is for {' and '.join(MEASURED_CREDITS)})"
        ),
    ),
    Conflict(
        lambda cfg: cfg.rule != "sgd",
        lambda cfg: (
            f"--rule {cfg.rule} changes the length of a step, so it cannot be estimated from perturbations"
        ),
    ),
    Conflict(
        lambda cfg: MASKS[cfg.mask].state or cfg.mask == "block",
        lambda cfg: (
            f"--mask {cfg.mask} changes the length of a step, so it cannot be estimated from perturbations"
        ),
    ),
    Conflict(
        lambda cfg: drawn(cfg).echoes,
        lambda cfg: (
            f"--directions {cfg.directions} follow the steps before, and the measurement has none"
        ),
    ),
    Conflict(
        lambda cfg: drawn(cfg).guided,
        lambda cfg: (
            f"--directions {cfg.directions} are made for each row, and the measurement needs one direction for all rows"
        ),
    ),
)
