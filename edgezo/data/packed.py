"""Rows and examples in little memory: a few bytes a row instead of a kilobyte of objects.

    PackedRecords    rows of files, as compressed JSON, while they become examples
    PackedExamples   tokens of all examples in one array, as long as a run lasts

Both are sequences that make an object when one is asked for, so whoever reads them sees a list of objects.
"""

from __future__ import annotations

import copy
import json
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from edgezo.data.batches import Example
from edgezo.data.row_files import Record
from edgezo.data.trees import Row, tokens_behind

T = TypeVar("T")

CHUNK_ROWS = 256  # rows that are compressed together,
CHUNK_CHARS = 1 << 20  # or fewer, where they have so many characters
FACTS_ROWS = 1 << 14  # examples or rows whose numbers are summed at once
# What a row predicts: a label word; tokens of its own, the last of which is read, too; or one that is not read.
LABEL_WORD, READ, NOT_READ = 0, 1, 2


class _Objects(Sequence[T]):
    """A sequence that makes its items. A slice is a list."""

    def _item(self, index: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._item(place)


# ---------------------------------------------------------------------------------------------
# Records


class PackedRecords(_Objects[Record]):
    """Rows, each as it was added: fields of JSON values, and where it is from.

    Reading in order is fast; reading at random unpacks up to ``CHUNK_ROWS`` rows for one.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._chunks: list[bytes] = []
        self._starts = array("Q")  # the number of the first row of each chunk
        self._count = 0  # of packed rows
        self._open: list[
            tuple[str, Mapping[str, Any], bool]
        ] = []  # of the chunk that is not packed yet
        self._open_chars = 0
        self._unpacked: tuple[int, list[Any]] = (-1, [])  # the chunk that was read last
        self.extend(records)

    def append(self, record: Record) -> None:
        """Add a row."""
        self._open.append((record.where, record.fields, record.goes_on))
        self._open_chars += sum(len(v) for v in record.fields.values() if isinstance(v, str | list))
        if len(self._open) == CHUNK_ROWS or self._open_chars > CHUNK_CHARS:
            self._pack()

    def extend(self, records: Iterable[Record]) -> None:
        """Add rows."""
        for record in records:
            self.append(record)

    def _pack(self) -> None:
        self._starts.append(self._count)
        self._chunks.append(zlib.compress(json.dumps(self._open).encode(), 1))
        self._count += len(self._open)
        self._open, self._open_chars = [], 0

    def __len__(self) -> int:
        return self._count + len(self._open)

    def _item(self, index: int) -> Record:
        if index >= self._count:
            return Record(*self._open[index - self._count])
        chunk = bisect_right(self._starts, index) - 1
        if self._unpacked[0] != chunk:
            self._unpacked = (chunk, json.loads(zlib.decompress(self._chunks[chunk])))
        return Record(*self._unpacked[1][index - self._starts[chunk]])


class SelectedRecords(_Objects[Record]):
    """Some rows of others, in their order."""

    def __init__(self, records: Sequence[Record], chosen: Iterable[int]) -> None:
        self._records, self._chosen = records, array("Q", chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def _item(self, index: int) -> Record:
        return self._records[self._chosen[index]]


# ---------------------------------------------------------------------------------------------
# Examples


class PackedExamples(_Objects[Example]):
    """Tokenised examples of one kind of rows.

    A row of n tokens takes 2 n + 41 bytes (4 n + 41 where the vocabulary has more than 65,536 words). What it predicts
    follows from its tokens and from where it predicts, which is a few stretches of positions.

    What all rows of an example begin with is stored once. Of options that are the same for all examples (``endings``,
    tokens of the label words) only the prompts are stored.
    Options pass one by one, and not as a tree, where one has more than ``most_in_tree`` tokens (None: never).
    """

    def __init__(
        self,
        examples: Iterable[Example] = (),
        endings: tuple[tuple[int, ...], ...] = (),
        most_in_tree: int | None = None,
    ) -> None:
        self.endings, self.most_in_tree = endings, most_in_tree
        # Of examples with several rows: tokens that all begin with, and of their tree its tokens and states.
        self._shared: dict[int, int] = {}
        self._trees: dict[int, tuple[int, int]] = {}
        self._longest = 0  # tokens of the longest row
        # Of each row its tokens, and the last predicted one if that is not read: 2 bytes each, or 4 once one needs it.
        self._ids = array("H")
        self._row_ends = array("Q")  # where each row ends in ``_ids``
        self._stretches = array("i")  # of positions that predict: first and last of each
        self._stretch_ends = array("Q")  # where each row ends in ``_stretches``
        self._targets = array("b")  # of each row: LABEL_WORD, READ or NOT_READ
        self._example_ends = array("Q")  # where each example ends among the rows
        self._labels = array("i")
        self._judged: dict[
            int, bytes
        ] = {}  # fields and options of the examples that are judged, as JSON
        for example in examples:
            self.append(example)

    @staticmethod
    def of(examples: Sequence[Example]) -> PackedExamples:
        """``examples``, packed unless they are."""
        if isinstance(examples, PackedExamples):
            return examples
        return PackedExamples(examples, examples[0].endings if examples else ())

    def append(self, example: Example) -> None:
        """Add an example. Raises ValueError for a row whose targets are not the tokens after its positions."""
        shared = _alike(example.rows)
        if shared:
            self._shared[len(self)] = shared
            if not self._apart(example.rows) and (tree := example.tree) is not None:
                self._trees[len(self)] = len(tree.ids), len(tree.read_at)
        for number, row in enumerate(example.rows):
            self._append_row(row, shared if number else 0)
        if example.fields is not None or example.options:
            judged = json.dumps([example.fields, example.options], default=str)
            self._judged[len(self)] = judged.encode("utf-8", "surrogatepass")
        self._example_ends.append(len(self._row_ends))
        self._labels.append(example.label)

    def prompts(self) -> PackedExamples:
        """The examples without their options, where these are the same for all: what a linear probe reads."""
        if not self.endings:
            return self
        alone = copy.copy(self)
        alone.endings = ()
        return alone

    def some(self, indices: Iterable[int]) -> PackedExamples:
        """Some of the examples, in this order."""
        chosen = (self[int(i)] for i in indices)
        return PackedExamples(chosen, self.endings, self.most_in_tree)

    def _apart(self, rows: Sequence[Row]) -> bool:
        """Whether the options that these rows are, or are followed by, pass one by one."""
        longest = max(len(row.ids) for row in rows)
        longest += max((len(ending) for ending in self.endings), default=1) - 1
        return self.most_in_tree is not None and longest > self.most_in_tree

    def _append_row(self, row: Row, shared: int) -> None:
        """Add a row but for its first ``shared`` tokens, which are those of the example's first row."""
        kind, whole = LABEL_WORD, array("i", row.ids)
        if row.score_ids:
            kind = NOT_READ if row.score_at[-1] == len(row.ids) - 1 else READ
            if kind == NOT_READ:
                whole.append(row.score_ids[-1])
            pairs = zip(row.score_at, row.score_ids, strict=True)
            if any(whole[at + 1] != target for at, target in pairs):
                raise ValueError("a row's targets are not the tokens that follow its positions")
        if self._ids.itemsize == 2 and max(whole, default=0) >= 1 << 16:
            self._ids = array("i", self._ids)
        self._ids.extend(iter(whole[shared:]))
        self._longest = max(self._longest, len(row.ids))
        self._row_ends.append(len(self._ids))
        for stretch in _stretches(row.score_at):
            self._stretches.extend(stretch)
        self._stretch_ends.append(len(self._stretches))
        self._targets.append(kind)

    def __len__(self) -> int:
        return len(self._labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedExamples) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list: it grows

    def _item(self, index: int) -> Example:
        first = self._example_ends[index - 1] if index else 0
        begin = _bounds(self._row_ends, first)[0]
        shared = self._ids[begin : begin + self._shared.get(index, 0)]
        numbers = range(first, self._example_ends[index])
        rows = tuple(self._row(i, shared if i > first else shared[:0]) for i in numbers)
        fields, options = None, ()
        if index in self._judged:
            fields, options = json.loads(self._judged[index])
        apart = self._apart(rows) if len(rows) > 1 or self.endings else False
        return Example(rows, self._labels[index], fields, tuple(options), self.endings, apart)

    def _row(self, number: int, shared: array[int]) -> Row:
        """The row of this number, which begins with ``shared`` tokens of the example's first row."""
        start, stop = _bounds(self._row_ends, number)
        places = self._stretches[slice(*_bounds(self._stretch_ends, number))]
        ids = array("i", shared + self._ids[start:stop])
        score_at = _positions(places)
        if self._targets[number] == LABEL_WORD:
            return Row(ids, score_at, ())
        targets = array("i", [ids[at + 1] for at in score_at])
        return Row(ids[:-1] if self._targets[number] == NOT_READ else ids, score_at, targets)

    @property
    def stored_bytes(self) -> int:
        """Memory that the examples take."""
        arrays = (self._ids, self._row_ends, self._stretches, self._stretch_ends, self._targets)
        places = (self._example_ends, self._labels)
        texts = sum(len(text) + 100 for text in self._judged.values())
        texts += 100 * len(self._shared) + 200 * len(self._trees)
        return texts + sum(len(a) * a.itemsize for a in (*arrays, *places))

    # -- facts of all examples, without an object for each ------------------------------------------------

    def token_counts(self) -> np.ndarray:
        """Tokens of each example that go through the model, (n,) int32."""
        counts = self._summed(self._row_lengths)
        if self.endings:
            whole = len(self.endings) * (counts - 1) + sum(map(len, self.endings))
            return np.where(self._all_apart(counts), whole, counts + tokens_behind(self.endings)[0])
        for number, shared in self._shared.items():
            ends = self._example_ends[number - 1] if number else 0
            counts[number] += shared * (self._example_ends[number] - ends - 1)
        for number, (tokens, _) in self._trees.items():
            counts[number] = tokens
        return counts

    def scored_counts(self) -> np.ndarray:
        """Positions of each example at which something is predicted, (n,) int32."""
        counts = self._summed(self._row_scores)
        if self.endings:
            apart = self._all_apart(self._summed(self._row_lengths))
            whole, tree = sum(map(len, self.endings)), tokens_behind(self.endings)[1]
            return np.where(apart, whole, tree).astype(np.int32)
        for number, (_, states) in self._trees.items():
            counts[number] = states
        return counts

    def _all_apart(self, prompts: np.ndarray) -> np.ndarray:
        """``_apart`` of prompts with so many tokens, (n,) bool."""
        longest = prompts + max(map(len, self.endings)) - 1
        return (
            np.full(len(prompts), False)
            if self.most_in_tree is None
            else longest > self.most_in_tree
        )

    def longest_row(self) -> int:
        """Tokens of the longest row."""
        return self._longest + max((len(ending) - 1 for ending in self.endings), default=0)

    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each example's ``prompt``, (n,) int64."""
        first_rows = np.concatenate(([0], np.asarray(self._example_ends[:-1], dtype=np.int64)))
        last_stretch = np.asarray(self._stretch_ends)[first_rows[: len(self)]].astype(np.int64) - 2
        return np.asarray(self._stretches)[last_stretch].astype(np.int64) + 1

    def largest_id(self) -> int:
        """The largest token number, read or predicted."""
        words = (token for ending in self.endings for token in ending)
        return int(np.asarray(self._ids).max(initial=max(words, default=0)))

    def _row_lengths(self, first: int, stop: int) -> np.ndarray:
        """Tokens of some rows, (stop - first,) int64."""
        return _lengths(self._row_ends, first, stop) - (
            np.asarray(self._targets[first:stop]) == NOT_READ
        )

    def _row_scores(self, first: int, stop: int) -> np.ndarray:
        """Positions of some rows at which something is predicted, (stop - first,) int64."""
        counts = _lengths(self._stretch_ends, first, stop) // 2
        begin = self._stretch_ends[first - 1] if first else 0
        end = self._stretch_ends[stop - 1] if stop else 0
        pairs = np.asarray(self._stretches[begin:end], dtype=np.int64).reshape(-1, 2)
        return _sums(pairs[:, 1] - pairs[:, 0] + 1, np.cumsum(counts))

    def _summed(self, of_rows: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """A number of each row, summed over the rows of each example, a piece after the other: (n,) int32."""
        out = np.empty(len(self), dtype=np.int32)
        for at in range(0, len(self), FACTS_ROWS):
            to = min(len(self), at + FACTS_ROWS)
            first = self._example_ends[at - 1] if at else 0
            ends = np.asarray(self._example_ends[at:to], dtype=np.int64)
            out[at:to] = _sums(of_rows(first, int(ends[-1])), ends - first)
        return out


def _alike(rows: Sequence[Row]) -> int:
    """How many tokens all of several rows begin with."""
    if len(rows) < 2:
        return 0
    first = rows[0].ids
    most = min(len(row.ids) for row in rows)
    differ = (
        next((at for at in range(most) if row.ids[at] != first[at]), most) for row in rows[1:]
    )
    return min(differ)


def _lengths(ends: array[int], first: int, stop: int) -> np.ndarray:
    """Lengths of the stretches ``first`` to ``stop`` of an array that ``ends`` divides, (stop - first,) int64."""
    return np.diff(
        np.asarray(ends[first:stop], dtype=np.int64), prepend=ends[first - 1] if first else 0
    )


def _bounds(ends: array[int], number: int) -> tuple[int, int]:
    return ends[number - 1] if number else 0, ends[number]


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of consecutive groups of values; group i ends before ``ends[i]``."""
    running = np.concatenate(([0], np.cumsum(values)))
    return np.diff(running[ends], prepend=0)


def _stretches(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    if isinstance(positions, range):
        yield positions[0], positions[-1]
        return
    first = last = None
    for position in positions:
        if last is None or position != last + 1:
            if first is not None and last is not None:
                yield first, last
            first = position
        last = position
    if first is not None and last is not None:
        yield first, last


def _positions(stretches: Sequence[int]) -> Sequence[int]:
    """The positions of stretches: a range where there is one, as rows are made, else an array."""
    if len(stretches) == 2:
        return range(stretches[0], stretches[1] + 1)
    pairs = zip(stretches[::2], stretches[1::2], strict=True)
    return array("i", [at for first, last in pairs for at in range(first, last + 1)])
