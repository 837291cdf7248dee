"""Commands of edgezo in processes of their own that can be killed, without importing torch again.

A fork server imports edgezo once; every command is a fork of it. ``Blow`` says where inside the
program the process kills itself, as ``kill -9`` would.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "__main__",
        "edgezo.run.train",
        "edgezo.run.evaluate",
        "edgezo.cli.main",
        "transformers.models.llama.modeling_llama",
        "optimum.quanto",
    ]
)


class Blow(NamedTuple):
    """SIGKILL at the ``nth`` time that ``point`` is reached.

    ``part``: 0 before it has done anything, 1 when it has done everything, between them after that
    share of the bytes was written.
    """

    point: str
    nth: int
    part: float


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _strike(
    owner: Any,
    name: str,
    blow: Blow,
    wanted: Callable[..., bool] = lambda *args, **more: True,
    torn: Callable[..., None] = lambda *args: None,
) -> None:
    real, calls = getattr(owner, name), 0

    def struck(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += wanted(*args, **more)
        if not wanted(*args, **more) or calls < blow.nth:
            return real(*args, **more)
        if blow.part == 1:
            real(*args, **more)
        elif blow.part > 0:
            torn(real, blow.part, *args)
        return _die()

    setattr(owner, name, struck)


def _half_file(save: Callable[..., None], part: float, file: Path, *more: Any) -> None:
    save(file, *more)
    os.truncate(file, int(os.path.getsize(file) * part))


def _half_states(append: Callable[..., None], part: float, states: Any, *more: Any) -> None:
    before = states.path.stat().st_size if states.path.exists() else 0
    append(states, *more)
    os.truncate(states.path, before + int((states.path.stat().st_size - before) * part))


def _half_line(write: Callable[..., None], part: float, log: Any, record: Any) -> None:
    write(log, record)
    size = os.path.getsize(log.path)
    line = log.path.read_bytes().splitlines(keepends=True)[-1]
    os.truncate(log.path, size - len(line) + max(1, int(len(line) * part)))


def _arm(blow: Blow) -> None:
    from edgezo.network.exact_head import ExactHead
    from edgezo.network.readout import StateFile
    from edgezo.run import metrics_log, snapshots
    from edgezo.weights import store
    from edgezo.weights.kept_states import StatesFile

    if blow.point == "record":  # the journal's one write a step
        _strike(
            os,
            "write",
            blow,
            wanted=lambda fd, data: bytes(data[:2]) == b"EZ",
            torn=lambda real, part, fd, data: real(fd, data[: max(1, int(len(data) * part))]),
        )
    elif blow.point in ("cut", "sync"):
        _strike(os, {"cut": "ftruncate", "sync": "fsync"}[blow.point], blow)
    elif blow.point == "overlay":  # a write of weights on disk
        _strike(
            os,
            "pwrite",
            blow,
            torn=lambda real, part, fd, data, offset: real(
                fd, data[: int(len(data) * part)], offset
            ),
        )
    elif blow.point == "update":  # of one tile of one tensor
        _strike(store.WeightStore, "_advance_on_grid", blow)
    elif blow.point == "head":
        _strike(ExactHead, "update", blow)
    elif blow.point == "snapshot":
        _strike(snapshots, "write_saved", blow, torn=_half_file)
    elif blow.point == "states":
        _strike(StateFile, "append", blow, torn=_half_states)
    elif blow.point == "kept states":
        _strike(StatesFile, "append", blow, torn=_half_states)
    elif blow.point == "metrics":
        _strike(metrics_log.MetricsLog, "write", blow, torn=_half_line)
    else:  # the rename that gives a file its name
        named = blow.point
        _strike(os, "replace", blow, wanted=lambda source, goal: Path(goal).name == named)


def _command(
    args: list[str],
    output: Path,
    blow: Blow | None,
    largest_file: int | None,
    threads: int,
    cache: str,
) -> None:
    os.environ["EDGEZO_CACHE"] = cache
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    import torch

    from edgezo.cli import main as cli

    torch.set_num_threads(threads)
    if blow is not None:
        _arm(blow)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    code = cli.run(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Running:
    """A command under way."""

    process: Any
    output: Path

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """(exit code, negative for a signal; standard output; standard error), when it has ended."""
        self.process.join()
        out, err = (
            file.read_text() if file.exists() else ""
            for file in (self.output / "stdout", self.output / "stderr")
        )
        return self.process.exitcode, out, err


def start(
    args: list[str], output: Path, blow: Blow | None = None, *, largest_file: int | None = None
) -> Running:
    """Begin ``edgezo ARGS``; what it prints goes to files in ``output``.

    ``largest_file``: bytes that no file may be larger than, as if the disk were full.
    """
    output.mkdir(exist_ok=True)
    import torch

    # The server took its threads and its cache from the environment of the test that began it: other threads give
    # other bits.
    more = (blow, largest_file, torch.get_num_threads(), os.environ["EDGEZO_CACHE"])
    process = _CONTEXT.Process(target=_command, args=(args, output, *more))
    process.start()
    return Running(process, output)


def watch(running: Running, file: Path, size_bytes: int) -> None:
    """Return when ``file`` has that size, or the command has ended."""
    ended: list[object] = []
    while not ended:
        if file.exists() and file.stat().st_size >= size_bytes:
            return
        ended = wait([running.process.sentinel], timeout=0.002)
