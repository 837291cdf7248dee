"""``edgezo bench``: measurements of memory, speed, accuracy and alignment, beside other ways to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgezo.cli.options import (
    DATA,
    Command,
    emit,
    json_option,
    options,
    use_threads,
)
from edgezo.cli.short_help import ShortHelp
from edgezo.errors import UsageError
from edgezo.plan.field import parse_duration
from edgezo.plan.request import read_settings

batch_sizes_option = click.option(
    "--batch-sizes",
    metavar="N,N",
    default="16",
    show_default=True,
    help="Examples in a step, joined by commas.",
)


def out_option(folder: str) -> Callable[[Command], Command]:
    """The option for the directory of the result, ``runs/FOLDER`` unless it is given."""
    return click.option(
        "--out",
        metavar="DIR",
        default=f"runs/{folder}",
        show_default=True,
        help="Directory for the JSON file and the chart.",
    )


@click.group(short_help="Measure memory, speed, accuracy and alignment.")
def bench() -> None:
    """Measure memory, speed, accuracy and alignment, beside other ways to train."""


@bench.command("memory", short_help="Measure the peak memory of ways to train, in processes.")
@options("model")
@click.option("--methods", metavar="NAMES", help="Methods, joined by commas.  [default: all]")
@batch_sizes_option
@click.option(
    "--tokens", metavar="N,N", default="128", show_default=True, help="Lengths of a row in tokens."
)
@click.option("--max-mem", metavar="SIZE", help="Cap that the chart shows as a line.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", metavar="N", type=click.IntRange(1), help="[default: every core]")
@click.option(
    "--limit",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    help="End a baseline that takes longer and report its peak so far.  [default: none]",
)
@out_option("bench-memory")
@json_option
def memory(
    model: str | None,
    methods: str | None,
    batch_sizes: str,
    tokens: str,
    max_mem: str | None,
    device: str,
    threads: int | None,
    limit: float | None,
    out: str,
    as_json: bool,
) -> None:
    """Measure peak memory of inference, GRZO, MeZO, LoRA and AdamW on the same rows: table, JSON, chart."""
    from edgezo.bench.memory import METHODS, bench_memory
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.machine.hardware import parse_bytes

    if model is None:
        raise UsageError("--model is needed: a card, a directory, a .gguf file or a hub id")
    progress = TerminalProgress()
    result = bench_memory(
        model,
        methods=_names(methods) if methods else tuple(METHODS),
        batch_sizes=_integers("--batch-sizes", batch_sizes),
        tokens=_integers("--tokens", tokens),
        threads=threads,
        device=device,
        cap_bytes=parse_bytes(max_mem) if max_mem else None,
        limit_s=limit,
        out=Path(out),
        note=progress.note,
    )
    emit(as_json, result, tables.memory_table(result))


@bench.command(
    "alignment", cls=ShortHelp, short_help="Measure how near estimates are to the true gradient."
)
@options(*DATA, "precision", "train", "rank", "finetuner", "sigma", "threads")
@click.option(
    "--estimators",
    metavar="NAMES",
    help="Estimators, NAME or NAME:DIRECTIONS, joined by commas.  [default: all]",
)
@batch_sizes_option
@click.option(
    "--tries",
    metavar="N",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Steps with new directions that each figure is the mean of.",
)
@out_option("bench-alignment")
@json_option
def alignment(
    estimators: str | None, batch_sizes: str, tries: int, out: str, as_json: bool, **given: Any
) -> None:
    """Measure the cosine of a step's estimate to the true gradient, beside theory: table, JSON, chart."""
    use_threads(given["threads"])
    from edgezo.bench.alignment import bench_alignment
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.zo import presets

    progress = TerminalProgress()
    # Presets with mask block need a finetuner.
    usable = (p for p in presets.PRESETS.values() if given["finetuner"] or p.mask != "block")
    result = bench_alignment(
        given,
        estimators=_names(estimators) if estimators else [preset.name for preset in usable],
        batch_sizes=_integers("--batch-sizes", batch_sizes),
        tries=tries,
        out=Path(out),
        note=progress.note,
    )
    emit(as_json, result, tables.alignment_table(result))


@bench.command(
    "speed",
    cls=ShortHelp,
    rare=("template", "labels", "label_field", "task"),
    short_help="Measure a step beside a plain forward pass.",
)
@options(*DATA, "train", "rank", "threads")
@click.option(
    "--estimators",
    metavar="NAMES",
    default="grzo,grzo:rademacher,grzo:gaussian,mezo",
    show_default=True,
    help="Estimators, NAME or NAME:DIRECTIONS, joined by commas.",
)
@click.option(
    "--precisions",
    metavar="NAMES",
    default="bf16,int8,int4",
    show_default=True,
    help="Stores of the weights, joined by commas.",
)
@batch_sizes_option
@click.option(
    "--tokens",
    metavar="N,N",
    default="own,256",
    show_default=True,
    help="Lengths of a row in tokens: own (as it is) or N (repeated up to N).",
)
@click.option(
    "--repeats",
    metavar="N",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Rounds that each figure is the median of.",
)
@click.option(
    "--baselines/--no-baselines",
    default=True,
    show_default=True,
    help="Also measure MeZO in place and GRZO in hooks, as published.",
)
@out_option("bench-speed")
@json_option
def speed(
    estimators: str,
    precisions: str,
    batch_sizes: str,
    tokens: str,
    repeats: int,
    baselines: bool,
    out: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure a step beside a plain forward over the same rows, and that beside the machine: table, JSON, chart."""
    use_threads(given["threads"])
    from edgezo.bench.speed import AS_THEY_ARE, bench_speed
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress

    progress = TerminalProgress()
    lengths = [n if n == AS_THEY_ARE else _integers("--tokens", n)[0] for n in tokens.split(",")]
    result = bench_speed(
        given,
        estimators=_names(estimators),
        precisions=_names(precisions),
        batch_sizes=_integers("--batch-sizes", batch_sizes),
        tokens=lengths,
        repeats=repeats,
        baselines=baselines,
        out=Path(out),
        terminal=TerminalProgress,
        note=progress.note,
    )
    emit(as_json, result, tables.speed_table(result))


@bench.command("accuracy", short_help="Compare methods over tasks and seeds.")
@click.argument("study_file", metavar="STUDY", type=click.Path(dir_okay=False))
@click.option(
    "--methods",
    metavar="NAMES",
    help="Methods of the study to run, joined by commas.  [default: all]",
)
@click.option("--data-root", metavar="DIR", help="Folder that holds the data sets of the tasks.")
@click.option("--threads", metavar="N", type=click.IntRange(1), help="CPU threads of each run.")
@click.option(
    "--parallel",
    metavar="N",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs at the same time.",
)
@click.option(
    "--for",
    "for_s",
    metavar="TIME",
    help="Begin no run after this time: 2h, 30m. The same command goes on.  [default: no limit]",
)
@out_option("bench-accuracy")
@json_option
def accuracy(
    study_file: str,
    methods: str | None,
    data_root: str | None,
    threads: int | None,
    parallel: int,
    for_s: str | None,
    out: str,
    as_json: bool,
) -> None:
    """Compare methods over tasks and seeds at equal forwards or seconds, as the file STUDY says: page, JSON, chart."""
    from edgezo.bench.accuracy import bench_accuracy
    from edgezo.bench.study import read_study
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress

    progress = TerminalProgress()
    result = bench_accuracy(
        read_study(read_settings(study_file), _names(methods) if methods else []),
        data_root=data_root,
        threads=threads,
        parallel=parallel,
        most_s=_seconds(for_s) if for_s else None,
        out=Path(out),
        note=progress.note,
    )
    emit(as_json, result, tables.accuracy_table(result))


def _names(text: str) -> list[str]:
    """Names that are joined by commas."""
    return [name.strip() for name in text.split(",")]


def _seconds(text: str) -> float:
    """A duration in seconds. Raises UsageError that names the option."""
    try:
        return parse_duration(text)
    except ValueError as problem:
        raise UsageError(f"--for: {problem}") from problem


def _integers(option: str, text: str) -> list[int]:
    """Whole numbers that are joined by commas. Raises UsageError that names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as problem:
        raise UsageError(
            f"{option} {text!r} is not a list of whole numbers such as 4,16,64"
        ) from problem
