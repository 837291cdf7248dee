"""Tasks whose rows list their options, or whose answers are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers_fixture import byte_tokenizer, masked_tokenizer

from edgezo.data.dataset import DataRequest, Dataset, load_dataset, show_batch
from edgezo.errors import UsageError

RECORD = {
    "passage": "Anna met Ben in Rome.\n@highlight\nBen is a cook\n@highlight\nAnna paints",
    "query": "Later @placeholder sold a painting",
    "entities": ["Anna", "Ben", "Rome", "Anna"],
    "answers": ["Anna", "Anna Bell"],
    "idx": {"passage": 0, "query": 0},
}
SQUAD = {
    "id": "1",
    "title": "",
    "context": "Anna met Ben in Rome in 1950.",
    "question": "Where did they meet?",
    "answers": {"text": ["Rome", "in Rome"], "answer_start": [16, 13]},
}
DROP = {
    "passage": "Smith ran 3 yards, then 12.",
    "question": "How many yards did Smith run?",
    "answers_spans": {"spans": ["15", "fifteen"]},
}
GSM8K = {"question": "What is 2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}


def task_of(name: str, rows: list[dict[str, Any]], folder: Path, **asked: Any) -> Dataset:
    place = folder / name
    place.mkdir(exist_ok=True)
    for part in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{part}.jsonl").write_text(lines)
    masked = asked.pop("masked", False)
    tokenizer = masked_tokenizer() if masked else byte_tokenizer(2000)
    request = DataRequest(task=name, data_root=str(folder), **asked)
    return load_dataset(request, tokenizer, masked=masked)


def decoded(ids: Any) -> str:
    return str(byte_tokenizer(2000).decode(list(ids)))


def test_record_chooses_among_the_entities_of_each_row(tmp_path: Path) -> None:
    fewer = RECORD | {"entities": ["Ben", "Anna"], "answers": ["Anna"]}
    data = task_of("record", [RECORD, fewer] * 2, tmp_path)
    assert data.kind == "choice" and data.label_names == ()
    assert [len(example.rows) for example in data.train] == [3, 2, 3, 2]
    assert [example.label for example in data.train] == [0, 1, 0, 1]
    for row, entity in zip(data.train[0].rows, ("Anna", "Ben", "Rome"), strict=True):
        whole = decoded([*row.ids, row.score_ids[-1]])
        assert whole == (
            "Anna met Ben in Rome. Ben is a cook. Anna paints\nLater @placeholder sold a painting\n"
            f'Question: what is "@placeholder"?\nAnswer: {entity}'
        )
        assert decoded(row.score_ids) == f" {entity}"
    shown = data.validation[0]
    assert shown.options == ("Anna", "Ben", "Rome") and shown.fields is not None
    assert shown.fields["answers"] == RECORD["answers"]
    assert data.train[0].fields is None  # nothing scores a prediction in training
    assert "option 2" in show_batch(data.train[:1], data, byte_tokenizer(2000))
    assert data.report is not None
    figures = data.report(["Anna Bell", "Ben"], [e.fields for e in data.validation[:2] if e.fields])
    assert figures == {"accuracy": 0.5, "f1": 0.5, "exact_match": 0.5}


@pytest.mark.parametrize(
    ("name", "row", "prompt", "completion", "answers"),
    [
        (
            "squad",
            SQUAD,
            "Anna met Ben in Rome in 1950.\nQuestion: Where did they meet?\nAnswer:",
            " Rome",
            ["Rome", "in Rome"],
        ),
        (
            "drop",
            DROP,
            "Smith ran 3 yards, then 12.\nQuestion: How many yards did Smith run?\nAnswer:",
            " 15",
            ["15", "fifteen"],
        ),
        (
            "gsm8k",
            GSM8K,
            "Question: What is 2 and 2?\nAnswer:",
            " 2+2=<<2+2=4>>4\n#### 4",
            ["4"],
        ),
    ],
)
def test_written_answers_are_targets_and_all_of_them_are_right(
    name: str, row: dict[str, Any], prompt: str, completion: str, answers: list[str], tmp_path: Path
) -> None:
    data = task_of(name, [row] * 4, tmp_path, judged=True)
    assert data.kind == "completion" and data.generation is not None
    assert "\n" not in data.generation.stop or "\n" not in completion
    for example in (*data.train, *data.validation):
        assert decoded(example.prompt) == prompt
        assert decoded(example.rows[0].score_ids) == f"{completion}<|im_end|>"
        assert example.fields is not None and example.fields["answers"] == answers
    assert data.report is not None
    fields = [e.fields for e in data.validation[:2] if e.fields is not None]
    assert set(data.report([completion, ""], fields).values()) == {0.5}
    assert f"up to {data.generation.most} tokens" in str(data.notes)
    shorter = task_of(name, [row] * 4, tmp_path, max_new_tokens=5)
    assert shorter.generation is not None and shorter.generation.most == 5
    assert shorter.generation.stop == data.generation.stop


def test_a_long_passage_loses_its_beginning_and_keeps_its_question(tmp_path: Path) -> None:
    row = SQUAD | {"context": "x " * 200 + "end."}
    data = task_of("squad", [row] * 4, tmp_path, max_length=60, judged=True)
    assert decoded(data.train[0].prompt).endswith("end.\nQuestion: Where did they meet?\nAnswer:")
    assert "cut to 60 tokens" in str(data.notes)


def test_multirc_asks_for_each_answer(tmp_path: Path) -> None:
    row = {"paragraph": "Ben cooks.", "question": "Who cooks?", "answer": "Ben", "label": 1}
    data = task_of("multirc", [row, row | {"answer": "Anna", "label": 0}] * 2, tmp_path)
    assert (data.kind, data.label_names) == ("label", ("no", "yes"))
    text = decoded(data.train[0].rows[0].ids)
    assert text == "Ben cooks.\nQuestion: Who cooks?\nIs the answer Ben right? Yes or no?\nAnswer:"
    assert data.report is not None
    fields = [e.fields for e in data.validation if e.fields is not None]
    assert data.report(["yes"] * 4, fields) == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}


def test_the_answer_of_a_conversation_follows_its_last_question(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "good music")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(row) + "\n") * 4)
    data = load_dataset(DataRequest(data=str(file), judged=True), byte_tokenizer(2000))
    example = data.train[0]
    assert decoded(example.prompt).endswith("c<|im_end|>\n<|im_start|>assistant\n")
    assert example.fields is not None and example.fields["answers"] == ["good music"]


@pytest.mark.parametrize(
    ("name", "row", "asked", "message"),
    [
        ("squad", SQUAD | {"answers": "Rome"}, {}, "no right answer in the field 'answers'"),
        ("squad", SQUAD | {"answers": {"text": []}}, {}, "no right answer in the field 'answers'"),
        ("squad", {"question": "?"}, {}, "field 'context' is missing"),
        (
            "drop",
            DROP | {"answers_spans": None},
            {},
            "no right answer in the field 'answers_spans'",
        ),
        ("gsm8k", GSM8K | {"answer": "no number"}, {}, "no right answer in the field 'answer'"),
        ("record", RECORD | {"answers": ["Zoe"]}, {}, "no right answer is among the texts"),
        ("record", RECORD | {"entities": "Anna"}, {}, "field 'entities' is not a list of texts"),
        ("squad", SQUAD, {"labels": "0=a,1=b"}, "written answers: leave out --labels"),
        ("record", RECORD, {"labels": "0=a,1=b"}, "leave out --labels"),
        ("squad", SQUAD, {"masked": True}, "needs a causal language model"),
        ("squad", SQUAD, {"template": "no field"}, "names no field of the rows"),
    ],
)
def test_each_fault_of_a_row_is_named(
    name: str, row: dict[str, Any], asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        task_of(name, [row] * 4, tmp_path, **asked)
