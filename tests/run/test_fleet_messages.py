"""Messages of a fleet: what is written is read again, and no other bytes are believed."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgezo.run.fleet_messages import (
    DeviceReport,
    Order,
    Tally,
    losses_problem,
    outlying,
    read_order,
    read_report,
)

U32 = st.integers(0, 2**32 - 1)
ORDERS = st.builds(
    lambda run, step, first, header, records, pairs: Order(
        run, step, first, header, records, [a for a, _ in pairs], [b for _, b in pairs]
    ),
    *(U32, U32, U32, st.binary(max_size=40)),
    st.lists(st.binary(max_size=60), max_size=4),
    st.lists(st.tuples(U32, U32), max_size=5),
)
FLOATS = st.floats(width=32, allow_nan=False)
LOSSES = st.tuples(st.integers(0, 3), st.integers(0, 6)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=FLOATS)
)
TEXTS = st.dictionaries(
    st.text(max_size=8), st.one_of(st.text(max_size=8), st.integers()), max_size=3
)
REPORTS = st.builds(DeviceReport, U32, U32, U32, st.integers(0, 2**64 - 1), LOSSES, TEXTS)


@given(ORDERS)
def test_an_order_is_read_as_it_was_written(order: Order) -> None:
    again = read_order(order.encoded())
    assert again == order._replace(records=list(order.records))


@given(REPORTS)
def test_a_report_is_read_as_it_was_written(report: DeviceReport) -> None:
    again = read_report(report.encoded())
    np.testing.assert_array_equal(again.losses, report.losses)
    assert again._replace(losses=None) == report._replace(losses=None)  # type: ignore[arg-type]


@given(st.one_of(ORDERS, REPORTS), st.data())
def test_bytes_that_were_cut_or_added_to_are_no_message(message: Any, data: Any) -> None:
    encoded, read = message.encoded(), read_order if isinstance(message, Order) else read_report
    cut = data.draw(st.integers(0, len(encoded) - 1))
    for wrong in (encoded[:cut], encoded + b"\x00"):
        with pytest.raises(ValueError):
            read(wrong)


@settings(max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=120).map(lambda b: b"EZFR" + b),
        st.binary(max_size=120).map(lambda b: b"EZFO" + b),
        st.tuples(ORDERS, st.integers(4, 27), st.integers(0, 255)).map(
            lambda t: t[0].encoded()[: t[1]] + bytes([t[2]]) + t[0].encoded()[t[1] + 1 :]
        ),
        st.tuples(REPORTS, st.integers(4, 35), st.integers(0, 255)).map(
            lambda t: t[0].encoded()[: t[1]] + bytes([t[2]]) + t[0].encoded()[t[1] + 1 :]
        ),
    )
)
def test_garbage_gives_a_message_that_is_written_so_or_a_value_error(data: bytes) -> None:
    for read in (read_order, read_report):
        try:
            message = read(data)
        except ValueError:
            continue
        if isinstance(message, Order):
            assert message.encoded() == data
        else:
            assert message.losses.size * 4 <= len(data)


def test_counts_that_no_bytes_hold_take_no_memory() -> None:
    head = struct.pack("<4sIIIQIII", b"EZFR", 1, 1, 1, 0, 2**31, 2**31, 0)
    with pytest.raises(ValueError, match="announces"):
        read_report(head)
    with pytest.raises(ValueError, match="are announced where"):
        read_order(struct.pack("<4sIIIIII", b"EZFO", 1, 0, 0, 0, 2**32 - 1, 0))


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b'"a"', b"[" * 5000])
def test_a_text_that_is_no_json_object_is_refused(text: bytes) -> None:
    head = struct.pack("<4sIIIQIII", b"EZFR", 1, 1, 1, 0, 0, 0, len(text))
    with pytest.raises(ValueError, match="its text"):
        read_report(head + text)


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=6), st.data())
def test_two_journals_have_one_tally_only_as_far_as_they_are_alike(
    records: list[bytes], data: Any
) -> None:
    one, two = Tally(), Tally()
    changed = data.draw(st.integers(0, len(records)))
    for at, record in enumerate(records):
        one.add(record)
        two.add(record if at != changed else record + b"x")
    assert len(one) == len(records)
    for steps in range(len(records) + 1):
        assert (one.after(steps) == two.after(steps)) == (steps <= changed)


def test_losses_that_no_model_has_are_named() -> None:
    fine = np.ones((2, 3), np.float32)
    assert not losses_problem(fine, 2, 3)
    assert "2 x 3 losses, where 2 x 4" in losses_problem(fine, 2, 4)
    for value, why in ((np.nan, "not finite"), (np.inf, "not finite"), (-0.5, "below 0")):
        wrong = fine.copy()
        wrong[1, 2] = value
        assert why in losses_problem(wrong, 2, 3)


@given(
    arrays(np.float32, (2, 9), elements=st.floats(0, 100, width=32)),
    st.integers(0, 3),
    st.floats(1, 50),
)
def test_a_minority_cannot_hide_behind_the_median(
    losses: np.ndarray, liars: int, times: float
) -> None:
    honest = np.abs(np.float64(losses[0]) - np.float64(losses[1]))
    losses = losses.copy()
    losses[0, :liars], losses[1, :liars] = 1e30, 0
    out = outlying(losses, times)
    rest = np.sort(honest[liars:])
    if liars and rest[0] > 0:  # the median is one of the honest differences, or a mean of two
        assert {*range(liars)} <= {*out.tolist()}
    kept = np.setdiff1d(np.arange(9), out)
    assert len(kept) >= 5
