"""``edgezo bench``: comparisons with other ways to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgezo.cli.options import (
    DATA,
    MEMORY,
    RUN,
    THREADS,
    emit,
    json_option,
    model_option,
    options,
    use_threads,
)
from edgezo.errors import UsageError
from edgezo.plan import request as config


@click.group()
def bench() -> None:
    """Compare with other ways to train, each measured in a process of its own."""


@bench.command("memory")
@model_option
@click.option("--methods", metavar="NAMES", help="Joined by commas.  [default: all]")
@click.option("--batch-sizes", metavar="N,N", default="16", show_default=True)
@click.option("--tokens", metavar="N,N", default="128", show_default=True, help="Of a row.")
@click.option("--max-mem", metavar="SIZE", help="Drawn into the chart as a line.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", metavar="N", type=click.IntRange(1), help="[default: every core]")
@click.option(
    "--limit",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    help="End a baseline that takes longer and report its peak so far.  [default: none]",
)
@click.option("--out", metavar="DIR", default="runs/bench-memory", show_default=True)
@json_option
def bench_memory(
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
    """Peak memory of inference, GRZO, MeZO, LoRA and AdamW on the same rows: table, JSON, chart."""
    from edgezo.bench import memory
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.machine.hardware import parse_bytes

    if model is None:
        raise UsageError("--model is needed: a card, a directory, a .gguf file or a hub id")
    progress = TerminalProgress()
    found = memory.bench_memory(
        model,
        methods=_names(methods) if methods else tuple(memory.METHODS),
        batch_sizes=_integers("--batch-sizes", batch_sizes),
        tokens=_integers("--tokens", tokens),
        threads=threads,
        device=device,
        cap_bytes=parse_bytes(max_mem) if max_mem else None,
        limit_s=limit,
        out=Path(out),
        note=progress.note,
    )
    emit(as_json, found, tables.memory_table(found))


@bench.command("alignment")
@model_option
@options(
    *DATA,
    *(
        row
        for row in (*MEMORY, *RUN)
        if row[0] in ("precision", "train", "rank", "sigma", "finetuner")
    ),
    THREADS,
)
@click.option(
    "--estimators",
    metavar="NAMES",
    help="Joined by commas, name or name:directions. [default: all]",
)
@click.option("--batch-sizes", metavar="N,N", default="16", show_default=True)
@click.option("--tries", metavar="N", type=click.IntRange(1), default=20, show_default=True)
@click.option("--out", metavar="DIR", default="runs/bench-alignment", show_default=True)
@json_option
def bench_alignment(
    estimators: str | None, batch_sizes: str, tries: int, out: str, as_json: bool, **said: Any
) -> None:
    """Cosine of one step's estimate to the true gradient, beside theory: table, JSON, chart."""
    use_threads(said["threads"])
    from edgezo.bench import alignment
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.zo import presets

    progress = TerminalProgress()
    names = [
        row.name for row in presets.PRESETS.values() if said["finetuner"] or row.mask != "block"
    ]
    found = alignment.bench_alignment(
        said,
        estimators=_names(estimators) if estimators else names,
        batch_sizes=_integers("--batch-sizes", batch_sizes),
        tries=tries,
        out=Path(out),
        note=progress.note,
    )
    emit(as_json, found, tables.alignment_table(found))


@bench.command("speed")
@model_option
@options(*DATA, *(row for row in (*MEMORY, *RUN) if row[0] in ("train", "rank")), THREADS)
@click.option(
    "--estimators",
    metavar="NAMES",
    default="grzo,grzo:rademacher,grzo:gaussian,mezo",
    show_default=True,
    help="Joined by commas, name or name:directions.",
)
@click.option("--precisions", metavar="NAMES", default="bf16,int8,int4", show_default=True)
@click.option("--batch-sizes", metavar="N,N", default="16", show_default=True)
@click.option(
    "--tokens",
    metavar="N,N",
    default="own,256",
    show_default=True,
    help="Of a row: as it is, or repeated up to N.",
)
@click.option("--repeats", metavar="N", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--baselines/--no-baselines",
    default=True,
    show_default=True,
    help="MeZO in place and GRZO in hooks, as published.",
)
@click.option("--out", metavar="DIR", default="runs/bench-speed", show_default=True)
@json_option
def bench_speed(
    estimators: str,
    precisions: str,
    batch_sizes: str,
    tokens: str,
    repeats: int,
    baselines: bool,
    out: str,
    as_json: bool,
    **said: Any,
) -> None:
    """A step beside the plain forward over the same rows, and that beside the machine: table, JSON, chart."""
    use_threads(said["threads"])
    from edgezo.bench import speed
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress

    progress = TerminalProgress()
    lengths = [n if n == speed.OWN else _integers("--tokens", n)[0] for n in tokens.split(",")]
    found = speed.bench_speed(
        said,
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
    emit(as_json, found, tables.speed_table(found))


@bench.command("accuracy")
@click.argument("study_file", metavar="STUDY", type=click.Path(dir_okay=False))
@click.option("--methods", metavar="NAMES", help="Of the study, joined by commas.  [default: all]")
@click.option("--data-root", metavar="DIR", help="Folder that holds the data sets of the tasks.")
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Of each run.")
@click.option("--parallel", metavar="N", type=click.IntRange(1), default=1, show_default=True)
@click.option("--out", metavar="DIR", default="runs/bench-accuracy", show_default=True)
@json_option
def bench_accuracy(
    study_file: str,
    methods: str | None,
    data_root: str | None,
    threads: int | None,
    parallel: int,
    out: str,
    as_json: bool,
) -> None:
    """Tasks x methods x seeds at equal forwards or seconds, as the file STUDY says: table, JSON, chart."""
    from edgezo.bench import accuracy
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress

    progress = TerminalProgress()
    named = _names(methods) if methods else []
    found = accuracy.bench_accuracy(
        accuracy.read_study(config.read_toml(study_file), named),
        data_root=data_root,
        threads=threads,
        parallel=parallel,
        out=Path(out),
        note=progress.note,
    )
    emit(as_json, found, tables.accuracy_table(found))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as problem:
        raise UsageError(f"{name} {text!r} is not a list of numbers such as 4,16,64") from problem
