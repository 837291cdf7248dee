"""Runs with frozen blocks: the states of rows are computed once, and training begins from them."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
from conftest import Bench, write_rows
from forks import Blow
from test_kills import assert_same_run, finish
from test_runs import run_of

from edgezo.errors import UsageError
from edgezo.network.model import Model
from edgezo.run import states_cache
from edgezo.zo.presets import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("label", "pairs", "completion", "text", "messages")
ESTIMATORS = [name for name in PRESETS if "finetuner" not in name]  # those need a file
EXACT = {"blocks": "2", "states": "exact"}


@pytest.fixture
def own_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, where no other test has left states."""
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "states"


@pytest.fixture(scope="module", autouse=True)
def pairs(deep_bench: Bench) -> None:
    """Rows with a better and a worse answer, which pass as a tree."""
    rows = [
        {"prompt": f"film {i} is {'warm ' * (i % 4)}", "chosen": "good fun", "rejected": "bad"}
        for i in range(40)
    ]
    write_rows(deep_bench.data / "pairs.jsonl", rows)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that passes frozen blocks in this process."""
    rows: list[int] = []
    real = Model.states_at_cut

    def counted(model: Model, batch: Any) -> Any:
        if model.kept_states is None:
            rows.append(len(batch.lengths))
        return real(model, batch)

    monkeypatch.setattr(Model, "states_at_cut", counted)
    return rows


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def near(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The losses of both runs are equal up to rounding."""
    losses = [[line["loss"] for line in metrics(Path(summary["run"]))] for summary in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3, rel=2e-3)


@pytest.mark.parametrize(
    ("estimator", "kind"),
    [
        *[("default", kind) for kind in KINDS],
        *itertools.product(("mezo", "lora", "addax"), ("label", "messages")),
    ],
)
def test_kept_states_give_the_losses_of_frozen_blocks_that_run(
    deep_bench: Bench, own_states: Path, tmp_path: Path, kind: str, estimator: str
) -> None:
    shared = {"estimator": estimator, "steps": 4}
    kept = run_of(deep_bench, tmp_path / "kept", kind, **EXACT, state_rows=40, **shared)
    run = run_of(deep_bench, tmp_path / "run", kind, blocks="2", states="none", **shared)
    assert kept["trained"] == run["trained"]
    near(kept, run)
    assert os.listdir(own_states)


@pytest.mark.parametrize(
    ("estimator", "kind"),
    list(zip(ESTIMATORS, itertools.cycle(("label", "completion")), strict=False)),
)
def test_every_estimator_trains_upper_blocks(
    deep_bench: Bench, own_states: Path, edgezo_json: Any, tmp_path: Path, estimator: str, kind: str
) -> None:
    summary = run_of(deep_bench, tmp_path / "run", kind, estimator=estimator, **EXACT)
    code, evaluated = edgezo_json("eval", "--model", tmp_path / "run")
    assert code == 0
    after = summary["eval_after"]
    assert evaluated["loss"] == pytest.approx(after["loss"], abs=1e-4, rel=1e-4)
    assert evaluated["n"] == after["n"]


@pytest.mark.parametrize("train", ["lowrank+head", "full", "norms+scales", "lowrank+probe"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_replay_gives_the_bits_of_the_run(
    deep_bench: Bench,
    own_states: Path,
    edgezo_json: Any,
    tmp_path: Path,
    train: str,
    precision: str,
) -> None:
    summary = run_of(deep_bench, tmp_path / "run", train=train, precision=precision, blocks="2")
    code, replayed = edgezo_json("replay", tmp_path / "run", "--out", tmp_path / "again")
    assert code == 0
    assert replayed["trained_sha256"] == summary["trained_sha256"]


def test_a_second_run_finds_the_states(
    deep_bench: Bench, own_states: Path, passes: list[int], tmp_path: Path
) -> None:
    first = run_of(deep_bench, tmp_path / "first", **EXACT)
    assert sum(passes) >= 12
    passes.clear()
    second = run_of(deep_bench, tmp_path / "second", **EXACT)
    run_of(deep_bench, tmp_path / "third", **EXACT, seed=5)
    run_of(deep_bench, tmp_path / "fourth", **EXACT, estimator="mezo")
    assert not passes
    assert second["trained_sha256"] == first["trained_sha256"]
    run_of(deep_bench, tmp_path / "fifth", blocks="1", states="exact")
    assert passes and len(os.listdir(own_states)) == 2


def test_a_row_passes_once_in_all_epochs(
    deep_bench: Bench, own_states: Path, passes: list[int], tmp_path: Path
) -> None:
    summary = run_of(deep_bench, tmp_path / "run", **EXACT, steps=30, state_rows=8)
    assert summary["steps"] == 30
    rows = len((deep_bench.data / "label.jsonl").read_text().splitlines())
    assert sum(passes) <= rows


def test_weights_on_disk_give_the_same_bits(
    deep_bench: Bench, own_states: Path, tmp_path: Path
) -> None:
    shared = {**EXACT, "train": "full", "rounding": "plane", "precision": "bf16"}
    memory = run_of(deep_bench, tmp_path / "memory", **shared, residency="resident")
    disk = run_of(deep_bench, tmp_path / "disk", **shared, residency="disk")
    assert memory["trained_sha256"] == disk["trained_sha256"]


def test_head_rows_of_label_words_are_those_of_the_whole_table(
    deep_bench: Bench, own_states: Path, tmp_path: Path
) -> None:
    for precision in ("fp32", "int8", "int4"):
        shared = {"precision": precision, "train": "lowrank"}
        kept = run_of(deep_bench, tmp_path / f"{precision}-kept", **EXACT, **shared)
        run = run_of(
            deep_bench, tmp_path / precision, blocks="2", states="none", state_rows=None, **shared
        )
        before = [summary["eval_before"]["loss"] for summary in (kept, run)]
        assert before[0] == pytest.approx(before[1], rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Kills and damage


def arguments(bench: Bench, out: Path) -> list[str]:
    request = bench.arguments(
        **EXACT, train="lowrank+head", steps=60, batch_size=3, micro_batch=2, out=out
    )
    return ["finetune", *request, "--snapshot-every", "7", "--eval-every", "20"]


@pytest.fixture
def whole(deep_bench: Bench, own_states: Path, tmp_path: Path) -> dict[str, Any]:
    """The summary of the run that nothing interrupts; its states are gone."""
    summary = finish(arguments(deep_bench, tmp_path / "whole"), tmp_path / "whole-printed")
    for file in own_states.iterdir():
        file.unlink()
    return summary


def test_a_run_killed_in_its_pass_and_after_it_ends_with_the_same_bits(
    deep_bench: Bench, whole: dict[str, Any], tmp_path: Path
) -> None:
    run, printed = tmp_path / "run", tmp_path / "printed"
    first, again = arguments(deep_bench, run), ["finetune", "--resume", "--out", str(run)]
    in_pass = [Blow("kept states", 1, part) for part in (0, 0.3, 0.99, 1)]
    after = [Blow("record", 5, 0.5), Blow("head.safetensors", 1, 0), Blow("metrics", 9, 0.5)]
    for blow in (*in_pass, *after):
        args = again if (run / "config.toml").exists() else first
        code, _, err = forks.start(args, printed, blow).end()
        assert code == -signal.SIGKILL, (blow, err)
        assert "Traceback" not in err
    assert_same_run(run, finish(again, printed), whole)


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "flipped": flipped,
    "truncated": lambda file: os.truncate(file, file.stat().st_size * 2 // 3),
    "deleted": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "foreign": lambda file: file.write_bytes(b"not states" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_states_are_made_again(
    deep_bench: Bench, whole: dict[str, Any], own_states: Path, tmp_path: Path, damage: str
) -> None:
    run, printed = tmp_path / "run", tmp_path / "printed"
    forks.start(arguments(deep_bench, run), printed, Blow("record", 30, 0.5)).end()
    (file,) = own_states.iterdir()
    DAMAGE[damage](file)
    again = ["finetune", "--resume", "--out", str(run)]
    assert_same_run(run, finish(again, printed), whole)


def test_a_full_disk_ends_the_pass_with_the_bytes_and_leaves_no_states(
    deep_bench: Bench, own_states: Path, tmp_path: Path
) -> None:
    args = arguments(deep_bench, tmp_path / "run")
    code, _, err = forks.start(args, tmp_path / "printed", largest_file=130_000).end()
    assert code == 1 and "bytes of states could not be written" in err
    assert not own_states.exists() or not list(own_states.iterdir())
    again = ["finetune", "--resume", "--out", str(tmp_path / "run")]
    assert finish(again, tmp_path / "printed")["steps"] == 60


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": "9"}, "has 4 blocks. Give 1 to 4, or all"),
        ({"blocks": "0"}, "at least 1"),
        ({"blocks": "some"}, "needs a number"),
        ({"states": "bf16"}, "--states has no effect here: only --blocks freezes blocks"),
        ({"state_rows": 8}, "--state-rows has no effect here"),
    ],
)
def test_requests_that_mean_nothing_are_refused(
    deep_bench: Bench, edgezo: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    args = deep_bench.arguments(**changes)
    code, _, err = edgezo("finetune", *args, "--out", tmp_path / "run")
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_answers_that_are_written_run_every_block(
    deep_bench: Bench, own_states: Path, tmp_path: Path
) -> None:
    shared = {"kind": "completion", "objective": "exact-match", "max_new_tokens": 3, "blocks": "2"}
    with pytest.raises(UsageError, match=r"each new token passes every block\. Give --states none"):
        run_of(deep_bench, tmp_path / "kept", **shared, states="bf16")
    summary = run_of(deep_bench, tmp_path / "run", **shared)
    assert summary["steps"] == 3 and not own_states.exists()


def test_label_words_of_several_tokens_run_every_block(
    deep_bench: Bench, own_states: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"in a tree behind each prompt\. Give --states none"):
        run_of(deep_bench, tmp_path / "kept", "choice", **EXACT)
    summary = run_of(deep_bench, tmp_path / "run", "choice", blocks="2")
    assert summary["steps"] == 3 and not own_states.exists()


def test_all_blocks_are_no_cut(deep_bench: Bench, tmp_path: Path) -> None:
    all_blocks = run_of(deep_bench, tmp_path / "all")
    four = run_of(deep_bench, tmp_path / "four", blocks="4")
    assert four["trained_sha256"] == all_blocks["trained_sha256"]
    assert "\nblocks =" not in (tmp_path / "all" / "config.toml").read_text()


def test_states_that_were_used_longest_ago_make_room(
    own_states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No disk of a given size can be had here: what is free is said."""
    own_states.mkdir(parents=True)
    files = [own_states / f"{number:032x}.states" for number in range(4)]
    for age, file in enumerate(files):
        file.write_bytes(bytes(1000))
        os.utime(file, (age, age))
    beside = own_states / "notes.txt"
    beside.write_bytes(bytes(1000))
    free = SimpleNamespace(free=4000)
    monkeypatch.setattr(states_cache.shutil, "disk_usage", lambda path: free)
    states_cache.make_room(files[0])
    assert all(file.exists() for file in files)
    free.free = 1000  # half of 1,000 and of the 4,000 that are theirs
    assert states_cache.states_room_bytes() == 2500
    states_cache.make_room(files[0])
    assert [file.exists() for file in files] == [True, False, False, True]
    assert beside.exists()
