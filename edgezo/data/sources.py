"""From a request to its rows: the files that it names, read, with rows held out to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgezo.data.batches import permutation
from edgezo.data.copies import RowCopies
from edgezo.data.note_files import NoteRules, note_files, read_notes
from edgezo.data.packed import PackedRecords, SelectedRecords
from edgezo.data.preferences import paired
from edgezo.data.recognition import Labelling
from edgezo.data.row_files import SUFFIXES, Problems, Record, find_splits, read_records
from edgezo.data.tasks import TASKS, Task, task_folder
from edgezo.data.templates import unescaped
from edgezo.errors import SourceError
from edgezo.machine.downloads import DATA_ID, dataset
from edgezo.machine.files import user_path
from edgezo.machine.meant import nearest
from edgezo.machine.process_memory import Guard

VALIDATION_SHARE = 0.1  # of the rows, which is held out where there is no validation file

# Streams of the Philox generator beside the epochs 0, 1, 2, ... Their seed is always 0: every run is measured on the
# same rows, and `edgezo eval` evaluates on those that training held out.
_HOLD_OUT, EVAL_SAMPLE = 2**63, 2**63 + 1
# Characters of a part of a note: at least these, and so many for each token of a row. A row to evaluate on is held out
# as a whole, so that parts are not much longer than rows.
_PART_CHARS, _PART_TIMES = 1 << 14, 8
_TURN_TIMES = (
    3  # and characters of a part of a chat whose answers are learned, since what is longer is cut
)
_AS_TEXT = " (it is read as a text: name a table .csv, and rows of JSON .jsonl)"


class ReadFor(NamedTuple):
    """What rows are read for."""

    # False: the training rows are read for what they say of labels, and not tokenised.
    training: bool = True
    # True: rows that stand without validation rows are all evaluated on. Nothing is trained then, so none is held out.
    whole: bool = False
    # The label words of a run that is evaluated. Where label words are made of the rows' labels and are all among
    # them, they stand in the run's order, with those that no row has.
    words: tuple[str, ...] = ()


TRAINING = ReadFor()


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
    text_end: str = "yes"  # rows with ``text`` end with the end token, which is predicted
    speaker: str | None = None  # whose messages of an exported chat are learned
    skip_bad_rows: bool = False  # rows that cannot be used are left out
    # The rules by which rows are read: 1 of runs from before texts were cut into windows; the newest is 2.
    row_rules: int = 2
    # The time for chat templates that write one, in ISO's form; None: now.
    written_at: str | None = None
    read_for: ReadFor = TRAINING


class Source(NamedTuple):
    """The rows of a request, and how they are to be read."""

    task: Task | None
    labelling: Labelling
    train: Sequence[Record] = ()
    validation: Sequence[Record] = ()
    known: Sequence[Record] = ()  # whose labels are known: training rows, before any were held out


def open_source(request: DataRequest, problems: Problems, notes: list[str], guard: Guard) -> Source:
    """Read the rows of a request, prepared as its task needs them. Raises UsageError with every problem."""
    task = _find_task(request, problems)
    path = _find_path(request, task, problems, notes)
    template = unescaped(request.template, notes) if request.template else None
    source = Source(
        task, Labelling.of(task, template, request.labels, request.label_field, problems)
    )
    if path:
        source = _read(path, source, request, problems, notes, guard)
    problems.raise_any()
    if not source.train:
        problems.add(f"no row of {path} can be used")
        problems.raise_any()
    return source


def _find_task(request: DataRequest, problems: Problems) -> Task | None:
    if request.task is None:
        return None
    if request.task not in TASKS:
        problems.add(
            f"there is no task {request.task!r}: --task takes one of {', '.join(TASKS)}{nearest(request.task, TASKS)}"
        )
    return TASKS.get(request.task)


def _given_path(data: str, problems: Problems, notes: list[str]) -> Path | None:
    """The path of --data, or the folder of a dataset of the hub. What looks like a local path is never looked up there.

    None after noting that there is neither.
    """
    path = user_path(data)
    local = path.exists() or Path(data.partition("/")[0]).exists()
    if local or path.suffix.lower() in SUFFIXES or not DATA_ID.fullmatch(data):
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


def _read(
    path: Path,
    source: Source,
    request: DataRequest,
    problems: Problems,
    notes: list[str],
    guard: Guard,
) -> Source:
    """The rows of a file or folder, prepared as the task needs them, with rows to evaluate on."""
    copies = RowCopies()
    task = source.task
    texts = note_files(path, problems.remarks) if task is None else []
    train_files, validation_files = (texts, []) if texts else find_splits(path, problems)
    if request.held_out is not None:
        validation_files = []
    train: Sequence[Record]
    validation: Sequence[Record] = ()
    if texts:
        most = max(_PART_CHARS, _PART_TIMES * request.max_length)
        how = NoteRules(most, _TURN_TIMES * request.max_length, request.speaker)
        train = PackedRecords(copies.removed(read_notes(path, texts, how, problems, guard)))
    else:
        if request.speaker is not None:
            problems.add(
                f"--speaker has no effect here: {path} is no chat that a messenger exported"
            )
        train, validation = (
            PackedRecords(copies.counted(_prepared(files, task, problems, guard)))
            for files in (train_files, validation_files)
        )
    if validation_files and validation_files[0].name.startswith("test"):
        notes.append(f"no validation file: {validation_files[0].name} is used to evaluate")
    read, held_out = train, None
    if not source.labelling.labelled:
        train, validation = paired((train, validation), problems, notes)
    known = train
    if train and not validation_files and request.read_for.whole and request.held_out is None:
        validation = known
        notes.append(
            f"no validation rows: all {len(known)} rows are evaluated on (--held-out {VALIDATION_SHARE} takes only "
            "those that a training on them holds out)"
        )
    elif train and not validation_files:
        if len(train) < 2:
            one = f"{path if texts else train_files[0]} has one row: two are needed, one of them to evaluate on"
            problems.add(f"{one}{_AS_TEXT if texts else ''}")
        held_out = _held_out(len(train), request.held_out or VALIDATION_SHARE)
        train, validation = (
            SelectedRecords(known, np.flatnonzero(which)) for which in (~held_out, held_out)
        )
        why = "no validation file" if request.held_out is None else "--held-out"
        n, total = len(validation), len(known)
        notes.append(
            f"{why}: {n} of {total} rows are held out to evaluate on, drawn by chance, the same in every run"
        )
    notes += copies.notes(held_out if known is read else None)
    return source._replace(train=train, validation=validation, known=known)


def _prepared(
    files: Sequence[Path], task: Task | None, problems: Problems, guard: Guard
) -> Iterator[Record]:
    """The rows of files, as their task changes them."""
    prepare = task.prepare if task else None
    for file in files:
        for record in read_records(file, problems, guard):
            yield record if prepare is None else replace(record, fields=prepare(record.fields))


def _held_out(count: int, share: float) -> np.ndarray:
    """Which of the rows, a random ``share`` of them and one at least, are evaluated on, (count,) bool."""
    held_out = np.zeros(count, dtype=bool)
    held_out[permutation(count, 0, _HOLD_OUT)[: max(1, int(count * share))]] = True
    return held_out


def eval_sample(records: Sequence[Record], limit: int | None, notes: list[str]) -> Sequence[Record]:
    """At most ``limit`` rows to evaluate on."""
    if limit is None or len(records) <= limit:
        return records
    chosen = sorted(permutation(len(records), 0, EVAL_SAMPLE)[:limit].tolist())
    notes.append(f"evaluated on {limit} of {len(records)} validation rows, the same in every run")
    return SelectedRecords(records, chosen)
