"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from test_journal import child_environment

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_path, atomic_write, remove_leftovers


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
