"""Settings that a request gives and its run would ignore, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgezo.plan.config import RunConfig
from edgezo.plan.conflicts import train_option
from edgezo.plan.fields import OF_PRESET, flag
from edgezo.plan.obstacles import Condition, Text, drawn, message, one_basis
from edgezo.zo.presets import AUTO


def without_effect(given: Mapping[str, Any], cfg: RunConfig) -> list[str]:
    """What the user gives with this command and the run would silently ignore."""
    given = {**given, "step": given.get("step", given.get("step_auto"))}
    uses = dict(USES)
    if cfg.backward:
        uses |= dict.fromkeys(("directions", "mask", "credit", "rule"), OF_FORWARD_ONLY)
    if cfg.estimator == AUTO:
        uses |= dict.fromkeys(OF_PRESET, DECIDED_BY_AUTO)
    return [
        f"{flag(name)} has no effect here: {message(use.text, cfg)}"
        for name, use in uses.items()
        if given.get(name) is not None and not use.used(cfg)
    ]


class Use(NamedTuple):
    """When a setting is used, and the message for a request that gives it in vain."""

    used: Condition
    text: Text


USES = {
    "rank": Use(
        lambda cfg: (
            cfg.parts.factors
            or cfg.parts.adapters
            or drawn(cfg).refreshed
            or drawn(cfg).summed
            or one_basis(cfg)
        ),
        "it is the rank of --train lowrank or lora, and of low-rank directions",
    ),
    "weight_decay_to": Use(
        lambda cfg: cfg.weight_decay and cfg.probing and not cfg.backward,
        "it says where --weight-decay pulls perturbed weights to; give that a share above 0",
    ),
    "keep": Use(
        lambda cfg: cfg.mask in ("sparse", "layers"), "only --mask sparse and layers use it"
    ),
    "refresh": Use(
        lambda cfg: drawn(cfg).refreshed or cfg.anchored,
        "only low-rank directions have a basis that is drawn anew, and only --credit svrg an anchor",
    ),
    "candidates": Use(
        lambda cfg: cfg.tries, "only --credit candidates and posterior try candidates"
    ),
    **dict.fromkeys(
        ("short_tokens", "short_lr"),
        Use(lambda cfg: cfg.mixed, "only --estimator addax has short examples"),
    ),
    "finetuner": Use(
        lambda cfg: cfg.mask == "block" and cfg.probing,
        "only --mask block (--estimator zo-finetuner) takes scales from it",
    ),
    "head_lr": Use(lambda cfg: cfg.parts.head, "it is the learning rate of --train head"),
    "probe_reads": Use(lambda cfg: cfg.parts.readout, "only --train probe fits a linear probe"),
    "sigma": Use(
        lambda cfg: cfg.probing, lambda cfg: f"{train_option(cfg)} alone perturbs nothing"
    ),
    "step": Use(
        lambda cfg: cfg.probing or cfg.backward,
        "--train head or probe alone perturbs nothing; the head's learning rate is --head-lr",
    ),
}
USES |= dict.fromkeys(
    ("states", "state_rows"),
    Use(lambda cfg: cfg.blocks != "all", "only --blocks freezes blocks, whose output is kept"),
)
OF_FORWARD_ONLY = Use(
    lambda cfg: False, "only forward-only estimators have directions, a mask, a credit and a rule"
)
DECIDED_BY_AUTO = Use(lambda cfg: False, "--estimator auto decides it; name an estimator to set it")
