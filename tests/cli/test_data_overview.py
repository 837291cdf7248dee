"""edgezo data: what is understood of rows, without a model; and bad rows of a run, written down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
NOTE = "# Milk\n\nBuy milk."


def written(folder: Path, name: str, rows: list[Any]) -> Path:
    file = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n")
    return file


CASES: dict[str, tuple[list[Any], tuple[str, ...], str, list[str]]] = {
    "text": ([{"text": f"a b c {i}"} for i in range(10)], (), "text", ["⟦a b c 0⟧"]),
    "completion": (
        [{"prompt": f"q{i}?", "completion": "yes"} for i in range(10)],
        *((), "completion", ["q0?⟦ yes⟧"]),
    ),
    "messages": ([{"messages": TURNS}] * 10, (), "completion", ["user: hi\nassistant: ⟦ho⟧"]),
    "alpaca": (
        [{"instruction": "add", "input": str(i), "output": "3"} for i in range(10)],
        *((), "completion", ["user: add\n\n0\nassistant: ⟦3⟧"]),
    ),
    "labels": (
        [{"text": f"t{i}", "label": ["lost_card", "refund"][i % 2]} for i in range(10)],
        *((), "label", ["t0\nLabel:⟦ lost card⟧"]),
    ),
    "label words": (
        [{"text": f"t{i}", "label": i % 2} for i in range(10)],
        *(("--template", "{text} is", "--labels", "0=bad,1=good"), "label", ["t0 is⟦ bad⟧"]),
    ),
    "pairs": (
        [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(10)],
        *((), "choice", ["q0⟦ a⟧", "q0⟦ b⟧"]),
    ),
}


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_data_is_shown_with_what_is_learned_from_it(
    case: str, with_model: bool, bench: Any, edgezo: Any, edgezo_json: Any, tmp_path: Path
) -> None:
    rows, options, kind, shown = CASES[case]
    file = written(tmp_path, "rows.jsonl", rows)
    model = ("--model", bench.model) if with_model else ()
    code, result = edgezo_json("data", file, *options, *model)
    assert code == 0, result
    assert (result["kind"], result["train"], result["validation"]) == (kind, 9, 1)
    assert ("tokens" in result["lengths"]) is with_model
    for summary in result["lengths"].values():
        numbers = list(summary.values())
        assert list(summary) == ["min", "median", "p95", "max"] and numbers == sorted(numbers)
    assert len(result["examples"]) == 3 and result["examples"][0]["where"] == "rows.jsonl:1"
    if case in ("labels", "label words"):
        assert sum(result["labels"].values()) == 9 and len(result["labels"]) == 2
    pieces = [
        "".join(f"⟦{s['text']}⟧" if s["learned"] else s["text"] for s in piece)
        for piece in result["examples"][0]["pieces"]
    ]
    if with_model:  # a chat template writes conversations otherwise
        assert pieces == shown or case in ("messages", "alpaca")
        return
    assert pieces == shown
    code, page, _ = edgezo("data", file, *options)
    assert code == 0 and "9 to train on, 1 to evaluate on" in page and "⟦" in page


def test_what_is_odd_is_told_and_rows_that_cannot_be_used_are_written(
    edgezo_json: Any, tmp_path: Path
) -> None:
    table = ["text,label,extra", "a,x,1", ",y,1", "b,,1", "c,y,1", "a,x,1", "d", *["e,y,2"] * 3]
    file, out = written(tmp_path, "rows.csv", table), tmp_path / "skipped.jsonl"
    code, result = edgezo_json("data", file, "--out", out)
    assert code == 0, result
    notes = "\n".join(result["notes"])
    for what in (
        *("exact copies of earlier ones, used as they are: 3 of 8", "'extra' (8)"),
        *(
            "cannot be used, skipped: 3",
            "'text' is empty",
            "'label' is empty: a row needs its label",
        ),
        *("the label words are the values of 'label': x, y", "finetune refuses such rows"),
    ):
        assert what in notes
    assert result["skipped"] == 3
    places = [json.loads(line)["where"] for line in out.read_text().splitlines()]
    assert sorted(places) == ["rows.csv:3", "rows.csv:4", "rows.csv:7"]
    assert edgezo_json("data", file, "--out", out)[0] == 2  # it is there now


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "nothing to train on"),
        (("rows.jsonl", "--task", "sst2"), "exclude each other"),
        (("rows.jsonl", "--max-length", "two"), "--max-length"),
        (("nothing.jsonl",), "no such file"),
        (("rows.jsonl",), "does not know how to read such rows"),
    ],
)
def test_what_cannot_be_looked_at_is_a_usage_error(
    arguments: tuple[str, ...], why: str, edgezo: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "rows.jsonl", [{"foo": 1}] * 3)
    code, out, err = edgezo("data", *arguments)
    assert (code, out) == (2, "") and why in err


def test_looking_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(NOTE)
    (tmp_path / "b.txt").write_text("more")
    code = (
        "import sys; from edgezo.cli.main import run\n"
        f"assert run(['data', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "files read as texts to learn: 2" in done.stdout


@pytest.mark.usefixtures("one_thread")
def test_a_run_writes_down_the_rows_that_it_skips_and_goes_on_without_them(
    bench: Any, edgezo_json: Any, tmp_path: Path
) -> None:
    good = [json.loads(line) for line in (bench.data / "text.jsonl").read_text().splitlines()]
    file = written(tmp_path, "rows.jsonl", ["{", *good, {"text": " "}, {"text": "so " * 400}])
    run = tmp_path / "run"
    asked = bench.arguments(kind="text", data=str(file), steps=1, max_length=64, eval_limit=4)
    code, refused = edgezo_json("finetune", *asked, "--out", run)
    assert code == 2 and "--skip-bad-rows" in refused["error"] and not run.exists()
    code, summary = edgezo_json("finetune", *asked, "--skip-bad-rows", "--out", run)
    assert code == 0 and summary["eval_after"]["n"] == 4
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == ["rows.jsonl:1", f"rows.jsonl:{len(good) + 2}"]
    config = (run / "config.toml").read_text()
    assert "skip_bad_rows = true" in config and "row_rules = 2" in config
    assert edgezo_json("finetune", "--resume", "--out", run) == (0, summary)
    # A run from before there were windows has neither setting, and other rows.
    (run / "config.toml").write_text(config.replace("row_rules = 2\n", ""))
    code, refused = edgezo_json("finetune", "--resume", "--out", run)
    assert code != 0 and "other rows" in refused["error"]
