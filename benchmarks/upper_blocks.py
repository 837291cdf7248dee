"""Does training the upper blocks take less memory than inference? Each in a process and a memory group of its own.

    python benchmarks/upper_blocks.py --out DIR [--model qwen2.5-1.5b] [--blocks 7] [--precision int4] [--layers N]
        [--rows 96] [--tokens 64] [--kind label] [--estimator default] [--steps 6]

The model has a published shape and random weights (random_models.py). Inference is ``edgezo eval`` on the same rows,
without a cap. Training is ``edgezo finetune --blocks N`` under the smallest cap that its plan names, and 1 % more. Both
peaks are VmHWM of the whole process, from its start to its end, loading and the pass included. Writes
DIR/upper-blocks.json. Needs the right to make control groups, as caps.py does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from caps import control_group, kills, run, smallest_mb
from random_models import KINDS, make_model, make_rows

NO_CAP = 20_000_000_000


def main() -> None:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    model = make_model(args.model, args.layers, args.out)
    rows = make_rows(args.tokens, args.kind, args.out, args.rows)
    shared = ["--model", str(model), "--data", str(rows), "--precision", args.precision]
    shared += ["--max-length", str(args.tokens), *KINDS[args.kind][1]]
    inference = measured(["eval", *shared, "--max-mem", "20GB", "--eval-limit", "16"], NO_CAP)
    training = [*shared, "--blocks", str(args.blocks), "--estimator", args.estimator]
    training += ["--steps", str(args.steps), "--eval-limit", "16"]
    cap_mb = smallest_mb(training) * 101 // 100
    folder = args.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    more = ["--max-mem", f"{cap_mb}MB", "--out", str(folder)]
    trained = measured(["finetune", *training, *more], cap_mb * 10**6)
    ratio = trained["peak_bytes"] / inference["peak_bytes"]
    line = {**vars(args), "out": None, "cap_mb": cap_mb, "inference": inference}
    line |= {"training": trained, "ratio": ratio}
    (args.out / "upper-blocks.json").write_text(json.dumps(line, indent=1, default=str) + "\n")
    for name, figures in (("inference", inference), ("training", trained)):
        print(f"{name:10} peak {figures['peak_bytes'] / 1e6:8.1f} MB, exit {figures['exit']}")
    print(f"training / inference {ratio:.2f}, cap {cap_mb} MB, killed {trained['kills']}")


def measured(words: list[str], limit_bytes: int) -> dict[str, Any]:
    """Exit code, kills and peak of a command in a control group."""
    with control_group(limit_bytes) as group:
        done = run([*words, "--json"], group)
        killed = kills(group)
    if done.returncode:
        print(done.stderr[-2000:])
        return {"exit": done.returncode, "kills": killed, "peak_bytes": 0}
    figures = json.loads(done.stdout)
    return {
        "exit": 0,
        "kills": killed,
        "peak_bytes": figures["peak_rss_bytes"],
        "planned_bytes": figures.get("planned_peak_bytes"),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen2.5-1.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kind", default="label", choices=KINDS)
    parser.add_argument("--estimator", default="default")
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
