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

from fuzz.readers import TEXTS, Case, FuzzReader, byte_tokenizer, damaged, odd, rarely, written

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


SETS: dict[str, FuzzReader] = {
    "preferences": FuzzReader(_preferences, read_preferences, 20),
    "folders": FuzzReader(_folders, read_folders, 20),
    "parquet": FuzzReader(_parquet, read_parquet, 20),
}
