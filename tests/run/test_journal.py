"""The journal: what is written is what is read, by one writer, of any length."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgezo.errors import BaseMismatch, EdgezoError
from edgezo.run.journal import create_journal, open_journal
from edgezo.run.journal_header import check_base
from edgezo.run.journal_record import StepRecord, decode_record, encode_record


def header_of(data_hash: str = "cd34", **config: object) -> dict[str, Any]:
    """A header as a run writes it: sigma and step size may change from step to step, and rows may be touched."""
    fixed = {"model": "é", "train": ["full"], "precision": "fp32", "step": 0.1, "step_auto": True}
    return {
        "content_hash": "ab12",
        "data_hash": data_hash,
        "dataset": {"kind": "label", "label_ids": [7, 3], "label_names": ["bad", "schön"]},
        "config": {**fixed, "steps": 5, "sigma": 0.002, "batch_size": 3, **config},
    }


HEADER = header_of()
PLAIN = {"content_hash": "ab12"}  # of no run: its records may have any shape


def make_record(step: int, b: int = 3, touched: bool = False) -> StepRecord:
    """A record that is a function of its step."""
    rng = np.random.default_rng(step)
    ids = tuple(np.unique(rng.integers(0, 50_000, rng.integers(0, 9))) for _ in range(b))
    skipped = step % 4 == 3
    return StepRecord(
        step=step,
        sigma=2e-3 / (step % 7 + 1),
        step_size=0.1 - step / 3,
        skipped=skipped,
        losses=rng.normal(size=(2, b)).astype(np.float32),
        credit=rng.normal(size=b).astype(np.float32) * (not skipped),
        touched=ids if touched else (),
    )


def write(path: Path, steps: int, b: int = 3, touched: bool = False) -> bytes:
    with create_journal(path, header_of(batch_size=b)) as journal:
        for step in range(steps):
            journal.append(make_record(step, b, touched))
    return path.read_bytes()


def assert_same(got: StepRecord, want: StepRecord) -> None:
    assert (got.step, got.sigma, got.step_size, got.skipped) == (
        want.step,
        want.sigma,
        want.step_size,
        want.skipped,
    )
    assert got.losses.dtype == got.credit.dtype == np.float32
    assert got.losses.shape == want.losses.shape
    assert got.losses.tobytes() == want.losses.tobytes()
    assert got.credit.tobytes() == want.credit.tobytes()
    assert len(got.touched) == len(want.touched)
    for ours, theirs in zip(got.touched, want.touched, strict=True):
        assert ours.tolist() == theirs.tolist()


def record_ends(path: Path) -> list[int]:
    with open_journal(path, resume=False) as journal:
        return list(journal._ends)


def child_environment() -> dict[str, str]:
    places = [
        str(Path(__file__).parent),
        str(Path(__file__).parents[1]),
        *(p for p in sys.path if p),
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}


# --- what is written is what is read -----------------------------------------------------------


def test_records_that_exchange_what_follows_their_heads_are_damage(tmp_path):
    """A CRC over head and body does not see it: that of bytes with their own CRC behind them is constant."""
    path = tmp_path / "journal.bin"
    whole = write(path, 6)
    a, b = record_ends(path)[1:3]
    size = b - a
    changed = bytearray(whole)
    changed[a + 20 : b] = whole[b + 20 : b + size]
    changed[b + 20 : b + size] = whole[a + 20 : b]
    path.write_bytes(changed)
    for resume in (False, True):
        with pytest.raises(EdgezoError, match=r"the record of step 1 at byte .* is damaged"):
            open_journal(path, resume=resume)


@pytest.mark.parametrize("touched", [False, True])
def test_a_journal_reads_back_bit_for_bit(tmp_path, touched):
    path = tmp_path / "journal.bin"
    write(path, 6, touched=touched)
    with open_journal(path, resume=False) as journal:
        assert journal.header == HEADER
        assert (len(journal), journal.next_step, journal.cut_bytes, journal.note) == (6, 6, 0, "")
        assert journal.valid_bytes == path.stat().st_size
        for step, record in enumerate(journal.records()):
            assert_same(record, make_record(step, touched=touched))
        assert [r.step for r in journal.records(4)] == [4, 5]
        assert_same(journal.record(2), make_record(2, touched=touched))


def test_records_of_other_shapes_are_in_a_journal_of_a_later_format(tmp_path):
    records = [
        StepRecord(0, 0.1, 0.2, False, np.ones((1, 3), "f4"), np.ones(3, "f4")),
        StepRecord(
            1, 0.1, 0.2, False, np.ones((5, 3), "f4"), np.arange(4, dtype="f4"), (np.arange(7),)
        ),
        StepRecord(2, 0.1, 0.2, True, np.ones((2, 3), "f4"), np.zeros(3, "f4")),
    ]
    with create_journal(tmp_path / "journal.bin", PLAIN, shaped=True) as journal:
        for record in records:
            journal.append(record)
    assert (tmp_path / "journal.bin").read_bytes()[8] == 5
    assert write(tmp_path / "plain", 1)[8] == 4
    with open_journal(tmp_path / "journal.bin", resume=False) as journal:
        for found, record in zip(journal.records(), records, strict=True):
            assert_same(found, record)


def test_a_step_of_sixteen_directions_takes_232_bytes(tmp_path):
    "40 bytes and three floats a direction: 1,000 steps are 232 KB."
    write(tmp_path / "journal.bin", 3, b=16)
    ends = record_ends(tmp_path / "journal.bin")
    assert np.diff(ends).tolist() == [40 + 12 * 16] * 3


def test_the_same_run_makes_the_same_bytes(tmp_path):
    "The header is canonical: the order of the keys does not show."
    first = write(tmp_path / "a", 3)
    shuffled = dict(reversed(HEADER.items()))
    with create_journal(tmp_path / "b", shuffled) as journal:
        for step in range(3):
            journal.append(make_record(step))
    assert (tmp_path / "b").read_bytes() == first


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
finite = st.floats(allow_nan=False, allow_infinity=False)
finite_32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
id_rows = st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=6).map(
    lambda ids: np.array(sorted(ids), dtype=np.int64)
)


@st.composite
def any_records(draw) -> StepRecord:
    b, sides = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    k = draw(st.sampled_from((b, b, 3)))
    size = sides * b
    lists = draw(st.sampled_from((0, 1, k)))
    return StepRecord(
        step=draw(st.integers(0, 2**32 - 1)),
        sigma=draw(finite),
        step_size=draw(finite),
        skipped=draw(st.booleans()),
        losses=np.array(draw(st.lists(floats, min_size=size, max_size=size)), "<f4").reshape(
            sides, b
        ),
        credit=np.array(draw(st.lists(finite_32, min_size=k, max_size=k)), np.float32),
        touched=tuple(draw(st.lists(id_rows, min_size=lists, max_size=lists))),
    )


@settings(max_examples=100, deadline=None)
@given(any_records(), st.integers(0, 2**32 - 1))
def test_any_record_survives_encoding_and_no_shorter_or_longer_data_is_one(record, crc):
    "NaN and infinite losses of a skipped step included."
    data = encode_record(record, crc)
    got = decode_record(data, crc)
    assert got is not None
    assert_same(got, record)
    assert decode_record(data[:-1], crc) is None
    assert decode_record(data + b"\0", crc) is None
    assert decode_record(data, crc ^ 1) is None


def test_arrays_that_come_back_can_be_written_to(tmp_path):
    write(tmp_path / "journal.bin", 1)
    with open_journal(tmp_path / "journal.bin", resume=False) as journal:
        record = journal.record(0)
    assert record.losses.flags.writeable and record.credit.flags.writeable


@pytest.mark.parametrize(
    "change",
    [
        {"losses": np.zeros((2, 3))},  # float64 would be rounded
        {"credit": np.zeros(3)},
        {"losses": np.zeros((2, 4), np.float32)},
        {"credit": np.zeros((3, 1), np.float32)},
        {"touched": (np.array([1]),)},
        {"touched": (np.array([2, 1]), np.array([1]), np.array([1]))},
        {"touched": (np.array([1, 1]), np.array([1]), np.array([1]))},
        {"touched": (np.array([-1]), np.array([1]), np.array([1]))},
        {"touched": (np.array([0.5]), np.array([1]), np.array([1]))},
        {"step": 5},
        {"step": -1},
    ],
)
def test_a_record_that_could_not_be_replayed_exactly_is_refused_and_nothing_is_written(
    tmp_path, change
):
    path = tmp_path / "journal.bin"
    with create_journal(path, HEADER) as journal:
        before = path.read_bytes()
        with pytest.raises(ValueError):
            journal.append(replace(make_record(0), **change))
        assert path.read_bytes() == before
        journal.append(make_record(0))


def test_the_first_step_may_have_any_number_and_the_others_follow(tmp_path):
    with create_journal(tmp_path / "journal.bin", PLAIN, first_step=7) as journal:
        with pytest.raises(ValueError):
            journal.append(make_record(6))
        journal.append(make_record(7))
        with pytest.raises(ValueError):
            journal.append(make_record(7))
        with pytest.raises(ValueError):
            journal.append(make_record(9))
    with open_journal(tmp_path / "journal.bin", resume=True) as journal:
        assert (journal.first_step, journal.next_step) == (7, 8)
        with pytest.raises(EdgezoError, match="steps 7 to 7"):
            journal.record(6)


def test_truncating_and_writing_again_equals_never_having_stopped(tmp_path):
    whole = write(tmp_path / "whole", 6)
    write(tmp_path / "journal.bin", 6)
    again = tmp_path / "journal-again.bin"
    with open_journal(tmp_path / "journal.bin", resume=True) as journal:
        journal.truncate_to(6)
        assert len(journal) == 6 and not again.exists()
        journal.truncate_to(2)
        assert journal.next_step == 2
        for step in range(2, 6):
            assert again.exists()
            journal.append(make_record(step))
        assert not again.exists()
        journal.sync()
        with pytest.raises(ValueError):
            journal.truncate_to(7)
        assert [r.step for r in journal.records()] == list(range(6))
    assert (tmp_path / "journal.bin").read_bytes() == whole


def test_a_journal_opened_for_replay_cannot_be_written(tmp_path):
    whole = write(tmp_path / "journal.bin", 2)
    (tmp_path / "journal.bin").chmod(0o444)
    with open_journal(tmp_path / "journal.bin", resume=False) as journal:
        for change in (
            lambda: journal.append(make_record(2)),
            lambda: journal.truncate_to(0),
            journal.sync,
        ):
            with pytest.raises(ValueError, match="replay"):
                change()
    with pytest.raises(ValueError, match="closed"):
        journal.sync()
    assert (tmp_path / "journal.bin").read_bytes() == whole


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path):
    path = tmp_path / "journal.bin"
    with create_journal(path, HEADER) as journal:
        journal.append(make_record(0))
        with pytest.raises(EdgezoError, match="another process"):
            open_journal(path, resume=True)
        with open_journal(path, resume=False) as reader:
            assert len(reader) == 1
        journal.append(make_record(1))
    open_journal(path, resume=True).close()


def test_a_run_that_exists_is_not_overwritten(tmp_path):
    whole = write(tmp_path / "journal.bin", 2)
    with pytest.raises(EdgezoError, match="--resume"):
        create_journal(tmp_path / "journal.bin", HEADER)
    assert (tmp_path / "journal.bin").read_bytes() == whole


def test_another_base_is_refused_with_both_hashes():
    check_base(HEADER, "ab12", vocab=8)
    with pytest.raises(BaseMismatch, match=r"over ab12, the model given is cd34") as caught:
        check_base(HEADER, "cd34")
    assert caught.value.exit_code == 5
    with pytest.raises(EdgezoError, match="of no run"):
        check_base(PLAIN, "ab12")


# --- long journals ------------------------------------------------------------------------------


def test_a_long_journal_is_read_with_a_few_bytes_of_memory_a_step(tmp_path):
    "The records are not kept: opening 20,000 steps costs less than half of the file's size."
    path = tmp_path / "journal.bin"
    code = (
        "import sys; from test_journal import *; from edgezo.machine import process_memory as memory\n"
        "before = memory.rss_bytes()\n"
        "with open_journal(Path(sys.argv[1]), resume=False) as journal:\n"
        "    print(len(journal), memory.peak_rss_bytes() - before)\n"
    )
    with create_journal(path, header_of(batch_size=16)) as journal:
        crc, start = journal._crc, journal.valid_bytes
    with path.open("ab") as file:
        for step in range(20_000):
            file.write(encode_record(make_tiny(step), crc))
    assert path.stat().st_size - start == 20_000 * (40 + 12 * 16)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    steps, grown_bytes = map(int, done.stdout.split())
    assert steps == 20_000
    assert grown_bytes < 2_000_000 < path.stat().st_size / 2


def make_tiny(step: int) -> StepRecord:
    zeros = np.zeros((2, 16), np.float32)
    return StepRecord(step, 0.002, 0.0, True, zeros, zeros[0])
