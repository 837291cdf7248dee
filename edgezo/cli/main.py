"""The command line: parses, prints, maps errors to exit codes. The work is elsewhere.

Exit codes: 0 done, 1 error, 2 usage, 3 does not fit, 4 budget exceeded while running (state saved),
5 journal and base disagree, 130 interrupted (saved). With ``--json`` standard output holds exactly
one JSON object, errors included; progress and notes go to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from edgezo import __version__
from edgezo.cli.bench import bench
from edgezo.cli.options import (
    DATA,
    MEMORY,
    OF_META,
    PREDICTIONS,
    RUN,
    THREADS,
    config_option,
    emit,
    json_option,
    model_option,
    options,
    use_threads,
)
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.process_memory import allocator_policy
from edgezo.plan import fields as settings
from edgezo.plan import request as config

if TYPE_CHECKING:
    from edgezo.plan.request import RunConfig

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgezo")
def cli() -> None:
    """Fine-tune a language model in about the memory it takes to run it: forward passes only."""


cli.add_command(bench)


@cli.command()
@model_option
@options(*DATA, *PREDICTIONS, *MEMORY, *RUN, THREADS)
@click.option(
    "--profile/--no-profile", default=None, help="Record memory by phase: RUN/profile.json."
)
@click.option("--out", metavar="RUN", help="Run directory.  [default: runs/MODEL-DATA]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--show-batch", is_flag=True, help="Print the tokens of one batch and stop.")
@config_option
@json_option
def finetune(
    resume: bool,
    dry_run: bool,
    show_batch: bool,
    config_file: str | None,
    as_json: bool,
    **said: Any,
) -> None:
    """Fine-tune a model under --max-mem."""
    from edgezo.cli import dry_run as preview
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.machine import profiler

    progress = TerminalProgress()
    cfg, resuming = _finetune_config(said, config_file, resume, progress.note)
    use_threads(cfg.threads)
    if show_batch:
        text = preview.show_batch(cfg)
        emit(as_json, {"batch": text}, text)
        return
    if dry_run:
        plan = preview.plan(cfg, progress.note)
        emit(as_json, plan.to_dict(), tables.plan_table(plan))
        return
    cfg = cfg if cfg.out is not None else replace(cfg, out=_free_run_directory(cfg))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with profiler.profiling(cfg.profile):
        with profiler.phase("import"):
            from edgezo.run.train import finetune as run_finetune

        try:
            summary = run_finetune(cfg, resume=resuming, progress=progress)
        finally:
            progress.close()
    emit(as_json, summary, tables.verdict(summary))
    if not as_json:
        click.echo(f"run {cfg.out}")


@cli.command()
@model_option
@options(*DATA, *PREDICTIONS, *MEMORY)
@config_option
@json_option
def plan(config_file: str | None, as_json: bool, **said: str | None) -> None:
    """Show what a fine-tune would take, item by item, without reading a weight."""
    from edgezo.cli import dry_run as preview
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.plan.plan import PlanDoesNotFit

    cfg = _merge(said, config_file, need_data=False)
    note = TerminalProgress().note
    try:
        found = preview.plan(cfg, note)
    except PlanDoesNotFit:
        if (largest := preview.largest(cfg)) is not None:
            note(f"the largest card that fits: {largest.model} in {largest.precision}")
        raise
    largest = preview.largest(replace(cfg, device=found.device, max_mem_bytes=found.max_mem_bytes))
    named = largest and {
        k: getattr(largest, k) for k in ("model", "precision", "planned_peak_bytes")
    }
    emit(as_json, {**found.to_dict(), "largest": named}, tables.plan_table(found, largest))


@cli.command("eval")
@model_option
@options(*DATA, *PREDICTIONS, *MEMORY[:3], THREADS)
@config_option
@json_option
def evaluate(config_file: str | None, as_json: bool, **said: str | None) -> None:
    """Evaluate a model, or a run (--model RUN) on its own data or other data."""
    from edgezo.cli import tables
    from edgezo.machine.hardware import machine
    from edgezo.plan.budget import portable

    model = said["model"]
    saved = _saved_config(Path(model)) if model is not None else None
    if saved is None:
        cfg = _merge(said, config_file)
        target = cfg.model
    else:
        target = str(model)
        said["model"] = None
        lower = _saved_layer(portable(saved, machine()), said)
        if said["data"] is not None or said["task"] is not None:
            for name in ("data_root", "template", "labels", "label_field", "max_new_tokens"):
                del lower[name]
            lower["objective"] = settings.LOSS  # that of the run belongs to its own data
        objective, said["objective"] = said["objective"], None
        cfg = config.make_config(said, lower)
        if objective is not None:  # nothing is trained by it here, so whatever was trained may be
            judged = config.make_config({"model": target, "objective": objective}, need_data=False)
            cfg = replace(cfg, objective=judged.objective)
    use_threads(cfg.threads)
    from edgezo.run.evaluate import evaluate as run_evaluation

    result = run_evaluation(target, cfg, lambda text: click.echo(text, err=True))
    emit(as_json, result, tables.evaluation_line(result))


@cli.command()
@click.argument("run", metavar="RUN")
@click.option("--out", metavar="DIR", required=True, help="Where the rebuilt run goes.")
@json_option
def replay(run: str, out: str, as_json: bool) -> None:
    """Rebuild a fine-tuned model from its base and its journal, without data or forwards."""
    from edgezo.run.evaluate import replay as run_replay

    result = run_replay(Path(run), Path(out))
    emit(as_json, result, f"replayed {result.get('steps', '?')} steps of {run} into {out}")


@cli.command()
@click.argument("run", metavar="RUN")
@click.option(
    "--format", "form", type=click.Choice(["hf", "peft"]), default="hf", show_default=True
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Of hf's weights.  [default: fp32 where anything was trained beside frozen ones, else theirs]",
)
@click.option("--out", metavar="DIR", required=True, help="A new directory.")
@json_option
def export(run: str, form: str, dtype: str | None, out: str, as_json: bool) -> None:
    """Write a run's result for other programs: hf, a whole model; peft, the adapter alone."""
    from edgezo.plan.budget import mb
    from edgezo.run.export import export as run_export

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = run_export(Path(run), form, Path(out), dtype=dtype)
    text = f"{result['tensors']} tensors, {mb(result['weight_bytes'])}, in {out}"
    emit(as_json, result, "\n".join([text, *(f"note: {line}" for line in result["notes"])]))


@cli.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that come with a card."""
    from edgezo.cli import tables
    from edgezo.network.cards import cards

    found = list(cards().values())
    rows = [
        {
            "name": card.name,
            "family": card.family,
            "kind": card.kind,
            "parameters": card.parameters,
            "sources": [str(source) for source in card.sources],
            "settings": card.settings,
        }
        for card in found
    ]
    emit(as_json, {"models": rows}, tables.models_table(found))


@cli.command()
@json_option
def estimators(as_json: bool) -> None:
    """List the rows of the family: equation, forwards, state and noise of each."""
    from edgezo.cli import tables
    from edgezo.zo import presets

    rows = [row.describe() for row in presets.PRESETS.values()]
    rows += [row.describe() for row in presets.FIRST_ORDER.values()]
    emit(as_json, {"estimators": rows}, tables.estimators_list(rows))


@cli.command("convert-finetuner")
@click.argument("source", metavar="IN.pth")
@click.argument("out", metavar="OUT.safetensors")
@json_option
def convert_finetuner(source: str, out: str, as_json: bool) -> None:
    """Read a published ZO Fine-tuner (pickled networks, none of which is run) into safetensors."""
    from edgezo.run.finetuner import convert_finetuner as convert

    found = convert(Path(source), Path(out))
    result = {"source": source, "out": out, "blocks": len(found.blocks)}
    emit(as_json, result, f"{len(found.blocks)} networks of {source} in {out}")


@cli.command("meta-train")
@model_option
@click.option("--task", "tasks", metavar="NAME", multiple=True, help="A built-in task; repeatable.")
@click.option("--data", "files", metavar="PATH", multiple=True, help="Rows; repeatable.")
@options(
    *(row for row in (*DATA, *MEMORY, *RUN) if row[0] in OF_META),
    THREADS,
)
@click.option(
    "--estimator", default="zo-finetuner", show_default=True, help="Or zo-finetuner-grzo."
)
@click.option("--sharing", metavar="[block|layer]", default="block", show_default=True)
@click.option("--steps", type=int, default=200, show_default=True, help="Of the finetuner.")
@click.option("--restart", type=int, default=50, show_default=True, help="Steps of a trajectory.")
@click.option("--rate", type=float, default=0.05, show_default=True, help="Of the networks.")
@click.option("--lr", type=float, default=0.01, show_default=True, help="Of the trajectory.")
@click.option("--out", metavar="FILE", required=True, help="A new .safetensors file.")
@config_option
@json_option
def meta_train(
    tasks: Sequence[str],
    files: Sequence[str],
    sharing: str,
    steps: int,
    restart: int,
    rate: float,
    lr: float,
    out: str,
    config_file: str | None,
    as_json: bool,
    **said: Any,
) -> None:
    """Learn a ZO Fine-tuner for a model on small tasks: with gradients, so with several times the memory."""
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.machine.hardware import parse_bytes

    use_threads(said["threads"])
    from edgezo.bench import meta_train as meta

    cap = said.pop("max_mem_bytes")
    from_file = config.read_toml(config_file) if config_file is not None else {}
    found = meta.meta_train(
        {**from_file, **{name: value for name, value in said.items() if value is not None}},
        [*({"task": task} for task in tasks), *({"data": file} for file in files)],
        meta.MetaRequest(steps, restart, sharing, rate, lr),
        Path(out),
        max_mem_bytes=parse_bytes(cap) if cap else None,
        note=TerminalProgress().note,
    )
    shown = f"{found['blocks']} networks in {out}, scales at the base {found['scales']}"
    emit(as_json, found, shown)


def _merge(
    said: Mapping[str, Any], config_file: str | None, *, need_data: bool = True
) -> RunConfig:
    """Command line over file over card over defaults."""
    from edgezo.network.cards import find_card

    from_file = config.read_toml(config_file) if config_file is not None else {}
    model = said.get("model") or from_file.get("model")
    card = find_card(model) if isinstance(model, str) else None
    of_card = dict(card.settings) if card is not None else {}
    estimator = said.get("estimator") or from_file.get("estimator") or "grzo"
    by_hand = any(said.get(name) or from_file.get(name) for name in ("mask", "credit", "rule"))
    if by_hand or estimator != of_card.get("estimator", "grzo"):
        for name in settings.OF_PRESET:  # they were found for the card's estimator
            of_card.pop(name, None)
    return config.make_config(said, from_file, of_card, need_data=need_data)


def _finetune_config(
    said: Mapping[str, Any], config_file: str | None, resume: bool, note: Callable[[str], None]
) -> tuple[RunConfig, bool]:
    """(configuration, whether there are steps to go on from)."""
    out = said["out"]
    begun = out is not None and (Path(out) / "journal.bin").exists()
    if not resume:
        if begun:
            raise UsageError(
                f"{out} already holds a run. Go on with it (--resume --out {out}), "
                "or give another --out."
            )
        return _merge(said, config_file), False
    if out is None:
        raise UsageError("--resume needs --out RUN, the directory of the run to go on with")
    saved = _saved_config(Path(out))
    if saved is None:
        if said["model"] is None and config_file is None:
            raise UsageError(f"there is nothing to resume in {out}: it has no config.toml")
        note(f"there is nothing to resume in {out}; starting from the first step")
        return _merge(said, config_file), False
    layer = _saved_layer(saved, said)
    cfg = config.make_config({**said, "model": said["model"] or saved.model}, layer)
    cfg = replace(cfg, out=out)
    changed = [
        f"{settings.flag(f.name)} was {getattr(saved, f.name)} when the run began, "
        f"not {getattr(cfg, f.name)}; a resumed run goes on as it began"
        for f in fields(cfg)
        if f.name not in settings.FREE_ON_RESUME and getattr(cfg, f.name) != getattr(saved, f.name)
    ]
    if changed:
        raise UsageError(changed)
    return cfg, begun


def _saved_layer(saved: RunConfig, said: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings below what is said now. Its cap and residency go with its device."""
    layer = saved.to_dict()
    if said["device"] not in (None, saved.device):
        layer |= {"max_mem_bytes": None, "residency": None}
    return layer


def _saved_config(run: Path) -> RunConfig | None:
    """The configuration of a run directory, or None where there is none."""
    file = run / "config.toml"
    return config.from_toml(file.read_text(encoding="utf-8")) if file.is_file() else None


def _free_run_directory(cfg: RunConfig) -> str:
    """runs/MODEL-DATA, numbered where that name is taken."""
    model = Path(cfg.model).name.removesuffix(".gguf")
    data = cfg.task or Path(cfg.data or "data").stem
    base = Path("runs") / f"{model}-{data}"
    found, number = base, 1
    while found.exists():
        number += 1
        found = base.with_name(f"{base.name}-{number}")
    return str(found)


# ---------------------------------------------------------------------------------------------
# Results and errors


def _describe(error: BaseException) -> tuple[int, str, Mapping[str, Any]]:
    """(exit code, message, further fields for --json)."""
    if isinstance(error, EdgezoError):
        more: dict[str, Any] = getattr(error, "to_dict", dict)()
        if isinstance(error, UsageError):
            more = {"problems": list(error.problems)}
        return error.exit_code, str(error), more
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message(), {}
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED, "interrupted", {}
    if isinstance(error, MemoryError):
        return 1, "the system has no more memory to give; try a smaller --max-mem", {}
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{error.strerror or error}", {}
    return 1, f"{type(error).__name__}: {error}", {}


_EXPECTED = (
    EdgezoError,
    click.ClickException,
    KeyboardInterrupt,
    click.Abort,
    MemoryError,
    OSError,
)


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code; errors are printed, not raised."""
    as_json = "--json" in args
    try:
        outcome = cli.main(args=list(args), prog_name="edgezo", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        code, message, more = _describe(error)
        if not isinstance(error, _EXPECTED):  # a bug: show where it is
            traceback.print_exc()
        if as_json:
            from edgezo.machine.files import to_json

            click.echo(to_json({"error": message, "exit_code": code, **more}))
        elif isinstance(error, click.UsageError):
            error.show()
        else:
            click.echo(f"edgezo: {message}", err=True)
        return code


def main() -> NoReturn:
    allocator_policy()  # before anything imports torch
    sys.exit(run(sys.argv[1:]))
