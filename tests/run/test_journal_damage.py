"""The journal against every cut, every flipped bit, full disks and kill -9."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_journal import HEADER, child_environment, make_record, record_ends, write

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_path, atomic_write
from edgezo.run import journal as j
from edgezo.run.journal import create_journal, open_journal
from edgezo.run.journal_record import StepRecord

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
        "import resource, sys; from pathlib import Path; from test_journal_damage import *\n"
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
from edgezo.run.journal import (open_journal)
from edgezo.run.journal_record import (StepRecord)
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
