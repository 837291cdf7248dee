"""Commands that use a result: predict answers rows, apply, replay and export make files of it."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from edgezo.cli.options import (
    base_option,
    echo_json,
    emit,
    encodable,
    json_option,
    options,
    printable,
    use_threads,
)
from edgezo.errors import UsageError

if TYPE_CHECKING:
    from edgezo.run.predictor import Predictor

# Settings of a use: how a plain model is asked, and what it takes.
ASKING = ("task", "template", "labels", "label_field", "max_length", "max_new_tokens")
SHORTER = (512, 256, 128, 64)  # tokens of a row, in turns, where the cap has no room for the run's
LONGEST_NAME = 1024  # characters of a path; a longer text is none
TAKES = ("max_mem_bytes", "device", "precision", "threads")


def note(text: str) -> None:
    click.echo(printable(text), err=True)


def threads_of(given: Mapping[str, str | None]) -> int | None:
    """The threads that are asked for. It comes before torch is imported, so a run's own setting is not looked up."""
    threads = given["threads"]
    return int(threads) if threads is not None and threads.isdecimal() else None


# ---------------------------------------------------------------------------------------------
# predict


@click.command(short_help="Predict rows: labels, completions, answers, or scores.")
@click.argument("target", type=click.Path(), metavar="RUN|MODEL")
@click.argument("texts", nargs=-1, metavar="[TEXT ...]")
@click.option(
    "--data",
    type=click.Path(allow_dash=True),
    metavar="FILE|-",
    help="Rows to predict; -: lines on standard input, JSON objects or texts.",
)
@click.option(
    "--to",
    "form",
    type=click.Choice(["jsonl", "csv"]),
    default="jsonl",
    show_default=True,
    help="Form of the predictions.",
)
@click.option(
    "--out",
    type=click.Path(),
    metavar="FILE",
    help="A new file for the predictions.  [default: standard output]",
)
@options(*ASKING, *TAKES)
@base_option
@json_option
def predict(
    target: str,
    texts: tuple[str, ...],
    data: str | None,
    form: str,
    out: str | None,
    as_json: bool,
    **given: str | None,
) -> None:
    """Predict rows: a label with its probabilities, a completion, an answer, or a score, line by line.

    Give texts ("wake me at six"), or a file of rows by --data.
    """
    _check_rows(target, texts, data)
    use_threads(threads_of(given))
    from edgezo.data import asked_rows
    from edgezo.data.row_files import Problems
    from edgezo.machine.files import atomic_path, user_path
    from edgezo.machine.ownership import check_new_file
    from edgezo.machine.process_memory import Meter
    from edgezo.run.predict import predictor_with_room, use_request

    cfg = use_request(target, given)
    if out is not None:
        check_new_file(Path(out))
    meter, kept = Meter(), list[dict[str, Any]]()
    with ExitStack() as at_end:
        lengths = (cfg.max_length,) if given["max_length"] else _lengths(cfg.max_length)
        used = at_end.enter_context(predictor_with_room(target, cfg, lengths, note, "a row"))
        used.asker.whole_rows = used.shorter
        problems = Problems()
        if data is None:
            groups = asked_rows.of_texts(texts, problems)
        elif data == "-":
            groups = asked_rows.of_lines(sys.stdin.buffer, problems, used.guard)
        else:
            groups = asked_rows.of_file(user_path(data), problems, used.guard)
        predictions = used.stream(groups, problems)
        if as_json and out is None:
            kept += predictions
        elif out is None:
            _write(predictions, form, sys.stdout)
        else:
            temporary = at_end.enter_context(atomic_path(Path(out), lock=True))
            with temporary.open("x", encoding="utf-8", newline="") as file:
                _write(predictions, form, file)
    if used.cut:
        length = used.asker.encoder.max_length
        note(f"{used.cut} of {used.rows} rows cut to {length} tokens (--max-length)")
    result = {**_figures(used), **meter.summary(), **used.model.figures()}
    if as_json:
        echo_json({**result, **({"out": out} if out else {"predictions": kept})})
    else:
        note(_summary_line(result))


def _check_rows(target: str, texts: tuple[str, ...], data: str | None) -> None:
    """Raise UsageError unless there are texts or a file to predict, and only one of the two."""
    if data is not None and texts:
        raise UsageError(f"--data {data} and texts stand beside each other: give one of them")
    if data is None and not texts:
        raise UsageError(
            f'what is to be predicted? Give --data FILE, or texts: edgezo predict {target} "a text"'
        )
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UsageError(f"text {number} of {len(texts)} is empty: leave it out")
        if len(text) < LONGEST_NAME and os.path.isfile(text):
            raise UsageError(f"{text} is a file, and would be predicted as a text: --data {text}")


def _lengths(most: int) -> list[int]:
    """Tokens that a row may have where none are asked for: as many as a run's rows, or fewer under a tight cap."""
    return [most, *(length for length in SHORTER if length < most)]


def _figures(used: Predictor) -> dict[str, Any]:
    """How many rows there were, and where rows had labels, how many were right."""
    accuracy = {"known": used.known, "accuracy": used.right / used.known} if used.known else {}
    standing: dict[str, Any] = {"unfinished": used.unfinished} if used.unfinished else {}
    standing |= {"cut": used.cut} if used.cut else {}
    return {"model": used.target, "steps": used.steps, **standing, "rows": used.rows, **accuracy}


def _summary_line(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    line = f"{rows} {'row' if rows == 1 else 'rows'} predicted"
    if "accuracy" in result:
        line += f", accuracy {result['accuracy']:.4f} on {result['known']} that have a label"
    return line


def _write(predictions: Iterator[dict[str, Any]], form: str, file: TextIO) -> None:
    """Write predictions as they come. Columns of CSV are those of the first one."""
    columns: list[str] | None = None
    for prediction in predictions:
        if form == "jsonl":
            text = json.dumps(prediction, ensure_ascii=False) + "\n"
        else:
            flat = _flat(prediction)
            head = columns is None
            columns = columns or list(flat)
            text = _csv_lines(flat, columns, head)
        file.write(fitting(text, file))
        file.flush()


def fitting(text: str, file: TextIO) -> str:
    """``text`` with escapes for what the file's encoding has no bytes for."""
    return (
        encodable(text)
        .encode(file.encoding or "utf-8", errors="backslashreplace")
        .decode(file.encoding or "utf-8")
    )


def _csv_lines(flat: Mapping[str, Any], columns: list[str], head: bool) -> str:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\n")
    if head:
        writer.writeheader()
    writer.writerow(flat)
    return lines.getvalue()


def _flat(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction as cells: one for each probability of a class, and all of a row's own options in one."""
    flat = dict(prediction)
    shares = flat.pop("probabilities", None)
    if isinstance(shares, dict):
        flat |= {f"p({name})": share for name, share in shares.items()}
    elif shares is not None:
        flat["probabilities"] = " ".join(map(str, shares))
    return flat


# ---------------------------------------------------------------------------------------------
# apply


@click.command(short_help="Make a fine-tuned model of its base and a journal file.")
@click.argument("shipped", type=click.Path(), metavar="FILE")
@click.option("--base", metavar="MODEL", required=True, help="The model that it was trained over.")
@click.option(
    "--out", type=click.Path(), metavar="DIR", required=True, help="Directory for the rebuilt run."
)
@json_option
def apply(shipped: str, base: str, out: str, as_json: bool) -> None:
    """Make a fine-tuned model of its base and the file that export --format journal wrote."""
    from edgezo.run.shipped import apply as apply_shipped

    result = apply_shipped(Path(shipped), base, Path(out))
    emit(as_json, result, f"applied {result['steps']} steps of {shipped} to {base}, in {out}")


# ---------------------------------------------------------------------------------------------
# replay, export


@click.command(short_help="Rebuild a fine-tuned model from its base and its journal.")
@click.argument("run", type=click.Path(), metavar="RUN")
@click.option(
    "--out", type=click.Path(), metavar="DIR", required=True, help="Directory for the rebuilt run."
)
@base_option
@json_option
def replay(run: str, out: str, base: str | None, as_json: bool) -> None:
    """Rebuild a fine-tuned model from its base and its journal, without data or forward passes."""
    from edgezo.run.places import uses_graphs

    if uses_graphs(Path(run), base):
        from edgezo.run.onnx_use import replay_on_onnx

        result = replay_on_onnx(Path(run), Path(out), base)
    else:
        from edgezo.run.evaluate import replay as run_replay

        result = run_replay(Path(run), Path(out), base=base)
    standing = f" (unfinished: {result['unfinished']})" if "unfinished" in result else ""
    emit(
        as_json, result, f"replayed {result.get('steps', '?')} steps of {run} into {out}{standing}"
    )


@click.command(short_help="Write the result of a run: a model, an adapter, steps.")
@click.argument("run", type=click.Path(), metavar="RUN", required=False)
@click.option(
    "--model",
    type=click.Path(),
    metavar="MODEL",
    help="With --trainable: the model to write, in place of RUN.",
)
@click.option(
    "--trainable",
    is_flag=True,
    help="With --format onnx: write a model as graphs that finetune --engine onnx trains.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "peft", "gguf", "gguf-adapter", "onnx", "hf-classifier", "journal"]),
    default="hf",
    show_default=True,
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16", "q8_0", "int8", "int8-blocks", "int4"]),
    help="Type of the weights.  [default: of hf fp32 if adapters were trained, else the run's; "
    "of gguf the base file's, else fp16; of onnx fp32, with --trainable int8]  int8-blocks and int4 need "
    "onnxruntime's own operators.",
)
@click.option(
    "--out",
    type=click.Path(),
    metavar="DIR",
    required=True,
    help="A new directory; a new file for the form journal.",
)
@base_option
@json_option
def export(
    run: str | None,
    model: str | None,
    trainable: bool,
    form: str,
    dtype: str | None,
    out: str,
    base: str | None,
    as_json: bool,
) -> None:
    """Write the result of a run: a model, a classifier, an adapter (peft, gguf-adapter), or its steps (journal).

    With --trainable: write a model as graphs for finetune --engine onnx.
    """
    from edgezo.plan.budget import mb

    source = run or model
    if source is None or (run is not None and model is not None):
        raise UsageError("name what to export, once: a RUN, or with --trainable a model (--model)")
    if trainable:
        if form != "onnx" or base is not None:
            raise UsageError("--trainable writes a model with --format onnx, and takes no --base")
        from edgezo.run.export_trainable import export_trainable

        result = export_trainable(source, Path(out), dtype)
    elif model is not None:
        raise UsageError(
            "--model is for --trainable; of a run, name its directory: edgezo export RUN"
        )
    else:
        from edgezo.run.export import export as run_export

        result = run_export(Path(source), form, Path(out), dtype=dtype, base=base)
    text = f"{result.get('steps')} steps, {result.get('size_bytes')} bytes, in {out}"
    if "tensors" in result:
        text = f"{result['tensors']} tensors, {mb(result['weight_bytes'])}, in {out}"
    emit(as_json, result, "\n".join([text, *(f"note: {line}" for line in result["notes"])]))
