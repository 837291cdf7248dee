"""Layouts store the codes and scales that optimum-quanto's tensors have, and round to the grid that they promise."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight
from optimum.quanto.library.extensions import cpp as quanto_cpp

from edgezo.machine import limits
from edgezo.machine.limits import int4_group, tiles
from edgezo.weights import layouts
from edgezo.weights.layouts import Dense, Int4, Int8, place
from edgezo.zo.noise import Key

SHAPES = [(8, 32), (6, 96), (10, 128), (4, 256), (12, 40), (2, 7)]
KEY = Key(0, 0)


def _weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05


def _whole(layout: layouts.Layout) -> torch.Tensor:
    rows, cols = layout.shape
    return layout.expand(slice(0, rows), torch.empty(rows, cols))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_quantos_tensor(shape):
    weight = _weight(*shape)
    theirs = quantize_weight(weight, qint8, 0, AbsmaxOptimizer()(weight, qint8, 0))
    ours = Int8.quantise(weight)
    assert torch.equal(ours.codes, theirs._data)
    torch.testing.assert_close(_whole(ours), theirs.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_quantos_tensor(shape, monkeypatch):
    # In place of quanto's C++, which would be compiled first: low halves of all bytes, then high ones.
    halves = SimpleNamespace(unpack=lambda packed, bits: torch.cat([packed & 15, packed >> 4]))
    monkeypatch.setattr(quanto_cpp.ext, "_lib", halves)
    weight = _weight(*shape)
    size = int4_group(shape[1])
    scale, shift = MaxOptimizer()(weight.reshape(-1, size), qint4, 0)
    group = size if size != shape[1] else None
    theirs = quantize_weight(weight, qint4, 0, scale, shift, group_size=group, optimized=False)
    ours = Int4.quantise(weight)
    assert torch.equal(ours.packed.reshape(-1), theirs._data._data.reshape(-1))
    torch.testing.assert_close(_whole(ours), theirs.dequantize())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_any_rows_are_the_rows_of_the_whole(precision):
    layout = place(_weight(10, 96), precision, table=False, rounding=None, trained=False)
    whole = _whole(layout)
    for rows in (slice(0, 3), slice(3, 8), slice(9, 10)):
        out = torch.empty(rows.stop - rows.start, 96)
        assert torch.equal(layout.expand(rows, out), whole[rows])
    index = torch.tensor([9, 0, 4, 5, 4])
    assert torch.equal(layout.expand(index, torch.empty(5, 96)), whole[index])
    half = layout.expand(slice(0, 10), torch.empty(10, 96, dtype=torch.bfloat16))
    torch.testing.assert_close(half.float(), whole, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_constant_or_empty_range_stays_finite(precision):
    weight = torch.zeros(4, 64)
    weight[1] = 0.5
    stored = _whole(place(weight, precision, table=False, rounding=None, trained=False))
    torch.testing.assert_close(stored, weight, atol=1e-6, rtol=1e-2)


def test_what_int4_cannot_halve_and_tables_are_int8():
    for rows, table in ((5, False), (4, True)):
        layout = place(_weight(rows, 32), "int4", table=table, rounding=None, trained=False)
        assert isinstance(layout, Int8)


def test_quantising_does_not_depend_on_the_tile(monkeypatch):
    weight = _weight(20, 64)
    before = [Int8.quantise(weight).tensors(), Int4.quantise(weight).tensors()]
    monkeypatch.setattr(limits, "TILE_BYTES", 3 * 64 * 16)
    for old, new in zip(
        before, [Int8.quantise(weight).tensors(), Int4.quantise(weight).tensors()], strict=True
    ):
        assert all(torch.equal(old[name], new[name]) for name in old)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_tiles_cover_every_row_once_within_the_bound(rows, cols):
    slices = list(tiles(rows, cols))
    assert [t.start for t in slices] == [0, *(t.stop for t in slices[:-1])]
    assert slices[-1].stop == rows
    for tile in slices:
        count = tile.stop - tile.start
        assert count == 1 or count * cols * 4 <= limits.TILE_BYTES


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
numbers = st.floats(-60000, 60000, width=32).filter(lambda v: v == 0 or abs(v) > 1e-20)


@dtypes
@settings(deadline=None)
@given(
    value=st.one_of(
        numbers, st.floats(-(2.0**-13), 2.0**-13, width=32), st.sampled_from([1.0, 0.5, 2**-14])
    )
)
def test_the_plane_is_a_grid_256_times_finer_that_reads_back_exactly(dtype, value):
    layout = Dense(torch.zeros(1, 1, dtype=dtype), rounding="plane")
    given_value = torch.tensor([[value]], dtype=torch.float32)
    snapped = layout.snap(given_value.clone(), KEY, 1, slice(0, 1))
    layout.write(slice(0, 1), snapped)
    assert torch.equal(layout.read(slice(0, 1)), snapped)
    high = given_value.to(dtype).float()
    assert torch.equal(layout.values.float(), snapped.to(dtype).float())
    ulp = float(layout._ulp(high)[0, 0])
    # Half a fine step, and one where the outermost code is clamped.
    assert abs(float(snapped) - value) <= ulp / 256
    assert abs(float(snapped) - float(high)) <= ulp / 2


@dtypes
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(dtype):
    rows, cols = 8, 64
    layout = Dense(torch.zeros(rows, cols, dtype=dtype), rounding="stochastic")
    values = _weight(rows, cols)
    ulp = layout._ulp(values)
    total, tries = torch.zeros(rows, cols, dtype=torch.float64), 400
    for step in range(tries):
        snapped = layout.snap(values.clone(), Key(0, step), 1, slice(0, rows))
        assert torch.equal(snapped.to(dtype).float(), snapped)
        assert bool(((snapped - values).abs() < ulp).all())
        total += (snapped - values).double() / ulp
    # The mean of 512 x 400 roundings: each has a variance of at most 1/4 ulp^2.
    assert abs(float(total.mean()) / tries) < 5 * 0.5 / np.sqrt(rows * cols * tries)


@dtypes
def test_stochastic_rounding_leaves_values_on_the_grid_where_they_are(dtype):
    layout = Dense(torch.zeros(64, 4096, dtype=dtype), rounding="stochastic")
    values = _weight(64, 4096).to(dtype).float()
    for step in range(4):
        assert torch.equal(layout.snap(values.clone(), Key(0, step), 1, slice(0, 64)), values)


@dtypes
def test_stochastic_rounding_goes_up_as_often_as_the_remainder_says(dtype):
    rows, width = 9, 1 << 14
    layout = Dense(torch.zeros(rows, width, dtype=dtype), rounding="stochastic")
    ulp = layout._ulp(torch.ones(1))
    remainder = torch.tensor([2.0**-12, 0.1, 0.25, 0.5, 0.5 + 2**-10, 0.75, 0.9, 0.99, 0.999])
    for base in (1.0, -1.5):
        values = (base + remainder * ulp)[:, None].expand(rows, width).contiguous()
        snapped = layout.snap(values.clone(), KEY, 2, slice(0, rows))
        exact = (values[:, 0].double() - base) / ulp.double()
        up = ((snapped.double() - base) / ulp.double()).mean(1)
        scatter = torch.sqrt(exact * (1 - exact) / width)
        assert bool(((up - exact).abs() < 4.5 * scatter).all()), (up, exact)


def test_rows_by_index_are_dithered_like_rows_by_slice():
    layout = Dense(torch.zeros(6, 32, dtype=torch.bfloat16), rounding="stochastic")
    values = _weight(6, 32)
    whole = layout.snap(values.clone(), KEY, 5, slice(0, 6))
    index = torch.tensor([4, 1])
    assert torch.equal(layout.snap(values[index].clone(), KEY, 5, index), whole[index])


def test_fp32_is_exact():
    layout = Dense(_weight(3, 5))
    values = _weight(3, 5, seed=1)
    layout.write(slice(0, 3), layout.snap(values.clone(), KEY, 1, slice(0, 3)))
    assert torch.equal(layout.read(slice(0, 3)), values)
