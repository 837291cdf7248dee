"""Predictions of runs and models: rows without answers get what an evaluation of the same rows gets."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELLED, Bench, make_model, write_rows
from test_runs import run_of

import edgezo as package
from edgezo.data.row_files import Problems, read_records
from edgezo.errors import EdgezoError, UsageError
from edgezo.plan.plan import PlanDoesNotFit
from edgezo.plan.request import make_config
from edgezo.run import predict
from edgezo.run.evaluate import evaluate
from edgezo.run.predict import predictor, use_request
from edgezo.run.session import open_request

pytestmark = pytest.mark.usefixtures("one_thread")

LARGE = {"step": 0.5, "sigma": 0.05}  # so that a few steps move probabilities by more than rounding
KINDS = {
    "label words": {"kind": "label", "train": "lowrank"},
    "exact head": {"kind": "label", "train": "lowrank+head"},
    "linear probe": {"kind": "label", "train": "lowrank+probe"},
    "full": {"kind": "label", "train": "full"},
    "options": {"kind": "choice", "train": "lowrank"},
}


def fields_of(file: Path) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records(file, Problems())]


def validation(bench: Bench, kind: str) -> tuple[Any, list[dict[str, Any]]]:
    """The examples that a run is evaluated on, and the rows that they are of."""
    request = bench.settings(kind)
    dataset = open_request(make_config(request)).dataset
    rows = fields_of(Path(request["data"]))
    texts = {}
    opened = open_request(make_config({**request, "objective": "accuracy"})).dataset
    for example in opened.validation:
        texts[example.fields["text"]] = example
    return dataset, [row for row in rows if row["text"] in texts]


@pytest.mark.parametrize("name", KINDS)
def test_a_run_predicts_what_its_evaluation_counts(
    bench: Bench, edgezo_json: Any, name: str, tmp_path: Path
) -> None:
    request = {**KINDS[name], **LARGE}
    summary = run_of(bench, tmp_path / "run", **request)
    dataset, rows = validation(bench, str(request["kind"]))
    file = write_rows(tmp_path / "rows.jsonl", rows)
    code, made = edgezo_json("predict", tmp_path / "run", "--data", file)
    assert code == 0 and made["rows"] == len(rows) == len(dataset.validation) == made["known"]
    assert made["accuracy"] == summary["eval_after"]["value"]
    names = tuple(made["predictions"][0]["probabilities"])
    assert names == dataset.label_names
    for prediction in made["predictions"]:
        shares = prediction["probabilities"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert prediction["label"] == max(shares, key=shares.__getitem__)
    # Without their labels the rows have the same predictions.
    bare = write_rows(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in rows])
    code, again = edgezo_json("predict", tmp_path / "run", "--data", bare)
    assert code == 0 and "accuracy" not in again
    assert again["predictions"] == made["predictions"]


@pytest.mark.parametrize("name", ["label words", "exact head", "linear probe"])
def test_probabilities_are_those_of_the_losses(bench: Bench, name: str, tmp_path: Path) -> None:
    summary = run_of(bench, tmp_path / "run", **KINDS[name], **LARGE)
    _, rows = validation(bench, "label")
    with package.load(tmp_path / "run") as used:
        shares = [list(p["probabilities"].values()) for p in used.predict(rows)]
    losses = [-torch.tensor(s[row["label"]]).log() for s, row in zip(shares, rows, strict=True)]
    mean = float(torch.stack(losses).mean())
    assert mean == pytest.approx(summary["eval_after"]["loss"], rel=1e-3, abs=1e-5)


def test_a_completion_is_what_an_evaluation_writes(bench: Bench, tmp_path: Path) -> None:
    request = {"kind": "completion", "train": "lowrank", "max_new_tokens": 6, **LARGE}
    run_of(bench, tmp_path / "run", **request)
    cfg = make_config(bench.settings("completion", max_new_tokens=6))
    opened = open_request(cfg)
    rows = [{"prompt": e.fields["prompt"]} for e in opened.dataset.validation]
    evaluated: dict[str, Any] = {}

    def kept(model: Any, dataset: Any, judge: Any) -> dict[str, Any]:
        evaluated["texts"] = judge.texts(model, [0] * len(dataset.validation))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgezo.run.evaluate.evaluate_model", kept)
        saved = make_config(bench.settings("completion", max_new_tokens=6, train="lowrank"))
        evaluate(str(tmp_path / "run"), saved)
    with package.load(tmp_path / "run") as used:
        texts = [p["completion"].split("\n")[0].strip() for p in used.predict(rows)]
        assert texts == [text.strip() for text in evaluated["texts"]]
        # One by one, with keys and values that are kept for one row, the texts are the same.
        alone = [used.generate(row["prompt"]).split("\n")[0].strip() for row in rows[:3]]
        assert alone == texts[:3]


def test_a_conversation_is_answered_after_the_prompt_of_training(
    bench: Bench, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", kind="messages", train="lowrank", **LARGE)
    opened = open_request(make_config(bench.settings("messages", max_new_tokens=4)))
    row = fields_of(bench.data / "messages.jsonl")[0]
    prompts = {
        tuple(e.prompt) for e in open_request(make_config(bench.settings("messages"))).dataset.train
    }
    prompts |= {tuple(e.prompt) for e in opened.dataset.validation}
    with package.load(tmp_path / "run", max_new_tokens=4) as used:
        (asked,) = used.asker.ask([records_of([row])[0]], Problems())
        assert tuple(asked.example.prompt) in prompts
        question = {"messages": row["messages"][:1]}
        first, second = used.predict([row, question])
        assert first["answer"] == second["answer"] == used.generate(row["messages"][:1])


def records_of(rows: list[dict[str, Any]]) -> list[Any]:
    from edgezo.data.row_files import Record

    return [Record(f"row {i}", row) for i, row in enumerate(rows)]


def test_a_text_has_the_score_of_its_loss(bench: Bench, edgezo_json: Any, tmp_path: Path) -> None:
    summary = run_of(bench, tmp_path / "run", kind="text", train="lowrank", **LARGE)
    opened = open_request(make_config(bench.settings("text")))
    texts = [opened.tokenizer.decode(list(e.rows[0].ids)) for e in opened.dataset.validation]
    file = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    code, made = edgezo_json("predict", tmp_path / "run", "--data", file)
    assert code == 0
    scores = [p["score"] for p in made["predictions"]]
    assert -sum(scores) / len(scores) == pytest.approx(summary["eval_after"]["loss"], rel=1e-4)


class Typed:
    """Standard input whose pieces come one by one, and are counted as they are taken."""

    def __init__(self, *pieces: bytes):
        self.pieces, self.taken = list(pieces), 0
        self.buffer = self

    def read1(self, n: int) -> bytes:
        self.taken += 1
        return self.pieces.pop(0) if self.pieces else b""


def test_lines_are_predicted_as_they_come(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgezo.data.asked_rows import of_lines

    run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    typed = Typed(b"a warm film\n", b'{"text": "a co', b'ld film"}\n\nthe last', b" one")
    with package.load(tmp_path / "run") as used:
        problems = Problems()
        stream = used.stream(of_lines(typed, problems, used.guard), problems)
        first = next(stream)
        assert typed.taken == 1, "the first line has its prediction before the second is read"
        rest = list(stream)
        assert [first, *rest] == used_again(used, ["a warm film", "a cold film", "the last one"])


def used_again(used: Any, texts: list[str]) -> list[dict[str, Any]]:
    used.rows = 0
    return list(used.predict(texts))


def test_texts_of_the_command_line_are_rows(
    bench: Bench, edgezo_json: Any, edgezo: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_of(bench, run, train="lowrank")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a film"}, {"text": "two\nlines"}])
    code, wanted = edgezo_json("predict", run, "--data", rows)
    code_, made = edgezo_json("predict", run, "a film", "two\nlines")
    assert code == code_ == 0 and made["predictions"] == wanted["predictions"]
    for given, says in (
        ((), "--data FILE, or texts"),
        (("a film", "--data", rows), "give one of them"),
        (("a film", " "), "text 2 of 2 is empty"),
        ((rows,), f"--data {rows}"),
    ):
        code, _, err = edgezo("predict", run, *given)
        assert code == 2 and says in err, err


def test_rows_that_are_cut_are_counted_and_those_that_a_tight_cap_would_cut_refused(
    bench: Bench, edgezo_json: Any, edgezo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run_of(bench, run, train="lowrank")
    long = "a film that is long " * 20
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": t} for t in ("a film", long, "b", long)])
    code, made = edgezo_json("predict", run, "--data", rows, "--max-length", 32)
    assert code == 0 and made["cut"] == 2 and made["rows"] == 4
    code, _, err = edgezo("predict", run, "--data", rows, "--max-length", 32)
    assert code == 0 and "2 of 4 rows cut to 32 tokens (--max-length)" in err
    assert "cut" not in edgezo_json("predict", run, "--data", rows)[1]

    real, asked = predict.predictor, list[int]()

    @contextmanager
    def within(target: str, cfg: Any, note: Any) -> Iterator[Any]:
        asked.append(cfg.max_length)
        if cfg.max_length > 64:
            raise PlanDoesNotFit(f"{cfg.max_length} tokens", 1, ())
        with real(target, cfg, note) as used:
            yield used

    monkeypatch.setattr(predict, "predictor", within)
    code, out, err = edgezo("predict", run, "--data", rows)
    assert asked == sorted(asked, reverse=True) and asked[-1] == 64
    assert code == 2 and len(out.splitlines()) == 1, "the rows before it have their predictions"
    assert "a row may have 64 tokens" in err and "rows.jsonl:2" in err and "--max-length 64" in err
    code, out, _ = edgezo("predict", run, "a film", "another")
    assert code == 0 and len(out.splitlines()) == 2
    code, _, err = edgezo("predict", run, "a film", "--max-length", 100)
    assert code == 3 and "100 tokens" in err, "what is asked for is not lowered"


def test_rows_longer_than_a_table_of_positions_are_cut_and_no_cap_is_blamed(
    edgezo: Any, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", "opt")
    asked = ("--template", "{text} It was", "--labels", "0=bad,1=good", "--precision", "fp32")
    code, out, err = edgezo("predict", model, "a film that is long " * 40, "a film", *asked)
    assert code == 0 and len(out.splitlines()) == 2, err
    assert "1 of 2 rows cut to" in err and "--max-mem" not in err


def test_standard_input_and_csv(
    bench: Bench, edgezo: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a film\r\nanother\n")))
    code, out, err = edgezo("predict", tmp_path / "run", "--data", "-", "--to", "csv")
    assert code == 0 and "2 rows predicted" in err
    head, *lines = out.splitlines()
    assert head == "row,label,value,p(bad),p(good)" and [line[0] for line in lines] == ["1", "2"]
    code, out, _ = edgezo(
        "predict",
        tmp_path / "run",
        "--data",
        bench.data / "label.jsonl",
        "--out",
        tmp_path / "p.jsonl",
    )
    assert code == 0 and out == ""
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(1, 41))


def test_rows_before_a_wrong_one_have_their_predictions(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"words": "c"}\n{"text": "d"}\n')
    code, out, err = edgezo("predict", tmp_path / "run", "--data", file)
    assert code == 2 and len(out.splitlines()) == 2
    assert "rows.jsonl:3" in err and "'text' is missing" in err
    written = tmp_path / "p.jsonl"
    code, _, _ = edgezo("predict", tmp_path / "run", "--data", file, "--out", written)
    assert code == 2 and not written.exists()


def test_a_plain_model_is_asked_by_template_and_label_words(
    bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    asked = [part for k, v in LABELLED.items() for part in (f"--{k}", v)]
    code, made = edgezo_json("predict", bench.model, "--data", bench.data / "label.jsonl", *asked)
    assert code == 0 and made["rows"] == 40
    code, found = edgezo_json(
        "eval", "--model", bench.model, "--data", bench.data / "label.jsonl", *asked
    )
    assert code == 0
    rows = fields_of(bench.data / "label.jsonl")
    values = [int(prediction["value"]) for prediction in made["predictions"]]
    right = sum(a == row["label"] for a, row in zip(values, rows, strict=True))
    assert right / len(rows) == found["value"] == made["accuracy"]


def test_what_cannot_be_asked_is_refused(bench: Bench, edgezo: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")
    rows = bench.data / "label.jsonl"
    for arguments, why, exit_code in (
        ((tmp_path / "run", "--data", rows, "--labels", "0=a,1=b"), "asked as it was trained", 2),
        ((tmp_path / "run", "--data", tmp_path), "is a directory", 2),
        ((tmp_path / "run", "--data", tmp_path / "none.jsonl"), "no such file", 2),
        ((tmp_path / "none", "--data", rows), "none", 1),
        ((bench.model, "--data", rows, "--template", "{text} It"), "label words", 2),
        ((tmp_path / "run", "--data", rows, "--out", rows), "exists already", 2),
    ):
        code, out, err = edgezo("predict", *arguments)
        assert code in (exit_code, 2) and why in err and out == "", (arguments, err)
    (tmp_path / "run/journal.bin").write_bytes(b"nothing of a journal")
    code, _, err = edgezo("predict", tmp_path / "run", "--data", rows)
    assert code == 1 and "journal.bin" in err


def test_a_run_of_labels_writes_nothing(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank+probe")
    with package.load(tmp_path / "run") as used, pytest.raises(UsageError, match="edgezo predict"):
        used.generate("a film")


def test_the_cap_holds_before_anything_is_loaded(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")
    with pytest.raises(EdgezoError, match="needs at least"):
        package.load(tmp_path / "run", max_mem_bytes=10**6)


def test_a_run_that_has_not_ended_is_said(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")
    (tmp_path / "run/summary.json").unlink()
    notes: list[str] = []
    with predictor(str(tmp_path / "run"), use_request(str(tmp_path / "run"), {}), notes.append):
        assert any("is unfinished: step 3 of 3." in note for note in notes)


def test_every_family_of_forms_is_asked_without_answers(
    bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    tasks: dict[str, tuple[list[dict[str, Any]], str, str]] = {
        "copa": (
            [
                {
                    "premise": f"The sun rose {i} times.",
                    "question": "cause",
                    "choice1": "It was warm",
                    "choice2": "It was cold",
                    "label": i % 2,
                }
                for i in range(12)
            ],
            "label",
            "label",
        ),
        "record": (
            [
                {
                    "passage": f"Ann met Bob {i} times.",
                    "query": "@placeholder was warm",
                    "entities": ["Ann", "Bob", "Cleo"][: 2 + i % 2],
                    "answers": ["Bob"],
                }
                for i in range(12)
            ],
            "answers",
            "answer",
        ),
        "squad": (
            [
                {
                    "context": f"Ann has {i} dogs",
                    "question": "How many?",
                    "answers": {"text": [str(i)], "answer_start": [8]},
                }
                for i in range(12)
            ],
            "answers",
            "completion",
        ),
    }
    for task, (rows, answer, given) in tasks.items():
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        write_rows(folder / "train.jsonl", rows)
        write_rows(folder / "validation.jsonl", rows)
        settings = {"data": None, "template": None, "labels": None, "task": task}
        settings |= {"data_root": str(tmp_path / "data"), "train": "lowrank", **LARGE}
        summary = run_of(bench, tmp_path / task, **settings)
        asked = [{k: v for k, v in row.items() if k != answer} for row in rows]
        file = write_rows(tmp_path / f"{task}.jsonl", asked)
        code, made = edgezo_json("predict", tmp_path / task, "--data", file)
        assert code == 0 and all(given in p for p in made["predictions"]), made
        if task == "copa":
            labels = [int(p["value"]) for p in made["predictions"]]
            right = sum(a == row["label"] for a, row in zip(labels, rows, strict=True))
            assert right / len(rows) == summary["eval_after"]["value"]
        if task == "record":
            right = sum(p["answer"] == "Bob" for p in made["predictions"])
            assert right / len(rows) == summary["eval_after"]["value"]
            assert [len(p["probabilities"]) for p in made["predictions"]] == [2, 3] * 6


@pytest.mark.parametrize("train", ["lowrank+head", "lowrank+probe"])
def test_a_masked_model_predicts_its_mask(
    bench: Bench, train: str, edgezo_json: Any, tmp_path: Path
) -> None:
    padding = {"pad_token_id": 299, "max_position_embeddings": 430}
    masked = replace(bench, model=make_model(tmp_path / "model", "roberta", **padding))
    summary = run_of(masked, tmp_path / "run", train=train, **LARGE)
    _, rows = validation(masked, "label")
    file = write_rows(tmp_path / "rows.jsonl", rows)
    code, made = edgezo_json("predict", tmp_path / "run", "--data", file)
    assert code == 0 and made["accuracy"] == summary["eval_after"]["value"]
