"""``edgezo data``: what is understood of a file or folder of rows, before a model is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from edgezo.cli.options import config_option, emit, json_option, options, printable
from edgezo.cli.short_help import ShortHelp
from edgezo.errors import UsageError
from edgezo.plan.fields import FIELDS
from edgezo.plan.request import read_layer, read_settings

_OF_ROWS = (
    *("model", "task", "data_root", "template", "labels", "label_field", "text_end"),
    *("max_length", "held_out", "speaker", "skip_bad_rows", "max_mem_bytes"),
)


@click.command(
    "data", cls=ShortHelp, short_help="Show what is understood of rows, and what is odd."
)
@click.argument("data", metavar="FILE|FOLDER", required=False)
@options(*_OF_ROWS)
@click.option("--out", metavar="FILE", help="A new file for the rows that cannot be used (JSONL).")
@config_option
@json_option
def look_at_data(
    data: str | None, out: str | None, config_file: str | None, as_json: bool, **given: Any
) -> None:
    """Show what is understood of rows: kind, counts, lengths, labels, examples, and what is odd.

    No model is loaded. With --model its tokenizer counts tokens, and its chat template writes conversations.
    """
    from edgezo.data.overview import overview
    from edgezo.data.sources import DataRequest
    from edgezo.machine.files import atomic_path
    from edgezo.machine.hardware import machine
    from edgezo.machine.ownership import check_new_file
    from edgezo.machine.process_memory import ReadingGuard
    from edgezo.plan.budget import default_budget

    problems = list[str]()
    layers = ({} if config_file is None else read_settings(config_file), {**given, "data": data})
    values: dict[str, Any] = {}
    for layer in layers:
        values |= read_layer(layer, problems)
    if values.get("data") and values.get("task"):
        problems.append("FILE and --task exclude each other; give one of them")
    if problems:
        raise UsageError(problems)
    if out is not None:
        check_new_file(Path(out))
    guard = ReadingGuard(values.get("max_mem_bytes") or default_budget(machine())[0])
    tokenizer, masked = (None, False) if "model" not in values else _tokenizer(values["model"])
    known = {f.name for f in fields(DataRequest)} & FIELDS.keys()
    request = DataRequest(**{name: values.get(name, FIELDS[name].default) for name in known})
    result, skipped = overview(request, tokenizer, masked, guard)
    result["notes"] += skipped.notes()
    if skipped.count and not request.skip_bad_rows:
        result["notes"].append("finetune refuses such rows, unless --skip-bad-rows is given")
    if out is not None:
        with atomic_path(Path(out), lock=True) as temporary, temporary.open("xb") as file:
            file.writelines(skipped.lines())
        result["out"] = out
    emit(as_json, result, printable(_page(result)))


def _tokenizer(model: str) -> tuple[Any, bool]:
    """The tokenizer of a model, and whether the model is a masked one. No weight is read."""
    from edgezo.network import cards, loader

    files = loader.open_model(cards.resolve(model))
    return loader.load_tokenizer(files.path), files.kind == "masked"


# ---------------------------------------------------------------------------------------------
# Showing


def _page(result: Mapping[str, Any]) -> str:
    """The result for a person."""
    lines = [
        f"{result['data']}: {result['means']}",
        f"rows: {result['train']:,} to train on, {result['validation']:,} to evaluate on",
        "",
        f"{'lengths':<12}" + "".join(f"{name:>10}" for name in ("min", "median", "95 %", "max")),
    ]
    for unit, summary in result["lengths"].items():
        lines.append(f"{unit:<12}" + "".join(f"{number:>10,}" for number in summary.values()))
    if labels := result["labels"]:
        total = sum(labels.values())
        lines += ["", "labels"]
        lines += [f"{n:>10,} {100 * n / total:5.1f} %  {name}" for name, n in labels.items()]
    for number, example in enumerate(result["examples"], 1):
        lines += ["", f"example {number}, {example['where']} (what is learned stands in ⟦ ⟧)"]
        for place, piece in enumerate(example["pieces"]):
            sign = "* " if place == example["right"] else "  "
            text = "".join(f"⟦{s['text']}⟧" if s["learned"] else s["text"] for s in piece)
            lines += [f"{sign}{line}" for line in text.split("\n")]
    return "\n".join([*lines, "", *(f"note: {note}" for note in result["notes"])]).rstrip()
