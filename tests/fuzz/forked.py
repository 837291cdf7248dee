"""Programs of edgezo that run in processes of their own, each case in a fork of a process that has imported them.

edgezo starts such a process for a data set, which takes a second. Here one server forks for each case, and the figures
of the fork count as the case's (``lane.Elsewhere``).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NoReturn

from fuzz.lane import TESTS, Elsewhere

from edgezo.errors import EdgezoError

ENDED = 70  # the exit status of a fork that ends with a traceback


def run_forked(program: str, folder: Path, arguments: list[str]) -> None:
    """Call ``main`` of a module of edgezo with ``folder/in`` as standard input; the output is in ``folder/out``.

    Raises EdgezoError where it ends with an exit status or a signal, AssertionError where it ends with a traceback.
    """
    server = _server(program)
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([str(folder), arguments]) + "\n")
    server.stdin.flush()
    status, cpu_s, memory_bytes = json.loads(server.stdout.readline())
    Elsewhere.add(cpu_s, memory_bytes)
    if os.WIFSIGNALED(status):
        raise EdgezoError(f"the process ended with signal {os.WTERMSIG(status)}")
    if os.WEXITSTATUS(status) == ENDED:
        raise AssertionError(
            f"{program} ends with a traceback: {(folder / 'err').read_text()[-300:]}"
        )
    if os.WEXITSTATUS(status):
        raise EdgezoError(f"the process ended with {os.WEXITSTATUS(status)}")


@cache
def _server(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from fuzz.forked import serve; serve({program!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "MALLOC_ARENA_MAX": "2",
            "OMP_NUM_THREADS": "1",
        },
    )


def _program(name: str) -> Callable[[], None]:
    """The ``main`` of a module of edgezo, with what it imports."""
    if name == "parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401

        from edgezo.data import parquet_rows

        return parquet_rows.main
    from edgezo.data import chat_rendering

    settings = {"template": "{{ 1 }}", "special_tokens": {}}
    chat_rendering.ChatTemplate(settings).render([{"role": "user", "content": ""}])
    return chat_rendering.main


def serve(program: str) -> None:
    """Fork for each line of standard input, until it ends."""
    main = _program(program)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        child = os.fork()
        if child == 0:
            _run(main, Path(folder), arguments)
        _, status, used = os.wait4(child, 0)
        memory_bytes = max(0, 1024 * used.ru_maxrss - before)
        answers.write(json.dumps([status, used.ru_utime + used.ru_stime, memory_bytes]) + "\n")
        answers.flush()


def _run(main: Callable[[], None], folder: Path, arguments: list[str]) -> NoReturn:
    status = ENDED
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["main", *arguments]
        sys.stdin = open(folder / "in", encoding="utf-8") if (folder / "in").exists() else None
        sys.stdout = open(folder / "out", "w", encoding="utf-8")
        sys.stderr = open(folder / "err", "w", encoding="utf-8")
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
