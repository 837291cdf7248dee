"""Options that several commands share: one for each field of the configuration, and how a result is given out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from edgezo.plan import fields

# (field, metavar or None for the field's choices, help). Every value stays text here: plan/fields.py
# reads it and reports all problems of a command together.
DATA = (
    (
        "data",
        "PATH",
        "Rows: a .jsonl, .json, .csv or .parquet file, a directory with train/validation files, or a hub id.",
    ),
    ("task", "NAME", "A built-in task instead of --data: sst2, trec, boolq, ..., or example."),
    ("data_root", "DIR", "Folder that holds the data sets of --task."),
    ("template", "TEXT", "Prompt of a labelled row; braces name its fields: '{text} It was'."),
    ("labels", "TEXT", "Label values and their words: '0=bad,1=good'."),
    ("label_field", "NAME", "Field that holds the label.  [default: label]"),
    ("max_length", "N", "Longest row in tokens.  [default: 512]"),
    ("eval_limit", "N", "Evaluate on this many validation rows.  [default: all]"),
    ("held_out", "SHARE", "Evaluate on this share of the training rows, held out of training."),
    ("seed", "N", "Of the data order, the directions and the low-rank basis.  [default: 0]"),
)
PREDICTIONS = (
    (
        "objective",
        "NAME",
        "What is learned: loss; or, of predictions, accuracy, exact-match, token-f1, numeric-match or "
        "module:function, (prediction, row) -> float.  [default: loss]",
    ),
    ("max_new_tokens", "N", "Of an answer that the model writes.  [default: as the task says]"),
)
MEMORY = (
    (
        "max_mem_bytes",
        "SIZE",
        "Cap on peak memory, with cuda the GPU's: 2GB.  [default: most of it]",
    ),
    ("device", None, "Where to compute.  [default: auto, cuda where there is one]"),
    ("precision", None, "Store of the weights.  [default: the highest that fits]"),
    ("batch_size", "N", "Examples, that is directions, a step.  [default: 16]"),
    ("micro_batch", "N", "Examples at once in memory.  [default: as many as fit]"),
    ("train", "PARTS", "What is trained, joined by +: lowrank, full, norms, scales, head, probe."),
    ("rank", "N", "Of low-rank factors and directions.  [default: 8]"),
    ("rounding", None, "How full weights keep small steps.  [default: plane; of int8 anchored]"),
    (
        "residency",
        None,
        "Keep all weights in memory, or blocks on disk (CPU) or in RAM (GPU).  [default: as need be]",
    ),
    ("estimator", "NAME", "A row of edgezo estimators; what follows changes it.  [default: grzo]"),
    ("directions", "NAME", "What an example is perturbed along: signs, gaussian, shared, ..."),
    ("mask", None, "What is left of a direction."),
    ("credit", None, "How losses weigh directions."),
    ("rule", None, "What is done with the weighted sum."),
    ("keep", "X", "Share of the weights or blocks that a mask leaves.  [default: 0.25]"),
    (
        "refresh",
        "N",
        "Steps between two bases of low-rank directions, or two anchors of --credit svrg.",
    ),
    ("candidates", "N", "Directions of --credit candidates.  [default: 8]"),
    (
        "short_tokens",
        "N",
        "Longest example that --estimator addax has the gradient of.  [default: as memory allows]",
    ),
    ("finetuner", "FILE", "Of --mask block: what meta-train or convert-finetuner made."),
)
RUN = (
    ("steps", "N", "[default: 400]"),
    ("for_s", "TIME", "Instead of --steps: 120s, 10m, 1.5h."),
    (
        "step",
        "X",
        "Step: a fraction of the probe (grzo), a learning rate (mezo), ...; auto measures step and sigma.",
    ),
    ("sigma", "X", "Size of the probe."),
    ("schedule", None, "[default: linear]"),
    ("weight_decay", "X", "[default: 0]"),
    (
        "head_lr",
        "X",
        "How far a step may move a label's score by the head; a tenth of it for a word's.  [default: 2]",
    ),
    ("short_lr", "X", "AdamW's rate for them.  [default: 1e-4]"),
    ("eval_every", "N", "Steps between evaluations.  [default: before and after only]"),
    ("snapshot_every", "N", "Steps between snapshots of what no seed has: the head, mostly."),
)
THREADS = ("threads", "N", "CPU threads.  [default: PyTorch's]")

# Fields of a request that a meta-training has as well; it is told its tasks in options of their own.
OF_META = (
    *("data_root", "template", "labels", "label_field", "max_length", "seed", "max_mem_bytes"),
    *("batch_size", "micro_batch", "train", "rank", "step", "sigma"),
)

Command = Callable[..., Any]


def options(*rows: tuple[str, str | None, str]) -> Callable[[Command], Command]:
    """click options for fields of the configuration, in the order given."""

    def decorate(command: Command) -> Command:
        for name, metavar, text in reversed(rows):
            choices = fields.FIELDS[name].choices
            command = click.option(
                fields.flag(name),
                name,
                metavar=metavar or "[" + "|".join(choices) + "]",
                help=text,
                shell_complete=_complete(choices),
            )(command)
        return command

    return decorate


def _complete(choices: Sequence[str]) -> Callable[..., list[str]]:
    return lambda ctx, param, incomplete: [c for c in choices if c.startswith(incomplete)]


model_option = click.option(
    "--model", metavar="MODEL", help="Card, directory, .gguf file or hub id."
)
config_option = click.option("--config", "config_file", metavar="FILE", help="Settings in TOML.")
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on standard output."
)


def use_threads(threads: int | None) -> None:
    """Before torch is imported: its thread pools are sized once."""
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(threads)


def emit(as_json: bool, payload: Mapping[str, Any], shown: Any) -> None:
    from edgezo.cli.terminal import stdout
    from edgezo.machine.files import to_json

    if as_json:
        click.echo(to_json(payload))
    else:
        stdout().print(shown, markup=False)
