"""Runs on the ONNX engine: in a process without torch, killed and resumed, replayed by the other engine, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Bench, Command

from edgezo.data.row_files import Problems, read_records
from edgezo.errors import BaseMismatch, EdgezoError, UsageError
from edgezo.plan.fields import flag
from edgezo.plan.request import make_config
from edgezo.run import onnx_step
from edgezo.run.evaluate import replay
from edgezo.run.export import export
from edgezo.run.export_trainable import export_trainable
from edgezo.run.onnx_train import finetune_onnx
from edgezo.run.onnx_use import evaluate_onnx, replay_on_onnx
from edgezo.run.places import uses_graphs
from edgezo.run.predict import load
from edgezo.run.report import is_report_file
from edgezo.run.train import finetune

pytest.importorskip("onnxruntime", reason="pip install 'edgezo[onnx]' brings onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")

# A process in which the packages of the extra "torch" cannot be imported.
WITHOUT_TORCH = """
import sys
REFUSED = {"torch", "transformers", "accelerate", "optimum", "safetensors", "gguf", "onnx"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from edgezo.cli.main import run
code = run(sys.argv[1:])
print(sorted(REFUSED & {name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def graphs(deep_bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs") / "model"
    export_trainable(str(deep_bench.model), folder, "fp32")
    return folder


def settings(bench: Bench, graphs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"model": str(graphs), "engine": "onnx", "threads": 1, "out": str(out)}
    return bench.settings(**fixed | changes)


def run_onnx(bench: Bench, graphs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return finetune_onnx(make_config(settings(bench, graphs, out, **changes)))


def without_torch(*args: object, typed: str = "") -> dict[str, Any]:
    """What a command prints with --json, in a process without torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, args), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, input=typed)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]", "nothing of them was imported"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_process_without_torch_trains_evaluates_and_replays(
    deep_bench: Bench, graphs: Path, tmp_path: Path
):
    """The whole of the default recipe: a linear probe, then GRZO below it."""

    out = tmp_path / "run"
    given = settings(deep_bench, graphs, out)
    del given["precision"], given["max_mem_bytes"]
    options = [part for name, value in given.items() for part in (flag(name), value)]
    summary = without_torch("finetune", *options, "--max-mem", "2GB")
    assert summary["engine"] == "onnx" and summary["steps"] == 3 and summary["probe"]["used"]
    assert is_report_file(out / "report.html")
    assert without_torch("eval", "--model", out)["loss"] > 0
    replayed = without_torch("replay", out, "--out", tmp_path / "again")
    assert replayed["trained_sha256"] == summary["trained_sha256"]
    made = without_torch("predict", out, "--data", "-", typed="film 3 is warm\nfilm 4 is cold\n")
    assert made["rows"] == 2 and made["steps"] == 3
    for prediction in made["predictions"]:
        assert prediction["label"] in prediction["probabilities"]


def test_without_torch_a_run_writes_and_talks(
    deep_bench: Bench, graphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    given = settings(deep_bench, graphs, out, kind="messages", train="lowrank+head")
    del given["precision"], given["max_mem_bytes"]
    options = [part for name, value in given.items() for part in (flag(name), value)]
    summary = without_torch("finetune", *options, "--max-mem", "2GB")
    theirs = finetune(
        make_config(deep_bench.settings("messages", train="lowrank+head", out=str(tmp_path / "t")))
    )
    assert summary["loss_last"] == pytest.approx(theirs["loss_last"], abs=1e-4)
    talk = without_torch("chat", out, "--max-new-tokens", 4, typed="a warm film\nand then?\n")
    assert [turn["prompt"] for turn in talk["turns"]] == ["a warm film", "and then?"]
    turn = {"role": "user", "content": "a warm film"}
    row = json.dumps({"messages": [turn]}) + "\n"
    asked = ("--max-new-tokens", 4, "--data", "-")
    written = without_torch("predict", out, *asked, typed=row)["predictions"][0]["answer"]
    with load(out, base=str(deep_bench.model), max_new_tokens=4) as used:
        assert used.predict([json.loads(row)])[0]["answer"] == written
    plain = without_torch("predict", graphs, *asked, typed=row)
    assert plain["rows"] == 1 and plain["steps"] == 0


@pytest.mark.parametrize(
    "kind, train",
    [("label", "lowrank"), ("label", "lowrank+probe"), ("choice", "lowrank"), ("text", "lowrank")],
)
def test_predictions_are_those_of_the_run_over_its_base(
    deep_bench: Bench, graphs: Path, tmp_path: Path, kind: str, train: str
) -> None:
    out = tmp_path / "run"
    run_onnx(deep_bench, graphs, out, kind=kind, train=train)
    records = read_records(Path(deep_bench.settings(kind)["data"]), Problems())
    rows = [dict(record.fields) for record in records][:6]
    with load(out) as ours, load(out, base=str(deep_bench.model)) as theirs:
        for one, other in zip(ours.predict(rows), theirs.predict(rows), strict=True):
            assert list(one) == list(other)
            for name, value in one.items():
                close = pytest.approx(other[name], abs=1e-4)
                assert value == (other[name] if isinstance(value, str) else close)


def test_exports_say_without_torch_what_they_need(
    deep_bench: Bench, graphs: Path, tmp_path: Path
) -> None:
    run_onnx(deep_bench, graphs, tmp_path / "run", train="lowrank")
    for form in ("hf", "gguf", "journal"):
        out = tmp_path / form
        args = ["export", str(tmp_path / "run"), "--format", form, "--out", str(out)]
        command = [sys.executable, "-c", WITHOUT_TORCH, *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "pip install 'edgezo[torch]'" in done.stderr
        assert not out.exists()
        assert export(tmp_path / "run", form, out)["steps"] == 3


def test_without_torch_its_commands_say_what_brings_it(deep_bench: Bench, tmp_path: Path):
    args = deep_bench.arguments(out=str(tmp_path / "run"))
    command = [sys.executable, "-c", WITHOUT_TORCH, "finetune", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install 'edgezo[torch]'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind, train", [("label", "lowrank"), ("completion", "lowrank+head")])
def test_both_engines_make_the_same_run(
    deep_bench: Bench, graphs: Path, tmp_path: Path, kind: str, train: str
):
    ours = run_onnx(deep_bench, graphs, tmp_path / "onnx", kind=kind, train=train)
    theirs = finetune(
        make_config(deep_bench.settings(kind, train=train, out=str(tmp_path / "torch")))
    )
    for name in ("loss_first", "loss_last"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
    assert ours["eval_after"]["loss"] == pytest.approx(theirs["eval_after"]["loss"], abs=1e-3)
    assert ours["peak_rss_bytes"] > 0 and ours["trained"] == theirs["trained"]


def test_journals_replay_in_the_other_engine(deep_bench: Bench, graphs: Path, tmp_path: Path):
    """A record is a few numbers, and directions are addressed by names: each engine makes the same bits of them."""
    ours = run_onnx(deep_bench, graphs, tmp_path / "onnx", train="lowrank")
    theirs = finetune(
        make_config(deep_bench.settings(train="lowrank", out=str(tmp_path / "torch")))
    )
    base = str(deep_bench.model)
    assert not uses_graphs(tmp_path / "onnx", base) and uses_graphs(tmp_path / "onnx", None)
    assert uses_graphs(tmp_path / "torch", str(graphs))
    by_torch = replay(tmp_path / "onnx", tmp_path / "by-torch", base=base)
    by_onnx = replay_on_onnx(tmp_path / "torch", tmp_path / "by-onnx", str(graphs))
    assert by_torch["trained_sha256"] == ours["trained_sha256"]
    assert by_onnx["trained_sha256"] == theirs["trained_sha256"]
    own = replay_on_onnx(tmp_path / "onnx", tmp_path / "by-itself")
    assert own["trained_sha256"] == ours["trained_sha256"]
    made = export(tmp_path / "onnx", "peft", tmp_path / "adapter")
    assert made["steps"] == 3 and made["base"] == base


@pytest.mark.parametrize(
    "train, kind", [("lowrank+probe", "label"), ("lowrank+head", "completion")]
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    deep_bench: Bench,
    graphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: str,
    kind: str,
):
    """A child is killed by itself (SIGKILL) between the record of a step and its update."""
    changes: dict[str, Any] = {"train": train, "kind": kind, "steps": 6, "snapshot_every": 2}
    whole = run_onnx(deep_bench, graphs, tmp_path / "whole", **changes)
    cfg = make_config(settings(deep_bench, graphs, tmp_path / "killed", **changes))
    child = os.fork()
    if not child:
        append = onnx_step.recipe_of

        def strike(cfg: Any, record: Any) -> Any:
            if record.step == 3:
                os.kill(os.getpid(), 9)
            return append(cfg, record)

        monkeypatch.setattr(onnx_step, "recipe_of", strike)
        try:
            finetune_onnx(cfg)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    resumed = finetune_onnx(cfg, resume=True)
    assert resumed["trained_sha256"] == whole["trained_sha256"]
    assert resumed["loss_last"] == whole["loss_last"]
    journals = [(tmp_path / name / "journal.bin").read_bytes() for name in ("whole", "killed")]
    assert journals[0] == journals[1]


def test_the_last_blocks_alone_are_trained(deep_bench: Bench, graphs: Path, tmp_path: Path):
    changes: dict[str, Any] = {"train": "lowrank", "blocks": 2}
    ours = run_onnx(deep_bench, graphs, tmp_path / "onnx", states="exact", **changes)
    theirs = finetune(
        make_config(deep_bench.settings(states="exact", out=str(tmp_path / "torch"), **changes))
    )
    assert ours["loss_last"] == pytest.approx(theirs["loss_last"], abs=1e-4)
    rounded = run_onnx(deep_bench, graphs, tmp_path / "bf16", states="bf16", **changes)
    assert rounded["loss_last"] == pytest.approx(ours["loss_last"], abs=5e-3)


def test_what_the_engine_has_no_place_for_is_refused_by_name(deep_bench: Bench, graphs: Path):
    for changes, message in (
        ({"estimator": "lora", "train": None}, "no backward pass"),
        ({"train": "full"}, "no input for full"),
        ({"directions": "gaussian"}, "--directions signs only"),
        ({"mask": "sparse"}, "no --mask sparse"),
        ({"credit": "candidates"}, "compares the two sides"),
        ({"objective": "exact-match", "train": "lowrank"}, "writes no answers"),
        ({"residency": "disk"}, "no --residency disk"),
        ({"precision": "bf16"}, "no --precision bf16"),
        ({"step": "auto"}, "measures no step size"),
    ):
        with pytest.raises(UsageError, match=message):
            make_config(settings(deep_bench, graphs, Path("out"), **changes))
    with pytest.raises(UsageError, match="only --engine onnx has execution providers"):
        make_config(deep_bench.settings(provider="coreml"))


def test_other_graphs_rows_and_models_are_refused_and_nothing_is_written(
    deep_bench: Bench, bench: Bench, graphs: Path, tmp_path: Path
):
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"--precision int8: the graphs .* are fp32"):
        run_onnx(deep_bench, graphs, out, precision="int8")
    with pytest.raises(EdgezoError, match="no trainable export"):
        run_onnx(deep_bench, deep_bench.model, out)
    assert not out.exists()
    run_onnx(deep_bench, graphs, out, train="lowrank", steps=1)
    other = tmp_path / "other"
    export_trainable(str(bench.model), other, "fp32")
    cfg = make_config(settings(bench, other, out, train="lowrank", steps=1))
    with pytest.raises(BaseMismatch):
        finetune_onnx(cfg, resume=True)
    with pytest.raises(BaseMismatch):
        replay_on_onnx(out, tmp_path / "replayed", str(other))


def test_a_cap_that_is_too_small_names_the_least_that_works(
    deep_bench: Bench, graphs: Path, edgezo: Command, tmp_path: Path
):
    given = settings(deep_bench, graphs, tmp_path / "run", max_mem_bytes="20MB")
    del given["precision"]
    options = [part for name, value in given.items() for part in (flag(name), value)]
    code, _, err = edgezo("finetune", *options)
    assert code == 3 and "needs at least" in err and "--dtype int4" in err
    assert not (tmp_path / "run").exists()


def test_an_evaluation_gives_what_the_run_ended_with(
    deep_bench: Bench, graphs: Path, tmp_path: Path
):
    summary = run_onnx(deep_bench, graphs, tmp_path / "run")
    cfg = make_config(settings(deep_bench, graphs, tmp_path / "run"))
    evaluated = evaluate_onnx(str(tmp_path / "run"), cfg)
    assert evaluated["steps"] == 3
    assert evaluated["loss"] == pytest.approx(summary["eval_after"]["loss"], abs=1e-6)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert sum("step_size" in json.loads(line) for line in lines) == 3
    assert np.isfinite(summary["forward_s"])
