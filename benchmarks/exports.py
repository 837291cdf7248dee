"""How much memory does each form of export take? One process each, from its start to its end.

    python benchmarks/exports.py --out DIR [--model qwen2.5-1.5b] [--layers N] [--train lowrank] [--forms FORM,...]

The model has a published shape and random bf16 weights (random_models.py); it is trained for one step, whole in
memory. Beside the peak of a process, the largest resident memory that the system reports to its parent, stand the idle
process (what an export imports), and one block and the tables as the run has them in memory, in bf16: "share" is the
peak less the idle process, over that block and those tables. Beside the seconds stand those of ``--format journal``,
which imports, hashes the base and reads the run as every form does, and writes no weights, and those of copying what
was written and syncing it, right after: "copies" is what a form takes beyond the journal, over that copy. Writes
DIR/exports.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from odd_sizes import measured
from random_models import CONFIGS, KINDS, make_model, make_rows

IDLE = "import edgezo.cli.main, edgezo.run.export, torch, transformers"
FORMS = {
    **{f"hf-{dtype}": ["--format", "hf", "--dtype", dtype] for dtype in ("bf16", "fp32")},
    **{f"gguf-{dtype}": ["--format", "gguf", "--dtype", dtype] for dtype in ("bf16", "q8_0")},
    **{
        f"onnx-{dtype}": ["--format", "onnx", "--dtype", dtype]
        for dtype in ("fp32", "fp16", "int8", "int4")
    },
    **{form: ["--format", form] for form in ("peft", "gguf-adapter", "journal")},
}
BF16_BYTES = 2
COPY_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen2.5-1.5b", choices=CONFIGS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--train", default="lowrank")
    parser.add_argument("--forms", default=",".join(FORMS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = make_model(args.model, args.layers, args.out, alike=True)
    block, tables = weights_of(model)
    run = args.out / "run"
    if not (run / "summary.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        rows = make_rows(24, "label", args.out, 16)
        measured(
            *("-m", "edgezo", "finetune", "--model", model, "--data", rows, *KINDS["label"][1]),
            *("--precision", "bf16", "--train", args.train),
            *("--steps", 1, "--batch-size", 2, "--eval-limit", 2, "--max-mem", "8GB"),
            *("--quiet", "--out", run),
        )
    _, idle_bytes = measured("-c", IDLE)
    whole_bytes = BF16_BYTES * (block + tables)
    figures: dict[str, Any] = {"model": args.model, "train": args.train, "idle_bytes": idle_bytes}
    figures |= {"block_weights": block, "table_weights": tables, "forms": {}}
    figures["block_and_tables_bytes"] = whole_bytes
    for form in args.forms.split(","):
        target = args.out / "written"
        remove(target)
        start_s, _ = export(run, "journal", target)
        remove(target)
        export_s, peak_bytes = export(run, form, target)
        copy_s = copied(target, args.out / "copy")
        line = {
            "peak_bytes": peak_bytes,
            "written_bytes": sum(f.stat().st_size for f in [target, *target.rglob("*")]),
            "export_s": export_s,
            "journal_s": start_s,
            "copy_s": copy_s,
            "copies": (export_s - start_s) / copy_s,
            "share": (peak_bytes - idle_bytes) / whole_bytes,
        }
        figures["forms"][form] = line
        print(
            f"{form:13} peak {peak_bytes / 1e6:7.1f} MB, idle {idle_bytes / 1e6:.1f}, block and tables"
            f" {whole_bytes / 1e6:7.1f}, share {line['share']:.2f}, {line['written_bytes'] / 1e6:.0f} MB"
            f" in {export_s:.1f} s, journal {start_s:.1f}, copy {copy_s:.1f}, copies {line['copies']:.2f}",
            flush=True,
        )
        (args.out / "exports.json").write_text(json.dumps(figures, indent=1) + "\n")
    remove(args.out / "written")


def export(run: Path, form: str, target: Path) -> tuple[float, int]:
    """Seconds and peak of one export, a process of its own."""
    begun_s = time.perf_counter()
    _, peak_bytes = measured("-m", "edgezo", "export", run, *FORMS[form], "--out", target)
    return time.perf_counter() - begun_s, peak_bytes


def copied(source: Path, target: Path) -> float:
    """Seconds of reading a file or all files of a directory, writing the bytes elsewhere, and syncing them."""
    files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
    begun_s = time.perf_counter()
    with open(target, "wb", buffering=0) as out:
        for file in files:
            with open(file, "rb", buffering=0) as into:
                while piece := into.read(COPY_BYTES):
                    out.write(piece)
        os.fsync(out.fileno())
    seconds = time.perf_counter() - begun_s
    target.unlink()
    return seconds


def weights_of(model: Path) -> tuple[int, int]:
    """How many weights a block has, and all tables."""
    from safetensors import safe_open

    sizes = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                shape = tensors.get_slice(key).get_shape()
                sizes[key] = shape[0] * (shape[1] if len(shape) > 1 else 1)
    block = sum(n for key, n in sizes.items() if "0" in key.split("."))
    tables = sum(n for key, n in sizes.items() if not any(w.isdecimal() for w in key.split(".")))
    return block, tables


def remove(target: Path) -> None:
    """Whatever form was written there last."""
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
