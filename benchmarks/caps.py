"""Does a run keep its cap? Runs inside memory control groups, with random caps and with caps that are too small.

    python benchmarks/caps.py --out DIR [--caps 50] [--below 5] [--seed 0] [--steps 2] [--layers N] [--data-root DIR]
        [-- more options of finetune]

Needs the right to make control groups (version 1 or 2), as root has it. A cap is drawn between the smallest that the
plan names and 4 GB, its logarithm uniformly, so that many are tight. Each request (estimator, precision, what is
trained, where blocks are, kind and length of rows) comes as often as any other. Each run must end with exit code 0, no
kill by the kernel, no swap, and a peak within its plan and the cap. With a cap below the smallest, the exit code must
be 3 every time. Finished runs are kept. With --layers the model has so many blocks and random weights, which is faster;
with --data-root built-in tasks are trained on too.
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
from typing import Any, NamedTuple

from random_models import KINDS, make_model, make_rows

LARGEST_BYTES = 4_000_000_000
# The plan that names the smallest cap is made in another process, which may be smaller or larger by so much.
SIZE_DIFFERS_MB = 16
MODEL = "smollm2-135m-instruct"
DISK = ["--residency", "disk"]
FULL = ["--precision", "bf16", "--train", "full"]


class Request(NamedTuple):
    """What is trained, and on which rows."""

    rows: str  # a kind of random_models.KINDS, or a built-in task
    tokens: int  # --max-length, and the longest random row
    options: list[str]


# Beside an estimator's parts: an exact head, or what the default trains.
ADDAX = ("--estimator", "addax", "--train", "lowrank+head")
READOUT = ("--train", "lowrank+head+probe")

REQUESTS = [
    Request("example", 512, []),
    Request("example", 512, ["--precision", "int4"]),
    Request("example", 512, [*FULL]),
    Request("example", 512, [*FULL, *DISK]),
    Request("example", 512, ["--train", "lowrank", "--directions", "rademacher"]),
    Request("label", 96, ["--precision", "int8", "--batch-size", "8"]),
    Request("label", 96, ["--precision", "fp32", "--batch-size", "32"]),
    Request("label", 64, ["--precision", "int8", *DISK]),
    Request("label", 400, ["--estimator", "lora", "--batch-size", "4"]),
    Request("label", 96, ["--estimator", "lora", "--precision", "int4", *DISK]),
    Request("completion", 96, ["--estimator", "lora", "--precision", "int8"]),
    Request("completion", 200, [*ADDAX, "--batch-size", "4"]),
    Request("completion", 64, [*ADDAX, "--precision", "int4", *DISK]),
    Request("text", 800, ["--batch-size", "4"]),
    Request("text", 800, ["--batch-size", "4", "--precision", "int4", *DISK]),
    Request("text", 400, [*FULL, "--batch-size", "4"]),
    Request("messages", 200, ["--batch-size", "8"]),
    Request("messages", 200, ["--estimator", "lora", "--batch-size", "4", "--precision", "int8"]),
    Request("pairs", 96, ["--batch-size", "8"]),
    Request("pairs", 96, [*ADDAX, "--batch-size", "4", "--precision", "int8"]),
    Request("written", 96, ["--batch-size", "8", "--precision", "int8"]),
    Request("label", 64, ["--estimator", "mezo-adam", *READOUT]),
    Request("label", 64, ["--estimator", "hizoo", *READOUT, "--precision", "int8"]),
]
OF_DATA_ROOT = [
    Request("sst2", 512, []),
    Request("boolq", 512, ["--batch-size", "4"]),
    Request("copa", 128, ["--estimator", "lora"]),
    Request("squad", 200, ["--batch-size", "4", "--max-new-tokens", "8", "--precision", "int4"]),
    Request("gsm8k", 128, ["--batch-size", "4", "--max-new-tokens", "8", *DISK]),
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


def words_of(request: Request, args: argparse.Namespace) -> list[str]:
    """The options of finetune for a request, but for its cap and folder."""
    model = MODEL if args.layers is None else str(make_model(MODEL, args.layers, args.out))
    words = ["--model", model, "--max-length", str(request.tokens), *request.options]
    if request.rows in KINDS:
        rows = make_rows(request.tokens, request.rows, args.out, args.rows)
        return [*words, "--data", str(rows), *KINDS[request.rows][1]]
    root = [] if request.rows == "example" else ["--data-root", str(args.data_root)]
    return [*words, "--task", request.rows, *root]


def smallest_mb(words: list[str]) -> int:
    """The smallest cap for these options, in MB, which every plan names."""
    done = run(["finetune", *words, "--dry-run", "--json", "--max-mem", "20GB"], None)
    return -(-int(json.loads(done.stdout)["smallest_bytes"]) // 10**6)


def tried(
    words: list[str], cap_mb: int, fits: bool, out: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """The figures of a run in a control group of ``cap_mb``; ``kept`` says whether it ended as it should."""
    request = [*words, "--max-mem", f"{cap_mb}MB", "--steps", str(args.steps), "--eval-limit", "12"]
    with control_group(cap_mb * 10**6) as group:
        done = run(["finetune", *request, "--out", str(out), "--json", *args.more], group)
        killed = kills(group)
    line: dict[str, Any] = {"cap_mb": cap_mb, "exit": done.returncode, "kills": killed}
    if done.returncode == 0:
        summary = json.loads(done.stdout)
        line |= {name: summary[name] for name in ("precision", "residency", "micro_batch")}
        line["peak_mb"] = summary["peak_rss_bytes"] / 1e6
        line["planned_mb"] = summary["planned_peak_bytes"] / 1e6
    peak_mb = line.get("peak_mb", 0)
    ended = killed == 0 and done.returncode == (0 if fits else 3)
    line["kept"] = ended and peak_mb <= cap_mb and peak_mb <= line.get("planned_mb", 0)
    if not line["kept"]:
        line["message"] = done.stderr[-600:]
    return line


def run_all(args: argparse.Namespace, file: Path, lines: list[dict[str, Any]]) -> None:
    """Try every cap that ``lines`` does not have."""
    draw = random.Random(args.seed)
    requests = [*REQUESTS, *(OF_DATA_ROOT if args.data_root else [])]
    draw.shuffle(requests)
    least: dict[int, int] = {}
    for number in range(args.caps + args.below):
        fits, which = number < args.caps, number % len(requests)
        share, off_mb = draw.random(), SIZE_DIFFERS_MB + draw.randint(0, 4)
        if number < len(lines):
            continue
        request = requests[which]
        words = words_of(request, args)
        least[which] = least.get(which) or smallest_mb(words)
        cap_mb = least[which] - off_mb
        if fits:
            tightest = least[which] + SIZE_DIFFERS_MB
            cap_mb = int(tightest * (LARGEST_BYTES / 1e6 / tightest) ** share)
        name = {"rows": request.rows, "tokens": request.tokens}
        line = name | {"options": " ".join(request.options), "least_mb": least[which]}
        out = args.out / f"run-{args.seed}-{number}"
        lines.append(line | tried(words, cap_mb, fits, out, args))
        file.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
        print(json.dumps(lines[-1]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--caps", type=int, default=50)
    parser.add_argument("--below", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layers", type=int, help="blocks of a model with random weights")
    parser.add_argument("--rows", type=int, default=100, help="rows of random words")
    parser.add_argument("--data-root", type=Path, help="folder of data sets for built-in tasks")
    parser.add_argument("more", nargs="*")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"caps-{args.seed}.json"
    lines = json.loads(file.read_text()) if file.exists() else []
    run_all(args, file, lines)
    kept = sum(line["kept"] for line in lines)
    print(
        f"{kept} of {len(lines)} as they should be: {args.caps} caps that fit, {args.below} below the smallest"
    )


if __name__ == "__main__":
    main()
