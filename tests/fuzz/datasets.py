"""Data sets of others beyond one file of lines: preferences, folders with splits and shards, Parquet.

Cases and readers as in readers.py.
"""

from __future__ import annotations

import io
import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.cases import TEXTS, Case, damaged, odd, rarely, written
from fuzz.readers import FuzzReader, byte_tokenizer

ROOM_BYTES = 250_000_000  # that the reader's guard gives to a data set


def _load(path: Path, **request: Any) -> bool:
    from edgezo.data.dataset import DataRequest, load_dataset
    from edgezo.machine.process_memory import ReadingGuard, rss_bytes

    guard = ReadingGuard(rss_bytes() + ROOM_BYTES)
    load_dataset(DataRequest(data=str(path), **request), byte_tokenizer(), guard=guard)
    return True


# ---------------------------------------------------------------------------------------------
# Preferences

THUMBS = ("up", "down", "true", "false", 1, 0, True, False, "\U0001f44d", "\U0001f44e\ufe0f", None)


def _preferences(rng: random.Random) -> Case:
    """Pairs, answers with thumbs, and both in one file."""
    name = rng.choice("pairs thumbs both odd many".split())
    field = rng.choice(("thumb", "label"))
    prompts = [rng.choice(TEXTS) or "p" for _ in range(rng.choice((1, 2, 5)))]

    def pair() -> dict[str, Any]:
        return {"prompt": rng.choice(prompts), "chosen": "a", "rejected": rng.choice(("b", "a"))}

    def answer() -> dict[str, Any]:
        thumb = rng.choice(THUMBS) if rng.random() < 0.2 else rng.choice(THUMBS[:2])
        return {"prompt": rng.choice(prompts), "completion": rng.choice("abc"), field: thumb}

    kinds = {"pairs": (pair,), "thumbs": (answer,), "both": (pair, answer)}
    makers = kinds.get(name, (pair, answer))
    count = rarely(rng, 5000, 2, 6, 30) if name == "many" else rng.choice((2, 6, 30))
    rows = [rng.choice(makers)() for _ in range(count)]
    for row in rows if name == "odd" else []:
        if rng.random() < 0.3:
            row[rng.choice(list(row))] = odd(rng)
    lines = [written(rng, row) if name == "odd" else json.dumps(row).encode() for row in rows]
    return f"{name}.jsonl", b"\n".join(lines)


def read_preferences(name: str, data: bytes, folder: Path) -> bool:
    file = folder / "rows.jsonl"
    file.write_bytes(data)
    return _load(file)


# ---------------------------------------------------------------------------------------------
# Folders. A case is a table of files, as JSON

FOLDER_NAMES = (
    *("train.jsonl", "train.csv", "validation.jsonl", "test.json", "dev.jsonl", "data/train.jsonl"),
    *("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "train-00001-of-00003.jsonl"),
    *("train-00000-of-99999999999.jsonl", "train-00000-of-00001-abcdef.jsonl", "readme.md"),
    *("train.jsonl/", "dataset_infos.json", "valid.json", "train-\u0661-of-\u0662.jsonl"),
    *("rows.jsonl", "state.json", "train-" + "9" * 200 + "-of-3.jsonl", "train-0-of-0.jsonl"),
)


def _folders(rng: random.Random) -> Case:
    names = rng.sample(FOLDER_NAMES, rng.choice((0, 1, 2, 3, 5)))
    if rng.random() < 0.5:
        names.append("train.jsonl")
    files = {}
    for name in names:
        rows = [{"text": rng.choice(TEXTS) + " a film"} for _ in range(rng.choice((0, 1, 3)))]
        text = "\n".join(json.dumps(row) for row in rows)
        files[name] = (
            damaged(rng, text.encode()).hex() if rng.random() < 0.2 else text.encode().hex()
        )
    return "folder", json.dumps(files).encode()


def read_folders(name: str, data: bytes, folder: Path) -> bool:
    place = folder / "set"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for file, content in json.loads(data).items():
        path = place / file
        path.parent.mkdir(exist_ok=True)
        if file.endswith("/"):
            path.unlink(missing_ok=True)
            path.mkdir()
        elif not path.is_dir():
            path.write_bytes(bytes.fromhex(content))
    return _load(place)


# ---------------------------------------------------------------------------------------------
# Parquet


@cache
def sound_parquet() -> tuple[bytes, ...]:
    """Files of rows: plain, compressed, nested, of odd types, in several groups, and one that unpacks to 100 times."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    texts = [f"film {i} is good" for i in range(40)]
    tables: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"text": texts}, {"compression": "none"}),
        ({"text": texts, "label": [i % 2 for i in range(40)]}, {"row_group_size": 7}),
        ({"text": texts}, {"compression": "zstd", "use_dictionary": False}),
        ({"messages": [[{"role": "user", "content": t}] for t in texts]}, {}),
        ({"text": [t.encode() for t in texts], "when": [float(i) for i in range(40)]}, {}),
        ({"text": ["x" * 2000] * 500}, {"compression": "gzip"}),
    )
    files = []
    for columns, options in tables:
        out = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), out, **options)
        files.append(out.getvalue())
    return tuple(files)


def _parquet(rng: random.Random) -> Case:
    data = rng.choice(sound_parquet())
    name = rng.choice("sound flip footer footer length torn".split())
    if name == "flip":
        data = damaged(rng, data)
    elif name == "footer":  # the description of the columns, before the last 8 bytes
        size = int.from_bytes(data[-8:-4], "little")
        footer = damaged(rng, data[-8 - size : -8])
        data = data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + data[-4:]
    elif name == "length":
        data = data[:-8] + rng.randbytes(4) + data[-4:]
    elif name == "torn":
        data = data[: rng.randrange(len(data))] + rng.choice(sound_parquet())[-200:]
    return name, data


def read_parquet(name: str, data: bytes, folder: Path) -> bool:
    """As row_files has it, but in a fork."""
    from fuzz.forked import run_forked

    from edgezo.data.row_files import LEAST_PARQUET_BYTES, Problems, _records

    file, problems = folder / "rows.parquet", Problems()
    file.write_bytes(data)
    run_forked("parquet", folder, [str(file), str(LEAST_PARQUET_BYTES)])
    with open(folder / "out", encoding="utf-8") as lines:
        rows = sum(1 for _ in _records(lines, file, problems))
    problems.raise_any()
    return rows >= 0


# ---------------------------------------------------------------------------------------------
# Notes, mails, chats, and conversations of other programs

_MAIL = "From a@b Thu Jan 1 00:00:00 2021\nSubject: {}\nContent-Type: {}\nContent-Transfer-Encoding: {}\n\n{}\n\n"
_NESTED = "multipart/mixed; boundary=B"


def _mailbox(rng: random.Random) -> bytes:
    subjects = ("s", "=?utf-8?q?Caf=C3=A9?=", "=?nope?b?!!?=", "=?utf-8?b?" + "A" * 3000 + "?=")
    kinds = (
        "text/plain",
        "text/plain; charset=utf-16",
        "text/html",
        _NESTED,
        "text/plain; charset=\x7f",
    )
    mails = []
    for _ in range(rng.choice((1, 3, 8))):
        body = rng.choice(TEXTS)
        kind = rng.choice(kinds)
        if kind == _NESTED:
            depth = rarely(rng, 3000, 1, 3, 40)
            body = f"--B\nContent-Type: {_NESTED}\n\n" * depth + "--B\n\nhello\n--B--\n"
        encoding = rng.choice(("8bit", "base64", "quoted-printable", "x-uuencode"))
        mails.append(_MAIL.format(rng.choice(subjects), kind, encoding, body))
    return "".join(mails).encode("utf-8", "surrogatepass")


def _exports(rng: random.Random) -> dict[str, Any]:
    """One object of a messenger's, with messages that may be odd."""

    def message(number: int) -> dict[str, Any]:
        who, text = (
            rng.choice(("Ann", "Bob")),
            rng.choice((rng.choice(TEXTS), ["a", {"text": "b"}])),
        )
        made = {"id": number, "type": "message", "date": "2021-01-01", "from": who, "text": text}
        if rng.random() < 0.2:
            made = {"id": number, "type": "m", "author": {"name": who}, "content": text}
        if rng.random() < 0.2:
            made[rng.choice(list(made)[2:])] = odd(rng)
        return made

    chat = {"name": "x", "messages": [message(i) for i in range(rng.choice((1, 4, 30)))]}
    every = {"about": "Here is the data you requested", "chats": {"list": [chat, odd(rng)]}}
    return rng.choice((chat, every))


def _trees(rng: random.Random) -> bytes:
    """Rows of ChatGPT, Claude and Alpaca."""
    rows = []
    for _ in range(rng.choice((2, 5))):
        said = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["a"]}}
        nodes: dict[str, Any] = {"a": {"parent": rng.choice((None, "b")), "message": said}}
        nodes["b"] = {"parent": "a", "message": odd(rng) if rng.random() < 0.5 else said}
        row: dict[str, Any] = rng.choice(
            (
                {"mapping": nodes, "current_node": "b"},
                {"chat_messages": [{"sender": "human", "text": "a"}, odd(rng)]},
                {"instruction": "a", "input": "b", "output": "c", "history": [["q", "a"]]},
            )
        )
        if rng.random() < 0.4:
            row[rng.choice(list(row))] = odd(rng)
        rows.append(written(rng, row))
    return b"\n".join(rows)


def _notes(rng: random.Random) -> Case:
    name = rng.choice("a.txt b.mbox c.eml d.json e.jsonl Inbox chat.txt".split())
    if name in ("b.mbox", "c.eml", "Inbox"):
        data = _mailbox(rng)
    elif name == "d.json":
        data = written(rng, _exports(rng))
    elif name == "e.jsonl":
        data = _trees(rng)
    elif name == "chat.txt":
        lines = (f"1/{rng.choice((1, 2))}/21, 9:15 PM - {rng.choice(TEXTS)}" for _ in range(20))
        data = "\n".join(f"{line}: {rng.choice(TEXTS)}" for line in lines).encode(
            "utf-8", "replace"
        )
    else:
        data = "\n".join(rng.choice(TEXTS) for _ in range(50)).encode("utf-8", "surrogatepass")
    return name, damaged(rng, data) if rng.random() < 0.4 else data


def read_notes(name: str, data: bytes, folder: Path) -> bool:
    place = folder / "notes"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / name).write_bytes(data)
    if name.endswith(".jsonl"):  # turns, without a template
        from edgezo.data.overview import overview
        from edgezo.data.sources import DataRequest

        return bool(overview(DataRequest(data=str(place / name))))
    for beside in ("y.md", "z.md"):
        (place / beside).write_text(beside)
    speaker = "Ann" if name in ("d.json", "chat.txt") and len(data) % 2 else None
    return _load(place, speaker=speaker, skip_bad_rows=len(data) % 3 == 0)


SETS: dict[str, FuzzReader] = {
    "notes": FuzzReader(_notes, read_notes, 20),
    "preferences": FuzzReader(_preferences, read_preferences, 20),
    "folders": FuzzReader(_folders, read_folders, 20),
    "parquet": FuzzReader(_parquet, read_parquet, 20),
}
