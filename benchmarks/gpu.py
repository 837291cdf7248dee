"""Do plans hold on a GPU, what does a step cost there, and can models be trained that do not fit?

    python benchmarks/gpu.py all --out DIR
    python benchmarks/gpu.py grid --out DIR --tokenizer MODEL_OR_CARD
    python benchmarks/gpu.py host --out DIR --tokenizer MODEL_OR_CARD --layers 40

``all``: every figure for a GPU, in at most 8 minutes (gpu_all.py); with ``--rehearse`` on a CPU, with tiny shapes.
``grid``: planned and measured peaks, with random weights of published shapes (NAME:LAYERS has fewer blocks). ``host``:
every weight of a model is trained whose weights are three times the cap, beside the same run with all of them on the
GPU, twice.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import gpu_all
import random_models
import torch

from edgezo.plan.request import make_config
from edgezo.run.train import finetune

MB = 1e6


def run(out: Path, model: Path, rows: Path, **settings: object) -> dict:
    """The summary of a run in this process, whose peaks are measured from its start."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    request = {"model": str(model), "data": str(rows), "out": str(out), "eval_limit": 20}
    if rows.name.startswith("text"):
        texts = [{"text": json.loads(line)["text"]} for line in rows.read_text().splitlines()]
        rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    else:
        request |= {"template": "{text} It was", "labels": "0=bad,1=good"}
    return finetune(make_config(request | {"device": "cuda"} | settings))


def grid(args: argparse.Namespace) -> None:
    """Print planned and measured peaks over models, stores, lengths and what is trained."""
    columns = ("planned", "peak", "context", "reserved", "allocated")
    head = f"{'model':28}{'store':>6}{'tokens':>7}{'train':>8}{'kind':>6}"
    print(head + "".join(f"{c:>10}" for c in columns) + "   over  step_s forward_s")
    for shape in args.models:
        name, _, layers = shape.partition(":")
        model = random_models.make_model(name, int(layers) if layers else None, args.out)
        for precision in args.precisions:
            for tokens in args.tokens:
                for kind, train in (part.split("/") for part in args.requests):
                    if train == "full" and precision not in ("fp32", "bf16"):
                        continue
                    rows = random_models.make_rows(tokens, kind, args.out)
                    made = args.out / "runs" / f"{model.name}-{precision}-{tokens}-{kind}-{train}"
                    summary = run(
                        made,
                        model,
                        rows,
                        precision=precision,
                        train=train,
                        batch_size=args.batch_size,
                        micro_batch=args.batch_size,
                        max_length=tokens,
                        steps=args.steps,
                        max_mem_bytes=60 * 10**9,
                        profile=True,
                    )
                    planned, peak = summary["planned_peak_bytes"], summary["cuda_peak_bytes"]
                    sizes = [planned, peak, summary["cuda_context_bytes"]]
                    sizes += [summary[f"cuda_peak_{n}_bytes"] for n in ("reserved", "allocated")]
                    over = planned - peak
                    kept = 0 <= over <= max(40e6, 0.05 * peak)
                    print(
                        f"{model.name:28}{precision:>6}{tokens:>7}{train:>8.8}{kind:>6.6}"
                        + "".join(f"{size / MB:>10.1f}" for size in sizes)
                        + f"{over / MB:>7.0f}{summary['step_s']:>8.3f}{summary['forward_s']:>10.3f}"
                        + ("" if kept else "  MISSED"),
                        flush=True,
                    )
                    if args.detail:
                        _detail(made, summary)


def _detail(made: Path, summary: dict) -> None:
    """Print the items of the plan and the GPU memory of each phase, in MB."""
    items = json.loads((made / "plan.json").read_text())["items"]
    print("   ", {f"{i['name']} ({i['phase']})": round(i["bytes"] / MB, 1) for i in items})
    phases = summary["phases"]
    print("   ", {n: round(p.get("cuda_allocated_bytes", 0) / MB, 1) for n, p in phases.items()})


def host(args: argparse.Namespace) -> None:
    """Print whether a run with blocks in RAM ends with the bits of a run on the GPU, and how much slower it is."""
    model = random_models.make_model(args.models[0], args.layers, args.out)
    rows = random_models.make_rows(args.tokens[0], "label", args.out)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    request = {
        "train": "full",
        "precision": "bf16",
        "batch_size": args.batch_size,
        "micro_batch": args.batch_size,
        "max_length": args.tokens[0],
        "steps": args.steps,
    }
    cap = int(weights / 3)
    summaries, losses = {}, {}
    for name, cap_setting in (
        ("resident", {"max_mem_bytes": 60 * 10**9}),
        ("resident-again", {"max_mem_bytes": 60 * 10**9}),
        ("host", {"max_mem_bytes": cap}),
    ):
        made = args.out / "runs" / f"{model.name}-{name}"
        summaries[name] = one = run(made, model, rows, **request, **cap_setting)
        lines = (made / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
        moved = one.get("host_read_bytes", 0), one.get("host_written_bytes", 0)
        print(
            f"{name:18} weights {weights / MB:.0f} MB, cap {one['max_mem_bytes'] / MB:.0f}, planned "
            f"{one['planned_peak_bytes'] / MB:.0f}, peak {one['cuda_peak_bytes'] / MB:.0f}, step "
            f"{one['step_s']:.3f} s, forward {one['forward_s']:.3f} s, read {moved[0] / MB:.0f}, "
            f"written {moved[1] / MB:.0f} MB, micro-batch {one['micro_batch']}, losses "
            f"{one['loss_first']:.6f} {one['loss_last']:.6f}, reserved "
            f"{one['cuda_peak_reserved_bytes'] / MB:.0f}, allocated "
            f"{one['cuda_peak_allocated_bytes'] / MB:.0f}, host peak {one['peak_rss_bytes'] / MB:.0f} MB",
            flush=True,
        )
    for name in ("resident-again", "host"):
        ratio = summaries[name]["step_s"] / summaries["resident"]["step_s"]
        same = summaries[name]["trained_sha256"] == summaries["resident"]["trained_sha256"]
        pairs = enumerate(zip(losses["resident"], losses[name], strict=True))
        differ = [line for line, (one, other) in pairs if one != other]
        bits = (
            "equal bits" if same else f"DIFFERENT BITS, losses from line {differ[:1]} of the log on"
        )
        print(f"{name}: {bits}, {ratio:.2f} x the step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["all", "grid", "host"])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--only", nargs="+", help="sections of all: noise, step, peak, ...")
    parser.add_argument("--rows", type=Path, help="labelled rows in place of random ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", default=random_models.TOKENIZER)
    parser.add_argument(
        "--models", nargs="+", default=["smollm2-1.7b"], help="SHAPE or SHAPE:LAYERS"
    )
    parser.add_argument("--layers", type=int)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--requests", nargs="+", default=["label/lowrank+head"], help="KIND/TRAIN")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--detail", action="store_true")
    args = parser.parse_args()
    random_models.TOKENIZER = args.tokenizer
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    if args.what == "all":
        raise SystemExit(gpu_all.measure_all(args, run))
    {"grid": grid, "host": host}[args.what](args)


if __name__ == "__main__":
    main()
