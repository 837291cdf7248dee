"""Laws of the data path: what is read, what is scored, in which order, and what users see of a bad file."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rows import GOOD_BAD, SST2_STYLE, everything, load, write
from tokenizers_fixture import byte_tokenizer, masked_tokenizer, piece_tokenizer

from edgezo.data.batches import Example, batch_indices, collate, micro_batches
from edgezo.data.dataset import DataRequest, load_dataset
from edgezo.data.sources import ReadFor
from edgezo.data.tasks import EXAMPLE_FOLDER, TASKS
from edgezo.data.trees import Row

quick = settings(max_examples=40, deadline=None)


def targets(row: Row, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(row.score_ids)))


# ----------------------------------------------------------------------------------------- order


@quick
@given(st.integers(1, 60), st.integers(1, 70), st.integers(-5, 2**63), st.integers(0, 10_000))
def test_a_batch_is_a_pure_function_of_seed_and_step(
    n: int, size: int, seed: int, step: int
) -> None:
    first = batch_indices(n, size, seed, step)
    batch_indices(n + 1, size, seed + 1, step + 7)  # other calls between leave no trace
    assert batch_indices(n, size, seed, step) == first
    assert len(first) == size
    assert all(0 <= i < n for i in first)


@quick
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3))
def test_no_row_repeats_within_an_epoch(n: int, size: int, seed: int) -> None:
    epochs = 3
    order = [
        i for step in range(epochs * n // size + 1) for i in batch_indices(n, size, seed, step)
    ]
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_seeds_and_epochs_have_different_orders() -> None:
    orders = {tuple(batch_indices(50, 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_never_changes_between_versions() -> None:
    """A journal records no rows, so this order is part of its format."""
    assert batch_indices(10, 10, 0, 0) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


# --------------------------------------------------------------------------------------- packing

rows_of = st.lists(st.integers(0, 999), min_size=1, max_size=12).flatmap(
    lambda ids: st.builds(
        lambda at, offset: Row(
            tuple(ids), tuple(sorted(at)), tuple(i + offset for i in sorted(at))
        ),
        st.sets(st.integers(0, len(ids) - 1), min_size=1),
        st.integers(1, 5),
    )
)
examples_of = st.builds(
    Example, st.lists(rows_of, min_size=1, max_size=3).map(tuple), st.integers(-1, 2)
)


@quick
@given(st.lists(examples_of, min_size=1, max_size=6))
def test_a_batch_holds_every_row_and_every_target_of_its_examples(examples: list[Example]) -> None:
    examples = [
        replace(example, apart=True) for example in examples
    ]  # of trees: network/test_trees.py
    slots = [3 * k + 1 for k in range(len(examples))]
    batch = collate(examples, slots)
    assert batch.slots == tuple(slots)
    assert batch.labels.tolist() == [e.label for e in examples]
    starts = [sum(batch.lengths[:r]) for r in range(len(batch.lengths) + 1)]
    assert starts[-1] == len(batch.ids)
    rebuilt: list[list[Row]] = [[] for _ in examples]
    options = iter(range(len(batch.option_example)))
    for r, (start, end) in enumerate(pairwise(starts)):
        at = batch.score_index[(batch.score_index >= start) & (batch.score_index < end)]
        tokens = batch.part_token[batch.part_option == next(options)]
        assert not len(tokens) or torch.equal(batch.score_index[batch.score_state[tokens]], at)
        rebuilt[int(batch.row_example[r])].append(
            Row(
                tuple(batch.ids[start:end].tolist()),
                tuple((at - start).tolist()),
                tuple(batch.score_ids[tokens].tolist()),
            )
        )
    assert [tuple(rows) for rows in rebuilt] == [e.rows for e in examples]
    for tensor in (batch.ids, batch.row_example, batch.score_index, batch.score_state):
        assert tensor.dtype == torch.int64


@quick
@given(
    st.lists(examples_of, min_size=1, max_size=20),
    st.integers(1, 7),
    st.none() | st.integers(1, 40),
)
def test_micro_batches_partition_the_group_by_length(
    examples: list[Example], size: int, most: int | None
) -> None:
    parts = micro_batches(examples, size, most)
    if most is not None:
        sums = [sum(examples[slot].tokens for slot in part) for part in parts]
        assert all(n <= most or len(part) == 1 for n, part in zip(sums, parts, strict=True))
    assert sorted(slot for part in parts for slot in part) == list(range(len(examples)))
    assert all(len(part) <= size for part in parts)
    lengths = [examples[slot].tokens for part in parts for slot in part]
    assert lengths == sorted(lengths, reverse=True)


# ------------------------------------------------------------------------------------ recognition


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
def test_label_words_are_the_tokens_that_would_follow_the_prompt(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    data = load(GOOD_BAD, tmp_path, tokenizer, **SST2_STYLE)
    assert (data.kind, data.label_names) == ("label", ("bad", "good"))
    for example in everything(data):
        [row] = example.rows
        assert list(row.score_at) == [len(row.ids) - 1]
        prompt = tokenizer.decode(list(row.ids), skip_special_tokens=True)
        joined = tokenizer(f"{prompt} {data.label_names[example.label]}")["input_ids"]
        assert [*row.ids, data.label_ids[example.label]] == joined


def test_words_of_a_script_without_spaces_get_no_space(tmp_path: Path) -> None:
    data = load(GOOD_BAD, tmp_path, template="{text}:", labels="0=坏,1=好")
    without = byte_tokenizer()("好", add_special_tokens=False)["input_ids"]
    assert data.kind == "choice"  # the first bytes of the two are the same
    assert list(everything(data)[0].whole_rows[1].score_ids) == without


def test_a_label_word_on_a_new_line_gets_no_space(tmp_path: Path) -> None:
    data = load(GOOD_BAD, tmp_path, template="{text}\nAnswer:\n", labels="0=no,1=yes")
    tokenizer = byte_tokenizer()
    assert data.label_ids == tuple(tokenizer(f"\n{word}")["input_ids"][1] for word in ("no", "yes"))


def test_white_space_around_fields_and_at_the_end_of_the_template_is_dropped(
    tmp_path: Path,
) -> None:
    tidy = load([{"text": "a film", "label": i % 2} for i in range(9)], tmp_path, **SST2_STYLE)
    loose = load(
        [{"text": " a film \n", "label": str(i % 2)} for i in range(9)],
        tmp_path,
        template="{text} All in all it was ",
        labels="0 = bad , 1 = good",
    )
    assert loose == tidy


def test_label_strings_are_their_own_words(tmp_path: Path) -> None:
    rows = [
        {"text": f"t{i}", "label": ["play_music", "GetWeather", "alarm"][i % 3]} for i in range(9)
    ]
    data = load(rows, tmp_path)
    assert data.label_names == ("get weather", "alarm", "play music")
    assert any("Label:" in note for note in data.notes)


def test_colliding_first_tokens_become_a_choice_of_whole_words(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = load(GOOD_BAD, tmp_path, template="{text} It was", labels="0=good,1=good fun")
    assert data.kind == "choice"
    assert any("same token" in note for note in data.notes)
    for example in everything(data):
        assert [targets(row, tokenizer) for row in example.whole_rows] == [" good", " good fun"]
        prompt = tokenizer.decode(list(example.rows[0].ids))
        for row, word in zip(example.whole_rows, data.label_names, strict=True):
            joined = tokenizer(f"{prompt} {word}")["input_ids"]
            assert [*row.ids, row.score_ids[-1]] == joined


def test_text_predicts_every_token_after_the_first(tmp_path: Path) -> None:
    data = load([{"text": f"turn the lights on {i}"} for i in range(5)], tmp_path)
    assert data.kind == "text"
    for example in everything(data):
        [row] = example.rows
        assert list(row.score_at) == list(range(len(row.ids)))
        assert list(row.score_ids)[:-1] == list(row.ids)[1:]
        assert example.label == -1


def test_a_start_token_lets_the_first_token_be_predicted(tmp_path: Path) -> None:
    tokenizer = piece_tokenizer()
    data = load([{"text": "music"}, {"text": "weather"}], tmp_path, tokenizer)
    for example in everything(data):
        assert example.rows[0].ids[0] == tokenizer.bos_token_id
        assert example.rows[0].score_at[0] == 0


@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
@pytest.mark.parametrize("gap", [("", ""), (" ", ""), ("", " ")])
def test_completions_and_the_end_token_are_predicted_and_prompts_are_not(
    make: Any, gap: tuple[str, str], tmp_path: Path
) -> None:
    tokenizer = make()
    rows = [{"prompt": "is it good?" + gap[0], "completion": gap[1] + "yes, very"}] * 3
    data = load(rows, tmp_path, tokenizer)
    assert data.kind == "completion"
    [row] = data.train[0].rows
    assert row.score_ids[-1] == tokenizer.eos_token_id
    assert targets(row, tokenizer).strip() == f"yes, very{tokenizer.eos_token}"
    whole = [*row.ids, row.score_ids[-1]]
    assert whole[:-1] == tokenizer("is it good? yes, very")["input_ids"]


def test_assistant_turns_are_predicted_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    turns = [
        ("system", "be kind"),
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "and"),
        ("assistant", "no"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    trailing = [*messages, {"role": "user", "content": "unanswered"}]
    data = load([{"messages": messages}, {"messages": trailing}], tmp_path, tokenizer)
    for example in everything(data):
        assert targets(example.rows[0], tokenizer) == "yes<|im_end|>no<|im_end|>"


def test_a_template_that_numbers_turns_from_the_end_trains_each_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.revindex0 }}{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}answer: {% endif %}"
    )
    messages = [
        {"role": role, "content": content}
        for role, content in [
            ("user", "hi"),
            ("assistant", "yes"),
            ("user", "so"),
            ("assistant", "no"),
        ]
    ]
    data = load([{"messages": messages}] * 2, tmp_path, tokenizer)
    # The template ends no turn with a token; behind the last answer the end token follows.
    assert targets(data.train[0].rows[0], tokenizer) == "yesno<|im_end|>"
    assert any("ends with no token" in note for note in data.notes)


def test_masked_models_score_the_mask(tmp_path: Path) -> None:
    tokenizer = masked_tokenizer()
    asked = {"tokenizer": tokenizer, "masked": True, "labels": "0=bad,1=good"}
    given_mask = load(GOOD_BAD, tmp_path, template="{text} All in all it was {mask} .", **asked)
    appended = load(GOOD_BAD, tmp_path, template="{text} All in all it was", **asked)
    assert given_mask == appended
    for example in everything(given_mask):
        [row] = example.rows
        assert [row.ids[p] for p in row.score_at] == [tokenizer.mask_token_id]
    [row] = given_mask.train[0].rows
    text = tokenizer.decode(list(row.ids), skip_special_tokens=True)
    whole = tokenizer(text.replace(" .", " <mask> ."))["input_ids"]
    assert list(row.ids) == whole
    assert given_mask.label_ids == tuple(
        tokenizer(f"a {w}", add_special_tokens=False)["input_ids"][1] for w in ("bad", "good")
    )


def test_a_causal_model_accepts_a_mask_at_the_end(tmp_path: Path) -> None:
    plain = load(GOOD_BAD, tmp_path, **SST2_STYLE)
    assert (
        load(
            GOOD_BAD, tmp_path, template="{text} All in all it was {mask} .", labels="0=bad,1=good"
        )
        == plain
    )


def test_a_tenth_of_one_file_is_held_out_and_always_the_same(tmp_path: Path) -> None:
    first, second = (load(GOOD_BAD, tmp_path, **SST2_STYLE) for _ in range(2))
    assert first == second
    assert (len(first.train), len(first.validation)) == (18, 2)
    assert not {tuple(e.rows[0].ids) for e in first.train} & {
        tuple(e.rows[0].ids) for e in first.validation
    }
    assert any("2 of 20 rows" in note for note in first.notes)


def test_rows_that_are_evaluated_on_whole_lose_none(tmp_path: Path) -> None:
    whole = load(GOOD_BAD, tmp_path, **SST2_STYLE, read_for=ReadFor(training=False, whole=True))
    assert (len(whole.train), len(whole.validation)) == (0, 20)
    assert any("all 20 rows are evaluated on" in note for note in whole.notes)
    share = load(
        GOOD_BAD, tmp_path, **SST2_STYLE, read_for=ReadFor(training=False, whole=True), held_out=0.2
    )
    assert len(share.validation) == 4


def test_the_evaluation_sample_is_the_same_in_every_run(tmp_path: Path) -> None:
    whole, *limited = (
        load(GOOD_BAD * 5, tmp_path, **SST2_STYLE, eval_limit=limit) for limit in (None, 4, 4)
    )
    assert limited[0] == limited[1]
    assert len(limited[0].validation) == 4
    assert set(map(show, limited[0].validation)) <= set(map(show, whole.validation))


def show(example: Example) -> str:
    return str([list(row.ids) for row in example.rows])


# --------------------------------------------------------------------------------------- cutting


@quick
@given(st.integers(4, 40), st.integers(0, 60), st.integers(1, 60))
def test_cutting_keeps_the_completion_as_long_as_it_fits(
    limit: int, before: int, after: int
) -> None:
    from edgezo.data.encoder import Encoder  # the cut itself, without files
    from edgezo.data.row_kinds import Draft, Piece

    text = "no " * before + "yes " * after
    encoder = Encoder(byte_tokenizer(), limit, masked=False)
    piece = Piece(text, ((3 * before, len(text)),))
    for example in encoder.examples([Draft((piece,))], "training", []):
        [row] = example.rows
        assert len(row.ids) <= limit
        wanted = [t for t, m in zip(*_ids_and_target(text, 3 * before), strict=True) if m]
        kept = list(row.score_ids)
        lost = len(wanted) - len(kept)
        assert kept in (wanted[: len(kept)], wanted[1 : len(kept) + 1])
        assert lost <= (before == 0) or len(row.ids) == limit


def _ids_and_target(text: str, start: int) -> tuple[list[int], list[bool]]:
    encoded = byte_tokenizer()(text, return_offsets_mapping=True)
    return encoded["input_ids"], [end > start for _, end in encoded["offset_mapping"]]


@pytest.mark.parametrize("masked", [False, True])
def test_long_prompts_lose_their_beginning_and_keep_what_is_scored(
    masked: bool, tmp_path: Path
) -> None:
    tokenizer = masked_tokenizer() if masked else byte_tokenizer()
    rows = [{"text": "so " * 100 + str(i), "label": i % 2} for i in range(4)]
    data = load(rows, tmp_path, tokenizer, masked=masked, max_length=16, **SST2_STYLE)
    assert any("3 of 3 training rows cut to 16 tokens" in note for note in data.notes)
    for example in everything(data):
        [row] = example.rows
        assert len(row.ids) == 16
        assert "All in all it was" in tokenizer.decode(list(row.ids))
        if masked:
            assert (row.ids[0], row.ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert row.ids[row.score_at[0]] == tokenizer.mask_token_id


# ---------------------------------------------------------------------------------------- tasks


def test_the_bundled_example_is_balanced_and_its_parts_share_no_sentence() -> None:
    parts = {
        name: list(map(json.loads, (EXAMPLE_FOLDER / f"{name}.jsonl").read_bytes().splitlines()))
        for name in ("train", "validation")
    }
    assert (len(parts["train"]), len(parts["validation"])) == (480, 120)
    for rows, each in ((parts["train"], 48), (parts["validation"], 12)):
        intents = [row["intent"] for row in rows]
        assert {intents.count(i) for i in intents} == {each} and len(set(intents)) == 10
    texts = ["".join(filter(str.isalnum, r["text"].lower())) for p in parts.values() for r in p]
    assert len(set(texts)) == 600
    data = load_dataset(DataRequest(task="example"), byte_tokenizer(2000))
    assert (data.kind, len(set(data.label_names))) == ("label", 10)


def sample_row(name: str, label: int) -> dict[str, Any]:
    """A row with every field that any task reads."""
    fields = (
        "sentence text premise hypothesis question passage choice1 choice2 word "
        "sentence1 sentence2 span1_text span2_text paragraph answer"
    )
    row: dict[str, Any] = dict.fromkeys(fields.split(), "The film was good.")
    row["question"] = ("cause", "effect")[label % 2] if name == "copa" else "is it good"
    return row | {TASKS[name].label_field: label}


# Tasks whose answers are written, or listed in the row, are tested in test_tasks.py.
WITHOUT_LABELS = {name for name, task in TASKS.items() if task.generation or task.options_field}


@pytest.mark.parametrize("name", sorted(set(TASKS) - WITHOUT_LABELS - {"example"}))
def test_every_task_reads_its_rows(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    n_labels = len(task.options) or len((task.labels or "").split(","))
    folder = tmp_path / name
    folder.mkdir()
    for part in ("train", "validation"):
        write(folder / f"{part}.jsonl", [sample_row(name, i % n_labels) for i in range(12)])
    data = load_dataset(DataRequest(task=name, data_root=str(tmp_path)), byte_tokenizer(2000))
    assert len(data.train) == len(data.validation) == 12
    assert len(data.label_names) == n_labels
    assert data.kind == ("choice" if task.options else "label") or "same token" in str(data.notes)


def test_copa_joins_its_sentences_with_because_and_so(tmp_path: Path) -> None:
    (tmp_path / "copa").mkdir()
    common = {"choice1": "The sun rose.", "choice2": "Anna left.", "label": 0}
    rows = [{"premise": "It was dark.", "question": q} | common for q in ("cause", "effect")] * 2
    for part in ("train", "validation"):
        write(tmp_path / "copa" / f"{part}.jsonl", rows)
    tokenizer = byte_tokenizer()
    data = load_dataset(DataRequest(task="copa", data_root=str(tmp_path)), tokenizer)
    texts = [tokenizer.decode([*r.ids, r.score_ids[-1]]) for e in data.train[:2] for r in e.rows]
    assert texts == [
        "It was dark because the sun rose.",
        "It was dark because Anna left.",
        "It was dark so the sun rose.",
        "It was dark so Anna left.",
    ]


def test_template_and_labels_of_the_user_replace_those_of_a_task() -> None:
    asked = DataRequest(task="example", template="Say: {text} It is")
    data = load_dataset(asked, byte_tokenizer(2000))
    text = byte_tokenizer(2000).decode(list(data.train[0].rows[0].ids))
    assert text.startswith("Say: ") and text.endswith(" It is")


# -------------------------------------------------------------------------------------- bad input
