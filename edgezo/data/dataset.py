"""Rows on disk become token sequences.

row_files.py: file -> Record     row_kinds.py: Record -> Draft     encoder.py: Draft -> Example     batches.py: -> Batch

recognition.py chooses which form of row_kinds.py reads the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from edgezo.data.batches import Example, permutation
from edgezo.data.encoder import Encoder, parts
from edgezo.data.metrics import Report
from edgezo.data.packed import PackedExamples
from edgezo.data.recognition import Reading, recognise
from edgezo.data.row_files import (
    CHECK_ROWS,
    LARGE_CHARS,
    Problems,
    Record,
    Skipped,
)
from edgezo.data.row_kinds import Draft, Form, Piece, templates_of
from edgezo.data.sources import EVAL_SAMPLE, DataRequest, eval_sample, open_source
from edgezo.data.tasks import Generation, Task
from edgezo.data.token_stats import KEPT_LENGTHS, TokenStats
from edgezo.data.trees import Row
from edgezo.errors import UsageError
from edgezo.machine.process_memory import Guard

DRAFT_TIMES, CHAT_TIMES = 4, 5  # copies of a row's texts while it becomes a draft, and of a chat's
SKIP = "Correct these rows, or leave them out with --skip-bad-rows."
MOST_WRITTEN = 32  # tokens of an answer, where neither task nor user sets a number


@dataclass(frozen=True)
class Dataset:
    """Examples to train and to evaluate on."""

    kind: str  # "label", "choice", "completion" or "text"
    train: Sequence[Example]  # none where a request wants no training rows
    validation: Sequence[Example]
    label_ids: tuple[int, ...]  # kind "label": the label words' token ids in label order; else ()
    label_names: tuple[str, ...]  # the candidates' names, where they are the same in every row
    notes: tuple[str, ...]  # what the user should know: "12 of 4000 rows cut to 512 tokens"
    generation: Generation | None = None  # how answers are written, if they are
    report: Report | None = None  # figures of an evaluation, beside or in place of accuracy
    written_at: str | None = None  # the time that the chat template has written, if it writes one
    expected: TokenStats | None = None  # bounds on rows that are yet to come
    # Kind "choice": the tokens of the label words, where they are the same in every row.
    endings: tuple[tuple[int, ...], ...] = ()
    skipped: Skipped | None = None  # rows that cannot be used, where they are left out

    @property
    def classes(self) -> int:
        """The classes of rows with label words, which a linear probe tells apart; 0 of other rows."""
        return len(self.label_ids) or len(self.endings)

    def evaluated_on(self, rows: int) -> Dataset:
        """The data with at most ``rows`` examples to evaluate on, the same ones in every run."""
        if len(self.validation) <= rows:
            return self
        return replace(self, validation=_some(PackedExamples.of(self.validation), rows))

    def token_stats(self) -> TokenStats:
        """Token counts of the examples, which the planner needs."""
        if self.expected is not None:
            return self.expected
        splits = [PackedExamples.of(split) for split in (self.train, self.validation)]
        train, validation = splits
        counts = train.token_counts()
        counts[::-1].sort()  # the longest first
        evaluated = validation.token_counts()
        writes = self.generation
        prompts = [int(s.prompt_lengths().max(initial=0)) if writes else 0 for s in splits]
        return TokenStats(
            kind=self.kind,
            tokens=tuple(counts[:KEPT_LENGTHS].tolist()) or (1,),
            scored=max(int(split.scored_counts().max(initial=0)) for split in splits) or 1,
            label_words=len(self.label_ids),
            long_words=len(self.endings),
            prompt_mean=_mean(train.prompts().token_counts()) if self.endings else 0.0,
            mean=_mean(counts),
            evaluated=int(evaluated.max(initial=0)),
            evaluated_mean=_mean(evaluated),
            written=writes.most if writes else 0,
            prompt=prompts[0],
            evaluated_prompt=prompts[1],
            examples=len(train),
            evaluations=len(validation),
            stored_bytes=sum(split.stored_bytes for split in splits),
        )


def _mean(counts: np.ndarray) -> float:
    return float(counts.mean()) if len(counts) else 0.0


# --------------------------------------------------------------------------------------- loading


def load_dataset(
    request: DataRequest,
    tokenizer: Any,
    *,
    masked: bool = False,
    guard: Guard | None = None,
    most_in_tree: int | None = None,
) -> Dataset:
    """Read, recognise and tokenise the data that a request names.

    ``tokenizer`` is a transformers tokenizer with character offsets (a "fast" one); ``masked``: for a masked language
    model. ``guard`` is asked for memory all the while. Options with more than ``most_in_tree`` tokens pass one by one
    (None: none does). Raises UsageError with every problem of the request and its
    rows, and DoesNotFit, with the row, where they take more than the cap.
    """
    skipped = Skipped() if request.skip_bad_rows else None
    problems, notes = Problems(skipped, SKIP), list[str]()
    encoder = Encoder(tokenizer, request.max_length, masked, guard, most_in_tree)
    _check_numbers(request, encoder, problems)
    source = open_source(request, problems, notes, encoder.guard)
    task = source.task

    now = request.written_at or datetime.now().isoformat(timespec="seconds")
    text_ends = request.text_end == "yes"
    how = Reading(tokenizer, text_ends, now, request.row_rules, request.read_for.words)
    form, label_ids, label_names, endings = recognise(
        *(task, source.labelling, source.train, source.known, how, masked, problems, notes)
    )
    encoder.follow_with(endings)
    validation = eval_sample(source.validation, request.eval_limit, notes)
    # A report knows the task's label words, not the user's.
    report = task.report if task and not request.labels else None
    generation = _generation(request, task, form.kind, source.train, notes)
    judged = request.judged or report is not None or generation is not None
    splits = {"validation": (validation, judged)}
    if request.read_for.training:
        splits = {"training": (source.train, request.judged), **splits}
    packed, cuts = dict[str, PackedExamples](), list[str]()
    templates = templates_of(form)
    with templates or nullcontext():
        looked_at = task is None and not judged
        for name, (records, judges) in splits.items():
            drafts = drafts_of(records, form, label_names, judges, encoder, problems, looked_at)
            packed[name] = encoder.examples(_sound(drafts, problems), name, cuts)
    problems.raise_any()
    packed["validation"] = _some_windows(packed["validation"], request.eval_limit, cuts)
    notes += [*problems.remarks.lines(), *cuts, *(skipped.notes() if skipped else ())]
    for name, examples in packed.items():
        if not examples:
            raise UsageError(
                f"no {name} row is left: each is left out, or has no token to predict. Give more rows"
            )
    train = packed.get("training", ())
    return Dataset(
        *(form.kind, train, packed["validation"], label_ids, label_names, tuple(notes)),
        generation,
        report,
        now if templates is not None and templates.dated else None,
        endings=endings,
        skipped=skipped,
    )


def _some_windows(examples: PackedExamples, limit: int | None, notes: list[str]) -> PackedExamples:
    """At most ``limit`` examples to evaluate on: rows are that many already, but windows of them may be more."""
    if limit is None or len(examples) <= limit:
        return examples
    notes.append(f"evaluated on {limit} of {len(examples)} windows, the same ones in every run")
    return _some(examples, limit)


def _some(examples: PackedExamples, count: int) -> PackedExamples:
    """So many of the examples, drawn by chance, in their order."""
    return examples.some(sorted(permutation(len(examples), 0, EVAL_SAMPLE)[:count].tolist()))


def _sound(drafts: Iterable[Draft], problems: Problems) -> Iterator[Draft]:
    """The drafts until there is a problem; the rest is still looked at for more of them, but not tokenised."""
    return (draft for draft in drafts if not len(problems))


def drafts_of(
    records: Iterable[Record],
    form: Form,
    names: Sequence[str],
    judged: bool,
    encoder: Encoder,
    problems: Problems,
    looked_at: bool,
) -> Iterator[Draft]:
    """The drafts of rows, very long texts clipped; with what a prediction is judged by, if they are ``judged``.

    Where rows are ``looked_at``, fields that nothing uses are remarked on.
    """
    for record, draft in plain_drafts(records, form, encoder.guard, problems, looked_at):
        if judged:
            draft = _with_fields(draft, record, names)
        if any(map(encoder.begins_inside, draft.pieces)):
            problems.remarks.add(
                f"rows whose answer begins with {encoder.begin}, which begins a text", record.where
            )
        tidy = [encoder.tidy(piece) for piece in draft.pieces]
        splits: list[tuple[Piece, ...]]
        if draft.windows:
            splits = [(part,) for piece in tidy for part in parts(piece)]
        else:
            splits = [tuple(encoder.clipped(piece, record.where) for piece in tidy)]
        for pieces in splits:
            yield replace(draft, pieces=pieces, answers=(), where=record.where)


def plain_drafts(
    records: Iterable[Record], form: Form, guard: Guard, problems: Problems, looked_at: bool
) -> Iterator[tuple[Record, Draft]]:
    """The rows that can be used, each with its draft as its form makes it."""
    uses, of_row = form.uses, Problems()
    of_row.remarks = problems.remarks
    copies = DRAFT_TIMES if templates_of(form) is None else CHAT_TIMES
    for number, record in enumerate(records):
        if (size_bytes := _text_bytes(record.fields)) > LARGE_CHARS or number % CHECK_ROWS == 0:
            guard.check(copies * size_bytes, record.where)
        draft = form.draft(record, of_row)
        if looked_at:
            problems.remarks.add_unused(record, uses)
        if len(of_row):
            of_row.move_to(problems, record)
        elif draft is not None:
            yield record, draft


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
        texts = (str(record.fields.get("completion", "\n")).strip() for record in train)
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
        for number, row in enumerate(example.whole_rows):
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
