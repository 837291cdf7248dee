"""Tables as text: CSV and its relatives, whose cells stand between commas, semicolons, tabs or bars.

Python's csv module reads the cells. What it does not know is found here: what stands between cells, which line is the
header, and where a row began.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import chain

SEPARATORS = (",", ";", "\t", "|")
SEPARATOR_NAMES = {";": "semicolons", "\t": "tabs", "|": "bars"}
# Spreadsheets write it as a first line; it names what stands between cells.
_SAYS_SEPARATOR = re.compile(r"sep=(.)\s*")
# Characters of a cell: the memory guard bounds it, not this module's 131,072.
_MOST_CELL_CHARS = 2**31 - 1
_CHECK_CHARS = 1 << 20  # the guard is asked after so many characters of one row


class Table:
    """The rows of a table. ``check`` is asked, with a number of bytes, before a row that goes on and on goes on."""

    def __init__(self, lines: Iterator[str], tabs: bool, check: Callable[[int], None]):
        csv.field_size_limit(_MOST_CELL_CHARS)
        self._check, self._lines, self._number, self._row_chars = check, lines, 0, 0
        first = self._first_line()
        says = _SAYS_SEPARATOR.fullmatch(first)
        if says:
            first = self._first_line()
        self.separator = says[1] if says else "\t" if tabs else _separator_of(first)
        self._before = self._number - 1 if first else 0  # lines that the reader does not see
        seen = chain([first] if first else [], self._counted())
        self._reader = csv.reader(seen, delimiter=self.separator)
        self.header = [name.strip() for name in next((row for row in self._reader if row), [])]

    def rows(self) -> Iterator[tuple[int, int, list[str]]]:
        """(first line, last line, cells) of each row; empty lines are no rows."""
        before = self._line
        for row in self._reader:
            self._row_chars = 0
            first, before = before + 1, self._line
            if len(row) > 1 or (row and (len(self.header) == 1 or row[0].strip())):
                yield first, before, row

    @property
    def _line(self) -> int:
        return self._before + self._reader.line_num

    def _first_line(self) -> str:
        """The next line that is not empty; "" at the end."""
        for line in self._lines:
            self._number += 1
            if line.strip():
                return line
        return ""

    def _counted(self) -> Iterator[str]:
        for line in self._lines:
            before = self._row_chars
            self._row_chars += len(line)
            if self._row_chars // _CHECK_CHARS > before // _CHECK_CHARS:
                self._check(4 * self._row_chars)
            yield line


def _separator_of(header: str) -> str:
    """What stands between the cells of a header: what makes the most of them, the comma where it makes as many."""
    return max(
        SEPARATORS, key=lambda separator: len(next(csv.reader([header], delimiter=separator), []))
    )
