"""Where rows begin and end: tokens that a text has already, texts that learn to stop; and cells that say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from tokenizers_fixture import byte_tokenizer, masked_tokenizer, piece_tokenizer

from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.errors import UsageError

LABELS: dict[str, Any] = {"template": "{text} It was", "labels": "0=bad,1=good"}


def beginning_tokenizer() -> Any:
    """Llama 3 style: bytes, and a begin token that the tokenizer puts before every text."""
    tokenizer = byte_tokenizer()
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    return tokenizer


def load(rows: list[Any], folder: Path, tokenizer: Any = None, **asked: Any) -> Dataset:
    masked = asked.pop("masked", False)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(
        DataRequest(data=str(file), **asked), tokenizer or byte_tokenizer(), masked=masked
    )


def tokens(data: Dataset) -> list[tuple[list[int], list[int], list[int]]]:
    """Ids, places and targets of every row."""
    return [
        (list(row.ids), list(row.score_at), list(row.score_ids))
        for example in (*data.train, *data.validation)
        for row in example.rows
    ]


def said(data: Dataset, what: str) -> bool:
    return any(what in note for note in data.notes)


MAKERS = {"pieces": piece_tokenizer, "bytes": beginning_tokenizer}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("before", ["", "{bos}", " {bos}", "\n{bos}", "{bos}{bos}"])
@pytest.mark.parametrize("after", ["", "{eos}", "{eos}\n", "{eos} "])
@pytest.mark.parametrize("kind", ["text", "completion", "pair"])
def test_a_begin_or_end_token_that_is_there_is_not_doubled(
    make: str, before: str, after: str, kind: str, tmp_path: Path
) -> None:
    tokenizer = MAKERS[make]()
    names = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    before, after = before.format(**names), after.format(**names)
    # Behind a special token the pieces of a text are those of a text that goes on.
    inner = " [x] q"
    row = {
        "text": {"text": f"{before}{inner} a{after}"},
        "completion": {"prompt": f"{before}{inner}", "completion": f" a{after}"},
        "pair": {"prompt": f"{before}{inner}", "chosen": f" a{after}", "rejected": f" b{after}"},
    }[kind]
    for ids, score_at, score_ids in tokens(load([row] * 3, tmp_path, tokenizer)):
        whole = [*ids, score_ids[-1]]
        assert whole.count(tokenizer.bos_token_id) == 1 and whole[0] == tokenizer.bos_token_id
        assert whole.count(tokenizer.eos_token_id) == 1 and whole[-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in score_ids
        assert score_ids == whole[score_at[0] + 1 :]
        if (
            before.startswith(names["bos"])
            and before.count(names["bos"]) == 1
            and after == names["eos"]
        ):
            text = row["text"] if kind == "text" else ""
            assert not text or whole == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", MAKERS)
def test_a_begin_token_inside_is_counted(make: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[make]()
    begin = tokenizer.bos_token
    rows = [{"prompt": "q", "completion": f" {begin}a"}] * 3
    what = f"rows whose answer begins with {begin}, which begins a text: 3"
    assert said(load(rows, tmp_path, tokenizer), what)
    first = [{"prompt": "", "completion": f" {begin}a"}] * 3
    assert not said(load(first, tmp_path, tokenizer), what)


@pytest.mark.parametrize("make", MAKERS)
def test_a_template_may_write_the_begin_token(make: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[make]()
    rows = [{"text": f"a film {i}", "label": i % 2} for i in range(6)]
    template = f" {tokenizer.bos_token} {{text}} It was"
    for max_length in (64, 8):  # a row that is cut keeps it too
        data = load(
            rows,
            tmp_path,
            tokenizer,
            max_length=max_length,
            labels="0=bad,1=good",
            template=template,
        )
        for ids, _, _ in tokens(data):
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_masked_template_may_write_both_ends(tmp_path: Path) -> None:
    rows = [{"text": f"a film {i}", "label": i % 2} for i in range(6)]
    asked = {"tokenizer": masked_tokenizer(), "masked": True, "labels": "0=bad,1=good"}
    plain = load(rows, tmp_path, template="{text} It was {mask} .", **asked)
    written = load(rows, tmp_path, template="<s>{text} It was {mask} .</s>", **asked)
    assert tokens(plain) == tokens(written)


def test_texts_learn_to_stop_unless_told_not_to(tmp_path: Path) -> None:
    tokenizer, rows = byte_tokenizer(), [{"text": f"turn the lights on {i}"} for i in range(4)]
    ending, endless = load(rows, tmp_path), load(rows, tmp_path, text_end="no")
    for (ids, _, score_ids), (ids_without, _, without) in zip(
        tokens(ending), tokens(endless), strict=True
    ):
        assert score_ids == [*without, tokenizer.eos_token_id]
        assert ids == [*ids_without, without[-1]]
    # A text that is cut does not end there.
    cut = load([{"text": "so " * 100}] * 3, tmp_path, max_length=16, row_rules=1)
    assert all(tokenizer.eos_token_id not in score_ids for _, _, score_ids in tokens(cut))
    # What another format ends with is left as it is.
    assert tokens(load([{"text": "a\n"}] * 3, tmp_path))[0][2][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("template", "meant", "times"),
    [
        (r"{text}\nIt was", "{text}\nIt was", 1),
        (r"{text}\n\n\tIt was", "{text}\n\n\tIt was", 2),
        ("{text}\nIt was", "{text}\nIt was", 0),
    ],
)
def test_escaped_new_lines_of_a_shell_are_new_lines(
    template: str, meant: str, times: int, tmp_path: Path
) -> None:
    rows = [{"text": f"a film {i}", "label": i % 2} for i in range(6)]
    data = load(rows, tmp_path, template=template, labels="0=bad,1=good")
    assert tokens(data) == tokens(load(rows, tmp_path, template=meant, labels="0=bad,1=good"))
    assert said(data, rf"\n is read as a new line ({times} times)") == (times > 0)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": float("nan")}, "field 'text' is missing"),
        ({"text": None}, "field 'text' is missing"),
        ({"text": " \n"}, "field 'text' is empty"),
        ({"text": ["a"]}, "is not a text or number"),
        ({"prompt": float("nan"), "completion": "a"}, "field 'prompt' is missing"),
        ({"prompt": "a", "completion": "\t"}, "field 'completion' is empty"),
        ({"prompt": "a", "chosen": float("nan"), "rejected": "b"}, "field 'chosen' is missing"),
    ],
)
def test_rows_with_nothing_to_learn_are_refused_by_row(
    row: dict[str, Any], what: str, tmp_path: Path
) -> None:
    good = dict.fromkeys(row, "a text") | ({"rejected": "b"} if "rejected" in row else {})
    with pytest.raises(UsageError) as caught:
        load([good, row, good], tmp_path)
    assert what in str(caught.value) and "rows.jsonl:2" in str(caught.value)


def test_a_label_that_is_nan_is_missing(tmp_path: Path) -> None:
    rows = [{"text": "a film", "label": value} for value in (0, 1, float("nan"))]
    with pytest.raises(UsageError, match="field 'label' is missing"):
        load(rows, tmp_path, **LABELS)


@pytest.mark.parametrize("cell", ["", "  ", "nan", "NaN", "None", "NULL", "N/A"])
def test_prompts_with_cells_that_say_nothing_are_counted(cell: str, tmp_path: Path) -> None:
    rows = [{"text": "a film", "label": i % 2} for i in range(6)]
    rows[2]["text"] = rows[4]["text"] = cell
    if not cell.strip():
        with pytest.raises(UsageError, match=r"'text' is empty.*\n.*:5\n.*:3\n.*--skip-bad-rows"):
            load(rows, tmp_path, **LABELS)
    data = load(rows, tmp_path, row_rules=1, **LABELS)
    what = f"is the word {cell!r}" if cell.strip() else "is empty"
    assert said(data, f"field 'text' {what}: 2, the first in rows.jsonl:")
    asked = [{"prompt": cell, "completion": "a"}, {"prompt": "q", "completion": "a"}]
    assert said(load(asked, tmp_path), f"field 'prompt' {what}: 1, the first in rows.jsonl:1")


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"text": "a text"}, {}),
        ({"prompt": "q", "completion": "a"}, {}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}),
        ({"text": "a film", "label": 1}, LABELS),
    ],
)
def test_columns_that_nothing_uses_are_counted(
    row: dict[str, Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    rows = [row | {"idx": i, "weight": 0.5, "note": None, "Unnamed: 0": ""} for i in range(5)]
    rows[0] = dict(row)
    data = load(rows, tmp_path, **asked)
    assert said(data, "fields that nothing uses, and their rows: 'idx' (4), 'weight' (4)")
    assert not said(load([row] * 5, tmp_path, **asked), "fields that nothing uses")
    wide = [row | {f"column {i}": i for i in range(100)} for _ in range(3)]
    (note,) = [n for n in load(wide, tmp_path, **asked).notes if "nothing uses" in n]
    assert len(note) < 600 and note.endswith(", ...")
