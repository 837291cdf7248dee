"""Links between the processes of a run, where the other end is silent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

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
