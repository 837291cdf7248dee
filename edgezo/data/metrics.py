"""Metrics that compare a predicted answer with the right ones. Pure functions of texts (standard library only).

    exact_match, token_f1            SQuAD's evaluate-v1.1.py (arXiv 1606.05250)
    drop_exact_match, drop_f1        DROP's drop_eval.py (arXiv 1903.00161), of one span at a time
    numeric_match                    GSM8K (arXiv 2110.14168): the number after ####, else the last one

Each takes a prediction and all right answers, and gives its best value over those answers, from 0 to 1.
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
# (predictions, their rows) -> figures by name; the first is the metric of an evaluation
Report = Callable[[Sequence[str], Sequence[Fields]], dict[str, float]]

_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A minus between two numbers is no sign; a full stop after a number is no decimal point.
_NUMBER = re.compile(r"(?<![\d.])-?\$?\d[\d,]*(?:\.\d+)?|(?<!\d)-?\$?\.\d+")


def normalised(text: str) -> str:
    """The text in lower case, without punctuation and articles, its words one space apart."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    predicted = normalised(prediction)
    return max((float(predicted == normalised(answer)) for answer in answers), default=0.0)


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words, each counted as often as it stands in both prediction and answer."""
    predicted = normalised(prediction).split()
    return max((_f1(predicted, normalised(answer).split()) for answer in answers), default=0.0)


def _f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    same = sum((Counter(predicted) & Counter(expected)).values())
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def _drop_words(text: str) -> list[str]:
    """The words of a text as DROP normalises them: SQuAD's way word by word, and numbers by their value."""
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
    predicted = _drop_words(prediction)
    return max((float(predicted == _drop_words(answer)) for answer in answers), default=0.0)


def drop_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the sets of words; 0 for an answer with numbers if the prediction has none of them."""
    predicted = set(_drop_words(prediction))
    best = 0.0
    for answer in answers:
        expected = set(_drop_words(answer))
        numbers = {word for word in expected if _as_float(word) is not None}
        if not numbers or numbers & predicted:
            best = max(best, _f1(sorted(predicted), sorted(expected)))
    return best


def numeric_match(prediction: str, answers: Sequence[str]) -> float:
    number = final_number(prediction)
    return float(number is not None and any(number == final_number(answer) for answer in answers))


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, or the last number if there is no ####; None where there is no number."""
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
    """A report of the mean of each metric over the rows."""

    def report(predictions: Sequence[str], rows: Sequence[Fields]) -> dict[str, float]:
        pairs = list(zip(predictions, (row["answers"] for row in rows), strict=True))
        return {
            name: sum(metric(*pair) for pair in pairs) / max(1, len(pairs))
            for name, metric in metrics.items()
        }

    return report


def chosen(prediction: str, answers: Sequence[str]) -> float:
    """1 if the predicted label word or option is a right one, else 0."""
    return float(prediction in answers)


def answers_f1(yes: str) -> Report:
    """A report of accuracy, and of F1 over all rows of the prediction ``yes``, "the answer is right" (MultiRC: F1a)."""
    accuracy = means(accuracy=chosen)

    def report(predictions: Sequence[str], rows: Sequence[Fields]) -> dict[str, float]:
        expected = [yes in row["answers"] for row in rows]
        predicted = [prediction == yes for prediction in predictions]
        both = sum(a and b for a, b in zip(predicted, expected, strict=True))
        f1 = 2 * both / max(1, sum(predicted) + sum(expected))
        return {**accuracy(predictions, rows), "f1": f1}

    return report
