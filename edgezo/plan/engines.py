"""What --engine onnx has no place for, as a table: each combination is refused by name, with what to do instead."""

from __future__ import annotations

from dataclasses import replace

from edgezo.errors import UsageError
from edgezo.plan.config import RunConfig
from edgezo.plan.conflicts import train_option
from edgezo.plan.data_fields import LOSS
from edgezo.plan.fields import flag
from edgezo.plan.obstacles import Conflict, messages
from edgezo.zo.presets import AUTO

ONNX_PARTS = ("lowrank", "head", "probe")  # of --train
ONNX_CREDITS = ("group", "raw")
ONNX_PRECISIONS = ("fp32", "int8", "int4")
_TORCH_DOES = "use --engine torch"


def engine_conflicts(cfg: RunConfig) -> list[str]:
    """What is wrong with a request for its engine."""
    if cfg.engine == "torch":
        return [
            f"{flag(name)} has no effect here: only --engine onnx has execution providers"
            for name in ("provider",)
            if getattr(cfg, name) != "cpu"
        ]
    return list(messages(OF_ONNX, cfg))


def on_graphs(cfg: RunConfig) -> RunConfig:
    """The settings of a run of any engine for its use on ONNX Runtime; ``cfg.model`` are the graphs.

    Raises UsageError for a run that this engine has no place for.
    """
    cfg = replace(cfg, engine="onnx", precision=None, device="auto", residency=None)
    cfg = replace(cfg, profile=False, log_to="none", objective=LOSS)
    if problems := engine_conflicts(cfg):
        raise UsageError(problems)
    return cfg


def _other_parts(cfg: RunConfig) -> str:
    return "+".join(part for part in cfg.train if part not in ONNX_PARTS)


OF_ONNX = (
    Conflict(
        lambda cfg: cfg.backward or cfg.mixed or cfg.estimator == AUTO,
        lambda cfg: (
            f"--engine onnx has no backward pass, which --estimator {cfg.estimator} takes: give --estimator grzo, or "
            f"{_TORCH_DOES}"
        ),
    ),
    Conflict(
        lambda cfg: not cfg.backward and _other_parts(cfg),
        lambda cfg: (
            f"{train_option(cfg)}: the graphs of --engine onnx have no input for {_other_parts(cfg)}; give --train "
            f"{'+'.join(ONNX_PARTS)} or parts of it, or {_TORCH_DOES}"
        ),
    ),
    Conflict(
        lambda cfg: cfg.probing and cfg.directions != "signs",
        lambda cfg: (
            f"--engine onnx perturbs along --directions signs only, not {cfg.directions}: give --estimator grzo, or "
            f"{_TORCH_DOES}"
        ),
    ),
    Conflict(
        lambda cfg: cfg.probing and cfg.mask != "none",
        lambda cfg: f"--engine onnx has no --mask {cfg.mask}: leave it out, or {_TORCH_DOES}",
    ),
    Conflict(
        lambda cfg: cfg.probing and cfg.rule != "sgd",
        lambda cfg: (
            f"--engine onnx has --rule sgd only, not {cfg.rule}: leave it out, or {_TORCH_DOES}"
        ),
    ),
    Conflict(
        lambda cfg: cfg.probing and (cfg.credit not in ONNX_CREDITS or cfg.carried > 0),
        lambda cfg: (
            f"--engine onnx compares the two sides of each example, and --credit {cfg.credit} does not: give "
            f"--credit group or raw, or {_TORCH_DOES}"
        ),
    ),
    Conflict(
        lambda cfg: cfg.samples > 1,
        f"--engine onnx has each row once in a batch: leave out --samples, or {_TORCH_DOES}",
    ),
    Conflict(
        lambda cfg: cfg.weight_decay_to == "base",
        f"--engine onnx decays towards zero only: leave out --weight-decay-to, or {_TORCH_DOES}",
    ),
    Conflict(
        lambda cfg: cfg.step_auto,
        f"--engine onnx measures no step size: give --step a number (0.1 is usual), or {_TORCH_DOES}",
    ),
    Conflict(
        lambda cfg: cfg.objective != LOSS,
        lambda cfg: (
            f"--engine onnx writes no answers for --objective {cfg.objective} to score: leave it out, or {_TORCH_DOES}"
        ),
    ),
    Conflict(
        lambda cfg: cfg.device == "cuda",
        f"--engine onnx chooses by --provider where it computes: leave out --device cuda, or {_TORCH_DOES}",
    ),
    Conflict(
        lambda cfg: cfg.residency not in (None, "resident"),
        lambda cfg: (
            f"--engine onnx maps its weights from their files, and has no --residency {cfg.residency}: leave it out"
        ),
    ),
    Conflict(
        lambda cfg: cfg.precision not in (None, *ONNX_PRECISIONS),
        lambda cfg: (
            f"--engine onnx has no --precision {cfg.precision}: the graphs have that of their export (edgezo export "
            "--trainable --dtype): leave it out"
        ),
    ),
    Conflict(
        lambda cfg: cfg.blocks == "auto",
        "--engine onnx chooses no number of blocks: give --blocks a number, or all",
    ),
    Conflict(
        lambda cfg: cfg.log_to != "none",
        lambda cfg: (
            f"--log-to {cfg.log_to}: trackers are fed by --engine torch only; metrics.jsonl has every line"
        ),
    ),
    Conflict(
        lambda cfg: cfg.profile,
        f"--profile records phases of --engine torch only: leave it out, or {_TORCH_DOES}",
    ),
    Conflict(
        lambda cfg: cfg.parent is not None,
        f"--engine onnx goes on from no other run: give a trainable export as --model, or {_TORCH_DOES}",
    ),
)
