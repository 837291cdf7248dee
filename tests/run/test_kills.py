"""A run that is killed at any moment goes on as if nothing had happened: the same bits at its end."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conftest import Bench
from forks import Blow
from safetensors.torch import load_file

STEPS, SNAPSHOT_EVERY = 60, 7
TRAINED = {  # what is trained -> its store
    "lowrank": "fp32",
    "lowrank+head": "int8",
    "full": "bf16",  # with the low-order plane
    "norms+scales": "int4",
    "lowrank+probe": "bf16",
}

# In this order on one run, each after the resume from the one before: fewer than STEPS steps in all.
BEGINNING = [
    Blow("config.toml", 1, 0),
    Blow("config.toml", 1, 1),
    Blow("journal.bin", 1, 0),
    Blow("journal.bin", 1, 1),
    Blow("metrics", 1, 0),
    Blow("metrics", 1, 0.5),
    Blow("record", 1, 0.5),
]
STEPPING = [
    Blow("record", 9, 0.01),
    Blow("cut", 1, 0),
    Blow("update", 3, 0),
    Blow("record", 2, 0.99),
    Blow("cut", 1, 1),
    Blow("metrics", 2, 0),
    Blow("metrics", 2, 0.5),
    Blow("update", 4, 1),
    Blow("record", 2, 1),
]
HEAD = [
    Blow("head", 8, 0),
    Blow("head", 8, 1),
    Blow("snapshot", 1, 0),
    Blow("snapshot", 1, 0.5),
    Blow("head.safetensors", 1, 0),
    Blow("head.safetensors", 1, 1),
    Blow("head.safetensors", 2, 0),
]
PROBE = [
    Blow("states", 3, 0),
    Blow("states", 2, 0.5),
    Blow("states", 2, 1),
    Blow("probe.safetensors", 1, 0),
    Blow("probe.safetensors", 1, 1),
]
END = [Blow("summary.json", 1, 0), Blow("summary.json", 1, 1)]


def blows(train: str) -> list[Blow]:
    if "head" in train:
        return [*BEGINNING, *STEPPING, *HEAD, *END]
    return [*(PROBE if "probe" in train else []), *STEPPING, END[0]]


def arguments(bench: Bench, train: str, out: Path) -> list[str]:
    if "head" in train:  # several micro-batches a step, and snapshots
        more = {"batch_size": 3, "micro_batch": 2, "snapshot_every": SNAPSHOT_EVERY}
    else:
        more = {"batch_size": 2, "micro_batch": 2}
    request = bench.arguments(train=train, precision=TRAINED[train], steps=STEPS, out=out, **more)
    return ["finetune", *request, "--eval-every", "20"]


def finish(args: list[str], output: Path) -> dict[str, Any]:
    code, out, err = forks.start([*args, "--json"], output).end()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module", params=TRAINED)
def train(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(bench: Bench, train: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return finish(arguments(bench, train, folder / "run"), folder)


def assert_same_run(run: Path, summary: dict[str, Any], whole: dict[str, Any]) -> None:
    """Every file that has no clock or memory reading in it has the same bytes."""
    other = Path(whole["run"])
    assert summary["trained_sha256"] == whole["trained_sha256"]
    assert summary["steps"] == STEPS
    for name in ("eval_before", "eval_after", "loss_first", "loss_last", "batch_size", "trained"):
        assert summary[name] == whole[name], name
    for name in ("journal.bin", "head.safetensors"):
        assert (run / name).exists() == (other / name).exists()
        if (other / name).exists():
            assert (run / name).read_bytes() == (other / name).read_bytes(), name
    if (other / "probe.safetensors").exists():  # its header says how long the pass took
        probes = [load_file(folder / "probe.safetensors") for folder in (run, other)]
        assert all(torch.equal(probes[0][name], probes[1][name]) for name in probes[1])
    names = [p.name for p in run.iterdir() if not p.name.startswith("journal-cut-")]
    assert sorted(names) == sorted(p.name for p in other.iterdir())
    assert metrics(run) == metrics(other)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines without what a clock or the memory decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("rss_bytes", "step_s", "forward_s", "took_s", "crc")
        }
        for line in lines
    ]


def test_metrics_hold_each_step_and_each_evaluation_once(whole):
    lines = metrics(Path(whole["run"]))
    steps = [line["step"] for line in lines if "eval" not in line]
    assert steps == list(range(1, STEPS + 1))
    evaluations = [(line["eval"], line["step"]) for line in lines if "eval" in line]
    assert evaluations == [("before", 0), ("during", 20), ("during", 40), ("after", STEPS)]


def test_a_run_killed_inside_every_write_and_update_ends_with_the_same_bits(
    bench, train, whole, tmp_path
):
    run = tmp_path / "run"
    first = arguments(bench, train, run)
    again = ["finetune", "--resume", "--out", str(run)]
    for blow in blows(train):
        args = again if (run / "config.toml").exists() else first
        code, _, err = forks.start(args, tmp_path / "printed", blow).end()
        assert code == -signal.SIGKILL, (blow, err)
        assert "Traceback" not in err
    assert_same_run(run, finish(again, tmp_path / "printed"), whole)


# Other settings: benchmarks/kills.py.
@pytest.mark.parametrize("train", ["lowrank+head", "full"], indirect=True, scope="module")
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(bench, train, whole, tmp_path):
    kills = 8
    run, journal = tmp_path / "run", tmp_path / "run" / "journal.bin"
    args = arguments(bench, train, run)
    size_bytes = (Path(whole["run"]) / "journal.bin").stat().st_size
    chance = random.Random(train)
    for kill in range(kills):
        now_bytes = journal.stat().st_size if journal.exists() else 0
        room_bytes = (size_bytes - now_bytes) // (kills - kill + 1)
        running = forks.start(args, tmp_path / "printed")
        forks.watch(running, journal, now_bytes + chance.randint(0, room_bytes))
        for _ in range(chance.randint(0, 3_000)):  # some part of a step later
            journal.exists()
        running.signal(signal.SIGKILL)
        assert running.end()[0] == -signal.SIGKILL
        if (run / "config.toml").exists():
            args = ["finetune", "--resume", "--out", str(run)]
    assert_same_run(run, finish(args, tmp_path / "printed"), whole)


@pytest.mark.parametrize("train", ["lowrank+head", "full"], indirect=True, scope="module")
def test_a_signal_stops_between_two_steps_and_the_printed_command_goes_on(
    bench, train, whole, tmp_path
):
    run, journal = tmp_path / "run", tmp_path / "run" / "journal.bin"
    command = arguments(bench, train, run)
    for number in (signal.SIGINT, signal.SIGTERM):
        running = forks.start(command, tmp_path / "printed")
        begun_bytes = journal.stat().st_size if journal.exists() else 0
        forks.watch(running, journal, begun_bytes + 1500)
        running.signal(number)
        code, out, err = running.end()
        assert (code, out) == (130, "") and "Traceback" not in err
        _, _, after = err.partition("Go on with: edgezo ")
        command = after.split()
        assert command == ["finetune", "--resume", "--out", str(run)]
    assert_same_run(run, finish(command, tmp_path / "printed"), whole)
