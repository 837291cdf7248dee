"""Commands of edgezo in processes that are killed, or find the disk full, at the nth call that changes a file.

write_points.c is preloaded into a server that imports edgezo once; every command is a fork of it. ``record`` lists the
calls that a command makes below a folder: its points. ``strike`` does it again and strikes at one of them.

As a program, this is the server: it reads requests from standard input, one line of JSON each, and answers with the
command's wait status.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
RECORD, KILL_BEFORE, KILL_AFTER, KILL_WITHIN, FULL = range(5)  # as in write_points.c
KILLS = {KILL_BEFORE: "before", KILL_AFTER: "after", KILL_WITHIN: "within"}


class Point(NamedTuple):
    """One call that changes a file."""

    call: str
    takes_room: bool
    file: str  # below the folder


class Ended(NamedTuple):
    """How a command ended."""

    code: int  # its exit code, negative for a signal
    out: str
    err: str


def compile_points(folder: Path) -> Path | None:
    """The library to preload; None where there is no C compiler, or no Linux."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "write_points.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    return None if subprocess.run(command, capture_output=True).returncode else library


@dataclass
class Points:
    """The server, and the folder whose files are watched."""

    server: Any
    folder: Path
    scratch: Path
    clock: str = ""  # a clock of CLOCKS in place of the true one

    @classmethod
    def start(cls, library: Path, folder: Path, scratch: Path) -> Points:
        """``scratch`` is for what commands print, and lies beside ``folder``."""
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        }
        pipe = subprocess.PIPE
        command = [sys.executable, __file__]
        server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        return cls(server, folder, scratch)

    def stop(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def command(self, args: list[object], at: int = 0, answer: int = RECORD) -> Ended:
        """Give a command; at its ``at``th point (from 1 on) it is answered so."""
        request = {
            "args": [str(arg) for arg in args],
            "folder": str(self.folder),
            "scratch": str(self.scratch),
            "at": at,
            "answer": answer,
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        status = json.loads(self.server.stdout.readline())
        out, err = ((self.scratch / name).read_text() for name in ("stdout", "stderr"))
        return Ended(os.waitstatus_to_exitcode(status), out, err)

    def points(self) -> list[Point]:
        """Those of the last command."""
        lines = (self.scratch / "points").read_text().splitlines()
        parts = (line.split(" ", 2) for line in lines)
        return [Point(call, takes == "1", file) for call, takes, file in parts]


def answers(point: Point) -> list[int]:
    """The ways in which a process may be killed there."""
    return [*KILLS] if point.call == "write" else [KILL_BEFORE, KILL_AFTER]


# ---------------------------------------------------------------------------------------------
# The server


def _command(request: dict[str, Any]) -> None:
    scratch = Path(request["scratch"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    from edgezo.cli import main as cli

    ctypes.CDLL(None).arm(
        os.fsencode(request["folder"]),
        os.fsencode(scratch / "points"),
        ctypes.c_long(request["at"]),
        request["answer"],
    )
    code = cli.run(request["args"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import optimum.quanto  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import edgezo.bench.alignment
    import edgezo.run.evaluate
    import edgezo.run.train  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.close(0)
            try:
                _command(json.loads(line))
            finally:
                os._exit(70)
        print(json.dumps(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
