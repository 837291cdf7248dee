"""Does a run keep its cap? Runs inside memory control groups, with random caps and with caps that are too small.

    python benchmarks/caps.py --out DIR [--caps 40] [--below 5] [--seed 0] [--steps 2] [-- more options of finetune]

Needs the right to make control groups (version 1 or 2), as root has it. A cap is drawn between the smallest that the
plan names and 4 GB, its logarithm uniformly, so that many are tight. The options (precision, what is trained, batch
size) are drawn too. Each run must end with exit code 0, no kill by the kernel, no swap, and a peak within the cap. With
a cap below the smallest, the exit code must be 3 every time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LARGEST_BYTES = 4_000_000_000
BASE = ["--model", "smollm2-135m-instruct", "--task", "example"]
OPTIONS = [
    [],
    ["--precision", "int4"],
    ["--precision", "int8", "--batch-size", "8"],
    ["--precision", "bf16", "--train", "full"],
    ["--precision", "bf16", "--train", "full", "--residency", "disk"],
    ["--precision", "int8", "--residency", "disk"],
    ["--precision", "fp32", "--batch-size", "32"],
    ["--train", "lowrank", "--directions", "rademacher"],
]


@contextmanager
def control_group(limit_bytes: int) -> Iterator[Path]:
    """A new control group with a memory limit and no swap; removed afterwards."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        folder, limit, swap = root / f"edgezo-{os.getpid()}", "memory.max", "memory.swap.max"
    else:
        folder, limit, swap = root / "memory" / f"edgezo-{os.getpid()}", "memory.limit_in_bytes", ""
    folder.mkdir()
    try:
        (folder / limit).write_text(str(limit_bytes))
        if swap and (folder / swap).exists():
            (folder / swap).write_text("0")
        yield folder
    finally:
        for _ in range(50):  # a group cannot be removed before its last process has ended
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def kills(group: Path) -> int:
    """Number of processes in the group that the kernel has killed because memory ran out."""
    for name in ("memory.events", "memory.oom_control"):
        if (group / name).exists():
            for line in (group / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def run(args: list[str], group: Path | None) -> subprocess.CompletedProcess[str]:
    """Run edgezo with these arguments inside a control group."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-m", "edgezo", *args]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)


def smallest(options: list[str]) -> int:
    """The smallest cap for these options, in bytes, which a plan names when the cap is too small."""
    done = run(["finetune", *BASE, *options, "--dry-run", "--json", "--max-mem", "100MB"], None)
    return int(json.loads(done.stdout)["smallest_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--caps", type=int, default=40)
    parser.add_argument("--below", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("more", nargs="*")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    least = {i: smallest(options) for i, options in enumerate(OPTIONS)}
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(args.caps + args.below):
        which = draw.randrange(len(OPTIONS))
        fits = number < args.caps
        if fits:
            cap = -(-least[which] // 10**6)
            cap = int(cap * (LARGEST_BYTES / 10**6 / cap) ** draw.random())
        else:
            cap = least[which] // 10**6 - draw.randint(1, 5)
        out = args.out / f"run-{args.seed}-{number}"
        request = [*BASE, *OPTIONS[which], "--max-mem", f"{cap}MB", "--steps", str(args.steps)]
        request += ["--eval-limit", "24", "--out", str(out), "--json", *args.more]
        with control_group(cap * 10**6) as group:
            done = run(["finetune", *request], group)
            killed = kills(group)
        line = {
            "cap_mb": cap,
            "wish": " ".join(OPTIONS[which]),
            "exit": done.returncode,
            "kills": killed,
        }
        if done.returncode == 0:
            summary = json.loads(done.stdout)
            line |= {
                "precision": summary["precision"],
                "residency": summary["residency"],
                "peak_mb": summary["peak_rss_bytes"] / 1e6,
                "planned_mb": summary["planned_peak_bytes"] / 1e6,
            }
        line["kept"] = (
            killed == 0
            and done.returncode == (0 if fits else 3)
            and line.get("peak_mb", 0) <= cap
            and line.get("peak_mb", 0) <= line.get("planned_mb", 0)
        )
        lines.append(line)
        print(json.dumps(line), flush=True)
        if not line["kept"]:
            print(done.stderr[-600:], flush=True)
    kept = sum(line["kept"] for line in lines)
    print(
        f"{kept} of {len(lines)} as they should be: {args.caps} caps that fit, {args.below} below the smallest"
    )
    (args.out / f"caps-{args.seed}.json").write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
