"""What does it cost to put an adapter on other weights of the model than it was trained on?

    python benchmarks/other_base.py --out DIR --data-root DIR [--task sst2] [--steps 60] [--rows 300] [--threads 1]
        [--file x.gguf --other MODEL]

Trains on a rounded file of a model and on the weights before rounding, and evaluates each result on its own weights.
What was trained on the file is evaluated on the other weights too (``edgezo eval --other-base``). All evaluations have
the same rows. ``--file`` and ``--other`` are such a pair, a GGUF file and the model in bf16 or fp32. Without them the
pair is made of SmolLM2-135M-Instruct: its GGUF file stands for the weights before rounding, and is rounded once more as
it was itself, matrices to Q4_1 and the embedding to Q8_0. The blocks of 32 weights begin 16 weights later, or rounding
would change nothing. The relative error of that rounding is printed. Writes DIR/other-base.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from edgezo.network.cards import resolve
from edgezo.network.loader import open_model
from edgezo.run.export_files import beside_weights, write_config

MODEL, CAP, BLOCK = "smollm2-135m-instruct", "2GB", 32
METHODS = {
    "default": (),
    "factors and head": ("--train", "lowrank+head"),
    "LoRA": ("--estimator", "lora"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--file", help="the rounded file that is trained on")
    parser.add_argument("--other", help="the same model before rounding")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"task": args.task, "steps": args.steps, "rows": args.rows}
    if args.file is None or args.other is None:
        made = args.out / "rounded", args.out / "before"
        result["relative_error"] = rounded_pair(*made)
        print(
            f"rounding changes matrices by {result['relative_error']:.3f} of their size", flush=True
        )
        args.file, args.other = map(str, made)
    result["methods"] = [measured(args, name) for name in args.methods.split(",")]
    (args.out / "other-base.json").write_text(json.dumps(result, indent=1) + "\n")


def measured(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The accuracies of one method: of the file's run on both weights, and of a run on the other weights."""
    on_file, on_other = (
        trained(args, name, which, model)
        for which, model in (("file", args.file), ("other", args.other))
    )
    line = {
        "method": name,
        "file_on_file": evaluated(args, on_file),
        "file_on_other": evaluated(args, on_file, "--other-base", args.other),
        "other_on_other": evaluated(args, on_other),
    }
    print(json.dumps(line), flush=True)
    return line


def trained(args: argparse.Namespace, name: str, which: str, model: str) -> Path:
    """A run over these weights, which is there already where the script goes on."""
    run: Path = args.out / f"{name.replace(' ', '-')}-on-{which}"
    if not (run / "summary.json").exists():
        asked = ("--model", model, "--max-mem", CAP, "--steps", str(args.steps), "--out", str(run))
        limit = ("--eval-limit", "20", "--precision", "bf16")
        edgezo(args, "finetune", *asked, *limit, *METHODS[name], "--task", args.task)
    return run


def evaluated(args: argparse.Namespace, run: Path, *more: str) -> dict[str, float]:
    """The accuracy of a run, with its loss and standard error."""
    asked = ("--model", str(run), "--eval-limit", str(args.rows), *more)
    figures = edgezo(args, "eval", *asked)
    return {key: figures[key] for key in ("value", "standard_error", "loss", "n")}


def edgezo(args: argparse.Namespace, command: str, *asked: str) -> dict[str, Any]:
    """The result of a command, in a process of its own."""
    shared = ("--data-root", args.data_root, "--threads", str(args.threads), "--json")
    line = [sys.executable, "-m", "edgezo", command, *asked, *shared]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


# ---------------------------------------------------------------------------------------------
# Two files of one model


def rounded_pair(rounded: Path, before: Path) -> float:
    """Write the card's weights in fp32, and rounded as its file; the error of the matrices over their size."""
    files = open_model(resolve(MODEL))
    as_they_are: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    error = size = 0.0
    for name in files.source.names:
        values = files.source.read(name, torch.float32)
        as_they_are[name] = others[name] = values
        if values.dim() == 2:
            kind = GGMLQuantizationType[files.source.stored_type(name)]
            others[name] = torch.from_numpy(rounded_again(values.numpy(), kind))
            error += float((others[name] - values).double().square().sum())
            size += float(values.double().square().sum())
    files.config.dtype = torch.float32
    for folder, tensors in ((before, as_they_are), (rounded, others)):
        if not (folder / "model.safetensors").exists():
            folder.mkdir(exist_ok=True)
            write_config(files.config, folder)
            beside_weights(files, folder)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return float(np.sqrt(error / size))


def rounded_again(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """A matrix (rows, columns) rounded in blocks that begin half a block later."""
    moved = np.roll(values, -BLOCK // 2, axis=1)
    blocks = dequantize(quantize(np.ascontiguousarray(moved), kind), kind)
    return np.ascontiguousarray(np.roll(blocks, BLOCK // 2, axis=1))


if __name__ == "__main__":
    main()
