"""The fuzz lane: a few cases of every kind here, and as many as wanted with ``--fuzz-cases N`` (-s shows the table)."""

from __future__ import annotations

import pytest
from fuzz.kinds import KINDS
from fuzz.lane import Limits, run_lane, shared
from fuzz.planted import PLANTED, SEED

USUAL = 25  # cases of a kind


def test_whatever_a_reader_is_given_it_accepts_or_refuses_with_an_error_of_edgezos(tmp_path):
    report = run_lane(dict.fromkeys(KINDS, USUAL), tmp_path)
    assert report.cases == dict.fromkeys(KINDS, USUAL)
    assert not report.failures, report.table()


def test_a_long_run_of_all_kinds(tmp_path, request, capsys):
    option = request.config.getoption
    if option("fuzz_cases") is None:
        pytest.skip("no --fuzz-cases N")
    names = (option("fuzz_kinds") or ",".join(KINDS)).split(",")
    kinds = {name: KINDS[name] for name in names}
    counts = shared(kinds, option("fuzz_cases"))
    with capsys.disabled():
        print()
        report = run_lane(
            counts, tmp_path, Limits(seconds=2.0), first_seed=option("fuzz_seed"), tell=print
        )
        print(report.table())
    assert report.cases == counts
    assert not report.failures, report.table()


# ---------------------------------------------------------------------------------------------
# The lane can fail

FAULTS = {
    "raises": "KeyError at planted.py",
    "leaves": "SystemExit at planted.py",
    "ends": "it ended with -6: ",
    "loops": "no answer for 5 s",
    "eats": "it takes 300 MB",
    "eats-all": "MemoryError at planted.py",
    "believes": "believed: a flipped bit",
    "says-nothing": "an error without a message",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported_with_its_seed_and_the_other_cases_run(name, tmp_path):
    limits = Limits(silent_s=5.0 if name == "loops" else 120.0)
    report = run_lane({name: SEED + 3}, tmp_path, limits, table="fuzz.planted:PLANTED")
    assert report.cases == {name: SEED + 3} and report.accepted == {name: name == "eats"}
    (failure,) = report.failures
    assert (failure.kind, failure.seed) == (name, SEED)
    assert failure.wrong.startswith(FAULTS[name])
    assert f"python -m fuzz.lane {name} {SEED}" in report.table()


def test_a_case_that_takes_longer_than_it_may_is_reported_where_a_clock_is_looked_at(tmp_path):
    report = run_lane({"prints": 2}, tmp_path, Limits(seconds=0.0), table="fuzz.planted:PLANTED")
    assert [failure.seed for failure in report.failures] == [0, 1]
    assert report.failures[0].wrong.startswith("it takes 0.0 s")


def test_what_a_reader_prints_is_no_answer(tmp_path):
    report = run_lane({"prints": 4}, tmp_path, table="fuzz.planted:PLANTED")
    assert report.accepted == {"prints": 4} and not report.failures
    assert set(FAULTS) | {"prints"} == set(PLANTED)


def test_the_same_seed_makes_the_same_case():
    import random

    from fuzz.readers import READERS

    for reader in READERS.values():
        assert reader.make(random.Random(5)) == reader.make(random.Random(5))
