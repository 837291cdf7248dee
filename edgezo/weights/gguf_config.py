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

    def shifts(self, name: str) -> bool:
        """Whether a Hugging Face parameter is stored as w + 1."""
        return self.norm_plus_one and name.endswith("norm.weight")


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
LARGEST_GEMMA = (("gemma2", 46), ("gemma3", 62))  # architecture and blocks of the 27B models
_ARCHITECTURES = {
    "llama": Architecture("llama", _NAMES, _CONFIG, permuted=True),
    "qwen2": Architecture("qwen2", _NAMES, _CONFIG),
    "qwen3": Architecture("qwen3", _NAMES, _CONFIG),
    "gemma2": Architecture(
        "gemma2", _GEMMA_NAMES, _CONFIG | _SLIDING | _SOFTCAP, norm_plus_one=True
    ),
    "gemma3": Architecture(
        "gemma3_text", _GEMMA_NAMES, _CONFIG | _SLIDING | _SOFTCAP, norm_plus_one=True
    ),
    "phi3": Architecture("phi3", _PHI3_NAMES, _CONFIG | _SLIDING),
    "gpt2": Architecture(
        "gpt2",
        _GPT2_NAMES,
        _GPT2_CONFIG,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}
# Texts of tokens that end a turn or a text (llama.cpp knows the same ones by their texts).
END_MARKS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] "
    "<|end_of_text|> <end_of_utterance> <eos> </s> <\uff5cend\u2581of\u2581sentence\uff5c>".split()
)
# These say how positions are rotated: part of the config, not weights.
IGNORED_TENSORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def architectures() -> dict[str, Architecture]:
    """The architectures that edgezo reads and writes, by llama.cpp's names."""
    return _ARCHITECTURES


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

    Raises EdgezoError where metadata and tensors disagree, and for what cannot be taken over: a way to scale rotary
    positions, or a number with which another family computes.
    """
    arch = architecture_of(header)
    _refuse_other_numbers(header)
    config: dict[str, Any] = {"model_type": arch.model_type}
    for key, target in arch.config.items():
        value = _number(header, f"{header.architecture}.{key}")
        if value is not None and (value != 0 or target in _ZERO_IS_NONE):
            config[target] = value
    _check_sizes(header, arch, config)
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if "num_attention_heads" in config:
        _head_sizes(header, config)
    _check_heads(header, config)
    if "blk.0.attn_q.bias" in header.tensors and arch.model_type == "llama":
        config["attention_bias"] = True
    if "blk.0.ffn_gate.bias" in header.tensors and arch.model_type == "llama":
        config["mlp_bias"] = True
    if "gemma" in header.architecture:
        # No key of the file says what attention is scaled by: the width of a head, and in the 27B models their mean.
        largest = (header.architecture, config.get("num_hidden_layers")) in LARGEST_GEMMA
        mean_width = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = mean_width if largest else config["head_dim"]
    _window_layers(header, config)
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = token_id(header, f"tokenizer.ggml.{key}_token_id", config["vocab_size"])
        config[f"{role}_token_id"] = value
    if arch.model_type != "gpt2":
        config["rope_parameters"] = _rope(header, config)
    return config


# 0 is none for these; for other sizes it is a size that the file does not state.
_ZERO_IS_NONE = frozenset({"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"})


def _head_sizes(header: GgufHeader, config: dict[str, Any]) -> None:
    """Width of a head, number of key heads and the share of a head that is rotated, stated or not."""
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    output = header.tensors.get("blk.0.attn_output.weight")
    if "head_dim" not in config:
        columns = config["hidden_size"] if output is None else output.shape[-1]
        config["head_dim"] = columns // heads
    width = config["head_dim"]
    prefix = header.architecture
    rotated = _number(header, f"{prefix}.rope.dimension_count") or width
    if rotated != width:
        if prefix != "phi3" or not 0 < rotated < width:
            raise EdgezoError(
                f"{header.path} rotates {rotated} of the {width} values of a head, which edgezo computes for phi3 "
                "only. Use the safetensors checkpoint of this model."
            )
        config["partial_rotary_factor"] = rotated / width
    values = _number(header, f"{prefix}.attention.value_length") or width
    if values != width:
        raise EdgezoError(
            f"{header.path} has heads of {width} values for keys and {values} for values, which edgezo does not "
            "compute. Use the safetensors checkpoint of this model."
        )


def _window_layers(header: GgufHeader, config: dict[str, Any]) -> None:
    """Which layers have the window, where the file says so: each layer, or all but every n-th."""
    key = f"{header.architecture}.attention.sliding_window_pattern"
    pattern, layers = header.metadata.get(key), config.get("num_hidden_layers", 0)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    if isinstance(pattern, list) and len(pattern) == layers and "gemma" in header.architecture:
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[bool(windowed)] for windowed in pattern]


# Keys with numbers that other architectures compute with -> the numbers that change nothing.
_OTHER_NUMBERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0, 1)),
    **dict.fromkeys(("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias"), (0,)),
    **dict.fromkeys(("expert_count", "expert_used_count", "leading_dense_block_count"), (0,)),
    "attention.causal": (True, 1),
    "use_parallel_residual": (False, 0),
    "rope.scaling.attn_factor": (0, 1),
    **dict.fromkeys(("router_logit_softcapping", "attention.temperature_scale"), (0,)),
}
# Keys that change nothing in what is computed, or that this module and gguf_file.py read.
_READ_KEYS = frozenset(
    "rope.freq_base rope.freq_base_swa rope.dimension_count rope.scaling.type rope.scaling.factor rope.scale_linear "
    "rope.scaling.original_context_length rope.scaling.finetuned attention.key_length attention.value_length "
    "attention.sliding_window attention.sliding_window_pattern attention.key_length_swa attention.value_length_swa "
    "rope.dimension_count_swa attention.group_norm_epsilon vocab_size tensor_data_layout "
    "attention.layer_norm_epsilon attention.layer_norm_rms_epsilon pooling_type n_ctx".split()
)


def _refuse_other_numbers(header: GgufHeader) -> None:
    """EdgezoError for a number in the metadata with which this architecture does not compute here."""
    for key, neutral in _OTHER_NUMBERS.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is None or value in neutral:
            continue
        raise EdgezoError(
            f"{header.path} sets {header.architecture}.{key} to {clip(repr(value), 60)}, with which edgezo does not "
            "compute: the model would be another one. Use the safetensors checkpoint of this model."
        )


def metadata_notes(header: GgufHeader) -> list[str]:
    """A note on keys of the architecture that are not read."""
    prefix = f"{header.architecture}."
    arch = architecture_of(header)
    read = _READ_KEYS | _OTHER_NUMBERS.keys() | arch.config.keys()
    unread = [
        key
        for key, value in header.metadata.items()
        if key.startswith(prefix) and key.removeprefix(prefix) not in read and value not in (0, "")
    ]
    if not unread:
        return []
    listed = ", ".join(clip(key, 60) for key in unread[:4]) + (", ..." if len(unread) > 4 else "")
    return [
        f"{header.path} states what edgezo does not read ({listed}): if it changes what the model computes, "
        "use the safetensors checkpoint of this model"
    ]


def token_id(header: GgufHeader, key: str, count: int) -> int | None:
    """A token by a key of the metadata; None where there is none, which is also written as -1 or a number too large."""
    value = header.metadata.get(key)
    return value if type(value) is int and 0 <= value < count else None


def gguf_end_ids(header: GgufHeader) -> set[int]:
    """Tokens that end a text or a turn: by the metadata, and by their texts."""
    tokens = header.texts("tokenizer.ggml.tokens")
    stated = {
        token_id(header, f"tokenizer.ggml.{role}_token_id", len(tokens))
        for role in ("eos", "eot", "eom")
    }
    by_text = {number for number, text in enumerate(tokens) if text in END_MARKS}
    return by_text | {number for number in stated if number is not None}


# Keys that may have a number for each layer.
_OF_EACH_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")


def head_count(header: GgufHeader, keys: bool) -> int:
    """Attention heads, or with ``keys`` those of keys and values; 0 where the metadata has no such number."""
    prefix = f"{header.architecture}.attention.head_count"
    heads = _number(header, prefix)
    count = (_number(header, f"{prefix}_kv") or heads) if keys else heads
    return count if type(count) is int else 0


def _number(header: GgufHeader, key: str) -> Any:
    """A number of the metadata, or the one number of a list of equal ones; None where it has none.

    Raises EdgezoError for something else.
    """
    value = header.metadata.get(key)
    if key.endswith(_OF_EACH_LAYER) and isinstance(value, list) and value:
        value = value[0] if all(v == value[0] for v in value) else value
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
    prefix = f"{header.architecture}.rope"
    theta = float(_number(header, f"{prefix}.freq_base") or 10000.0)
    # As llama.cpp has it: a factor without a type scales linearly, and 0 is no factor.
    stated = _number(header, f"{prefix}.scaling.factor") or _number(
        header, f"{prefix}.scale_linear"
    )
    factor = float(stated or 1.0)
    scaling = header.metadata.get(f"{prefix}.scaling.type") or "linear"
    if scaling not in ("none", "linear") or "rope_factors_long.weight" in header.tensors:
        raise EdgezoError(
            f"{header.path} scales its rotary positions ({clip(str(scaling), 60)}), which edgezo cannot take "
            "from a GGUF. Use the safetensors checkpoint of this model."
        )
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear" and factor != 1.0:
        plain = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if header.architecture == "gemma3":
        # Older files state one base; the sliding layers of every Gemma 3 use this one, unscaled.
        local_base = float(_number(header, f"{prefix}.freq_base_swa") or 10000.0)
        local = {"rope_type": "default", "rope_theta": local_base}
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
    read_into(tensor.file, tensor.offset, memoryview(raw), name)
    return torch.frombuffer(raw, dtype=PLAIN_DTYPES[tensor.type]).view(tensor.shape)
