"""A run that goes on from another one: so many steps and so many more are the steps of one run, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import Bench, make_model, write_rows
from forks import Blow
from test_opening import Kept
from test_runs import contents, of_evaluation, run_of

from edgezo.errors import EdgezoError, UsageError
from edgezo.plan.request import make_config, read_run_config, settings_after
from edgezo.run.directory import RunFiles, run_id
from edgezo.run.journal import open_journal
from edgezo.run.parent import open_with_parents
from edgezo.run.progress import RunProgress
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

# What is trained, and how: everything that stands beside the weights goes on with them.
KINDS: dict[str, dict[str, Any]] = {
    "factors and head": {"train": "lowrank+head", "snapshot_every": 2},
    "plane": {"train": "full", "precision": "bf16", "rounding": "plane"},
    "codes": {"train": "full", "precision": "int8"},
    "vectors": {"train": "norms+scales", "precision": "int4", "weight_decay": 0.01},
    "anchors": {"estimator": "mezo-svrg", "train": "norms", "refresh": 2},
    "rule with a state": {"estimator": "mezo-adam", "train": "lowrank"},
    "state in a basis": {"estimator": "lozo-m", "train": "full", "refresh": 3},
    "guided": {"estimator": "agzo", "train": "full", "snapshot_every": 4},
    "gradient": {"estimator": "lora", "train": "lora", "snapshot_every": 3},
    "short examples": {
        "estimator": "addax",
        "train": "lowrank+head",
        "short_tokens": 12,
        "snapshot_every": 3,
    },
}
STEPS = {"codes": (10, 7)}  # re-quantised after 16 steps


def longer(
    run: Path, out: Path, progress: RunProgress | None = None, **changes: Any
) -> dict[str, Any]:
    """The summary of a run that goes on from ``run``, in this process, with its micro-batches: losses are rounded."""
    changes = {"micro_batch": 3, **changes}
    saved = settings_after(read_run_config(RunFiles(run).config))
    cfg = make_config({"out": str(out), **changes}, saved)
    return finetune(cfg, parent=run, progress=progress)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_more_steps_are_the_steps_of_one_run(
    kind: str, bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    first, more = STEPS.get(kind, (4, 5))
    request = {"schedule": "constant", **KINDS[kind]}
    whole = run_of(bench, tmp_path / "whole", steps=first + more, **request)
    begun = run_of(bench, tmp_path / "first", steps=first, **request)
    summary = longer(tmp_path / "first", tmp_path / "more", steps=more)
    assert summary["steps"] == more
    assert summary["trained_sha256"] == whole["trained_sha256"] != begun["trained_sha256"]
    if kind != "codes":  # which are re-quantised once more at the end of a run
        assert of_evaluation(summary["eval_before"]) == of_evaluation(begun["eval_after"])
    shutil.rmtree(tmp_path / "first")  # it is not needed any more
    assert of_evaluation(summary["eval_after"]) == of_evaluation(whole["eval_after"])
    code, replayed = edgezo_json("replay", tmp_path / "more", "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == whole["trained_sha256"]


def test_a_run_goes_on_from_one_that_goes_on(
    bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    request = {"schedule": "constant", "train": "lowrank+head+probe"}
    whole = run_of(bench, tmp_path / "whole", steps=13, **request)
    run_of(bench, tmp_path / "0", steps=9, **request)
    shown = Kept()
    for n in range(2):
        summary = longer(tmp_path / str(n), tmp_path / str(n + 1), shown, steps=2)
    lines = dict(shown.openings[-1].lines())
    assert "goes on after 11 steps of the run" in lines["model"]
    assert lines["method"].startswith(
        "default: the linear probe (or the head) of that run, then grzo"
    )
    assert "linear probe" not in lines["time"]
    assert summary["trained_sha256"] == whole["trained_sha256"]
    assert summary["parent"]["steps"] == 11
    assert {file.name for file in (tmp_path / "2" / "parent").iterdir()} == {
        *("journal-1.bin", "journal-2.bin", "probe.safetensors")
    }
    for n in range(2):
        shutil.rmtree(tmp_path / str(n))
    assert edgezo_json("finetune", "--resume", "--out", tmp_path / "2")[1] == summary
    code, found = edgezo_json("eval", "--model", tmp_path / "2")
    assert code == 0 and of_evaluation(found) == of_evaluation(whole["eval_after"])


def test_the_journal_names_the_parent(bench: Bench, tmp_path: Path) -> None:
    first = run_of(bench, tmp_path / "first", train="lowrank")
    summary = longer(tmp_path / "first", tmp_path / "more", steps=2)
    with open_journal(tmp_path / "first" / "journal.bin", resume=False) as journal:
        parent = {"run_id": run_id(journal.header), "steps": 3}
    assert summary["parent"] == {**parent, "trained_sha256": first["trained_sha256"]}
    with open_with_parents(RunFiles(tmp_path / "more")) as journal:
        asked = journal.header["config"]
        assert asked["parent"] == parent["run_id"]
        assert asked["parent_sha256"] == first["trained_sha256"]
        assert [part.next_step for part in journal.chain()] == [3, 2]
    with open_journal(tmp_path / "first" / "journal.bin", resume=False) as journal:
        assert not {"parent", "parent_steps", "parent_sha256"} & journal.header["config"].keys()


def test_other_rows_another_step_size_and_another_batch(
    bench: Bench, edgezo_json: Any, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "first", train="lowrank+head+probe", steps=9)
    rows = [{"text": f"a film {n}", "label": n % 2} for n in range(12)]
    other = write_rows(tmp_path / "other.jsonl", rows)
    code, summary = edgezo_json(
        *("finetune", "--model", tmp_path / "first", "--more-steps", 3, "--data", other),
        *("--step", 0.03, "--batch-size", 2, "--out", tmp_path / "more"),
    )
    assert code == 0, summary
    cfg = read_run_config(tmp_path / "more" / "config.toml")
    assert (cfg.data, cfg.step, cfg.batch_size, cfg.steps) == (str(other), 0.03, 2, 3)
    assert cfg.model == str(bench.model) and cfg.template == "{text} It was"
    # The probe is the parent's, and is not fitted again.
    assert summary["probe"]["rows"] == 36
    code, found = edgezo_json("eval", "--model", tmp_path / "more")
    assert code == 0 and of_evaluation(found) == of_evaluation(summary["eval_after"])


def test_a_plan_counts_what_is_new(bench: Bench, edgezo_json: Any, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "first", train="lowrank+probe", steps=9)
    before = contents(tmp_path / "first")
    code, plan = edgezo_json("plan", "--model", tmp_path / "first", "--more-steps", 2)
    assert code == 0, plan
    probes = [item for item in plan["items"] if item["name"] == "linear probe"]
    assert [item["reason"] for item in probes] == ["that of the run it goes on from"]
    code, plan = edgezo_json("finetune", "--model", tmp_path / "first", "--dry-run")
    assert code == 0 and plan["model"] == "model"
    assert contents(tmp_path / "first") == before


def test_with_blocks_on_disk_it_has_the_same_bits(deep_bench: Bench, tmp_path: Path) -> None:
    request = {"train": "full", "precision": "bf16", "residency": "disk", "schedule": "constant"}
    whole = run_of(deep_bench, tmp_path / "whole", steps=5, **request)
    run_of(deep_bench, tmp_path / "first", steps=3, **request)
    more = {"steps": 2, "residency": "disk"}
    summary = longer(tmp_path / "first", tmp_path / "more", **more)
    assert summary["trained_sha256"] == whole["trained_sha256"]


def test_frozen_blocks_stay_frozen(deep_bench: Bench, tmp_path: Path) -> None:
    request = {"train": "lowrank", "blocks": "2", "schedule": "constant", "states": "exact"}
    whole = run_of(deep_bench, tmp_path / "whole", steps=6, state_rows=36, **request)
    run_of(deep_bench, tmp_path / "first", steps=3, state_rows=36, **request)
    summary = longer(tmp_path / "first", tmp_path / "more", steps=3, state_rows=36)
    assert summary["trained_sha256"] == whole["trained_sha256"]


BLOWS = {
    "factors and head": [
        Blow("head.safetensors", 1, 0),
        Blow("config.toml", 1, 1),
        Blow("record", 3, 0.5),
        Blow("summary.json", 1, 0),
    ],
    "probe": [Blow("probe.safetensors", 2, 0), Blow("update", 3, 0)],
}


@pytest.mark.parametrize("kind", BLOWS)
def test_killed_at_any_moment_it_goes_on(kind: str, bench: Bench, tmp_path: Path) -> None:
    first, run, out = tmp_path / "first", tmp_path / "more", tmp_path / "out"
    train = {"probe": "lowrank+probe"}.get(kind, "lowrank+head")
    run_of(bench, first, steps=4, snapshot_every=2, train=train)
    unharmed = longer(first, tmp_path / "unharmed", steps=5)
    begin = ["finetune", "--model", first, "--more-steps", 5, "--micro-batch", 3, "--out", run]
    resume = ["finetune", "--resume", "--out", run]
    for blow in BLOWS[kind]:
        command = resume if RunFiles(run).config.exists() else begin
        assert forks.start(list(map(str, command)), out, blow).end()[0] == -9, blow
    ended = finetune(replace(read_run_config(run / "config.toml"), out=str(run)), resume=True)
    assert ended["trained_sha256"] == unharmed["trained_sha256"]
    assert of_evaluation(ended["eval_after"]) == of_evaluation(unharmed["eval_after"])
    assert not list(run.rglob("*.edgezo-tmp"))


def test_its_result_is_used_like_that_of_any_run(
    bench: Bench, edgezo: Any, edgezo_json: Any, tmp_path: Path
):
    run_of(bench, tmp_path / "first", "completion", train="lowrank+head", step=0.5, steps=4)
    summary = longer(tmp_path / "first", tmp_path / "more", steps=3)
    run, file = tmp_path / "more", tmp_path / "mine.edgezo"
    code, shipped = edgezo_json("export", run, "--format", "journal", "--out", file)
    assert code == 0 and shipped["trained_sha256"] == summary["trained_sha256"]
    code, applied = edgezo_json("apply", file, "--base", bench.model, "--out", tmp_path / "applied")
    assert code == 0 and applied["trained_sha256"] == summary["trained_sha256"]
    code, _, err = edgezo("export", run, "--format", "peft", "--out", tmp_path / "peft")
    assert code == 0, err
    rows = ("--data", bench.data / "completion.jsonl")
    ends = []
    for target in (run, tmp_path / "applied"):
        code, found = edgezo_json("predict", target, *rows, "--max-new-tokens", 4)
        assert code == 0
        ends.append(found["predictions"])
    assert ends[0] == ends[1]
    code, out, _ = edgezo("runs", tmp_path)
    assert code == 0 and out.count("more") == 1  # its parent/ is no run
    code, out, err = edgezo("report", run)
    page = (run / "report.html").read_text()
    assert code == 0 and "goes on from" in page, err
    code, _, err = edgezo("rm", run, "--yes")
    assert code == 0 and not run.exists(), err


def test_a_probe_that_was_taken_over_is_exported(bench: Bench, edgezo_json: Any, tmp_path: Path):
    run_of(bench, tmp_path / "first", train="lowrank+probe", steps=9)
    summary = longer(tmp_path / "first", tmp_path / "more", steps=2)
    code, _ = edgezo_json("export", tmp_path / "more", "--out", tmp_path / "model")
    assert code == 0
    rows = bench.settings()
    code, found = edgezo_json(
        *("eval", "--model", tmp_path / "model", "--data", rows["data"]),
        *("--template", rows["template"], "--labels", rows["labels"], "--precision", "fp32"),
        *("--held-out", 0.1),
    )
    assert code == 0 and found["value"] == summary["eval_after"]["value"]


# ---------------------------------------------------------------------------------------------
# What is refused, and changes nothing


def test_a_run_that_has_not_ended_is_to_be_finished_first(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "more"
    args = bench.arguments(train="lowrank+head", steps=9, snapshot_every=4, out=run)
    forks.start(["finetune", *args], tmp_path / "out", Blow("record", 7, 1)).end()
    code, _, err = edgezo("finetune", "--model", run, "--more-steps", 3, "--out", out)
    assert code == 2 and "7 of 9 steps" in err and f"--resume --out {run}" in err
    assert edgezo("replay", run, "--out", tmp_path / "copy")[0] == 0
    code, _, err = edgezo("finetune", "--model", tmp_path / "copy", "--more-steps", 3, "--out", out)
    assert code == 2 and "edgezo replay" in err
    assert not out.exists()


def test_what_it_cannot_change_is_named(bench: Bench, edgezo: Any, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "more"
    run_of(bench, run, train="lowrank+head")
    for change, word in (
        (("--rank", 4), "--rank was 8"),
        (("--seed", 3), "--seed was 0"),
        (("--train", "norms"), "--train was lowrank+head"),
        (("--estimator", "lora"), "--estimator was default"),
        (("--precision", "bf16"), "--precision was fp32"),
    ):
        code, _, err = edgezo("finetune", "--model", run, "--more-steps", 3, "--out", out, *change)
        assert code == 2 and word in err and "edgezo export" in err, err
    for request, word in (
        (("--model", bench.model, "--more-steps", 3), "--model RUN"),
        (("--model", run, "--more-steps", 3, "--steps", 4), "leave out --steps"),
        (("--resume", "--more-steps", 3), "leave it out"),
    ):
        code, _, err = edgezo("finetune", *request, "--out", run if "--resume" in request else out)
        assert code == 2 and word in err, err
    assert not out.exists()


def test_rows_of_another_task_and_another_base_are_refused(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "more"
    run_of(bench, run, train="lowrank+head")
    asked = ("finetune", "--model", run, "--more-steps", 2, "--out", out)
    code, _, err = edgezo(*asked, "--labels", "0=cold,1=warm")
    assert code == 1 and "trained for bad, good" in err and "cold, warm" in err
    config = RunFiles(run).config
    other = make_model(tmp_path / "other", seed=5)
    config.write_text(config.read_text().replace(str(bench.model), str(other)))
    code, _, err = edgezo(*asked)
    assert code == 5 and "other base weights" in err
    assert not out.exists()


def test_a_folder_of_the_parent_that_is_damaged_is_an_error(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "first", train="lowrank+head")
    run_of(bench, tmp_path / "stranger", train="lowrank+head", seed=4)
    longer(tmp_path / "first", tmp_path / "more", steps=2)
    parent = RunFiles(tmp_path / "more").parent
    journal = parent.path / "journal-1.bin"
    whole = journal.read_bytes()
    for damage, word in (
        (b"", "damaged"),
        (whole[:-20], "ends after step"),
        (RunFiles(tmp_path / "stranger").journal.read_bytes(), "another run"),
        (None, "is not there"),
    ):
        if damage is None:
            journal.unlink()
        else:
            journal.write_bytes(damage)
        for command in (
            ("eval", "--model", tmp_path / "more"),
            ("finetune", "--resume", "--out", tmp_path / "more"),
        ):
            code, _, err = edgezo(*command)
            assert code == 1 and word in err and "Traceback" not in err, (damage, err)


def test_python_asks_for_it_as_the_command_line_does(bench: Bench, tmp_path: Path) -> None:
    run_of(bench, tmp_path / "first", train="lowrank")
    saved = read_run_config(tmp_path / "first" / "config.toml")
    with pytest.raises(UsageError, match="--rank was 8"):
        finetune(replace(saved, rank=4, out=str(tmp_path / "x")), parent=tmp_path / "first")
    with pytest.raises(EdgezoError, match="is no run"):
        finetune(replace(saved, out=str(tmp_path / "x")), parent=tmp_path / "nothing")
    assert not (tmp_path / "x").exists()
