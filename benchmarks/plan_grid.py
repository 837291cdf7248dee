"""How far is the plan above the measured peak? Runs over stores, batch sizes and lengths, each in its own process.

    python benchmarks/plan_grid.py --out DIR [--models smollm2-135m-instruct qwen2.5-0.5b] [--layers N]
        [--precisions fp32 bf16 int8 int4] [--batch-sizes 4 16 64] [--tokens 64 512] [--kind label]

The weights are random and of the card's shape, on disk as a Hugging Face directory. With --layers a model has fewer
blocks; its activations are as large, and its forward is faster. Rows have up to --tokens tokens, the longest exactly
that many. The plan has to be above the measured peak, by at most 5 % or 40 MB. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

TOKENIZER = "smollm2-135m-instruct"
CONFIGS = {
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "smollm2-360m-instruct": {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "smollm2-1.7b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 49152,
    },
}


def make_model(name: str, layers: int | None, folder: Path) -> Path:
    """A directory with random bf16 weights of the shape ``name``, one shard a block, and a real tokenizer."""
    made = folder / f"{name}-{layers or 'all'}"
    if (made / "done").exists():
        return made
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgezo.network import cards, loader

    made.mkdir(parents=True, exist_ok=True)
    values = dict(CONFIGS[name], tie_word_embeddings=True, max_position_embeddings=8192)
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    index = {}
    for key, parameter in dict(module.named_parameters()).items():
        part = key.split(".")[2] if ".layers." in key else key.split(".")[1]
        values_of = torch.randn(parameter.shape, generator=generator).mul_(0.02)
        if parameter.dim() == 1:
            values_of.add_(1.0 if "norm" in key else 0.0)
        shards.setdefault(part, {})[key] = values_of.bfloat16()
        index[key] = f"model-{part}.safetensors"
        if len(shards) > 1:  # only one shard stays in memory
            done = next(iter(shards))
            if done != part:
                save_file(shards.pop(done), made / f"model-{done}.safetensors", {"format": "pt"})
    for part, tensors in shards.items():
        save_file(tensors, made / f"model-{part}.safetensors", {"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": index})
    (made / "model.safetensors.index.json").write_text(text)
    config.architectures = [type(module).__name__]
    config.save_pretrained(made)
    loader.load_tokenizer(cards.resolve(TOKENIZER)).save_pretrained(made)
    (made / "done").touch()
    return made


def make_rows(tokens: int, kind: str, folder: Path) -> Path:
    """200 rows of random lengths, the longest of exactly ``tokens`` tokens, prompt included."""
    file = folder / f"{kind}-{tokens}.jsonl"
    generator = random.Random(0)
    lengths = [tokens] * 4 + [generator.randint(tokens // 4, tokens) for _ in range(196)]
    rest = 2 if kind == "label" else 0  # the template adds " It was"
    rows = [{"text": " the" * (n - rest)} for n in lengths]
    if kind == "label":
        rows = [{**row, "label": generator.randint(0, 1)} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS)[:2])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--kind", choices=["label", "text"], default="label")
    parser.add_argument("--train", default="lowrank+head")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("more", nargs="*", help="further options of edgezo finetune, after --")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{'model':24}{'store':>6}{'B':>4}{'tokens':>7}{'planned':>9}{'measured':>9}{'over':>7}")
    within = []
    grid = itertools.product(args.models, args.precisions, args.batch_sizes, args.tokens)
    for name, precision, batch, tokens in grid:
        model = make_model(name, args.layers, args.out)
        rows = make_rows(tokens, args.kind, args.out)
        label = f"{model.name}-{precision}-{batch}-{tokens}-{args.kind}-{args.train}"
        run = args.out / "runs" / label
        request = [
            "--model",
            model,
            "--data",
            rows,
            "--precision",
            precision,
            "--train",
            args.train,
        ]
        request += ["--batch-size", batch, "--micro-batch", batch, "--max-length", tokens]
        request += ["--steps", args.steps, "--eval-limit", 20, "--max-mem", "23GB", "--out", run]
        if args.kind == "label":
            request += ["--template", "{text} It was", "--labels", "0=bad,1=good"]
        if not (run / "summary.json").exists():
            command = [sys.executable, "-m", "edgezo", "finetune", *map(str, request), *args.more]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{label}: exit {done.returncode}\n{done.stderr[-800:]}")
                continue
        summary = json.loads((run / "summary.json").read_text())
        planned, measured = summary["planned_peak_bytes"], summary["peak_rss_bytes"]
        over = planned - measured
        kept = 0 <= over <= max(40e6, 0.05 * measured)
        within.append(kept)
        print(
            f"{model.name:24}{precision:>6}{batch:>4}{tokens:>7}{planned / 1e6:>9.0f}{measured / 1e6:>9.0f}"
            f"{over / 1e6:>7.0f}{'' if kept else '  MISSED'}",
            flush=True,
        )
    print(f"{sum(within)} of {len(within)} within 5 % or 40 MB above the measured peak")


if __name__ == "__main__":
    main()
