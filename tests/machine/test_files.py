"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from test_journal import child_environment

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_path, atomic_write, remove_leftovers
from edgezo.machine.ownership import MARKER, check_new_file, claim


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "plan.json"
    for data in (b"one", b"", b"three" * 1000):
        atomic_write(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["plan.json"]
    old_mask = os.umask(0o022)
    try:
        atomic_write(path, b"x")
        assert path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old_mask)


@pytest.mark.parametrize("error", [RuntimeError("bad"), KeyboardInterrupt(), OSError(5, "I/O")])
def test_a_block_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "snapshot"
    atomic_write(path, b"old")
    expected = EdgezoError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_path(path) as temp:
        assert temp.parent == path.parent
        temp.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["snapshot"]


def test_a_block_that_writes_nothing_is_an_error_and_the_old_file_stays(tmp_path):
    path = tmp_path / "snapshot"
    atomic_write(path, b"old")
    with pytest.raises(EdgezoError, match="could not be written"), atomic_path(path):
        pass
    assert path.read_bytes() == b"old"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    code = (
        "import os, sys, signal; from pathlib import Path; from edgezo.machine.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1]) / 'snapshot') as temp:\n"
        "    temp.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / ".hidden").write_bytes(b"mine")
    (tmp_path / "snapshot").write_bytes(b"old")
    run = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(run, env=child_environment()).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 3
    assert remove_leftovers(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == [".hidden", "snapshot"]
    assert (tmp_path / "snapshot").read_bytes() == b"old"


@pytest.mark.parametrize("begun", ["lock", "temporary file", "file"])
def test_what_a_kill_left_of_a_file_elsewhere_is_removed_by_the_next_write(tmp_path, begun):
    """In a directory of a user's, at every moment between the lock's beginning and its end."""
    temporary = tmp_path / ".a.safetensors.0123abcd.edgezo-tmp"
    (tmp_path / f"{temporary.name}.lock").touch()
    if begun == "temporary file":
        temporary.write_bytes(b"half")
    mine = tmp_path / ".a.safetensors.ffffffff.edgezo-tmp"  # no lock: not provably edgezo's
    mine.write_bytes(b"mine")
    path = tmp_path / "a.safetensors"
    if begun == "file":
        path.write_bytes(b"whole")
        with pytest.raises(UsageError):
            check_new_file(path)
        assert sorted(os.listdir(tmp_path)) == sorted([path.name, mine.name])
        return
    with atomic_path(path, lock=True) as temp:
        temp.write_bytes(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, mine.name])


def test_a_directory_whose_first_write_was_killed_is_taken_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    temporary = folder / f".{MARKER}.0123abcd.edgezo-tmp"
    temporary.write_bytes(b'{"ki')
    temporary.with_name(f"{temporary.name}.lock").touch()
    claim(folder, "run")
    assert os.listdir(folder) == [MARKER]
