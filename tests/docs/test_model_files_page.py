"""The page of model files names what the code reads and refuses, no less and no more."""

from __future__ import annotations

import re

import pytest
from pages import ROOT

from edgezo.network.foreign_config import ROPE_TYPES
from edgezo.network.gguf_tokenizer import SPLITTINGS
from edgezo.weights.file_kinds import _CODES
from edgezo.weights.gguf_header import _READABLE

PAGE = (ROOT / "docs" / "model-files.md").read_text(encoding="utf-8")


def between(start: str, end: str) -> str:
    return PAGE.split(start, 1)[1].split(end, 1)[0]


def test_the_types_of_gguf_tensors_are_those_that_are_read() -> None:
    listed = re.findall(r"\b(?:BF|F|Q)\d+(?:_\w)?", between("Those of GGUF are", "A value"))
    assert set(listed) == {kind.name for kind in _READABLE.values()}


def test_the_names_of_splitting_rules_are_those_of_the_table() -> None:
    listed = re.findall(r"`([^`]+)`", between("These names are known:", "A file with another"))
    assert set(listed) == set(SPLITTINGS) and len(listed) == len(SPLITTINGS)


def test_every_scaling_of_rotary_positions_has_a_row() -> None:
    rows = re.findall(r"^\| (.*?) \|", between("**Rotary positions:**", "**Tokenizer.**"), re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == ROPE_TYPES


@pytest.mark.parametrize(
    "library", sorted({lib for libs in _CODES.values() for lib in libs.split(" or ")})
)
def test_every_library_of_codes_is_named(library: str) -> None:
    assert library in PAGE
