"""predictions.json: what a run answered to its validation rows before and after training, as a report needs it.

    run       the identity of the run (directory.run_id)
    kind      of the rows; ``names``: their classes, where these are the same in every row
    labels    the right class of each row, where there are classes
    shown     some rows as text: ``row`` (its number, from 0), ``text``, ``right``
    before    ``chosen``: the predicted class of each row; ``answers`` and ``losses`` of the rows that are shown
    after     as ``before``

Each evaluation replaces the file as a whole, before its line goes to metrics.jsonl: an evaluation that is in the log is
here too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from edgezo.data.batches import Example
from edgezo.data.dataset import Dataset
from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.foreign import read_json
from edgezo.run.directory import RunFiles, run_id
from edgezo.run.journal import Journal
from edgezo.run.row_figures import EvaluatedRows

WHEN = ("before", "after")  # evaluations whose answers are kept
SHOWN_ROWS = 10
MOST_PREDICTIONS_BYTES = 64 << 20
_HEAD_CHARS, _TAIL_CHARS = 360, 200  # of a long text; its end is what the model answers


class HasTokenizer(Protocol):
    """An opened request."""

    @property
    def tokenizer(self) -> Any: ...


class AnswersOf(Protocol):
    """A run that is evaluated, on whatever engine."""

    @property
    def files(self) -> RunFiles: ...

    @property
    def journal(self) -> Journal: ...

    @property
    def dataset(self) -> Dataset: ...

    @property
    def opened(self) -> HasTokenizer: ...


def keep_answers(state: AnswersOf, when: str, evaluated: EvaluatedRows) -> None:
    """Write what an evaluation answered, beside what the file has of the run's other one.

    Raises EdgezoError where the disk refuses it.
    """
    of_run = run_id(state.journal.header)
    kept = kept_answers(state.files, of_run)
    if not kept:
        kept = {"run": of_run, **_facts(state, evaluated)}
    numbers = [shown["row"] for shown in kept["shown"]]
    given: dict[str, Any] = {"answers": _answers(state, evaluated, numbers)}
    given["losses"] = [round(evaluated.losses[n], 4) for n in numbers]
    if kept["names"]:
        given["chosen"] = evaluated.chosen
    atomic_write(state.files.predictions, (to_json({**kept, when: given}) + "\n").encode())


def kept_answers(files: RunFiles, of_run: str) -> dict[str, Any]:
    """What predictions.json holds of this run; {} where there is none, or that of another run."""
    if not os.path.lexists(files.predictions):
        return {}
    try:
        kept = read_json(files.predictions, MOST_PREDICTIONS_BYTES)
    except EdgezoError:
        return {}
    return kept if isinstance(kept, dict) and kept.get("run") == of_run else {}


def _facts(state: AnswersOf, evaluated: EvaluatedRows) -> dict[str, Any]:
    """What is the same in every evaluation of the rows. Those that are shown lie evenly among them."""
    dataset, tokenizer = state.dataset, state.opened.tokenizer
    n = len(dataset.validation)
    numbers = [i * n // min(n, SHOWN_ROWS) for i in range(min(n, SHOWN_ROWS))]
    shown = [
        {"row": number, **as_text(dataset.validation[number], dataset, tokenizer)}
        for number in numbers
    ]
    names = list(dataset.label_names) if dataset.classes else []
    return {
        "kind": dataset.kind,
        "names": names,
        **({"labels": evaluated.labels} if names else {}),
        "shown": shown,
    }


def as_text(example: Example, dataset: Dataset, tokenizer: Any) -> dict[str, str]:
    """A row as the model reads it, and its right answer; "" where nothing is predicted but the text."""
    row = example.rows[0]
    if dataset.kind in ("label", "text"):
        text = _decoded(tokenizer, row.ids)
    else:
        text = _decoded(tokenizer, example.prompt)
    right = ""
    if dataset.classes and example.label >= 0:
        right = dataset.label_names[example.label]
    elif dataset.kind == "choice":
        right = _option(example, example.label, tokenizer)
    elif dataset.kind == "completion":
        expected = (example.fields or {}).get("answers") or [_option(example, 0, tokenizer)]
        right = " / ".join(map(str, expected))
    return {"text": shortened(text), "right": shortened(right)}


def _answers(state: AnswersOf, evaluated: EvaluatedRows, numbers: Sequence[int]) -> list[str]:
    """The answers to the rows that are shown; [] where the model is only asked how likely a text is."""
    dataset, rows = state.dataset, state.dataset.validation
    if evaluated.texts:
        return [shortened(evaluated.texts[n]) for n in numbers]
    if dataset.classes:
        return [dataset.label_names[evaluated.chosen[n]] for n in numbers]
    if dataset.kind == "choice":
        tokenizer = state.opened.tokenizer
        return [shortened(_option(rows[n], evaluated.chosen[n], tokenizer)) for n in numbers]
    return []


def _option(example: Example, number: int, tokenizer: Any) -> str:
    """An option, or what a row is trained to write, as text: the tokens behind the prompt."""
    if example.options:
        return example.options[number]
    row, begin = example.whole_rows[number], len(example.prompt) - 1
    pairs = zip(row.score_at, row.score_ids, strict=True)
    return _decoded(tokenizer, [token for at, token in pairs if at >= begin])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def shortened(text: str) -> str:
    """A text without the middle part of a long one."""
    if len(text) <= _HEAD_CHARS + _TAIL_CHARS:
        return text
    return f"{text[:_HEAD_CHARS]} ... {text[-_TAIL_CHARS:]}"
