"""What a model's config may say: sizes, numbers, switches and a few words, all of them in the lists below.

transformers reads far more out of a config: names of classes, of kernels on the hub, of quantisers, each of which
chooses code that is imported or fetched. So a config is not handed to it. An object of the family's config class is
made of the fields in the lists, each of its kind; whatever else a config says is left out. A field that the class knows
and the lists do not is refused, unless it has its default: it might change what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import clip, read_json, reading
from edgezo.network.config_values import NO_SCALING, refuse_other_families, settled

MOST_COUNT = 2**31 - 1  # of a size: indices are 32 bits wide
MOST_LISTED = 4096  # of a list: factors of rotary positions, types of layers, end tokens
_CHECK = "Check config.json."

# Functions of one number. Others of transformers' table import a package for themselves (xielu), or have parameters.
KNOWN_ACTIVATIONS = frozenset(
    "gelu gelu_accurate gelu_fast gelu_new gelu_python gelu_pytorch_tanh hardswish leaky_relu mish quick_gelu relu "
    "relu2 relu6 sigmoid silu swish tanh".split()
)
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
ROPE_TYPES = frozenset("default linear dynamic yarn longrope su llama3".split())

# ----------------------------------------------------------------------------- kinds of values

Kind = tuple[str, Callable[[Any], bool]]  # what it is, for an error; whether a value is one


def _is_count(value: Any) -> bool:
    return type(value) is int and -1 <= value <= MOST_COUNT  # -1 is a token that there is not


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e30 and math.isfinite(value)


def _listed(values: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and len(values) <= MOST_LISTED and all(map(is_one, values))


def _word(words: frozenset[str]) -> Kind:
    return f"one of {', '.join(sorted(words))}", lambda value: type(value) is str and value in words


_WHOLE: Kind = "a whole number", _is_count
_REAL: Kind = "a number", _is_number
_SHARE: Kind = "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1
_SWITCH: Kind = "true or false", lambda value: type(value) is bool
_END_TOKENS: Kind = (
    "a token or a list of tokens",
    lambda value: _is_count(value) or _listed(value, _is_count),
)
_ACTIVATION = _word(KNOWN_ACTIVATIONS)
_LAYERS: Kind = (
    f"a list of {', '.join(sorted(LAYER_TYPES))}",
    lambda value: _listed(value, lambda word: type(word) is str and word in LAYER_TYPES),
)

_ROPE_FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("type", "rope_type"), _word(ROPE_TYPES | NO_SCALING)),
    **dict.fromkeys(("rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow"), _REAL),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"), _REAL),
    **dict.fromkeys(("short_mscale", "long_mscale"), _REAL),
    **dict.fromkeys(
        ("short_factor", "long_factor"),
        ("a list of numbers", lambda value: _listed(value, _is_number)),
    ),
    "original_max_position_embeddings": _WHOLE,
    "partial_rotary_factor": _SHARE,
    "truncate": _SWITCH,
}


def _is_rope(value: Any) -> bool:
    """Whether it describes rotary positions: once for all layers, or for each type of layers."""
    if not isinstance(value, dict):
        return False
    if value and set(value) <= LAYER_TYPES:
        return all(inner is None or _is_flat_rope(inner) for inner in value.values())
    return _is_flat_rope(value)


def _is_flat_rope(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in _ROPE_FIELDS and (item is None or _ROPE_FIELDS[name][1](item))
        for name, item in value.items()
    )


_ROPE: Kind = "a table of rotary positions that edgezo knows", _is_rope

# ----------------------------------------------------------------------------- fields of the families

_EVERY: dict[str, Kind] = {
    **dict.fromkeys(("vocab_size", "pad_token_id", "bos_token_id"), _WHOLE),
    "eos_token_id": _END_TOKENS,
    "tie_word_embeddings": _SWITCH,
    "use_cache": _SWITCH,
    "initializer_range": _REAL,
}
_COMMON_SIZES: dict[str, Kind] = dict.fromkeys(
    ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"), _WHOLE
)
_DECODER: dict[str, Kind] = {
    **_EVERY,
    **_COMMON_SIZES,
    **dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim"), _WHOLE),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), _REAL),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _ROPE),
    "hidden_act": _ACTIVATION,
    "attention_dropout": _SHARE,
    "partial_rotary_factor": _SHARE,
    "original_max_position_embeddings": _WHOLE,
}
_WINDOWS: dict[str, Kind] = {
    **dict.fromkeys(("sliding_window", "max_window_layers"), _WHOLE),
    "use_sliding_window": _SWITCH,
    "layer_types": _LAYERS,
}
_GEMMA: dict[str, Kind] = {
    **_DECODER,
    **_WINDOWS,
    "hidden_activation": _ACTIVATION,
    **dict.fromkeys(("attention_bias", "use_bidirectional_attention"), _SWITCH),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"), _REAL
    ),
}

CONFIG_FIELDS: dict[str, dict[str, Kind]] = {
    "llama": {**_DECODER, "attention_bias": _SWITCH, "mlp_bias": _SWITCH, "pretraining_tp": _WHOLE},
    "mistral": {**_DECODER, "sliding_window": _WHOLE},
    "qwen2": {**_DECODER, **_WINDOWS},
    "qwen3": {**_DECODER, **_WINDOWS, "attention_bias": _SWITCH},
    "gemma2": _GEMMA,
    "gemma3_text": {
        **_GEMMA,
        "rope_local_base_freq": _REAL,
        **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), _WHOLE),
    },
    "opt": {
        **_EVERY,
        **_COMMON_SIZES,
        **dict.fromkeys(("ffn_dim", "word_embed_proj_dim"), _WHOLE),
        **dict.fromkeys(("do_layer_norm_before", "_remove_final_layer_norm"), _SWITCH),
        **dict.fromkeys(("enable_bias", "layer_norm_elementwise_affine"), _SWITCH),
        **dict.fromkeys(("dropout", "attention_dropout", "layerdrop"), _SHARE),
        "activation_function": _ACTIVATION,
        "init_std": _REAL,
    },
    "gpt2": {
        **_EVERY,
        **dict.fromkeys(("n_positions", "n_embd", "n_layer", "n_head", "n_inner"), _WHOLE),
        **_COMMON_SIZES,  # the names that the class has for these, too
        **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx"), _SWITCH),
        "reorder_and_upcast_attn": _SWITCH,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _SHARE),
        "activation_function": _ACTIVATION,
        "layer_norm_epsilon": _REAL,
    },
    "phi3": {
        **_DECODER,
        **dict.fromkeys(("original_max_position_embeddings", "sliding_window"), _WHOLE),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop"), _SHARE),
    },
    "roberta": {
        **_EVERY,
        **_COMMON_SIZES,
        **dict.fromkeys(("intermediate_size", "type_vocab_size"), _WHOLE),
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), _SHARE),
        "hidden_act": _ACTIVATION,
        "layer_norm_eps": _REAL,
    },
}
# Fields of a class for heads that edgezo does not build: they change nothing in the model.
UNUSED_FIELDS = frozenset({"classifier_dropout"})
_UNUSED_PREFIX = "summary_"
# A text and vision model, of which only the text part is built.
TEXT_PARTS = {"gemma3": "gemma3_text"}


# ----------------------------------------------------------------------------- building


def read_config(file: Path) -> PretrainedConfig:
    """The config in a file of JSON. Raises EdgezoError for another family, and for what ``build_config`` refuses."""
    if not file.is_file():
        raise EdgezoError(
            f"{file.parent} has no {file.name}, so it is not a Hugging Face model directory."
        )
    values = read_json(file)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise EdgezoError(f"{file} has no model_type, so edgezo cannot tell the model's family.")
    return build_config(values, file)


def build_config(values: Mapping[str, Any], where: Path) -> PretrainedConfig:
    """The config object of a family from the fields that edgezo knows; ``where`` is for errors.

    Raises EdgezoError for another family, a quantised model, and a field that is not of its kind.
    """
    family = values["model_type"]
    if family not in CONFIG_FIELDS and family not in TEXT_PARTS:
        raise EdgezoError(
            f"{where} is of a model of type {clip(str(family), 60)!r}. edgezo loads {', '.join(CONFIG_FIELDS)}."
        )
    _refuse_quantised(values, where)
    if family in TEXT_PARTS:
        text_config = values.get("text_config") or {}
        if not isinstance(text_config, dict):
            raise EdgezoError(
                f"{where} is not a valid config: its text_config is no table. {_CHECK}"
            )
        _refuse_quantised(text_config, where)
        family, values = TEXT_PARTS[family], text_config
    known = CONFIG_FIELDS[family]
    chosen = {name: value for name, value in values.items() if name in known}
    for name, value in chosen.items():
        kind, is_one = known[name]
        if value is not None and not is_one(value):
            raise EdgezoError(
                f"{where} is not a valid config: {name} is {clip(repr(value)[:200], 60)}, not {kind}. {_CHECK}"
            )
    with reading(f"{where} is not a valid config: it", _CHECK, any_kind=True):
        refuse_other_families(values)
        config: PretrainedConfig = CONFIG_MAPPING[family](**settled(family, chosen))
        _refuse_unknown(values, config, where)
    return config


def _refuse_quantised(values: Mapping[str, Any], where: Path) -> None:
    """EdgezoError for a checkpoint of codes, which only its own library could read."""
    if isinstance(values.get("quantization"), dict) and "bits" in values["quantization"]:
        raise EdgezoError(
            f"{where} is of a model in codes of MLX ({clip(str(values['quantization']['bits']), 10)} bits), which only "
            "MLX reads. Give the full-precision checkpoint, which --precision quantises while it loads, or a GGUF file."
        )
    settings = values.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "?") if isinstance(settings, dict) else "?"
        raise EdgezoError(
            f"{where} is of a model that is already quantised ({clip(str(method), 40)}). Give the full-precision "
            "checkpoint, which --precision quantises while it loads, or a GGUF file."
        )


def _refuse_unknown(values: Mapping[str, Any], config: PretrainedConfig, where: Path) -> None:
    """EdgezoError for a field of the class that is not in the lists and has not the class's default."""
    general = {field.name for field in fields(PretrainedConfig)}
    for field in fields(config):
        name = field.name
        listed = name in CONFIG_FIELDS[config.model_type] or name in general
        if listed or name in UNUSED_FIELDS or name.startswith(_UNUSED_PREFIX):
            continue
        if values.get(name) is not None and values[name] != getattr(config, name):
            raise EdgezoError(
                f"{where} sets {name}, which edgezo does not know: it may change what the model computes. "
                "Use a checkpoint without it, or a newer edgezo."
            )
