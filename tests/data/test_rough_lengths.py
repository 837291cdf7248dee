"""Lengths from characters: for a plan before a tokenizer is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from edgezo.data.rough_lengths import LEAST_CHARS_A_TOKEN, rough_lengths
from edgezo.data.sources import DataRequest
from edgezo.data.token_stats import TokenStats
from edgezo.errors import UsageError
from edgezo.machine.process_memory import ReadingGuard


def rough(rows: list[dict[str, Any]], folder: Path, **asked: Any) -> TokenStats:
    file = write_rows(folder / "rows.jsonl", rows)
    return rough_lengths(DataRequest(data=str(file), **asked), ReadingGuard(), [])


def test_labelled_rows_are_as_long_as_their_prompts(tmp_path: Path) -> None:
    rows = [{"text": "x" * 30 * (i + 1), "label": ("good", "bad")[i % 2]} for i in range(20)]
    stats = rough(rows, tmp_path)
    assert (stats.kind, stats.label_words, stats.scored, stats.classes) == ("label", 2, 1, 2)
    assert (stats.examples, stats.evaluations) == (18, 2) and stats.from_chars
    longest = (600 + len("\nLabel:")) // LEAST_CHARS_A_TOKEN
    assert max(stats.tokens[0], stats.evaluated) == pytest.approx(longest, abs=3)
    assert sorted(stats.tokens, reverse=True) == list(stats.tokens)


def test_a_long_text_becomes_windows_and_a_long_prompt_is_cut(tmp_path: Path) -> None:
    texts = rough([{"text": "word " * 300}] * 10, tmp_path, max_length=128)
    assert texts.kind == "text" and texts.tokens[0] == 128 and (texts.examples or 0) > 9
    pairs = [{"prompt": "word " * 300, "completion": f" y{i}" * 9} for i in range(10)]
    prompts = rough(pairs, tmp_path, max_length=128)
    assert prompts.kind == "completion" and set(prompts.tokens) == {128} and prompts.examples == 9
    assert 9 <= prompts.scored < 20


def test_rows_that_cannot_be_used_are_refused_with_the_way_out(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": ("good", "bad", "")[i % 3]} for i in range(12)]
    with pytest.raises(UsageError, match="--skip-bad-rows"):
        rough(rows, tmp_path)
    kept = rough(rows, tmp_path, skip_bad_rows=True)
    assert (kept.examples or 0) + kept.evaluations == 8
