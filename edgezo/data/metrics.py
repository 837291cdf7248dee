"""What a written answer is worth beside the right ones. Pure functions of texts (standard library only).

    exact_match, token_f1            SQuAD's evaluate-v1.1.py (arXiv 1606.05250)
    drop_exact_match, drop_f1        DROP's drop_eval.py (arXiv 1903.00161), of one span at a time
    numeric_match                    GSM8K (arXiv 2110.14168): the number after ####, else the last one

Each takes a prediction and all right answers and is the best over those, from 0 to 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

Metric = Callable[[str, Sequence[str]], float]
Fields = Mapping[str, Any]  # of a row; "answers" lists the right ones
# (predictions, their rows) -> figures by name; the first is the one that an evaluation is known by
Report = Callable[[Sequence[str], Sequence[Fields]], dict[str, float]]

_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A minus between two numbers is no sign; a full stop after a number is no decimal point.
_NUMBER = re.compile(r"(?<![\d.])-?\$?\d[\d,]*(?:\.\d+)?|(?<!\d)-?\$?\.\d+")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and further white space."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    found = normalised(prediction)
    return max((float(found == normalised(answer)) for answer in answers), default=0.0)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Of the words that prediction and answer share, as often as both have them."""
    found = normalised(prediction).split()
    return max((_f1(found, normalised(answer).split()) for answer in answers), default=0.0)


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _drop_words(text: str) -> list[str]:
    """DROP's normalisation: as SQuAD's, word by word, but numbers are numbers."""
    words = []
    for word in re.split(r"[ \-]", text):
        word = word.lower()
        if _as_float(word) is None:
            word = "".join(c for c in word if c not in _PUNCTUATION)
        number = _as_float(word)
        word = str(number) if number is not None else word
        words += _ARTICLES.sub(" ", word).split()
    return words


def _as_float(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def drop_exact_match(prediction: str, answers: Sequence[str]) -> float:
    found = _drop_words(prediction)
    return max((float(found == _drop_words(answer)) for answer in answers), default=0.0)


def drop_f1(prediction: str, answers: Sequence[str]) -> float:
    """Over sets of words; 0 for an answer with numbers of which the prediction has none."""
    found = set(_drop_words(prediction))
    best = 0.0
    for answer in answers:
        wanted = set(_drop_words(answer))
        numbers = {word for word in wanted if _as_float(word) is not None}
        if not numbers or numbers & found:
            best = max(best, _f1(sorted(found), sorted(wanted)))
    return best


def numeric_match(prediction: str, answers: Sequence[str]) -> float:
    found = final_number(prediction)
    return float(found is not None and any(found == final_number(answer) for answer in answers))


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, else the last number; None where there is none."""
    _, mark, rest = text.rpartition("####")
    numbers = _NUMBER.findall(rest if mark else text)
    if not numbers:
        return None
    try:
        return Decimal(re.sub(r"[$,]", "", numbers[0 if mark else -1]))
    except InvalidOperation:
        return None


# --------------------------------------------------------------------------------------- reports


def means(**metrics: Metric) -> Report:
    """The mean of each metric over the rows."""

    def report(predictions: Sequence[str], rows: Sequence[Fields]) -> dict[str, float]:
        pairs = list(zip(predictions, (row["answers"] for row in rows), strict=True))
        return {
            name: sum(metric(*pair) for pair in pairs) / max(1, len(pairs))
            for name, metric in metrics.items()
        }

    return report


def chosen(prediction: str, answers: Sequence[str]) -> float:
    """Whether the word or option that was chosen is a right one."""
    return float(prediction in answers)


def answers_f1(yes: str) -> Report:
    """Accuracy, and F1 of the answers that are called right, over all questions (MultiRC's F1a)."""
    accuracy = means(accuracy=chosen)

    def report(predictions: Sequence[str], rows: Sequence[Fields]) -> dict[str, float]:
        wanted = [yes in row["answers"] for row in rows]
        said = [prediction == yes for prediction in predictions]
        both = sum(a and b for a, b in zip(said, wanted, strict=True))
        f1 = 2 * both / max(1, sum(said) + sum(wanted))
        return {**accuracy(predictions, rows), "f1": f1}

    return report
