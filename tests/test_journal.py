"""The journal against every cut, every flipped bit, full disks and kill -9."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgezo import journal as j
from edgezo.errors import BaseMismatch, EdgezoError
from edgezo.files import atomic_path, atomic_write
from edgezo.journal import StepRecord, create_journal, open_journal

HEADER = {"content_hash": "ab12", "config": {"steps": 5, "model": "é", "sigma": 0.002}}


def make_record(step: int, b: int = 3, touched: bool = False) -> StepRecord:
    """A record that is a function of its step."""
    rng = np.random.default_rng(step)
    ids = tuple(np.unique(rng.integers(0, 50_000, rng.integers(0, 9))) for _ in range(b))
    return StepRecord(
        step=step,
        sigma=2e-3 / (step + 1),
        step_size=0.1 - step / 3,
        skipped=step % 4 == 3,
        losses=rng.normal(size=(2, b)).astype(np.float32),
        credit=rng.normal(size=b).astype(np.float32),
        touched=ids if touched else (),
    )


def write(path: Path, steps: int, b: int = 3, touched: bool = False) -> bytes:
    with create_journal(path, HEADER) as journal:
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


# --- what is written is what is read -----------------------------------------------------------


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
    "Format 1, which every version reads, stays as it was."
    records = [
        StepRecord(0, 0.1, 0.2, False, np.ones((1, 3), "f4"), np.ones(3, "f4")),
        StepRecord(
            1, 0.1, 0.2, False, np.ones((5, 3), "f4"), np.arange(4, dtype="f4"), (np.arange(7),)
        ),
        StepRecord(2, 0.1, 0.2, True, np.ones((2, 3), "f4"), np.zeros(3, "f4")),
    ]
    with create_journal(tmp_path / "journal.bin", HEADER, shaped=True) as journal:
        for record in records:
            journal.append(record)
    assert (tmp_path / "journal.bin").read_bytes()[8] == 2
    assert write(tmp_path / "plain", 1)[8] == 1
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
        sigma=draw(st.floats(allow_nan=False)),
        step_size=draw(st.floats(allow_nan=False)),
        skipped=draw(st.booleans()),
        losses=np.array(draw(st.lists(floats, min_size=size, max_size=size)), "<f4").reshape(
            sides, b
        ),
        credit=np.array(draw(st.lists(floats, min_size=k, max_size=k)), np.float32),
        touched=tuple(draw(st.lists(id_rows, min_size=lists, max_size=lists))),
    )


@settings(max_examples=100, deadline=None)
@given(any_records(), st.integers(0, 2**32 - 1))
def test_any_record_survives_encoding_and_no_shorter_or_longer_data_is_one(record, crc):
    "NaN and infinite losses of a skipped step included."
    data = j.encode_record(record, crc)
    got = j.decode_record(data, crc)
    assert got is not None
    assert_same(got, record)
    assert j.decode_record(data[:-1], crc) is None
    assert j.decode_record(data + b"\0", crc) is None
    assert j.decode_record(data, crc ^ 1) is None


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
    with create_journal(tmp_path / "journal.bin", HEADER, first_step=7) as journal:
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
    with open_journal(tmp_path / "journal.bin", resume=True) as journal:
        journal.truncate_to(6)
        assert len(journal) == 6
        journal.truncate_to(2)
        assert journal.next_step == 2
        for step in range(2, 6):
            journal.append(make_record(step))
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
    j.check_base(HEADER, "ab12")
    for header in (HEADER, {}):
        with pytest.raises(BaseMismatch, match="cd34") as caught:
            j.check_base(header, "cd34")
        assert caught.value.exit_code == 5
        assert str(header.get("content_hash")) in str(caught.value)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("touched", [False, True])
def test_a_cut_at_every_byte_keeps_exactly_the_whole_records_and_goes_on_bit_equal(
    tmp_path, touched
):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 3, touched=touched)
    ends = record_ends(tmp_path / "whole")
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        if cut < ends[0]:
            for resume in (False, True):
                with pytest.raises(EdgezoError, match="header is damaged"):
                    open_journal(path, resume=resume)
            assert path.read_bytes() == whole[:cut]
            continue
        kept = sum(end <= cut for end in ends) - 1
        with open_journal(path, resume=False) as journal:
            assert (len(journal), journal.cut_bytes) == (kept, cut - ends[kept])
            assert bool(journal.note) == (cut > ends[kept])
            assert len(list(journal.records())) == kept
        assert path.read_bytes() == whole[:cut], "replay must not change the file"
        with open_journal(path, resume=True) as journal:
            assert (len(journal), journal.cut_bytes) == (kept, cut - ends[kept])
            assert path.stat().st_size == ends[kept]
            for step in range(kept, 3):
                journal.append(make_record(step, touched=touched))
        assert path.read_bytes() == whole


def test_a_flip_of_any_bit_of_the_header_is_noticed(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 2)
    for at in range(record_ends(tmp_path / "whole")[0]):
        for bit in range(8):
            path.write_bytes(flipped(whole, at, bit))
            with pytest.raises(EdgezoError):
                open_journal(path, resume=bool(bit % 2))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("touched", [False, True])
def test_a_flip_of_any_bit_before_the_last_record_is_noticed_and_nothing_is_cut(
    tmp_path, resume, touched
):
    "A damaged length too: the records behind it must not be taken for a tail."
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 3, touched=touched)
    ends = record_ends(tmp_path / "whole")
    for at in range(ends[1], ends[2]):
        for bit in range(8):
            damaged = flipped(whole, at, bit)
            path.write_bytes(damaged)
            with pytest.raises(EdgezoError, match=r"step 1 .*damaged") as caught:
                open_journal(path, resume=resume)
            assert f"head -c {ends[1]} " in str(caught.value)
        assert path.read_bytes() == damaged


def test_a_flip_in_the_last_record_stops_a_replay_and_costs_a_resume_that_step(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 3)
    ends = record_ends(tmp_path / "whole")
    for at in range(ends[2], ends[3]):
        path.write_bytes(flipped(whole, at, at % 8))
        with pytest.raises(EdgezoError, match=r"step 2 .*damaged"):
            open_journal(path, resume=False)
        with open_journal(path, resume=True) as journal:
            assert (len(journal), journal.cut_bytes) == (2, ends[3] - ends[2])
            journal.append(make_record(2))
        assert path.read_bytes() == whole


def test_the_remedy_that_the_error_names_works(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 4)
    ends = record_ends(tmp_path / "whole")
    path.write_bytes(flipped(whole, ends[2] + 30, 0))
    with pytest.raises(EdgezoError, match=f"first {ends[2]} bytes"):
        open_journal(path, resume=True)
    path.write_bytes(path.read_bytes()[: ends[2]])
    with open_journal(path, resume=True) as journal:
        assert len(journal) == 2


def test_zeros_that_a_power_loss_leaves_at_the_end_are_a_tail(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 2)
    path.write_bytes(whole + bytes(5000))
    with open_journal(path, resume=False) as journal:
        assert (len(journal), journal.cut_bytes) == (2, 5000)
    with open_journal(path, resume=True) as journal:
        assert "5000 bytes" in journal.note
    assert path.read_bytes() == whole


def test_records_that_are_missing_twice_or_of_another_run_are_noticed(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 4)
    a, b, c, d, e = record_ends(tmp_path / "whole")
    for changed in (whole[:b] + whole[c:], whole[:c] + whole[b:], whole[:a] + whole[b:]):
        path.write_bytes(changed)
        with pytest.raises(EdgezoError, match="missing or twice"):
            open_journal(path, resume=True)
    with create_journal(tmp_path / "other", {"content_hash": "zz", "config": 1}) as other:
        for step in range(4):
            other.append(make_record(step))
    begin = record_ends(tmp_path / "other")[0]
    foreign = (tmp_path / "other").read_bytes()[begin:]
    assert len(foreign) == e - a
    path.write_bytes(whole[:c] + foreign[c - a : d - a] + whole[d:])
    with pytest.raises(EdgezoError, match=r"step 2 .*damaged"):
        open_journal(path, resume=True)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip file", b"{}", b"\0" * 100, b"GGUF", b"EZ"])
def test_a_foreign_file_is_called_so_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "journal.bin"
    path.write_bytes(content)
    for resume in (False, True):
        with pytest.raises(EdgezoError, match="not a journal"):
            open_journal(path, resume=resume)
    assert path.read_bytes() == content


def test_a_journal_copied_in_text_mode_is_no_journal(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 1)
    path.write_bytes(whole.replace(b"\r\n", b"\n"))
    with pytest.raises(EdgezoError, match="not a journal"):
        open_journal(path, resume=False)


def test_a_later_format_says_which_edgezo_is_needed(tmp_path, monkeypatch):
    create_journal(tmp_path / "journal.bin", HEADER, shaped=True).close()
    monkeypatch.setattr(j, "VERSION", 1)
    with pytest.raises(EdgezoError, match=r"format 2 .* reads formats up to 1\. Install"):
        open_journal(tmp_path / "journal.bin", resume=True)


def test_a_path_without_a_journal_is_a_clear_error(tmp_path):
    with pytest.raises(EdgezoError, match="no journal there"):
        open_journal(tmp_path / "journal.bin", resume=True)
    with pytest.raises(EdgezoError, match="cannot be opened"):
        open_journal(tmp_path, resume=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EdgezoError, match="cannot be opened"):
        open_journal(tmp_path / "file" / "journal.bin", resume=True)
    with pytest.raises(EdgezoError, match="header is damaged"):
        open_journal(tmp_path / "file", resume=True)
    with pytest.raises(EdgezoError, match="directory exists and is writable"):
        create_journal(tmp_path / "absent" / "journal.bin", HEADER)
    with pytest.raises(ValueError, match="content_hash"):
        create_journal(tmp_path / "journal.bin", {})
    assert sorted(os.listdir(tmp_path)) == ["file"]


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


# --- full disks --------------------------------------------------------------------------------


def append_until_full(path: Path, b: int) -> EdgezoError:
    with open_journal(path, resume=True) as journal:
        while True:
            before = path.read_bytes()
            try:
                journal.append(make_record(journal.next_step, b))
            except EdgezoError as error:
                assert path.read_bytes() == before, "a failed append leaves the file as it was"
                assert journal.valid_bytes == len(before)
                return error


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of its own with 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        sys.platform == "linux"
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_an_error_with_numbers_and_the_run_goes_on_when_there_is_room(
    small_disk, tmp_path
):
    filler, path = small_disk / "filler", small_disk / "journal.bin"
    filler.write_bytes(bytes(40_000))
    create_journal(path, HEADER).close()
    error = append_until_full(path, b=100)
    assert "1240 bytes" in str(error) and "0 bytes are free" in str(error)
    assert "--resume" in str(error) and error.exit_code == 1
    with open_journal(path, resume=True) as journal:
        assert journal.cut_bytes == 0
        done = len(journal)
        filler.unlink()
        journal.append(make_record(done, 100))
    assert path.read_bytes() == write(tmp_path / "whole", done + 1, b=100)


def test_on_a_full_disk_an_atomic_write_leaves_the_old_file_and_nothing_else(small_disk):
    from safetensors.numpy import save_file

    path = small_disk / "snapshot.safetensors"
    atomic_write(path, b"old")
    with pytest.raises(EdgezoError, match=r"full \(No space left.*bytes are free"):
        atomic_write(path, bytes(100_000))
    with pytest.raises(EdgezoError, match="full"), atomic_path(path) as temp:
        save_file({"a": np.zeros(50_000, np.float32)}, temp)  # its error is no OSError
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == [path.name]


def test_at_a_file_size_limit_the_journal_keeps_its_whole_records(tmp_path):
    "In a process of its own, as the limit cannot be taken back; Python ignores SIGXFSZ."
    path = tmp_path / "journal.bin"
    create_journal(path, HEADER).close()
    code = (
        "import resource, sys; from pathlib import Path; from test_journal import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "print(append_until_full(Path(sys.argv[1]), 100))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "file size limit is full" in done.stdout and "1240 bytes" in done.stdout
    whole = write(tmp_path / "whole", 9, b=100)
    assert whole.startswith(path.read_bytes())
    with open_journal(path, resume=True) as journal:
        assert (len(journal), journal.cut_bytes) == (7, 0)
        for step in (7, 8):
            journal.append(make_record(step, 100))
    assert path.read_bytes() == whole


def child_environment() -> dict[str, str]:
    places = [str(Path(__file__).parent), *(p for p in sys.path if p)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}


def test_an_append_that_is_interrupted_leaves_no_half_record(tmp_path, monkeypatch):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 2)
    with create_journal(path, HEADER) as journal:
        journal.append(make_record(0))
        before = path.read_bytes()
        real = os.write

        def stop(fd, data):
            real(fd, data[:17])
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            journal.append(make_record(1))
        monkeypatch.undo()
        assert path.read_bytes() == before
        journal.append(make_record(1))
    assert path.read_bytes() == whole


# --- kill -9 -----------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
import numpy as np
from edgezo.journal import StepRecord, open_journal
b = int(sys.argv[2])
with open_journal(Path(sys.argv[1]), resume=True) as journal:
    while True:
        step = journal.next_step
        losses = np.arange(2 * b, dtype=np.float32).reshape(2, b) + step
        journal.append(StepRecord(step, 1e-3, 0.5, False, losses, losses[0] * 2))
        sys.stdout.write("x")
        sys.stdout.flush()
"""


def test_kill_9_at_random_moments_never_costs_more_than_the_record_being_written(tmp_path):
    "One journal, killed and resumed again and again, equals one that was written in peace."
    b, rng = 5000, random.Random(0)
    path = tmp_path / "journal.bin"
    create_journal(path, HEADER).close()
    acknowledged = 0
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(b)],
            env=child_environment(),
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        wanted = rng.randrange(1, 60)
        seen = len(child.stdout.read(wanted))
        for _ in range(rng.randrange(20_000)):  # somewhere inside the next records
            pass
        child.send_signal(signal.SIGKILL)
        acknowledged += seen + len(child.stdout.read())
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL and seen == wanted
        with open_journal(path, resume=True) as journal:
            # the last append may have been done and not yet acknowledged
            assert len(journal) - acknowledged in (0, 1)
            acknowledged = len(journal)
    with create_journal(tmp_path / "whole", HEADER) as journal:
        for step in range(acknowledged):
            losses = np.arange(2 * b, dtype=np.float32).reshape(2, b) + step
            journal.append(StepRecord(step, 1e-3, 0.5, False, losses, losses[0] * 2))
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


# --- long journals ------------------------------------------------------------------------------


def test_a_long_journal_is_read_with_a_few_bytes_of_memory_a_step(tmp_path):
    "The records are not kept: opening 20,000 steps costs less than half of the file's size."
    path = tmp_path / "journal.bin"
    code = (
        "import sys; from test_journal import *; from edgezo import memory\n"
        "before = memory.rss_bytes()\n"
        "with open_journal(Path(sys.argv[1]), resume=False) as journal:\n"
        "    print(len(journal), memory.peak_rss_bytes() - before)\n"
    )
    with create_journal(path, HEADER) as journal:
        crc, start = journal._crc, journal.valid_bytes
    with path.open("ab") as file:
        for step in range(20_000):
            file.write(j.encode_record(make_tiny(step), crc))
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
    return StepRecord(step, 0.0, 0.0, False, zeros, zeros[0])
