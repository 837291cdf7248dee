"""Preferences: which of two answers to a prompt was liked.

    {"prompt", "chosen", "rejected"}                       a pair
    {"prompt", "completion", "label": true or false}       an answer that was liked or not; also 1 or 0, and
    {"prompt", "completion", "thumb": "up" or "down"}      as a thumb. Answers to one prompt are paired here

A pair is a choice: cross entropy over the two answers' mean token log-probabilities, so that the liked one becomes the
more likely one of the two, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from edgezo.data.row_files import Problems, Record

PAIR = ("prompt", "chosen", "rejected")
ANSWER = ("prompt", "completion")
WORDS = {"up": True, "down": False, "true": True, "false": False}
WORDS |= {"\N{THUMBS UP SIGN}": True, "\N{THUMBS DOWN SIGN}": False}
NUMBERS = {"1": True, "0": False, "1.0": True, "0.0": False}
THUMBS = {**WORDS, **NUMBERS}


def thumb_field(records: Sequence[Record]) -> str | None:
    """The field of answers that gives whether they were liked; None where no field does.

    ``thumb`` if it is a thumb in any row. ``label`` if both true and false (or up and down) occur, or if no other
    values occur. Numbers alone may be classes or marks: they count if some prompt has an answer with 1 and one with 0.
    """
    answers = [r.fields for r in records if _has(r, ANSWER)]
    if any(_thumb_text(fields.get("thumb")) in THUMBS for fields in answers):
        return "thumb"
    labels = {text for fields in answers if (text := _thumb_text(fields.get("label")))}
    both_words = {WORDS[text] for text in labels & set(WORDS)} == {True, False}
    if both_words or (labels <= set(THUMBS) and labels & set(WORDS)):
        return "label"
    if not labels <= set(THUMBS):
        return None
    thumbs_of: dict[str, set[bool]] = {}  # by prompt
    for fields in answers:
        if text := _thumb_text(fields.get("label")):
            thumbs_of.setdefault(str(fields["prompt"]), set()).add(THUMBS[text])
    return "label" if any(len(thumbs) == 2 for thumbs in thumbs_of.values()) else None


def _has(record: Record, names: Sequence[str]) -> bool:
    return all(name in record.fields for name in names)


def _thumb_text(value: Any) -> str:
    """A field's value as THUMBS spells it. An emoji may be followed by a selector that asks for its picture."""
    return "" if value is None else str(value).strip().lower().rstrip("\N{VARIATION SELECTOR-16}")


@dataclass
class _Answers:
    """The answers to one prompt."""

    liked: list[Record]
    disliked: list[Record]

    def pairs(self) -> list[Record]:
        """Every answer of the more numerous kind with one of the other; [] where one kind has none."""
        more = max(len(self.liked), len(self.disliked))
        if not self.liked or not self.disliked:
            return []
        both = zip(cycle(self.liked), cycle(self.disliked), strict=False)
        return [_pair(*answers) for answers, _ in zip(both, range(more), strict=False)]


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
    """The splits with answers that have thumbs made into pairs, and other rows as they are."""
    every = [record for split in splits for record in split]
    name = thumb_field(every)
    if name is not None:
        return [_paired(split, name, problems, notes) for split in splits]
    for field in ("thumb", "label"):
        if any(_thumb_text(record.fields.get(field)) for record in every if _has(record, ANSWER)):
            notes.append(
                f"the field {field!r} is not used, so every completion is learned: its values do not tell which "
                "answers to one prompt were liked (up or down, true or false, 1 or 0)"
            )
    return [list(split) for split in splits]


def _paired(
    records: Sequence[Record], name: str, problems: Problems, notes: list[str]
) -> list[Record]:
    """The pairs that answers make by their field ``name``, before rows that are pairs already."""
    pairs = [record for record in records if _has(record, PAIR)]
    rest = [record for record in records if not _has(record, PAIR)]
    if not rest:
        return pairs
    by_prompt: dict[str, _Answers] = {}
    for record in rest:
        if not _has(record, ANSWER):
            problems.add(
                f"a row has neither {' and '.join(ANSWER)} nor {', '.join(PAIR)}",
                at=f"{record.where} (it has: {record.keys})",
            )
            continue
        thumb = THUMBS.get(_thumb_text(record.fields.get(name)))
        if thumb is None:
            problems.add(
                f"the field {name!r} says neither up nor down (to learn every completion, remove or rename the field)",
                at=f"{record.where} (it has: {record.keys})",
            )
            continue
        answers = by_prompt.setdefault(str(record.fields.get("prompt")), _Answers([], []))
        (answers.liked if thumb else answers.disliked).append(record)
    made = [pair for answers in by_prompt.values() for pair in answers.pairs()]
    left_out = sum(not answers.pairs() for answers in by_prompt.values())
    notes.append(f"{len(rest)} answers with thumbs up or down: {len(made)} pairs")
    if left_out:
        notes.append(f"{left_out} prompts left out: all of their answers were liked, or none was")
    if not made and not len(problems):
        problems.add(
            "no prompt has an answer with thumbs up and one with thumbs down: there is nothing to compare "
            f"(to learn every completion, remove or rename the field {name!r})"
        )
    return [*made, *pairs]
