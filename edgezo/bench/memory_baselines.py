"""Baselines of ``bench memory``: LoRA and AdamW with stock transformers, peft and PyTorch, and MeZO as published.

A baseline is a process of its own: ``python -m edgezo.bench.memory_baselines '{"method": "lora", ...}'`` prints one
JSON object. Of edgezo it uses the meter and the facts of the machine, so that every method is measured with the same
instrument; neither of them imports torch or transformers.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.machine.clock import now_s
from edgezo.machine.hardware import Gpu, machine
from edgezo.machine.process_memory import Meter


class BaselineSetup(NamedTuple):
    """How the model of a baseline is set up and trained."""

    dtype: str  # of torch
    lora: bool = False
    checkpointing: bool = False  # activations of a block are computed again in the backward pass
    int4: bool = False  # the base is quantised to quanto's qint4
    forwards_only: bool = False  # MeZO: the weights are perturbed and restored in place


SETUPS = {
    "lora": BaselineSetup("bfloat16", lora=True),
    "lora-checkpoint": BaselineSetup("bfloat16", lora=True, checkpointing=True),
    "lora-checkpoint-int4": BaselineSetup("bfloat16", lora=True, checkpointing=True, int4=True),
    "adamw": BaselineSetup("float32"),
    "mezo-in-place": BaselineSetup("bfloat16", forwards_only=True),
}
RANK = 8  # of LoRA
SIGMA = 1e-3  # of MeZO


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for ``steps`` steps; returns peaks by phase (imports, loading, training) and of the GPU, in bytes.

    ``spec`` has method, model (a path), rows (a JSONL file), batch_size, tokens, steps and device (cpu or cuda).
    """
    gpu = machine().gpu if spec["device"] == "cuda" else None  # before this process takes any of it
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    meter, setup = Meter(reset=True), SETUPS[spec["method"]]
    path = Path(spec["model"])
    where = {"gguf_file": path.name} if path.is_file() else {}
    place = path.parent if path.is_file() else path
    tokenizer = AutoTokenizer.from_pretrained(place, **where)
    meter.mark("base")
    dtype = getattr(torch, setup.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **where)
    model = _prepared(model, setup).to(spec["device"])
    meter.mark("load")
    figures = _train(model, tokenizer, spec)
    meter.mark("train")
    phases = meter.summary()
    names = ("base_rss_bytes", "load_peak_rss_bytes", "train_peak_rss_bytes")
    on_gpu = {} if gpu is None else {"cuda_peak_bytes": _gpu_peak_bytes(gpu)}
    return on_gpu | figures | {name: phases[name] for name in names}


def _prepared(model: Any, setup: BaselineSetup) -> Any:
    """The model quantised, with LoRA and with checkpointing as the setup asks, ready to be trained."""
    if setup.int4:
        from optimum.quanto import freeze, qint4, quantize

        quantize(model, weights=qint4, exclude="lm_head")
        freeze(model)
    if setup.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    if setup.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    return model


def _train(model: Any, tokenizer: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Make the steps, on the rows of exactly ``tokens`` tokens; returns the figures that are no peaks of memory."""
    import torch

    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text().splitlines()]
    rows = tokenizer(texts, truncation=True, max_length=spec["tokens"])["input_ids"]
    ids = torch.tensor([row for row in rows if len(row) == spec["tokens"]], device=spec["device"])
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss_of(batch: Any) -> Any:
        return model(input_ids=batch, labels=batch).loss

    make_step = mezo_in_place if SETUPS[spec["method"]].forwards_only else _adamw
    one_step = make_step(trained, loss_of)
    losses, times_s = [], []
    for step in range(spec["steps"]):
        begun_s = now_s()
        picked = torch.arange(spec["batch_size"]).add(step * spec["batch_size"]) % len(ids)
        batch = ids[picked]
        losses.append(one_step(batch))
        times_s.append(now_s() - begun_s)
    return {
        "step_s": statistics.median(times_s),
        "losses": losses,
        "trained_parameters": sum(p.numel() for p in trained),
    }


def _gpu_peak_bytes(gpu: Gpu) -> int:
    """GPU memory that this process took at most: the driver's context, and what the allocator reserved."""
    import torch

    taken_bytes = gpu.available_bytes - torch.cuda.mem_get_info()[0]
    context_bytes = taken_bytes - torch.cuda.memory_reserved()
    return context_bytes + torch.cuda.max_memory_reserved()


def _adamw(trained: list[Any], loss_of: Callable[[Any], Any]) -> Callable[[Any], float]:
    """A function that makes AdamW's step on a batch and returns its loss; ``loss_of``: mean loss of a batch."""
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
    """A function that makes MeZO's step on a batch (arXiv 2305.17333, algorithm 1) and returns the mean of both losses.

    The step has one direction, which is drawn again from its seed for every use. ``loss_of``: mean loss of a batch.
    """
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
        for scale in (SIGMA, -2 * SIGMA):
            move(scale)
            losses.append(float(loss_of(batch)))
        move(SIGMA)
        move(-1e-6 * (losses[0] - losses[1]) / (2 * SIGMA))
        return sum(losses) / 2

    return step


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
