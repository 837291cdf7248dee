"""Accuracy of several requests over seeds, each run in a process of its own: median, spread, peak, step ratio.

    python benchmarks/accuracy.py --data-root DIR [--only NAME ...] [--seeds 0 1 2] [--threads 2] [--out runs/accuracy]

Finished runs are kept, interrupted ones resumed, so the same command goes on where it stopped. Every figure that README
gives for SST-2 comes from here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMON = [
    "--model",
    "smollm2-135m-instruct",
    "--task",
    "sst2",
    "--batch-size",
    "16",
    "--steps",
    "400",
]

# One row, one request. MeZO's default step is the best of 3e-5, 1e-4 and 3e-4 over whole runs (LOG.md).
REQUESTS: dict[str, list[str]] = {
    "default": ["--precision", "bf16", "--max-mem", "1GB"],
    "lowrank": ["--precision", "bf16", "--max-mem", "1GB", "--train", "lowrank"],
    "int4": ["--precision", "int4", "--max-mem", "700MB"],
    "full-bf16-plane": ["--precision", "bf16", "--max-mem", "1100MB", "--train", "full"],
    "full-fp32": ["--precision", "fp32", "--max-mem", "1300MB", "--train", "full"],
    "mezo": [
        "--precision",
        "bf16",
        "--max-mem",
        "1GB",
        "--train",
        "lowrank",
        "--estimator",
        "mezo",
    ],
}


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """summary.json of one run, made if it is not there yet."""
    out = Path(args.out) / f"{name}-{seed}"
    if not (out / "summary.json").exists():
        begun = (out / "journal.bin").exists()
        request = ["--resume"] if begun else [*COMMON, *REQUESTS[name], "--seed", str(seed)]
        request += ["--data-root", args.data_root] if not begun else []
        request += ["--threads", str(args.threads)]
        command = [sys.executable, "-m", "edgezo", "finetune", *request, "--out", str(out)]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--only", nargs="+", choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="runs/accuracy")
    args = parser.parse_args()
    print(
        "request          accuracy (median, all seeds)      peak MB / cap MB   step/forward  train s"
    )
    for name in args.only:
        found = [run(name, seed, args) for seed in args.seeds]
        values = [s["eval_after"]["value"] for s in found]
        peak = max(s["peak_rss_bytes"] for s in found) / 1e6
        cap = found[0]["max_mem_bytes"] / 1e6
        ratio = statistics.median(s["step_s"] / s["forward_s"] for s in found)
        train_s = statistics.median(s["train_s"] for s in found)
        each = " ".join(f"{v:.4f}" for v in values)
        print(
            f"{name:16} {statistics.median(values):.4f}  ({each})  {peak:7.0f} / {cap:.0f}"
            f"  {ratio:11.2f}  {train_s:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
