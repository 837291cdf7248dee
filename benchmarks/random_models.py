"""Models with random weights of published shapes, and rows of a given length, for measurements of memory and speed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

TOKENIZER = "smollm2-135m-instruct"


def _decoder(
    family: str, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    """The config of a model with rotary positions."""
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        **more,
    }


QWEN_WORDS = {"vocab_size": 151936}
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": _decoder("llama", 576, 1536, 30, 9, 3),
    "smollm2-360m-instruct": _decoder("llama", 960, 2560, 32, 15, 5),
    "smollm2-1.7b": _decoder("llama", 2048, 8192, 24, 32, 32),
    "llama-3-8b": _decoder(
        "llama", 4096, 14336, 32, 32, 8, vocab_size=128256, tie_word_embeddings=False
    ),
    "qwen2.5-0.5b": _decoder("qwen2", 896, 4864, 24, 14, 2, **QWEN_WORDS),
    "qwen2.5-1.5b": _decoder("qwen2", 1536, 8960, 28, 12, 2, **QWEN_WORDS),
    "qwen3-0.6b": _decoder("qwen3", 1024, 3072, 28, 16, 8, head_dim=128, **QWEN_WORDS),
    "gemma-3-270m": _decoder(
        "gemma3_text", 640, 2048, 18, 4, 1, head_dim=256, vocab_size=262144, sliding_window=512
    ),
    # Of a third of Phi-3-mini's width, with the tokenizer's vocabulary.
    "phi-3-third": _decoder("phi3", 1024, 2816, 32, 16, 16, tie_word_embeddings=False),
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
    "opt-125m": {
        "model_type": "opt",
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "tie_word_embeddings": True,
    },
}


def add_rehearsal(tokenizer: str) -> None:
    """A tiny shape, "rehearsal", with the vocabulary of a tokenizer."""
    from edgezo.network import cards, loader

    words = len(loader.load_tokenizer(cards.resolve(tokenizer)))
    CONFIGS["rehearsal"] = _decoder("llama", 64, 128, 2, 4, 2, vocab_size=words)


def make_model(name: str, layers: int | None, folder: Path, *, alike: bool = False) -> Path:
    """A directory with random bf16 weights of the shape ``name``, one shard a block, and a real tokenizer.

    With ``layers`` it has fewer blocks than published: its activations are as large, and its forward is faster.
    ``alike``: matrices of one shape have the same values, which is faster.
    """
    made = folder / f"{name}-{layers or 'all'}"
    if (made / "done").exists():
        return made
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgezo.network import cards, loader

    made.mkdir(parents=True, exist_ok=True)
    values = dict(CONFIGS[name])
    depth = "n_layer" if "n_layer" in values else "num_hidden_layers"
    values[depth] = layers or values[depth]
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    made_before: dict[torch.Size, torch.Tensor] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    index = {}
    for key, parameter in dict(module.named_parameters()).items():
        block = [word for word in key.split(".") if word.isdecimal()]
        part = block[0] if block else key.split(".")[-2]
        known = made_before.get(parameter.shape) if alike else None
        if known is None:
            known = torch.randn(parameter.shape, generator=generator).mul_(0.02)
            made_before[parameter.shape] = known.bfloat16() if alike else known
        drawn = known.clone() if alike else known
        if parameter.dim() == 1 and key.endswith("weight") and "gemma" not in name:
            drawn.add_(1.0)
        shards.setdefault(part, {})[key] = drawn.bfloat16()
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


# ---------------------------------------------------------------------------------------------
# Rows

Words = Callable[[int], str]  # text of so many tokens
# Label words of several tokens, many of which begin alike.
TOPICS = [
    f"{a} {b} {c}"
    for a in ("card", "top up", "cash")
    for b in ("not", "was", "by")
    for c in ("late", "lost")
]
LABELS = ["--template", "{text} It was", "--labels", "0=bad,1=good"]


def _conversation(n: int, words: Words, draw: random.Random) -> dict[str, Any]:
    turns = [(role, words(max(1, n // 4))) for role in ("user", "assistant") * 2]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def _pair(n: int, words: Words, draw: random.Random) -> dict[str, Any]:
    prompt, answer = words(n - n // 2), max(1, n // 2)
    return {"prompt": prompt, "chosen": words(answer), "rejected": words(draw.randint(1, answer))}


# How a row of about so many tokens is made, and the options that it needs.
KINDS: dict[str, tuple[Callable[[int, Words, random.Random], dict[str, Any]], list[str]]] = {
    # The template adds " It was", two tokens.
    "label": (lambda n, words, draw: {"text": words(n - 2), "label": draw.randint(0, 1)}, LABELS),
    "text": (lambda n, words, draw: {"text": words(n)}, []),
    "completion": (
        lambda n, words, draw: {"prompt": words(n - n // 4), "completion": words(max(1, n // 4))},
        [],
    ),
    # Answers are written too, and scored.
    "written": (
        lambda n, words, draw: {"prompt": words(n - 4), "completion": words(4)},
        ["--max-new-tokens", "8"],
    ),
    "messages": (_conversation, []),
    # The prompt adds a new line and "Label:".
    "topics": (
        lambda n, words, draw: {"text": words(max(1, n - 12)), "label": draw.choice(TOPICS)},
        [],
    ),
    "pairs": (_pair, []),
}


@cache
def single_words() -> tuple[str, ...]:
    """Words of one token each, with the space before them."""
    from edgezo.network import cards, loader

    tokenizer = loader.load_tokenizer(cards.resolve(TOKENIZER))
    texts = (tokenizer.decode([i]) for i in range(500, 12_000))
    words = [
        text for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()
    ]
    return tuple(word for word in words if len(tokenizer(word)["input_ids"]) == 1)


def make_texts(tokens: int, folder: Path, count: int = 64) -> Path:
    """A file of texts that are longer than ``tokens`` tokens."""
    file = folder / f"long-{tokens}.jsonl"
    draw = random.Random(0)
    texts = (
        " ".join(draw.choices("warm cold bright dull".split(), k=2 * tokens)) for _ in range(count)
    )
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def make_rows(tokens: int, kind: str, folder: Path, count: int = 200) -> Path:
    """A file of ``count`` rows of random lengths, the longest of ``tokens`` tokens, prompt included."""
    file = folder / f"{kind}-{tokens}-{count}.jsonl"
    make, _ = KINDS[kind]
    draw = random.Random(0)
    lengths = [tokens] * 4 + [draw.randint(max(6, tokens // 4), tokens) for _ in range(count - 4)]

    def words(n: int) -> str:
        return "".join(draw.choices(single_words(), k=n))

    rows = [make(n, words, draw) for n in lengths]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
