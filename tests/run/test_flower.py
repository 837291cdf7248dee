"""A fleet over Flower: the two apps around a grid of this process, and (slow) real processes on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgezo.machine.local_socket import listen

REASON = "pip install 'edgezo[flower]' brings it"
flwr: Any = pytest.importorskip("flwr.app", reason=REASON)
flower: Any = pytest.importorskip("edgezo.run.flower", reason=REASON)
flower_device: Any = pytest.importorskip("edgezo.run.flower_device", reason=REASON)

ROOT = Path(__file__).resolve().parents[2]


class Grid:
    """Hands messages to ClientApps of this process; a node of ``broken`` answers with an error."""

    def __init__(self, sockets: dict[int, Path], broken: Sequence[int] = ()):
        self.sockets, self.broken = sockets, broken
        self.answers: list[Any] = []

    def get_node_ids(self) -> list[int]:
        return [*self.sockets]

    def push_messages(self, messages: Sequence[Any]) -> list[str]:
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"m{node}"
            if node in self.broken:
                answer = flwr.Message(flwr.Error(code=1, reason="broken"), reply_to=message)
            else:
                context: Any = type("C", (), {"node_config": {"device": str(self.sockets[node])}})
                answer = flower_device.losses(message, context)
            self.answers.append(answer)
        return [f"m{message.metadata.dst_node_id}" for message in messages]

    def pull_messages(self, waiting: Sequence[str]) -> list[Any]:
        ready, self.answers = self.answers, []
        return ready


@pytest.fixture
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path, ready, asked = Path(folder) / "s", threading.Event(), list[bytes]()

        def answer(order: bytes) -> bytes:
            asked.append(order)
            return order + b" done"

        def goes_on() -> bool:
            ready.set()
            return len(asked) < 2

        thread = threading.Thread(target=listen, args=(path, answer, goes_on), daemon=True)
        thread.start()
        assert ready.wait(20)
        yield path
        if len(asked) == 2:
            thread.join(20)


def test_orders_go_to_the_device_and_reports_come_back_as_bytes(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity: Any = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(identity, name, 1)
    links = flower.FlowerLinks(Grid({5: device, 6: device, 7: device}, broken=[6]))
    answers = links.exchange({5: b"one\x00", 6: b"two", 7: b"three"}, 20.0)
    assert answers == {5: b"one\x00 done", 7: b"three done"}


@pytest.mark.slow
def test_a_server_and_four_devices_in_processes_write_the_journal_of_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "fleet_demo.sh"), str(tmp_path / "fleet")],
        env={**os.environ, "PYTHON": sys.executable, "MODEL": "tiny", "STEPS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte-equal to its journal: server, anna, bert, cleo, dora" in done.stdout
