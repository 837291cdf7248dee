"""The command line: exit codes, one JSON object on standard output, a light help and plan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgezo.cli import main as cli
from edgezo.cli import terminal
from edgezo.errors import BaseMismatch, BudgetExceeded, EdgezoError, Interrupted
from edgezo.plan.request import make_config
from edgezo.run import directory, display, metrics_log

SMOL = "smollm2-135m-instruct"
SUMMARY = {
    "run": "runs/mine",
    "model": SMOL,
    "steps": 3,
    "loss_first": 1.5,
    "loss_last": float("nan"),
    "eval_before": {"metric": "accuracy", "value": 0.25, "n": 8},
    "eval_after": {"metric": "accuracy", "value": 0.75, "n": 8},
    "step_s": 0.3,
    "forward_s": 0.25,
    "base_rss_bytes": 371_000_000,
    "load_peak_rss_bytes": 640_000_000,
    "peak_rss_bytes": 700_000_000,
    "inference_peak_rss_bytes": 650_000_000,
    "planned_peak_bytes": 720_000_000,
    "max_mem_bytes": 900_000_000,
}


class Finetune:
    """Stands for edgezo.run.train.finetune: remembers its request, or fails as told."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.cfg = self.resume = self.parent = None

    def __call__(self, cfg, *, resume, progress, began_s, parent):
        assert began_s > 0
        self.cfg, self.resume = cfg, resume
        self.parent = parent
        if self.error is not None:
            raise self.error
        return SUMMARY


@pytest.fixture
def finetune(monkeypatch):
    stand_in = Finetune()
    monkeypatch.setitem(sys.modules, "edgezo.run.train", SimpleNamespace(finetune=stand_in))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    return stand_in


def run(*args: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(*args: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code, out, _ = run(*args, "--json", capsys=capsys)
    assert out.endswith("}\n") and out.count("\n") == 1
    return code, json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_help_version_and_plan_of_a_card_never_import_torch(tmp_path):
    for args in (["--help"], ["finetune", "--help"], ["--version"], ["models"], ["plan"]):
        if args == ["plan"]:
            args += ["--model", SMOL, "--max-mem", "2GB", "--json"]
        code = (
            "import sys; from edgezo.cli import main as cli; code = cli.run(sys.argv[1:]);"
            "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_module_runs_as_a_program_and_its_exit_code_is_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "edgezo", "plan", "--model", SMOL, "--max-mem", "1MB", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and done.stderr == ""
    assert json.loads(done.stdout)["exit_code"] == 3


def test_plan_prints_every_item_or_one_json_object(capsys):
    code, found = run_json("plan", "--model", SMOL, "--max-mem", "2GB", capsys=capsys)
    assert code == 0 and found["max_mem_bytes"] == 2_000_000_000
    code, out, _ = run("plan", "--model", SMOL, "--max-mem", "2GB", capsys=capsys)
    assert code == 0
    for item in found["items"]:
        assert item["name"] in out
    assert "trained" in out and "frozen" in out


def test_what_does_not_fit_exits_3_with_the_smallest_budget(capsys):
    code, found = run_json("plan", "--model", SMOL, "--max-mem", "300MB", capsys=capsys)
    assert code == found["exit_code"] == 3
    smallest = str(found["smallest_bytes"])
    assert run("plan", "--model", SMOL, "--max-mem", smallest, capsys=capsys)[0] == 0
    code, out, err = run("plan", "--model", SMOL, "--max-mem", "300MB", capsys=capsys)
    assert code == 3 and out == "" and "--max-mem" in err


def test_usage_problems_exit_2_and_come_together(capsys):
    args = ("finetune", "--model", SMOL, "--steps", "many", "--sigma", "-1", "--precision", "int3")
    code, found = run_json(*args, capsys=capsys)
    assert code == found["exit_code"] == 2
    assert len(found["problems"]) == 4  # the data is missing as well
    code, out, err = run(*args, capsys=capsys)
    assert code == 2 and out == "" and all(p in err for p in found["problems"])


@pytest.mark.parametrize("args", [["fintune"], ["plan", "--nonsense", "1"], ["replay", "run"]])
def test_what_click_refuses_exits_2_also_as_json(args, capsys):
    assert run_json(*args, capsys=capsys)[1]["exit_code"] == 2
    code, out, err = run(*args, capsys=capsys)
    assert code == 2 and out == "" and "Usage:" in err


def test_an_unknown_model_exits_1_and_names_what_there_is(capsys):
    code, found = run_json("plan", "--model", "smollm2-135", capsys=capsys)
    assert code == 1 and SMOL in found["error"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EdgezoError("bad file"), 1),
        (BudgetExceeded("too much"), 4),
        (BaseMismatch("other base"), 5),
        (Interrupted("saved"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "out.bin"), 1),
        (MemoryError(), 1),
    ],
)
def test_each_error_has_its_exit_code_and_no_traceback(error, code, finetune, capsys, tmp_path):
    finetune.error = error
    args = ("finetune", "--model", SMOL, "--task", "sst2", "--out", tmp_path / "run")
    found_code, out, err = run(*args, capsys=capsys)
    assert found_code == code and out == ""
    assert err.lstrip().startswith("edgezo: ") and "Traceback" not in err
    found_code, found = run_json(*args, capsys=capsys)
    assert found_code == found["exit_code"] == code and found["error"]


def test_a_bug_shows_its_place_and_still_one_json_object(finetune, capsys):
    finetune.error = ZeroDivisionError("oops")
    code, out, err = run("finetune", "--model", SMOL, "--task", "x", "--json", capsys=capsys)
    assert code == 1 and json.loads(out)["error"] == "ZeroDivisionError: oops"
    assert "Traceback" in err


def test_finetune_ends_with_a_verdict_or_its_summary(finetune, capsys, tmp_path):
    args = ("finetune", "--model", SMOL, "--task", "sst2", "--out", tmp_path / "run")
    code, out, _ = run(*args, capsys=capsys)
    assert code == 0
    for part in (
        "0.2500 -> 0.7500",
        "1.20 x a plain forward",
        "planned 720.0 MB, measured 700.0 MB, 1.08 x inference 650.0 MB, cap 900.0 MB kept",
    ):
        assert part in out
    code, found = run_json(*args, capsys=capsys)
    assert code == 0 and found["loss_last"] is None and found["steps"] == 3


def test_settings_come_from_options_then_file_then_card(finetune, capsys, tmp_path, monkeypatch):
    settings = {"sigma": 0.004, "rank": 2, "seed": 1}
    card = SimpleNamespace(settings=settings)
    monkeypatch.setattr("edgezo.network.cards.find_card", lambda name: card)
    file = tmp_path / "settings.toml"
    file.write_text(f'model = "{SMOL}"\ntask = "sst2"\nrank = 4\nseed = 2\nmax-mem = "1GB"\n')
    args = ("finetune", "--config", file, "--seed", "3", "--out", tmp_path / "run")
    assert run(*args, capsys=capsys)[0] == 0
    cfg = finetune.cfg
    assert (cfg.sigma, cfg.rank, cfg.seed, cfg.max_mem_bytes) == (0.004, 4, 3, 10**9)
    # The card's probe was found for GRZO.
    assert run(*args, "--estimator", "mezo", capsys=capsys)[0] == 0
    assert finetune.cfg.sigma != 0.004


def test_a_run_directory_is_chosen_where_none_is_given(finetune, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / f"{SMOL}-sst2").mkdir(parents=True)
    code, out, _ = run("finetune", "--model", SMOL, "--task", "sst2", capsys=capsys)
    assert code == 0 and out.endswith("run runs/mine\n")  # the run has chosen, and says where it is
    assert finetune.cfg.out is None
    assert directory.free_directory(SMOL, finetune.cfg.task) == Path("runs") / f"{SMOL}-sst2-2"


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run directory in which some steps were made."""
    cfg = make_config({"model": SMOL, "task": "sst2", "steps": 9, "max_mem_bytes": 10**9})
    (tmp_path / "config.toml").write_text(cfg.to_toml())
    (tmp_path / "journal.bin").write_bytes(b"")
    return tmp_path


def test_resume_takes_the_whole_request_from_the_run(begun, finetune, capsys):
    assert run("finetune", "--resume", "--out", begun, capsys=capsys)[0] == 0
    assert finetune.resume is True
    assert (finetune.cfg.steps, finetune.cfg.out) == (9, str(begun))
    args = ("finetune", "--resume", "--out", begun, "--max-mem", "2GB", "--task", "sst2")
    assert run(*args, capsys=capsys)[0] == 0
    assert finetune.cfg.max_mem_bytes == 2 * 10**9


def test_resume_refuses_what_would_change_the_numbers(begun, finetune, capsys):
    args = ("finetune", "--resume", "--out", begun, "--steps", "12", "--seed", "4")
    code, found = run_json(*args, capsys=capsys)
    assert code == 2 and len(found["problems"]) == 2
    assert finetune.cfg is None


def test_a_begun_run_is_never_overwritten(begun, finetune, capsys):
    code, _, err = run("finetune", "--model", "m", "--task", "x", "--out", begun, capsys=capsys)
    assert code == 2 and "--resume" in err
    assert finetune.cfg is None


def test_resume_of_a_run_that_made_no_step_starts_it(begun, finetune, tmp_path, capsys):
    (begun / "journal.bin").unlink()
    assert run("finetune", "--resume", "--out", begun, capsys=capsys)[0] == 0
    assert finetune.resume is False and finetune.cfg.steps == 9
    none = tmp_path / "none"
    assert run("finetune", "--resume", "--out", none, capsys=capsys)[0] == 2
    args = ("finetune", "--resume", "--out", none, "--model", SMOL, "--task", "sst2")
    assert run(*args, capsys=capsys)[0] == 0
    assert finetune.resume is False
    assert run("finetune", "--resume", capsys=capsys)[0] == 2


def test_eval_of_a_run_uses_its_request_and_other_data_if_given(begun, monkeypatch, capsys):
    seen = []

    def evaluate(target, cfg, note):
        seen.append((target, cfg))
        note("no validation file")
        return {"metric": "accuracy", "value": 0.5, "n": 4}

    monkeypatch.setitem(sys.modules, "edgezo.run.evaluate", SimpleNamespace(evaluate=evaluate))
    code, out, err = run("eval", "--model", begun, capsys=capsys)
    assert code == 0 and out == "accuracy 0.5000 on 4 validation rows\n"
    assert err == "no validation file\n"
    assert seen[0][0] == str(begun) and seen[0][1].task == "sst2" and seen[0][1].model == SMOL
    assert run("eval", "--model", begun, "--data", "d.jsonl", capsys=capsys)[0] == 0
    assert (seen[1][1].data, seen[1][1].task) == ("d.jsonl", None)
    assert run("eval", "--model", SMOL, "--task", "rte", capsys=capsys)[0] == 0
    assert seen[2] == (SMOL, seen[2][1]) and seen[2][1].task == "rte"


def test_models_lists_every_card(capsys):
    code, found = run_json("models", capsys=capsys)
    assert code == 0 and SMOL in [row["name"] for row in found["models"]]
    assert SMOL in run("models", capsys=capsys)[1]


def test_threads_are_set_before_torch_is_imported(finetune, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    args = ("finetune", "--model", SMOL, "--task", "sst2", "--out", tmp_path / "run")
    run(*args, capsys=capsys)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    run(*args, "--threads", "1", capsys=capsys)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_metrics_go_on_where_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics_log.MetricsLog(path)
    for step in range(1, 6):
        log.write({"step": step, "loss": float("nan") if step == 2 else 1.0})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    log = metrics_log.MetricsLog(path, keep_through=3)
    log.write({"step": 4})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["loss"] is None


def test_metrics_that_cannot_be_written_are_an_error_with_the_place(tmp_path):
    with pytest.raises(EdgezoError, match=r"metrics\.jsonl"):
        metrics_log.MetricsLog(tmp_path / "absent" / "metrics.jsonl")


def test_a_line_that_finds_the_disk_full_leaves_the_lines_before_it(tmp_path, monkeypatch):
    path, write = tmp_path / "metrics.jsonl", os.write
    log = metrics_log.MetricsLog(path)
    log.write({"step": 1})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
        with pytest.raises(EdgezoError, match=r"metrics\.jsonl.*bytes are free.*--resume"):
            log.write({"step": 2})
    assert path.read_bytes() == before
    log.write({"step": 2})
    log.close()
    assert [line["step"] for line in metrics_log.MetricsLog(path, keep_through=2).lines()] == [1, 2]


def test_progress_without_a_terminal_is_a_bounded_number_of_lines(capsys):
    progress = terminal.TerminalProgress()
    progress.begin(done=0, steps=1000, cap_bytes=10**9)
    for step in range(1, 1001):
        progress.step(step, fraction=step / 1000, loss=0.5, step_s=0.1, rss_bytes=5 * 10**8)
    progress.close()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 10 <= len(lines) <= display.PLAIN_LINES + 2
    assert "step 1000/1000" in lines[-1] and "500.0 MB/1.00 GB" in lines[-1]
