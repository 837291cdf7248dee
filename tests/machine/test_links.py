"""Links between the processes of a run: where the other end is silent, and where others were there before."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from edgezo.machine import links

WAITING = """
import signal, sys
from edgezo.machine.links import linked
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with linked(1, 2):
        pass
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_signal_ends_a_process_that_waits_for_one_that_never_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING],
            env={
                **os.environ,
                **{"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
                "MASTER_PORT": str(silent.getsockname()[1]),
            },
        )
        try:
            link, _ = silent.accept()  # from here on it waits in code in C
            with link:
                process.send_signal(signal.SIGINT)
                assert process.wait(600) == 130
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_are_started_again_agree_on_a_name_that_none_had(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "MEET_S", 0.0)
    store, names = HashStore(), list[str]()
    with ThreadPoolExecutor(size) as processes:
        for _ in range(20):  # each time the store has what the last ones left there
            made = processes.map(lambda rank: links.name_together(store, rank, size), range(size))
            (name,) = set(made)
            names.append(name)
    assert len(set(names)) == 20


def test_a_process_that_nobody_answers_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOST_S", 0.0)
    for rank in (0, 1):
        with pytest.raises(TimeoutError, match="nothing is heard of"):
            links.name_together(HashStore(), rank, 2)
