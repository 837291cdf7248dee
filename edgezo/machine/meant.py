"""What a user has probably meant by a name, a number or a path that cannot be used. Standard library only."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable
from pathlib import Path


def nearest(value: object, names: Iterable[str]) -> str:
    """A question for the name that is spelled most like ``value``; "" where none is like it."""
    known = list(names)
    near = difflib.get_close_matches(str(value), known, n=1)
    near = near or difflib.get_close_matches(str(value).lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
_WRITTEN_NUMBERS = (  # how people write numbers, each with the factor and the digits
    (re.compile(r"([0-9.]+)\s*%"), 0.01),
    (re.compile(r"([0-9.]+)\s*[kK]"), 1000),
    (re.compile(r"([0-9.]+)\s*M"), 1_000_000),
)


def plain_number(value: object) -> str:
    """A question for the number that ``value`` hardly can but mean: 1,000, 0,1, 1k or 10%; "" for other text."""
    text = value.strip() if isinstance(value, str) else ""
    candidate = text
    if _THOUSANDS.fullmatch(text):
        candidate = text.replace(",", "")
    elif text.count(",") == 1:
        candidate = text.replace(",", ".")
    for form, factor in _WRITTEN_NUMBERS:
        if match := form.fullmatch(text):
            with contextlib.suppress(ValueError):
                candidate = f"{float(match[1]) * factor:.12g}"
    try:
        float(candidate)
    except ValueError:
        return ""
    return f"; did you mean {candidate}?"


def meant_path(path: Path) -> str:
    """What a path that is not there may have been meant for: a file beside it of nearly this name; "" if none is."""
    if path.parts and path.parts[0] in ("http:", "https:"):
        return ". An address is not read: download the file, and give its path"
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [file.name for file in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
