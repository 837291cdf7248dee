"""Token sequences, and how those of a step are packed without padding.

Which examples make up step t is a pure function of (seed, t), so a resumed run trains on the examples that an
uninterrupted one would have trained on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgezo.machine.limits import EVAL_TOKENS

if TYPE_CHECKING:  # torch is imported where tensors are made; reading data does not need it
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One token sequence that goes through the model. A last token that is only predicted is not in ``ids``.

    ``score_at`` are the positions in ``ids`` whose hidden states are read: a causal model predicts the token after
    them, a masked model the mask there. ``score_ids`` are the tokens to be predicted; () for kind "label", where the
    label words are the candidates.
    """

    ids: Sequence[int]
    score_at: Sequence[int]
    score_ids: Sequence[int]


@dataclass(frozen=True)
class Example:
    """One example, which has one direction: one row, or one row for each option of a choice."""

    rows: tuple[Row, ...]
    label: int  # index of the right candidate or option; -1 where there is none
    # What predictions are judged by, if they are: the fields of the row, with "answers", the list of right ones.
    fields: Mapping[str, Any] | None = None
    options: tuple[str, ...] = ()  # the options' texts, of a choice that is judged

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
    score_index: Tensor  # (P,) int64, index into N
    score_ids: Tensor  # (P,) int64, empty for kind "label"
    score_row: Tensor  # (P,) int64, row of each scored position
    labels: Tensor  # (b,) int64, -1 where there is none
    slots: tuple[int, ...]  # (b,) slot of each example in the group; directions are keyed by it


def tokens_of(example: Example) -> int:
    """Tokens of all rows of an example."""
    return sum(len(row.ids) for row in example.rows)


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
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}, not 1 or more")
    parts: list[list[int]] = []
    tokens = 0  # of the last part
    for slot in sorted(range(len(examples)), key=lambda slot: (-tokens_of(examples[slot]), slot)):
        n = tokens_of(examples[slot])
        over = most_tokens is not None and tokens + n > most_tokens
        if not parts or over or len(parts[-1]) == micro_batch:
            parts.append([])
            tokens = 0
        parts[-1].append(slot)
        tokens += n
    return parts


def pieces(group: Sequence[Example], micro_batch: int, most_tokens: int | None) -> Iterator[Batch]:
    """The micro-batches of a group, packed."""
    for slots in micro_batches(group, micro_batch, most_tokens):
        yield collate([group[slot] for slot in slots], slots)


def evaluation_batches(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of examples, in batches of like length and of at most ``EVAL_TOKENS`` tokens (or one example)."""
    return micro_batches(examples, max(1, len(examples)), EVAL_TOKENS)


def collate(examples: Sequence[Example], slots: Sequence[int]) -> Batch:
    """Pack examples; ``slots[k]`` is the slot of ``examples[k]`` in the whole group."""
    import torch

    if len(examples) != len(slots):
        raise ValueError(f"{len(examples)} examples, but {len(slots)} slots")
    rows = [(place, row) for place, example in enumerate(examples) for row in example.rows]
    ids, score_index, score_ids, score_row = (array("q") for _ in range(4))
    for number, (_, row) in enumerate(rows):
        score_index.extend(len(ids) + at for at in row.score_at)
        score_row.extend(number for _ in row.score_at)
        score_ids.extend(iter(row.score_ids))
        ids.extend(iter(row.ids))

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64))

    return Batch(
        ids=tensor(ids),
        lengths=tuple(len(row.ids) for _, row in rows),
        row_example=tensor([place for place, _ in rows]),
        score_index=tensor(score_index),
        score_ids=tensor(score_ids),
        score_row=tensor(score_row),
        labels=tensor([example.label for example in examples]),
        slots=tuple(slots),
    )
