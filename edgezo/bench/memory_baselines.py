"""Baselines for ``edgezo bench``: transformers, peft and torch as people use them, and MeZO as published.

Runs as a process of its own: ``python -m edgezo.bench.memory_baselines '{"method": "lora", ...}'`` prints one JSON
object. Of edgezo only the meter and the machine's facts are shared, which import neither torch nor transformers, so
that all methods are measured with the same instrument.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Meter


class Recipe(NamedTuple):
    """How a baseline is set up; the field's names."""

    dtype: str
    lora: bool = False
    checkpointing: bool = False  # activations of a block are computed again in the backward pass
    int4: bool = False  # the base in quanto qint4
    forwards_only: bool = False  # MeZO: the weights move there and back in place


RECIPES = {
    "lora": Recipe("bfloat16", lora=True),
    "lora-checkpoint": Recipe("bfloat16", lora=True, checkpointing=True),
    "lora-checkpoint-int4": Recipe("bfloat16", lora=True, checkpointing=True, int4=True),
    "adamw": Recipe("float32"),
    "mezo-in-place": Recipe("bfloat16", forwards_only=True),
}
RANK = 8
SIGMA = 1e-3


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train ``steps`` steps.

    ``spec`` has method, model (a path), rows (a JSONL file), batch_size, tokens, steps and device (cpu or cuda).
    Peaks are by phase, in bytes: importing, loading, training; and the GPU's over all.
    """
    gpu = machine().gpu if spec["device"] == "cuda" else None  # before this process takes any of it
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
    model.to(spec["device"])
    model.config.use_cache = False
    model.train()
    meter.mark("load")

    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text().splitlines()]
    rows = tokenizer(texts, truncation=True, max_length=spec["tokens"])["input_ids"]
    ids = torch.tensor([row for row in rows if len(row) == spec["tokens"]], device=spec["device"])
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss_of(batch: Any) -> Any:
        return model(input_ids=batch, labels=batch).loss

    one_step = (mezo_in_place if recipe.forwards_only else _backward)(trained, loss_of)
    losses, times_s = [], []
    for step in range(spec["steps"]):
        begun_s = time.monotonic()
        picked = torch.arange(spec["batch_size"]).add(step * spec["batch_size"]) % len(ids)
        batch = ids[picked]
        losses.append(one_step(batch))
        times_s.append(time.monotonic() - begun_s)
    meter.mark("train")
    found = meter.summary()
    on_gpu = {}
    if gpu is not None:
        taken = gpu.available_bytes - torch.cuda.mem_get_info()[0]
        context = taken - torch.cuda.memory_reserved()
        on_gpu["cuda_peak_bytes"] = context + torch.cuda.max_memory_reserved()
    return on_gpu | {
        "step_s": statistics.median(times_s),
        "losses": losses,
        "trained_parameters": sum(p.numel() for p in trained),
        "base_rss_bytes": found["base_rss_bytes"],
        "load_peak_rss_bytes": found["load_peak_rss_bytes"],
        "train_peak_rss_bytes": found["train_peak_rss_bytes"],
    }


def _backward(trained: list[Any], loss_of: Callable[[Any], Any]) -> Callable[[Any], float]:
    """AdamW's step on a batch, of which ``loss_of`` gives the mean loss."""
    import torch

    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(batch: Any) -> float:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def mezo_in_place(trained: list[Any], loss_of: Callable[[Any], Any]) -> Callable[[Any], float]:
    """MeZO's step (arXiv 2305.17333, algorithm 1): one direction for the batch, drawn again from its seed."""
    import torch

    generator = torch.Generator(trained[0].device)

    @torch.no_grad()
    def step(batch: Any) -> float:
        seed = generator.seed()

        def move(scale: float) -> None:
            generator.manual_seed(seed)
            for weight in trained:
                noise = torch.empty_like(weight).normal_(generator=generator)
                weight.add_(noise, alpha=scale)

        losses = []
        for there in (SIGMA, -2 * SIGMA):
            move(there)
            losses.append(float(loss_of(batch)))
        move(SIGMA)
        move(-1e-6 * (losses[0] - losses[1]) / (2 * SIGMA))
        return sum(losses) / 2

    return step


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
