"""A call from a program of the user's: what the process held before is a part of its plan, and it gets memory back.

The cap is on the whole process. In a notebook that holds data of its own, a plan therefore starts from what was there,
and says how much of it is the program's.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import NamedTuple

from edgezo.machine.hardware import Machine
from edgezo.machine.process_memory import allocator_policy, malloc_trim, peak_rss_bytes, resident
from edgezo.plan.calibration import NO_CALLER, Caller


class _Call(NamedTuple):
    """The process when a program called."""

    caller: Caller = NO_CALLER
    peak_bytes: int | None = None  # of its memory until then; None: edgezo is a process of its own


_OF_NOBODY = _Call()
_call: ContextVar[_Call] = ContextVar("call", default=_OF_NOBODY)


def present_caller() -> Caller:
    """What the calling program held before edgezo began; nothing where edgezo is a process of its own."""
    return _call.get().caller


def peak_before_bytes() -> int:
    """The peak of this process's memory before it was edgezo's, for which no cap is to blame."""
    before_bytes = _call.get().peak_bytes
    return peak_rss_bytes() if before_bytes is None else before_bytes


def usable(machine: Machine) -> Machine:
    """The machine as this process may use it: what its program holds is taken from the memory that is free."""
    return replace(machine, available_bytes=machine.available_bytes + present_caller().data_bytes)


@contextmanager
def called() -> Iterator[None]:
    """A block in which edgezo works for the program of this process.

    Begin it before PyTorch is imported where that is possible, so that the program is not charged with it. A block
    inside another measures anew what the program holds.
    """
    allocator_policy()
    gc.collect()  # what the program has let go of is none of its memory
    malloc_trim()
    now = resident()
    before = _call.set(_Call(Caller(now.anon_bytes, now.file_bytes), peak_before_bytes()))
    try:
        yield
    finally:
        _call.reset(before)
        give_back()


def give_back() -> None:
    """Let freed memory go to the system again: while a model computes, much of it is kept for the next step."""
    allocator_policy()
    malloc_trim()


@contextmanager
def with_threads(threads: int | None) -> Iterator[None]:
    """A block in which PyTorch takes so many threads; None: as many as before."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
