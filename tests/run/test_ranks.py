"""Runs on several processes: real ones over gloo, and what one of them says to the others, byte by byte."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
from conftest import Bench, write_rows

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.links import Links, directory_of_rank, rank_and_size, was_restarted
from edgezo.plan.request import make_config
from edgezo.run.ranks import Ranks
from edgezo.run.train import finetune

SCRIPT = Path(__file__).with_name("ranks_at_work.py")
# name -> (kind of rows, settings): methods whose steps are losses alone.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "signs": ("label", {"train": "lowrank"}),
    "linear probe": ("label", {"train": "probe+lowrank"}),
    "mezo": ("completion", {"train": "lowrank", "estimator": "mezo"}),
    "fzoo": ("label", {"train": "lowrank", "estimator": "fzoo"}),
    "svrg": ("label", {"train": "lowrank", "estimator": "mezo-svrg"}),
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def together(
    scenarios: list[dict[str, Any]], size: int, folder: Path
) -> list[list[dict[str, Any]]]:
    """How each scenario ended on each of ``size`` processes."""
    folder.mkdir(exist_ok=True)
    file = folder / "scenarios.json"
    file.write_text(json.dumps([{"port": free_port(), **scenario} for scenario in scenarios]))
    ends = [folder / f"ends{rank}.json" for rank in range(size)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(file), str(end)],
            env={
                **os.environ,
                **{"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"},
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
        )
        for rank, end in enumerate(ends)
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    by_rank = [json.loads(end.read_text()) for end in ends]
    return [list(of_scenario) for of_scenario in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def world(
    deep_bench: Bench, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder with every method's run of one process and of two, and how those of two ended."""
    folder = tmp_path_factory.mktemp("world")
    scenarios, names = [], []

    def add(
        name: str, *settings: dict[str, Any], resume: tuple[bool, ...] = (False, False)
    ) -> None:
        names.append(name)
        scenarios.append({"settings": settings, "resume": resume})

    def request(name: str, kind: str = "label", **changes: Any) -> dict[str, Any]:
        fixed = {"micro_batch": 2, "snapshot_every": 2, "out": str(folder / name / "two")}
        return deep_bench.settings(kind, **{**fixed, **changes})

    for name, (kind, changes) in METHODS.items():
        both = request(name, kind, **changes)
        finetune(make_config({**both, "out": str(folder / name / "one")}))
        add(name, both, both)
    other = write_rows(
        folder / "other.jsonl", [{"text": f"a {i}", "label": i % 2} for i in range(20)]
    )
    lowrank = request("refused", train="lowrank")
    add("other rows", lowrank, {**lowrank, "data": str(other)})
    add(
        "another step",
        {**lowrank, "out": str(folder / "r2")},
        {**lowrank, "out": str(folder / "r2"), "step": 0.5},
    )
    add("head alone", *[request("head", train="head")] * 2)
    add("guided", *[request("guided", train="lowrank", directions="activation")] * 2)
    whole, (kind, changes) = folder / "linear probe" / "one", METHODS["linear probe"]
    two_records = 2 * record_bytes(4)
    again = request("linear probe", kind, **changes)
    interrupted(whole, folder / "joined", two_records)
    add("joined", *[again | {"out": str(folder / "joined")}] * 2, resume=(True, False))
    interrupted(
        whole, folder / "behind", two_records - 7
    )  # and a tail of one that was being written
    interrupted(whole, folder / "behind.rank1", record_bytes(4))
    add("behind", *[again | {"out": str(folder / "behind")}] * 2, resume=(True, True))
    interrupted(whole, folder / "half ended", 0)
    shutil.copytree(whole, folder / "half ended.rank1")  # whose summary was written before the kill
    add("half ended", *[again | {"out": str(folder / "half ended")}] * 2, resume=(True, True))
    ends = together(scenarios, 2, folder / "ends")
    return folder, dict(zip(names, ends, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_write_the_journal_of_one(name: str, world: Any) -> None:
    folder, ends = world
    one, two, other = (folder / name / run / "journal.bin" for run in ("one", "two", "two.rank1"))
    assert one.read_bytes() == two.read_bytes() == other.read_bytes()
    summary = json.loads((folder / name / "one" / "summary.json").read_text())
    for end in ends[name]:
        assert end["trained_sha256"] == summary["trained_sha256"]
        assert end["eval_after"] == summary["eval_after"]


def test_processes_that_differ_are_refused_at_all_of_them_by_what_differs(world: Any) -> None:
    _, ends = world
    for name, differing in {"other rows": "data_hash", "another step": "step"}.items():
        for end in ends[name]:
            assert f"process 1 of this run differs from process 0 in {differing}" in end["error"]


@pytest.mark.parametrize(
    ("name", "why"), [("head alone", "--train lowrank"), ("guided", "--directions signs")]
)
def test_steps_that_need_more_than_losses_are_refused_with_the_way_out(
    name: str, why: str, world: Any
) -> None:
    _, ends = world
    assert all(why in end["error"] and end["code"] == 2 for end in ends[name])


def test_processes_go_on_from_the_longest_journal_and_a_new_one_joins(world: Any) -> None:
    folder, ends = world
    whole = (folder / "linear probe" / "one" / "journal.bin").read_bytes()
    for name in ("joined", "behind", "half ended"):
        assert all("error" not in end for end in ends[name]), ends
        for run in (name, f"{name}.rank1"):
            assert (folder / run / "journal.bin").read_bytes() == whole


def interrupted(run: Path, copy: Path, cut_bytes: int) -> Path:
    """A copy of a finished run as a kill leaves one, without the end of its journal."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    journal = copy / "journal.bin"
    os.truncate(journal, journal.stat().st_size - cut_bytes)
    return copy


def record_bytes(examples: int) -> int:
    return 40 + 12 * examples


# ------------------------------------------------------------------------- what is on the wire


class Pipes(Links):
    """Links within one process."""

    def __init__(self, rank: int, size: int, pipes: dict[tuple[int, int], Queue[bytes]]):
        super().__init__(rank, size)
        self.pipes = pipes

    def send(self, to: int, data: bytes) -> None:
        self.sent_bytes += len(data)
        for byte in [data[i : i + 1] for i in range(len(data))]:
            self.pipes[self.rank, to].put(byte)

    def receive(self, sender: int, n_bytes: int) -> bytes:
        self.received_bytes += n_bytes
        return b"".join(self.pipes[sender, self.rank].get(timeout=20) for _ in range(n_bytes))


class Row:
    def __init__(self, tokens: int):
        self.tokens = tokens


def processes(size: int) -> list[Ranks]:
    pipes = {(a, b): Queue[bytes]() for a in range(size) for b in range(size)}
    every = [Ranks(Pipes(rank, size, pipes)) for rank in range(size)]
    for ranks in every:
        ranks.micro_batch = 2
    return every


def at_once(every: list[Ranks], work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` gives, or raises, for each of the processes."""
    ends: list[Any] = [None] * len(every)

    def one(ranks: Ranks) -> None:
        try:
            ends[ranks.rank] = work(ranks)
        except EdgezoError as error:
            ends[ranks.rank] = error

    threads = [threading.Thread(target=one, args=(ranks,)) for ranks in every]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ends


TRUE = np.arange(32, dtype=np.float32).reshape(2, 16)
GROUP: list[Any] = [Row(5 + i % 7) for i in range(16)]


def a_step(
    ranks: Ranks, step: int = 0, took_s: float = 1.0, state_hash: int = 0, stop: bool = False
) -> np.ndarray:
    losses = np.full((2, 16), np.nan, np.float32)
    for part in ranks.mine(GROUP, range(16)):
        losses[:, part] = TRUE[:, part]
    ranks.exchange(step, losses, took_s, stop, state_hash)
    return losses


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_step_takes_at_most_64_bytes_and_the_losses_of_a_worker(size: int) -> None:
    every = processes(size)
    for losses in at_once(every, a_step):
        np.testing.assert_array_equal(losses, TRUE)
    for ranks in every[1:]:
        assert ranks.links.sent_bytes + ranks.links.received_bytes <= 64 + 8 * 16


def test_faster_processes_get_more_and_losses_stay_where_they_belong() -> None:
    every = processes(2)
    for step in range(9):
        ends = at_once(every, lambda ranks, s=step: a_step(ranks, s, took_s=(1.0, 3.0)[ranks.rank]))
        assert all((losses == TRUE).all() for losses in ends)
    shares = [sum(len(part) for part in ranks.mine(GROUP, range(16))) for ranks in every]
    assert sum(shares) == 16 and shares[0] == 12


def test_losses_that_are_not_finite_cross_unchanged() -> None:
    def step(ranks: Ranks) -> np.ndarray:
        losses = np.full((2, 16), np.nan, np.float32)
        for part in ranks.mine(GROUP, range(16)):
            losses[0, part] = np.inf
        ranks.exchange(0, losses, 1.0, False, 0)
        return losses

    for losses in at_once(processes(3), step):
        assert np.isposinf(losses[0]).all() and np.isnan(losses[1]).all()


def test_all_stop_after_the_same_step_when_one_is_asked_to() -> None:
    every = processes(3)
    at_once(every, lambda ranks: a_step(ranks, stop=ranks.rank == 2))
    assert [ranks.stops for ranks in every] == [True] * 3


def test_other_weights_end_the_run_at_every_process() -> None:
    ends = at_once(processes(2), lambda ranks: a_step(ranks, state_hash=7 + ranks.rank))
    assert all("different weights" in str(end) for end in ends)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_cannot_go_on_ends_the_others_at_once(failing: int) -> None:
    def step(ranks: Ranks) -> Any:
        if ranks.rank != failing:
            return a_step(ranks)
        ranks.mine(GROUP, range(16))
        return ranks.fail(0)

    ends = at_once(processes(3), step)
    assert ends[failing] is None
    assert all("another process" in str(end) for rank, end in enumerate(ends) if rank != failing)


def test_processes_at_two_steps_are_told_apart() -> None:
    hub, worker = processes(2)
    worker.mine(GROUP, range(16))
    worker.fail(4)
    with pytest.raises(
        EdgezoError, match="process 1 of this run is at step 4, and this one at step 3"
    ):
        a_step(hub, 3)


def test_a_message_longer_than_any_is_refused_before_memory_is_taken() -> None:
    hub, worker = processes(2)
    worker.links.send(0, struct.pack("<Q", 1 << 60))
    with pytest.raises(EdgezoError, match="which no edgezo does"):
        hub.links.receive_sized(1)


@pytest.mark.parametrize("given", [("1", ""), ("2", "2"), ("x", "2"), ("-1", "2")])
def test_an_environment_of_no_launcher_is_named(given: tuple[str, str], monkeypatch: Any) -> None:
    for name, text in zip(("RANK", "WORLD_SIZE"), given, strict=True):
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match="start edgezo with torchrun"):
        rank_and_size()


def test_a_process_that_is_started_again_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    run = str(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not was_restarted(None) and not was_restarted(run)
    (tmp_path / "journal.bin").touch()
    assert was_restarted(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not was_restarted(run)


def test_every_process_has_a_directory_of_its_own(monkeypatch: Any) -> None:
    assert directory_of_rank(None) is None and directory_of_rank("a") == "a"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, expected in {"0": "a", "2": "a.rank2"}.items():
        monkeypatch.setenv("RANK", rank)
        assert directory_of_rank("a") == expected == directory_of_rank(expected)
    with pytest.raises(UsageError, match="needs --out"):
        directory_of_rank(None)


def test_a_record_of_another_run_is_not_taken(deep_bench: Bench, tmp_path: Path) -> None:
    from edgezo.run.journal import create_journal, open_journal

    request = make_config(deep_bench.settings(train="lowrank", out=str(tmp_path / "run")))
    finetune(request)
    finetune(replace(request, seed=5, out=str(tmp_path / "other")))
    with open_journal(tmp_path / "run" / "journal.bin", resume=False) as run:
        data, header = run.encoded(0), run.header
    with open_journal(tmp_path / "other" / "journal.bin", resume=False) as other:
        foreign = other.encoded(0)
    with create_journal(tmp_path / "again.bin", header) as again:
        with pytest.raises(EdgezoError, match="of another run"):
            again.append_encoded(foreign)
        again.append_encoded(data)
        assert again.next_step == 1
