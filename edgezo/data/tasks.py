"""Built-in tasks, so that ``--task NAME`` needs no template and no label words.

A prompt reads as natural text up to the label word. Label words are single, distinct tokens (with
their leading space) of GPT-2 style vocabularies such as SmolLM2's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.data import metrics
from edgezo.data.metrics import Report
from edgezo.machine.files import user_path

EXAMPLE_FOLDER = Path(__file__).parent / "example"


class Generation(NamedTuple):
    """How a model writes an answer: greedily, up to the end token, one of ``stop``, or ``most`` tokens."""

    most: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """How the rows of one labelled data set become prompts.

    A label is predicted as its label word, as one of the texts that the row gives (``options``, ``options_field``), or
    is no label but a text that is written (``generation``; the target is the row's field ``completion``).
    """

    name: str
    about: str
    template: str
    labels: str | None = None  # label words, as --labels has them
    label_field: str = "label"
    options: tuple[str, ...] = ()  # templates of the candidate texts, in the order of the labels
    # From a row to the fields that are named here; if there are "answers" among them, all of those are right.
    prepare: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    options_field: str | None = None  # the field with a list of candidate texts, of any length
    generation: Generation | None = None
    source: str = "answers"  # the field that ``prepare`` takes answers from, for messages
    report: Report | None = None  # the figures of an evaluation, in place of accuracy


# Words that begin a COPA sentence and lose their capital inside one; names and "I" keep theirs.
_OPENERS = frozenset(
    "a an the he she it they we you his her its their our my your this that these those there "
    "someone everyone nobody no some many all one two several".split()
)
_CONNECTIVES = {"cause": "because", "effect": "so"}


def _copa(row: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that make one sentence of premise and alternative: '... the grass because the sun was rising.'"""
    fields = dict(row)
    question = str(row.get("question", ""))
    if question in _CONNECTIVES:
        fields["connective"] = _CONNECTIVES[question]
    if isinstance(row.get("premise"), str):
        fields["premise"] = row["premise"].strip().rstrip(".")
    for name in ("choice1", "choice2"):
        choice = row.get(name)
        if isinstance(choice, str) and choice.split(" ", 1)[0].lower() in _OPENERS:
            fields[name] = choice[0].lower() + choice[1:]
    return fields


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    """Each entity once, and the first right one as the label; highlights of the passage become sentences."""
    fields = dict(row)
    if isinstance(passage := row.get("passage"), str):
        passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", passage)
        fields["passage"] = passage.replace("\n@highlight\n", ". ")
    entities, answers = row.get("entities"), row.get("answers")
    if isinstance(entities, list) and isinstance(answers, list):
        entities = list(dict.fromkeys(e for e in entities if isinstance(e, str)))
        right = [entities.index(a) for a in answers if a in entities]
        fields |= {"entities": entities} | ({"label": right[0]} if right else {})
    return fields


def _texts(value: Any) -> list[str]:
    """The texts of a list, stripped; [] if ``value`` is no list."""
    return [t.strip() for t in value if isinstance(t, str)] if isinstance(value, list) else []


def _written(answers: list[str], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row with these right answers, of which the first is the target."""
    return fields | ({"answers": answers, "completion": answers[0]} if answers else {})


def _squad(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = row.get("answers")
    return _written(_texts(answers.get("text")) if isinstance(answers, dict) else [], dict(row))


def _drop(row: Mapping[str, Any]) -> dict[str, Any]:
    spans = row.get("answers_spans")
    return _written(_texts(spans.get("spans")) if isinstance(spans, dict) else [], dict(row))


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with the solution and its steps as the target; every answer that ends in its number is right."""
    answer = row.get("answer")
    if not isinstance(answer, str) or metrics.final_number(answer) is None:
        return dict(row)
    return {**row, "answers": [str(metrics.final_number(answer))], "completion": answer.strip()}


_TASKS = (
    Task(
        "sst2",
        "film reviews: negative or positive",
        "Review: {sentence}\nThe sentiment of the review is",
        "0=negative,1=positive",
    ),
    Task(
        "trec",
        "what a question asks for, 6 kinds",
        "{text}\nThe answer to this question is some kind of",
        "0=abbreviation,1=thing,2=description,3=person,4=place,5=number",
        label_field="coarse_label",
    ),
    Task(
        "snips",
        "requests to a voice assistant, 7 intents",
        "{text}\nThis request is about",
        "0=playlist,1=restaurant,2=weather,3=music,4=rating,5=search,6=cinema",
    ),
    Task(
        "ag_news",
        "news, 4 sections",
        "{text}\nThis news story belongs to the section on",
        "0=world,1=sports,2=business,3=technology",
    ),
    Task(
        "emotion",
        "the feeling in a short message, 6 kinds",
        "{text}\nThe feeling in this message is",
        "0=sadness,1=joy,2=love,3=anger,4=fear,5=surprise",
    ),
    Task(
        "rte",
        "does the hypothesis follow from the premise?",
        "{premise}\nQuestion: is it right that {hypothesis} Yes or no?\nAnswer:",
        "0=yes,1=no",
    ),
    Task(
        "cb",
        "entailment, contradiction or neither",
        "{premise}\nQuestion: is it right that {hypothesis}? Yes, no or maybe?\nAnswer:",
        "0=yes,1=no,2=maybe",
    ),
    Task(
        "boolq",
        "yes-or-no questions about a passage",
        "{passage}\nQuestion: {question}? Yes or no?\nAnswer:",
        "0=no,1=yes",
    ),
    Task(
        "copa",
        "which of two is the cause or the effect",
        "{premise} {connective}",
        options=("{choice1}", "{choice2}"),
        prepare=_copa,
    ),
    Task(
        "wsc",
        "what a pronoun refers to",
        '{text}\nQuestion: does "{span2_text}" here mean "{span1_text}"? Yes or no?\nAnswer:',
        "0=no,1=yes",
    ),
    Task(
        "wic",
        "is a word used in the same sense twice?",
        "{sentence1}\n{sentence2}\n"
        "Question: does the word {word} mean the same in both? Yes or no?\nAnswer:",
        "0=no,1=yes",
    ),
    Task(
        "multirc",
        "is an answer to a question about a passage right?",
        "{paragraph}\nQuestion: {question}\nIs the answer {answer} right? Yes or no?\nAnswer:",
        "0=no,1=yes",
        report=metrics.answers_f1("yes"),
    ),
    Task(
        "record",
        "who or what is left out of a sentence about a passage",
        '{passage}\n{query}\nQuestion: what is "@placeholder"?\nAnswer:',
        options_field="entities",
        prepare=_record,
        report=metrics.means(
            accuracy=metrics.chosen, f1=metrics.token_f1, exact_match=metrics.exact_match
        ),
    ),
    Task(
        "squad",
        "questions about a passage, answered in its words",
        "{context}\nQuestion: {question}\nAnswer:",
        prepare=_squad,
        generation=Generation(24, ("\n",)),
        report=metrics.means(f1=metrics.token_f1, exact_match=metrics.exact_match),
    ),
    Task(
        "drop",
        "questions about a passage that take counting and comparing",
        "{passage}\nQuestion: {question}\nAnswer:",
        prepare=_drop,
        generation=Generation(16, ("\n",)),
        source="answers_spans",
        report=metrics.means(f1=metrics.drop_f1, exact_match=metrics.drop_exact_match),
    ),
    Task(
        "gsm8k",
        "school mathematics, solved step by step",
        "Question: {question}\nAnswer:",
        prepare=_gsm8k,
        generation=Generation(256, ("\nQuestion:",)),
        source="answer",
        report=metrics.means(numeric_match=metrics.numeric_match),
    ),
    Task(
        "example",
        "the bundled requests to a personal assistant, 10 intents",
        "{text}\nThis request is about",
        label_field="intent",
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def task_folder(
    task: Task,
    data_root: str | None,  # folder of data sets, one folder each, named as the tasks are
) -> Path | None:
    """The folder with the task's train and validation files; None if it lies in a data root that was not given."""
    if task.name == "example":
        return EXAMPLE_FOLDER
    return user_path(data_root) / task.name if data_root else None
