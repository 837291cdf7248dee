"""One meaning for each way in which configs write "none" and "the usual": 0, -1, null, a factor of 1, no key at all.

``settled`` is applied to the fields of every config, of a directory as of a GGUF file, before the config object is
made. What is none is None afterwards; what is usual is left to the family's class, or computed where the class would
not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields whose null means "none", whatever the class has for a missing one, and the values that mean it too.
_NONE: dict[str, tuple[Any, ...]] = {
    "sliding_window": (0, -1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), (-1,)),
}
# Fields of which 0 means what null means: the usual.
_USUAL_BY_ZERO = frozenset(
    "rope_theta rope_local_base_freq query_pre_attn_scalar sliding_window_pattern _sliding_window_pattern "
    "original_max_position_embeddings n_inner head_dim num_key_value_heads".split()
)
# Words in the place of a type of scaling.
NO_SCALING = frozenset({"none", "default", "", "null"})
# Multipliers and layouts that other families compute with, by config key -> the values that change nothing.
OTHER_FAMILIES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (0, 1)
    ),
    "attention_multiplier": (0,),
    **dict.fromkeys(("scale_emb", "scale_depth", "mup_width_scale", "width_scale"), (1,)),
    "embedding_scale": (1,),
    "clip_qkv": (0,),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, 1)),
    **dict.fromkeys(
        ("alibi", "parallel_attn", "use_parallel_residual", "scale_attn_by_width"), (False,)
    ),
    **dict.fromkeys(("attention_chunk_size", "no_rope_layer_interval"), (0,)),
    "no_rope_layers": ([],),
}


def settled(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, with one spelling for each meaning.

    Raises ValueError where two fields contradict each other.
    """
    settled_values: dict[str, Any] = {}
    for name, value in values.items():
        if name in _NONE:
            settled_values[name] = None if _is_one_of(value, _NONE[name]) else value
        elif value is not None and not (name in _USUAL_BY_ZERO and _is_one_of(value, (0, -1))):
            settled_values[name] = value
    if settled_values.get("layer_types") == []:
        del settled_values["layer_types"]
    if family == "roberta" and settled_values.get("pad_token_id", 1) is None:
        del settled_values["pad_token_id"]  # positions are counted from it
    _settle_heads(family, values, settled_values)
    _settle_rope(settled_values)
    return settled_values


def _is_one_of(value: Any, meanings: tuple[Any, ...]) -> bool:
    return value is None or (type(value) in (int, float, bool) and value in meanings)


def _settle_heads(family: str, stated: Mapping[str, Any], values: dict[str, Any]) -> None:
    """null or 0 heads of keys are as many as heads; a null or 0 width of a head is its share of the hidden width."""
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if type(heads) is not int or heads < 1:
        return
    if "num_key_value_heads" in stated and "num_key_value_heads" not in values:
        values["num_key_value_heads"] = heads
    if "head_dim" in stated and "head_dim" not in values and type(hidden) is int:
        values["head_dim"] = hidden // heads


def _settle_rope(values: dict[str, Any]) -> None:
    """No table of scaling where none scales; one base, however often it is stated."""
    for name in ("rope_scaling", "rope_parameters"):
        table = values.get(name)
        if not isinstance(table, dict):
            continue
        inner = {kind: _flat(t) for kind, t in table.items() if isinstance(t, dict)}
        values[name] = inner or _flat(table)
        if not values[name] or (name == "rope_scaling" and set(values[name]) <= {"rope_type"}):
            del values[name]
    base, table = values.get("rope_theta"), values.get("rope_parameters")
    if base is None or not isinstance(table, dict):
        return
    tables = [table] if "full_attention" not in table else [table["full_attention"]]
    for stated in (t.get("rope_theta") for t in tables):
        if stated is not None and stated != base:
            raise ValueError(f"rope_theta is {base}, but rope_parameters has {stated}")


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of rotary positions without fields that say nothing."""
    kept = {name: value for name, value in table.items() if value is not None}
    for name in ("rope_theta", "original_max_position_embeddings"):
        if _is_one_of(kept.get(name), (0, -1)):
            kept.pop(name, None)
    kind = kept.get("rope_type", kept.get("type"))
    factor = kept.get("factor")
    scales = kind == "linear" and (factor is None or factor in (0, 1))
    if kind is None or scales or kind in NO_SCALING:
        kept = {k: v for k, v in kept.items() if k in ("rope_theta", "partial_rotary_factor")}
        return {**kept, "rope_type": "default"} if kept or kind is not None else {}
    return kept | {"rope_type": "longrope"} if kind == "su" else kept


def refuse_other_families(values: Mapping[str, Any]) -> None:
    """ValueError for a field of another family that would change what the model computes."""
    for name, neutral in OTHER_FAMILIES.items():
        value = values.get(name)
        if value is None or value in neutral:
            continue
        raise ValueError(
            f"it sets {name} to {value!r}, with which other families compute and this one does not: "
            "the model would be another one"
        )
