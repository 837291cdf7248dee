"""Metrics of answers: against SQuAD's script as it stands, and examples of DROP's rules, numbers and choices."""

from __future__ import annotations

import re
import string
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgezo.data.metrics import (
    answers_f1,
    chosen,
    drop_exact_match,
    drop_f1,
    exact_match,
    final_number,
    means,
    numeric_match,
    token_f1,
)

# ----------------------------------------------------------------------------- SQuAD's evaluate-v1.1.py, as it stands


def normalize_answer(s):
    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    def lower(text):
        return text.lower()

    return white_space_fix(remove_articles(remove_punc(lower(s))))


def f1_score(prediction, ground_truth):
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = Counter(prediction_tokens) & Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    f1 = (2 * precision * recall) / (precision + recall)
    return f1


def exact_match_score(prediction, ground_truth):
    return normalize_answer(prediction) == normalize_answer(ground_truth)


WORDS = st.sampled_from(
    "|The|a|an|the,|cat|cat's|CAT|dog.|(dog)|a-b|1,000|18|U.S.|é|\t|the-end|$5|-".split("|")
)
TEXTS = st.one_of(st.lists(WORDS, max_size=6).map(" ".join), st.text(max_size=12))


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_squad_s_metrics_are_those_of_its_script(prediction: str, answers: list[str]) -> None:
    assert token_f1(prediction, answers) == max(f1_score(prediction, a) for a in answers)
    assert exact_match(prediction, answers) == max(
        exact_match_score(prediction, a) for a in answers
    )


def test_the_best_of_all_answers_counts() -> None:
    answers = ["Denver Broncos", "the Broncos"]
    assert exact_match("Broncos.", answers) == token_f1("broncos", answers) == 1
    assert token_f1("the Denver team", answers) == pytest.approx(0.5)
    assert exact_match("", ["x"]) == token_f1("", ["x"]) == 0


# ----------------------------------------------------------------------------- DROP


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("3", ["3.0"], 1, 1),  # numbers are numbers
        ("55 yards", ["55"], 0, 2 / 3),
        ("54 yards", ["55 yards"], 0, 0),  # a wrong number is wrong, whatever else is right
        ("yards", ["55 yards"], 0, 0),
        ("the Texans", ["Texans"], 1, 1),
        ("Matt Schaub", ["Schaub", "Rivers"], 0, 2 / 3),
        ("twenty-one", ["twenty one"], 1, 1),
        ("$5", ["5"], 1, 1),
        ("", ["5"], 0, 0),
    ],
)
def test_drop_compares_words_but_numbers_by_value(
    prediction: str, answers: list[str], exact: float, f1: float
) -> None:
    assert drop_exact_match(prediction, answers) == exact
    assert drop_f1(prediction, answers) == pytest.approx(f1)


# ----------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", 18),
        ("#### -1,234.50 dollars", "-1234.50"),
        ("so 7 of 12", 12),
        ("that is 12.", 12),
        ("16-3", 3),
        ("it is -3", -3),
        ("1,000,000 in all", 1000000),
        ("about .5", "0.5"),
        ("$5.25", "5.25"),
        ("#### none, but 4 before", 4),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_final_number_is_after_the_mark_or_the_last(text: str, number: object) -> None:
    assert final_number(text) == (None if number is None else Decimal(str(number)))


def test_numbers_match_by_value_and_no_number_never_does() -> None:
    assert numeric_match("the answer is 18.00", ["18"]) == 1
    assert numeric_match("#### 18 and then 19", ["18"]) == 1
    assert numeric_match("eighteen", ["18"]) == numeric_match("", ["none"]) == 0


# ----------------------------------------------------------------------------- reports


def test_a_report_is_the_mean_of_its_metrics_and_f1_of_answers_counts_the_right_ones() -> None:
    rows = [{"answers": ["yes"]}, {"answers": ["no"]}, {"answers": ["yes"]}, {"answers": ["no"]}]
    predictions = ["yes", "yes", "no", "no"]
    assert answers_f1("yes")(predictions, rows) == {"accuracy": 0.5, "f1": 0.5}
    assert answers_f1("yes")(["no"] * 4, rows) == {"accuracy": 0.5, "f1": 0.0}
    figures = means(a=chosen, b=exact_match)(["Yes", "no"], rows[:2])
    assert figures == {"a": 0.5, "b": 1.0} and list(figures) == ["a", "b"]
