"""No link leads out of a directory: what edgezo writes in place is a regular file of it, with one name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from links import FOREIGN, contents, folder, hard_link
from test_journal import child_environment

from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_folder, atomic_path, atomic_write, remove_leftovers
from edgezo.machine.open_files import (
    LOCK_SUFFIX,
    check_inside,
    files_inside,
    lock_beside,
    locked,
    make_folder,
    open_inside,
    remove_files,
    temporary_folder,
)

NAMES = re.compile(r"block-\d+\.overlay")
ALL_FLAGS = [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND]
ALL_FLAGS += [flags | os.O_CREAT for flags in ALL_FLAGS]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "home" / "victim"
    file.parent.mkdir()
    file.write_bytes(b"mine")
    return file


@pytest.mark.parametrize("flags", ALL_FLAGS)
@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_is_no_regular_file_with_one_name_is_refused_and_stays(tmp_path, victim, make, flags):
    place = tmp_path / "run" / "metrics.jsonl"
    place.parent.mkdir()
    make(place, victim)
    before = contents(tmp_path)
    with pytest.raises(EdgezoError, match="Nothing was changed"):
        open_inside(place, flags)
    with pytest.raises(EdgezoError, match="Nothing was changed"):
        check_inside(place)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flags", ALL_FLAGS)
@pytest.mark.parametrize("make", [m for m in FOREIGN if m not in (hard_link, folder)])
def test_a_folder_on_the_way_is_a_folder(tmp_path, victim, make, flags):
    place = tmp_path / "run" / "overlay"
    place.parent.mkdir()
    make(place, victim)
    (victim.parent / "block-1.overlay").write_bytes(b"mine too")
    before = contents(tmp_path)
    with pytest.raises(EdgezoError, match="Nothing was changed"):
        open_inside(place / "block-1.overlay", flags, levels=2)
    for act in (make_folder, lambda p: files_inside(p, NAMES), lambda p: remove_files(p, NAMES)):
        with pytest.raises(EdgezoError, match="Nothing was changed"):
            act(place)
    assert contents(tmp_path) == before


def test_a_regular_file_is_opened_made_and_written_also_by_a_path_that_begins_with_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")  # a user's own directory may be one
    make_folder(tmp_path / "run" / "overlay")
    place = tmp_path / "run" / "overlay" / "file"
    with pytest.raises(FileNotFoundError):
        open_inside(place, os.O_RDWR, levels=2)
    fd = open_inside(place, os.O_RDWR | os.O_CREAT, levels=2, mode=0o600)
    os.write(fd, b"ours")
    os.close(fd)
    assert (tmp_path / "disk" / "overlay" / "file").read_bytes() == b"ours"
    assert place.stat().st_mode & 0o777 == 0o600
    check_inside(place, levels=2)
    fd = open_inside(place, os.O_RDWR | os.O_CREAT, levels=2)  # is not emptied
    assert os.read(fd, 9) == b"ours"
    os.close(fd)


def test_a_relative_path_is_opened_where_it_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, levels in ((Path("one"), 1), (Path("two"), 2)):
        os.close(open_inside(path, os.O_RDWR | os.O_CREAT, levels=levels))
        assert (tmp_path / path).is_file()


def test_descriptors_are_closed_whatever_is_refused(tmp_path, victim):
    place = tmp_path / "run" / "file"
    place.parent.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for make in FOREIGN:
        make(place, victim)
        with pytest.raises(EdgezoError):
            open_inside(place, os.O_RDWR | os.O_CREAT, levels=2)
        place.rmdir() if make is folder else place.unlink()
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------------------------
# Files that are replaced


@pytest.mark.parametrize("make", [m for m in FOREIGN if m is not folder])
def test_a_file_that_is_replaced_takes_the_place_of_a_link(tmp_path, victim, make):
    place = tmp_path / "run" / "config.toml"
    place.parent.mkdir()
    make(place, victim)
    atomic_write(place, b"ours")
    assert place.read_bytes() == b"ours" and not place.is_symlink()
    assert place.stat().st_nlink == 1 and victim.read_bytes() == b"mine"
    assert os.listdir(place.parent) == ["config.toml"]
    with atomic_path(place) as temporary:
        temporary.write_bytes(b"ours again")
    assert place.read_bytes() == b"ours again" and victim.read_bytes() == b"mine"


def test_a_folder_in_a_files_place_is_named_and_stays(tmp_path):
    (tmp_path / "config.toml").mkdir()
    (tmp_path / "config.toml" / "notes").write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(EdgezoError, match=r"config\.toml"):
        atomic_write(tmp_path / "config.toml", b"ours")
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# What is removed


def test_only_regular_files_of_these_names_are_removed(tmp_path, victim):
    inside = tmp_path / "overlay"
    inside.mkdir()
    for name in ("block-1.overlay", "block-2.overlay"):
        (inside / name).write_bytes(b"ours")
    (inside / "block-3.overlay").symlink_to(victim)
    (inside / "block-4.overlay").mkdir()
    (inside / "notes.overlay").write_bytes(b"mine")
    assert files_inside(inside, NAMES) == {"block-1.overlay": 4, "block-2.overlay": 4}
    remove_files(inside, NAMES)
    assert sorted(os.listdir(inside)) == ["block-3.overlay", "block-4.overlay", "notes.overlay"]
    assert victim.read_bytes() == b"mine"
    for place in (tmp_path / "absent", tmp_path / "empty"):
        remove_files(place, NAMES)
    remove_files(inside, re.compile("nothing"))
    assert inside.is_dir()


def test_leftovers_are_files_that_atomic_writes_make(tmp_path, victim):
    ours = tmp_path / ".config.toml.0123abcd.edgezo-tmp"
    ours.write_bytes(b"half")
    kept = {
        ".config.toml.edgezo-tmp": b"mine",
        ".config.toml.0123ABCD.edgezo-tmp": b"mine",
        ".config.toml.0123abcd.edgezo-tmp.old": b"mine",
        "config.toml.0123abcd.edgezo-tmp": b"mine",
    }
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".link.0123abcd.edgezo-tmp").symlink_to(victim)
    folder = tmp_path / ".folder.0123abcd.edgezo-tmp"
    folder.mkdir()
    (folder / "notes").write_bytes(b"mine")
    before = contents(tmp_path)
    assert remove_leftovers(tmp_path) == 1
    assert contents(tmp_path) == {k: v for k, v in before.items() if k != ours.name}


def folders(parent: Path) -> set[Path]:
    return {path for path in parent.iterdir() if path.is_dir()}


def beside_lock(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK_SUFFIX)


def test_a_temporary_folder_is_removed_by_its_process_or_by_the_next_one(tmp_path):
    code = (
        "import os, re, signal, sys; from pathlib import Path\n"
        "from edgezo.machine.open_files import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1]), re.compile(r'block-\\d+\\.overlay')) as folder:\n"
        "    (folder / 'block-1.overlay').write_bytes(b'ours')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = tmp_path / "cache"
    run = [sys.executable, "-c", code, str(parent)]
    for _ in range(2):
        subprocess.run(run, env=child_environment())
        killed, lock = sorted(parent.iterdir())
        assert lock.name == killed.name + LOCK_SUFFIX and os.listdir(killed) == ["block-1.overlay"]
    with pytest.raises(ZeroDivisionError), temporary_folder(parent, NAMES) as folder:
        assert folders(parent) == {folder} and folder != killed
        with temporary_folder(parent, NAMES) as other:  # the first one is in use
            assert folders(parent) == {folder, other}
        (folder / "whatever").write_bytes(b"x")
        raise ZeroDivisionError
    assert list(parent.iterdir()) == []


def test_folders_in_the_cache_that_are_not_provably_ours_stay(tmp_path, victim):
    parent = tmp_path / "cache"
    for name, files in {
        "a file of a user": {"block-1.overlay": b"", "notes.txt": b"mine"},
        "a lock inside": {"block-1.overlay": b"mine", "lock": b""},
        "no lock": {"block-1.overlay": b"mine"},
        "empty": {},
        "a lock that holds something": {"block-1.overlay": b""},
        "a link as the lock": {"block-1.overlay": b""},
        "two names": {"block-1.overlay": b""},
    }.items():
        (parent / name).mkdir(parents=True)
        for file, data in files.items():
            (parent / name / file).write_bytes(data)
    (parent / "a folder inside" / "block-2.overlay").mkdir(parents=True)
    for name in ("a file of a user", "a folder inside"):
        beside_lock(parent / name).touch()
    beside_lock(parent / "a lock that holds something").write_bytes(b"mine")
    beside_lock(parent / "a link as the lock").symlink_to(victim)
    beside_lock(parent / "two names").hardlink_to(victim)
    elsewhere = tmp_path / "home" / "elsewhere"
    elsewhere.mkdir()
    (parent / "a link").symlink_to(elsewhere)
    beside_lock(parent / "a link").touch()
    (parent / "a file").write_bytes(b"mine")
    before = contents(tmp_path)
    with temporary_folder(parent, NAMES):
        pass
    assert contents(tmp_path) == before


def test_an_export_removes_what_a_killed_one_left_and_nothing_else(tmp_path, victim):
    def beside(name: str, lock: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        if lock:
            beside_lock(folder).touch()
        return folder

    killed = beside(".out.00000000.edgezo-tmp")
    beside_lock(tmp_path / ".out.55555555.edgezo-tmp").touch()  # killed before its folder was there
    beside(".out.mine.edgezo-tmp"), beside(".outer.00000000.edgezo-tmp")
    beside(".out.x.00000000.edgezo-tmp"), beside(".out.11111111.edgezo-tmp", lock=False)
    elsewhere = beside("elsewhere")
    (tmp_path / ".out.22222222.edgezo-tmp").symlink_to(elsewhere)
    (tmp_path / ".out.33333333.edgezo-tmp").write_bytes(b"mine")
    (killed / "link").symlink_to(elsewhere)
    before = contents(tmp_path)
    with ExitStack() as at_end:
        busy = tmp_path / ".out.44444444.edgezo-tmp"
        at_end.enter_context(lock_beside(busy))
        beside(busy.name, lock=False)
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "file").write_bytes(b"ours")
        assert busy.is_dir()
        assert os.listdir(tmp_path / "out") == ["file"]
    after = contents(tmp_path)
    added = {name for name in after if name.startswith(("out", busy.name))}
    gone = {name for name in before if name.startswith((killed.name, ".out.55555555"))}
    assert {n: after[n] for n in after.keys() - added} == {
        n: before[n] for n in before.keys() - gone
    }


def test_a_lock_is_held_by_one(tmp_path):
    with open(tmp_path / "a", "wb") as one, open(tmp_path / "a", "wb") as other:
        assert locked(one) and not locked(other)
        one.close()
        assert locked(other)
