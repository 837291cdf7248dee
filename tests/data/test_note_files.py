"""Notes, mails and chats as people keep them: which files are read, as what rows, and what is said of the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from tokenizers_fixture import byte_tokenizer

from edgezo.data import mails
from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.data.note_files import NoteRules, note_files, read_notes
from edgezo.data.row_files import Problems, Record, Remarks
from edgezo.errors import UsageError
from edgezo.machine.process_memory import ReadingGuard

MAIL = "From a@b.c Thu Jan  1 00:00:00 2021\nSubject: {}\nContent-Type: {}\n\n{}\n\n"
WHATSAPP = """\
12/31/20, 9:15 PM - Messages and calls are end-to-end encrypted.
12/31/20, 9:15 PM - Ann: hi Bob
are you there?
12/31/20, 9:16 PM - Bob: yes: of course
12/31/20, 9:17 PM - Ann: <Media omitted>
"""
IOS = "[31.12.20, 21:15:03] Ann: hi\n\u200e[31.12.20, 21:15:09] Bob: \u200eimage omitted\n[1.1.21, 0:01:00] Bob: ho\n"
TELEGRAM = {
    "name": "Bob",
    "type": "personal_chat",
    "messages": [
        {"id": 1, "type": "message", "date": "2021-01-01T00:00:00", "from": "Ann", "text": "hi"},
        {"id": 2, "type": "service", "date": "2021-01-01T00:00:00", "actor": "Ann", "text": ""},
        {
            "id": 3,
            "type": "message",
            "from": "Bob",
            "text": ["see ", {"type": "link", "text": "x.org"}],
        },
    ],
}
EVERY_CHAT = {
    "about": "Here is the data you requested. ...",
    "contacts": {"about": "...", "list": [{"first_name": "Cem"}]},
    "chats": {"about": "...", "list": [TELEGRAM]},
}
DISCORD = {
    "guild": {"id": "1", "name": "g"},
    "messages": [
        {
            "id": "7",
            "type": "Default",
            "timestamp": "2021-01-01",
            "content": "hi",
            "author": {"name": "Ann"},
        }
    ],
}
MANY = MAIL.format(
    "=?utf-8?q?Caf=C3=A9?=", "text/plain; charset=utf-8", "Hi\n>From here\n> quoted\nBye"
)
MANY += MAIL.format("page", "text/html", "<p>x</p>") + MAIL.format(
    "two", "text/plain; charset=nope", "naïve"
)


def rows_of(root: Path, speaker: str | None = None) -> tuple[list[Record], str]:
    """The rows of notes and what is said of them."""
    problems = Problems()
    files = note_files(root, problems.remarks)
    rows = list(read_notes(root, files, NoteRules(1000, speaker=speaker), problems, ReadingGuard()))
    problems.raise_any()
    return rows, "\n".join(problems.remarks.lines())


def load(data: Path, **asked: Any) -> Dataset:
    return load_dataset(DataRequest(data=str(data), **asked), byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "naïve ☃\n", ["naïve ☃"]),
        ("a.md", b"\xef\xbb\xbf# A\r\n\r\nb\r\n", ["# A\n\nb"]),
        ("a.txt", "naïve ☃\n".encode("utf-16"), ["naïve ☃"]),
        ("a.txt", WHATSAPP, ["Ann: hi Bob\nare you there?\nBob: yes: of course"]),
        ("a.txt", IOS, ["Ann: hi\nBob: ho"]),
        ("a.json", json.dumps(TELEGRAM, indent=1), ["Ann: hi\nBob: see x.org"]),
        ("a.json", json.dumps(EVERY_CHAT), ["Ann: hi\nBob: see x.org"]),
        ("a.json", json.dumps(DISCORD, indent=2), ["Ann: hi"]),
        ("a.mbox", MANY, ["Café\n\nHi\nFrom here\nBye", "two\n\nnaïve"]),
        ("Inbox", MANY, ["Café\n\nHi\nFrom here\nBye", "two\n\nnaïve"]),
        (
            "a.eml",
            MANY.partition("\n")[2].partition("\n\nFrom ")[0],
            ["Café\n\nHi\nFrom here\nBye"],
        ),
    ],
)
def test_each_form_of_notes_becomes_texts(
    name: str, content: str | bytes, texts: list[str], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    rows, _ = rows_of(file)
    assert [row.fields["text"] for row in rows] == texts
    again, _ = rows_of(tmp_path)  # the folder of one file
    assert [row.fields for row in again] == [row.fields for row in rows]


GROUP = "".join(
    f"[1.1.21, 10:0{i}:00] {who}: {text}\n"
    for i, (who, text) in enumerate(
        [
            ("Ann", "morning"),
            ("Bob", "hi"),
            ("Cem", "ho"),
            ("Ann", "well"),
            ("Ann", "so"),
            ("Bob", "yes"),
        ]
    )
)


def test_the_answers_of_one_speaker_are_turns_of_the_assistant(tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text(GROUP)
    (tmp_path / "result.json").write_text(json.dumps(TELEGRAM, indent=1))
    (tmp_path / "note.md").write_text("a note")
    rows, told = rows_of(tmp_path, speaker="Ann")
    asked = {"role": "user", "content": "Bob: hi\nCem: ho"}
    turns = [
        asked,
        {"role": "assistant", "content": "well\nso"},
        {"role": "user", "content": "yes"},
    ]
    # In a chat of two, names say nothing.
    assert rows[0].fields["messages"][:2] == turns[:2]
    assert "no chats (--speaker): 1, the first in note.md" in told
    rows, _ = rows_of(tmp_path, speaker="Bob")
    telegram = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "see x.org"}]
    assert rows[-1].fields["messages"] == telegram
    data = load(tmp_path, speaker="Bob")
    assert (data.kind, len(data.train), len(data.validation)) == ("completion", 1, 1)
    with pytest.raises(UsageError, match=r"'Zoe' answers nobody.*messages of Ann, Bob, Cem"):
        rows_of(tmp_path, speaker="Zoe")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 3)
    with pytest.raises(UsageError, match="--speaker has no effect"):
        load(tmp_path / "rows.jsonl", speaker="Ann")


def test_a_folder_is_read_below_it_by_name_and_what_is_no_text_is_named(tmp_path: Path) -> None:
    root, outside = tmp_path / "notes", tmp_path / "outside.md"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    outside.write_text("outside")
    for name in ("b.md", "a.md", "sub/c.txt", "sub/deep/d.org", "README.md"):
        (root / name).write_text(name)
    for name in (".hidden.md", ".git/x.md"):
        (root / name).write_text("hidden")
    (root / "empty.txt").write_text(" \n")
    (root / "bin.txt").write_bytes(b"a\0b" * 10)
    (root / "late.txt").write_bytes(b"a" * 100_000 + b"\xff")
    (root / "x.png").write_bytes(b"\x89PNG")
    (root / "rows.txt").write_text('{"text": "a"}\n{"text": "b"}\n')
    (root / "link.md").symlink_to(outside)
    (root / "around").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    rows, told = rows_of(root)
    names = ["README.md", "a.md", "b.md", "sub/c.txt", "sub/deep/d.org"]
    assert [row.where for row in rows] == [row.fields["text"] for row in rows] == names
    for what in (
        *("read as texts to learn: 5", "links left out: what they lead to is not read: 2"),
        *("hold no text: 1, the first in empty.txt", "binary: 1, the first in bin.txt"),
        *("not UTF-8 text (save them as UTF-8): 1, the first in late.txt", "(.png): 1"),
        "rows of JSON: name such a file .jsonl, and give it alone: 1, the first in rows.txt",
    ):
        assert what in told


@pytest.mark.parametrize(
    ("names", "is_notes"),
    [
        (["a.md"], True),
        (["a.md", "x.png", "sub/b.txt"], True),
        (["README.md"], False),
        (["rows.jsonl", "a.md"], False),
        (["rows.json", "a.md"], False),
        (["a.csv", "b.csv", "a.md"], False),
        (["data/train.jsonl", "a.md"], False),
        (["x.png"], False),
        ([], False),
    ],
)
def test_texts_beside_rows_are_no_notes(names: list[str], is_notes: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]" if name.endswith("json") else "a")
    remarks = Remarks()
    assert bool(note_files(tmp_path, remarks)) is is_notes
    beside = not is_notes and "a.md" in names
    assert any("texts beside files of rows" in line for line in remarks.lines()) is beside


def test_nothing_to_read_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it holds: nothing"):
        load(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UsageError, match=r"no text in .*not UTF-8"):
        load(tmp_path)


def test_a_damaged_export_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(TELEGRAM, indent=1)[:-5] + "x")
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(name)
    with pytest.raises(UsageError, match=r"cannot be read:\n  result.json: .*\n.*--skip-bad-rows"):
        load(tmp_path)
    data = load(tmp_path, skip_bad_rows=True)
    assert data.skipped is not None and data.skipped.count == 1


def test_long_notes_come_in_parts_of_which_the_last_ends(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i} " + "of words " * 20 for i in range(60)) + "x" * 5000
    (tmp_path / "a.md").write_text(text)
    rows, _ = rows_of(tmp_path)
    parts = [str(row.fields["text"]) for row in rows]
    assert "".join(parts) == text and max(map(len, parts)) <= 1000
    assert [row.goes_on for row in rows] == [True] * (len(rows) - 1) + [False]
    assert sum(part.startswith("Paragraph") for part in parts) > len(parts) // 2
    assert rows[0].where == "a.md (part 1)"
    data = load(tmp_path, max_length=64)
    end = byte_tokenizer().eos_token_id
    ends = [e.rows[0].score_ids[-1] == end for e in (*data.train, *data.validation)]
    assert sum(ends) == 1


def test_copies_of_notes_are_removed_and_counted(tmp_path: Path) -> None:
    for name in ("a.md", "b.md", "c.txt"):
        (tmp_path / name).write_text("alike")
    (tmp_path / "d.txt").write_text("other")
    data = load(tmp_path)
    assert (len(data.train), len(data.validation)) == (1, 1)
    assert "copies of earlier texts, removed: 2, the first in b.md" in data.notes


class Endless:
    """A mailbox of two mails, the first with a line of many megabytes, made as it is read."""

    def __init__(self, n_pieces: int) -> None:
        self.lines = self._lines(n_pieces)
        self.asked = 0

    def _lines(self, n_pieces: int) -> Iterator[bytes]:
        head, _, body = MAIL.format("long", "text/plain", "first").encode().partition(b"\n\n")
        yield from (line for line in BytesIO(head + b"\n\n" + body.rstrip() + b" "))
        for _ in range(n_pieces):
            yield b"x" * self.asked
        yield b"\n"
        yield b"\n"
        yield from BytesIO(MAIL.format("short", "text/plain", "second").encode())

    def readline(self, size: int) -> bytes:
        self.asked = size
        return next(self.lines, b"")


def test_of_a_mailbox_a_mail_is_held_and_no_more_than_its_first_megabyte() -> None:
    sizes = []

    class Watching(ReadingGuard):
        def check(self, need_bytes: int = 0, item: str = "") -> None:
            sizes.append(need_bytes)

    file: Any = Endless(2000)  # 130 MB
    rows = list(mails.texts(file, "a.mbox", True, Remarks(), Watching()))
    assert [row.fields["text"][:13] for row in rows] == ["long\n\nfirst x", "short\n\nsecond"]
    assert max(sizes) <= mails._MAIL_TIMES * mails.MOST_BYTES
