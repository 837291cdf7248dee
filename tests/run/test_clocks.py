"""Clocks that jump change no bit where time is no input, crash nothing, and lengthen no step of a run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgezo.machine import downloads
from edgezo.machine.clock import Clock
from edgezo.machine.downloads import file_sha256
from edgezo.plan.request import make_config
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = ("train_s", "step_s", "forward_s", "fit_s", "took_s", "spent_s")
JUMPS = {"back": [0.0, -3600.0], "far on": [0.0, 1e6], "wild": [-1e9, 3e9, -4e9], "still": [0.0]}


def clock_of(jumps: list[float]) -> Callable[[], float]:
    """Readings of a clock that goes on by a millisecond, and by these jumps in turn."""
    count, at_s = 0, 1e5

    def read() -> float:
        nonlocal count, at_s
        at_s += (0.0 if jumps == JUMPS["still"] else 0.001) + jumps[count % len(jumps)]
        count += 1
        return at_s

    return read


def times_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        own = [v for k, v in value.items() if k in TIMES and v is not None]
        return own + [t for inner in value.values() for t in times_in(inner)]
    return [t for inner in value for t in times_in(inner)] if isinstance(value, list) else []


@pytest.mark.parametrize("jumps", JUMPS)
def test_a_clock_never_goes_back(jumps, monkeypatch):
    monkeypatch.setattr(time, "monotonic", clock_of(JUMPS[jumps]))
    clock = Clock()
    read = [clock.now_s() for _ in range(50)]
    assert read == sorted(read)


@pytest.fixture(scope="module")
def request_of(bench) -> Callable[..., dict[str, Any]]:
    settings = {"steps": 4, "eval_every": 2, "train": "lowrank+probe", "step": "auto"}
    return lambda **more: bench.settings(**{**settings, **more})


@pytest.fixture(scope="module")
def whole(request_of, tmp_path_factory) -> dict[str, Any]:
    return finetune(make_config(request_of(out=str(tmp_path_factory.mktemp("whole") / "run"))))


@pytest.mark.parametrize("jumps", JUMPS)
def test_a_run_of_given_steps_has_the_same_bits(jumps, request_of, whole, monkeypatch, tmp_path):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", clock_of(JUMPS[jumps]))
        patch.setattr(time, "time", clock_of(JUMPS[jumps]))
        summary = finetune(make_config(request_of(out=str(run), profile=True)))
    for name in ("trained_sha256", "eval_before", "eval_after", "loss_first", "loss_last"):
        assert summary[name] == whole[name], name
    assert (run / "journal.bin").read_bytes() == Path(whole["run"], "journal.bin").read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = times_in([summary, lines, json.loads((run / "profile.json").read_text())])
    assert len(times) > 10 and min(times) >= 0


@pytest.mark.parametrize("jumps", ["back", "far on", "wild"])
def test_a_run_of_a_given_time_ends_and_no_step_is_longer_than_the_first(
    jumps, request_of, monkeypatch, tmp_path
):
    request = request_of(
        steps=None, for_s=0.05, train="lowrank", step=0.1, out=str(tmp_path / "run")
    )
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", clock_of(JUMPS[jumps]))
        summary = finetune(make_config(request))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    sizes = [line["step_size"] for line in lines if "step_size" in line]
    assert len(sizes) == summary["steps"] and all(0 <= size <= 0.1 for size in sizes)
    again = finetune(make_config(request), resume=True)
    if summary[
        "steps"
    ]:  # else the time was over before the first step, and there is a run to go on with
        assert again["trained_sha256"] == summary["trained_sha256"]


@pytest.mark.parametrize("shift_s", [-1e9, 0.0, 1e9])
def test_a_remembered_hash_is_that_of_the_file_whatever_the_time_is(
    shift_s, own_cache, monkeypatch, tmp_path
):
    now_ns = time.time_ns()
    monkeypatch.setattr(downloads.time, "time_ns", lambda: now_ns + int(shift_s * 1e9))
    file = tmp_path / "file"
    hashes = set()
    for content in (b"one", b"two", b"longer"):
        file.write_bytes(content)
        hashes |= {file_sha256(file), file_sha256(file)}
    assert hashes == {
        hashlib.sha256(content).hexdigest() for content in (b"one", b"two", b"longer")
    }
