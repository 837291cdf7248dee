"""Files of rows: formats, parts, shards, data sets of the hub; and messages about files that cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest
from tokenizers_fixture import byte_tokenizer

from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.data.row_files import Problems, find_splits, read_records
from edgezo.errors import UsageError

ROWS = [{"text": f'film, number "{i}"', "label": i % 2} for i in range(6)]
SST2_STYLE = {"template": "{text} All in all it was", "labels": "0=bad,1=good"}


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_as(suffix: str, path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a file in one of the formats."""
    if suffix == "csv":
        lines = ['"{}",{}'.format(r["text"].replace('"', '""'), r["label"]) for r in rows]
        path.write_text("\n".join(["text,label", *lines]), encoding="utf-8-sig")
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)


def load(**asked: Any) -> Dataset:
    return load_dataset(DataRequest(**asked), byte_tokenizer())


def problems(run: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        run()
    return str(caught.value)


# ---------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_folders_and_all_formats_read_the_same(suffix: str, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_as(suffix, tmp_path / f"{name}.{suffix}", ROWS)
    data = load(data=str(tmp_path), **SST2_STYLE)
    assert len(data.train) == len(data.validation) == 6
    text = byte_tokenizer().decode(list(data.train[3].rows[0].ids))
    assert text == 'film, number "3" All in all it was'


def test_a_row_has_the_same_fields_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": "naïve ☃", "label": 1, "answers": ["a", "b"], "none": None}]
    for suffix in ("jsonl", "json", "parquet"):
        write_as(suffix, tmp_path / f"rows.{suffix}", rows)
        faults = Problems()
        (record,) = read_records(tmp_path / f"rows.{suffix}", faults)
        assert dict(record.fields) == rows[0] and not len(faults)


@pytest.mark.parametrize("folder", [".", "data"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shards_are_read_in_order_and_a_missing_one_is_named(
    folder: str, suffix: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    shards = [tmp_path / folder / f"train-0000{n}-of-00003.{suffix}" for n in range(3)]
    for number, shard in enumerate(shards):
        write_as(suffix, shard, ROWS[2 * number : 2 * number + 2])
    write_as(suffix, tmp_path / folder / f"test-00000-of-00001.{suffix}", ROWS[:2])
    data = load(data=str(tmp_path), **SST2_STYLE)
    texts = [byte_tokenizer().decode(list(e.rows[0].ids)) for e in data.train]
    assert texts == [f'film, number "{i}" All in all it was' for i in range(6)]
    assert len(data.validation) == 2 and "test-00000-of-00001" in data.notes[0]
    shards[1].unlink()
    assert "not each of 3 once" in problems(lambda: load(data=str(tmp_path), **SST2_STYLE))


def test_the_only_file_of_a_folder_is_what_is_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "notes.jsonl", ROWS)
    (tmp_path / "README.md").write_text("mine")
    assert find_splits(tmp_path, Problems()) == ([tmp_path / "notes.jsonl"], [])
    write(tmp_path / "other.jsonl", ROWS)
    message = problems(lambda: load(data=str(tmp_path), **SST2_STYLE))
    assert "no train.jsonl" in message and "notes.jsonl, other.jsonl" in message


def test_files_of_other_folders_and_about_the_data_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "data" / "test.jsonl", ROWS)
    assert find_splits(tmp_path, Problems()) == ([tmp_path / "train.jsonl"], [])
    (tmp_path / "train.jsonl").rename(tmp_path / "data" / "train-00000-of-00001-a09b74b3.jsonl")
    write(tmp_path / "test.jsonl", ROWS)
    names = [[file.name for file in part] for part in find_splits(tmp_path, Problems())]
    assert names == [["train-00000-of-00001-a09b74b3.jsonl"], ["test.jsonl"]]
    assert find_splits(tmp_path, Problems())[1][0].parent.name == "data"
    only = tmp_path / "only"
    write(only / "data" / "corpus.jsonl", ROWS)
    (only / "dataset_infos.json").write_text("{}")
    assert find_splits(only, Problems()) == ([only / "data" / "corpus.jsonl"], [])


@pytest.mark.parametrize("text", ["\n[{}, {}]", " [\n {},\n {}\n]\n", "\ufeff{}\n\n{}\n"])
def test_an_array_may_begin_anywhere_and_lines_may_be_empty(text: str, tmp_path: Path) -> None:
    path, faults = tmp_path / "rows.json", Problems()
    path.write_text(text.replace("{}", json.dumps(ROWS[0])), encoding="utf-8")
    assert [dict(record.fields) for record in read_records(path, faults)] == [ROWS[0]] * 2
    assert not len(faults)


def test_parquet_takes_no_memory_of_the_run(tmp_path: Path) -> None:
    write_as("parquet", tmp_path / "rows.parquet", ROWS)
    code = (
        "import sys; from pathlib import Path; from edgezo.data.row_files import Problems, read_records\n"
        f"assert len(list(read_records(Path({str(tmp_path / 'rows.parquet')!r}), Problems()))) == 6\n"
        "assert not [name for name in sys.modules if name.startswith('pyarrow')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------- what is wrong


def test_malformed_lines_are_named_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n' + '{"text": \n' * 7 + "1\n", encoding="utf-8")
    message = problems(lambda: load(data=str(path)))
    assert "rows.jsonl:3" in message and "rows.jsonl:10" in message
    assert "and 2 more (7 in all)" in message


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    def ask(**asked: Any) -> str:
        return problems(lambda: load(**asked))

    assert "--task example" in ask()
    assert "--data-root" in ask(task="sst2")
    assert "no such file" in ask(data=str(tmp_path / "x.jsonl"))
    (tmp_path / "readme.md").write_text("hello")
    assert "it holds: readme.md" in ask(data=str(tmp_path))
    (tmp_path / "readme.html").write_text("hello")
    assert ".jsonl" in ask(data=str(tmp_path / "readme.html"))
    (tmp_path / "e.jsonl").write_text("")
    assert "is empty" in ask(data=str(tmp_path / "e.jsonl"))
    (tmp_path / "l.csv").write_text("text,label\na,1,2\n")
    assert "l.csv:2" in ask(data=str(tmp_path / "l.csv"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n')
    assert "not UTF-8" in ask(data=str(tmp_path / "b.jsonl"))
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n"b"\n]')
    assert "a.json[2]: b" in ask(data=str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n')
    assert "malformed JSON" in ask(data=str(tmp_path / "a.json"))
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    assert "p.parquet: Parquet magic bytes not found" in ask(data=str(tmp_path / "p.parquet"))


def test_reading_parquet_runs_nothing_of_the_folder_that_it_is_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_as("parquet", tmp_path / "rows.parquet", ROWS)
    for name in ("json", "pyarrow"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the folder was run')")
    monkeypatch.chdir(tmp_path)
    assert len(list(read_records(Path("rows.parquet"), Problems()))) == len(ROWS)


def test_bytes_in_parquet_are_text_or_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, faults = tmp_path / "rows.parquet", Problems()
    pq.write_table(pa.table({"text": pa.array(["café".encode()], pa.binary())}), path)
    (record,) = read_records(path, faults)
    assert record.fields["text"] == "café" and not len(faults)
    pq.write_table(pa.table({"text": pa.array([b"\xff"], pa.binary())}), path)
    assert not list(read_records(path, faults)) and len(faults) == 1


def test_parquet_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_as("parquet", tmp_path / "rows.parquet", ROWS)
    (tmp_path / "hidden" / "pyarrow").mkdir(parents=True)
    (tmp_path / "hidden" / "pyarrow" / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    assert "pip install pyarrow" in problems(lambda: load(data=str(tmp_path / "rows.parquet")))


# ------------------------------------------------------------------------------------------- hub


JSON = {"Content-Type": "application/json"}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that its client uses, over real HTTP."""

    repositories: ClassVar[dict[str, dict[str, bytes]]]
    asked: ClassVar[list[str]]
    cut_off: ClassVar[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.asked.append(path)
        for name, files in self.repositories.items():
            commit = hashlib.sha1(name.encode()).hexdigest()
            if path.startswith(f"/api/datasets/{name}/tree/"):
                listed = [
                    {
                        "type": "file",
                        "path": p,
                        "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest(),
                    }
                    for p, data in files.items()
                ]
                return self.answer(json.dumps(listed).encode(), JSON)
            if path.startswith(f"/api/datasets/{name}"):
                siblings = [{"rfilename": file} for file in files]
                about = {"_id": "0", "id": name, "sha": commit, "siblings": siblings}
                about |= {"private": False, "downloads": 0, "likes": 0, "tags": []}
                return self.answer(json.dumps(about).encode(), JSON)
            at = f"/datasets/{name}/resolve/{commit}/"
            if path.startswith(at) and path != self.cut_off and path[len(at) :] in files:
                data = files[path[len(at) :]]
                tag = hashlib.sha256(data).hexdigest()
                return self.answer(data, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def answer(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class EmptyHub(Hub):
        repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
        asked: ClassVar[list[str]] = []
        cut_off = ""

    server = ThreadingHTTPServer(("127.0.0.1", 0), EmptyHub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield EmptyHub
    server.shutdown()
    server.server_close()


def lines_of(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def ask_hub(name: str, cwd: Path, **env: str) -> tuple[int, str]:
    """The texts and notes of a data set, or the error. Runs in a process, because the client reads HF_ENDPOINT once."""
    code = (
        "import json, sys\n"
        "from edgezo.data.dataset import DataRequest, load_dataset\n"
        "from edgezo.errors import UsageError\n"
        "from tokenizers_fixture import byte_tokenizer\n"
        "tokenizer = byte_tokenizer()\n"
        "try:\n"
        "    data = load_dataset(DataRequest(data=sys.argv[1], text_end='no'), tokenizer)\n"
        "except UsageError as error:\n"
        "    sys.exit(str(error))\n"
        "rows = [e.rows[0] for e in (*data.train, *data.validation)]\n"
        "rows = [tokenizer.decode([row.ids[0], *row.score_ids]) for row in rows]\n"
        "print(json.dumps([rows, list(data.notes)]))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def test_a_data_set_of_the_hub_is_fetched_once_and_only_what_is_asked(
    hub: type[Hub], tmp_path: Path
) -> None:
    texts = [{"text": f"line {i}"} for i in range(5)]
    hub.repositories["some/texts"] = {
        "data/train-00000-of-00002.jsonl": lines_of(texts[:2]),
        "data/train-00001-of-00002.jsonl": lines_of(texts[2:4]),
        "data/validation-00000-of-00001.jsonl": lines_of(texts[4:]),
        "other/train.jsonl": lines_of(texts[:1]),
        "load.py": b"raise SystemExit('code of a repository was run')",
    }
    for turn in range(2):
        hub.asked.clear()
        code, output = ask_hub("some/texts", tmp_path)
        assert code == 0, output
        assert json.loads(output)[0] == [row["text"] for row in texts]
        assert bool(hub.asked) == (turn == 0)
        assert not any("agent" in path for path in hub.asked)  # the client's telemetry
    fetched = {file.name for file in (tmp_path / "hf").rglob("*.*") if file.is_file()}
    assert "train-00001-of-00002.jsonl" in fetched
    assert not {"load.py", "train.jsonl"} & fetched
    # A folder of a data set may be named; and files that were fetched are read without a network.
    code, output = ask_hub("some/texts/other", tmp_path)
    assert code == 1 and "one row" in output
    assert ask_hub("some/texts", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")[0] == 0


def test_a_download_that_was_cut_off_is_made_whole(hub: type[Hub], tmp_path: Path) -> None:
    files = {
        "train.jsonl": lines_of([{"text": "a row"}, {"text": "b row"}]),
        "validation.jsonl": lines_of([{"text": "c row"}]),
    }
    hub.repositories["some/pair"] = files
    commit = hashlib.sha1(b"some/pair").hexdigest()
    hub.cut_off = f"/datasets/some/pair/resolve/{commit}/validation.jsonl"
    assert ask_hub("some/pair", tmp_path)[0] != 0
    hub.cut_off = ""
    code, output = ask_hub("some/pair", tmp_path)
    assert code == 0, output
    assert json.loads(output)[0] == ["a row", "b row", "c row"]


def test_a_run_goes_on_with_the_rows_that_were_fetched(hub: type[Hub], tmp_path: Path) -> None:
    rows = lines_of([{"text": "a row"}, {"text": "b row"}])
    hub.repositories["some/rows"] = {"train.jsonl": rows, "odd [name].csv": b"text\nc row\n"}
    code, output = ask_hub("some/rows", tmp_path)
    assert code == 0, output
    # Another program fetches a file of a newer commit: its name is now the branch's.
    (place,) = (tmp_path / "hf" / "hub").glob("datasets--some--rows")
    newer = place / "snapshots" / ("0" * 40)
    newer.mkdir()
    (newer / "README.md").write_text("new")
    (place / "refs" / "main").write_text("0" * 40)
    hub.asked.clear()
    code, output = ask_hub("some/rows", tmp_path)
    assert code == 0, output
    assert sorted(json.loads(output)[0]) == ["a row", "b row"] and not hub.asked
    code, output = ask_hub("other/rows", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1 and "no such file" in output


def test_files_that_another_program_fetched_are_read_without_a_network(
    hub: type[Hub], tmp_path: Path
) -> None:
    hub.repositories["some/rows"] = {"train.jsonl": lines_of([{"text": "a b"}, {"text": "c d"}])}
    assert ask_hub("some/rows", tmp_path)[0] == 0
    for file in (tmp_path / "cache" / "datasets").iterdir():
        file.unlink()
    code, output = ask_hub("some/rows", tmp_path, HF_HUB_OFFLINE="1")
    assert code == 0, output
    assert (
        "HF_HUB_OFFLINE is set; the hub's cache has these files of some/rows: train.jsonl" in output
    )
    code, output = ask_hub("some/rows/other", tmp_path, HF_HUB_OFFLINE="1")
    assert code == 1 and "HF_HUB_OFFLINE is set" in output


def test_what_the_hub_does_not_have_is_named(hub: type[Hub], tmp_path: Path) -> None:
    code, output = ask_hub("no/such", tmp_path)
    assert code != 0 and "no such file or directory: no/such" in output and "hub" in output
    hub.repositories["some/pictures"] = {"a.png": b"", "small/rows.csv": b"text\na row\nb row\n"}
    code, output = ask_hub("some/pictures", tmp_path)
    assert code != 0 and "folders with such files: small" in output
    code, output = ask_hub("some/pictures/small", tmp_path)
    assert code == 0, output
    assert sorted(json.loads(output)[0]) == ["a row", "b row"]
    # What looks like a local path is not looked up in the hub.
    (tmp_path / "here").mkdir()
    hub.asked.clear()
    for name in ("here/rows", "no/such.jsonl", "./no/such", "../no"):
        code, output = ask_hub(name, tmp_path)
        assert code != 0 and "no such file or directory" in output and not hub.asked
