"""A neighbour that eats memory and gives it back changes no bit of a run: a plan is made once, with its cap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from edgezo.errors import DoesNotFit
from edgezo.machine.hardware import machine
from edgezo.plan.request import make_config
from edgezo.run import start
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
GB = 10**9


@pytest.fixture
def available(monkeypatch) -> Callable[..., None]:
    """Memory that is free each time that a run looks, in turn."""
    real = machine()

    def turns(*amounts_bytes: int) -> None:
        left: Iterator[int] = cycle(amounts_bytes)
        monkeypatch.setattr(
            start, "machine", lambda: replace(real, available_bytes=next(left), gpu=None)
        )

    return turns


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    return finetune(make_config(bench.settings(out=str(folder / "run"), max_mem_bytes=4 * GB)))


@pytest.mark.parametrize("amounts", [(8 * GB, 0), (64 * GB, 3 * GB)])
def test_memory_that_comes_and_goes_changes_no_bit(amounts, bench, available, whole, tmp_path):
    available(*amounts)
    for cap in (4 * GB, None):  # None: a share of what is available when the plan is made
        run = tmp_path / str(cap)
        summary = finetune(make_config(bench.settings(out=str(run), max_mem_bytes=cap)))
        assert summary["trained_sha256"] == whole["trained_sha256"]
        assert (run / "journal.bin").read_bytes() == Path(whole["run"], "journal.bin").read_bytes()
        assert (
            finetune(make_config(bench.settings(out=str(run))), resume=True)["steps"]
            == summary["steps"]
        )


def test_where_a_neighbour_has_it_all_nothing_begins(bench, available, tmp_path):
    available(10**6)
    with pytest.raises(DoesNotFit, match="--max-mem"):
        finetune(make_config(bench.settings(out=str(tmp_path / "run"), max_mem_bytes=None)))
    assert not (tmp_path / "run").exists()
