"""What numbers a request computes in, and how full weights keep steps that are smaller than their spacing. Pure."""

from __future__ import annotations

from edgezo.plan.config import RunConfig
from edgezo.plan.fields import UNROUNDED
from edgezo.plan.obstacles import cannot_requantise
from edgezo.zo.presets import usual_codes


def compute_dtype(precision: str, bf16_fast: bool) -> tuple[str, str]:
    """(dtype of activations and products, reason)."""
    if precision == "fp32":
        return "fp32", "the weights are fp32"
    if bf16_fast:
        return "bf16", "this CPU multiplies bf16 matrices in hardware"
    return "fp32", "this CPU has no bf16 matrix instructions; weights are expanded tile by tile"


def rounding_of(cfg: RunConfig, precision: str) -> tuple[str | None, str]:
    """(how full weights keep small steps, reason); None where nothing is rounded."""
    if not cfg.parts.weights or precision in UNROUNDED:
        return None, ""
    if cfg.rounding is not None:
        return cfg.rounding, "as given"
    if precision == "int8":
        if why := cannot_requantise(cfg):
            return "stochastic", f"rounding errors add up, but {why}"
        reason = "codes are re-quantised from base and journal before rounding errors add up"
        return usual_codes(cfg.estimator), reason
    return "plane", "8 more bits beside each weight; rounding alone would lose small steps"
