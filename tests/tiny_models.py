"""Small random models of every family, written to disk the way real ones are published.

Sizes are irregular on purpose, biases are not zero and norm weights not one, so that a swapped,
transposed or forgotten tensor shows in the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

VOCAB = 300
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE_HEADS = {"head_dim": 16, "num_attention_heads": 4}
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}

# family -> config values; "tied" is what models of the family usually are
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DECODER | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": _DECODER | {"sliding_window": None, "tie_word_embeddings": False},
    "qwen2": _DECODER | {"tie_word_embeddings": True},
    "qwen3": _DECODER | _WIDE_HEADS | {"tie_word_embeddings": True},
    "gemma2": _DECODER | _WIDE_HEADS | _GEMMA | {"tie_word_embeddings": True},
    "gemma3_text": _DECODER
    | _WIDE_HEADS
    | _GEMMA
    | {"num_hidden_layers": 3, "sliding_window_pattern": 3, "tie_word_embeddings": True},
    "phi3": _DECODER | {"tie_word_embeddings": False},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 48,
        "n_inner": 80,
        "n_layer": 2,
        "n_head": 6,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    "roberta": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 130,
        "type_vocab_size": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
}
FAMILIES = tuple(_CONFIGS)


def auto_class(family: str) -> Any:
    return AutoModelForMaskedLM if family == "roberta" else AutoModelForCausalLM


def random_model(family: str, *, seed: int = 0, tied: bool | None = None, **changes: Any) -> Any:
    """The transformers module in eval mode, float32, every parameter random."""
    values = _CONFIGS[family] | changes
    if tied is not None:
        values = values | {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(family, **values)
    model = auto_class(family).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and name.endswith("weight") and "gemma" not in family
            parameter.copy_(0.3 * noise + 1.0 if norm else 0.3 * noise)
    return model


def make(
    family: str,
    directory: Path,
    *,
    seed: int = 0,
    tied: bool | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tokenizer: bool = False,
    **changes: Any,
) -> Path:
    """Write a Hugging Face model directory and return it. ``shards`` > 1 writes an index too."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = random_model(family, seed=seed, tied=tied, **changes)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    official = {name for name, _ in model.named_parameters()}
    tensors = {n: t.to(dtype).contiguous() for n, t in model.state_dict().items() if n in official}
    write_weights(directory, tensors, shards)
    if tokenizer:
        make_tokenizer(directory)
    return directory


def write_weights(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """``model.safetensors``, or shards with an index that deals the tensors out in turn."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# ----------------------------------------------------------------------------- tokenizer


def byte_vocabulary() -> list[str]:
    """VOCAB tokens: four special ones, every byte, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    merged = [left + right for left, right in _merges()]
    tokens = special + alphabet + merged
    return tokens + [f"<unused{i}>" for i in range(VOCAB - len(tokens))]


def _merges() -> list[tuple[str, str]]:
    words = [("Ġ", "t"), ("h", "e"), ("Ġ", "a"), ("i", "n"), ("Ġt", "he"), ("o", "o"), ("d", ".")]
    return [*words, ("Ġ", "g"), ("Ġg", "oo"), ("b", "a")]


def make_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer with a chat template; id 3 is the mask."""
    vocabulary = {token: i for i, token in enumerate(byte_vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<mask>"])
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)

# ----------------------------------------------------------------------------- GGUF

# What llama.cpp's converter calls each Hugging Face module, by the gguf package's own table.
_GGUF_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}


def make_gguf(
    model: Any,
    file: Path,
    *,
    matrix_type: str = "F32",
    tokenizer: bool = False,
    metadata: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a module as GGUF the way llama.cpp's converter does.

    ``metadata`` has values by key that replace the converter's; None takes a key away. ``more`` are tensors that no
    parameter of the module has.

    Matrices are stored as ``matrix_type``, vectors as F32. K-quants, which the gguf package
    cannot write, get random blocks with small scales. Returns the stored bytes by GGUF name.
    """
    config = model.config
    arch = _GGUF_ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    inner = config.n_inner if arch == "gpt2" else config.intermediate_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        rope = config.rope_parameters
        theta = rope.get("rope_theta") or rope["full_attention"]["rope_theta"]
        writer.add_rope_freq_base(float(theta))
    if "gemma" in arch:
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if tokenizer:
        _add_tokenizer(writer)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            unsigned = type(value) is int and value >= 2**31
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if unsigned else kind)
    stored = {}
    generator = np.random.default_rng(0)
    for name, values in _converted(model, arch).items():
        kind = gguf.GGMLQuantizationType[matrix_type if values.ndim == 2 else "F32"]
        stored[name] = _encoded(values, kind, generator)
        writer.add_tensor(name, stored[name], raw_dtype=kind)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _converted(model: Any, arch: str) -> dict[str, np.ndarray]:
    config = model.config
    architecture = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy().copy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_" in name else config.num_key_value_heads
            split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = split.swapaxes(1, 2).reshape(values.shape)
        if "gemma" in arch and name.endswith("norm.weight"):
            values = values + 1
        if arch == "gpt2" and values.ndim == 2 and ".h." in name:
            values = values.T
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        found[stored] = np.ascontiguousarray(values)
    return found


def _encoded(values: np.ndarray, kind: Any, generator: np.random.Generator) -> np.ndarray:
    try:
        return quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values.shape, kind, generator)


def random_blocks(shape: tuple[int, ...], kind: Any, generator: np.random.Generator) -> np.ndarray:
    """Random bytes as blocks of ``kind``, with finite float16 scales: (rows, row bytes) uint8."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = int(np.prod(shape[:-1])), shape[-1] // block
    raw = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    scale = generator.uniform(1e-3, 1e-2, (rows, blocks, 2)).astype(np.float16).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.Q6_K:
        raw[..., -2:] = scale[..., :2]
    else:
        raw[..., :4] = scale
    return raw.reshape(rows, blocks * size)


def _add_tokenizer(writer: Any) -> None:
    tokens = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if i < 4 else normal for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in _merges()])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
