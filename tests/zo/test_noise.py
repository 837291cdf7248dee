"""Noise has the reference's bits at every address, and its bits pass tests for independent fair coins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgezo.zo import bits, noise
from edgezo.zo.noise import Key

Signs = Callable[[int, int, int, int], np.ndarray]  # (seed, step, rows, cols) -> +-1


def _philox(seed: int, step: int, rows: int, cols: int) -> np.ndarray:
    signs = noise.signs(Key(seed, step), noise.tensor_id("w"), noise.ROW, slice(0, rows), cols)
    return signs.numpy().astype(np.float64)


def _parity(seed: int, step: int, rows: int, cols: int) -> np.ndarray:
    """Bit 0 of an affine hash, by which the release of a paper draws its signs. It is no generator."""
    r, c = np.arange(rows)[:, None], np.arange(cols)[None]
    mixed = r * 2654435761 + c * 40503 + seed + step
    return 1.0 - 2.0 * (mixed & 1)


def suspicious(signs: Signs, rows: int = 64, cols: int = 512) -> list[str]:
    """The tests that ``signs`` fail. Independent fair signs fail each with a probability of about 1e-5."""
    limit = 5.0
    tables = {(seed, step): signs(seed, step, rows, cols) for seed in (0, 1) for step in (0, 1)}
    x = tables[0, 0]
    n = x.size
    scores = {
        "balance": abs(x.sum()) / n**0.5,
        "serial": abs((x[:, 1:] * x[:, :-1]).sum()) / n**0.5,
        "seeds": abs((x * tables[1, 0]).sum()) / n**0.5,
        "steps": abs((x * tables[0, 1]).sum()) / n**0.5,
    }
    for name, table in (("rows", x), ("columns", x.T)):
        gram = table @ table.T
        scores[name] = np.abs(np.triu(gram, 1)).max() / table.shape[1] ** 0.5 - 1.0
    return [name for name, score in scores.items() if score > limit]


def test_the_words_are_those_of_ten_rounds_written_out():
    key, tensor = Key(7, 11), noise.tensor_id("model.layers.0.mlp.up_proj.weight")
    signs = noise.signs(key, tensor, noise.COLUMN, slice(2, 5), 300)
    wanted = [
        [reference.sign(key, tensor, noise.COLUMN, r, c, 300) for c in range(300)]
        for r in range(2, 5)
    ]
    assert signs.tolist() == wanted


def test_the_step_before_the_first_has_noise_of_its_own_with_and_without_kernels():
    before, tensor = Key(7, -1), noise.tensor_id("w")
    words = bits.words(before, tensor, noise.ROW, 0, 2)
    assert words.tolist() == bits.words(Key(7, 2**64 - 1), tensor, noise.ROW, 0, 2).tolist()
    bit = (words[0] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    drawn = noise.signs(before, tensor, noise.ROW, slice(0, 1), 64)
    np.testing.assert_array_equal(drawn.numpy()[0], 2 * bit.astype(np.int8) - 1)


def test_normals_are_the_quantiles_that_their_codes_name():
    key, tensor = Key(3, 0), noise.tensor_id("w")
    levels = reference.normal_levels()
    drawn = noise.normals(key, tensor, noise.DENSE, slice(0, 2), 40)
    wanted = [
        [levels[reference.code(key, tensor, noise.DENSE, r, c, 40)] for c in range(40)]
        for r in range(2)
    ]
    np.testing.assert_array_equal(drawn.numpy(), np.array(wanted, np.float32))


@given(
    st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 40),
    st.integers(1, 700),
)  # fmt: skip
def test_a_slice_is_the_slice_of_the_whole(seed, step, start, count, width):
    key, tensor, rows = Key(seed, step), noise.tensor_id("t"), slice(start, start + count)
    for draw in (noise.signs, noise.normals, noise.uniform):
        whole = draw(key, tensor, noise.DENSE, slice(0, rows.stop), width)
        assert torch.equal(draw(key, tensor, noise.DENSE, rows, width), whole[rows])


def test_the_bits_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    drawn = []
    for n in (1, 2):
        torch.set_num_threads(n)
        drawn.append(noise.normals(Key(1, 2), 3, noise.DENSE, slice(0, 64), 512))
    torch.set_num_threads(threads)
    assert torch.equal(*drawn)


def test_the_signs_pass_for_independent_fair_coins():
    assert suspicious(_philox) == []


def test_a_parity_hash_does_not_pass_for_coins():
    failed = suspicious(_parity)
    assert {"rows", "columns", "serial"} <= set(failed), failed


def test_streams_and_tensors_are_independent():
    a = noise.signs(Key(0, 0), 1, noise.ROW, slice(0, 64), 512).double()
    for tensor, stream in ((2, noise.ROW), (1, noise.COLUMN)):
        b = noise.signs(Key(0, 0), tensor, stream, slice(0, 64), 512).double()
        assert abs(float((a * b).sum())) < 5 * a.numel() ** 0.5


def test_normals_have_the_moments_of_a_normal():
    x = noise.normals(Key(5, 5), 9, noise.DENSE, slice(0, 256), 1024).double().numpy().ravel()
    n = x.size
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    levels = noise.normal_table().astype(np.float64)
    assert levels.sum() == 0 and abs((levels**2).mean() - 1) < 1e-6


def test_uniforms_are_uniform_and_never_zero_or_one():
    x = noise.uniform(Key(5, 6), 9, noise.ROUNDING, slice(0, 256), 1024).double().numpy().ravel()
    assert 0 < x.min() and x.max() < 1
    assert abs(x.mean() - 0.5) < 5 / (12 * x.size) ** 0.5


coefficients = st.lists(
    st.floats(-1e3, 1e3, allow_nan=False, width=32), min_size=1, max_size=200
).map(lambda values: np.array(values, np.float64))


@given(coefficients, st.randoms())
def test_sums_of_signs_times_grid_coefficients_are_exact_in_any_order(values, random):
    grid = noise.exact_grid(values)
    signs = np.array([random.choice((-1, 1)) for _ in grid], np.float32)
    terms = (grid * signs).astype(np.float32)
    exact = float(terms.astype(np.float64).sum())
    for _ in range(3):
        order = list(range(len(terms)))
        random.shuffle(order)
        total = np.float32(0)
        for i in order:
            total += terms[i]
        assert float(total) == exact


@given(coefficients)
def test_the_grid_is_near_the_coefficients(values):
    grid = noise.exact_grid(values)
    bound = np.abs(values).max() * 2.0**-16 * (1 if len(values) <= 128 else 2)
    assert np.abs(grid - values).max() <= bound


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_coefficients_that_are_not_finite_move_nothing(bad):
    assert not noise.exact_grid(np.array([1.0, bad])).any()


def test_threads_and_parts_change_no_bit(monkeypatch, one_thread):
    key, rows, width = Key(3, 5), slice(7, 300), 777
    for make in (noise.signs, noise.normals, noise.uniform):
        whole = make(key, 11, noise.DENSE, rows, width)
        for threads, elements in ((1, 1000), (2, 1000), (3, 1), (2, 10**9)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(bits, "_PART_ELEMENTS", elements)
            assert torch.equal(make(key, 11, noise.DENSE, rows, width), whole)
