"""First-order baselines for ``edgezo bench``: transformers, peft and torch as people use them.

Runs as a process of its own: ``python -m edgezo.first_order '{"method": "lora", ...}'`` prints one JSON object. Of
edgezo only the meter is shared, which imports neither torch nor transformers, so that all methods are measured with
the same instrument.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.memory import Meter


class Recipe(NamedTuple):
    """How a baseline is set up; the field's names."""

    dtype: str
    lora: bool
    checkpointing: bool = False  # activations of a block are computed again in the backward pass
    int4: bool = False  # the base in quanto qint4


RECIPES = {
    "lora": Recipe("bfloat16", lora=True),
    "lora-checkpoint": Recipe("bfloat16", lora=True, checkpointing=True),
    "lora-checkpoint-int4": Recipe("bfloat16", lora=True, checkpointing=True, int4=True),
    "adamw": Recipe("float32", lora=False),
}
RANK = 8


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train ``steps`` steps.

    ``spec`` has method, model (a path), rows (a JSONL file), batch_size, tokens and steps.
    Peaks are by phase, in bytes: importing, loading, training.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = RECIPES[spec["method"]]
    meter = Meter(reset=True)
    path = Path(spec["model"])
    where = {"gguf_file": path.name} if path.is_file() else {}
    place = path.parent if path.is_file() else path
    tokenizer = AutoTokenizer.from_pretrained(place, **where)
    meter.mark("base")
    model: Any = AutoModelForCausalLM.from_pretrained(
        place, dtype=getattr(torch, recipe.dtype), **where
    )
    if recipe.int4:
        from optimum.quanto import freeze, qint4, quantize

        quantize(model, weights=qint4, exclude="lm_head")
        freeze(model)
    if recipe.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    meter.mark("load")

    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text().splitlines()]
    rows = tokenizer(texts, truncation=True, max_length=spec["tokens"])["input_ids"]
    ids = torch.tensor([row for row in rows if len(row) == spec["tokens"]])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    losses, times_s = [], []
    for step in range(spec["steps"]):
        begun_s = time.monotonic()
        picked = torch.arange(spec["batch_size"]).add(step * spec["batch_size"]) % len(ids)
        batch = ids[picked]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times_s.append(time.monotonic() - begun_s)
        losses.append(loss.item())
    meter.mark("train")
    found = meter.summary()
    return {
        "step_s": statistics.median(times_s),
        "losses": losses,
        "trained_parameters": sum(p.numel() for p in trained),
        "base_rss_bytes": found["base_rss_bytes"],
        "load_peak_rss_bytes": found["load_peak_rss_bytes"],
        "train_peak_rss_bytes": found["train_peak_rss_bytes"],
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
