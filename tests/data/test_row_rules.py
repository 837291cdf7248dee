"""Rows as people have them: long texts, bad rows, copies, and rows of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_fixture import byte_tokenizer, piece_tokenizer

from edgezo.data import encoder as encoding
from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.data.encoder import Encoder, parts
from edgezo.data.row_kinds import ALPACA_PROMPTS, Draft, Piece
from edgezo.errors import UsageError

MAKERS = {
    "bytes": byte_tokenizer,
    "pieces": piece_tokenizer,
}  # the second begins texts with a token


def load(folder: Path, rows: list[Any], name: str = "rows.jsonl", **asked: Any) -> Dataset:
    file, tokenizer = folder / name, asked.pop("tokenizer", None)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    return load_dataset(DataRequest(data=str(file), **asked), tokenizer or byte_tokenizer())


def learned(data: Dataset, tokenizer: Any) -> list[str]:
    """What the rows predict, in the order of the file."""
    texts = [
        tokenizer.decode(list(row.score_ids))
        for example in (*data.train, *data.validation)
        for row in example.rows
    ]
    return sorted(texts)


# ---------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("make", MAKERS)
def test_windows_predict_every_token_of_a_text_once(
    make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "ENCODE_CHARS", 700)
    tokenizer = MAKERS[make]()
    word = st.sampled_from(["no ", "yes.\n", "music\n\n", "é☃ ", "weather", "x" * 90])

    @settings(max_examples=25, deadline=None)
    @given(st.lists(word, min_size=1, max_size=200).map("".join), st.integers(8, 40), st.booleans())
    def check(text: str, length: int, ends: bool) -> None:
        encoder, notes = Encoder(tokenizer, length, masked=False), list[str]()
        pieces = list(parts(Piece(text, ((0, len(text)),), ends=ends)))
        assert "".join(piece.text for piece in pieces) == text
        drafts = [Draft((piece,), windows=True, where="a") for piece in pieces]
        rows = [example.rows[0] for example in encoder.examples(drafts, "training", notes)]
        predicted = [token for row in rows for token in row.score_ids]
        wanted = list[int]()
        for piece in pieces:
            ids = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
            ids += [tokenizer.eos_token_id] * piece.ends
            wanted += ids[not encoder.prefix :]
        assert predicted == wanted
        assert all(len(row.ids) <= length for row in rows)
        if len(rows) > 1:
            assert notes[0].startswith(f"1 long training texts cut into {len(rows)} windows")

    check()


def test_windows_are_alike_in_length_and_end_where_a_text_may_be_cut(tmp_path: Path) -> None:
    text = " ".join(f"Sentence number {i} has some words." for i in range(40))
    data = load(tmp_path, [{"text": text}, {"text": "short"}], max_length=100)
    rows = [row for e in (*data.train, *data.validation) for row in e.rows if len(row.ids) > 10]
    texts = [byte_tokenizer().decode(list(row.score_ids)) for row in rows]
    assert len(rows) > 6 and min(len(row.ids) for row in rows) > 60
    assert sum(text.endswith((".", ".<|im_end|>")) for text in texts) > len(texts) // 2


def test_runs_from_before_read_long_texts_as_they_did(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "so " * 100} for i in range(3)]
    before = load(tmp_path, rows, max_length=16, row_rules=1)
    assert (len(before.train), len(before.validation)) == (2, 1)
    assert "2 of 2 training rows cut to 16 tokens (--max-length)" in before.notes
    short = [{"text": f"turn the lights on {i}"} for i in range(5)]
    assert load(tmp_path, short, row_rules=1) == load(tmp_path, short)


def test_an_evaluation_takes_no_more_windows_than_it_may_take_rows(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "so " * 100} for i in range(20)]
    data = load(tmp_path, rows, max_length=16, eval_limit=4)
    assert len(data.validation) == 4
    assert any("evaluated on 4 of" in note and "windows" in note for note in data.notes)


# --------------------------------------------------------------------------------------- bad rows

LABELS = {"template": "{text} It was", "labels": "0=bad,1=good"}
GOOD = [{"text": f"film {i}", "label": i % 2} for i in range(6)]
CASES: dict[str, tuple[list[Any], dict[str, Any], int, str]] = {
    "a line": (["{", *GOOD], LABELS, 1, "malformed JSON"),
    "no object": ([*GOOD, "3", "{}"], LABELS, 2, "not a JSON object"),
    "a blank text": ([{"text": ""}, *[{"text": "a"}] * 3], {}, 1, "field 'text' is empty"),
    "a blank prompt": ([{"text": " ", "label": 1}, *GOOD], LABELS, 1, "so there is no prompt"),
    "a blank label": ([{"text": "a", "label": ""}, *GOOD], LABELS, 1, "field 'label' is empty"),
    "another label": ([{"text": "a", "label": 7}, *GOOD], LABELS, 1, "none of 0, 1"),
    "other keys": ([{"foo": 1}, *[{"text": "a"}] * 3], {}, 1, "'text' is missing"),
    "no answer": (
        [{"messages": []}, *[{"messages": [{"role": "assistant", "content": "a"}]}] * 3],
        {},
        1,
        "not a list of turns",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_rows_are_refused_with_a_way_out_or_skipped_and_written_down(
    case: str, tmp_path: Path
) -> None:
    rows, asked, n_bad, why = CASES[case]
    if case != "other keys":  # the first row says how the others are read
        with pytest.raises(UsageError) as caught:
            load(tmp_path, rows, **asked)
        assert why in str(caught.value) and "leave them out with --skip-bad-rows" in str(
            caught.value
        )
    data = load(tmp_path, rows, skip_bad_rows=True, **asked)
    assert len(data.train) + len(data.validation) == len(rows) - n_bad
    assert data.skipped is not None and data.skipped.count == n_bad
    listed = [json.loads(line) for line in b"".join(data.skipped.lines()).splitlines()]
    assert len(listed) == n_bad and listed[0]["where"].startswith("rows.jsonl:")
    assert why in " ".join(line["why"] for line in listed)
    assert any("cannot be used, skipped" in note for note in data.notes)


def test_a_row_of_a_table_with_too_few_cells_may_be_skipped(tmp_path: Path) -> None:
    table = ["text,label", "a,0", "b", "c,1", "d,0"]
    data = load(tmp_path, table, "rows.csv", skip_bad_rows=True, **LABELS)
    assert data.skipped is not None and b'"row": ["b"]' in b"".join(data.skipped.lines())
    with pytest.raises(UsageError, match=r"no row of .* can be used"):
        load(tmp_path, table[:1] + ["a"] * 3, "rows.csv", skip_bad_rows=True, **LABELS)


# ------------------------------------------------------------------------------- copies and labels


def test_copies_are_counted_and_used_and_the_held_out_rows_and_label_words_are_told(
    tmp_path: Path,
) -> None:
    rows = [{"text": f"t{i % 4}", "label": ["refund", "where_is_it"][i % 2]} for i in range(10)]
    data = load(tmp_path, rows)
    assert len(data.train) + len(data.validation) == 10
    for note in (
        "rows that are exact copies of earlier ones, used as they are: 6 of 10",
        "rows to evaluate on that are training rows too: 1",
        "no validation file: 1 of 10 rows are held out to evaluate on, drawn by chance, the same in every run",
        "no --labels: the label words are the values of 'label': refund, where is it",
    ):
        assert note in data.notes
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    both = load_dataset(DataRequest(data=str(tmp_path)), byte_tokenizer())
    assert "rows to evaluate on that are training rows too: 2" in both.notes


# ------------------------------------------------------------------------------------ other forms

TREE = {
    "title": "t",
    "current_node": "d",
    "mapping": {
        "a": {"parent": None, "message": None},
        "b": {"parent": "a", "message": ["user", "hi"]},
        "x": {"parent": "b", "message": ["assistant", "an answer that was made again"]},
        "c": {"parent": "b", "message": ["assistant", "ho"]},
        "d": {"parent": "c", "message": ["assistant", "and more"]},
    },
}
for _node in TREE["mapping"].values():  # type: ignore[attr-defined]
    if _node["message"]:
        role, said = _node["message"]
        content = {"content_type": "text", "parts": [said]}
        _node["message"] = {"author": {"role": role}, "content": content}
LIST = {
    "name": "t",
    "chat_messages": [{"sender": "human", "text": "hi"}, {"sender": "assistant", "text": "ho"}],
}
ANSWERED = "ho<|im_end|>"


# A row, what is learned of it, and what it is asked.
FOREIGN: list[tuple[dict[str, Any], str, str]] = [
    ({"instruction": "add", "input": "1 2", "output": "ho"}, ANSWERED, "add\n\n1 2"),
    ({"instruction": "add", "input": "", "output": "ho"}, ANSWERED, "add<"),
    (
        {"instruction": "add", "output": "ho", "history": [["q", "a"]]},
        f"a<|im_end|>{ANSWERED}",
        "q<",
    ),
    ({"instruction": "add", "output": "ho", "system": "be kind"}, ANSWERED, "be kind"),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        ANSWERED,
        "hi<",
    ),
    (TREE, "ho\n\nand more<|im_end|>", "hi<"),
    (LIST, ANSWERED, "hi<"),
]


def test_rows_of_other_programs_are_conversations(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = load(tmp_path, [row for row, _, _ in FOREIGN], tokenizer=tokenizer)
    assert learned(data, tokenizer) == sorted(answers for _, answers, _ in FOREIGN)
    rows = [row for example in (*data.train, *data.validation) for row in example.rows]
    texts = [tokenizer.decode(list(row.ids)) for row in rows]
    for _, _, asked in FOREIGN:
        assert any(asked in text for text in texts), asked


def test_instructions_without_a_chat_template_stand_in_alpacas_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    data = load(tmp_path, [row] * 3, tokenizer=tokenizer)
    assert learned(data, tokenizer) == ["3<|im_end|>"] * 3
    [read] = data.train[0].rows
    assert tokenizer.decode(list(read.ids)) == ALPACA_PROMPTS[1].format("add", "1 2") + "3"
    assert any("Alpaca's prompt" in note for note in data.notes)


def test_an_exported_conversation_without_an_answer_is_left_out(tmp_path: Path) -> None:
    unanswered = {**LIST, "chat_messages": LIST["chat_messages"][:1]}
    circle = {**TREE, "mapping": {"d": {"parent": "d", "message": None}}}
    data = load(tmp_path, [*[LIST] * 8, unanswered, circle, {**LIST, "chat_messages": []}])
    assert len(data.train) + len(data.validation) == 8
    assert any("a conversation has no answer: 3" in note for note in data.notes)
