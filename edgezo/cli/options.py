"""Options that several commands share: one for each setting of a run, and how a result is given out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from edgezo.plan.field import Field
from edgezo.plan.fields import FIELDS, GROUPS, flag

# Settings by the group that they are shown in.
DATA, PREDICTION, MEMORY, METHOD, RUN = (
    tuple(field.name for field in GROUPS[group].fields)
    for group in ("data", "prediction", "memory", "method", "run")
)
# Settings that a meta-training has as well; it takes its tasks by options of its own.
OF_META = (
    *("model", "data_root", "template", "labels", "label_field", "max_length", "seed"),
    *("max_mem_bytes", "batch_size", "micro_batch", "train", "rank", "step", "sigma", "threads"),
)

# Settings of an evaluation beside those of the data.
OF_EVALUATION = ("max_mem_bytes", "device", "engine", "provider", "precision", "threads")

NAMES_OF_PLACES = (
    "MODEL",
    "PATH",
    "FILE",
    "DIR",
    "RUN",
)  # what stands for a file or a folder in an option

Command = Callable[..., Any]


def options(*names: str) -> Callable[[Command], Command]:
    """click options for these settings, in the order given.

    Every value stays text here: plan/request.py reads it, and reports all problems of a command together.
    """

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = _option(FIELDS[name])(command)
        return command

    return decorate


def _option(field: Field) -> Callable[[Command], Command]:
    if field.kind == "bool":
        no = "--no-" + flag(field.name)[2:]
        return click.option(
            f"{flag(field.name)}/{no}", field.name, default=None, help=help_text(field)
        )
    return click.option(
        flag(field.name),
        field.name,
        type=click.Path()
        if field.metavar in NAMES_OF_PLACES
        else None,  # a shell completes files there
        metavar=metavar(field),
        help=help_text(field),
        shell_complete=_complete(field) if field.choices or field.name == "model" else None,
    )


def help_text(field: Field) -> str:
    """What ``--help`` says of a setting."""
    default = field.default_words
    return f"{field.help}  [default: {default}]" if default else field.help


def metavar(field: Field) -> str:
    """What stands for the value of an option."""
    return field.metavar or "[" + "|".join(field.choices) + "]"


def _complete(field: Field) -> Callable[..., list[CompletionItem]]:
    """What a shell offers for a value: the choices; of a model, the cards and files."""

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
        words, files = field.choices, []
        if field.name == "model":
            from edgezo.network.cards import cards

            words, files = tuple(cards()), [CompletionItem(begun, type="file")]
        return [*(CompletionItem(word) for word in words if word.startswith(begun)), *files]

    return complete


config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(),
    metavar="FILE",
    help="Settings in TOML, or in YAML (.yaml).",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on standard output."
)


base_option = click.option(
    "--base", metavar="MODEL", help="Where the base of a run is now, if it has moved."
)
more_steps_option = click.option(
    "--more-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train the finished run of --model longer.",
)


def use_threads(threads: int | None) -> None:
    """Let PyTorch take so many threads. Call it before torch is imported, which sizes its thread pools once."""
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(threads)


def emit(as_json: bool, payload: Mapping[str, Any], shown: Any) -> None:
    """Print a result: ``payload`` as JSON, or ``shown`` for a person."""
    if as_json:
        echo_json(payload)
    else:
        from edgezo.cli.terminal import stdout

        stdout().print(shown, markup=False)


def echo_json(payload: Mapping[str, Any]) -> None:
    """Print one line of JSON, with JSON's escapes for characters that standard output cannot encode."""
    from edgezo.machine.files import to_json

    line = encodable(to_json(payload))
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(json.loads(line))
    click.echo(line)


def encodable(text: str) -> str:
    """``text`` with each half of a surrogate pair, which is no character, as the escape that JSON has for it."""
    return text.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    """``text`` for a terminal: without control characters, which could be commands to it."""
    shown = (
        c if (c >= " " and not "\x7f" <= c <= "\x9f") or c in "\n\t" else repr(c)[1:-1]
        for c in text
    )
    return encodable("".join(shown))
