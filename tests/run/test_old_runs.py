"""Runs that an earlier version of the code left (``tests/old_runs``) are replayed, evaluated and resumed by this one.

Weights that follow from base and journal have the bits of the machine that made the runs. Losses that are computed
again have not: they are equal up to rounding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgezo.plan.request import from_toml
from edgezo.run.journal import open_journal
from edgezo.weights.disk import OverlayFile

OLD_RUNS = Path(__file__).resolve().parent.parent / "old_runs"
# Of each there is a finished run, and one of the same request that was stopped on its way.
KINDS = (
    *("default", "completion", "full-disk", "full-int8", "mezo", "mezo-adam", "mezo-svrg"),
    *("lo-grzo", "ag-grzo", "zo-finetuner", "lora", "addax", "step-auto", "int4"),
)
TORN = ("default", "full-disk", "lora")  # half of one more record follows in the stopped run
# Its rule divides by square roots, which torch leaves to MKL, and MKL rounds them by the CPU that it finds.
ROOTED = "mezo-adam"
# Relative, of losses by what they were computed in: another CPU adds up in another order.
LOSS_ERROR = {"fp32": 1e-4, "bf16": 2e-2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def beside_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current directory with the base model, the rows and the finetuner: where paths of the runs begin."""
    for name in ("base", "rows"):
        shutil.copytree(OLD_RUNS / name, tmp_path / name)
    shutil.copy(OLD_RUNS / "finetuner.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)


def copied(run: str) -> Path:
    """A run of ``tests/old_runs`` in the current directory, where it may be written to."""
    return Path(shutil.copytree(OLD_RUNS / run, run))


def summary_of(kind: str) -> dict[str, Any]:
    """What the finished run has in its summary.json."""
    summary: dict[str, Any] = json.loads(
        (OLD_RUNS / "finished" / kind / "summary.json").read_text()
    )
    return summary


def assert_same_figures(kind: str, now: dict[str, Any], then: dict[str, Any]) -> None:
    """The same metric over as many rows, with the same value and loss but for rounding."""
    error = loss_error(kind)
    assert (now["metric"], now["n"]) == (then["metric"], then["n"])
    assert now["value"] == pytest.approx(then["value"], rel=error)
    assert now["loss"] == pytest.approx(then["loss"], rel=error)


def loss_error(kind: str) -> float:
    plan = json.loads((OLD_RUNS / "finished" / kind / "plan.json").read_text())
    return LOSS_ERROR[plan["compute_dtype"]]


def skip_where_roots_differ(kind: str) -> None:
    """Skip what compares bits of a run with square roots in it, where this machine takes them otherwise."""
    roots = load_file(OLD_RUNS / "roots.safetensors")["roots"]
    if kind == ROOTED and not torch.equal((torch.arange(1024) / 7).sqrt(), roots):
        pytest.skip("torch rounds square roots otherwise here than where the run was made")


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_is_replayed_to_its_bits(kind, edgezo_json):
    code, replayed = edgezo_json("replay", copied(f"finished/{kind}"), "--out", "copy")
    then = summary_of(kind)
    assert code == 0, replayed
    assert replayed["steps"] == then["steps"]
    skip_where_roots_differ(kind)
    assert replayed["trained_sha256"] == then["trained_sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_has_nothing_left_to_do(kind, edgezo_json):
    skip_where_roots_differ(kind)
    run = copied(f"finished/{kind}")
    code, summary = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and summary == summary_of(kind)
    for name in ("journal.bin", "metrics.jsonl", "summary.json", "config.toml"):
        assert (run / name).read_bytes() == (OLD_RUNS / run / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_is_evaluated_as_it_was(kind, edgezo_json):
    code, figures = edgezo_json("eval", "--model", copied(f"finished/{kind}"))
    then = summary_of(kind)
    assert code == 0, figures
    assert figures["steps"] == then["steps"]
    assert_same_figures(kind, figures, then["eval_after"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_to_the_end_of_the_finished_one(kind, edgezo_json):
    run, then = copied(f"unfinished/{kind}"), summary_of(kind)
    with open_journal(run / "journal.bin", resume=False) as journal:
        assert 0 < len(journal) < then["steps"]
        assert (journal.cut_bytes > 0) == (kind in TORN)
    code, now = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0, now
    for name in ("steps", "estimator", "trained", "precision", "residency"):
        assert now[name] == then[name], name
    for name in ("loss_first", "loss_last"):
        assert now[name] == pytest.approx(then[name], rel=loss_error(kind)), name
    assert_same_figures(kind, now["eval_before"], then["eval_before"])
    assert_same_figures(kind, now["eval_after"], then["eval_after"])
    code, replayed = edgezo_json("replay", run, "--out", "copy")
    assert code == 0, replayed
    assert replayed["trained_sha256"] == now["trained_sha256"]


@pytest.mark.parametrize("kind", ["default", "completion", "mezo-adam"])
def test_a_finished_run_is_trained_longer(kind, edgezo_json):
    run, then = copied(f"finished/{kind}"), summary_of(kind)
    skip_where_roots_differ(kind)
    asked = ("--model", run, "--more-steps", 2, "--out", "longer")
    code, summary = edgezo_json("finetune", *asked)
    assert code == 0, summary
    parent = summary["parent"]
    assert (parent["steps"], parent["trained_sha256"]) == (then["steps"], then["trained_sha256"])
    assert_same_figures(kind, summary["eval_before"], then["eval_after"])
    code, replayed = edgezo_json("replay", "longer", "--out", "copy")
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]


def test_blocks_that_a_stopped_run_left_on_disk_are_used_as_they_are(edgezo_json, monkeypatch):
    updates, opened = {}, OverlayFile.open

    def noted(file: OverlayFile) -> int | None:
        updates[file.path.name] = opened(file)
        return updates[file.path.name]

    monkeypatch.setattr(OverlayFile, "open", noted)
    run = copied("unfinished/full-disk")
    assert edgezo_json("finetune", "--resume", "--out", run)[0] == 0
    for block in ("block-0000.overlay", "block-0001.overlay"):
        assert updates[block], f"{block} is made again from base and journal"


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_settings_are_read_and_written_as_they_were(state):
    for kind in KINDS:
        text = (OLD_RUNS / state / kind / "config.toml").read_text()
        assert from_toml(text).to_toml() == text, kind


def test_journals_of_every_format_are_among_them():
    versions = set()
    for kind in KINDS:
        with open_journal(OLD_RUNS / "finished" / kind / "journal.bin", resume=False) as journal:
            versions.add(journal.version)
    assert versions == {1, 2, 3}
