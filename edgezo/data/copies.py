"""Rows that are exact copies of earlier ones: counted, or in a folder of notes removed.

A user may repeat rows to give them weight, so rows of a table are only counted. A note that lies in two folders, or a
mail that two mailboxes hold, was not written twice.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from edgezo.data.row_files import Record


class RowCopies:
    """Counts rows that have the fields of an earlier one: 8 bytes a row, and two rows in 10^19 taken for one."""

    def __init__(self) -> None:
        self._splits: list[array[int]] = []  # a number of each row
        self._removed, self._first = 0, ""

    def counted(self, records: Iterable[Record]) -> Iterator[Record]:
        """The rows of a split as they are."""
        numbers = array("Q")
        self._splits.append(numbers)
        for record in records:
            numbers.append(_number(record))
            yield record

    def removed(self, records: Iterable[Record]) -> Iterator[Record]:
        """The rows without those that are copies."""
        seen = set[int]()
        for record in records:
            number = _number(record)
            if number not in seen:
                seen.add(number)
                yield record
            else:
                self._removed += 1
                self._first = self._first or record.where

    def notes(self, held_out: np.ndarray | None) -> list[str]:
        """A sentence for each kind of copies that there is, with their number.

        ``held_out``: which of the training rows are evaluated on, (n,) bool; None where none are.
        """
        lines = []
        if self._removed:
            lines.append(
                f"copies of earlier texts, removed: {self._removed:,}, the first in {self._first}"
            )
        distinct = [np.unique(np.asarray(numbers)) for numbers in self._splits]
        names = ("rows", "validation rows")
        for numbers, alone, name in zip(self._splits, distinct, names, strict=False):
            if more := len(numbers) - len(alone):
                lines.append(
                    f"{name} that are exact copies of earlier ones, used as they are: {more:,} of {len(numbers):,}"
                )
        if len(distinct) > 1:
            trained, evaluated = (np.asarray(numbers) for numbers in self._splits)
            if held_out is not None:
                trained, evaluated = trained[~held_out], trained[held_out]
            both = np.isin(evaluated, trained).sum()
            lines += [f"rows to evaluate on that are training rows too: {both:,}"] if both else []
        return lines


def _number(record: Record) -> int:
    """A number of 64 bits that stands for the fields of a row."""
    text = json.dumps(record.fields, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
