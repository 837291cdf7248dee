"""Noise that a device makes itself has the bits of a CPU's, and so has all that is made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgezo.machine import philox
from edgezo.zo import noise
from edgezo.zo.directions import DIRECTION_KINDS, Target
from edgezo.zo.noise import Key, exact_grid

CPU = torch.device("cpu")
addresses = st.tuples(
    st.integers(-(2**63), 2**64),  # seed
    st.integers(0, 2**40),  # step
    st.integers(0, 2**64 - 1),  # tensor
    st.integers(0, 11),  # stream
)
DRAWS = (noise.signs, noise.normals, noise.uniform)


def as_a_device(draw, *address):
    """What ``draw`` gives where torch makes the noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_MAKERS", {})
        return draw(*address, CPU)


@given(addresses, st.integers(0, 3000), st.integers(0, 9), st.integers(1, 600))
@settings(max_examples=40, deadline=None)
def test_torch_makes_the_bits_of_the_cpu(address, start, count, width):
    (seed, step, tensor, stream), rows = address, slice(start, start + count)
    for draw in DRAWS:
        wanted = draw(Key(seed, step), tensor, stream, rows, width)
        made = as_a_device(draw, Key(seed, step), tensor, stream, rows, width)
        assert made.dtype == wanted.dtype and torch.equal(made, wanted)


@given(addresses, st.lists(st.integers(0, 2**20), max_size=6), st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_rows_in_any_order_are_those_rows(address, numbers, width):
    seed, step, tensor, stream = address
    rows = torch.tensor(numbers, dtype=torch.int64)
    for draw in DRAWS:
        runs = [draw(Key(seed, step), tensor, stream, slice(n, n + 1), width) for n in numbers]
        wanted = torch.cat(runs) if runs else torch.empty(0, width)
        for made in (
            draw(Key(seed, step), tensor, stream, rows, width),
            as_a_device(draw, Key(seed, step), tensor, stream, rows, width),
        ):
            assert made.shape == (len(numbers), width) and torch.equal(made, wanted.to(made.dtype))


def test_a_matrix_that_is_made_in_parts_is_that_of_one_part(monkeypatch):
    address = (Key(3, 5), 7, noise.DENSE, slice(11, 40), 333)
    for draw in DRAWS:
        whole = as_a_device(draw, *address)
        with monkeypatch.context() as patch:
            patch.setattr(philox, "_MADE_AT_ONCE", 1000)
            assert torch.equal(as_a_device(draw, *address), whole)


@given(st.integers(0, 2**64 - 1), st.integers(1, 2000))
@settings(max_examples=20, deadline=None)
def test_a_random_order_is_that_of_the_cpu(seed, size):
    blocks = torch.arange(-(-size // 4))
    raw = philox.words_of(noise.address_of(Key(seed, 1), 2, noise.SPAN), blocks)
    drawn = raw.reshape(-1)[:size] ^ torch.iinfo(torch.int64).min
    wanted = noise.permutation(Key(seed, 1), 2, noise.SPAN, size)
    np.testing.assert_array_equal(torch.argsort(drawn, stable=True).numpy(), wanted)


@pytest.mark.parametrize("kind", DIRECTION_KINDS)
def test_updates_along_directions_that_torch_draws_are_those_of_the_cpu(kind, monkeypatch):
    directions, key = DIRECTION_KINDS[kind], Key(3, 60)
    coefficients = torch.from_numpy(exact_grid(np.linspace(-1.0, 2.0, 5)))
    targets = (Target("w", 70, 41, False), Target("b", 70, 1, True))
    rows = (slice(5, 60), torch.tensor([7, 3, 69]))

    def sums() -> list[torch.Tensor]:
        made = []
        for target in targets:
            for some in rows:
                made.append(directions.weighted_sum(key, target, coefficients, some))
            made.append(directions.row_signs(key, target, (4, 1, 2)).float())
        return made

    wanted = sums()
    monkeypatch.setattr(noise, "_MAKERS", {})
    for one, other in zip(sums(), wanted, strict=True):
        assert torch.equal(one, other)
