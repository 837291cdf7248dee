"""Preferences: which of two answers to a prompt was liked.

    {"prompt", "chosen", "rejected"}                       a pair
    {"prompt", "completion", "label": true or false}       an answer with thumbs up or down (or 1 or 0); also
    {"prompt", "completion", "thumb": "up" or "down"}      paired here with answers to the same prompt

A pair is a choice: cross entropy over the two answers' mean token log-probabilities, so that the liked one becomes the
more likely one of the two whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from edgezo.data.row_files import Problems, Record

PAIR = ("prompt", "chosen", "rejected")
JUDGED = ("prompt", "completion")
WORDS = {"up": True, "down": False, "true": True, "false": False}
WORDS |= {"\N{THUMBS UP SIGN}": True, "\N{THUMBS DOWN SIGN}": False}
NUMBERS = {"1": True, "0": False, "1.0": True, "0.0": False}
THUMBS = {**WORDS, **NUMBERS}


def thumb_field(records: Sequence[Record]) -> str | None:
    """The field that says whether an answer was liked, of rows that are answers; None where none does.

    ``thumb`` where any row has a thumb in it. ``label`` where rows say true and false (or up and down), or all say
    nothing else; numbers alone may be classes or marks, so they count where some prompt has an answer of each kind.
    """
    answers = [r.fields for r in records if _has(r, JUDGED)]
    if any(_said(fields.get("thumb")) in THUMBS for fields in answers):
        return "thumb"
    labels = {said for fields in answers if (said := _said(fields.get("label")))}
    said_both = {WORDS[said] for said in labels & set(WORDS)} == {True, False}
    if said_both or (labels <= set(THUMBS) and labels & set(WORDS)):
        return "label"
    if not labels <= set(THUMBS):
        return None
    kinds: dict[str, set[bool]] = {}
    for fields in answers:
        if said := _said(fields.get("label")):
            kinds.setdefault(str(fields["prompt"]), set()).add(THUMBS[said])
    return "label" if any(len(found) == 2 for found in kinds.values()) else None


def _has(record: Record, names: Sequence[str]) -> bool:
    return all(name in record.fields for name in names)


def _said(value: Any) -> str:
    """What a field says; an emoji may have a selector behind it that asks for its picture."""
    return "" if value is None else str(value).strip().lower().rstrip("\N{VARIATION SELECTOR-16}")


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
    splits: Sequence[Sequence[Record]], problems: Problems, notes: list[str]
) -> list[list[Record]]:
    """Of each split the answers with thumbs as pairs, and other rows as they are."""
    every = [record for split in splits for record in split]
    name = thumb_field(every)
    if name is not None:
        return [_paired(split, name, problems, notes) for split in splits]
    for field in ("thumb", "label"):
        if any(_said(record.fields.get(field)) for record in every if _has(record, JUDGED)):
            notes.append(
                f"the field {field!r} is not used, so every completion is learned: it does not say of answers to one "
                "prompt which was liked (up or down, true or false, 1 or 0)"
            )
    return [list(split) for split in splits]


def _paired(
    records: Sequence[Record], name: str, problems: Problems, notes: list[str]
) -> list[Record]:
    """Answers as pairs, by what the field ``name`` says of each, before rows that are pairs already."""
    pairs = [record for record in records if _has(record, PAIR)]
    rest = [record for record in records if not _has(record, PAIR)]
    if not rest:
        return pairs
    by_prompt: dict[str, _Answers] = {}
    for record in rest:
        thumb = THUMBS.get(_said(record.fields.get(name)))
        if thumb is None:
            problems.add(
                f"{name!r} says neither up nor down (to learn every completion, remove or rename the field)",
                at=f"{record.where}: {record.keys}",
            )
            continue
        answers = by_prompt.setdefault(str(record.fields.get("prompt")), _Answers([], []))
        (answers.liked if thumb else answers.disliked).append(record)
    found = [pair for answers in by_prompt.values() for pair in answers.pairs()]
    left_out = sum(not answers.pairs() for answers in by_prompt.values())
    notes.append(f"{len(rest)} answers with thumbs up or down: {len(found)} pairs")
    if left_out:
        notes.append(f"{left_out} prompts left out: all answers liked, or none; there is no pair")
    if not found and not len(problems):
        problems.add(
            "no prompt has an answer with thumbs up and one with thumbs down: there is nothing to compare "
            f"(to learn every completion, remove or rename the field {name!r})"
        )
    return [*found, *pairs]
