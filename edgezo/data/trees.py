"""Token sequences that go through the model: rows, and rows of one example as a tree.

The options of a choice begin alike: with the prompt, and often with a token or two of their own. As a tree each token
stands once after the same tokens before it, and passes once. A causal model gives it the state that it would have in
each of the rows (attention: network/packing.py).

    prompt - top - up - failed          4 + 3 tokens for three options of 3 more tokens each
                      - limits
           - card - payment - fee
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

# A tree is made where it has at most this share of the tokens of its rows: attention within a tree costs more.
MOST_SHARE = 0.8


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
class Tree:
    """The options of one example. The first ``trunk`` tokens are a sequence that all of them begin with."""

    ids: array[int]  # (n,) tokens, each behind its parent
    parents: array[int]  # (n,) place of the token before each; -1 of the first
    trunk: int
    read_at: array[int]  # (s,) places whose states are read
    # The tokens that are predicted there, ascending by state: each token of a state once, whichever options have it.
    states: array[int]  # (p,) index into ``read_at``
    targets: array[int]  # (p,) the token
    # Which of those tokens each option has.
    part_tokens: array[int]  # (q,) index into ``targets``
    part_options: array[int]  # (q,) number of the option
    options: int

    @cached_property
    def depths(self) -> np.ndarray:
        """The position of each token in the rows that it is part of, (n,) int64."""
        depths = np.arange(len(self.ids))
        for at in range(self.trunk, len(depths)):
            depths[at] = depths[self.parents[at]] + 1
        return depths

    @cached_property
    def seen(self) -> np.ndarray:
        """Which tokens each token behind the trunk sees, (n - trunk, n) bool: those on its way, and itself."""
        n, trunk = len(self.ids), self.trunk
        seen = np.zeros((n - trunk, n), dtype=bool)
        seen[:, :trunk] = True
        for at in range(trunk, n):
            parent = self.parents[at]
            if parent >= trunk:
                seen[at - trunk] |= seen[parent - trunk]
            seen[at - trunk, at] = True
        return seen


def followed(prompt: Row, ending: Sequence[int]) -> Row:
    """The row of a prompt with these tokens behind it, which are predicted."""
    n = len(prompt.ids)
    ids = array("i", prompt.ids)
    ids.extend(ending[:-1])
    return Row(ids, range(n - 1, n - 1 + len(ending)), array("i", ending))


def tree_of(rows: Sequence[Row]) -> Tree | None:
    """The tree of an example's rows, which share their first token at least; None where it would save too little."""
    if not all(len(row.score_ids) for row in rows):
        return None
    maker = _Maker()
    for option, row in enumerate(rows):
        maker.add(option, row)
    if len(maker.ids) > MOST_SHARE * sum(len(row.ids) for row in rows) or maker.roots > 1:
        return None
    return maker.made()


def tree_behind(prompt: Row, endings: tuple[tuple[int, ...], ...]) -> Tree:
    """The tree of a prompt that one of ``endings`` follows: as ``tree_of`` the rows, with most of it made once."""
    n, behind = len(prompt.ids), _tree_of_endings(endings)
    ids = array("i", prompt.ids)
    ids.extend(behind.ids[1:])
    parents = array("i", range(-1, n - 1))
    parents.extend(n - 1 + parent for parent in behind.parents[1:])
    return Tree(
        ids=ids,
        parents=parents,
        trunk=n - 1 + behind.trunk,
        read_at=array("i", (n - 1 + at for at in behind.read_at)),
        states=behind.states,
        targets=behind.targets,
        part_tokens=behind.part_tokens,
        part_options=behind.part_options,
        options=behind.options,
    )


def tokens_behind(endings: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """How many tokens the tree of a prompt has behind the prompt, and how many of its states are read."""
    tree = _tree_of_endings(endings)
    return len(tree.ids) - 1, len(tree.read_at)


@lru_cache(maxsize=4)
def _tree_of_endings(endings: tuple[tuple[int, ...], ...]) -> Tree:
    """The tree behind a prompt of one token."""
    maker = _Maker()
    for option, ending in enumerate(endings):
        maker.add(option, followed(Row((0,), (0,), ()), ending))
    return maker.made()


class _Maker:
    """Adds rows to a tree one by one."""

    def __init__(self) -> None:
        self.ids, self.parents = array("i"), array("i")
        self.roots = 0
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) -> place
        self._predicted: dict[tuple[int, int], int] = {}  # (place, token) -> number
        self._parts: list[tuple[int, int]] = []  # (number of a predicted token, option)
        self._options = 0

    def add(self, option: int, row: Row) -> None:
        """Add the row of an option."""
        at, places = -1, array("i")
        for token in row.ids:
            place = self._children.setdefault((at, token), len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.parents.append(at)
                self.roots += at < 0
            at = place
            places.append(at)
        for position, target in zip(row.score_at, row.score_ids, strict=True):
            key = (places[position], target)
            self._parts.append((self._predicted.setdefault(key, len(self._predicted)), option))
        self._options += 1

    def made(self) -> Tree:
        """The tree of the rows so far."""
        children = np.bincount(np.asarray(self.parents[1:]), minlength=len(self.ids))
        ends = np.flatnonzero(children != 1)  # the first branch, or the end of the only row
        order = sorted(self._predicted, key=lambda key: (key[0], self._predicted[key]))
        rank = {self._predicted[key]: number for number, key in enumerate(order)}
        read_at, states = array("i"), array("i")
        for place, _ in order:
            if not read_at or read_at[-1] != place:
                read_at.append(place)
            states.append(len(read_at) - 1)
        return Tree(
            ids=self.ids,
            parents=self.parents,
            trunk=_trunk(self.parents, int(ends[0]) + 1),
            read_at=read_at,
            states=states,
            targets=array("i", (target for _, target in order)),
            part_tokens=array("i", (rank[number] for number, _ in self._parts)),
            part_options=array("i", (option for _, option in self._parts)),
            options=self._options,
        )


def _trunk(parents: Sequence[int], most: int) -> int:
    """How many of the first ``most`` tokens each follow the one before it."""
    return next((at for at in range(most) if parents[at] != at - 1), most)
