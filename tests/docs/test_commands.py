"""Every command and every Python snippet of README and docs runs: with a tiny model, tiny data and few steps in place
of those named. An option that no rule is written for fails, so that no command goes stale unseen.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import GOOD, LABELLED, make_model, write_rows
from pages import ROOT, Snippet, commands, fences

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL, DATA = "my-model", "rows.jsonl"  # of the workspace, under names that the pages use
# Options of which the page's value is run as it stands.
KEPT = frozenset(
    "--template --labels --label-field --objective --max-new-tokens --train --estimator --precision --rounding "
    "--step --sigma --format --dtype --out --resume --show-batch --profile --finetuner --methods --seed --to "
    "--temperature --top-p --system --when --yes --ask --skip-bad-rows --probe-reads "
    "--engine --trainable".split()
)
# Others, and what is run in place of their value; None leaves the option out.
REPLACED: dict[str, str | None] = {
    "--steps": "2",
    "--calibrate": None,  # it takes a GPU
    "--more-steps": "2",
    "--for": "1s",
    "--max-mem": "8GB",
    "--threads": "1",
    "--parallel": "1",
    "--eval-limit": "8",
    "--blocks": "1",
    "--batch-sizes": "2",
    "--tokens": "16",
    "--limit": "120",
    "--device": "cpu",
    "--data-root": None,
    "--max-cpu": "100",
    "--batch-size": "4",
    "--max-length": "48",
}
# What makes a command small where the page does not say it.
ADDED: dict[str, dict[str, str]] = {
    "plan": {"--batch-size": "4"},
    "finetune": {"--batch-size": "4", "--eval-limit": "8", "--precision": "fp32", "--steps": "2"},
    "eval": {"--eval-limit": "8"},
    "chat": {"--max-new-tokens": "4"},
    "meta-train": {"--batch-size": "2", "--steps": "2", "--restart": "1"},
    "bench memory": {"--methods": "inference"},
    "bench speed": {
        **{"--estimators": "grzo", "--precisions": "fp32", "--repeats": "1"},
        "--no-baselines": "",
    },
    "bench alignment": {"--estimators": "grzo", "--tries": "1", "--batch-sizes": "2"},
}
# Commands whose first argument may be a card; the first two read standard input: a line is written there.
ANSWERING = ("predict", "chat", "serve")
SERVING = "http://127.0.0.1:8000"  # where a snippet asks edgezo serve
PARTS = ("bench",)  # commands that have commands
# Of a Python snippet.
IN_PYTHON = {
    '"smollm2-135m-instruct"': f'"{MODEL}"',
    '"task": "example"': f'"data": "{DATA}", "template": "{{text}} It was", "labels": "0=bad,1=good", "batch_size": 4',
    'task="example"': f'data="{DATA}", template="{{text}} It was", labels="0=bad,1=good"',
    '"900MB"': '"8GB"',
    '"1500MB"': '"8GB"',
    '"steps": 60': '"steps": 2',
    "steps=60": "steps=2, batch_size=4",
}
STUDY = """
model = "my-model"
seeds = [0]
forwards = 8
[tasks.mine]
data = "rows.jsonl"
template = "{text} It was"
labels = "0=bad,1=good"
[common]
batch-size = 4
eval-limit = 8
device = "cpu"
max-mem = "8GB"
[methods.default]
train = "lowrank"
"""

ran: set[tuple[str, ...]] = set()  # what has passed: many pages have the same commands


def rows(n: int) -> list[dict[str, Any]]:
    """Rows that are labelled ones with a template, and prompts with a completion without."""
    words = [*GOOD, "dull", "cold", "grim", "tired"]
    texts = [f"film {i} is {words[i % 8]}" for i in range(n)]
    return [
        {
            "text": text,
            "label": int(i % 8 < 4),
            "prompt": f"{text}. So:",
            "completion": words[i % 8],
        }
        for i, text in enumerate(texts)
    ]


def run(*arguments: object) -> int:
    """An edgezo command in this process."""
    from edgezo.cli.main import run as edgezo

    before = signal.getsignal(signal.SIGTERM)
    try:
        return edgezo([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def made(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages name: a model, rows, a finished run with its export, finetuners, a function to score by."""
    import torch
    from torch import nn

    folder = tmp_path_factory.mktemp("workspace")
    make_model(folder / MODEL)
    write_rows(folder / DATA, rows(160))
    (folder / "DIR").mkdir()
    (folder / "my-notes").mkdir()
    for i in range(4):
        (folder / f"my-notes/{i}.md").write_text(f"# Note {i}\n\nThe lights are on.\n")
    write_rows(folder / "DIR/train.jsonl", rows(80))
    (folder / "study.toml").write_text(STUDY)
    networks = {
        name: nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
        for name in ("model.embed_tokens.weight", "model.norm.weight")
    }
    torch.save(networks, folder / "llama1B_finetuner.pth")
    for snippet in fences("python"):
        first, _, rest = snippet.text.partition("\n")
        if first.startswith("# ") and first.endswith(".py"):
            (folder / first[2:]).write_text(rest)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        label = ("--model", MODEL, "--data", DATA, *[f"--{k}={v}" for k, v in LABELLED.items()])
        small = ("--precision", "fp32", "--batch-size", 4, "--max-mem", "8GB", "--threads", 1)
        steps = ("--steps", 2, "--eval-limit", 8, "--profile", "--out", "runs/mine")
        assert run("finetune", *label, *small, *steps) == 0
        assert run("export", "runs/mine", "--out", "model") == 0
        shipped = ("--format", "journal", "--out", "mine.edgezo")
        assert run("export", "runs/mine", *shipped) == 0
        one = ("--train", "probe", "--probe-reads", "one", "--eval-limit", 8, "--out", "runs/one")
        assert run("finetune", *label, *small, "--steps", 2, *one) == 0
        writer = ("--model", MODEL, "--data", DATA, "--train", "lowrank", "--out", "runs/writer")
        assert run("finetune", *writer, *small, "--steps", 2, "--eval-limit", 8) == 0
        graphs = ("--format", "onnx", "--trainable", "--dtype", "fp32", "--out", "graphs")
        assert run("export", MODEL, *graphs) == 0
        on_graphs = ("--engine", "onnx", "--model", "graphs", *label[2:], "--train", "lowrank")
        board = ("--steps", 2, "--eval-limit", 8, "--out", "runs/board")
        assert run("finetune", *on_graphs, *small, *board) == 0
        meta = ("--steps", 1, "--restart", 1, "--batch-size", 2, "--out", "my.safetensors")
        assert run("meta-train", *label, *meta, "--max-mem", "8GB") == 0
        run_script(["benchmarks/preferences.py", "--out", "prefs.jsonl"])
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def workspace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh copy of it, as the current directory. Variables that a command sets end with its test."""
    folder = tmp_path / "workspace"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    before, paths = dict(os.environ), list(sys.path)
    yield folder
    os.environ.clear()
    os.environ.update(before)
    sys.path[:] = paths
    for name in ("scores", "random_models", "gpu_all", "memory_of_a_run"):
        sys.modules.pop(name, None)


# ------------------------------------------------------------------------------------ edgezo


def command_of(words: Sequence[str]) -> tuple[str, click.Command, list[str]]:
    """(name, click's command, its arguments) of the words after ``edgezo``."""
    from edgezo.cli.main import cli

    group: Any = cli
    names = list(words[: 2 if words[0] in PARTS else 1])
    for name in names:
        assert name in group.commands, f"there is no command {name!r}"
        group = group.commands[name]
    return " ".join(names), group, list(words[len(names) :])


def parsed(
    command: click.Command, words: Sequence[str]
) -> tuple[list[str], list[tuple[str, str | None]]]:
    """(arguments, options with their values; None of a flag)."""
    options = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
    arguments, given, at = [], [], 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--"):
            arguments.append(word)
            continue
        assert word in options, f"there is no option {word}"
        alone = at == len(words) or words[at].startswith(
            "--"
        )  # an option whose value may be left out
        if getattr(options[word], "is_flag", False) or (
            alone and getattr(options[word], "flag_value", None) is not None
        ):
            given.append((word, None))
        else:
            given.append((word, words[at]))
            at += 1
    return arguments, given


def substituted(name: str, given: Sequence[tuple[str, str | None]]) -> list[str]:
    """The options of a command on tiny things."""
    from edgezo.data.tasks import TASKS

    words: list[str] = []
    files: list[str] = []
    for option, value in given:
        if option == "--task":
            assert value in TASKS, f"there is no task {value!r}"
            files.append(DATA if value == "example" or not files else "DIR")
        elif option == "--data":
            words += [option, str(value)]
        elif option in ("--model", "--compare", "--base", "--other-base"):
            words += [option] if value is None else [option, model_of(value)]
        elif option in KEPT:
            words += [option] if value is None else [option, value]
        else:
            assert option in REPLACED, f"no rule says how to run {option} here"
            if (instead := REPLACED[option]) is not None:
                words += [option, instead]
    if files:
        words += [word for file in files for word in ("--data", file)]
        for option, value in LABELLED.items():
            words += [] if f"--{option}" in words else [f"--{option}", value]
    if "--resume" not in words:
        for option, value in ADDED.get(name, {}).items():
            timed = option == "--steps" and {"--for", "--more-steps"} & set(words)
            if not (option in words or timed):
                words += [option, value] if value else [option]
    return words


def model_of(name: str) -> str:
    """A path of the workspace as it is; the tiny model in place of a card."""
    from edgezo.network.cards import find_card

    if Path(name).exists():
        return name
    assert find_card(name) is not None, f"{name!r} is no card and no path of the workspace"
    return MODEL


def check_edgezo(words: Sequence[str], edgezo: Any) -> None:
    name, command, rest = command_of(words)
    arguments, given = parsed(command, rest)
    if name == "bench accuracy":
        check_study(ROOT / arguments[0], dict(given).get("--methods"))
        arguments, given = ["study.toml"], [("--methods", "default")]
    if name in ANSWERING:
        arguments = [model_of(arguments[0]), *arguments[1:]]
    final = [*name.split(), *arguments, *substituted(name, given)]
    if tuple(final) in ran:
        return
    if name == "serve":  # tests/run/test_serving.py starts it; it would answer until Ctrl-C
        command.make_context(name, final[1:])
        return
    if "--resume" not in final and "--out" in final:
        shutil.rmtree(final[final.index("--out") + 1], ignore_errors=True)
        Path(final[final.index("--out") + 1]).unlink(missing_ok=True)
    code, out, error = edgezo(*final)
    assert code == 0, f"edgezo {shlex.join(final)}: exit code {code}\n{error}"
    assert out and "Traceback" not in error
    ran.add(tuple(final))


def check_study(file: Path, methods: str | None) -> None:
    """The study is one, and has these methods: each of its requests is read."""
    study = importlib.import_module("edgezo.bench.study")
    study.read_study(
        tomllib.loads(file.read_text(encoding="utf-8")),
        (methods or "").split(",") if methods else [],
    )


# ------------------------------------------------------------------------------------ others


class ParsedArguments(Exception):
    """A script has understood its arguments."""


def run_script(words: Sequence[str], *, parse_only: bool = False) -> None:
    """``python SCRIPT ...`` of the repository in this process."""
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise ParsedArguments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words[1:]])
        patch.syspath_prepend(str(script.parent))
        if not parse_only:
            runpy.run_path(str(script), run_name="__main__")
            return
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(ParsedArguments):
            runpy.run_path(str(script), run_name="__main__")


def check_python(words: Sequence[str]) -> None:
    """Scripts that take seconds are run; of others the arguments are read."""
    quick = words[0] in ("benchmarks/preferences.py", "docs/figures/memory_of_a_run.py")
    run_script(words, parse_only=not quick)


def check_torchrun(words: Sequence[str], edgezo: Any) -> None:
    """torchrun understands its options, and what it starts runs as one process (several: tests/run/test_ranks.py)."""
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(list(words))
    assert asked.module and asked.training_script == "edgezo"
    check_edgezo(asked.training_script_args, edgezo)


def check_script(words: Sequence[str]) -> None:
    """A script of scripts/ is there and can be run; what it hands on to pytest names tests and marks that there are."""
    script = ROOT / words[0].removeprefix("./")
    assert script.is_file() and os.access(script, os.X_OK), words[0]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    marks = [m.split(":")[0] for m in settings["tool"]["pytest"]["ini_options"]["markers"]]
    rest = list(words[1:])
    if rest[:1] == ["-m"]:
        assert script.name == "test" and rest[1] in marks, f"{rest[1]} is no mark of the tests"
        rest = rest[2:]
    assert not rest or script.name == "test", f"no rule for the arguments of {words[0]}"
    assert all((ROOT / path).exists() for path in rest), rest


@pytest.mark.parametrize("snippet", commands(), ids=lambda snippet: snippet.place)
def test_every_command_runs(
    snippet: Snippet, workspace: Path, edgezo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = shlex.split(snippet.text, comments=True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a warm film\n")))
    if program == "edgezo":
        check_edgezo(words, edgezo)
    elif program == "torchrun":
        check_torchrun(words, edgezo)
    elif program == "python":
        check_python(words)
    elif program.removeprefix("./").startswith("scripts/"):
        check_script([program, *words])
    else:
        assert [program, *words] == [".", ".venv/bin/activate"], f"no rule for {program}"


@pytest.mark.parametrize("snippet", fences("python"), ids=lambda snippet: snippet.place)
def test_every_python_snippet_runs(snippet: Snippet, workspace: Path) -> None:
    text = snippet.text
    for named, instead in IN_PYTHON.items():
        text = text.replace(named, instead)
    with ExitStack() as at_end:
        if SERVING in text:
            pytest.importorskip("openai", reason="pip install 'edgezo[dev]' brings its client")
            served = importlib.import_module("test_serving").served
            _, address = at_end.enter_context(served(Path("runs/writer")))
            text = text.replace(SERVING, address.removesuffix("/v1"))
        exec(compile(text, snippet.place, "exec"), {"__name__": "__main__"})


def test_a_command_that_has_gone_stale_fails(workspace: Path, edgezo: Any) -> None:
    for stale, why in (
        ("finetune --model smollm2-135m-instruct --task nothing", "no task"),
        ("finetune --model smollm3 --task example", "no card"),
        ("finetune --model smollm2-135m-instruct --task example --speed 3", "no option"),
        ("finetune --model smollm2-135m-instruct --task example --short-lr 3", "no rule"),
        ("finetune --model smollm2-135m-instruct --task example --estimator no", "exit code 2"),
        ("tune --model smollm2-135m-instruct", "no command"),
    ):
        with pytest.raises(AssertionError, match=why):
            check_edgezo(shlex.split(stale), edgezo)
    assert json.loads((workspace / "runs/mine/summary.json").read_text())["steps"] == 2
