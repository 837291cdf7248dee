"""Token sequences, and how those of a step are packed without padding.

Which examples make up step t is a pure function of (seed, t), so a resumed run trains on the examples that an
uninterrupted one would have trained on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgezo.data.trees import Row, Tree, followed, tree_behind, tree_of
from edgezo.machine.limits import EVAL_TOKENS

if TYPE_CHECKING:  # torch is imported where tensors are made; reading data does not need it
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One example, which has one direction: one row, or one row for each option of a choice.

    Where every example has the same options (label words of several tokens), ``rows`` is the prompt alone.
    """

    rows: tuple[Row, ...]
    label: int  # index of the right candidate or option; -1 where there is none
    # What predictions are judged by, if they are: the fields of the row, with "answers", the list of right ones.
    fields: Mapping[str, Any] | None = None
    options: tuple[str, ...] = ()  # the options' texts, of a choice that is judged
    endings: tuple[
        tuple[int, ...], ...
    ] = ()  # tokens of the label words, one of which follows the prompt
    apart: bool = False  # the options pass as whole rows, even if they begin alike

    @property
    def whole_rows(self) -> tuple[Row, ...]:
        """The rows with every option written out, as each would pass alone."""
        if not self.endings:
            return self.rows
        return tuple(followed(self.rows[0], ending) for ending in self.endings)

    @cached_property
    def tree(self) -> Tree | None:
        """The options with what they share only once; None for one row, or where that would save nothing."""
        if self.apart or max(len(self.rows), len(self.endings)) < 2:
            return None
        if self.endings:
            return tree_behind(self.rows[0], self.endings)
        return tree_of(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        tree = self.tree
        return sum(len(row.ids) for row in self.whole_rows) if tree is None else len(tree.ids)

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens that an answer is written after: those before the last stretch to be predicted."""
        row = self.rows[0]
        first = len(row.score_at) - 1
        while first > 0 and row.score_at[first - 1] == row.score_at[first] - 1:
            first -= 1
        return row.ids[: row.score_at[first] + 1]


@dataclass(frozen=True)
class Batch:
    """Rows of b examples laid end to end without padding, once (not for each side), on the CPU."""

    ids: Tensor  # (N,) int64
    lengths: tuple[int, ...]  # (R,) tokens of each row; the sum is N
    row_example: Tensor  # (R,) int64, place 0..b-1 of the row's example in this batch
    trees: tuple[Tree | None, ...]  # (R,) of a row that is a tree; None of a sequence
    score_index: Tensor  # (S,) int64, index into N of the states that are read
    # What is predicted at those states, each token of each state once, ascending; empty for kind "label".
    score_state: Tensor  # (P,) int64, index into S
    score_ids: Tensor  # (P,) int64, the token
    # Which of those tokens each option has. Where nothing is chosen, a row is its only option.
    part_token: Tensor  # (Q,) int64, index into P
    part_option: Tensor  # (Q,) int64, index into O
    option_example: Tensor  # (O,) int64, place of the option's example in this batch
    labels: Tensor  # (b,) int64, -1 where there is none
    slots: tuple[int, ...]  # (b,) slot of each example in the group; directions are keyed by it


@lru_cache(
    maxsize=2
)  # of the epoch and of the one before it, both of which a batch may have rows of
def permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """A random order of n rows, (n,) int64, from Philox's raw bits: numpy may change its shuffles, but not these."""
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(n)
    order = np.argsort(bits, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def batch_indices(n_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step: a pure function of (seed, step).

    In each epoch, steps walk through one random permutation of all rows, so no row repeats within an epoch. A batch may
    span two epochs, or more where it is larger than the data. Raises ValueError without rows, batch size or step >= 0.
    """
    if n_rows < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"no batch for n_rows={n_rows}, batch_size={batch_size}, step={step}")
    out: list[int] = []
    while len(out) < batch_size:
        epoch, start = divmod(step * batch_size + len(out), n_rows)
        order = permutation(n_rows, seed, epoch)
        out += order[start : start + batch_size - len(out)].tolist()
    return out


def micro_batches(
    examples: Sequence[Example], micro_batch: int, most_tokens: int | None = None
) -> list[list[int]]:
    """Slots of each micro-batch, longest examples first, so that lengths in one are alike.

    At most ``micro_batch`` examples, and ``most_tokens`` tokens (or one example).
    """
    counts = [example.tokens for example in examples]
    order = sorted(range(len(counts)), key=lambda slot: (-counts[slot], slot))
    return [order[part] for part, _ in _parts(counts, order, micro_batch, most_tokens)]


def longest_micro_batch(
    token_counts: np.ndarray, micro_batch: int, most_tokens: int | None = None
) -> list[int]:
    """Slots of the micro-batch with the most tokens, of those that ``micro_batches`` makes; no other one is made.

    ``token_counts`` (n,): tokens of each example. A few bytes for each, where all parts would take a hundred.
    """
    order = np.argsort(-token_counts, kind="stable")
    longest, most = slice(0), 0
    for part, tokens in _parts(token_counts, order, micro_batch, most_tokens):
        if tokens > most:
            longest, most = part, tokens
        elif micro_batch * int(token_counts[order[part.start]]) <= most:
            break  # those that follow have shorter examples still
    return [int(slot) for slot in order[longest]]


def _parts(
    token_counts: Sequence[int] | np.ndarray,
    order: Sequence[int] | np.ndarray,
    micro_batch: int,
    most_tokens: int | None,
) -> Iterator[tuple[slice, int]]:
    """(stretch of ``order``, its tokens) of each micro-batch."""
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}, not 1 or more")
    start = 0
    while start < len(order):
        stop, tokens = start, 0
        while stop < len(order) and stop - start < micro_batch:
            n = int(token_counts[order[stop]])
            if stop > start and most_tokens is not None and tokens + n > most_tokens:
                break
            tokens, stop = tokens + n, stop + 1
        yield slice(start, stop), tokens
        start = stop


def pieces(group: Sequence[Example], micro_batch: int, most_tokens: int | None) -> Iterator[Batch]:
    """The micro-batches of a group, packed."""
    for slots in micro_batches(group, micro_batch, most_tokens):
        yield collate([group[slot] for slot in slots], slots)


def evaluation_batches(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of examples, in batches of like length and of at most ``EVAL_TOKENS`` tokens (or one example)."""
    return micro_batches(examples, max(1, len(examples)), EVAL_TOKENS)


@dataclass(frozen=True)
class PackedRows:
    """A ``Batch`` as numpy arrays: its fields, with (n,) int64 where that has tensors."""

    ids: np.ndarray
    lengths: tuple[int, ...]
    row_example: np.ndarray
    trees: tuple[Tree | None, ...]
    score_index: np.ndarray
    score_state: np.ndarray
    score_ids: np.ndarray
    part_token: np.ndarray
    part_option: np.ndarray
    option_example: np.ndarray
    labels: np.ndarray
    slots: tuple[int, ...]


_PACKED = ("ids", "row_example", "score_index", "score_state", "score_ids")
_OPTION_PARTS = ("part_token", "part_option", "option_example")


def packed_rows(
    examples: Sequence[Example], slots: Sequence[int], *, whole: bool = False
) -> PackedRows:
    """Pack examples; ``slots[k]`` is the slot of ``examples[k]`` in the whole group.

    ``whole``: every option passes as a row of its own, and none as part of a tree.
    """
    if len(examples) != len(slots):
        raise ValueError(f"{len(examples)} examples, but {len(slots)} slots")
    numbers = {name: array("q") for name in (*_PACKED, *_OPTION_PARTS)}
    trees, lengths = list[Tree | None](), list[int]()
    for place, example in enumerate(examples):
        tree = None if whole else example.tree
        rows = [tree] if tree is not None else example.whole_rows
        for row in rows:
            trees.append(row if isinstance(row, Tree) else None)
            lengths.append(len(row.ids))
            _append(numbers, row if isinstance(row, Tree) else _Single.of(row), place)
    packed = {name: np.array(values, dtype=np.int64) for name, values in numbers.items()}
    labels = np.array([example.label for example in examples], dtype=np.int64)
    return PackedRows(
        **packed, lengths=tuple(lengths), trees=tuple(trees), labels=labels, slots=tuple(slots)
    )


def collate(examples: Sequence[Example], slots: Sequence[int]) -> Batch:
    """``packed_rows`` as tensors."""
    import torch

    packed = packed_rows(examples, slots)
    tensors = {
        n: torch.from_numpy(getattr(packed, n)) for n in (*_PACKED, *_OPTION_PARTS, "labels")
    }
    return Batch(**tensors, lengths=packed.lengths, trees=packed.trees, slots=packed.slots)


class _Single(NamedTuple):
    """A row in the terms of a tree: each token that is predicted has a state of its own."""

    ids: Sequence[int]
    read_at: Sequence[int]
    states: Sequence[int]
    targets: Sequence[int]
    part_tokens: Sequence[int]
    part_options: Sequence[int]
    options: int = 1

    @staticmethod
    def of(row: Row) -> _Single:
        each = range(len(row.score_ids))
        return _Single(row.ids, row.score_at, each, row.score_ids, each, [0] * len(each))


def _append(numbers: Mapping[str, array[int]], row: Tree | _Single, place: int) -> None:
    """Add the row, or tree, of the example at ``place`` to what ``collate`` has packed so far."""
    begins = {name: len(values) for name, values in numbers.items()}

    def add(name: str, values: Iterable[int], into: str | None = None) -> None:
        first = begins[into] if into else 0
        numbers[name].extend(first + value for value in values)

    add("ids", row.ids)
    add("row_example", [place])
    add("score_index", row.read_at, into="ids")
    add("score_state", row.states, into="score_index")
    add("score_ids", row.targets)
    add("part_token", row.part_tokens, into="score_ids")
    add("part_option", row.part_options, into="option_example")
    add("option_example", [place] * row.options)
