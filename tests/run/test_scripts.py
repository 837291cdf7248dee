"""The scripts for own notes, commands and thumbs: short, on the public API, and they do what they say."""

from __future__ import annotations

import ast
import csv
import mailbox
import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import BAD, GOOD, Bench, write_rows

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")
SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("personalize", "intents", "preferences")


def run_script(name: str, *args: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def small(bench: Bench) -> list[object]:
    return ["--model", bench.model, "--max-mem", "8GB", "--steps", 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_short_uses_what_is_public_and_has_help(name, capsys):
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert len(text.splitlines()) < 80
    assert {module for module in imported if module and module.startswith("edgezo")} == {
        "edgezo",
        "edgezo.errors",
    }
    with pytest.raises(SystemExit) as ended:
        run_script(name, "--help")
    assert ended.value.code == 0 and "--out RUN" in capsys.readouterr().out


def film(number: int, words: list[str]) -> str:
    return (
        f"The film number {number} was {words[number % 4]}, and we talked about it for an evening."
    )


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Notes in files and folders, a message that quotes another one, and a mailbox."""
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    for i in range(12):
        (folder / "deep" / f"{i}.md").write_text(f"# Film\n\n{film(i, GOOD)}\n")
    (folder / "a.txt").write_text("\n\n".join(film(i, BAD) for i in range(60)))
    quoting = (
        f"Subject: film\n\n{film(1, GOOD)}\n> a quoted secret line of another person, long enough\n"
    )
    (folder / "b.eml").write_text(quoting)
    box = mailbox.mbox(folder / "c.mbox")
    box.add(f"From: me\nSubject: film\n\n{film(2, GOOD)}\n")
    box.close()
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


def test_notes_are_learned_and_the_perplexity_is_printed(notes, bench, capsys, tmp_path):
    out = tmp_path / "runs" / "personal"
    run_script("personalize", notes, "--out", out, *small(bench))
    printed = capsys.readouterr().out
    before, after = map(
        float, re.search(r"held-out pieces: ([\d.]+) -> ([\d.]+)", printed).groups()
    )
    assert before > after > 1
    with pytest.raises(SystemExit, match="already holds a run"):
        run_script("personalize", notes, "--out", out, *small(bench))


def test_commands_are_learned_and_what_is_none_is_other(bench, capsys, tmp_path):
    table = tmp_path / "commands.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "intent"])
        for i in range(40):
            intent = ("light_on", "light_off", "other")[i % 3]
            rows.writerow([f"{intent.replace('_', ' ')} please {i}", intent])
    args = (table, "--out", tmp_path / "run", *small(bench))
    run_script("intents", *args, "--sure", 1.1, "--ask", "light on please")
    printed = capsys.readouterr().out
    assert re.search(r"accuracy of \d+ held-out rows: ", printed)
    assert re.search(r"^other\t0\.\d\d\tlight on please$", printed, re.MULTILINE)
    table.write_text("text,intent\nlight on,light_on\n")
    with pytest.raises(SystemExit, match="Add rows of the intent other"):
        run_script("intents", *args)


def test_thumbs_are_learned_and_how_often_the_liked_answer_wins_is_printed(bench, capsys, tmp_path):
    rows = [
        {"prompt": f"film {i}:", "completion": f" {words[i % 4]}", "thumb": thumb}
        for i in range(30)
        for words, thumb in ((GOOD, "up"), (BAD, "down"))
    ]
    args = ("--out", tmp_path / "run", *small(bench))
    run_script("preferences", write_rows(tmp_path / "thumbs.jsonl", rows), *args)
    printed = capsys.readouterr().out
    assert "30 prompts" in printed
    assert re.search(r"is preferred: [\d.]+ -> [\d.]+ of \d+ held-out pairs", printed)
    (tmp_path / "broken.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(SystemExit, match="thumb"):
        run_script("preferences", tmp_path / "broken.jsonl", *args)
