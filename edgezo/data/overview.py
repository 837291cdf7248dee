"""What edgezo understands of data, without a model: kind, counts, lengths, labels, three examples, and what is odd.

A tokenizer is used if there is one. Without one, lengths are counted in characters and words, and conversations are
shown without a chat template. Rows that cannot be used are counted: looking refuses none.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np

from edgezo.data.dataset import drafts_of, plain_drafts
from edgezo.data.encoder import Encoder
from edgezo.data.recognition import Reading, recognise
from edgezo.data.row_files import Problems, Skipped
from edgezo.data.row_kinds import Draft, Piece, templates_of
from edgezo.data.sources import DataRequest, open_source
from edgezo.machine.foreign import clip
from edgezo.machine.process_memory import Guard, ReadingGuard

SHOWN_EXAMPLES = 3
SHOWN_CHARS = 300  # of a stretch of text in an example
CHARS_A_TOKEN = 4  # about; a longer row may not fit
MEANINGS = {
    "text": "texts: every token is learned",
    "completion": "prompts and answers: the answers are learned",
    "label": "labelled rows: which label word follows is learned",
    "choice": "choices: which of several texts follows is learned",
}


@dataclass
class _Seen:
    """What passing drafts say of the data."""

    chars: array[int] = field(default_factory=lambda: array("Q"))
    words: array[int] = field(default_factory=lambda: array("Q"))
    labels: Counter[int] = field(default_factory=Counter)
    examples: list[Draft] = field(default_factory=list)

    def add(self, draft: Draft) -> None:
        """Count a draft; the first few are kept."""
        texts = [piece.text for piece in draft.pieces]
        self.chars.append(max(map(len, texts)))
        self.words.append(max(len(text.split()) for text in texts))
        if draft.label >= 0:
            self.labels[draft.label] += 1
        if len(self.examples) < SHOWN_EXAMPLES:
            self.examples.append(draft)


def overview(
    request: DataRequest, tokenizer: Any = None, masked: bool = False, guard: Guard | None = None
) -> tuple[dict[str, Any], Skipped]:
    """What is understood of the data that a request names, ready for JSON; and the rows that cannot be used.

    Lengths are {"min", "median", "p95", "max"} of the training rows, by unit. Raises UsageError for data that cannot be
    read at all, and DoesNotFit where it takes more memory than ``guard`` allows.
    """
    skipped, notes, guard = Skipped(), list[str](), guard or ReadingGuard()
    problems = Problems(skipped)
    source = open_source(request, problems, notes, guard)
    now = request.written_at or datetime.now().isoformat(timespec="seconds")
    how = Reading(tokenizer, request.text_end == "yes", now, request.row_rules)
    form, _, names, endings = recognise(
        *(source.task, source.labelling, source.train, source.known, how, masked, problems, notes)
    )
    seen, tokens, cuts = {}, None, list[str]()
    with templates_of(form) or nullcontext():
        for split, records in (("training", source.train), ("validation", source.validation)):
            seen[split] = _Seen()
            looked_at = source.task is None
            if tokenizer is None:
                for record, draft in plain_drafts(records, form, guard, problems, looked_at):
                    seen[split].add(replace(draft, where=record.where))
                continue
            encoder = Encoder(tokenizer, request.max_length, masked, guard)
            encoder.follow_with(endings)
            drafts = drafts_of(records, form, names, False, encoder, problems, looked_at)
            packed = encoder.examples(_watched(drafts, seen[split]), split, cuts)
            tokens = packed.token_counts() if split == "training" else tokens
    problems.raise_any()
    train = seen["training"]
    notes += [*problems.remarks.lines(), *cuts, *_oddly_long(train, request, tokenizer)]
    kind = MEANINGS[form.kind]
    lengths = {"characters": _summary(train.chars), "words": _summary(train.words)}
    if tokens is not None:
        lengths["tokens"] = _summary(tokens)
    return {
        "data": request.data or request.task,
        "kind": form.kind,
        "means": kind,
        "train": len(train.chars),
        "validation": len(seen["validation"].chars),
        "skipped": skipped.count,
        "lengths": lengths,
        "labels": {name: train.labels[i] for i, name in enumerate(names)} if train.labels else {},
        "examples": [_shown(draft, names) for draft in train.examples],
        "notes": notes,
    }, skipped


def _watched(drafts: Iterator[Draft], seen: _Seen) -> Iterator[Draft]:
    for draft in drafts:
        seen.add(draft)
        yield draft


def _summary(counts: Any) -> dict[str, int]:
    """Four numbers that say how long rows are."""
    values = np.asarray(counts)
    if not len(values):
        return {}
    middle, high = np.percentile(values, (50, 95), method="lower")
    return {
        "min": int(values.min()),
        "median": int(middle),
        "p95": int(high),
        "max": int(values.max()),
    }


def _oddly_long(seen: _Seen, request: DataRequest, tokenizer: Any) -> list[str]:
    """A sentence where rows may be longer than a model reads; a tokenizer says it better."""
    most = CHARS_A_TOKEN * request.max_length
    n_long = int((np.asarray(seen.chars) > most).sum())
    if tokenizer is not None or not n_long:
        return []
    return [
        f"rows of more than {most:,} characters, which may have more than --max-length {request.max_length} tokens: "
        f"{n_long:,}"
    ]


# ---------------------------------------------------------------------------------------------
# Examples


def _shown(draft: Draft, names: tuple[str, ...]) -> dict[str, Any]:
    """An example: its stretches of text, each learned or not. Of a choice, those of every option."""
    pieces = [list(_stretches_of(piece)) for piece in draft.pieces]
    right = draft.label
    if len(pieces) == 1 and right >= 0 and names:
        pieces[0].insert(1, {"text": f" {names[right]}", "learned": True})
    return {"where": draft.where, "pieces": pieces, "right": right if len(pieces) > 1 else None}


def _stretches_of(piece: Piece) -> Iterator[dict[str, Any]]:
    at = 0
    for start, stop in piece.spans:
        for text, learned in ((piece.text[at:start], False), (piece.text[start:stop], True)):
            if text:
                yield {"text": _shortened(text), "learned": learned}
        at = stop
    if rest := piece.text[at:]:
        yield {"text": _shortened(rest), "learned": False}
    if piece.after:
        yield {"text": _shortened(piece.after), "learned": False}


def _shortened(text: str) -> str:
    """The beginning and the end of a text."""
    if len(text) <= SHOWN_CHARS:
        return text
    return f"{clip(text, SHOWN_CHARS * 2 // 3)}{text[-SHOWN_CHARS // 3 :]}"
