"""Preferences: which of two answers to a prompt was liked.

    {"prompt", "chosen", "rejected"}                       a pair
    {"prompt", "completion", "label": true or false}       an answer with thumbs up or down; also
    {"prompt", "completion", "thumb": "up" or "down"}      paired here with answers to the same prompt

A pair is a choice: cross entropy over the two answers' mean token log-probabilities, so that the liked one becomes the
more likely one of the two whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from edgezo.rows import Problems, Record

PAIR = ("prompt", "chosen", "rejected")
JUDGED = ("prompt", "completion")
THUMBS = {"up": True, "down": False, "true": True, "false": False}


def thumb_field(fields: Mapping[str, Any]) -> str | None:
    """The field that says whether an answer was liked, of a row that is an answer."""
    if not all(name in fields for name in JUDGED):
        return None
    return next((name for name in ("thumb", "label") if _thumb(fields.get(name)) is not None), None)


def _thumb(value: Any) -> bool | None:
    return THUMBS.get(str(value).strip().lower())


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


def paired(records: Sequence[Record], problems: Problems, notes: list[str]) -> list[Record]:
    """Answers with thumbs as pairs; other rows as they are. The first row says which they are."""
    name = thumb_field(records[0].fields) if records else None
    if name is None:
        return list(records)
    by_prompt: dict[str, _Answers] = {}
    for record in records:
        thumb = _thumb(record.fields.get(name))
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
