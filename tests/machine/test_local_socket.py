"""Bytes between two processes of one machine: what is answered, who may ask, and what is refused."""

from __future__ import annotations

import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.local_socket import ask, listen


@pytest.fixture
def place() -> Iterator[Path]:
    """A path that is short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "s"


class Listener:
    """A thread that answers requests backwards, until it is asked to end."""

    def __init__(self, path: Path):
        self.path, self.ready = path, threading.Event()
        self.thread = threading.Thread(target=listen, args=(path, self.answer, self.goes_on))
        self.requests: list[bytes] = []

    def answer(self, request: bytes) -> bytes:
        self.requests.append(request)
        return request[::-1]

    def goes_on(self) -> bool:
        self.ready.set()
        return self.requests[-1:] != [b"end"]

    def __enter__(self) -> Listener:
        self.thread.start()
        assert self.ready.wait(20)
        return self

    def __exit__(self, *error: object) -> None:
        assert ask(self.path, b"end") == b"dne"
        self.thread.join(20)
        assert not self.path.exists()


def test_requests_are_answered_one_after_the_other(place: Path) -> None:
    with Listener(place):
        for request in (b"", b"abc", bytes(range(256)) * 4000):
            assert ask(place, request) == request[::-1]


def test_only_the_user_may_ask(place: Path) -> None:
    with Listener(place):
        assert stat.S_IMODE(place.stat().st_mode) == 0o600


@pytest.mark.parametrize("sent", [b"", b"abc", b"\xff" * 8, (10).to_bytes(8, "little") + b"abc"])
def test_who_asks_no_whole_request_stops_nothing(sent: bytes, place: Path) -> None:
    with Listener(place):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(str(place))
            link.sendall(sent)
        assert ask(place, b"abc") == b"cba"


def test_nobody_there_is_an_error_with_the_path(place: Path) -> None:
    with pytest.raises(EdgezoError, match=str(place)):
        ask(place, b"abc")


def test_a_socket_that_a_kill_has_left_is_replaced_and_one_in_use_is_not(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(place))
    with Listener(place):
        with pytest.raises(EdgezoError, match="another process listens"):
            listen(place, bytes, lambda: False)
        assert ask(place, b"abc") == b"cba"


def test_a_file_and_a_long_path_are_refused(place: Path) -> None:
    place.write_text("mine")
    with pytest.raises(UsageError, match="no socket"):
        listen(place, bytes, lambda: False)
    assert place.read_text() == "mine"
    with pytest.raises(UsageError, match="shorter"):
        listen(place.with_name("s" * 120), bytes, lambda: False)
