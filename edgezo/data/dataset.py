"""Rows on disk become token sequences.

row_files.py: file -> Record     row_kinds.py: Record -> Draft     encoder.py: Draft -> Example     batches.py: -> Batch

recognition.py chooses which form of row_kinds.py reads the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.data.batches import Example, Row, permutation
from edgezo.data.encoder import Encoder
from edgezo.data.metrics import Report
from edgezo.data.preferences import paired
from edgezo.data.recognition import Labelling, recognise
from edgezo.data.row_files import (
    CHECK_ROWS,
    LARGE_CHARS,
    SUFFIXES,
    Problems,
    Record,
    find_splits,
    read_records,
)
from edgezo.data.row_kinds import Draft, Form, MessagesForm
from edgezo.data.tasks import TASKS, Generation, Task, task_folder
from edgezo.data.token_stats import KEPT_LENGTHS, TokenStats
from edgezo.errors import SourceError, UsageError
from edgezo.machine.downloads import DATA_ID, dataset
from edgezo.machine.process_memory import Guard

VALIDATION_SHARE = 0.1  # of the rows, which is held out where there is no validation file
DRAFT_TIMES, CHAT_TIMES = 4, 5  # copies of a row's texts while it becomes a draft, and of a chat's
MOST_WRITTEN = 32  # tokens of an answer, where neither task nor user sets a number

# Streams of the Philox generator beside the epochs 0, 1, 2, ... Their seed is always 0: every run is measured on the
# same rows, and `edgezo eval` evaluates on those that training held out.
_HOLD_OUT, _EVAL_SAMPLE = 2**63, 2**63 + 1


@dataclass(frozen=True)
class Dataset:
    """Examples to train and to evaluate on."""

    kind: str  # "label", "choice", "completion" or "text"
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    label_ids: tuple[int, ...]  # kind "label": the label words' token ids in label order; else ()
    label_names: tuple[str, ...]  # the candidates' names, where they are the same in every row
    notes: tuple[str, ...]  # what the user should know: "12 of 4000 rows cut to 512 tokens"
    generation: Generation | None = None  # how answers are written, if they are
    report: Report | None = None  # figures of an evaluation, beside or in place of accuracy

    def token_stats(self) -> TokenStats:
        """Token counts of the examples, which the planner needs."""
        examples = [*self.train, *self.validation]
        scored = max((sum(len(row.score_at) for row in e.rows) for e in examples), default=1)
        writes = self.generation
        tokens = sorted((sum(len(row.ids) for row in e.rows) for e in self.train), reverse=True)
        return TokenStats(
            kind=self.kind,
            tokens=tuple(tokens[:KEPT_LENGTHS]) or (1,),
            scored=scored,
            label_words=len(self.label_ids),
            mean=sum(tokens) / max(1, len(tokens)),
            evaluated=max((sum(len(r.ids) for r in e.rows) for e in self.validation), default=0),
            written=writes.most if writes else 0,
            prompt=max((len(e.prompt) for e in self.train), default=0) if writes else 0,
            evaluated_prompt=max((len(e.prompt) for e in self.validation), default=0)
            if writes
            else 0,
            examples=len(self.train),
            evaluations=len(self.validation),
        )


@dataclass(frozen=True)
class DataRequest:
    """The settings of a run that decide its data, named as on the command line."""

    data: str | None = None
    task: str | None = None
    data_root: str | None = None
    template: str | None = None
    labels: str | None = None
    label_field: str = "label"
    max_length: int = 512  # tokens that go through the model in one row
    eval_limit: int | None = None
    held_out: float | None = None  # share of the training rows to evaluate on instead
    judged: bool = False  # an objective scores predictions, in training too
    max_new_tokens: int | None = None  # of a written answer


# --------------------------------------------------------------------------------------- loading


def load_dataset(
    request: DataRequest, tokenizer: Any, *, masked: bool = False, guard: Guard | None = None
) -> Dataset:
    """Read, recognise and tokenise the data that a request names.

    ``tokenizer`` is a transformers tokenizer with character offsets (a "fast" one); ``masked``: for a masked language
    model. ``guard`` is asked for memory all the while. Raises UsageError with every problem of the request and its
    rows, and DoesNotFit, with the row, where they take more than the cap.
    """
    problems, notes = Problems(), list[str]()
    encoder = Encoder(tokenizer, request.max_length, masked, guard)
    _check_numbers(request, encoder, problems)
    task = _find_task(request, problems)
    path = _find_path(request, task, problems, notes)
    labelling = Labelling.of(task, request.template, request.labels, request.label_field, problems)
    rows = _Rows([], [], True)
    if path:
        rows = _read(path, task, labelling, request.held_out, problems, notes, encoder.guard)
    problems.raise_any()

    known = rows.train if rows.apart else rows.train + rows.validation
    form, label_ids, label_names = recognise(
        task, labelling, rows.train, known, tokenizer, masked, problems, notes
    )
    validation = _eval_sample(rows.validation, request.eval_limit, notes)
    # A report knows the task's label words, not the user's.
    report = task.report if task and not request.labels else None
    generation = _generation(request, task, form.kind, rows.train, notes)
    judged = request.judged or report is not None or generation is not None
    with form if isinstance(form, MessagesForm) else nullcontext():
        drafts = {
            name: list(_drafts(records, form, label_names, judges, encoder, problems))
            for name, records, judges in (
                ("training", rows.train, request.judged),
                ("validation", validation, judged),
            )
        }
    problems.raise_any()
    train, evaluated = (encoder.examples(drafts[name], name, notes) for name in drafts)
    for name, examples in (("training", train), ("validation", evaluated)):
        if not examples:
            raise UsageError(f"no {name} row has a token to predict: every text is one token long")
    return Dataset(
        *(form.kind, train, evaluated, label_ids, label_names, tuple(notes)), generation, report
    )


def _drafts(
    records: Iterable[Record],
    form: Form,
    names: Sequence[str],
    judged: bool,
    encoder: Encoder,
    problems: Problems,
) -> Iterator[Draft]:
    """The drafts of rows, very long texts clipped; with what a prediction is judged by, if they are ``judged``."""
    copies = CHAT_TIMES if isinstance(form, MessagesForm) else DRAFT_TIMES
    for number, record in enumerate(records):
        if (size_bytes := _text_bytes(record.fields)) > LARGE_CHARS or number % CHECK_ROWS == 0:
            encoder.guard.check(copies * size_bytes, record.where)
        draft = form.draft(record, problems)
        if draft is None:
            continue
        if judged:
            draft = _with_fields(draft, record, names)
        pieces = tuple(encoder.clipped(piece, record.where) for piece in draft.pieces)
        yield replace(draft, pieces=pieces, answers=(), where=record.where)


def _text_bytes(value: Any) -> int:
    """Memory of the texts in a row's fields."""
    if isinstance(value, str):
        return sys.getsizeof(value)
    if isinstance(value, Mapping):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0


def _with_fields(draft: Draft, record: Record, names: Sequence[str]) -> Draft:
    """The draft with what a prediction is judged by: the row's fields and its right answers."""
    answers = draft.answers
    if not answers and draft.label >= 0:
        answers = ((draft.options or names)[draft.label],)
    return replace(draft, fields={**record.fields, "answers": list(answers)})


def _generation(
    request: DataRequest,
    task: Task | None,
    kind: str,
    train: Sequence[Record],
    notes: list[str],
) -> Generation | None:
    """How answers are written, if they are. Without a task they are written only where predictions are asked for.

    Such answers end with their line if no completion has more than one.
    """
    most = request.max_new_tokens
    if task is not None and task.generation is not None:
        generation = task.generation._replace(most=most) if most else task.generation
    elif kind != "completion" or not (request.judged or most):
        return None
    else:
        texts = [str(record.fields.get("completion", "\n")).strip() for record in train]
        stop = () if any("\n" in text for text in texts) else ("\n",)
        generation = Generation(most or MOST_WRITTEN, stop)
    end = "a new line or the end token" if "\n" in generation.stop else "the end token"
    notes.append(f"answers are written, up to {generation.most} tokens or {end}")
    return generation


def _check_numbers(request: DataRequest, encoder: Encoder, problems: Problems) -> None:
    least = len(encoder.prefix) + len(encoder.suffix) + 2
    if request.max_length < least:
        problems.add(
            f"--max-length {request.max_length} leaves no room for text: give {least} or more"
        )
    if request.eval_limit is not None and request.eval_limit < 1:
        problems.add(
            f"--eval-limit {request.eval_limit} leaves no row to evaluate on: give 1 or more"
        )


def _find_task(request: DataRequest, problems: Problems) -> Task | None:
    if request.task is None:
        return None
    if request.task not in TASKS:
        problems.add(f"there is no task {request.task!r}: --task takes one of {', '.join(TASKS)}")
    return TASKS.get(request.task)


def _given_path(data: str, problems: Problems, notes: list[str]) -> Path | None:
    """The path of --data, or the folder of a dataset of the hub. What looks like a local path is never looked up there.

    None after noting that there is neither.
    """
    path = Path(data).expanduser()
    local = path.exists() or Path(data.partition("/")[0]).exists()
    if local or path.suffix in SUFFIXES or not DATA_ID.fullmatch(data):
        return path
    try:
        return dataset(data, SUFFIXES, notes.append)
    except SourceError as problem:
        problems.add(f"no such file or directory: {path}; and as a data set of the hub: {problem}")
        return None


def _find_path(
    request: DataRequest, task: Task | None, problems: Problems, notes: list[str]
) -> Path | None:
    if request.data is not None:
        return _given_path(request.data, problems, notes)
    if request.task is None:
        problems.add(
            "nothing to train on: give --data PATH, or --task NAME (--task example needs no files)"
        )
    if task is None:
        return None
    folder = task_folder(task, request.data_root)
    if folder is None:
        problems.add(
            f"--task {task.name} reads {task.name}/train.jsonl in a folder of data sets: give that "
            "folder with --data-root"
        )
    return folder


class _Rows(NamedTuple):
    """Training and validation rows."""

    train: list[Record]
    validation: list[Record]
    apart: bool  # they are of different files; else the validation rows are held out


def _read(
    path: Path,
    task: Task | None,
    labelling: Labelling,
    held_out: float | None,
    problems: Problems,
    notes: list[str],
    guard: Guard,
) -> _Rows:
    """The rows of a file or folder, prepared as the task needs them."""
    train_files, validation_files = find_splits(path, problems)
    if held_out is not None:
        validation_files = []
    train, validation = (
        [record for file in files for record in read_records(file, problems, guard)]
        for files in (train_files, validation_files)
    )
    if validation_files and validation_files[0].name.startswith("test"):
        notes.append(f"no validation file: {validation_files[0].name} is used to evaluate")
    if task and task.prepare:
        prepare = task.prepare
        train, validation = (
            [replace(r, fields=prepare(r.fields)) for r in records]
            for records in (train, validation)
        )
    if not labelling.labelled:
        train, validation = paired((train, validation), problems, notes)
    if train and not validation_files:
        if len(train) < 2:
            problems.add(
                f"{train_files[0]} has one row: two are needed, one of them to evaluate on"
            )
        train, validation = _held_out(train, held_out or VALIDATION_SHARE)
        why = "no validation file" if held_out is None else "--held-out"
        n = len(validation)
        notes.append(f"{why}: {n} of {n + len(train)} rows are held out to evaluate on")
    return _Rows(train, validation, bool(validation_files))


def _held_out(records: list[Record], share: float) -> tuple[list[Record], list[Record]]:
    """The rows to train on, and a random ``share`` of them (one at least) to evaluate on."""
    n = max(1, int(len(records) * share))
    chosen = set(permutation(len(records), 0, _HOLD_OUT)[:n].tolist())
    train = [r for i, r in enumerate(records) if i not in chosen]
    return train, [r for i, r in enumerate(records) if i in chosen]


def _eval_sample(records: list[Record], limit: int | None, notes: list[str]) -> list[Record]:
    """At most ``limit`` rows to evaluate on."""
    if limit is None or len(records) <= limit:
        return records
    chosen = sorted(permutation(len(records), 0, _EVAL_SAMPLE)[:limit].tolist())
    notes.append(f"evaluated on {limit} of {len(records)} validation rows, the same in every run")
    return [records[i] for i in chosen]


# --------------------------------------------------------------------------------------- showing


def show_batch(examples: Sequence[Example], dataset: Dataset, tokenizer: Any) -> str:
    """A text with the tokens of each row; predicted tokens stand in ⟦ ⟧ and are marked ^ on the line below."""
    lines = [f"{dataset.kind}: {len(examples)} examples, ⟦ ⟧ marks the tokens that are predicted"]
    if dataset.label_names:
        lines.append(f"candidates: {', '.join(dataset.label_names)}")
    for slot, example in enumerate(examples):
        right = None
        if example.label >= 0 and dataset.label_names:
            right = dataset.label_names[example.label]
        lines.append(f"\nexample {slot}" + (f", right answer: {right}" if right else ""))
        for number, row in enumerate(example.rows):
            texts, marks = _marked(row, example.label, dataset, tokenizer)
            head = f"option {number}" if dataset.kind == "choice" else "row"
            sign = " (right)" if dataset.kind == "choice" and number == example.label else ""
            lines += [f"  {head}, {len(row.ids)} tokens{sign}", "  " + texts, "  " + marks]
    return "\n".join(lines)


def _marked(row: Row, label: int, dataset: Dataset, tokenizer: Any) -> tuple[str, str]:
    """A line of tokens and a line of marks, equally long."""
    tokens = [(_token_text(tokenizer, token), False) for token in row.ids]
    if dataset.kind == "label":
        at, mask_id = row.score_at[0], tokenizer.mask_token_id
        answer = (_token_text(tokenizer, dataset.label_ids[label]), True)
        is_mask = mask_id is not None and row.ids[at] == mask_id
        tokens[at + (not is_mask) : at + 1] = [answer]
    for at, token in zip(row.score_at, row.score_ids, strict=False):
        tokens[at + 1 : at + 2] = [(_token_text(tokenizer, token), True)]
    shown = [(f"⟦{text}⟧", "^") if scored else (text, "-") for text, scored in tokens]
    return "|".join(t for t, _ in shown), " ".join(mark * len(t) for t, mark in shown)


def _token_text(tokenizer: Any, token: int) -> str:
    """A token with the space that it stands for; control characters escaped."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = piece.replace("▁", " ") if "▁" in piece else str(tokenizer.decode([token]))
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
