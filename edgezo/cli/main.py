"""The command line: parses, prints, maps errors to exit codes. The work is elsewhere.

Exit codes: 0 done, 1 error, 2 usage, 3 does not fit, 4 budget exceeded while running (state saved),
5 journal and base disagree, 130 interrupted (saved). With ``--json`` standard output holds exactly
one JSON object, errors included; progress and notes go to standard error.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from edgezo import __version__
from edgezo.cli.bench import bench
from edgezo.cli.chat import chat
from edgezo.cli.completion import completion
from edgezo.cli.data_overview import look_at_data
from edgezo.cli.doctor import doctor
from edgezo.cli.hints import hint
from edgezo.cli.listings import estimators, models
from edgezo.cli.options import (
    DATA,
    MEMORY,
    METHOD,
    OF_EVALUATION,
    OF_META,
    PREDICTION,
    RUN,
    base_option,
    config_option,
    echo_json,
    emit,
    json_option,
    more_steps_option,
    options,
    printable,
    use_threads,
)
from edgezo.cli.runs import compare, list_runs, remove_run, report
from edgezo.cli.serve import serve
from edgezo.cli.short_help import ShortHelp
from edgezo.cli.use import apply, export, predict, replay
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine import interrupts, streams
from edgezo.machine.clock import now_s
from edgezo.machine.interrupts import INTERRUPTED
from edgezo.machine.links import directory_of_rank, rank_and_size, was_restarted
from edgezo.machine.process_memory import allocator_policy
from edgezo.plan.request import read_settings
from edgezo.run.requests import evaluation_request, finetune_request, new_request


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgezo")
def cli() -> None:
    """Fine-tune a language model in about the memory it takes to run it: forward passes only."""


for _command in (
    *(bench, doctor, completion, look_at_data, predict, chat, serve, apply),
    *(replay, export),
    *(report, compare, list_runs, remove_run, models, estimators),
):
    cli.add_command(_command)


@cli.command(cls=ShortHelp, rare=("show_batch", "base"))
@options(*DATA, *PREDICTION, *MEMORY, *METHOD, *RUN)
@more_steps_option
@base_option
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--show-batch", is_flag=True, help="Print the tokens of one batch and stop.")
@click.option(
    "--plan", "-v", "shows_plan", is_flag=True, help="Print every item of the plan first."
)
@click.option("--quiet", "-q", is_flag=True, help="Print the result only, and errors.")
@config_option
@json_option
def finetune(
    resume: bool,
    dry_run: bool,
    show_batch: bool,
    shows_plan: bool,
    quiet: bool,
    config_file: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Fine-tune a model under --max-mem."""
    from edgezo.cli import dry_run as preview
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.machine import profiler
    from edgezo.run.progress import Silent

    began_s = now_s()
    rank, _ = rank_and_size()
    progress = Silent() if quiet or rank else TerminalProgress(shows_plan=shows_plan)
    given["out"] = directory_of_rank(given["out"])
    resume = resume or was_restarted(given["out"])
    cfg, resuming, parent = finetune_request(given, config_file, resume, progress.note)
    use_threads(cfg.threads)
    if show_batch:
        text = preview.show_batch(cfg)
        emit(as_json, {"batch": text}, text)
        return
    if dry_run:
        plan = preview.plan(cfg, progress.note, parent)
        emit(as_json, plan.to_dict(), tables.plan_table(plan, steps=cfg.steps))
        return
    with profiler.profiling(cfg.profile):
        if cfg.engine == "onnx":
            from edgezo.run.onnx_train import finetune_onnx

            run_finetune = partial(finetune_onnx, cfg)
        else:
            with profiler.phase("import"):
                from edgezo.run.train import finetune as finetune_torch

            run_finetune = partial(finetune_torch, cfg, parent=parent)
        try:
            summary = run_finetune(resume=resuming, progress=progress, began_s=began_s)
        finally:
            progress.close()
    if rank:
        return
    emit(as_json, summary, tables.verdict(summary))
    if not as_json:
        if (page := Path(summary["run"], "report.html")).exists():
            click.echo(f"report {page}")
        click.echo(f"run {summary['run']}")


@cli.command(
    cls=ShortHelp,
    rare=("show_batch", "base"),
    short_help="Show the memory and the time that a fine-tune would take.",
)
@options(*DATA, *PREDICTION, *MEMORY, *METHOD, *RUN)
@more_steps_option
@base_option
@config_option
@json_option
def plan(config_file: str | None, as_json: bool, **given: str | None) -> None:
    """Show the memory and the time that a fine-tune would take, item by item, without reading a weight.

    It takes the options of finetune, so that a command can be planned as it stands; nothing is written.
    """
    from edgezo.cli import dry_run as preview
    from edgezo.cli import tables
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.plan.plan import PlanDoesNotFit

    cfg, _, parent = new_request(given, config_file, need_data=False)
    note = TerminalProgress().note
    try:
        planned = preview.plan(cfg, note, parent)
    except PlanDoesNotFit:
        if (largest := preview.largest(cfg)) is not None:
            note(f"the largest card that fits: {largest.model} in {largest.precision}")
        raise
    largest = preview.largest(
        replace(cfg, device=planned.device, max_mem_bytes=planned.max_mem_bytes)
    )
    named = largest and {
        k: getattr(largest, k) for k in ("model", "precision", "planned_peak_bytes")
    }
    emit(
        as_json,
        {**planned.to_dict(), "largest": named},
        tables.plan_table(planned, largest, cfg.steps),
    )


@cli.command(
    "eval", cls=ShortHelp, short_help="Evaluate a model or a run on its data, or on other data."
)
@options(*DATA, *PREDICTION, *OF_EVALUATION)
@base_option
@click.option(
    "--other-base",
    metavar="MODEL",
    help="Measure what a run trained beside frozen weights over those of another file of the model.",
)
@config_option
@json_option
def evaluate(
    other_base: str | None, config_file: str | None, as_json: bool, **given: str | None
) -> None:
    """Evaluate a model, or a run (--model RUN) on its data or on other data."""
    from edgezo.cli import tables

    target, cfg = evaluation_request(given, config_file, other_base)
    use_threads(cfg.threads)
    run_evaluation: Callable[..., dict[str, Any]]
    if cfg.engine == "onnx":
        from edgezo.run.onnx_use import evaluate_onnx as run_evaluation
    else:
        from edgezo.run.evaluate import evaluate as run_evaluation

        if other_base is not None:
            run_evaluation = partial(run_evaluation, over_other_weights=True)
    result = run_evaluation(target, cfg, lambda text: click.echo(text, err=True))
    emit(as_json, result, tables.evaluation_line(result))


@cli.command("convert-finetuner")
@click.argument("source", metavar="IN.pth")
@click.argument("out", metavar="OUT.safetensors")
@json_option
def convert_finetuner(source: str, out: str, as_json: bool) -> None:
    """Convert a published ZO Fine-tuner to safetensors. Nothing of the pickled file is run."""
    from edgezo.run.finetuner import convert_finetuner as convert

    finetuner = convert(Path(source), Path(out))
    result = {"source": source, "out": out, "blocks": len(finetuner.blocks)}
    emit(as_json, result, f"{len(finetuner.blocks)} networks of {source} in {out}")


@cli.command("meta-train", cls=ShortHelp, rare=("restart", "sharing"))
@click.option("--task", "tasks", metavar="NAME", multiple=True, help="A built-in task; repeatable.")
@click.option("--data", "files", metavar="PATH", multiple=True, help="Rows; repeatable.")
@options(*OF_META)
@click.option(
    "--estimator", default="zo-finetuner", show_default=True, help="Or zo-finetuner-grzo."
)
@click.option("--sharing", metavar="[block|layer]", default="block", show_default=True)
@click.option(
    "--steps", type=int, default=200, show_default=True, help="Steps of training the finetuner."
)
@click.option(
    "--restart",
    type=int,
    default=50,
    show_default=True,
    help="Steps of a trajectory before the model starts again.",
)
@click.option(
    "--rate",
    type=float,
    default=0.05,
    show_default=True,
    help="Learning rate of the finetuner's networks.",
)
@click.option(
    "--lr",
    type=float,
    default=0.01,
    show_default=True,
    help="Learning rate of the model along a trajectory.",
)
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
    **given: Any,
) -> None:
    """Train a ZO Fine-tuner for a model on small tasks. It needs gradients, so several times the memory."""
    from edgezo.cli.terminal import TerminalProgress
    from edgezo.machine.hardware import parse_bytes

    use_threads(given["threads"])
    from edgezo.bench import meta_train as meta

    cap = given.pop("max_mem_bytes")
    from_file = read_settings(config_file) if config_file is not None else {}
    result = meta.meta_train(
        {**from_file, **{name: value for name, value in given.items() if value is not None}},
        [*({"task": task} for task in tasks), *({"data": file} for file in files)],
        meta.MetaRequest(steps, restart, sharing, rate, lr),
        Path(out),
        max_mem_bytes=parse_bytes(cap) if cap else None,
        note=TerminalProgress().note,
    )
    shown = f"{result['blocks']} networks in {out}, scales at the base {result['scales']}"
    emit(as_json, result, shown)


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
        return 1, _os_message(error), {}
    if isinstance(error, ModuleNotFoundError) and _of_torch(error):
        return 1, f"{error}: {_NO_TORCH}", {}
    return 1, f"{type(error).__name__}: {error}", {}


_TORCH_PACKAGES = ("torch", "transformers", "accelerate", "optimum", "safetensors", "gguf", "onnx")
_NO_TORCH = (
    "this command runs on PyTorch, which is not installed with what goes with it. pip install 'edgezo[torch]' brings "
    "them. Without them, --engine onnx trains what export --trainable wrote, and such runs are evaluated, asked and "
    "replayed (docs/engines.md)."
)


def _of_torch(error: ModuleNotFoundError) -> bool:
    """Whether a package is missing that the extra "torch" brings."""
    return (error.name or "").partition(".")[0] in _TORCH_PACKAGES


_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_FREE = (
    "The disk, the quota or the file size limit is full. Free some space and give the command again; "
    "a run goes on with --resume."
)


def _os_message(error: OSError) -> str:
    """What the system refuses, where, and what to do next."""
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in _NO_ROOM:
        return f"{error.filename or 'A temporary file'}: {what}. {_FREE}"
    if error.filename:
        return f"{error.filename}: {what}. Check that it exists and may be read and written."
    return (
        f"{what}. {_missing_folder() or 'Check the files and directories that the command names.'}"
    )


def _missing_folder() -> str:
    """Which folder that a command does not name is missing, and what to do; empty where none is."""
    try:
        os.getcwd()
    except OSError:
        return "The current directory is not there any more. Change to another one (cd), and give the command again."
    try:
        tempfile.gettempdir()
    except OSError:
        return "Set TMPDIR to a directory that can be written."
    return ""


def _not_printed(refusal: OSError) -> str:
    """Why the result is not on standard output, and what to do."""
    way_out = _FREE if refusal.errno in _NO_ROOM else "What a run has written is in its directory."
    return f"standard output: {refusal.strerror}, so the result is not printed in full. {way_out}"


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
        _check_text(args)
        _check_folder()
        with interrupts.raising():
            outcome = cli.main(args=list(args), prog_name="edgezo", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        if interrupts.asked() and not isinstance(error, EdgezoError):
            error = KeyboardInterrupt()  # what it became on its way through a library
        code, message, more = _describe(error)
        if isinstance(error, click.UsageError):
            message = f"{message} {hint(message, args)}".strip()
        missing = isinstance(error, ModuleNotFoundError) and _of_torch(error)
        if not missing and not isinstance(error, _EXPECTED):  # a bug: show where it is
            traceback.print_exc()
        if as_json:
            echo_json({"error": message, "exit_code": code, **more})
        elif isinstance(error, click.UsageError):
            error.show()
            if more_to_say := hint(error.format_message(), args):
                click.echo(more_to_say, err=True)
        else:
            click.echo(f"edgezo: {printable(message)}", file=sys.stderr)  # in its own encoding
        return code


def _check_text(args: Sequence[str]) -> None:
    """UsageError for an argument whose bytes are no UTF-8: neither a journal nor a summary could hold it."""
    for argument in args:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"the argument {printable(argument)} is not {_encoding_asked(argument)}"
            ) from None


def _check_folder() -> None:
    """EdgezoError where the current directory was removed: PyTorch would end the process without a word."""
    try:
        os.getcwd()
    except OSError as problem:
        raise EdgezoError(
            f"The current directory cannot be used ({problem.strerror}). Change to another one (cd), and give the "
            "command again."
        ) from problem


def _encoding_asked(argument: str) -> str:
    """The encoding in which an argument that could not be read has to be, and what to do."""
    try:
        os.fsencode(argument).decode()
    except UnicodeError:
        return "UTF-8 text. Rename the file, or give the text as UTF-8."
    return f"in this locale's encoding, {sys.getfilesystemencoding()}. Set LC_ALL to a UTF-8 locale, or PYTHONUTF8=1."


def main() -> NoReturn:
    """Run the command line in a process of its own, which ends with its exit code."""
    interrupts.listen()
    allocator_policy()  # before anything imports torch
    code = run(sys.argv[1:])
    if (refusal := streams.refusal()) is not None:
        if not isinstance(refusal, BrokenPipeError):  # a reader that has seen enough needs no word
            click.echo(f"edgezo: {_not_printed(refusal)}", err=True)
        code = code or 1
    interrupts.finish()
    if interrupts.asked():
        # Python would end with the signal, where it has passed through code that was made of text (a dataclass).
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    sys.exit(code)
