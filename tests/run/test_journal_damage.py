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
from test_journal import (
    HEADER,
    PLAIN,
    child_environment,
    header_of,
    make_record,
    record_ends,
    write,
)

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_path, atomic_write
from edgezo.run import journal_header
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
            assert path.read_bytes() == whole[:cut], "nothing is cut before everything is checked"
            journal.repair()
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
            journal.repair()
            journal.append(make_record(2))
        assert path.read_bytes() == whole


def kept(folder: Path) -> dict[str, bytes]:
    """What repairs have kept beside the journal, by the file's name."""
    return {file.name: file.read_bytes() for file in folder.glob("journal-cut-*.bin")}


def test_what_is_cut_is_kept_beside_under_a_name_of_its_own(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 3)
    ends = record_ends(tmp_path / "whole")
    wanted = {}
    for name, cut in (("", 7), ("-2", 30), ("-3", 75)):
        tail = whole[ends[2] : ends[2] + cut]
        path.write_bytes(whole[: ends[2]] + tail)
        for _ in range(2):  # the second process finds what one left that was killed before it cut
            with open_journal(path, resume=True) as journal:
                journal.repair()
                journal.repair()
                wanted[f"journal-cut-2{name}.bin"] = tail
                assert journal.note.endswith(f"cut off, and kept in journal-cut-2{name}.bin")
            assert path.read_bytes() == whole[: ends[2]] and kept(tmp_path) == wanted
            path.write_bytes(whole[: ends[2]] + tail)


def test_nothing_is_written_behind_an_unfinished_record(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 3)
    path.write_bytes(whole[:-5])
    with open_journal(path, resume=True) as journal:
        for change in (
            lambda: journal.append(make_record(2)),
            lambda: journal.truncate_to(1),
            journal.sync,
        ):
            with pytest.raises(ValueError, match=r"repair\(\) comes first"):
                change()
    assert path.read_bytes() == whole[:-5] and not kept(tmp_path)


def test_where_the_end_cannot_be_kept_it_is_not_cut(tmp_path, monkeypatch):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 3)
    path.write_bytes(whole[:-5])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with open_journal(path, resume=True) as journal:
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(EdgezoError, match=r"journal-cut-2\.bin.*No space left"):
            journal.repair()
        monkeypatch.undo()
        assert path.read_bytes() == whole[:-5]
        journal.repair()
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("touched", [False, True])
def test_at_most_one_record_is_ever_cut(tmp_path, touched):
    """Every pair of bits in the last two records that hides both: all of it is refused, and nothing is cut."""
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 4, touched=touched)
    ends, chance = record_ends(tmp_path / "whole"), random.Random(0)
    for first in range(ends[2], ends[3]):
        second = chance.randrange(ends[3], ends[4])
        damaged = flipped(flipped(whole, first, first % 8), second, second % 8)
        for cut in (len(whole), chance.randrange(ends[3] + 20, ends[4])):
            path.write_bytes(damaged[:cut])
            for resume in (False, True):
                with pytest.raises(EdgezoError, match=r"step 2 .*damaged") as caught:
                    open_journal(path, resume=resume)
                assert f"head -c {ends[2]} " in str(caught.value)
            assert path.read_bytes() == damaged[:cut]


def test_a_damaged_head_is_cut_only_where_no_two_records_can_be(tmp_path):
    "Records that name touched tokens have any length: which of them a damaged head began cannot be told."
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 6, touched=True)
    ends = record_ends(tmp_path / "whole")
    path.write_bytes(flipped(whole, ends[5] + 9, 0))  # the last record's step
    shortest = 40 + 12 * 3
    assert ends[6] - ends[5] < 2 * shortest
    with open_journal(path, resume=True) as journal:
        assert (len(journal), journal.cut_bytes) == (5, ends[6] - ends[5])
    with create_journal(tmp_path / "long.bin", HEADER) as journal:
        journal.append(make_record(0, touched=True))
        journal.append(replace(make_record(1), touched=(np.arange(0, 60_000, 500),) * 3))
    data = (tmp_path / "long.bin").read_bytes()
    (tmp_path / "long.bin").write_bytes(flipped(data, ends[1] + 9, 0))
    with pytest.raises(EdgezoError, match=r"step 1 .*damaged"):
        open_journal(tmp_path / "long.bin", resume=True)
    for body in (ends[1] + 50, len(data) - 1):  # its head tells how long it is
        (tmp_path / "long.bin").write_bytes(flipped(data, body, 0))
        with open_journal(tmp_path / "long.bin", resume=True) as journal:
            assert journal.cut_bytes == len(data) - ends[1]


def test_records_that_are_dropped_stay_beside_until_as_many_are_appended(tmp_path):
    path, again = tmp_path / "journal.bin", tmp_path / "journal-again.bin"
    whole = write(path, 7)
    ends = record_ends(path)
    sizes = {step: make_record(step).step_size for step in range(7)}
    with open_journal(path, resume=True) as journal:
        assert journal.step_sizes_from(3) == {s: sizes[s] for s in (3, 4, 5, 6)}
        journal.truncate_to(3)
        assert again.read_bytes() == whole[ends[3] :]
        journal.append(make_record(3))
    with open_journal(path, resume=True) as journal:  # after a second kill
        assert len(journal) == 4
        assert journal.step_sizes_from(2) == {s: sizes[s] for s in (2, 3, 4, 5, 6)}
        journal.truncate_to(2)
        assert again.read_bytes() == whole[ends[2] :]
    with open_journal(path, resume=True) as journal:
        for step in range(2, 7):
            assert journal.step_sizes_from(2) == {s: sizes[s] for s in (2, 3, 4, 5, 6)}
            assert again.exists()
            journal.append(make_record(step))
        assert not again.exists()
        journal.append(make_record(7))
    assert path.read_bytes()[: len(whole)] == whole


def test_dropped_records_that_are_damaged_or_of_another_journal_are_refused(tmp_path):
    path, again = tmp_path / "journal.bin", tmp_path / "journal-again.bin"
    write(path, 4)
    with open_journal(path, resume=True) as journal:
        journal.truncate_to(1)
    rest, kept_records = path.read_bytes(), again.read_bytes()
    with create_journal(tmp_path / "other", header_of("ef56")) as other:
        for step in range(4):
            other.append(make_record(step))
    foreign = (tmp_path / "other").read_bytes()[record_ends(tmp_path / "other")[1] :]
    size = len(kept_records) // 3
    for data in (
        *(flipped(kept_records, at, at % 8) for at in range(0, len(kept_records), 5)),
        *(kept_records[:cut] for cut in range(1, len(kept_records), 7) if cut % size),
        kept_records[size:] + kept_records[:size],
        foreign,
        b"x",
    ):
        again.write_bytes(data)
        with pytest.raises(EdgezoError, match=r"journal-again\.bin cannot be used.*or remove it"):
            open_journal(path, resume=True)
        assert again.read_bytes() == data and path.read_bytes() == rest
        open_journal(path, resume=False).close()
    again.unlink()
    open_journal(path, resume=True).close()


def test_the_remedy_that_the_error_names_works(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 4)
    ends = record_ends(tmp_path / "whole")
    path.write_bytes(flipped(whole, ends[2] + 30, 0))
    with pytest.raises(EdgezoError, match=f"first {ends[2]} bytes"):
        open_journal(path, resume=True)
    path.write_bytes(path.read_bytes()[: ends[2]])
    with open_journal(path, resume=True) as journal:
        assert len(journal) == 2


def test_zeros_of_one_record_that_a_power_loss_leaves_at_the_end_are_a_tail_and_more_are_not(
    tmp_path,
):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 2)
    record_bytes = 40 + 12 * 3
    path.write_bytes(whole + bytes(record_bytes))
    with open_journal(path, resume=False) as journal:
        assert (len(journal), journal.cut_bytes) == (2, record_bytes)
    with open_journal(path, resume=True) as journal:
        journal.repair()
        assert f"{record_bytes} bytes" in journal.note and "journal-cut-2.bin" in journal.note
    assert path.read_bytes() == whole
    for more in (1, record_bytes, 5000):
        path.write_bytes(whole + bytes(record_bytes + more))
        for resume in (False, True):
            with pytest.raises(EdgezoError, match=rf"step 2 .*damaged.*head -c {len(whole)} "):
                open_journal(path, resume=resume)


def test_records_that_are_missing_twice_or_of_another_run_are_noticed(tmp_path):
    path, whole = tmp_path / "journal.bin", write(tmp_path / "whole", 4)
    a, b, c, d, e = record_ends(tmp_path / "whole")
    for changed in (whole[:b] + whole[c:], whole[:c] + whole[b:], whole[:a] + whole[b:]):
        path.write_bytes(changed)
        with pytest.raises(EdgezoError, match="missing or twice"):
            open_journal(path, resume=True)
    with create_journal(tmp_path / "other", header_of("ef56")) as other:
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
    monkeypatch.setattr(journal_header, "VERSION", 1)
    with pytest.raises(EdgezoError, match=r"format 5 .* reads formats up to 1\. Install"):
        open_journal(tmp_path / "journal.bin", resume=True)


def test_a_path_without_a_journal_is_a_clear_error(tmp_path):
    with pytest.raises(EdgezoError, match="no journal there"):
        open_journal(tmp_path / "journal.bin", resume=True)
    os.mkfifo(tmp_path / "pipe")
    for no_file in (tmp_path, tmp_path / "pipe"):
        for resume in (False, True):
            with pytest.raises(EdgezoError, match=r"cannot be opened|is a folder|no regular file"):
                open_journal(no_file, resume=resume)
    (tmp_path / "pipe").unlink()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EdgezoError, match=r"cannot be opened|not to be opened"):
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
    create_journal(path, header_of(batch_size=100)).close()
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
    create_journal(path, header_of(batch_size=100)).close()
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
    journal.repair()
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
    create_journal(path, PLAIN).close()
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
            journal.repair()
            # the last append may have been done and not yet acknowledged
            assert len(journal) - acknowledged in (0, 1)
            acknowledged = len(journal)
    with create_journal(tmp_path / "whole", PLAIN) as journal:
        for step in range(acknowledged):
            losses = np.arange(2 * b, dtype=np.float32).reshape(2, b) + step
            journal.append(StepRecord(step, 1e-3, 0.5, False, losses, losses[0] * 2))
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
