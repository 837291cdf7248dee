"""A JSON array is read one element at a time: a file of many rows takes no more memory than its largest row.

The array is all of the file, or a list in an object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from typing import IO

from edgezo.machine.foreign import clip
from edgezo.machine.process_memory import Guard

PIECE_CHARS = 1 << 20  # so much of a file is read before the guard is asked again
_FOLLOWS = tuple(",]}: \t\r\n")
_ELEMENTS = json.JSONDecoder()


class JsonArray:
    """An array in a file: its elements are cut apart as they are read."""

    def __init__(self, file: IO[str], name: str, guard: Guard) -> None:
        self._file, self._name, self._guard = file, name, guard
        self._text, self._at, self._ended = "", 0, False

    def elements(self) -> Iterator[str]:
        """The text of each element. Raises ValueError where the text is no array."""
        yield from self.items()
        if self._next():
            raise ValueError(
                f"something follows its end: {clip(self._text[self._at :].strip(), 60)}"
            )

    def items(self) -> Iterator[str]:
        """The text of each element of the array that begins here; what follows it is not read."""
        self._expect("[")
        if self._next() == "]":
            self._at += 1
            return
        yield self._element()
        while self._next() == ",":
            self._at += 1
            yield self._element()
        self._expect("]")

    def enter(self, lists: Collection[str], objects: Collection[str]) -> bool:
        """Go to the first list of an object that has one of these names, also in inner objects that are named.

        False where there is none. Raises ValueError where the text is no object.
        """
        self._expect("{")
        while self._next() == '"':
            name = json.loads(self._element())
            self._expect(":")
            if name in lists and self._next() == "[":
                return True
            if name in objects and self._next() == "{":
                self._at += 1
                continue
            self._element()
            if self._next() == ",":
                self._at += 1
        return False

    def _element(self) -> str:
        """The text of the element that begins here; as much is read as it has."""
        self._next()
        while True:
            try:
                _, end = _ELEMENTS.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                if not self._more():
                    raise
                continue
            n_chars = end - self._at
            # A number may go on in the next piece: what follows an element is a comma, the end, or white space.
            if self._text[end : end + 1] in _FOLLOWS or not self._more():
                text = self._text[self._at : self._at + n_chars]
                self._at += n_chars
                return text

    def _expect(self, character: str) -> None:
        if (there := self._next()) != character:
            shown = repr(there) if there else "the end of the file"
            raise ValueError(f"{character!r} is missing: {shown} stands in its place")
        self._at += 1

    def _next(self) -> str:
        """The next character that is no white space, which stays; "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read on, at least as much as is waiting, so that a long element is looked at a few times only."""
        waiting = len(self._text) - self._at
        self._guard.check(4 * sys.getsizeof(self._text) if waiting > PIECE_CHARS else 0, self._name)
        piece = "" if self._ended else self._file.read(max(PIECE_CHARS, waiting))
        self._ended = not piece
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)
