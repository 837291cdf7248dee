"""Examples in micro-batches: the longest one is found without making the others."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgezo.data.batches import Example, longest_micro_batch, micro_batches
from edgezo.data.trees import Row


def of_length(tokens: int) -> Example:
    return Example((Row(tuple(range(tokens)), (tokens - 1,), (0,)),), 0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    micro_batch=st.integers(1, 8),
    most_tokens=st.none() | st.integers(1, 40),
)
def test_it_is_the_first_of_those_with_the_most_tokens(
    lengths: list[int], micro_batch: int, most_tokens: int | None
) -> None:
    parts = micro_batches([of_length(n) for n in lengths], micro_batch, most_tokens)
    wanted = max(parts, key=lambda part: sum(lengths[slot] for slot in part))
    assert longest_micro_batch(np.array(lengths), micro_batch, most_tokens) == wanted
