"""Rows and settings with faults, how a batch is shown, and label words of several tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_rows import GOOD_BAD, SST2_STYLE, everything, load, problems, write
from tokenizers_fixture import byte_tokenizer, masked_tokenizer

from edgezo.data.dataset import DataRequest, load_dataset, show_batch


def test_all_problems_of_a_request_are_reported_together(tmp_path: Path) -> None:
    message = problems(
        lambda: load_dataset(
            DataRequest(
                data=str(tmp_path / "none"),
                template="{text} {",
                labels="0=good,1=good,2=,x",
                max_length=1,
                eval_limit=0,
            ),
            byte_tokenizer(),
        )
    )
    for part in ("none", "template", "the same word 'good'", "no word for label '2'", "'x' is not"):
        assert part in message
    assert "--max-length 1" in message and "--eval-limit 0" in message


SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        (GOOD_BAD, {"labels": "0=bad,1=good", "template": "{sentense}"}, "names sentense"),
        (GOOD_BAD, {"labels": "0=bad,1=good", "template": "no field"}, "names no field"),
        (GOOD_BAD, {"template": "{text}"}, "--labels '0=...,1=...'"),
        (GOOD_BAD, {"label_field": "lable", "labels": "0=bad,1=good"}, "'lable'"),
        (GOOD_BAD, {"labels": "0=bad"}, "one label only"),
        (GOOD_BAD, {"labels": "0=bad,2=good"}, "rows.jsonl:2: label='1'"),
        (GOOD_BAD, {"labels": "0=bad,1=good", "template": "{mask} {text}"}, "comes last"),
        ([*GOOD_BAD, {"txt": "a", "label": 0}], SST2_STYLE, "rows.jsonl:21 (it has: txt, label)"),
        ([*GOOD_BAD, {"text": ["a"], "label": 0}], SST2_STYLE, "not a text or number"),
        ([{"text": "a"}], {}, "one row"),
        ([{"text": "a"}, {"text": " "}], {}, "field 'text' is empty"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}],
            {},
            "rows.jsonl:2",
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, "'completion' is missing"),
        ([{"foo": 1}] * 3, {}, "has the keys foo"),
        ([{"foo": "a", "label": "b"}] * 3, {}, "give --template"),
        ([{"text": "a", "label": "b"}] * 3, {}, "1 different values"),
        ([{"messages": [{"role": "user", "content": "hi"}]}] * 2, {}, "no assistant turn"),
        ([{"messages": "hi"}] * 2, {}, "not a list of turns"),
        ([{"text": "a"}] * 3, {"task": "sst3"}, "takes one of sst2"),
        ([{"chosen": SAID, "rejected": [SAID[0]]}] * 3, {}, "no assistant turn"),
        ([{"chosen": "a b", "rejected": "a b"}] * 3, {}, "twice the same"),
        (SAID, {}, "as the list messages"),
        ([{"instruction": "a", "output": " "}] * 3, {}, "field 'output' is empty"),
        (
            [{"text": "a", "label": "b"}, {"text": "a", "label": ""}],
            {"labels": "b=c,d=e"},
            "'label' is empty",
        ),
    ],
)
def test_each_fault_of_rows_and_settings_is_named(
    rows: Any, asked: Any, expected: str, tmp_path: Path
) -> None:
    assert expected in problems(lambda: load(rows, tmp_path, **asked))


def test_masked_models_refuse_what_they_cannot_learn(tmp_path: Path) -> None:
    masked = {"tokenizer": masked_tokenizer(), "masked": True}
    assert "labelled rows only" in problems(lambda: load([{"text": "a b"}] * 3, tmp_path, **masked))
    collide = {"template": "{text}", "labels": "0=good,1=good fun"}
    assert "same token" in problems(lambda: load(GOOD_BAD, tmp_path, **masked, **collide))


# --------------------------------------------------------------------------------------- showing


def test_the_shown_batch_marks_what_is_predicted_and_lines_up(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    for data in (
        load(GOOD_BAD, tmp_path, **SST2_STYLE),
        load([{"prompt": "is it?", "completion": "yes\nit is"}] * 3, tmp_path),
        load(GOOD_BAD, tmp_path, template="{text} It was", labels="0=good,1=good fun"),
    ):
        lines = show_batch(data.train[:2], data, tokenizer).splitlines()
        texts = [
            i for i, line in enumerate(lines) if "⟦" in line and "^" in lines[i + 1 : i + 2][0]
        ]
        assert len(texts) == sum(len(e.whole_rows) for e in data.train[:2])
        for i in texts:
            assert len(lines[i]) == len(lines[i + 1])
            for text, mark in zip(lines[i], lines[i + 1], strict=True):
                assert (text in "⟦⟧") <= (mark == "^")


def test_the_shown_mask_of_a_masked_model_is_its_answer(tmp_path: Path) -> None:
    tokenizer = masked_tokenizer()
    data = load(GOOD_BAD, tmp_path, tokenizer, masked=True, **SST2_STYLE)
    shown = show_batch(data.train[:1], data, tokenizer)
    assert "was|⟦ " in shown and "<mask>" not in shown and "|</s>" in shown


def test_labels_of_held_out_rows_count_where_one_file_has_all_rows(tmp_path):
    rows = [{"text": f"row {i}", "label": f"class {'abcdefghij'[i % 10]}"} for i in range(20)]
    data = load_dataset(
        DataRequest(data=write(tmp_path / "rows.jsonl", rows), template="{text} is"),
        byte_tokenizer(),
    )
    assert len(data.label_names) == 10
    two = [{"text": "one", "label": "good"}, {"text": "two", "label": "bad"}]
    data = load_dataset(
        DataRequest(data=write(tmp_path / "two.jsonl", two), template="{text} is"), byte_tokenizer()
    )
    assert data.label_names == ("bad", "good") and len(data.train) == len(data.validation) == 1


# --------------------------------------------------------------------------------------- label words of several tokens


def test_prompts_before_label_words_are_cut_so_that_the_longest_word_has_room(
    tmp_path: Path,
) -> None:
    tokenizer = byte_tokenizer()
    asked = {"template": "{text} It was", "labels": "0=good,1=good fun"}
    longest = max(len(tokenizer(f" {word}")["input_ids"]) for word in ("good", "good fun"))
    data = load(GOOD_BAD, tmp_path, tokenizer, max_length=longest + 3, **asked)
    for example in everything(data):
        assert max(len(row.ids) for row in example.whole_rows) == longest + 3
        assert len({tuple(row.ids[: len(example.rows[0].ids)]) for row in example.whole_rows}) == 1
    assert any("cut to" in note for note in data.notes)
    short = problems(lambda: load(GOOD_BAD, tmp_path, tokenizer, max_length=longest - 1, **asked))
    assert f"a label word of {longest} tokens" in short


def test_options_of_a_row_begin_with_one_prompt_that_is_stored_once(tmp_path: Path) -> None:
    passage = "a passage that goes on for a while about this and that " * 6
    rows = [
        {
            "passage": passage,
            "query": f"who is @placeholder {i}",
            "entities": [f"e {i}", f"e b {i}", "x"],
            "answers": ["x"],
        }
        for i in range(12)
    ]
    folder = tmp_path / "record"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    write(folder / "validation.jsonl", rows)
    request = DataRequest(task="record", data_root=str(tmp_path), max_length=2000)
    data = load_dataset(request, byte_tokenizer())
    for example in data.train:
        assert len(example.rows) == 3 and example.tree is not None
        assert example.tokens < 1.2 * max(len(row.ids) for row in example.rows)
    stats = data.token_stats()
    assert stats.tokens[0] == max(example.tokens for example in data.train)
    whole = sum(
        2 * len(row.ids) for split in (data.train, data.validation) for e in split for row in e.rows
    )
    judged = 2 * 12 * (len(json.dumps(rows[0])) + 400)
    assert stats.stored_bytes < whole / 2 + judged
