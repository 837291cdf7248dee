"""Ctrl-C and SIGTERM at any moment of a command: the process ends with 130 and a line, never with a traceback.

``listen`` is called before anything else is imported. From then on a signal ends the process at once, as there is
nothing to save. While a command runs (``raising``), a signal raises KeyboardInterrupt, so that files and processes are
put away; a run that has begun to train listens for itself (run/state.py). Standard library only.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130
GRACE_S = 10.0  # after a signal that code in C has not noticed; putting away takes less
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ended = threading.Event()  # the command is over: what is left is to print its result
_asked = False  # a signal has come while the command ran


def listen() -> None:
    """From now on end this process at once on a signal. A signal that the parent lets it ignore is ignored."""
    if signal.getsignal(signal.SIGTERM) is _end:
        return  # already
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    sys.unraisablehook = _unraisable


@contextmanager
def raising() -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt, and a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping(then: Callable[[], object] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C ends nothing: the function that is given says whether it has come, and ``then`` is called."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        came.set()
        then()

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def asked() -> bool:
    """Whether a signal has come while the command ran, even if whatever ran then has swallowed its exception."""
    return _asked


def finish() -> None:
    """The command is over: signals come too late to change anything."""
    _ended.set()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int = 0, frame: FrameType | None = None) -> NoReturn:
    """End the process without a word from Python."""
    with suppress(OSError), open(2, "wb", closefd=False) as out:
        out.write(b"edgezo: interrupted\n")
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked:
        _end()
    _asked = True
    raise KeyboardInterrupt


def _watch(pipe: int) -> None:
    """End the process where code in C, or code that catches everything, has gone on after a signal."""
    while os.read(pipe, 1):
        ours = any(signal.getsignal(number) in (_raise, _end) for number in _SIGNALS)
        if ours and not _ended.wait(GRACE_S) and (_asked or signal.getsignal(_SIGNALS[0]) is _end):
            _end()


def _unraisable(problem: Any) -> None:
    """An interrupt in a destructor or a callback, where Python would print it and go on, is raised again outside."""
    if problem.exc_type is not None and issubclass(problem.exc_type, KeyboardInterrupt):
        global _asked
        _asked = False
        _thread.interrupt_main()
    else:
        sys.__unraisablehook__(problem)
