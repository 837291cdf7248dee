"""What may stand in the place of a file of edgezo's: links, and things that are no files."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path


def link_to_file(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def link_to_nothing(place: Path, victim: Path) -> None:
    place.symlink_to(victim.parent / "nothing")


def link_to_folder(place: Path, victim: Path) -> None:
    place.symlink_to(victim.parent)


def link_to_link(place: Path, victim: Path) -> None:
    first = victim.parent / "first"
    first.symlink_to(victim)
    place.symlink_to(first)


def link_to_itself(place: Path, victim: Path) -> None:
    place.symlink_to(place.name)


def link_up_and_down(place: Path, victim: Path) -> None:
    place.symlink_to(Path(os.path.relpath(victim, place.parent)))


def hard_link(place: Path, victim: Path) -> None:
    place.hardlink_to(victim)


def folder(place: Path, victim: Path) -> None:
    place.mkdir()


def pipe(place: Path, victim: Path) -> None:
    os.mkfifo(place)


def door(place: Path, victim: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(place.parent)  # the name of a socket is short
        made.bind(place.name)
        os.chdir(here)


FOREIGN: list[Callable[[Path, Path], None]] = [
    *(link_to_file, link_to_nothing, link_to_folder, link_to_link, link_to_itself),
    *(link_up_and_down, hard_link, folder, pipe, door),
]


def contents(root: Path) -> dict[str, object]:
    """What lies below ``root``: bytes of files, targets of links, kinds of the rest."""
    every = {}
    for place in sorted(root.rglob("*")):
        state = place.lstat()
        what: object = stat.S_IFMT(state.st_mode)
        if place.is_symlink():
            what = os.readlink(place)
        elif place.is_file():
            what = place.read_bytes(), state.st_nlink
        every[str(place.relative_to(root))] = what
    return every
