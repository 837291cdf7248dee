"""Notes, mails and chats as people keep them become rows of ``text``: one file, or a folder with folders in it.

    .txt .md .rst .org .tex     a text, in parts; a chat that WhatsApp exported, by its first lines
    .mbox .eml                  a row of each mail (mails.py)
    .json                       a chat that Telegram or Discord exported (chat_exports.py)

Every form is read a piece at a time. Links are not followed, and hidden files are left alone.
"""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import IO, NamedTuple

from edgezo.data import chat_exports, mails
from edgezo.data.row_files import SUFFIXES, Problems, Record, Remarks
from edgezo.data.text_parts import text_parts
from edgezo.machine.foreign import FAULTS, clip, reason
from edgezo.machine.process_memory import Guard

TEXT_ENDINGS = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex")
MAILS = (".mbox", ".eml")
# Files that lie beside data of any form, and say something of it.
_ABOUT_NAMES = ("readme", "license", "licence", "copying", "changelog", "dataset_card")
_READ = "files read as texts to learn"
_START_BYTES = 4096  # by which the form of a file is told
_PIECE_CHARS = 1 << 16
_NO_CHATS = "they are no chats (--speaker)"
_SHOWN_NAMES = 8
_CHECK_FILES = 256  # the guard is asked after so many files
# Marks at the beginning of a text that is not UTF-8.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def note_files(path: Path, remarks: Remarks) -> list[Path]:
    """The files of notes at ``path``, in the order of their names; [] where there are none, or rows of another form.

    A folder with a file of training rows holds no notes, nor does one with other files of rows: texts beside them
    only say what they are.
    """
    if path.is_file():
        return [path] if _is_note(path) else []
    if not path.is_dir():
        return []
    beside = _plain_files(path)
    rows = [f for f in (*beside, *_plain_files(path / "data")) if f.suffix.lower() in SUFFIXES]
    if not all(chat_exports.is_export(_start(file)) for file in rows):
        for file in filter(_is_text_to_learn, beside):
            remarks.add("texts beside files of rows, which are not read", file.name)
        return []
    files = _walked(path, remarks)
    return files if any(map(_is_text_to_learn, files)) else []


def _is_text_to_learn(file: Path) -> bool:
    """Whether a file is a note, and not one that says something of the files beside it."""
    return file.stem.lower() not in _ABOUT_NAMES and _is_note(file)


def _is_note(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix in (*TEXT_ENDINGS, *MAILS):
        return True
    if suffix == ".json":
        return chat_exports.is_export(_start(file))
    return not suffix and mails.is_mailbox(_start(file))


def _start(file: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read, which its reader says."""
    try:
        with file.open("rb") as stream:
            return stream.read(_START_BYTES)
    except OSError:
        return b""


def _plain_files(folder: Path) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.is_file()] if folder.is_dir() else []


def _walked(folder: Path, remarks: Remarks) -> list[Path]:
    """The files below a folder by their names, hidden ones and links left out."""
    files = list[Path]()

    def left_out(problem: OSError) -> None:
        where = _named(Path(problem.filename), folder)
        remarks.add("folders left out, since they cannot be read", where)

    for place, folders, names in os.walk(folder, onerror=left_out):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*names, *folders):
            path = Path(place, name)
            if path.is_symlink():
                remarks.add("links left out: what they lead to is not read", _named(path, folder))
            elif name in names and not name.startswith(".") and path.is_file():
                files.append(path)
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _named(file: Path, root: Path) -> str:
    """How messages name a file: by its path in the folder of notes."""
    return file.name if file == root else file.relative_to(root).as_posix()


# ---------------------------------------------------------------------------------------------
# Reading


def read_notes(
    root: Path, files: Sequence[Path], how: NoteRules, problems: Problems, guard: Guard
) -> Iterator[Record]:
    """The rows of the files. What is no text is left out, and named."""
    n_read, names = 0, Counter[str]()
    for number, file in enumerate(files):
        if number % _CHECK_FILES == 0:
            guard.check(item=str(file))
        name = _named(file, root)
        try:
            note = Note(file, name, how, problems.remarks, guard, names)
            before = n_read
            for record in note.rows():
                n_read += 1
                yield record
            what = _READ if n_read > before else f"files left out, since {note.fault}"
            problems.remarks.add(what, name)
        except FAULTS as error:
            problems.bad_row("a file of notes cannot be read", name, f": {reason(error)}")
    if not n_read and not problems.noted:
        why = "; ".join(problems.remarks.lines())
        if how.speaker is not None:
            written = ", ".join(clip(who, 40) for who, _ in names.most_common(_SHOWN_NAMES))
            why = f"{how.speaker!r} answers nobody in it (--speaker). It has messages of {written or 'nobody'}"
        problems.add(f"no text in {root}: {why or 'its files are empty'}")


class NoteRules(NamedTuple):
    """How notes become rows."""

    most: int  # characters of a row with ``text``
    most_of_turns: int = 1500  # and of one with ``messages``
    speaker: str | None = None  # whose messages of a chat are learned; None: texts are, as wholes


@dataclass
class Note:
    """A file of notes."""

    file: Path
    name: str
    how: NoteRules
    remarks: Remarks
    guard: Guard
    names: Counter[str]  # who wrote messages
    fault: str = "they hold no text"  # why there are no rows

    def rows(self) -> Iterator[Record]:
        """Its rows; none where it is no text, which ``fault`` says."""
        start, suffix = _start(self.file), self.file.suffix.lower()
        boxed = mails.is_mailbox(start)
        if suffix == ".json" and chat_exports.is_export(start):
            with self.file.open(encoding="utf-8-sig") as stream:
                yield from self._chat(chat_exports.of_json(stream, self.name, self.guard))
        elif suffix in MAILS or (not suffix and boxed):
            if self.how.speaker is None:
                with self.file.open("rb") as raw:
                    read = mails.texts(raw, self.name, boxed, self.remarks, self.guard)
                    yield from _parts(read, self.how.most)
            else:
                self.fault = _NO_CHATS
        elif suffix not in (*TEXT_ENDINGS, ""):
            self.fault = f"they are no notes ({suffix})"
        else:
            yield from self._text(start)

    def _text(self, start: bytes) -> Iterator[Record]:
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
        if _is_rows(start):
            self.fault = "they hold rows of JSON: name such a file .jsonl, and give it alone"
        elif (fault := _fault_of(self.file, encoding)) is not None:
            self.fault = fault
        elif chat_exports.is_whatsapp(start.decode(encoding, "ignore")):
            with self.file.open(encoding=encoding) as stream:
                yield from self._chat(chat_exports.of_whatsapp(stream))
        elif self.how.speaker is not None:
            self.fault = _NO_CHATS
        else:
            with self.file.open(encoding=encoding) as stream:
                yield from _text_rows(stream, self.name, self.how.most)

    def _chat(self, messages: Iterator[chat_exports.Message]) -> Iterator[Record]:
        most, most_of_turns, speaker = self.how
        if speaker is None:
            return chat_exports.rows(messages, self.name, most)
        self.fault = f"{speaker!r} answers nobody in them"
        return chat_exports.conversations(messages, self.name, most_of_turns, speaker, self.names)


def _is_rows(start: bytes) -> bool:
    """Whether a text that begins so has an object of JSON as its first line."""
    try:
        return start.lstrip()[:1] == b"{" and isinstance(json.loads(start.splitlines()[0]), dict)
    except ValueError:
        return False


def _fault_of(file: Path, encoding: str) -> str | None:
    """Why a file is no text, looked at as a whole before a row of it is used; None where it is one."""
    try:
        with file.open(encoding=encoding) as stream:
            while piece := stream.read(_PIECE_CHARS):
                if "\0" in piece:
                    return "they are binary"
    except UnicodeDecodeError:
        return "they are not UTF-8 text (save them as UTF-8)"
    return None


def _text_rows(stream: IO[str], name: str, most: int) -> Iterator[Record]:
    """The parts of a text. The end of a text is known in its last part only."""
    waiting: str | None = None
    rest, numbers = "", count(1)

    def record(text: str, number: int, goes_on: bool) -> Record:
        where = name if number == 1 and not goes_on else f"{name} (part {number})"
        return Record(where, {"text": text}, goes_on)

    while piece := stream.read(_PIECE_CHARS):
        *parts, rest = text_parts(rest + piece, most)
        for part in filter(str.strip, parts):
            if waiting is not None:
                yield record(waiting, next(numbers), goes_on=True)
            waiting = part
    if rest.strip():
        if waiting is not None:
            yield record(waiting, next(numbers), goes_on=True)
        waiting = rest
    if waiting is not None:
        yield record(waiting.rstrip("\n"), next(numbers), goes_on=False)


def _parts(records: Iterator[Record], most: int) -> Iterator[Record]:
    """Rows whose texts may be long, in parts."""
    for record in records:
        parts = list(text_parts(record.fields["text"], most))
        for number, part in enumerate(parts, 1):
            where = record.where if len(parts) == 1 else f"{record.where} (part {number})"
            yield replace(record, where=where, fields={"text": part}, goes_on=number < len(parts))
