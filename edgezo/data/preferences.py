"""Preferences: which of two answers to a prompt was liked.

    {"prompt", "chosen", "rejected"}                       a pair; of texts, or of lists of turns
    {"chosen", "rejected"}                                 what both begin with is the prompt
    {"prompt", "completion", "label": true or false}       an answer that was liked or not; also 1 or 0, and
    {"prompt", "completion", "thumb": "up" or "down"}      as a thumb. Answers to one prompt are paired here

A pair is a choice: cross entropy over the two answers' mean token log-probabilities, so that the liked one becomes the
more likely one of the two, whatever their lengths.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from edgezo.data.packed import PackedRecords
from edgezo.data.row_files import Problems, Record
from edgezo.data.turns import ANSWERED, ASKED, OF_TEMPLATE

PAIR = ("prompt", "chosen", "rejected")
ANSWER = ("prompt", "completion")
WORDS = {"up": True, "down": False, "true": True, "false": False}
WORDS |= {"\N{THUMBS UP SIGN}": True, "\N{THUMBS DOWN SIGN}": False}
NUMBERS = {"1": True, "0": False, "1.0": True, "0.0": False}
THUMBS = {**WORDS, **NUMBERS}


def thumb_field(records: Iterable[Record]) -> str | None:
    """The field of answers that gives whether they were liked; None where no field does.

    ``thumb`` if it is a thumb in any row. ``label`` if both true and false (or up and down) occur, or if no other
    values occur. Numbers alone may be classes or marks: they count if some prompt has an answer with 1 and one with 0.
    """
    labels, thumbs_of = set[str](), dict[bytes, set[bool]]()  # the latter by prompt
    others = False
    for record in records:
        if not _has(record, ANSWER):
            continue
        if _thumb_text(record.fields.get("thumb")) in THUMBS:
            return "thumb"
        text = _thumb_text(record.fields.get("label"))
        if text in THUMBS:
            labels.add(text)
            prompt = _digest(str(record.fields["prompt"]))
            thumbs_of.setdefault(prompt, set()).add(THUMBS[text])
        elif text:
            others = True
            thumbs_of.clear()
    if {WORDS[text] for text in labels & set(WORDS)} == {True, False}:
        return "label"
    if others:
        return None
    both = any(len(thumbs) == 2 for thumbs in thumbs_of.values())
    return "label" if both or labels & set(WORDS) else None


def prompted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a pair of texts. Without a prompt, it is the words that both answers begin with."""
    chosen, rejected = (fields.get(name) for name in PAIR[1:])
    if PAIR[0] in fields or not (isinstance(chosen, str) and isinstance(rejected, str)):
        return fields
    stop = 0
    for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            break
        stop = at if one.isspace() else stop
    texts = (chosen[:stop], chosen[stop:], rejected[stop:])
    return {**fields, **dict(zip(PAIR, texts, strict=True))}


def has_answers_of_turns(fields: Mapping[str, Any]) -> bool:
    """Whether a row is a pair of answers that are lists of turns."""
    return all(isinstance(fields.get(name), list) for name in PAIR[1:])


def conversations(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A pair of lists of turns as two rows of ``prompt`` and ``completion``, the preferred one first.

    The turns that both answers begin with belong to the prompt, as TRL reads such rows.
    """
    asked, answers = fields.get(PAIR[0]), [fields[name] for name in PAIR[1:]]
    shared = 0
    while (
        all(len(turns) > shared for turns in answers) and answers[0][shared] == answers[1][shared]
    ):
        shared += 1
    context = answers[0][:shared]
    if isinstance(asked, list) and context[: len(asked)] != asked:
        context = [*asked, *context]
    elif isinstance(asked, str) and not context:  # else the text repeats the first turn
        context = [{"role": "user", "content": asked}]
    rest = {name: value for name, value in fields.items() if name in OF_TEMPLATE}
    return [{**rest, ASKED: context, ANSWERED: turns[shared:]} for turns in answers]


def _digest(text: str) -> bytes:
    """A text's stand-in where many are told apart: no two texts have the same one, but by chances that never come."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _has(record: Record, names: Sequence[str]) -> bool:
    return all(name in record.fields for name in names)


def _thumb_text(value: Any) -> str:
    """A field's value as THUMBS spells it. An emoji may be followed by a selector that asks for its picture."""
    return "" if value is None else str(value).strip().lower().rstrip("\N{VARIATION SELECTOR-16}")


@dataclass
class _Answers:
    """The answers to one prompt, by their numbers among the rows."""

    liked: array[int]
    disliked: array[int]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Every answer of the more numerous kind with one of the other; none where one kind has none."""
        if not self.liked or not self.disliked:
            return
        for i in range(max(len(self.liked), len(self.disliked))):
            yield self.liked[i % len(self.liked)], self.disliked[i % len(self.disliked)]


def _pair(liked: Record, disliked: Record) -> Record:
    fields = {
        "prompt": liked.fields["prompt"],
        "chosen": liked.fields["completion"],
        "rejected": disliked.fields["completion"],
    }
    return Record(f"{liked.where} and {disliked.where}", fields)


def paired(
    splits: Sequence[Sequence[Record]], problems: Problems, notes: list[str]
) -> list[Sequence[Record]]:
    """The splits with answers that have thumbs made into pairs, and other rows as they are."""
    name = thumb_field(chain.from_iterable(splits))
    if name is not None:
        return [_paired(split, name, problems, notes) for split in splits]
    for field in ("thumb", "label"):
        every = chain.from_iterable(splits)
        if any(_thumb_text(record.fields.get(field)) for record in every if _has(record, ANSWER)):
            notes.append(
                f"the field {field!r} is not used, so every completion is learned: its values do not tell which "
                "answers to one prompt were liked (up or down, true or false, 1 or 0)"
            )
    return list(splits)


def _paired(
    records: Sequence[Record], name: str, problems: Problems, notes: list[str]
) -> Sequence[Record]:
    """The pairs that answers make by their field ``name``, before rows that are pairs already."""
    pairs, by_prompt = array("Q"), dict[bytes, _Answers]()
    for number, record in enumerate(records):
        if _has(record, PAIR):
            pairs.append(number)
        elif (thumb := _thumb(record, name, problems)) is not None:
            prompt = _digest(str(record.fields.get("prompt")))
            answers = by_prompt.setdefault(prompt, _Answers(array("Q"), array("Q")))
            (answers.liked if thumb else answers.disliked).append(number)
    n_answers = len(records) - len(pairs)
    if not n_answers:
        return records
    made = PackedRecords(
        _pair(records[liked], records[disliked])
        for answers in by_prompt.values()
        for liked, disliked in answers.pairs()
    )
    n_made = len(made)
    left_out = sum(not (answers.liked and answers.disliked) for answers in by_prompt.values())
    notes.append(f"{n_answers} answers with thumbs up or down: {n_made} pairs")
    if left_out:
        notes.append(f"{left_out} prompts left out: all of their answers were liked, or none was")
    if not n_made and not len(problems):
        problems.add(
            "no prompt has an answer with thumbs up and one with thumbs down: there is nothing to compare "
            f"(to learn every completion, remove or rename the field {name!r})"
        )
    made.extend(records[number] for number in pairs)
    return made


def _thumb(record: Record, name: str, problems: Problems) -> bool | None:
    """Whether an answer was liked; None after noting that the row does not tell."""
    if not _has(record, ANSWER):
        problems.bad_row(
            f"a row has neither {' and '.join(ANSWER)} nor {', '.join(PAIR)}",
            *(record.where, f" (it has: {record.keys})", record.fields),
        )
        return None
    thumb = THUMBS.get(_thumb_text(record.fields.get(name)))
    if thumb is None:
        problems.bad_row(
            f"the field {name!r} says neither up nor down (to learn every completion, remove or rename the field)",
            *(record.where, f" (it has: {record.keys})", record.fields),
        )
    return thumb
