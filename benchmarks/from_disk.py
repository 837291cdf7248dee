"""Can weights of several times the cap be trained? Full-weight training from disk beside the same run in memory.

    python benchmarks/from_disk.py --out DIR [--model smollm2-1.7b] [--layers N] [--max-mem 1100MB] [--steps 10]

The weights are random and of the card's shape; rows have 16 to 64 tokens, B = 16. Prints the ratio of the weights to
the cap, whether both runs end with equal bits, the ratio of their median step times, and what a step reads and writes.
A third run trains low-rank factors on int4 codes, of which nothing may be written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from random_models import CONFIGS, make_model, make_rows

RUNS = ["disk", "memory", "int4"]


def run(request: list[str], out: Path) -> dict[str, Any]:
    """The summary of a run, which is made unless it is finished."""
    if not (out / "summary.json").exists():
        command = [sys.executable, "-m", "edgezo", "finetune", *request, "--out", str(out)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-1500:])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step_s"] for line in lines if line.get("step_s")]
    summary["step_s"] = statistics.median(steps[1:])  # the first step has nothing to write back
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=CONFIGS, default="smollm2-1.7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--max-mem", default="1100MB")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = make_model(args.model, args.layers, args.out)
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    common = ["--model", str(model), "--data", str(make_rows(args.tokens, "label", args.out))]
    common += ["--template", "{text} It was", "--labels", "0=bad,1=good", "--eval-limit", "4"]
    common += ["--steps", str(args.steps), "--threads", str(args.threads), "--batch-size", "16"]
    full = [*common, "--train", "full", "--precision", "bf16"]
    codes = [*common, "--train", "lowrank", "--precision", "int4", "--residency", "disk"]
    requests = {
        "disk": [*full, "--max-mem", args.max_mem],
        "memory": [*full, "--max-mem", "22GB"],
        "int4": [*codes, "--max-mem", args.max_mem],
    }
    summaries = {name: run(requests[name], args.out / name) for name in args.runs}
    for name, summary in summaries.items():
        moved = [summary.get(f"disk_{way}_bytes", 0) / 1e6 for way in ("read", "written")]
        cap = summary["max_mem_bytes"]
        print(
            f"{name:8}{summary['residency']:>9}  bf16 weights / cap {weights / cap:.2f}"
            f"  step {summary['step_s']:.2f} s  peak {summary['peak_rss_bytes'] / 1e6:,.0f} MB"
            f"  planned {summary['planned_peak_bytes'] / 1e6:,.0f} MB"
            f"  reads {moved[0]:,.0f} MB, writes {moved[1]:,.0f} MB a step"
        )
    if {"disk", "memory"} <= summaries.keys():
        disk, memory = summaries["disk"], summaries["memory"]
        equal = disk["trained_sha256"] == memory["trained_sha256"]
        print(f"bits equal after {args.steps} steps: {equal}")
        print(f"step from disk / step in memory: {disk['step_s'] / memory['step_s']:.2f}")


if __name__ == "__main__":
    main()
