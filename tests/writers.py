"""Every command that writes, every option that names a place, and the files of a user that none of them may change.

``test_every_option_has_its_place_here`` (tests/cli/test_users_files.py) fails for a command or an option that is in no
table below: a new one is put into the table that says what it does with files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from conftest import Bench
from torch import nn

from edgezo.cli.main import cli
from edgezo.plan.request import make_config
from edgezo.run.export import export
from edgezo.run.train import finetune

# What an option or argument of any command does with files.
WRITES = {"out", "directory"}
READS = {
    *("model", "data", "data_root", "finetuner", "config_file", "run", "source", "study_file"),
    *("files", "target", "compare", "shipped", "base", "other_base", "runs", "folder"),
}
FLAGS = {
    *("as_json", "resume", "dry_run", "show_batch", "shows_plan", "quiet", "profile", "baselines"),
    *("yes", "ask", "trainable"),
}
NO_FILES = {
    "texts",
    "help_all",
    "calibrate",  # the cache, and only where there is a GPU
    *(
        "task",
        "tasks",
        "template",
        "labels",
        "label_field",
        "max_length",
        "text_end",
        "held_out",
        "eval_limit",
        "skip_bad_rows",
        "speaker",
    ),
    *("seed", "objective", "max_new_tokens", "max_mem_bytes", "max_mem", "device", "engine"),
    *("provider", "precision"),
    *("precisions", "residency", "batch_size", "batch_sizes", "micro_batch", "estimator"),
    *("estimators", "directions", "mask", "credit", "rule", "train", "rounding", "rank", "keep"),
    *(
        "refresh",
        "candidates",
        "samples",
        "short_tokens",
        "steps",
        "more_steps",
        "log_to",
        "for_s",
        "step",
        "sigma",
        "schedule",
    ),
    *(
        "weight_decay",
        "weight_decay_to",
        "head_lr",
        "short_lr",
        "eval_every",
        "snapshot_every",
        "threads",
        "form",
    ),
    *("dtype", "sharing", "restart", "rate", "lr", "methods", "tokens", "limit", "tries"),
    *("blocks", "states", "state_rows", "when", "max_temp", "max_cpu", "shell"),
    *("repeats", "parallel", "temperature", "top_p", "chance", "system"),
    *("host", "port", "api_key", "probe_reads"),
}


def every_command(
    command: click.Command = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    """(its words, the command), groups opened."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from every_command(inner, (*path, name))
    else:
        yield " ".join(path), command


class Tools(NamedTuple):
    """What the commands need beside the place that they write to."""

    bench: Bench
    run: Path  # a finished run, for replay and export
    study: Path  # of bench accuracy
    published: Path  # a published finetuner
    adapted: Path = Path("adapted")  # a finished run that an adapter can hold
    shipped: Path = Path("shipped")  # a run as one small file

    @staticmethod
    def around(bench: Bench, run: Path) -> Tools:
        """A finished run, and the rest beside it."""
        adapted = run.parent / "adapted"
        finetune(make_config(bench.settings(out=str(adapted), steps=1, train="lowrank")))
        study, published = run.parent / "study.toml", run.parent / "published.pth"
        study.write_text(STUDY.format(model=bench.model))
        network = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
        torch.save({"model.norm.weight": network}, published)
        shipped = run.parent / "shipped.edgezo"
        export(run, "journal", shipped)
        return Tools(bench, run, study, published, adapted, shipped)


Arguments = Callable[[Tools, object], Sequence[object]]  # (tools, the place) -> arguments


class Writer(NamedTuple):
    """A command that writes to a place which the user names."""

    command: str
    arguments: Arguments
    goes_on: tuple[str, ...] = ()  # in directories of these kinds
    file: bool = False  # the place is a file, not a directory


def _run(tools: Tools, *more: object) -> list[object]:
    return [*tools.bench.arguments(steps=1), *more]


def data_of(tools: Tools) -> list[str]:
    """A model and its rows, without settings of a run."""
    left_out = ("steps", "micro_batch", "batch_size", "precision", "max_mem_bytes")
    return tools.bench.arguments(**dict.fromkeys(left_out))


def _asked(tools: Tools) -> list[object]:
    """The rows that predictions are made for."""
    return ["--data", tools.bench.data / "label.jsonl"]


WRITERS = {
    "finetune": Writer("finetune", lambda t, out: _run(t, "--out", out)),
    "finetune on disk": Writer(
        "finetune",
        lambda t, out: _run(t, "--out", out, "--train", "full", "--residency", "disk"),
    ),
    "finetune the head": Writer(
        "finetune", lambda t, out: _run(t, "--out", out, "--train", "lowrank+head")
    ),
    "finetune a probe": Writer(
        "finetune", lambda t, out: _run(t, "--out", out, "--train", "lowrank+probe")
    ),
    "finetune profiled": Writer("finetune", lambda t, out: _run(t, "--out", out, "--profile")),
    "resume": Writer(
        "finetune", lambda t, out: _run(t, "--resume", "--out", out), ("run", "replay")
    ),
    "resume alone": Writer(
        "finetune", lambda t, out: ["--resume", "--out", out], ("run", "replay")
    ),
    "resume profiled": Writer(
        "finetune", lambda t, out: _run(t, "--resume", "--profile", "--out", out), ("run", "replay")
    ),
    "replay": Writer("replay", lambda t, out: [t.run, "--out", out], ("replay",)),
    "export hf": Writer("export", lambda t, out: [t.run, "--out", out]),
    "export hf in bf16": Writer("export", lambda t, out: [t.run, "--dtype", "bf16", "--out", out]),
    "export a classifier": Writer(
        "export", lambda t, out: [t.adapted, "--format", "hf-classifier", "--out", out]
    ),
    "export peft": Writer("export", lambda t, out: [t.run, "--format", "peft", "--out", out]),
    "export gguf": Writer("export", lambda t, out: [t.run, "--format", "gguf", "--out", out]),
    "export gguf in 8 bits": Writer(
        "export", lambda t, out: [t.run, "--format", "gguf", "--dtype", "q8_0", "--out", out]
    ),
    "export an adapter": Writer(
        "export", lambda t, out: [t.adapted, "--format", "gguf-adapter", "--out", out]
    ),
    "export onnx": Writer("export", lambda t, out: [t.run, "--format", "onnx", "--out", out]),
    "export trainable graphs": Writer(
        "export",
        lambda t, out: [t.bench.model, "--format", "onnx", "--trainable", "--out", out],
    ),
    "export a journal": Writer(
        "export", lambda t, out: [t.run, "--format", "journal", "--out", out], file=True
    ),
    "apply": Writer(
        "apply", lambda t, out: [t.shipped, "--base", t.bench.model, "--out", out], ("replay",)
    ),
    "report": Writer("report", lambda t, out: [out], ("run", "replay")),
    "report with answers": Writer("report", lambda t, out: [out, "--ask"], ("run", "replay")),
    "rm": Writer("rm", lambda t, out: [out, "--yes"], ("run", "replay")),
    "predict": Writer("predict", lambda t, out: [t.run, *_asked(t), "--out", out], file=True),
    "predict as csv": Writer(
        "predict", lambda t, out: [t.run, *_asked(t), "--to", "csv", "--out", out], file=True
    ),
    "data": Writer("data", lambda t, out: [t.bench.data / "text.jsonl", "--out", out], file=True),
    "bench memory": Writer(
        "bench memory", lambda t, out: ["--model", t.bench.model, "--out", out], ("bench",)
    ),
    "bench speed": Writer(
        "bench speed",
        lambda t, out: [*data_of(t), "--no-baselines", "--out", out],
        ("bench",),
    ),
    "bench alignment": Writer(
        "bench alignment", lambda t, out: [*data_of(t), "--out", out], ("bench",)
    ),
    "bench accuracy": Writer("bench accuracy", lambda t, out: [t.study, "--out", out], ("bench",)),
    "meta-train": Writer(
        "meta-train",
        lambda t, out: [
            *("--model", t.bench.model, "--task", "example", "--steps", 1, "--out", out)
        ],
        file=True,
    ),
    "convert-finetuner": Writer("convert-finetuner", lambda t, out: [t.published, out], file=True),
}

# Commands with an option that names a place but writes none, whatever the place holds.
LOOKS = {
    "a plan": lambda t, out: ["finetune", *_run(t, "--out", out, "--dry-run", "--plan")],
    "the command plan": lambda t, out: ["plan", *_run(t, "--out", out)],
    "a batch": lambda t, out: ["finetune", *_run(t, "--out", out, "--show-batch", "--quiet")],
}

STUDY = """model = "{model}"
tasks = ["example"]
seeds = [0]
forwards = 64
[methods.grzo]
"""

# ---------------------------------------------------------------------------------------------
# Files of a user

# Names that edgezo writes itself, with what a user might have in such files.
USERS_FILES = {
    "config.toml": '[server]\nport = 8080\nmodel = "mine"\n',
    "plan.json": '{"plan": "holidays"}\n',
    "metrics.jsonl": '{"visitors": 12}\n',
    "summary.json": '{"steps": 3}\n',
    "skipped.jsonl": '{"a page": 3}\n',
    "profile.json": '{"name": "me"}\n',
    "report.html": "<p>mine</p>\n",
    "asked.json": "{}\n",
    "predictions.json": '{"weather": "fine"}\n',
    "states.safetensors": "not a tensor",
    "trained.safetensors": "not a tensor",
    "head.safetensors": "not a tensor",
    "probe.safetensors": "not a tensor",
    "probe.states": "states of matter",
    "replay.json": '{"match": 1}\n',
    "overlay/block-0000.overlay": "a transparency",
    "overlay/notes.txt": "read me",
    "given-rows/train.jsonl": "{}\n",
    "given-model/config.json": "{}\n",
    "journal-cut-3.bin": "old pages",
    "journal-again.bin": "old pages",
    "memory.json": "{}\n",
    "memory.png": "a picture",
    "points.jsonl": "{}\n",
    "speed.json": "{}\n",
    "accuracy.json": "{}\n",
    "alignment.json": "{}\n",
    "model.safetensors": "not a tensor",
    "adapter_model.safetensors": "not a tensor",
    "adapter_config.json": "{}\n",
    "config.json": "{}\n",
    "edgezo.json": "{}\n",
    "README.md": "# Mine\n",
    "Modelfile": "FROM mine\n",
    "model.gguf": "not a tensor",
    "model.onnx": "not a graph",
    "model.onnx.data": "not a tensor",
    "adapter.gguf": "not a tensor",
    "runs/mine.txt": "of a race",
    "README": "mine\n",
    ".hidden": "mine\n",
    ".git/HEAD": "ref: refs/heads/main\n",
    ".config.toml.abcd1234.edgezo-tmp": "a file of another program",
    "lock": "",
}
JOURNALS = {
    "none": None,
    "text": b"Dear diary,\n",
    "empty": b"",
    "magic alone": b"\x89EZJ\r\n\x1a\n",
}


def users_directory(folder: Path, journal: bytes | None = None) -> Path:
    """Fill ``folder`` with files, folders, links and a pipe; some have modes of their own."""
    for name, text in USERS_FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "empty").mkdir(mode=0o700)
    outside = folder.with_name(f"{folder.name}-outside.txt")
    outside.write_text("outside, and led to by a link\n")
    (folder / "link.txt").symlink_to(outside)
    (folder / "block-0001.overlay").symlink_to(outside)
    (folder / "nowhere").symlink_to(folder / "not there")
    (folder / "README").chmod(0o440)
    (folder / ".hidden").chmod(0o600)
    os.mkfifo(folder / "pipe")
    if journal is not None:
        (folder / "journal.bin").write_bytes(journal)
    return folder


def state(*places: Path) -> dict[str, tuple[Any, ...]]:
    """All that can be seen of files and folders but when they were last read: bytes, links, modes, owners, times."""
    seen: dict[str, tuple[Any, ...]] = {}
    for place in places:
        inner = sorted(place.rglob("*")) if place.is_dir() and not place.is_symlink() else []
        for path in (place, *inner):
            seen[str(path)] = _state_of(path)
    return seen


def _state_of(path: Path) -> tuple[Any, ...]:
    try:
        facts = path.lstat()
    except OSError as problem:
        return ("absent", problem.errno)
    content: Any = None
    if stat.S_ISLNK(facts.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(facts.st_mode):
        content = path.read_bytes()
    times = facts.st_mtime_ns, facts.st_ctime_ns
    return (
        facts.st_mode,
        facts.st_ino,
        facts.st_nlink,
        facts.st_uid,
        facts.st_gid,
        *times,
        content,
    )
