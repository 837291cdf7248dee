"""Rows that tell which answer was liked: how they are read, and that a run learns to prefer those answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from tokenizers_fixture import byte_tokenizer

from edgezo.data.dataset import DataRequest, Dataset, load_dataset, show_batch
from edgezo.errors import UsageError
from edgezo.plan.request import make_config
from edgezo.run.train import finetune

PAIRS = [
    {"prompt": f"Request {i}:", "chosen": "done", "rejected": "I would be delighted"}
    for i in range(12)
]


def thumbs(name: str = "label", up: Any = True, down: Any = False) -> list[dict[str, Any]]:
    rows = []
    for pair in PAIRS:
        rows.append({"prompt": pair["prompt"], "completion": pair["rejected"], name: down})
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], name: up})
    return rows


def load(rows: list[dict[str, Any]], folder: Path, **asked: Any) -> Dataset:
    file = write_rows(folder / "rows.jsonl", rows)
    return load_dataset(DataRequest(data=str(file), **asked), byte_tokenizer())


def texts(data: Dataset) -> set[tuple[str, str, str]]:
    tokenizer, triples = byte_tokenizer(), set()
    for example in (*data.train, *data.validation):
        whole = [tokenizer.decode([*row.ids, row.score_ids[-1]]) for row in example.rows]
        scored = [tokenizer.decode(list(row.score_ids)) for row in example.rows]
        assert example.label == 0 and len(whole) == 2
        prompts = {w[: len(w) - len(s)] for w, s in zip(whole, scored, strict=True)}
        assert len(prompts) == 1
        triples.add((prompts.pop().strip(), scored[0].strip(), scored[1].strip()))
    return triples


def test_a_pair_is_a_choice_between_its_answers_with_their_ends(tmp_path):
    data = load(PAIRS, tmp_path)
    end = byte_tokenizer().eos_token
    expected = {(p["prompt"], p["chosen"] + end, p["rejected"] + end) for p in PAIRS}
    assert data.kind == "choice" and texts(data) == expected
    shown = show_batch(data.train[:1], data, byte_tokenizer())
    assert "chosen" in shown and "option 0" in shown


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("label", True, False),
        ("label", "true", "False"),
        ("label", 1, 0),
        ("thumb", "up", "Down"),
        ("thumb", 1, 0),
        ("thumb", "\N{THUMBS UP SIGN}\ufe0f", "\N{THUMBS DOWN SIGN}"),
        ("label", 1.0, 0.0),
    ],
)
def test_thumbs_on_answers_to_one_prompt_are_pairs(name, up, down, tmp_path):
    data = load(thumbs(name, up, down), tmp_path)
    assert texts(data) == texts(load(PAIRS, tmp_path))
    assert "24 answers with thumbs up or down: 12 pairs" in data.notes


def test_every_answer_meets_one_of_the_other_kind(tmp_path):
    def row(prompt: str, answer: str, liked: bool) -> dict[str, Any]:
        return {"prompt": prompt, "completion": answer, "label": liked}

    rows = [row("a", "x", True), row("a", "y", False), row("a", "z", False)]
    rows += [row("b", "x", True), row("b", "w", True)]  # nothing to compare with
    rows += [row("c", "p", True), row("c", "q", True), row("c", "r", False)]
    data = load(rows, tmp_path)
    end = byte_tokenizer().eos_token
    assert texts(data) == {
        (prompt, liked + end, other + end) for prompt, liked, other in ("axy", "axz", "cpr", "cqr")
    }
    assert any(note.startswith("1 prompts left out") for note in data.notes)


def test_a_completion_with_a_number_for_a_label_is_no_preference(tmp_path):
    rows = [{**row, "label": 1} for row in thumbs("other")]
    assert load(rows, tmp_path).kind == "completion"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*thumbs(), {"prompt": "p", "completion": "c", "label": "perhaps"}], "neither up nor"),
        ([row for row in thumbs() if row["label"]], "nothing to compare"),
        ([*PAIRS, {"prompt": "p", "chosen": "same", "rejected": "same"}], "twice the same"),
        ([*PAIRS, {"prompt": "p", "chosen": "x"}], "'rejected' is missing"),
    ],
)
def test_what_is_no_preference_is_named(rows, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load(rows, tmp_path)


def test_learning_from_thumbs_turns_what_the_model_prefers(bench, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", thumbs())
    settings = bench.settings(
        data=str(file),
        template=None,
        labels=None,
        train="lowrank+head",
        steps=40,
        out=str(tmp_path / "run"),
    )
    liked = finetune(make_config(settings))
    other = [{**row, "label": not row["label"]} for row in thumbs()]
    write_rows(file, other)
    disliked = finetune(make_config(settings | {"out": str(tmp_path / "other")}))
    assert liked["eval_after"]["value"] == disliked["eval_after"]["value"] == 1.0
    assert min(run["eval_before"]["value"] for run in (liked, disliked)) == 0.0


def test_a_thumb_anywhere_makes_every_row_an_answer_that_needs_one(tmp_path):
    rows = thumbs("thumb", "up", "down")
    rows[0]["thumb"] = None
    with pytest.raises(UsageError, match="says neither up nor down"):
        load(rows, tmp_path)


def test_labels_that_do_not_tell_which_answer_was_liked_are_not_used_and_noted(tmp_path):
    classes = [{**row, "label": ("mixed", "fine", "true")[i % 3]} for i, row in enumerate(thumbs())]
    marks = [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2}
        for i, p in enumerate(PAIRS)
    ]
    for rows in (classes, marks):
        data = load(rows, tmp_path)
        assert data.kind == "completion"
        assert any("field 'label' is not used" in note for note in data.notes)
    pictures = [{**row, "thumb": "http://x/a.png", "label": None} for row in thumbs()]
    assert load(pictures, tmp_path).kind == "completion"


def test_a_split_of_pairs_goes_with_one_of_thumbs(tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    write_rows(folder / "train.jsonl", thumbs("thumb", "up", "down"))
    write_rows(folder / "validation.jsonl", PAIRS[:4])
    data = load_dataset(DataRequest(data=str(folder)), byte_tokenizer())
    assert data.kind == "choice" and (len(data.train), len(data.validation)) == (12, 4)


ASKED = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
HELLO, GREETINGS = ({"role": "assistant", "content": text} for text in ("hello", "greetings"))
AGAIN = [HELLO, {"role": "user", "content": "and now?"}]


@pytest.mark.parametrize(
    ("row", "shared"),
    [
        ({"prompt": ASKED, "chosen": [HELLO], "rejected": [GREETINGS]}, ASKED),
        ({"chosen": [*ASKED, HELLO], "rejected": [*ASKED, GREETINGS]}, ASKED),
        ({"prompt": ASKED, "chosen": [*ASKED, HELLO], "rejected": [*ASKED, GREETINGS]}, ASKED),
        ({"prompt": "hi", "chosen": [*ASKED, HELLO], "rejected": [*ASKED, GREETINGS]}, ASKED),
        ({"prompt": "hi", "chosen": [HELLO], "rejected": [GREETINGS]}, ASKED[1:]),
        (
            {"chosen": [*ASKED, *AGAIN, HELLO], "rejected": [*ASKED, *AGAIN, GREETINGS]},
            [*ASKED, *AGAIN],
        ),
    ],
)
def test_pairs_of_turns_are_two_conversations_of_which_the_last_answers_are_scored(
    row, shared, tmp_path
):
    data = load([row] * 4, tmp_path)
    assert data.kind == "choice" and data.label_names == ("chosen", "rejected")
    both = [
        load([{"prompt": shared, "completion": [answer]}] * 4, tmp_path).train[0].rows[0]
        for answer in (HELLO, GREETINGS)
    ]
    assert list(data.train[0].rows) == both


def test_tools_of_a_pair_reach_the_template(tmp_path):
    pair = {
        "prompt": ASKED,
        "chosen": [HELLO],
        "rejected": [GREETINGS],
        "tools": [{"name": "lamp"}],
    }
    notes = load([pair] * 4, tmp_path).notes
    assert any("'tools' the model's chat template does not use" in note for note in notes), notes


def test_a_text_that_two_answers_begin_with_is_their_prompt(tmp_path):
    rows = [
        {"chosen": f"Human: {i}\n\nAssistant: hear", "rejected": f"Human: {i}\n\nAssistant: here"}
        for i in range(4)
    ]
    data = load(rows, tmp_path)
    end = byte_tokenizer().eos_token
    assert texts(data) == {
        (f"Human: {i}\n\nAssistant:", f"hear{end}", f"here{end}") for i in range(4)
    }
    assert any("words that both answers begin with" in note for note in data.notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [*ASKED, HELLO], "rejected": [*ASKED, HELLO]}, "twice the same"),
        ({"chosen": [*ASKED, HELLO], "rejected": ASKED}, "no assistant turn"),
        ({"chosen": [*ASKED, HELLO], "rejected": "greetings"}, "not both lists of turns"),
        ({"chosen": [*ASKED, HELLO], "rejected": ["greetings"]}, "a turn is not"),
    ],
)
def test_turns_that_are_no_pair_are_named_by_row(row, message, tmp_path):
    good = {"chosen": [*ASKED, HELLO], "rejected": [*ASKED, GREETINGS]}
    with pytest.raises(UsageError, match=message) as refused:
        load([good, good, row], tmp_path)
    assert "rows.jsonl:3" in str(refused.value)
