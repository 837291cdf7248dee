"""Preferences: which of two answers to a prompt was liked.

    {"prompt", "chosen", "rejected"}                       a pair
    {"prompt", "completion", "label": true or false}       an answer with thumbs up or down; also
    {"prompt", "completion", "thumb": "up" or "down"}      paired here with answers to the same prompt

A pair is a choice: cross entropy over the two answers' mean token log-probabilities, so that the liked one becomes the
more likely one of the two whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from edgezo.rows import Problems, Record

PAIR = ("prompt", "chosen", "rejected")
JUDGED = ("prompt", "completion")
WORDS = {"up": True, "down": False, "true": True, "false": False, "\N{THUMBS UP SIGN}": True}
WORDS["\N{THUMBS DOWN SIGN}"] = False
NUMBERS = {"1": True, "0": False}  # thumbs only where there are no others, which would be classes


def thumb_field(records: Sequence[Record]) -> str | None:
    """The field that says whether an answer was liked, of rows that are answers; None where none does.

    ``thumb`` wherever a row has something in it; ``label`` where a row says up, down, true or false, or where rows
    say 1 and 0 and nothing else.
    """
    answers = [r.fields for r in records if all(name in r.fields for name in JUDGED)]
    if any(_said(fields.get("thumb")) for fields in answers):
        return "thumb"
    labels = {said for fields in answers if (said := _said(fields.get("label")))}
    return "label" if labels & set(WORDS) or labels == set(NUMBERS) else None


def _said(value: Any) -> str:
    return "" if value is None else str(value).strip().lower()


@dataclass
class _Answers:
    """What was said of one prompt."""

    liked: list[Record]
    disliked: list[Record]

    def pairs(self) -> list[Record]:
        """Every answer of the more numerous kind beside one of the other."""
        more = max(len(self.liked), len(self.disliked))
        if not self.liked or not self.disliked:
            return []
        both = zip(cycle(self.liked), cycle(self.disliked), strict=False)
        return [_pair(*found) for found, _ in zip(both, range(more), strict=False)]


def _pair(liked: Record, disliked: Record) -> Record:
    fields = {
        "prompt": liked.fields["prompt"],
        "chosen": liked.fields["completion"],
        "rejected": disliked.fields["completion"],
    }
    return Record(f"{liked.where} and {disliked.where}", fields)


def paired(
    records: Sequence[Record], name: str, problems: Problems, notes: list[str]
) -> list[Record]:
    """Answers as pairs, by what the field ``name`` says of each."""
    by_prompt: dict[str, _Answers] = {}
    for record in records:
        thumb = {**WORDS, **NUMBERS}.get(_said(record.fields.get(name)))
        if thumb is None:
            problems.add(f"{name!r} says neither up nor down", at=f"{record.where}: {record.keys}")
            continue
        answers = by_prompt.setdefault(str(record.fields.get("prompt")), _Answers([], []))
        (answers.liked if thumb else answers.disliked).append(record)
    found = [pair for answers in by_prompt.values() for pair in answers.pairs()]
    left_out = sum(not answers.pairs() for answers in by_prompt.values())
    notes.append(f"{len(records)} answers with thumbs up or down: {len(found)} pairs")
    if left_out:
        notes.append(f"{left_out} prompts left out: all answers liked, or none; there is no pair")
    if not found and not len(problems):
        problems.add(
            "no prompt has an answer with thumbs up and one with thumbs down: there is nothing to compare"
        )
    return found
