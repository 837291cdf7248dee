"""Does a run that is killed at random moments end with the same bits? Kills and resumes over many settings.

    python benchmarks/kills.py --out DIR [--kills 200] [--seed 0] [--only NAME]

For every setting one run goes to its end undisturbed. Others are killed with SIGKILL at random moments, resumed, killed
again, and so on until they end by themselves; each computes the states of frozen blocks anew. Every other kill is aimed
at the time after the last step, when a run evaluates and saves; the rest may come at any moment from the start of the
command to its end. A kill counts where the process is reported to have died of that signal. Each run that ends must
have the SHA-256 of the trained weights, the journal, the evaluations and the lines of metrics of the undisturbed one,
and no other file beside the records that a resume keeps. The model is a tiny random one of the tests, so that most of a
run is loading, writing and saving.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
STEPS = 24
# Estimators, stores, residencies, trained parts, exact head, linear probe, snapshots, automatic step, kept states.
SETTINGS = {
    "grzo, low-rank, fp32": "--train lowrank --precision fp32",
    "grzo, low-rank and head, int8": "--train lowrank+head --precision int8 --micro-batch 2 --snapshot-every 5",
    "grzo, full, bf16 with its plane": "--train full --precision bf16 --rounding plane",
    "grzo, full, bf16 on disk": "--train full --precision bf16 --residency disk",
    "grzo, full, int8 re-quantised": "--train full --precision int8 --rounding anchored",
    "grzo, low-rank and head, int4 on disk": "--train lowrank+head --precision int4 --residency disk "
    "--snapshot-every 5",
    "grzo, norms and scales, int4": "--train norms+scales --precision int4",
    "grzo, low-rank and linear probe, bf16": "--train lowrank+probe --precision bf16",
    "grzo, automatic step": "--train lowrank --precision fp32 --step auto",
    "mezo with Adam, low-rank, fp32": "--estimator mezo-adam --train lowrank --precision fp32",
    "hizoo, full, bf16 rounded at random": "--estimator hizoo --train full --precision bf16 --rounding stochastic",
    "agzo, evaluations between": "--estimator ag-grzo --precision fp32 --snapshot-every 4 --eval-every 6",
    "lora": "--estimator lora --precision int8 --snapshot-every 5",
    "addax": "--estimator addax --train lowrank+head --precision fp32 --snapshot-every 5 --short-tokens 24",
    "grzo, upper block from kept states": "--blocks 1 --train lowrank+head --precision bf16 "
    "--snapshot-every 5 --steps 400",
    "lora, upper block from kept states": "--blocks 1 --estimator lora --precision int8 "
    "--snapshot-every 5 --steps 400",
}

PHASES = ("before a run was there", "before the first step", "between steps", "after the last step")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("edgezo.run.train", "edgezo.cli.main", "transformers.models.llama.modeling_llama"),
        "optimum.quanto",
    ]
)


def make_inputs(folder: Path) -> list[str]:
    """A tiny model and its rows; options of finetune."""
    sys.path.append(str(TESTS))
    from conftest import LABELLED, _rows, make_model, write_rows

    write_rows(folder / "rows.jsonl", _rows("label"))
    make_model(folder / "model", num_hidden_layers=2)
    options = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    options += ["--template", LABELLED["template"], "--labels", LABELLED["labels"]]
    return [*options, "--batch-size", "4", "--max-mem", "8GB", "--threads", "1"]


def command_line(args: list[str], printed: str) -> None:
    """One command of the command line, in a process of its own."""
    out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    from edgezo.cli import main as cli

    torch.set_num_threads(1)
    code = cli.run(args)
    sys.stdout.flush()
    os._exit(code)


Moment = Callable[[float], bool]  # seconds since the start of a command -> whether to kill it now


def run(args: list[str], printed: Path, moment: Moment | None = None) -> tuple[int, float]:
    """(exit code, negative for a signal; seconds), killed at that moment if it is still there."""
    process = CONTEXT.Process(target=command_line, args=(args, str(printed)))
    begun_s = time.monotonic()
    process.start()
    while moment is not None and not wait([process.sentinel], timeout=0.001):
        if moment(time.monotonic() - begun_s):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.join()
    return process.exitcode, time.monotonic() - begun_s


def size_bytes(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be the same of a run, however often it was killed."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("trained_sha256", "steps", "eval_before", "eval_after", "loss_first", "loss_last")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # What a clock, the memory or the work of a resume decides; a pace says how long it was measured.
    apart = {"rss_bytes", "step_s", "forward_s", "took_s", "pace", "crc"}
    moved = ("_read_bytes", "_written_bytes")
    return {
        **{name: summary[name] for name in kept},
        "journal": (folder / "journal.bin").read_bytes(),
        "metrics": [
            {k: v for k, v in line.items() if k not in apart and not k.endswith(moved)}
            for line in lines
        ],
        "files": sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if not path.name.startswith("journal-cut-")
        ),
    }


@dataclass
class Setting:
    """One setting, its undisturbed run, and what was found of those that were killed."""

    options: list[str]
    folder: Path
    draw: random.Random
    whole_s: float = 0.0  # of the undisturbed run
    ending_s: float = 0.0  # of it after the last step
    journal_bytes: int = 0  # after the last step
    expected: dict[str, Any] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    def measure(self) -> None:
        """Run twice undisturbed: what the run gives, and how long it and its end take."""
        run(["models"], self.folder / "printed")  # the first process waits for the server's imports
        for name in ("whole", "timed"):
            journal, last_s = self.folder / name / "journal.bin", [0.0]

            def watch(now_s: float, journal: Path = journal, last_s: list[float] = last_s) -> bool:
                if not self.journal_bytes or size_bytes(journal) < self.journal_bytes:
                    last_s[0] = now_s
                return False

            request = ["finetune", *self.options, "--out", str(journal.parent)]
            code, self.whole_s = run(request, self.folder / "printed", watch)
            if code:
                sys.exit(f"undisturbed, it ended with {code}:\n{self.printed()}")
            self.journal_bytes, self.ending_s = size_bytes(journal), self.whole_s - last_s[0]
        self.expected = outcome(self.folder / "whole")

    def printed(self) -> str:
        return (self.folder / "printed").read_text()[-800:]

    def moment(self, journal: Path) -> Moment:
        """A random moment of a command that writes this journal."""
        if self.draw.random() < 0.5:
            after_s = self.draw.uniform(0.0, self.whole_s)
            return lambda now_s: now_s >= after_s
        after_s, begun_s = self.draw.uniform(0.0, self.ending_s), [-1.0]

        def at_the_end(now_s: float) -> bool:
            if begun_s[0] < 0 and size_bytes(journal) >= self.journal_bytes:
                begun_s[0] = now_s
            return begun_s[0] >= 0 and now_s - begun_s[0] >= after_s

        return at_the_end

    def phase(self, folder: Path) -> str:
        """Where a kill came, by the files that are there."""
        journal = folder / "journal.bin"
        if not (folder / "config.toml").exists():
            return PHASES[0]
        if size_bytes(journal) >= self.journal_bytes:
            return PHASES[3]
        return PHASES[2] if (folder / "metrics.jsonl").exists() else PHASES[1]

    def kill(self, kills: int) -> None:
        """Begin runs and kill them, until so many kills were delivered; the last run goes to its end."""
        while sum(self.delivered.values()) < kills:
            folder = self.folder / f"killed-{self.runs}"
            request = ["finetune", *self.options, "--out", str(folder)]
            shutil.rmtree(Path(os.environ["EDGEZO_CACHE"], "states"), ignore_errors=True)
            code = -signal.SIGKILL
            while code == -signal.SIGKILL:
                enough = sum(self.delivered.values()) >= kills
                moment = None if enough else self.moment(folder / "journal.bin")
                code, _ = run(request, self.folder / "printed", moment)
                if code == -signal.SIGKILL:
                    self.delivered[self.phase(folder)] += 1
                if (folder / "config.toml").exists():
                    request = ["finetune", "--resume", "--out", str(folder)]
            self.runs += 1
            self.compare(folder, code)

    def compare(self, folder: Path, code: int) -> None:
        if code:
            self.problems.append(f"{folder}: exit {code}: {self.printed()}")
            return
        found = outcome(folder)
        other = [name for name in self.expected if found[name] != self.expected[name]]
        if other:
            self.problems.append(f"{folder}: other {', '.join(other)}")
        else:
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="One setting, by its name; --kills are then its own.")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    os.environ["EDGEZO_CACHE"] = str(args.out / "cache")
    shared = make_inputs(args.out)
    chosen = [args.only] if args.only else list(SETTINGS)
    kills = runs = bad = 0
    for number, name in enumerate(chosen):
        share = args.kills * (number + 1) // len(chosen) - args.kills * number // len(chosen)
        folder = args.out / str(number)
        folder.mkdir()
        options = [*shared, "--steps", str(STEPS), *SETTINGS[name].split()]
        setting = Setting(options, folder, random.Random(f"{args.seed} {name}"))
        setting.measure()
        setting.kill(share)
        row = {"setting": name, "kills": setting.delivered, "runs": setting.runs}
        print(json.dumps({**row, "problems": setting.problems}), flush=True)
        kills += sum(setting.delivered.values())
        runs, bad = runs + setting.runs, bad + len(setting.problems)
    print(f"{kills} kills delivered over {len(chosen)} settings: {runs - bad} of {runs} runs equal")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
