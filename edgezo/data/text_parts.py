"""Where a long text may be cut: behind a paragraph, else a line, else a sentence, else a word."""

from __future__ import annotations

from collections.abc import Iterator

_ENDS = ("\n\n", "\n", ". ", " ")


def best_cut(text: str, low: int, high: int) -> int:
    """The place between ``low`` and ``high`` where a cut does least harm; ``high`` where a word fills the stretch."""
    for end in _ENDS:
        if (at := text.rfind(end, low, high)) >= 0:
            return at + len(end)
    return high


def text_parts(text: str, most: int) -> Iterator[str]:
    """The text in parts of at most ``most`` characters, cut in the second half of each."""
    start = 0
    while len(text) - start > most:
        stop = best_cut(text, start + most // 2, start + most)
        yield text[start:stop]
        start = stop
    yield text[start:]
