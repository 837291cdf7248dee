"""What a tokenizer must do before its tokens are believed: marks are one token each, and text comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import clip

# Words, digits, spaces, lines and letters of other scripts, as texts have them.
SAMPLE = "The year 2024: f(x) = 10 -- isn't it?\n\n  naïve café, ümlaut; Привет 世界 \U0001f600 end"
_SHOWN = 40


def checked(tokenizer: Any, path: Path) -> list[str]:
    """Notes on what a tokenizer loses of a text. Raises EdgezoError for a special token that is not one token."""
    for role, token in tokenizer.special_tokens_map.items():
        for text in token if isinstance(token, list) else [token]:
            _check_mark(tokenizer, role, str(text), path)
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if back.strip() == SAMPLE:
        return []
    lost = _first_difference(SAMPLE, back.strip())
    return [
        f"the tokenizer of {path} does not give back every text: of {SAMPLE[lost : lost + 12]!r} comes "
        f"{back.strip()[lost : lost + 12]!r}"
    ]


def _check_mark(tokenizer: Any, role: str, text: str, path: Path) -> None:
    number = tokenizer.convert_tokens_to_ids(text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids != [number]:
        raise EdgezoError(
            f"The tokenizer of {path} takes its {role} {clip(text, _SHOWN)!r} apart: it is the token {number}, but "
            f"as text it becomes {ids[:6]}. Its files contradict each other: fetch them again."
        )


def _first_difference(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(text), len(other)))
