"""Whole runs on a tiny model: resumed, replayed and evaluated, they are the same run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import tomli_w
import torch
from conftest import make_model, write_rows
from safetensors.torch import load_file

from edgezo.errors import UsageError
from edgezo.machine.limits import GUARD_MARGIN_BYTES
from edgezo.plan.request import make_config
from edgezo.run.journal import open_journal
from edgezo.run.train import finetune
from edgezo.weights.layouts import Dense
from edgezo.zo import axes
from edgezo.zo.noise import Key
from edgezo.zo.presets import PRESETS

# (precision, rounding of full weights)
DENSE = [("fp32", None), ("bf16", "plane"), ("bf16", "stochastic"), ("fp16", "plane")]
STORES = [("int4", None), ("bf16", None), ("int8", None), ("fp32", None), ("fp16", None)]
TRAINED = ("lowrank", "full", "norms", "scales", "lowrank+head", "full+head", "norms+scales+head")
DIRECTIONS = ("signs", "rademacher", "gaussian", "shared")


def combinations() -> list[tuple[str, str, str, str | None]]:
    """Every choice of what is trained with every direction, the stores dealt out in turn."""
    dense, stores = cycle(DENSE), cycle(STORES)
    return [
        (train, directions, *next(dense if "full" in train else stores))
        for train in TRAINED
        for directions in DIRECTIONS
    ]


def estimator(directions: str) -> str:
    return "mezo" if directions == "shared" else "grzo"


def run_of(bench, out: Path, kind: str = "label", **changes: Any) -> dict[str, Any]:
    """The summary of a run in this process."""
    return finetune(make_config(bench.settings(kind, out=str(out), **changes)))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def of_evaluation(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("metric", "value", "n", "loss")}


# ---------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.parametrize(("train", "directions", "precision", "rounding"), combinations())
def test_replay_gives_the_bits_and_the_evaluation_of_the_run(
    train, directions, precision, rounding, bench, edgezo_json, tmp_path
):
    run, copy = tmp_path / "run", tmp_path / "copy"
    summary = run_of(
        bench,
        run,
        train=train,
        directions=directions,
        estimator=estimator(directions),
        precision=precision,
        rounding=rounding,
        weight_decay=0.01,
        step=0.5 if directions != "shared" else None,
    )
    assert summary["steps"] == 3 and summary["precision"] == precision
    code, replayed = edgezo_json("replay", run, "--out", copy)
    assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]
    for place in (run, copy):
        code, found = edgezo_json("eval", "--model", place)
        assert code == 0 and found["steps"] == 3
        assert of_evaluation(found) == of_evaluation(summary["eval_after"])


def test_the_same_request_gives_the_same_bits_and_another_seed_does_not(bench, tmp_path):
    hashes = [
        run_of(bench, tmp_path / str(number), seed=seed)["trained_sha256"]
        for number, seed in enumerate((1, 1, 2))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["plane", "stochastic"])
def test_what_an_update_gives_is_what_is_read_back(dtype, rounding):
    """Replay makes many updates in one sweep, a run writes and reads after each."""
    generator = torch.Generator().manual_seed(0)
    layout = Dense(torch.zeros(64, 512, dtype=dtype), rounding=rounding)
    values = torch.randn(64, 512, generator=generator)
    values[:8] = values[:8].to(dtype).float()  # on the grid
    step = values[8:16].to(dtype).float()
    values[8:16] = step + (step - torch.nextafter(values[8:16].to(dtype), step.to(dtype) * 2)) / 2
    values[16:24] = 2.0 ** torch.randint(-12, 3, (8, 512), generator=generator)
    values[16:20] *= 1 - 2.0**-9  # just below a power of two
    values[24:26] *= 1e-7
    every = slice(0, 64)
    given = layout.snap(values.clone(), Key(0, 0), 1, every)
    layout.write(every, given)
    assert torch.equal(layout.read(every), given)
    if rounding == "plane":  # rounds to nearest
        assert torch.equal(layout.snap(given.clone(), Key(0, 1), 1, every), given)


def test_training_changes_what_is_evaluated(bench, tmp_path):
    summary = run_of(bench, tmp_path / "run", train="lowrank+head", steps=12)
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"]


def test_a_run_killed_before_its_snapshot_replays_to_where_the_snapshot_stands(
    bench, edgezo_json, tmp_path
):
    run, copy = tmp_path / "run", tmp_path / "copy"
    args = bench.arguments(train="lowrank+head", steps=9, snapshot_every=4, out=run)
    forks.start(["finetune", *args], tmp_path / "out", forks.Blow("record", 7, 1)).end()
    assert edgezo_json("replay", run, "--out", copy)[1]["steps"] == 4
    ends = [of_evaluation(edgezo_json("eval", "--model", place)[1]) for place in (run, copy)]
    assert ends[0] == ends[1]
    assert edgezo_json("eval", "--model", copy)[1]["steps"] == 4


def test_what_replay_wrote_does_not_hide_the_steps_that_follow(bench, edgezo_json, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    whole = run_of(bench, tmp_path / "whole", train="lowrank+head", steps=9, snapshot_every=4)
    args = bench.arguments(train="lowrank+head", steps=9, snapshot_every=4, out=run)
    forks.start(["finetune", *args], tmp_path / "out", forks.Blow("record", 7, 1)).end()
    assert edgezo_json("replay", run, "--out", copy)[0] == 0
    code, summary = edgezo_json("finetune", "--resume", "--out", copy)
    assert code == 0 and summary["trained_sha256"] == whole["trained_sha256"]
    code, found = edgezo_json("eval", "--model", copy)
    assert found["steps"] == 9
    assert of_evaluation(found) == of_evaluation(whole["eval_after"])


def test_replay_never_overwrites_a_run(bench, edgezo, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run_of(bench, run)
    run_of(bench, other, seed=1)
    for out in (other, run):
        before = contents(out)
        code, _, err = edgezo("replay", run, "--out", out)
        assert code == 2 and str(out) in err.replace("\n", "")
        assert contents(out) == before
    assert edgezo("replay", run, "--out", tmp_path / "copy")[0] == 0
    assert edgezo("replay", run, "--out", tmp_path / "copy")[0] == 0  # what it wrote it may replace


# ---------------------------------------------------------------------------------------------
# Going on


def test_a_second_start_is_refused_and_changes_nothing(bench, edgezo, tmp_path):
    run = tmp_path / "run"
    run_of(bench, run)
    before = contents(run)
    code, _, err = edgezo("finetune", *bench.arguments(seed=9, out=run))
    assert code == 2 and "--resume" in err
    with pytest.raises(UsageError, match="--resume"):
        run_of(bench, run, seed=9)
    assert contents(run) == before


@pytest.mark.parametrize(
    "change", [("--seed", "9"), ("--steps", "4"), ("--batch-size", "5"), ("--train", "scales")]
)
def test_resume_with_other_settings_is_refused_and_changes_nothing(
    change, bench, edgezo, edgezo_json, tmp_path
):
    run = tmp_path / "run"
    run_of(bench, run)
    before = contents(run)
    code, found = edgezo_json("finetune", "--resume", "--out", run, *change)
    assert code == 2 and len(found["problems"]) == 1 and change[0] in found["error"]
    name = change[0].removeprefix("--").replace("-", "_")
    cfg = make_config({**bench.settings(out=str(run)), name: change[1]})
    with pytest.raises(UsageError, match=change[0]):
        finetune(cfg, resume=True)
    # The settings in the directory itself were edited.
    config = run / "config.toml"
    config.write_text(replace(cfg, out=None).to_toml())
    assert edgezo("finetune", "--resume", "--out", run)[0] == 2
    config.write_bytes(before["config.toml"])
    assert contents(run) == before


def test_a_run_whose_model_and_data_have_moved_goes_on(bench, edgezo, edgezo_json, tmp_path):
    run, model, data = tmp_path / "run", tmp_path / "moved", tmp_path / "rows.jsonl"
    whole = run_of(bench, tmp_path / "whole", steps=9)
    settings = bench.settings()
    for place, name in ((model, "model"), (data, "data")):
        (shutil.copytree if Path(settings[name]).is_dir() else shutil.copy)(settings[name], place)
    args = bench.arguments(steps=9, out=run)
    forks.start(["finetune", *args], tmp_path / "out", forks.Blow("record", 7, 1)).end()
    moved = ("--model", model, "--data", data)
    code, summary = edgezo_json("finetune", "--resume", "--out", run, *moved)
    assert code == 0 and summary["trained_sha256"] == whole["trained_sha256"]
    assert str(model) in (run / "config.toml").read_text()
    other = make_model(tmp_path / "other", seed=5)
    assert edgezo("finetune", "--resume", "--out", run, "--model", other)[0] == 5
    assert str(model) in (run / "config.toml").read_text()


def test_a_removed_head_is_named_and_computed_again(bench, edgezo_json, tmp_path):
    run = tmp_path / "run"
    whole = run_of(bench, run, train="lowrank+head", steps=5)
    (run / "head.safetensors").unlink()
    for command in (("eval", "--model", run), ("replay", run, "--out", tmp_path / "copy")):
        code, found = edgezo_json(*command)
        assert code == 1 and "head.safetensors" in found["error"] and "--resume" in found["error"]
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again["trained_sha256"] == whole["trained_sha256"]
    assert edgezo_json("eval", "--model", run)[1]["steps"] == 5


def test_a_removed_head_of_a_run_of_a_given_time_is_not_computed_to_another_end(
    bench, edgezo_json, tmp_path
):
    run = tmp_path / "run"
    run_of(bench, run, train="lowrank+head", steps=None, for_s=0.3, snapshot_every=1)
    (run / "head.safetensors").unlink()
    before = contents(run)
    for command in (("eval", "--model", run), ("finetune", "--resume", "--out", run)):
        code, found = edgezo_json(*command)
        assert code == 1 and "copy" in found["error"]
    assert contents(run).keys() == before.keys()
    assert contents(run)["journal.bin"] == before["journal.bin"]
    assert contents(run)["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.mark.parametrize("length", [{"steps": 3}, {"steps": None, "for_s": 0.2}])
@pytest.mark.parametrize("train", ["scales", "lowrank+head"])
def test_resume_of_a_finished_run_changes_nothing(train, length, bench, edgezo_json, tmp_path):
    run = tmp_path / "run"
    summary = run_of(bench, run, train=train, **length)
    before = contents(run)
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again == json.loads(before["summary.json"])
    assert again["trained_sha256"] == summary["trained_sha256"]
    after = contents(run)
    for name in before.keys() - {"plan.json"}:  # the plan names this process's memory
        assert after[name] == before[name], name


def test_a_run_of_a_given_time_ends_and_goes_on_after_a_signal(bench, tmp_path):
    run = tmp_path / "run"
    args = bench.arguments(steps=None, for_s="6s", out=run)
    running = forks.start(["finetune", *args], tmp_path / "out")
    forks.watch(running, run / "journal.bin", 1500)
    running.signal(15)
    assert running.end()[0] == 130
    steps = len((run / "metrics.jsonl").read_text().splitlines()) - 1  # one line is an evaluation
    again = ["finetune", "--resume", "--out", str(run), "--json"]
    code, out, err = forks.start(again, tmp_path / "out").end()
    assert code == 0, err
    assert json.loads(out)["steps"] >= steps > 0


# ---------------------------------------------------------------------------------------------
# Tasks


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("kind", ["label", "choice", "completion", "text", "messages"])
def test_every_task_runs_with_every_estimator_and_stays_finite(
    kind, directions, bench, edgezo, edgezo_json, tmp_path
):
    run, copy = tmp_path / "run", tmp_path / "copy"
    asked = {"directions": directions, "estimator": estimator(directions)}
    summary = run_of(bench, run, kind, train="lowrank+head+probe", **asked)
    header = "accuracy" if kind in ("label", "choice") else "loss"
    for name in ("eval_before", "eval_after"):
        assert summary[name]["metric"] == header and math.isfinite(summary[name]["loss"])
        assert summary[name]["n"] == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not any(value is None for line in lines for value in line.values())
    assert not any(line.get("skipped") for line in lines)
    assert edgezo("replay", run, "--out", copy)[0] == 0
    tensors = load_file(copy / "trained.safetensors")
    assert tensors and all(torch.isfinite(t.float()).all() for t in tensors.values())
    if directions == "signs":  # the plain model is where the run began
        args = bench.arguments(kind, steps=None, batch_size=None, micro_batch=None)
        code, found = edgezo_json("eval", *args, "--held-out", 0.1)
        assert code == 0 and found["steps"] == 0
        assert of_evaluation(found) == of_evaluation(summary["eval_before"])


def test_a_masked_model_learns_label_words(bench, edgezo_json, tmp_path):
    model = make_model(tmp_path / "roberta", "roberta")
    bench = replace(bench, model=model)
    for train in ("lowrank+head", "full", "norms+scales"):
        run = tmp_path / train
        summary = run_of(bench, run, train=train, template="{text} It was {mask}.")
        assert math.isfinite(summary["loss_last"])
        code, replayed = edgezo_json("replay", run, "--out", run / "copy")
        assert code == 0 and replayed["trained_sha256"] == summary["trained_sha256"]


@pytest.mark.parametrize("kind", ["label", "completion"])
def test_the_head_alone_needs_no_probe_and_resumes_like_everything_else(
    kind, bench, edgezo_json, tmp_path
):
    whole = run_of(bench, tmp_path / "whole", kind, train="head", steps=8, step=None)
    assert whole["eval_after"]["loss"] != whole["eval_before"]["loss"]
    with open_journal(tmp_path / "whole" / "journal.bin", resume=False) as journal:
        assert all(np.isfinite(record.losses).all() for record in journal.records())
    run = tmp_path / "run"
    args = bench.arguments(kind, train="head", steps=8, snapshot_every=3, out=run)
    forks.start(["finetune", *args], tmp_path / "out", forks.Blow("head", 5, 1)).end()
    code, summary = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and summary["trained_sha256"] == whole["trained_sha256"]
    assert (
        edgezo_json("replay", run, "--out", tmp_path / "copy")[1]["trained_sha256"]
        == (whole["trained_sha256"])
    )


@pytest.mark.parametrize(
    "estimator",
    [
        n
        for n, p in PRESETS.items()
        if axes.DIRECTIONS[p.directions].echoes or axes.CREDITS[p.credit].carries
    ],
)
def test_the_head_alone_trains_by_presets_whose_records_hold_more(
    estimator, bench, edgezo_json, tmp_path
):
    request = {"estimator": estimator, "train": "head", "steps": 3, "eval_limit": 2}
    try:
        summary = run_of(bench, tmp_path / "run", **request)
    except UsageError as problem:
        assert "--train" in str(problem), "it says which parts the preset needs"
        return
    code, again = edgezo_json("replay", tmp_path / "run", "--out", tmp_path / "again")
    assert code == 0 and again["trained_sha256"] == summary["trained_sha256"]


@pytest.mark.parametrize(("train", "code"), [("head", 1), ("full", 1), ("lowrank", 0)])
def test_a_run_is_evaluated_on_other_label_words_only_where_that_has_a_meaning(
    train, code, bench, edgezo, tmp_path
):
    run = tmp_path / "run"
    run_of(bench, run, train=train)
    other = ["--data", bench.data / "label.jsonl", "--template", "{text} So:"]
    found, _, err = edgezo("eval", "--model", run, *other, "--labels", "0=no,1=yes")
    assert found == code and "Traceback" not in err
    assert ("label words" in err) == bool(code)
    assert edgezo("eval", "--model", run, *other, "--labels", "0=bad,1=good")[0] == 0


# ---------------------------------------------------------------------------------------------
# What is printed, and the process as a whole


def test_every_command_prints_one_json_object(bench, edgezo_json, tmp_path):
    run = tmp_path / "run"
    args = bench.arguments(out=run)
    data = bench.arguments(steps=None, batch_size=None, micro_batch=None)
    assert edgezo_json("finetune", *args, "--dry-run")[1]["items"]
    assert "⟦" in edgezo_json("finetune", *args, "--show-batch")[1]["batch"]
    assert not run.exists()
    code, summary = edgezo_json("finetune", *args)
    assert code == 0 and summary == json.loads((run / "summary.json").read_text())
    assert edgezo_json("plan", *data)[1]["planned_peak_bytes"]
    assert edgezo_json("eval", *data)[1]["metric"] == "accuracy"
    assert edgezo_json("eval", "--model", run)[1]["metric"] == "accuracy"
    assert edgezo_json("replay", run, "--out", tmp_path / "copy")[1]["steps"] == 3
    assert edgezo_json("models")[1]["models"]
    assert edgezo_json("finetune", *args)[1]["exit_code"] == 2
    assert edgezo_json("replay", tmp_path / "none", "--out", run)[1]["exit_code"] == 1


def program(*args: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "edgezo", *args, "--json"], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    return {"code": done.returncode, **json.loads(done.stdout)}


@pytest.mark.mem
def test_a_budget_just_above_the_smallest_that_is_named_is_enough_and_is_kept(bench, tmp_path):
    request = bench.settings(precision="int8", max_mem_bytes=None, steps=4)
    file = tmp_path / "request.toml"
    file.write_text(tomli_w.dumps(request))
    run = tmp_path / "run"
    args = ("finetune", "--config", str(file), "--out", str(run))
    refused = program(*args, "--max-mem", "50MB")
    assert refused["code"] == 3 and not run.exists()
    # What the guard keeps free, and imports that the base does not count, are on top for a model
    # as small as this one, where nothing else is.
    enough_bytes = refused["smallest_bytes"] + 2 * GUARD_MARGIN_BYTES
    assert f"--max-mem {-(-refused['smallest_bytes'] // 10**6)}MB" in refused["error"]
    summary = program(*args, "--max-mem", str(enough_bytes))
    assert summary["code"] == 0, summary
    base, load, peak = (
        summary[f"{name}_bytes"] for name in ("base_rss", "load_peak_rss", "peak_rss")
    )
    assert base <= load <= peak <= summary["max_mem_bytes"] == enough_bytes
    assert summary["run_peak_rss_bytes"] <= peak


def test_rows_without_a_token_to_predict_are_left_out_of_a_run(bench, edgezo_json, tmp_path):
    rows = [{"text": "a"}, *({"text": f"line {i} of some text"} for i in range(30))]
    data = write_rows(tmp_path / "text.jsonl", rows)
    run = tmp_path / "run"
    code, summary = edgezo_json("finetune", *bench.arguments("text", data=data, out=run))
    assert code == 0 and math.isfinite(summary["loss_last"])


def test_a_run_does_not_go_on_with_other_label_words(bench, edgezo_json, tmp_path):
    words = {"up": ("cold", "warm"), "renamed": ("no", "yes")}
    for name, pair in words.items():
        rows = [{"text": f"film {i}", "label": pair[i % 2]} for i in range(40)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    data = tmp_path / "up.jsonl"
    said = {
        "data": str(data),
        "template": "{text} It was",
        "labels": None,
        "out": str(tmp_path / "r"),
    }
    code, _ = edgezo_json("finetune", *bench.arguments(**said))
    assert code == 0
    (tmp_path / "renamed.jsonl").replace(data)
    code, found = edgezo_json("finetune", "--resume", "--out", tmp_path / "r")
    assert code == 1 and "cold, warm" in found["error"] and "no, yes" in found["error"]


@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta"])
def test_rows_longer_than_a_table_of_positions_are_refused_before_anything_is_made(
    family, bench, edgezo_json, tmp_path
):
    model = make_model(tmp_path / family, family)
    rows = [{"text": f"film {i} " * 90, "label": ("cold", "warm")[i % 2]} for i in range(20)]
    data = write_rows(tmp_path / "long.jsonl", rows)
    template = "It is {mask}: {text}" if family == "roberta" else "{text} It was"
    said = {"model": str(model), "data": str(data), "template": template, "labels": None}
    out = tmp_path / "run"
    code, found = edgezo_json("finetune", *bench.arguments(**said, out=str(out)))
    assert code == 2 and not out.exists()
    known = re.search(r"give --max-length (\d+)", found["error"])
    assert known is not None
    said |= {"max_length": known[1], "steps": 1}
    assert edgezo_json("finetune", *bench.arguments(**said, out=str(out)))[0] == 0
