"""Does a finetuner that was trained on one task lower the final loss on others?

    python benchmarks/finetuner.py --data-root DIR [--learn sst2] [--unseen trec snips] [--seeds 0 1 2] [--out DIR]

Meta-trains one finetuner for each credit on the tasks of --learn, then trains on every unseen task with and without it,
over the same grid of step sizes. A line is printed for each, with the step size that is best by the median over seeds.
Each run is a process of its own. Finished runs are kept, so the same command goes on where it stopped. It takes hours
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TUNED = {"mezo": "zo-finetuner", "grzo": "zo-finetuner-grzo"}
STEPS = {"mezo": 1e-4, "grzo": 0.1}  # with and without a finetuner
LAST = 20  # the final training loss is the mean over so many steps


def edgezo(*arguments: object) -> None:
    """Run a command of edgezo; an error ends this script."""
    subprocess.run([sys.executable, "-m", "edgezo", *map(str, arguments)], check=True)


def finetuner(plain: str, args: argparse.Namespace) -> Path:
    """The file of a credit's finetuner, trained now unless it is there. An interrupted training starts anew."""
    done = Path(args.out) / f"{plain}.safetensors"
    if not done.exists():
        made = done.with_name(f"{plain}-unfinished.safetensors")
        made.unlink(missing_ok=True)
        request = ["--model", args.model, "--data-root", args.data_root]
        request += [part for task in args.learn for part in ("--task", task)]
        request += ["--estimator", TUNED[plain], "--sharing", args.sharing]
        request += ["--batch-size", args.meta_batch]
        request += ["--steps", args.meta_steps, "--restart", max(1, args.meta_steps // 5)]
        request += ["--max-length", args.max_length, "--threads", args.threads]
        edgezo("meta-train", *request, "--out", made)
        made.rename(done)
    return done


def run(
    task: str, plain: str, file: Path | None, step: float, seed: int, args: argparse.Namespace
) -> dict[str, float]:
    """Final losses and metric of one run, which is made or resumed unless it is finished."""
    name = f"{task}-{plain}-{'tuned' if file else 'plain'}-{step:g}-{seed}"
    out = Path(args.out) / name
    if not (out / "summary.json").exists():
        request: list[Any] = ["--resume"]
        if not (out / "journal.bin").exists():
            request = ["--model", args.model, "--task", task, "--data-root", args.data_root]
            request += ["--train", "full", "--precision", args.precision, "--batch-size", 16]
            request += ["--steps", args.steps, "--step", step, "--seed", seed]
            request += ["--max-length", args.max_length, "--eval-limit", args.eval_limit]
            request += ["--estimator", TUNED[plain] if file else plain]
            request += ["--finetuner", file] if file else []
        edgezo("finetune", *request, "--threads", args.threads, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "step_size" in line]
    after = summary["eval_after"]
    return {
        "train": statistics.fmean(losses[-LAST:]),
        "eval": after["loss"],
        "value": after["value"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--learn", nargs="+", default=["sst2"])
    parser.add_argument("--unseen", nargs="+", default=["trec", "snips"])
    parser.add_argument("--estimators", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--sharing", choices=["block", "layer"], default="block")
    parser.add_argument("--grid", nargs="+", type=float, default=[0.3, 1.0, 3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--meta-steps", type=int, default=200)
    parser.add_argument("--meta-batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument(
        "--precision", default="fp32", help="store of the runs; meta-training uses fp32"
    )
    parser.add_argument("--eval-limit", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="runs/finetuner")
    args = parser.parse_args()
    print("task      credit  with      step   training loss (seeds)             validation  metric")
    for plain in args.estimators:
        files = {"nothing": None, "finetuner": finetuner(plain, args)}
        for task in args.unseen:
            for which, file in files.items():
                tried = {}
                for factor in args.grid:
                    step = STEPS[plain] * factor
                    tried[step] = [run(task, plain, file, step, seed, args) for seed in args.seeds]

                def middle(step: float, name: str, tried: dict[float, Any] = tried) -> float:
                    return statistics.median(figures[name] for figures in tried[step])

                best = min(tried, key=lambda step: middle(step, "train"))
                each = " ".join(f"{figures['train']:.4f}" for figures in tried[best])
                print(
                    f"{task:9} {plain:7} {which:9} {best:6.1e} {middle(best, 'train'):.4f} ({each})"
                    f"   {middle(best, 'eval'):.4f}      {middle(best, 'value'):.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
