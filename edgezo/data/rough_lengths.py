"""About how many tokens rows have, from their characters: for a plan before the model and its tokenizer are here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import datetime

from edgezo.data.dataset import MOST_WRITTEN, SKIP, plain_drafts
from edgezo.data.recognition import Reading, recognise
from edgezo.data.row_files import Problems, Record, Skipped
from edgezo.data.row_kinds import Draft, Form, templates_of
from edgezo.data.sources import DataRequest, eval_sample, open_source
from edgezo.data.token_stats import KEPT_LENGTHS, TokenStats
from edgezo.machine.process_memory import Guard

# English text has four characters and more a token. Three count too many tokens of it rather than too few.
LEAST_CHARS_A_TOKEN = 3
BYTES_A_TOKEN = 12  # of a row in memory: its tokens, and where they are scored


def rough_lengths(request: DataRequest, guard: Guard, notes: list[str]) -> TokenStats:
    """The lengths of the rows of a request for a causal model, a token for ``LEAST_CHARS_A_TOKEN`` characters.

    Raises UsageError for data that cannot be read, and DoesNotFit where it takes more memory than ``guard`` allows.
    """
    skipped = Skipped() if request.skip_bad_rows else None
    problems = Problems(skipped, SKIP)
    source = open_source(request, problems, notes, guard)
    now = request.written_at or datetime.now().isoformat(timespec="seconds")
    how = Reading(None, request.text_end == "yes", now, request.row_rules)
    form, _, names, endings = recognise(
        *(source.task, source.labelling, source.train, source.known, how, False, problems, notes)
    )
    validation = eval_sample(source.validation, request.eval_limit, notes)
    with templates_of(form) or nullcontext():
        lengths = [
            [*_lengths(records, form, request, guard, problems)]
            for records in (source.train, validation)
        ]
    problems.raise_any()
    notes += skipped.notes() if skipped else ()
    train, evaluated = ([n for n, _ in split] or [1] for split in lengths)
    task = source.task
    written = request.max_new_tokens or (MOST_WRITTEN if request.judged else 0)
    if task is not None and task.generation is not None:
        written = request.max_new_tokens or task.generation.most
    writes = written if form.kind == "completion" else 0
    return TokenStats(
        kind=form.kind,
        tokens=tuple(sorted(train, reverse=True)[:KEPT_LENGTHS]),
        scored=max(scored for split in lengths for _, scored in split) if any(lengths) else 1,
        label_words=len(names) if form.kind == "label" else 0,
        long_words=len(endings),
        mean=sum(train) / len(train),
        evaluated=max(evaluated),
        evaluated_mean=sum(evaluated) / len(evaluated),
        written=writes,
        prompt=max(train) if writes else 0,
        evaluated_prompt=max(evaluated) if writes else 0,
        examples=len(lengths[0]),
        evaluations=len(lengths[1]),
        stored_bytes=BYTES_A_TOKEN * (sum(train) + sum(evaluated)),
        prompt_mean=sum(train) / len(train) if endings else 0.0,
        from_chars=True,
    )


def _lengths(
    records: Sequence[Record], form: Form, request: DataRequest, guard: Guard, problems: Problems
) -> Iterator[tuple[int, int]]:
    """(tokens, scored tokens) of every example; a long text is several."""
    for _, draft in plain_drafts(records, form, guard, problems, False):
        tokens, scored = _tokens(draft), _scored(draft)
        if draft.windows:
            while tokens > request.max_length:
                yield request.max_length, request.max_length
                tokens, scored = tokens - request.max_length, scored - request.max_length
        rows = len(draft.pieces)
        most = rows * request.max_length
        yield min(tokens, most), max(1, min(scored, tokens, most))


def _tokens(draft: Draft) -> int:
    return sum(2 + len(piece.text) // LEAST_CHARS_A_TOKEN for piece in draft.pieces)


def _scored(draft: Draft) -> int:
    """About how many tokens are predicted."""
    return max(
        1 + sum(stop - start for start, stop in piece.spans) // LEAST_CHARS_A_TOKEN
        for piece in draft.pieces
    )
