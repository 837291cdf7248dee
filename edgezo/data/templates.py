"""Templates and label words: what turns the fields of a row into a prompt, and labels into words."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgezo.data.row_files import Problems, Record

MASK = "mask"  # in a template, stands for the mask token of a masked model
_WHOLE_LABEL = re.compile(r"([-+]?\d+)\.0*")
MOST_LABELS = 256  # a field with more different values has no labels


# ------------------------------------------------------------------------------------- templates


@dataclass(frozen=True)
class Template:
    """Text with ``{field}`` names in it, as (literal, field or None) parts."""

    parts: tuple[tuple[str, str | None], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.parts if name is not None)

    @property
    def tail(self) -> str:
        """The literal text at the end; "" where the template ends with a field."""
        return self.parts[-1][0] if self.parts and self.parts[-1][1] is None else ""

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The text for one row. White space around its values is dropped."""
        return "".join(
            literal + ("" if name is None else str(fields[name]).strip())
            for literal, name in self.parts
        )

    def split(self) -> tuple[Template, Template | None]:
        """The parts before and after ``{mask}``; (self, None) where there is no mask."""
        for index, (literal, name) in enumerate(self.parts):
            if name == MASK:
                before = (*self.parts[:index], (literal, None))
                return Template(before), Template(self.parts[index + 1 :])
        return self, None


def unescaped(text: str, notes: list[str]) -> str:
    """A template of the user with new lines and tabs for ``\\n`` and ``\\t``, which a shell leaves as they are."""
    for escaped, meant, name in (("\\n", "\n", "a new line"), ("\\t", "\t", "a tab")):
        if escaped in text:
            notes.append(f"--template: {escaped} is read as {name} ({text.count(escaped)} times)")
            text = text.replace(escaped, meant)
    return text


def parse_template(text: str, problems: Problems) -> Template | None:
    """Parse ``'{text} All in all it was'``; ``{{`` and ``}}`` are braces. None after noting what is wrong."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        problems.add(f"template {text!r}: {error} (for a brace write {{{{ or }}}})")
        return None
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name):
            problems.add(
                f"template {text!r}: braces may only have the name of a field, as {{text}}"
            )
            return None
    template = Template(tuple((literal, name) for literal, name, _, _ in parts))
    fields = [name for name in template.names if name != MASK]
    if not fields:
        problems.add(f"template {text!r} names no field of the rows: write one as {{text}}")
        return None
    if template.names.count(MASK) > 1:
        problems.add(
            f"template {text!r} has {{mask}} {template.names.count(MASK)} times: it may have one"
        )
        return None
    return template


# ---------------------------------------------------------------------------------------- labels


def label_key(value: Any) -> str | None:
    """The label of a row as text: 1, 1.0, "1", "1.0" and " 1" are one label. None where it is no text or number."""
    if not isinstance(value, str | int | float):
        return None
    key = str(value).strip()
    if whole := _WHOLE_LABEL.fullmatch(key):  # a table with a missing label has all others as 1.0
        key = whole[1]
    return key.lower() if key.lower() in ("true", "false") else key


def parse_labels(spec: str, problems: Problems) -> dict[str, str]:
    """Parse ``'0=bad,1=good'`` as {"0": "bad", "1": "good"}."""
    words: dict[str, str] = {}
    for item in spec.split(","):
        key, equals, word = item.partition("=")
        label, word = label_key(key) or "", word.strip()
        if not equals or not label:
            problems.add(
                f"--labels {spec!r}: {item.strip()!r} is not of the form value=word, as in 0=bad,1=good"
            )
        elif not word:
            problems.add(f"--labels {spec!r}: no word for label {label!r}")
        elif label in words:
            problems.add(f"--labels {spec!r}: label {label!r} is given twice")
        else:
            words[label] = word
    _check_words(words, problems)
    if len(words) == 1:
        problems.add(f"--labels {spec!r}: one label only, where two or more are needed")
    return words


def derive_labels(
    records: Sequence[Record], name: str, problems: Problems, known: Sequence[str] = ()
) -> dict[str, str]:
    """Label words made from the labels themselves: "play_music" and "PlayMusic" become "play music".

    Where all of them are among the words ``known``, those stand in their order, with those that no row has.
    """
    keys = sorted({k for r in records if (k := label_key(r.fields.get(name)))})
    if not keys:
        return {}
    listed = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
    if all(re.fullmatch(r"[-+.\d]*\d|true|false", key) for key in keys):
        example = ",".join(f"{key}=..." for key in keys[:3])
        problems.add(
            f"the values of {name!r} are not words ({listed}): "
            f"give a word for each with --labels '{example}'"
        )
        return {}
    words = {key: as_words(key) for key in keys}
    of_word = {word: key for key, word in words.items()}
    if len(of_word) == len(words) and of_word.keys() <= set(known):
        return {of_word.get(word, word): word for word in known}
    if not 2 <= len(keys) <= MOST_LABELS:
        problems.add(
            f"{name!r} has {len(keys)} different values ({listed}), not 2 to {MOST_LABELS}: "
            "give the field that has the labels with --label-field"
        )
        return {}
    _check_words(words, problems)
    return words


def as_words(key: str) -> str:
    """A label's text with spaces in place of underscores and before capitals."""
    spaced = re.sub(r"[_\s]+", " ", key).strip()
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", spaced)
    return split if split == spaced else split.lower()


def word_ids(tokenizer: Any, word: str, spaced: bool) -> list[int]:
    """Token ids of a word inside a text: after a space, or at the start of a line."""
    text = f"a {word}" if spaced else f"\n{word}"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end > 1]  # not those of the first character


def wants_space(tokenizer: Any, words: Sequence[str]) -> bool:
    """Whether the words take no more tokens with a space before them than without."""
    with_space, without = (
        sum(len(word_ids(tokenizer, word, spaced)) for word in words) for spaced in (True, False)
    )
    return with_space <= without


def _check_words(words: Mapping[str, str], problems: Problems) -> None:
    by_word: dict[str, list[str]] = {}
    for key, word in words.items():
        by_word.setdefault(word, []).append(key)
    for word, keys in by_word.items():
        if len(keys) > 1:
            problems.add(
                f"labels {', '.join(keys)} have the same word {word!r}: give each another word"
            )
