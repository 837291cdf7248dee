"""Does a run that is killed at random moments end with the same bits? Kills and resumes over many settings.

    python benchmarks/kills.py --out DIR [--kills 200] [--seed 0] [--only NAME]

For every setting one run goes to its end undisturbed. Others are killed with SIGKILL after a random part of that time,
resumed, killed again, and so on until they end by themselves. A kill counts where the process is reported to have died
of that signal. Each run that ends must have the SHA-256 of the trained weights, the journal, the evaluations and the
lines of metrics of the undisturbed one, and no other file beside the records that a resume keeps. The model is a tiny random one of the
tests, so that most of a run is loading, writing and saving.
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
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
STEPS = 24
# Estimators, stores, residencies, trained parts, exact head, linear probe, snapshots, automatic step.
SETTINGS = {
    "grzo, low-rank, fp32": "--train lowrank --precision fp32",
    "grzo, low-rank and head, int8": "--train lowrank+head --precision int8 --micro-batch 2 --snapshot-every 5",
    "grzo, full, bf16 with its plane": "--train full --precision bf16 --rounding plane",
    "grzo, full, bf16 on disk": "--train full --precision bf16 --residency disk",
    "grzo, full, int8 re-quantised": "--train full --precision int8 --rounding anchored",
    "grzo, low-rank and head, int4 on disk": "--train lowrank+head --precision int4 --residency disk --snapshot-every 5",
    "grzo, norms and scales, int4": "--train norms+scales --precision int4",
    "grzo, low-rank and linear probe, bf16": "--train lowrank+probe --precision bf16",
    "grzo, automatic step": "--train lowrank --precision fp32 --step auto",
    "mezo with Adam, low-rank, fp32": "--estimator mezo-adam --train lowrank --precision fp32",
    "hizoo, full, bf16 rounded at random": "--estimator hizoo --train full --precision bf16 --rounding stochastic",
    "agzo, evaluations between": "--estimator ag-grzo --precision fp32 --snapshot-every 4 --eval-every 6",
    "lora": "--estimator lora --precision int8 --snapshot-every 5",
    "addax": "--estimator addax --precision fp32 --snapshot-every 5 --short-tokens 24",
}
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["edgezo.run.train", "edgezo.cli.main", "transformers.models.llama.modeling_llama"]
    + ["optimum.quanto"]
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


def _command(args: list[str], printed: str) -> None:
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


def run(args: list[str], printed: Path, kill_after_s: float | None) -> tuple[int, float]:
    """(exit code, negative for a signal; seconds), killed after that time if it is still there."""
    process = _CONTEXT.Process(target=_command, args=(args, str(printed)))
    begun_s = time.monotonic()
    process.start()
    process.join(kill_after_s)
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode is not None
    return process.exitcode, time.monotonic() - begun_s


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be the same of a run, however often it was killed."""
    summary = json.loads((folder / "summary.json").read_text())
    kept = ("trained_sha256", "steps", "eval_before", "eval_after", "loss_first", "loss_last")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # A pace says when it was found and how long that took, by the clock.
    clock = {"rss_bytes", "step_s", "forward_s", "pace", "crc"}
    moved = ("_read_bytes", "_written_bytes")
    return {
        **{name: summary[name] for name in kept},
        "journal": (folder / "journal.bin").read_bytes(),
        "metrics": [
            {k: v for k, v in line.items() if k not in clock and not k.endswith(moved)}
            for line in lines
        ],
        "files": sorted(
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if not p.name.startswith("journal-cut-")
        ),
    }


def killed_runs(options: list[str], kills: int, folder: Path, draw: random.Random) -> dict[str, Any]:
    """Kill runs of one setting so often, and compare those that end; a line for the table."""
    whole, printed = folder / "whole", folder / "printed"
    run(["models"], printed, None)  # the first process waits for the imports of the server
    code, whole_s = run(["finetune", *options, "--out", str(whole)], printed, None)
    if code:
        sys.exit(f"the undisturbed run ended with {code}:\n{printed.read_text()}")
    expected = outcome(whole)
    delivered = ended = equal = 0
    problems = []
    while delivered < kills:
        folder_of_run = folder / f"killed-{ended}"
        request = ["finetune", *options, "--out", str(folder_of_run)]
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            # The last run goes to its end once there are kills enough.
            after_s = draw.uniform(0.0, 0.8 * whole_s) if delivered < kills else None
            code, _ = run(request, printed, after_s)
            delivered += code == -signal.SIGKILL
            if (folder_of_run / "config.toml").exists():
                request = ["finetune", "--resume", "--out", str(folder_of_run)]
        ended += 1
        if code:
            problems.append(f"exit {code}: {printed.read_text()[-800:]}")
            continue
        found = outcome(folder_of_run)
        other = [name for name in expected if found[name] != expected[name]]
        equal += not other
        if other:
            problems.append(f"{folder_of_run}: other {', '.join(other)}")
        else:
            shutil.rmtree(folder_of_run)
    return {"kills": delivered, "runs": ended, "equal": equal, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="One setting, by its name.")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    os.environ["EDGEZO_CACHE"] = str(args.out / "cache")
    shared, draw = make_inputs(args.out), random.Random(args.seed)
    chosen = [args.only] if args.only else list(SETTINGS)
    results = {}
    for number, name in enumerate(chosen):
        share = args.kills * (number + 1) // len(chosen) - args.kills * number // len(chosen)
        folder = args.out / str(number)
        folder.mkdir()
        options = [*shared, *SETTINGS[name].split(), "--steps", str(STEPS)]
        results[name] = killed_runs(options, share, folder, draw)
        print(json.dumps({"setting": name, **results[name]}), flush=True)
    rows = results.values()
    kills, runs, equal = (sum(row[key] for row in rows) for key in ("kills", "runs", "equal"))
    print(f"{kills} kills delivered over {len(results)} settings: {equal} of {runs} runs bit-equal")
    (args.out / "kills.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if equal == runs else 1)


if __name__ == "__main__":
    main()
