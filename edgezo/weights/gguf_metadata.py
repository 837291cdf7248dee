"""What a GGUF file says of a model, made from its config: the inverse of gguf_config.py.

A config that llama.cpp would compute otherwise is refused, with what is in the way. Source: convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf.constants import GGUFValueType
from torch import Tensor

from edgezo.errors import UsageError
from edgezo.weights.gguf_config import LARGEST_GEMMA
from edgezo.weights.gguf_write import Entry, architecture_for, number, numbers, text

# The activation that llama.cpp computes for an architecture.
_ACTIVATIONS = {
    "gpt2": ("gelu_new", "gelu_pytorch_tanh"),
    "gemma2": ("gelu_pytorch_tanh",),
    "gemma3": ("gelu_pytorch_tanh",),
}
_SILU = ("silu", "swish")
_INSTEAD = "Use --format hf, which writes the model for transformers."


class _Config:
    """A config of transformers whose numbers are asked for by name, and what in it has no place in a GGUF file."""

    def __init__(self, config: Any):
        known = architecture_for(config.model_type)
        if known is None:
            raise UsageError(
                f"a GGUF file has no place for a model of the type {config.model_type}: llama.cpp computes no such "
                f"model.\n{_INSTEAD}"
            )
        self.name, self.arch = known
        self.config, self.refused = config, list[str]()

    def get(self, name: str, default: Any = None) -> Any:
        value = getattr(self.config, name, None)
        return default if value is None else value

    def refuse(self, what: str) -> None:
        self.refused.append(what)


def model_entries(config: Any) -> dict[str, Entry]:
    """The metadata of a model by key. Raises UsageError for a config that llama.cpp would compute otherwise."""
    c = _Config(config)
    entries: dict[str, Entry] = {}
    for key, name in c.arch.config.items():
        value = c.get(name)
        if name == "n_inner":
            value = value or 4 * config.n_embd
        if name.endswith("softcapping"):
            value = float(
                value or 0.0
            )  # 0 is none: without the key llama.cpp takes Gemma's usual caps
        if isinstance(value, int | float) and (value or name.endswith("softcapping")):
            if name == "sliding_window" and not _windowed(c):
                continue
            is_float = isinstance(value, float) or name.endswith(("eps", "epsilon", "capping"))
            entries[f"{c.name}.{key}"] = number(float(value) if is_float else value)
    _check_activation(c)
    if c.name != "gpt2":
        _add_heads(c, entries)
        _add_rope(c, entries)
        _add_window(c, entries)
        _check_scale(c)
        _check_caps(c)
    if c.refused:
        raise UsageError(
            f"a GGUF file of the architecture {c.name} has no place for {', nor for '.join(c.refused)}.\n{_INSTEAD}"
        )
    return {"general.architecture": text(c.name), "general.type": text("model"), **entries}


def _check_activation(c: _Config) -> None:
    given = c.get("hidden_act") or c.get("hidden_activation") or c.get("activation_function")
    known = _ACTIVATIONS.get(c.name, _SILU)
    if given is not None and given not in known:
        c.refuse(f"the activation {given}")
    if c.name == "gpt2" and (
        c.get("scale_attn_by_inverse_layer_idx") or not c.get("scale_attn_weights")
    ):
        c.refuse("another scale of attention")


def _add_heads(c: _Config, entries: dict[str, Entry]) -> None:
    width = c.get("head_dim") or c.config.hidden_size // c.config.num_attention_heads
    rotated = int(width * float(_rope_of(c).get("partial_rotary_factor") or 1.0))
    if rotated != width and c.name != "phi3":
        c.refuse(f"positions that rotate {rotated} of the {width} values of a head")
    entries[f"{c.name}.attention.key_length"] = number(width)
    entries[f"{c.name}.attention.value_length"] = number(width)
    entries[f"{c.name}.rope.dimension_count"] = number(rotated)
    entries[f"{c.name}.vocab_size"] = number(c.config.vocab_size)


def _rope_of(c: _Config, kind: str = "full_attention") -> dict[str, Any]:
    """The table of rotary positions, of layers of this kind where each has its own."""
    table = c.get("rope_parameters", {})
    return dict(table.get(kind) or table)


def _add_rope(c: _Config, entries: dict[str, Entry]) -> None:
    rope = _rope_of(c)
    kind = rope.get("rope_type", "default")
    entries[f"{c.name}.rope.freq_base"] = number(float(rope["rope_theta"]))
    if kind == "linear":
        entries[f"{c.name}.rope.scaling.type"] = text("linear")
        entries[f"{c.name}.rope.scaling.factor"] = number(float(rope["factor"]))
    elif kind != "default" and not (kind == "llama3" and c.name == "llama"):
        c.refuse(f"positions scaled by the rule {kind}")
    if c.name == "gemma3":
        local = _rope_of(c, "sliding_attention")
        if local.get("rope_type", "default") != "default":
            c.refuse("scaled positions in layers with a window")
        entries["gemma3.rope.freq_base_swa"] = number(float(local["rope_theta"]))


def rope_factors(config: Any) -> Tensor | None:
    """The factor of each frequency of Llama 3's rule, (head_dim/2,) fp32, which a file has as a tensor; else None."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "llama3":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi * theta ** (torch.arange(0, width, 2).double() / width)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).float()


def _windowed(c: _Config) -> bool:
    """Whether layers have a window that llama.cpp computes too."""
    return c.name in ("gemma2", "gemma3", "phi3")


def _add_window(c: _Config, entries: dict[str, Entry]) -> None:
    window, kinds = c.get("sliding_window"), c.get("layer_types")
    limited = window and window < c.config.max_position_embeddings
    uses = (
        any(k == "sliding_attention" for k in kinds) if kinds else c.config.model_type == "mistral"
    )
    if limited and uses and not _windowed(c):
        c.refuse(f"a window of {window} tokens")
    if c.name == "gemma3" and kinds:
        pattern = [kind == "sliding_attention" for kind in kinds]
        entries["gemma3.attention.sliding_window_pattern"] = numbers(pattern, GGUFValueType.BOOL)
    if c.name == "gemma2" and kinds:
        usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(kinds))]
        if list(kinds) != usual:
            c.refuse("windows in other layers than every second one")


def _check_caps(c: _Config) -> None:
    if c.name == "gemma3" and c.get("attn_logit_softcapping"):
        c.refuse("a soft cap of attention")


def _check_scale(c: _Config) -> None:
    """Gemma states what attention is scaled by; llama.cpp derives it from the width of a head, or of the 27B models."""
    stated = c.get("query_pre_attn_scalar")
    if stated is None:
        return
    heads = c.config.num_attention_heads
    largest = (c.name, c.config.num_hidden_layers) in LARGEST_GEMMA
    derived = c.config.hidden_size // heads if largest else c.get("head_dim")
    if stated != derived:
        c.refuse(f"attention scaled by {stated} and not by {derived}")
