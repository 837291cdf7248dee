"""What do the engines take? Whole processes of each, in memory groups of the kernel: peak memory and seconds a step.

    python benchmarks/engines.py --out DIR --graphs int8=DIR --graphs int4=DIR [--model M] [--data-root DIR]
        [--steps 6] [--threads 2] [--torch bf16,int8] [-- more options of finetune]
    python benchmarks/engines.py --out DIR --graphs int8=DIR --torch int8 --seeds 0,1,2 --steps 400 [--data-root DIR]

Each run trains low-rank factors on SST-2 with B = 8 and rows of at most 48 tokens, and evaluates 16 rows before and
after. Peaks are VmHWM of the process, from its start to its end. Seconds of a step are the median of the run, beside a
plain forward over the same rows. ``group_bytes``: the largest use of the memory group, where the user may make one (as
root has it).

With ``--seeds`` each run has the default recipe instead, and its accuracy before and after is printed. Runs that are
complete in DIR are not made again, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GROUPS = Path("/sys/fs/cgroup/memory")
COMMON = ["--task", "sst2", "--eval-limit", "16", "--batch-size", "8", "--max-length", "48"]


@contextmanager
def memory_group(name: str, cap_mb: int) -> Iterator[Path | None]:
    """A group with this limit; None where there can be none."""
    folder = GROUPS / f"edgezo-{name}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(cap_mb * 1_000_000))
    except OSError:
        yield None
        return
    try:
        yield folder
    finally:
        folder.rmdir()


def measured(name: str, options: list[str], out: Path, cap_mb: int) -> dict[str, Any]:
    """A run's figures."""
    run = out / name
    command = [sys.executable, "-m", "edgezo", "finetune", *COMMON, *options, "--json"]
    command += ["--train", "lowrank", "--max-mem", f"{cap_mb}MB", "--out", str(run)]
    with memory_group(name, cap_mb) as group:
        if group is not None:
            enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
            command = ["bash", "-c", enter, "bash", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        used = int((group / "memory.max_usage_in_bytes").read_text()) if group else None
    result = json.loads(done.stdout or "{}")
    if done.returncode:
        return {"name": name, "exit_code": done.returncode, "error": result.get("error")}
    names = ("peak_rss_bytes", "planned_peak_bytes", "base_rss_bytes", "step_s", "forward_s")
    figures = {key: result[key] for key in names}
    return {"name": name, "cap_mb": cap_mb, **figures, "group_bytes": used}


def accuracy(name: str, options: list[str], out: Path, rows: int) -> dict[str, Any]:
    """What a run of the default recipe reaches."""
    run = out / name
    if not (run / "summary.json").exists():
        command = [sys.executable, "-m", "edgezo", "finetune", "--task", "sst2", *options]
        command += ["--eval-limit", str(rows), "--out", str(run), "--quiet"]
        if (run / "config.toml").exists():
            command = [sys.executable, "-m", "edgezo", "finetune", "--resume", "--out", str(run)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["eval_before"], summary["eval_after"]
    figures = {when: eval_["value"] for when, eval_ in (("before", before), ("after", after))}
    more = {key: summary[key] for key in ("trained", "steps", "loss_last", "peak_rss_bytes")}
    probe = summary.get("probe", {}).get("accuracy")
    return {"name": name, **figures, "n": after["n"], "probe_on_training_rows": probe, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graphs", action="append", default=[], metavar="PRECISION=DIR")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--torch", default="bf16,int8")
    parser.add_argument("--data-root")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cap-mb", type=int, default=300, help="of the ONNX engine's runs")
    parser.add_argument("--seeds", help="compare what the default recipe reaches: 0,1,2")
    parser.add_argument("--eval-limit", type=int, default=872, help="rows, with --seeds")
    parser.add_argument("more", nargs="*")
    asked = parser.parse_args()
    common = ["--steps", str(asked.steps), "--threads", str(asked.threads), *asked.more]
    common += ["--data-root", asked.data_root] if asked.data_root else []
    engines = {}
    for given in asked.graphs:
        precision, _, folder = given.partition("=")
        engines[f"onnx-{precision}"] = ["--engine", "onnx", "--model", folder]
    for precision in filter(None, asked.torch.split(",")):
        engines[f"torch-{precision}"] = ["--model", asked.model, "--precision", precision]
    for seed in (asked.seeds or "").split(","):
        for name, options in engines.items():
            if seed:
                given = [*options, *common, "--seed", seed]
                row = accuracy(f"{name}-{seed}", given, asked.out, asked.eval_limit)
            else:
                cap_mb = asked.cap_mb if name.startswith("onnx") else 1200
                row = measured(name, [*options, *common], asked.out, cap_mb)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
