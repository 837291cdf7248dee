"""What the metadata of a GGUF file says of its model: names of tensors, and a config for transformers.

Tables by llama.cpp architecture. Source: convert_hf_to_gguf.py of llama.cpp;
transformers/modeling_gguf_pytorch_utils.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import clip
from edgezo.weights.gguf_header import PLAIN_DTYPES, GgufHeader
from edgezo.weights.safetensors_file import read_into


@dataclass(frozen=True)
class Architecture:
    """How one llama.cpp architecture maps to a transformers model."""

    model_type: str
    names: dict[str, str]  # stem of a GGUF name -> Hugging Face name; {} is the block's number
    config: dict[str, str]  # metadata key without the architecture -> config key
    permuted: bool = False  # the rows of q and k are interleaved
    norm_plus_one: bool = False  # norm weights are stored as w + 1
    transposed: tuple[str, ...] = ()  # stems of Conv1D weights, which are stored (out, in)


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_PHI3_NAMES = _NAMES | {
    "attn_qkv": "model.layers.{}.self_attn.qkv_proj",
    "ffn_up": "model.layers.{}.mlp.gate_up_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}
_CONFIG = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
_REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_LLAMA_CONFIG = {"rope.dimension_count": "head_dim"} | _CONFIG  # an explicit key_length wins
_SLIDING = {"attention.sliding_window": "sliding_window"}
_SOFTCAP = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GPT2_CONFIG = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "embedding_length": "n_embd",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_ARCHITECTURES = {
    "llama": Architecture("llama", _NAMES, _LLAMA_CONFIG, permuted=True),
    "qwen2": Architecture("qwen2", _NAMES, _CONFIG),
    "qwen3": Architecture("qwen3", _NAMES, _CONFIG),
    "gemma2": Architecture(
        "gemma2", _GEMMA_NAMES, _CONFIG | _SLIDING | _SOFTCAP, norm_plus_one=True
    ),
    "gemma3": Architecture("gemma3_text", _GEMMA_NAMES, _CONFIG | _SLIDING, norm_plus_one=True),
    "phi3": Architecture("phi3", _PHI3_NAMES, _CONFIG | _SLIDING),
    "gpt2": Architecture(
        "gpt2",
        _GPT2_NAMES,
        _GPT2_CONFIG,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}
# These say how positions are rotated: part of the config, not weights.
IGNORED_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def architecture_of(header: GgufHeader) -> Architecture:
    """The table's entry for this file. Raises EdgezoError for an architecture that edgezo does not read."""
    if header.architecture not in _ARCHITECTURES:
        raise EdgezoError(
            f"{header.path} holds a model of architecture {clip(header.architecture, 60)!r}. "
            f"edgezo reads GGUF files of {', '.join(_ARCHITECTURES)}."
        )
    return _ARCHITECTURES[header.architecture]


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Keyword arguments of ``AutoConfig.for_model`` for the model in this file.

    Raises EdgezoError where metadata and tensors disagree, or where rotary positions are scaled in a way that cannot
    be taken over.
    """
    arch = architecture_of(header)
    config: dict[str, Any] = {"model_type": arch.model_type}
    for key, target in arch.config.items():
        if (value := _number(header, f"{header.architecture}.{key}")) is not None:
            config[target] = value
    _check_sizes(header, arch, config)
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if "num_attention_heads" in config and "head_dim" not in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    _check_heads(header, config)
    if "blk.0.attn_q.bias" in header.tensors and arch.model_type == "llama":
        config["attention_bias"] = True
    if (header.architecture, config.get("num_hidden_layers")) in (("gemma2", 46), ("gemma3", 62)):
        # The 27B models scale attention by the mean width of a head; no key of the file says so.
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    for role in ("bos", "eos"):
        config[f"{role}_token_id"] = _number(header, f"tokenizer.ggml.{role}_token_id")
    config["pad_token_id"] = _number(header, "tokenizer.ggml.padding_token_id")
    if arch.model_type != "gpt2":
        config["rope_parameters"] = _rope(header, config)
    return config


def _number(header: GgufHeader, key: str, default: float | None = None) -> Any:
    """A number of the metadata; ``default`` where it has none. Raises EdgezoError for something else."""
    value = header.metadata.get(key, default)
    if value is None or (type(value) in (int, float) and math.isfinite(value)):
        return value
    raise EdgezoError(
        f"{header.path}: the metadata has no number under {clip(key, 60)!r}. Fetch the file again."
    )


def _check_sizes(header: GgufHeader, arch: Architecture, config: dict[str, Any]) -> None:
    """EdgezoError unless the metadata has the sizes that every model needs, and the tensors have these sizes."""
    stated_sizes = {key: config.get(arch.config[key]) for key in _REQUIRED}
    needed = [k for k, v in stated_sizes.items() if type(v) is not int or v < 1]
    if needed:
        raise EdgezoError(f"{header.path}: the metadata has no usable {', '.join(needed)}.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise EdgezoError(f"{header.path} has no token_embd.weight, so it is no language model.")
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    stated = (config[arch.config["block_count"]], config[arch.config["embedding_length"]])
    if stated != (len(blocks), embedding.shape[-1]):
        raise EdgezoError(
            f"{header.path}: the metadata states {stated[0]} blocks of width {stated[1]}, the "
            f"tensors are {len(blocks)} of width {embedding.shape[-1]}. Fetch the file again."
        )


def _check_heads(header: GgufHeader, config: dict[str, Any]) -> None:
    """EdgezoError where the attention output takes another width than all heads have together."""
    output = header.tensors.get("blk.0.attn_output.weight")
    width = config.get("num_attention_heads", 0) * config.get("head_dim", 0)
    if output is not None and width and output.shape[-1] != width:
        raise EdgezoError(
            f"{header.path}: the metadata states heads of {width} values together, the attention "
            f"output takes {output.shape[-1]}. Fetch the file again."
        )


def _rope(header: GgufHeader, config: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of the config. Raises EdgezoError for a scaling that a GGUF does not fully describe."""
    theta = float(_number(header, f"{header.architecture}.rope.freq_base", 10000.0))
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "rope_factors_long.weight" in header.tensors:
        raise EdgezoError(
            f"{header.path} scales its rotary positions ({clip(str(scaling), 60)}), which edgezo cannot take "
            "from a GGUF. Use the safetensors checkpoint of this model."
        )
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        factor = float(_number(header, f"{header.architecture}.rope.scaling.factor", 1.0))
        plain = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if header.architecture == "gemma3":
        # llama.cpp states one base; the sliding layers of every Gemma 3 use this one, unscaled.
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return {"full_attention": plain, "sliding_attention": local}
    if "rope_freqs.weight" in header.tensors:
        return _llama3_rope(header, theta, config["head_dim"])
    return plain


def _llama3_rope(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """The rule by which Llama 3.x scales its frequencies: the file has the factor of each frequency instead.

    Raises EdgezoError where the factors do not follow from that rule.
    """
    known = header.tensors["rope_freqs.weight"].shape == (head_dim // 2,)
    factors = _read_plain(header, "rope_freqs.weight").double() if known else torch.ones(1)
    factor = factors.max().item()
    rule = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    wavelength = 2 * math.pi * theta ** (torch.arange(0, 2 * len(factors), 2).double() / head_dim)
    smooth = ((8192 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not known or not torch.allclose(factors, expected, rtol=1e-3):
        raise EdgezoError(
            f"{header.path} has rotary frequency factors that are not Llama 3's. "
            "Use the safetensors checkpoint of this model."
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "original_max_position_embeddings": 8192,
        **rule,
    }


def _read_plain(header: GgufHeader, name: str) -> Tensor:
    """A small tensor that must be stored as plain numbers."""
    tensor = header.tensors[name]
    if tensor.type not in PLAIN_DTYPES:
        raise EdgezoError(f"{header.path}: {name} is quantised, which no converter does.")
    raw = bytearray(tensor.size_bytes)
    read_into(header.path, tensor.offset, memoryview(raw), name)
    return torch.frombuffer(raw, dtype=PLAIN_DTYPES[tensor.type]).view(tensor.shape)
