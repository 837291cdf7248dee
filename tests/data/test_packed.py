"""Rows and examples in little memory: what goes in comes out, and memory does not grow by objects."""

from __future__ import annotations

import io
import json
from array import array
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_fixture import byte_tokenizer

from edgezo.data import packed as packed_rows
from edgezo.data.batches import Example, collate
from edgezo.data.dataset import DataRequest, load_dataset
from edgezo.data.json_array import JsonArray
from edgezo.data.packed import CHUNK_ROWS, PackedExamples, PackedRecords, SelectedRecords
from edgezo.data.row_files import Record
from edgezo.data.sources import ReadFor
from edgezo.data.trees import Row
from edgezo.machine.process_memory import ReadingGuard

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def rows(draw: st.DrawFn, words: int) -> Row:
    """A row that predicts tokens of its own at some positions, or a label word at its end."""
    ids = draw(st.lists(st.integers(0, words - 1), min_size=2, max_size=30))
    if draw(st.booleans()):
        return Row(ids, (len(ids) - 1,), ())
    at = sorted(draw(st.sets(st.integers(0, len(ids) - 2), min_size=1)))
    targets = [ids[place + 1] for place in at]
    return Row(ids[:-1] if at[-1] == len(ids) - 2 else ids, at, targets)


def examples_of(words: int) -> st.SearchStrategy[Example]:
    fields = st.none() | st.dictionaries(st.text(), VALUES, max_size=2)
    texts = st.lists(st.text(), max_size=2).map(tuple)
    every = st.lists(rows(words), min_size=1, max_size=3).map(tuple)
    return st.builds(Example, every, st.integers(-1, 200), fields, texts)


def plain(example: Example) -> object:
    every = [tuple(map(list, (row.ids, row.score_at, row.score_ids))) for row in example.rows]
    return every, example.label, example.fields, example.options


@given(st.sampled_from((300, 200_000)).flatmap(lambda n: st.lists(examples_of(n), max_size=12)))
def test_examples_come_out_as_they_went_in_and_are_counted(examples: list[Example]) -> None:
    packed = PackedExamples(examples)
    assert list(map(plain, packed)) == list(map(plain, examples))
    assert packed == PackedExamples.of(packed) == PackedExamples(packed)
    every = [row for example in examples for row in example.rows]
    assert packed.longest_row() == max((len(row.ids) for row in every), default=0)
    used = [token for row in every for token in (*row.ids, *row.score_ids)]
    assert packed.largest_id() == max(used, default=0)
    with_targets = [e for e in examples if all(row.score_at for row in e.rows)]
    prompts = PackedExamples(with_targets).prompt_lengths()
    assert prompts.tolist() == [len(example.prompt) for example in with_targets]
    longest, sizes = packed.longest_row(), (packed.token_counts(), packed.scored_counts())
    with mock.patch.object(packed_rows, "FACTS_ROWS", 3):  # in pieces
        assert packed.longest_row() == longest
        assert np.array_equal(sizes, (packed.token_counts(), packed.scored_counts()))
    batches = [collate([example], [0]) for example in packed]
    tokens = [len(batch.ids) for batch in batches]
    scored = [len(batch.score_index) for batch in batches]
    assert packed.token_counts().tolist() == tokens and packed.scored_counts().tolist() == scored


def test_a_target_that_does_not_follow_its_position_is_refused() -> None:
    with pytest.raises(ValueError, match="targets are not the tokens"):
        PackedExamples([Example((Row((1, 2, 3), (0,), (7,)),), 0)])


@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=20), st.data())
def test_records_come_out_as_they_went_in(
    fields: list[dict[str, object]], data: st.DataObject
) -> None:
    records = [Record(f"rows:{i}", row) for i, row in enumerate(fields * 40)]
    packed = PackedRecords(records)
    assert len(packed) == len(records) and list(packed) == records
    chosen = (
        data.draw(st.lists(st.sampled_from(range(len(records))), max_size=5)) if records else []
    )
    assert list(SelectedRecords(packed, chosen)) == [records[i] for i in chosen]
    assert packed[-1:] == records[-1:]
    with pytest.raises(IndexError):
        packed[len(records)]


@settings(deadline=None)
@given(st.lists(VALUES, max_size=8), st.sampled_from(("", " ", "\n\t ")), st.integers(1, 40))
def test_an_array_is_cut_as_json_cuts_it(values: list[object], space: str, piece: int) -> None:
    text = (
        f"{space}[{space}" + f"{space},{space}".join(map(json.dumps, values)) + f"{space}]{space}"
    )

    class Dripping(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            return super().read(piece)

    elements = JsonArray(Dripping(text), "rows.json", ReadingGuard()).elements()
    assert [json.loads(element) for element in elements] == values


@pytest.mark.parametrize(
    "text", ["", "{}", "[1", "[1,", "[1,]", "[1 2]", "[1] 2", "[,1]", "[1]]", '["a']
)
def test_what_is_no_array_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        list(JsonArray(io.StringIO(text), "rows.json", ReadingGuard()).elements())


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_many_rows_take_a_few_bytes_each(suffix: str, tmp_path: Path) -> None:
    """The memory that a guard sees while 6,000 rows are read does not grow by objects of a kilobyte."""
    import tracemalloc

    rows = [{"text": f"film number {i} was long", "label": i % 2} for i in range(6000)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        file.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = DataRequest(data=str(file), labels="0=bad,1=good")
    tokenizer = byte_tokenizer()
    load_dataset(request, tokenizer)  # what stays in memory after the first time is not of the rows
    tracemalloc.start()
    data = load_dataset(request, tokenizer)
    kept_bytes, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stored_bytes = data.token_stats().stored_bytes
    assert stored_bytes < 150 * len(rows) and kept_bytes < 500_000 + 1.2 * stored_bytes
    assert most_bytes < 3_000_000 + 2 * stored_bytes
    assert len(data.train) + len(data.validation) == len(rows)


def test_rows_that_are_only_evaluated_are_tokenised_alone(tmp_path: Path) -> None:
    for name, count in (("train", 3 * CHUNK_ROWS), ("validation", CHUNK_ROWS)):
        rows = [{"text": f"film {i}", "label": i % 2} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"data": str(tmp_path), "labels": "0=bad,1=good", "eval_limit": 5}
    whole, part = (
        load_dataset(DataRequest(**asked, read_for=ReadFor(training=train)), byte_tokenizer())
        for train in (True, False)
    )
    assert not part.train and len(part.validation) == 5
    assert part.validation == whole.validation and part.label_ids == whole.label_ids


def test_arrays_of_tokens_grow_wider_only_when_they_must() -> None:
    small = PackedExamples([Example((Row(array("i", [1, 65_535]), (1,), ()),), 0)] * 4)
    large = PackedExamples([*small, Example((Row((70_000,), (0,), ()),), 0)])
    assert large.stored_bytes - small.stored_bytes > 2 * 9
    assert [list(e.rows[0].ids) for e in large] == [[1, 65_535]] * 4 + [[70_000]]
    assert np.array_equal(large.token_counts(), [2, 2, 2, 2, 1])
