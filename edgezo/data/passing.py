"""Rows that pass the frozen blocks once: which of them, in what order, and in what batches. For every engine.

Standard library and numpy; ``pack`` makes an engine's batch of examples and their slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from edgezo.data.batches import Example, permutation
from edgezo.data.packed import PackedExamples
from edgezo.machine.limits import PASS_TOKENS

# Stream of the Philox generator for the order in which rows are kept. Its seed is always 0: runs with other seeds train
# on the same rows, and so find their states.
_OF_STATES = 2**63 + 2

Packed = TypeVar("Packed")
Pack = Callable[[Sequence[Example], Sequence[int]], Packed]


class Passing(NamedTuple, Generic[Packed]):
    """A batch of a pass, and the rows that have passed with it."""

    batch: Packed
    examples: int  # so far, those to evaluate on included
    trained: int  # training rows among them


def kept_rows(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """The training rows that are kept: the first ``count`` of ``_order``, as they stand in the data."""
    if count >= len(examples):
        return examples
    return PackedExamples.of(examples).some(np.sort(_order(examples)[:count]))


def passing_batches(
    evaluated: Sequence[Example], train: Sequence[Example], kept: int, pack: Pack[Packed]
) -> Iterator[Passing[Packed]]:
    """The batches of a run: the rows to evaluate on, and then ``kept`` rows to train on.

    A batch is what it is however many rows are kept, so the last one may have a few more.
    """
    for batch, done in _filled(evaluated, len(evaluated), pack):
        yield Passing(batch, done, 0)
    for batch, done in _filled((train[int(i)] for i in _order(train)), kept, pack):
        yield Passing(batch, len(evaluated) + min(done, kept), min(done, kept))


def _order(examples: Sequence[Example]) -> np.ndarray:
    """The order in which training rows pass, which no seed changes."""
    return permutation(len(examples), 0, _OF_STATES)


def _filled(
    examples: Iterable[Example], count: int, pack: Pack[Packed]
) -> Iterator[tuple[Packed, int]]:
    """Batches of ``PASS_TOKENS`` tokens, or one example, for the first ``count`` examples; with the examples so far."""
    group: list[Example] = []
    tokens = done = 0
    for example in examples:
        if group and tokens + example.tokens > PASS_TOKENS:
            yield pack(group, range(len(group))), done
            group, tokens = [], 0
            if done >= count:
                return
        group.append(example)
        tokens += example.tokens
        done += 1
    if group:
        yield pack(group, range(len(group))), done
