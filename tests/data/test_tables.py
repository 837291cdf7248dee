"""Tables and streams as people have them: separators, quotation marks, blank lines, long cells, pipes, archives."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers_fixture import byte_tokenizer

from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.data.row_files import Problems, find_splits, read_records
from edgezo.data.templates import label_key
from edgezo.errors import BudgetExceeded, UsageError
from edgezo.machine.process_memory import Guard

MB = 1_000_000
ASKED: dict[str, Any] = {"template": "{text} It was", "labels": "0=bad,1=good"}
FIELDS = [{"text": "a film", "label": "0"}, {"text": 'one, "two"; three', "label": "1"}]
TABLE = 'text,label\na film,0\n"one, ""two""; three",1\n'


def rows_of(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, and what is said of them."""
    faults = Problems()
    records = list(read_records(path, faults))
    faults.raise_any()
    return [dict(record.fields) for record in records], faults.remarks.lines()


def refusal(run: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        run()
    return str(caught.value)


def between(separator: str) -> str:
    """The table with something else between its cells."""
    quoted = '"one, ""two""; three"'
    return f"text{separator}label\na film{separator}0\n{quoted}{separator}1\n"


@pytest.mark.parametrize(
    "text",
    [
        TABLE,
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.rstrip(),
        "\n" + TABLE + "\n\n  \n",
        TABLE.replace("text,label", " text , label"),
        between(";"),
        between("\t"),
        between("|"),
        "sep=;\r\n" + between(";"),
        TABLE + ",\n , \n",
    ],
    ids=lambda text: repr(text)[:24],
)
def test_the_rows_of_a_table_do_not_depend_on_how_it_was_saved(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode())
    rows, remarks = rows_of(path)
    assert rows == FIELDS
    assert ("cells are empty: 2" in str(remarks)) == text.endswith(" , \n")
    assert ("cells between" in str(remarks)) == ("," not in text.partition("\na")[0])


def test_a_file_of_tabs_has_commas_in_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.TSV"
    path.write_text("text\tlabel\na, b, c\t0\n")
    assert rows_of(path) == ([{"text": "a, b, c", "label": "0"}], [])


def test_cells_may_have_lines_and_any_length(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "word " * 60_000
    path.write_text(f'text,label\n"one\n\ntwo",0\n{long},1\n"{long}\n{long}",0\n')
    rows, _ = rows_of(path)
    assert [len(row["text"]) for row in rows] == [8, len(long), 2 * len(long) + 1]
    path.write_text('text,label\na film,0\n"not closed,1\nb,0\n' + "c,1\n" * 9)
    message = refusal(lambda: rows_of(path))
    assert "rows.csv:13 (it begins in line 3: is a quotation mark open?)" in message


def test_a_cell_that_goes_on_and_on_is_bounded_by_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"not closed\n' + "word word word\n" * 200_000)
    guard = Guard(20 * MB, 16 * MB, rss=lambda: 10 * MB, trim=lambda: None)
    with pytest.raises(BudgetExceeded, match=r"rows\.csv"):
        list(read_records(path, Problems(), guard))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        *[(v, "1") for v in (1, 1.0, "1", " 1 ", "1.0", "1.", "1.000")],
        *[(v, "-1") for v in (-1, -1.0, "-1.0")],
        *[(v, "true") for v in (True, "True", "TRUE")],
        *[("1.10", "1.10"), ("v1.0", "v1.0"), (1.5, "1.5"), ("01", "01"), (None, None), ([], None)],
    ],
)
def test_one_label_is_one_label_however_it_was_saved(value: Any, key: str | None) -> None:
    assert label_key(value) == key


def test_labels_that_a_table_has_as_floats_are_those_of_the_request(tmp_path: Path) -> None:
    data = []
    for name, labels in (("ints", ("0", "1")), ("floats", ("0.0", "1.0"))):
        path = tmp_path / f"{name}.csv"
        path.write_text("text,label\n" + "".join(f"film {i},{labels[i % 2]}\n" for i in range(6)))
        data.append(load_dataset(DataRequest(data=str(path), **ASKED), byte_tokenizer()))
    named = {**ASKED, "labels": "0.0=bad,1.0=good"}
    data.append(load_dataset(DataRequest(data=str(path), **named), byte_tokenizer()))
    assert data[0] == data[1] == data[2]


# ---------------------------------------------------------------------------------------------
# Names and streams


@pytest.mark.parametrize(
    "name", ["ROWS.CSV", "rows.Json", "rows.JSONL", "rows.ndjson", "Train.Csv"]
)
def test_a_suffix_may_be_in_capitals(name: str, tmp_path: Path) -> None:
    text = TABLE if name.lower().endswith("csv") else "".join(json.dumps(r) + "\n" for r in FIELDS)
    (tmp_path / name).write_text(text)
    for path in (tmp_path / name, tmp_path):
        assert find_splits(path, Problems()) == ([tmp_path / name], [])
    assert rows_of(tmp_path / name)[0] == FIELDS


STREAMS = {
    "JSONL": "".join(json.dumps(row) + "\n" for row in FIELDS),
    "an array": json.dumps(FIELDS, indent=1),
    "a table": TABLE,
    "a table of tabs": "\ufeff" + between("\t"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_pipe_is_read_by_its_first_bytes(kind: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.with.dots"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(STREAMS[kind].encode(),))
    writer.start()
    assert find_splits(pipe, Problems()) == ([pipe], [])
    assert rows_of(pipe)[0] == FIELDS
    writer.join()


@pytest.mark.parametrize("source", ["/dev/stdin", "<(cat rows.jsonl)"])
def test_a_command_reads_what_another_one_writes(source: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(STREAMS["JSONL"])
    code = (
        "import sys; from edgezo.data.dataset import DataRequest, load_dataset\n"
        "from tokenizers_fixture import byte_tokenizer\n"
        "asked = DataRequest(data=sys.argv[1], template='{text} It was', labels='0=bad,1=good')\n"
        "data = load_dataset(asked, byte_tokenizer())\n"
        "print(len(data.train) + len(data.validation))"
    )
    (tmp_path / "read.py").write_text(code)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", f"cat rows.jsonl | {sys.executable} read.py {source}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2\n", done.stderr


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.csv", data)
    return file.getvalue()


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows", "rows.xlsx", "rows.jsonl"])
@pytest.mark.parametrize(
    ("pack", "what"),
    [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (zipped, "zip archive")],
)
def test_an_archive_is_refused_with_the_way_out(
    name: str, pack: Callable[[bytes], bytes], what: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(pack(TABLE.encode()))
    assert what in refusal(lambda: load(path))


def load(path: Path, **asked: Any) -> Dataset:
    return load_dataset(DataRequest(data=str(path), **(ASKED | asked)), byte_tokenizer())


def test_what_cannot_be_read_at_all_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.dat").write_text(TABLE)
    assert ".tsv" in refusal(lambda: load(tmp_path / "rows.dat"))
    (tmp_path / "rows.txt").write_text(TABLE)
    assert "name a table .csv" in refusal(lambda: load(tmp_path / "rows.txt"))
    assert "it is no file and no pipe" in refusal(lambda: load(Path("/dev/zero")))
    (tmp_path / "rows.csv").write_bytes(TABLE.encode("utf-16"))
    assert "not UTF-8" in refusal(lambda: load(tmp_path / "rows.csv"))
    (tmp_path / "rows").write_bytes(b"PAR1....")
    assert "ends in .parquet" in refusal(lambda: load(tmp_path / "rows"))
    (tmp_path / "rows.csv").write_text("text;text;label\na;b;0\n")
    assert "several columns named 'text'" in refusal(lambda: load(tmp_path / "rows.csv"))


def test_objects_of_a_parquet_file_have_the_keys_that_they_were_saved_with(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"tools": [{"name": "sky", "parameters": {"place": {"type": "string"}}}], "n": 1},
        {"tools": [{"name": "sum", "parameters": {"a": {"type": "number"}}}], "n": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.PARQUET")
    assert rows_of(tmp_path / "rows.PARQUET")[0] == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".tsv", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(suffix: str, tmp_path: Path) -> None:
    text = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in FIELDS),
        ".json": json.dumps(FIELDS),
        ".tsv": between("\t"),
        ".csv": TABLE,
    }[suffix]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(("\ufeff" + text).encode())
    assert rows_of(path)[0] == FIELDS


@pytest.mark.parametrize("labels", [(False, True), (0.0, 1.0), ("FALSE", "True"), ("0.0", "1.")])
def test_labels_of_every_type_are_those_of_the_request(
    labels: tuple[object, object], tmp_path: Path
) -> None:
    rows = [{"text": f"film {i}", "label": labels[i % 2]} for i in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "false=bad,true=good" if "alse" in str(labels[0]).lower() else "0=bad,1=good"
    asked = DataRequest(data=str(path), template="{text} It was", labels=words)
    data = load_dataset(asked, byte_tokenizer())
    assert sorted(example.label for example in (*data.train, *data.validation)) == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
