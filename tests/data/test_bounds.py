"""The cap and the clock hold from the first byte: rows, templates and tokenizers are bounded, honest ones unchanged."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers_fixture import byte_tokenizer, masked_tokenizer, piece_tokenizer
from transformers import PreTrainedTokenizerFast

from edgezo.data import encoder as encoding
from edgezo.data import row_files
from edgezo.data.dataset import DataRequest, load_dataset
from edgezo.data.encoder import Encoder
from edgezo.data.row_files import Problems, find_splits, read_records
from edgezo.data.row_kinds import Draft, Piece
from edgezo.errors import BudgetExceeded, DoesNotFit, EdgezoError, UsageError
from edgezo.machine import process_memory
from edgezo.machine.foreign import MOST_DEPTH, parse_json, parse_toml
from edgezo.machine.process_memory import Guard, ReadingGuard, check_cap_kept
from edgezo.plan.request import make_config
from edgezo.run import session
from edgezo.run.train import finetune

MB = 1_000_000
quick = settings(max_examples=40, deadline=None)

# Very long texts

WORDS = st.text(alphabet="ab é☃\U0001f600\n .", max_size=30)
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "pieces": piece_tokenizer,
    "masked": masked_tokenizer,
}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a few hundred characters are very long ones."""
    monkeypatch.setattr(encoding, "WHOLE_CHARS", 64)
    monkeypatch.setattr(encoding, "WHOLE_TIMES", 4)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_part_of_a_long_text_gives_the_row_of_the_whole(make: str) -> None:
    tokenizer = TOKENIZERS[make]()

    @quick
    @given(
        WORDS, st.integers(1, 400), WORDS, st.integers(1, 400), st.integers(8, 40), st.booleans()
    )
    def check(before: str, times: int, after: str, more: int, length: int, labelled: bool) -> None:
        prompt, answer = before * times + "it was", " good" + after * more
        encoder = Encoder(tokenizer, length, masked=make == "masked")
        piece = Piece(prompt + answer, ((len(prompt), len(prompt + answer)),), ends=True)
        if labelled or make == "masked":
            piece = Piece(prompt, after=answer if make == "masked" else None)
        part = encoder.clipped(piece, "rows:1")
        whole = list(encoder.examples([Draft((piece,))], "training", []))
        notes: list[str] = []
        assert list(encoder.examples([Draft((part,))], "training", notes)) == whole
        if part.clipped:
            assert f"1 of 1 training rows cut to {length} tokens (--max-length)" in notes

    check()


@pytest.mark.usefixtures("small_parts")
def test_what_does_not_settle_is_tokenised_whole_or_up_to_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One token for any number of words: no part has as many tokens as a row.
    one = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=one, unk_token="[UNK]", eos_token="x")
    encoder = Encoder(tokenizer, 8, masked=False)
    text = "word " * 200
    piece = Piece(text, ((0, len(text)),))
    assert encoder._row_of(encoder.clipped(piece, "r"), "r") == encoder._row_of(piece, "r")
    monkeypatch.setattr(encoding, "MOST_CHARS", 100)
    # Runs of eight that begin where the part begins, and another token for each rest: no two parts have the same end.
    runs = Tokenizer(models.WordLevel({"a" * n: n for n in range(9)} | {"x": 9}, unk_token="x"))
    runs.pre_tokenizer = pre_tokenizers.Split(Regex("a{8}"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=runs, unk_token="x", eos_token="x")
    part = Encoder(tokenizer, 8, masked=False).clipped(Piece("a" * 100_003), "r")
    assert part.clipped and 100 <= len(part.text) < 1000


class Counting:
    """A tokenizer that notes how long the texts are that it is given."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.most, self.most_together = tokenizer, 0, 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        listed = [texts] if isinstance(texts, str) else texts
        self.most = max(self.most, *map(len, listed))
        if len(listed) > 1:
            self.most_together = max(self.most_together, sum(map(len, listed)))
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("kind", ["text", "completion"])
def test_no_text_of_many_megabytes_reaches_the_tokenizer(kind: str, tmp_path: Path) -> None:
    long = "word " * (100_000 if kind == "text" else 1_000_000)  # all of a text is read
    rows = {"text": {"text": long}, "completion": {"prompt": long, "completion": long}}
    file = tmp_path / "rows.jsonl"
    short = {name: "a film " * 300 for name in rows[kind]}
    file.write_text("".join(json.dumps(row) + "\n" for row in [rows[kind], *[short] * 200]))
    tokenizer = Counting(byte_tokenizer())
    data = load_dataset(DataRequest(data=str(file)), tokenizer)
    assert tokenizer.most <= 4 * encoding.WHOLE_CHARS
    assert tokenizer.most_together <= encoding.ENCODE_CHARS
    assert 500 < max(len(row.ids) for e in data.train for row in e.rows) <= 512
    told = {"text": "windows of up to 512 tokens", "completion": "rows cut to 512 tokens"}[kind]
    assert any(told in note for note in data.notes)


def test_a_rule_that_never_ends_and_one_that_fails_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stuck(Counting):
        ready = False

        def __call__(self, texts: Any, **options: Any) -> Any:
            if self.ready:
                released.wait()
            return super().__call__(texts, **options)

    released, clock = threading.Event(), iter(range(0, 10_000, 30))
    tokenizer = Stuck(byte_tokenizer())
    encoder = Encoder(tokenizer, 16, masked=False)
    tokenizer.ready = True
    monkeypatch.setattr(encoding.time, "process_time", lambda: next(clock))
    with pytest.raises(EdgezoError, match="rows:7 on takes more than 20 s of processor time"):
        list(encoder.ids(["a"], wheres=["rows:7"]))
    released.set()
    monkeypatch.undo()
    # Oniguruma gives up, and the library panics: no Exception.
    hard = Tokenizer(models.BPE({"a": 0, "b": 1}, merges=[]))
    hard.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=hard, eos_token="b")
    with pytest.raises(EdgezoError, match=r"tokenizer fails .*rows:8"):
        list(Encoder(fast, 16, masked=False).ids(["a" * 40 + "xb"], wheres=["rows:8"]))


# ---------------------------------------------------------------------------------------------
# Memory


class Rising:
    """Resident memory that grows at every look."""

    def __init__(self, by_bytes: int) -> None:
        self.now_bytes, self.by_bytes = 100 * MB, by_bytes

    def __call__(self) -> int:
        self.now_bytes += self.by_bytes
        return self.now_bytes


def test_reading_ends_at_the_cap_with_the_row_and_what_would_be_enough(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a film"}\n' * 5000)
    guard = ReadingGuard(400 * MB, rss=Rising(80 * MB), trim=lambda: None)
    with pytest.raises(DoesNotFit, match=r"rows\.jsonl:\d+ is being read, .* --max-mem 400\.0 MB"):
        list(read_records(file, Problems(), guard))


@pytest.mark.parametrize(
    "text",
    ["[" + "[]," * 400_000 + "0]", json.dumps({"text": "x" * 3_000_000}), "x," * 1_500_000],
    ids=["lists", "a text", "cells"],
)
def test_a_line_is_refused_before_it_is_parsed_where_its_values_have_no_room(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = "csv" if text.startswith("x,") else "jsonl"
    file = tmp_path / f"rows.{suffix}"
    file.write_text(text + "\n")
    monkeypatch.setattr(row_files, "parse_json", lambda text: pytest.fail("it was parsed"))
    # Resident memory does not matter here: no room at all is left.
    guard = Guard(20 * MB, 16 * MB, rss=lambda: 2 * MB, trim=lambda: None)
    with pytest.raises(BudgetExceeded, match=rf"rows\.{suffix}:1"):
        list(read_records(file, Problems(), guard))


def test_a_cap_below_what_the_process_holds_is_the_planners_to_refuse() -> None:
    ReadingGuard(1, rss=lambda: 500 * MB).check(item="a row")
    with pytest.raises(DoesNotFit, match="Nothing was started"):
        ReadingGuard(1, rss=lambda: 500 * MB, trim=lambda: None).check(200 * MB, "a row")


def test_a_cap_that_was_not_kept_is_an_error_at_the_end() -> None:
    check_cap_kept(100 * MB, 100 * MB, 0, "The run is complete")
    check_cap_kept(100 * MB, 300 * MB, 300 * MB, "The run is complete")  # from before the run
    with pytest.raises(BudgetExceeded, match=r"complete, but the peak of memory was 101\.0 MB"):
        check_cap_kept(100 * MB, 101 * MB, 50 * MB, "The run is complete")


@pytest.fixture
def peak_at_the_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process is over any cap when its work is done, and not before."""
    kept = session.keep_cap

    def keep_cap(planned: Any, memory: Any, done: str) -> None:
        if done != "Nothing was started":
            memory.peak_bytes = lambda: planned.plan.max_mem_bytes + 1 + 10**12
        kept(planned, memory, done)

    # What imports it comes first: a module that is imported here for the first time must find the real one.
    for place in ("edgezo.run.train", "edgezo.run.evaluate", "edgezo.run.session"):
        monkeypatch.setattr(f"{place}.keep_cap", keep_cap)
    yield


@pytest.mark.usefixtures("peak_at_the_end")
def test_no_command_that_went_over_its_cap_ends_with_0(
    bench: Bench, edgezo: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, _, err = edgezo("finetune", *bench.arguments(steps=1, out=run))
    assert code == 4 and f"The run is complete in {run}, but the peak" in err
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    for command in (
        ("eval", "--model", run),
        ("replay", run, "--out", tmp_path / "replayed"),
        ("export", run, "--out", tmp_path / "exported"),
    ):
        code, _, err = edgezo(*command)
        assert code == 4 and "the peak of memory was" in err, command


def test_a_peak_before_loading_ends_before_anything_is_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgezo.machine.gpu_memory.peak_rss_bytes", lambda: 10**13)
    with pytest.raises(BudgetExceeded, match="Nothing was started"):
        finetune(make_config(bench.settings(steps=1, out=str(tmp_path / "run"))))
    assert process_memory.peak_rss_bytes() < 10**13


# ---------------------------------------------------------------------------------------------
# Files of rows


def problems_of(file: Path) -> str:
    problems = Problems()
    list(read_records(file, problems))
    with pytest.raises(UsageError) as caught:
        problems.raise_any()
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "text": "b"}', "rows.jsonl:1: the key 'text' occurs twice"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
        ('{"text": "\\ud83d"}', "half a character (\\ud83d"),
        ('{"\\udc00": 1}', "half a character"),
        ("[" * 100_000, f"nested more than {MOST_DEPTH} deep"),
        ('{"a":' * 500 + "1" + "}" * 500, f"nested more than {MOST_DEPTH} deep"),
        ("1" * 100_000, "4300 digits"),
        ("{}", "a row without fields"),
        ("[1, 2]", "not a JSON object"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content + "\n")
    text = problems_of(file)
    assert message in text and len(text) < 1000


def test_columns_of_one_name_are_refused_by_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows.csv").write_text("text,label,text\na,b,c\n")
    assert "several columns named 'text' (text, label, text)" in problems_of(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("text,,\na,b,c\n")
    assert "several columns named ''" in problems_of(tmp_path / "rows.csv")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "several columns named 'text'" in problems_of(tmp_path / "rows.parquet")


def test_a_key_that_occurs_twice_is_looked_for_once_among_the_others() -> None:
    """Counting each would take minutes."""
    keys = [f'"{number}":0' for number in range(100_000)]
    with pytest.raises(ValueError, match="'99999' occurs twice"):
        parse_json("{" + ",".join([*keys, keys[-1]]) + "}")


def test_shards_are_counted_not_listed_as_their_names_have_them(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-99999999999.jsonl").write_text('{"text": "a"}\n')
    problems = Problems()
    find_splits(tmp_path, problems)
    with pytest.raises(UsageError, match="1 shards of train, not each of 99999999999 once"):
        problems.raise_any()


@pytest.mark.parametrize("name", ["a", "<|im_end|>"])
def test_a_token_with_a_number_beyond_any_vocabulary_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoding, "MOST_ID", 10_000
    )  # transformers takes 4 bytes for each number below
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a a"}\n{"text": "a a"}\n')
    values = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    values["model"]["vocab"][name] = 10_001
    for token in values["added_tokens"]:
        token["id"] = 10_001 if token["content"] == name else token["id"]
    changed = Tokenizer.from_str(json.dumps(values))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=changed, eos_token="<|im_end|>")
    with pytest.raises(EdgezoError, match="the number 10,001, and no vocabulary"):
        load_dataset(DataRequest(data=str(rows)), tokenizer)


def test_of_a_long_text_only_the_tokens_that_bound_its_row_are_looked_at() -> None:
    looked = []

    class Offsets(list[tuple[int, int]]):
        def __getitem__(self, place):  # type: ignore[no-untyped-def]
            looked.append(place)
            return super().__getitem__(place)

    tokens = 10_000
    offsets = Offsets((i, i + 1) for i in range(tokens))
    encoder = Encoder(byte_tokenizer(), 16, False)
    row, cut = encoder._span_row(Piece("x" * tokens, ((1, tokens),)), [5] * tokens, offsets)
    assert cut and len(row.ids) == 16 and len(looked) < 100


def test_whole_pairs_and_equal_keys_in_several_objects_are_read() -> None:
    text = '{"a": "\\ud83d\\ude00", "b": [{"a": 1}, {"a": 2}], "c": "\\\\ud83d \\" \\\\"}'
    assert parse_json(text) == {"a": "\U0001f600", "b": [{"a": 1}, {"a": 2}], "c": '\\ud83d " \\'}


@quick
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=6),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=8,
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_json_is_read_as_json_reads_it_and_a_key_that_is_repeated_is_seen(
    value: dict[str, Any], ascii_only: bool
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text) == value
    if value:
        key = next(iter(value))
        again = text[:-1] + f", {json.dumps(key, ensure_ascii=ascii_only)}: 0" + "}"
        with pytest.raises(ValueError, match="occurs twice"):
            parse_json(again)


@pytest.mark.parametrize("row", ["x", "{}", "[]", '{"a": 1, "a": 2}'])
def test_a_file_in_which_every_row_is_wrong_is_not_read_to_its_end(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, parsed = tmp_path / "rows.jsonl", 0
    file.write_text(f"{row}\n" * 50_000)
    real = row_files.parse_json

    def counted(text: str) -> Any:
        nonlocal parsed
        parsed += 1
        return real(text)

    monkeypatch.setattr(row_files, "parse_json", counted)
    with pytest.raises(UsageError, match=r"stopped after 10,000 problems") as caught:
        list(read_records(file, Problems()))
    assert parsed == Problems.MOST_PLACES and len(str(caught.value)) < 2000


def test_a_parquet_file_that_unpacks_to_more_than_there_is_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "x" * 60_000_000
    pq.write_table(pa.table({"text": [text]}), tmp_path / "rows.parquet", compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < 10**6
    monkeypatch.setattr(row_files, "LEAST_PARQUET_BYTES", 0)
    guard = Guard(100 * MB, 0, rss=lambda: 0)
    problems = Problems()
    assert not list(read_records(tmp_path / "rows.parquet", problems, guard))
    with pytest.raises(UsageError, match="needs more than 100MB to unpack"):
        problems.raise_any()


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a = " + "{b = " * 100 + "1" + "}" * 100,
        ".".join("a" * 100_000) + " = 1",
        "[" + ".".join("a" * 100) + "]",
        ".".join(["'a.b'"] * 20_000) + " = 1",
        "a = 1\n" * 100_000,
    ],
    ids=["lists", "tables", "a dotted key", "a header", "quoted keys", "long"],
)
def test_toml_that_would_take_all_memory_is_refused_before_it_is_parsed(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested more than|characters, more than"):
        parse_toml(text)
