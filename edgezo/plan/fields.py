"""The settings of a run, as a table: each is written here once.

A test compares ``config.RunConfig`` with the table; the options of the command line, docs/options.md and
docs/settings-sample.toml are made from it. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgezo.plan.data_fields import DATA, PREDICTION
from edgezo.plan.field import Field
from edgezo.plan.run_fields import SET_BY_A_RUN
from edgezo.zo.axes import CREDITS, DIRECTIONS, MASKS, ROUNDINGS, RULES
from edgezo.zo.parts import PARTS
from edgezo.zo.presets import AUTO, DEFAULT, ESTIMATORS

QUANTIZED = ("int8", "int4")
# Precisions in which --rounding has nothing to do, each with the reason.
UNROUNDED = {"fp32": "updates are exact there", "int4": "nothing is rounded there"}

ENGINES = ("torch", "onnx")
# Of onnxruntime's execution providers, those that edgezo knows by name (network/onnx_sessions.py).
PROVIDER_NAMES = ("cpu", "xnnpack", "nnapi", "coreml", "qnn", "openvino", "cuda")

DEFAULT_STEPS = 400
DEFAULT_BATCH = 16  # examples a step: more take too long on a small machine, fewer are noisy

# Settings of which one replaces the other: a higher layer that gives one removes the lower layers' values of both.
ALTERNATIVES = (("steps", "for_s"), ("data", "task"))

# ---------------------------------------------------------------------------------------------
# The table. A setting is free on resume where another value changes losses in their rounding at most. Files may have
# moved: the journal identifies the weights, the training rows and the finetuner.

_MEMORY = (
    Field(
        name="max_mem_bytes",
        alias="max_mem",
        kind="bytes",
        metavar="SIZE",
        brief="Cap on peak memory: 2GB.  [default: most that is free]",
        help="Cap on the peak memory of the process; with cuda, on that of the GPU: 700MB, 2GB.",
        default_text="most of the free memory",
        example="2GB",
        low=1,
        free_on_resume=True,
    ),
    Field(
        name="device",
        kind="choice",
        help="Where to compute.",
        default="auto",
        default_text="auto: cuda where PyTorch can use a GPU",
        choices=("auto", "cpu", "cuda"),
        free_on_resume=True,
    ),
    Field(
        name="engine",
        kind="choice",
        help="What computes: torch, or onnx, which trains what export --format onnx --trainable wrote in a process "
        "without PyTorch.",
        default="torch",
        choices=ENGINES,
    ),
    Field(
        name="provider",
        kind="choice",
        help="Execution provider of --engine onnx; what it has no place for is computed on the CPU.",
        default="cpu",
        choices=PROVIDER_NAMES,
        free_on_resume=True,
    ),
    Field(
        name="precision",
        kind="choice",
        brief="Of stored weights.  [default: the highest that fits]",
        help="Format in which weights are stored.",
        default_text="the highest of bf16, int8 and int4 that fits",
        example="int8",
        choices=("fp32", "bf16", "fp16", *QUANTIZED),
    ),
    Field(
        name="residency",
        kind="choice",
        help="Where weights are: all in memory, or blocks in the RAM beside a GPU (host), or on disk.",
        default_text="in memory where they fit",
        example="disk",
        choices=("resident", "host", "disk"),
        free_on_resume=True,
    ),
    Field(
        name="batch_size",
        kind="int",
        metavar="N",
        brief="Examples in a step.  [default: 16]",
        help="Examples in a step; with grzo each has its direction.",
        default_text=str(DEFAULT_BATCH),
        example=DEFAULT_BATCH,
        low=1,
        high=1024,
    ),
    Field(
        name="micro_batch",
        kind="int",
        metavar="N",
        help="Examples that are in memory at once.",
        default_text="as many as fit",
        example=4,
        low=1,
        high=1024,
        free_on_resume=True,
    ),
)

_METHOD = (
    Field(
        name="estimator",
        kind="choice",
        metavar="NAME",
        brief="Training method, or auto.  [default: default]",
        help="Training method: a preset, which trains its own parts alone (see edgezo estimators); default, which is "
        "grzo below a linear probe or the exact head; or auto. The options below override its choices.",
        default=DEFAULT,
        choices=(DEFAULT, *ESTIMATORS, AUTO),
    ),
    Field(
        name="directions",
        kind="choice",
        metavar="NAME",
        help="Directions that weights are perturbed along: signs, gaussian, shared, ...",
        choices=tuple(DIRECTIONS),
        of_preset=True,
    ),
    Field(
        name="mask",
        kind="choice",
        help="Which entries of a direction are kept, and how they are scaled.",
        choices=tuple(MASKS),
        of_preset=True,
    ),
    Field(
        name="credit",
        kind="choice",
        help="How the losses of a step become credit, one number for each direction.",
        choices=tuple(CREDITS),
        of_preset=True,
    ),
    Field(
        name="rule",
        kind="choice",
        help="How weights move along the sum of the directions, each times its credit.",
        choices=tuple(RULES),
        of_preset=True,
    ),
    Field(
        name="train",
        kind="train",
        metavar="PARTS",
        brief="What is trained: lowrank, head, probe, full, ...",
        help=f"What is trained, joined by +: {', '.join(PARTS)}.",
        choices=tuple(PARTS),
        of_preset=True,
    ),
    Field(
        name="blocks",
        kind="blocks",
        metavar="N",
        help="Train only the last N blocks, and what is above them; all, or auto.",
        default="all",
        example="10",
        low=1,
        high=10_000,
    ),
    Field(
        name="probe_reads",
        kind="choice",
        help="What a linear probe reads: the mean of the best five blocks, or the best one without an intercept, as "
        "export --format hf-classifier can hold it.",
        default="five",
        choices=("five", "one"),
    ),
    Field(
        name="states",
        kind="choice",
        help="How the output of frozen blocks is kept on disk, so that a row passes them once; none: they run in "
        "every step. exact: in the compute dtype.",
        default_text="bf16 with --blocks, where answers are not written",
        example="bf16",
        choices=("exact", "bf16", "int8", "none"),
    ),
    Field(
        name="state_rows",
        kind="int",
        metavar="N",
        help="Training rows whose states are kept; the run trains on these.",
        default_text="as many as the steps see, a third of --for computes, and half of the free disk holds",
        example=4000,
        low=1,
        high=100_000_000,
    ),
    Field(
        name="rounding",
        kind="choice",
        help="How --train full keeps steps that are smaller than the rounding of a weight.",
        default_text="plane; with int8 anchored",
        example="stochastic",
        choices=tuple(ROUNDINGS)[1:],
    ),
    Field(
        name="rank",
        kind="int",
        metavar="N",
        help="Rank of --train lowrank and lora, and of low-rank directions.",
        default=8,
        low=1,
        high=256,
    ),
    Field(
        name="keep",
        kind="float",
        metavar="SHARE",
        help="Share of the weights (--mask sparse) or blocks (--mask layers) that a step moves.",
        low=0,
        high=1,
        open_low=True,
        of_preset=True,
    ),
    Field(
        name="refresh",
        kind="int",
        metavar="N",
        help="Steps after which a new one is drawn: a basis of low-rank directions, or an anchor of --credit svrg.",
        low=1,
        of_preset=True,
    ),
    Field(
        name="candidates",
        kind="int",
        metavar="N",
        help="Directions that --credit candidates tries in a step.",
        default=8,
        low=1,
        high=256,
    ),
    Field(
        name="samples",
        kind="int",
        metavar="N",
        help="How often a batch has each of its rows, each time with another direction: --credit by-prompt compares "
        "them.",
        default=1,
        low=1,
        high=1024,
    ),
    Field(
        name="finetuner",
        kind="str",
        metavar="FILE",
        help="File that edgezo meta-train or convert-finetuner made, with the scales of --mask block.",
        example="finetuner.safetensors",
        free_on_resume=True,
    ),
    Field(
        name="short_tokens",
        kind="int",
        metavar="N",
        help="Tokens of the longest example that --estimator addax takes the gradient of.",
        default_text="as many as memory allows",
        example=128,
        low=0,
        high=1_048_576,
    ),
)

_RUN = (
    Field(
        name="steps",
        kind="int",
        metavar="N",
        brief="Training steps.  [default: 400]",
        help="Training steps.",
        default_text=str(DEFAULT_STEPS),
        example=DEFAULT_STEPS,
        low=1,
        high=10_000_000,
    ),
    Field(
        name="for_s",
        alias="for",
        kind="duration",
        metavar="TIME",
        brief="Time of the whole command, in place of --steps: 10m.",
        help="How long the whole command takes, reading, loading and evaluations included, instead of --steps: 120s, "
        "10m, 1.5h, 1h30m.",
        example="10m",
        low=0,
        open_low=True,
    ),
    Field(
        name="step",
        kind="float",
        metavar="X",
        brief="Step size, or auto.",
        help="Step size: kappa, a fraction of the perturbation (grzo), or a learning rate (mezo, lora). auto chooses "
        "both --step and --sigma.",
        low=0,
        high=100,
        open_low=True,
        auto="step_auto",
        of_preset=True,
    ),
    Field(
        name="sigma",
        kind="float",
        metavar="X",
        help="Size of the perturbation.",
        low=0,
        high=1,
        open_low=True,
        of_preset=True,
    ),
    Field(
        name="schedule",
        kind="choice",
        help="How the step size changes during a run: linear falls to 0.",
        default="linear",
        choices=("linear", "constant"),
    ),
    Field(
        name="weight_decay",
        kind="float",
        metavar="SHARE",
        help="Fraction by which perturbed weights shrink per step; follows --schedule. With lora, AdamW's decay.",
        default=0.0,
        low=0,
        high=1,
    ),
    Field(
        name="weight_decay_to",
        kind="choice",
        help="What perturbed weights shrink towards: zero, or the values that the base has.",
        default="zero",
        choices=("zero", "base"),
    ),
    Field(
        name="head_lr",
        kind="float",
        metavar="X",
        help="Learning rate of --train head, for label words: about how far a step may move a word's score. For "
        "completions and text a tenth of it is used.",
        default=2.0,
        low=0,
        high=1000,
        open_low=True,
    ),
    Field(
        name="short_lr",
        kind="float",
        metavar="X",
        help="AdamW learning rate for addax's short examples.",
        default=1e-4,
        low=0,
        high=1,
        open_low=True,
    ),
    Field(
        name="eval_every",
        kind="int",
        metavar="N",
        help="Steps between evaluations.",
        default=0,
        default_text="0: before the first step and after the last",
        low=0,
    ),
    Field(
        name="snapshot_every",
        kind="int",
        metavar="N",
        help="Steps between snapshots of state that the seed cannot rebuild (mainly the head).",
        default=25,
        low=1,
    ),
    Field(
        name="threads",
        kind="int",
        metavar="N",
        brief="CPU threads.",
        help="CPU threads.",
        default_text="PyTorch's choice",
        example=2,
        low=1,
        high=4096,
        free_on_resume=True,
    ),
    Field(
        name="when",
        kind="choice",
        help="When to compute; a run pauses between steps otherwise. idle: while other programs take less than a "
        "quarter of the CPU. plugged-in: while the machine is not on its battery.",
        default="always",
        choices=("always", "idle", "plugged-in"),
        free_on_resume=True,
    ),
    Field(
        name="max_temp",
        kind="float",
        metavar="C",
        help="Pause between steps while the processor is hotter than this, in degrees Celsius, until it is 5 cooler.",
        default_text="no limit",
        example=80,
        low=30,
        high=120,
        free_on_resume=True,
    ),
    Field(
        name="max_cpu",
        kind="float",
        metavar="PERCENT",
        help="Rest between steps, so that this run and other programs together take no more of the CPU time of all "
        "cores.",
        default_text="no limit",
        example=50,
        low=1,
        high=100,
        free_on_resume=True,
    ),
    Field(
        name="log_to",
        kind="choice",
        brief="Log to tensorboard, wandb, mlflow or trackio as well.",
        help="Log losses and evaluations to a tracker as well, which has to be installed.",
        default="none",
        choices=("none", "tensorboard", "wandb", "mlflow", "trackio"),
        free_on_resume=True,
    ),
    Field(
        name="profile",
        kind="bool",
        help="Record memory by phase in RUN/profile.json.",
        default=False,
        free_on_resume=True,
    ),
    Field(
        name="out",
        kind="str",
        metavar="RUN",
        brief="Directory of the run.  [default: runs/MODEL-DATA]",
        help="Directory of the run.",
        default_text="runs/MODEL-DATA",
        example="runs/mine",
        free_on_resume=True,
    ),
)


class SettingGroup(NamedTuple):
    """Settings that are shown together."""

    title: str
    fields: tuple[Field, ...]


GROUPS = {
    "data": SettingGroup("Model and data", DATA),
    "prediction": SettingGroup("Predictions", PREDICTION),
    "memory": SettingGroup("Memory and device", _MEMORY),
    "method": SettingGroup("Method", _METHOD),
    "run": SettingGroup("Steps, evaluation and files", _RUN),
}
FIELDS = {field.name: field for group in GROUPS.values() for field in group.fields}
FIELDS |= {field.name: field for field in SET_BY_A_RUN}
SET_BY_RUN = tuple(field.name for field in SET_BY_A_RUN)

OF_PRESET = tuple(field.name for field in FIELDS.values() if field.of_preset)
FREE_ON_RESUME = tuple(field.name for field in FIELDS.values() if field.free_on_resume)


def flag(name: str) -> str:
    """The option that gives a setting: ``--max-mem`` for ``max_mem_bytes``."""
    field = FIELDS.get(name)
    shown = field.alias if field is not None and field.alias else name
    return "--" + shown.replace("_", "-")


def flags(names: Sequence[str]) -> str:
    return " and ".join(flag(name) for name in names)
