"""What to do about words of a command line that click does not take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_EXTRA = re.compile(r"Got unexpected extra arguments? \(([^ )]+)")
_OF_SETTINGS = ("finetune", "plan", "eval")  # commands whose model and data are options


def hint(message: str, args: Sequence[str]) -> str:
    """A sentence to put behind click's message about the arguments ``args``; "" where there is nothing to say."""
    match = _EXTRA.match(message)
    if match is not None and match[1] in args:
        return _of_extra(match[1], args)
    if message.startswith("No such option"):
        words = [word for word in args if re.match(r"-[a-zA-Z][a-zA-Z-]+", word)]
        if words:
            return f"Long options have two dashes: -{words[0].partition('=')[0]}."
    return ""


def _of_extra(extra: str, args: Sequence[str]) -> str:
    """What a word that belongs to no option was meant for."""
    at = args.index(extra)
    option, value = ("", *args[:at])[-2:]
    if at > 1 and option.startswith("--") and value[-1:].isdigit() and extra.isalpha():
        return f"Write the unit behind the number without a space: {option} {value}{extra}."
    if args[0] in _OF_SETTINGS and at == 1:
        from edgezo.data.row_files import SUFFIXES

        name = "--data" if Path(extra).suffix.lower() in SUFFIXES else "--model"
        return f"Did you mean {name} {extra}?"
    if option.startswith("--"):
        return f' Put a value of several words in quotes: {option} "{value} {extra}".'
    return ""
