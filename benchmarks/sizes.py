"""Is the time of a step linear in the parameters of a model? Random weights of real shapes.

    python benchmarks/sizes.py --out DIR [--models NAME ...] [--precisions bf16 int4] [--batch-size 4] [--tokens 64]

Runs ``edgezo bench speed`` once for each model, in a process of its own; finished runs are kept. Parameters are those
of the matrices of the blocks, which every token passes. Writes DIR/sizes.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from random_models import make_model, make_rows

from edgezo.bench.speed import straight
from edgezo.network.cards import find_card
from edgezo.plan.shapes import ModelShape

SIZES = ["smollm2-135m-instruct", "smollm2-360m-instruct", "qwen2.5-0.5b", "qwen2.5-1.5b"]


def parameters(name: str) -> int:
    """Number of parameters of the blocks' matrices, from the model's card."""
    card = find_card(name)
    assert card is not None, name
    shape = ModelShape.of(card, name)
    return shape.layers * sum(matrix.numel for matrix in shape.block)


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of speed.json for a model, measured now unless they are there."""
    out = args.out / f"speed-{name}"
    if not (out / "speed.json").exists():
        rows = make_rows(args.tokens, "label", args.out)
        asked = ["--model", make_model(name, None, args.out), "--data", rows]
        asked += ["--template", "{text} It was", "--labels", "0= bad,1= good"]
        asked += ["--estimators", "grzo", "--precisions", ",".join(args.precisions)]
        asked += ["--batch-sizes", args.batch_size, "--tokens", "own", "--repeats", args.repeats]
        asked += ["--threads", args.threads, "--no-baselines", "--out", out]
        subprocess.run(
            [sys.executable, "-m", "edgezo", "bench", "speed", *map(str, asked)], check=True
        )
    return json.loads((out / "speed.json").read_text())["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int4"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"model": name, "parameters": parameters(name), **row}
        for name in args.models
        for row in measure(name, args)
    ]
    fits = []
    print("precision   parameters   forward      step   ratio")
    for precision in args.precisions:
        of_store = [row for row in rows if row["precision"] == precision]
        for row in of_store:
            print(
                f"{precision:9} {row['parameters'] / 1e6:10.0f} M {row['forward_s']:8.3f} s "
                f"{row['step_s']:7.3f} s {row['ratio']:6.3f}   {row['model']}"
            )
        x, y = (np.array([row[key] for row in of_store], float) for key in ("parameters", "step_s"))
        slope, fixed, r2 = straight(x, y)
        fits.append(
            {"precision": precision, "fixed_s": fixed, "s_a_billion": slope * 1e9, "r2": r2}
        )
        print(
            f"{precision}: {fixed:.3f} s + {slope * 1e9:.3f} s a billion parameters, R^2 {r2:.4f}"
        )
    (args.out / "sizes.json").write_text(json.dumps({"rows": rows, "fits": fits}, indent=1))


if __name__ == "__main__":
    main()
