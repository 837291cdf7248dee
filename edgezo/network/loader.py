"""From a path to a model without weights: config, module on the meta device, names of tensors, tokenizer.

assemble.py places the weights: it asks ``source_names`` which tensor of the checkpoint each parameter is, and reads
one tensor at a time. No weight is read here, and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.initialization import no_init_weights

from edgezo.errors import EdgezoError
from edgezo.machine.downloads import file_sha256
from edgezo.machine.foreign import clip, read_json, reading
from edgezo.network.foreign_config import build_config, read_config
from edgezo.network.foreign_tokenizer import (
    load_tokenizer as load_tokenizer,  # with the rest of a model
)
from edgezo.plan.shapes import Shape
from edgezo.weights.gguf_config import gguf_config, gguf_end_ids, metadata_notes
from edgezo.weights.gguf_header import read_header
from edgezo.weights.tensor_source import TensorSource, open_tensors

# transformers prints a line for every default of generation; a run prints its report instead.
transformers.logging.set_verbosity_error()

# ----------------------------------------------------------------------------- families


def _llama(c: Any) -> dict[str, Any]:
    return {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias, "mlp_bias": c.mlp_bias}


def _qwen2(c: Any) -> dict[str, Any]:
    return {"qkv_bias": True}


def _qwen3(c: Any) -> dict[str, Any]:
    return {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias, "qk_norm": True}


def _gemma2(c: Any) -> dict[str, Any]:
    bias = c.attention_bias
    return {"qkv_bias": bias, "o_bias": bias, "norm": "rms+1", "layer_norms": 4}


def _gemma3(c: Any) -> dict[str, Any]:
    return _gemma2(c) | {"qk_norm": True}


def _gpt2(c: Any) -> dict[str, Any]:
    return {
        "intermediate": c.n_inner or 4 * c.n_embd,
        "positions": c.n_positions,
        **_ALL_BIASES,
        "fused": True,
    }


def _phi3(c: Any) -> dict[str, Any]:
    return {"fused": True}


def _opt(c: Any) -> dict[str, Any]:
    affine = c.layer_norm_elementwise_affine
    return {
        **_ALL_BIASES,
        "intermediate": c.ffn_dim,
        "positions": c.max_position_embeddings + 2,
        "embed_dim": c.word_embed_proj_dim,
        "final_norm": c.do_layer_norm_before and not c._remove_final_layer_norm,
        "norm": "layer" if affine else "none",
        "qkv_bias": c.enable_bias,
        "o_bias": c.enable_bias,
        "mlp_bias": c.enable_bias,
    }


def _roberta(c: Any) -> dict[str, Any]:
    return {
        **_ALL_BIASES,
        "positions": c.max_position_embeddings,
        "type_rows": c.type_vocab_size,
        "final_norm": False,
        "masked_head": True,
    }


_ALL_BIASES: dict[str, Any] = {
    "gated": False,
    "norm": "layer",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}


def _plain(c: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class _Family:
    kind: str  # "causal" | "masked"
    differences: Callable[[Any], dict[str, Any]]  # from the Llama shape, by config


FAMILIES: dict[str, _Family] = {
    "llama": _Family("causal", _llama),
    "mistral": _Family("causal", _plain),
    "qwen2": _Family("causal", _qwen2),
    "qwen3": _Family("causal", _qwen3),
    "gemma2": _Family("causal", _gemma2),
    "gemma3_text": _Family("causal", _gemma3),
    "opt": _Family("causal", _opt),
    "gpt2": _Family("causal", _gpt2),
    "phi3": _Family("causal", _phi3),
    "roberta": _Family("masked", _roberta),
}


def shape_of(config: Any) -> Shape:
    """The shape of a model, which the planner counts with, from its config."""
    heads = config.num_attention_heads
    fields: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "tied": bool(config.tie_word_embeddings),
        "sliding_window": getattr(config, "sliding_window", None) or 0,
        "softcapped": bool(getattr(config, "attn_logit_softcapping", None)),
    }
    fields |= FAMILIES[config.model_type].differences(config)
    fields.setdefault("intermediate", getattr(config, "intermediate_size", 0))
    return Shape(**fields)


# ----------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint whose structure was checked, and of which no weight was read."""

    path: Path
    config: Any  # transformers PretrainedConfig
    kind: str  # "causal" | "masked"
    source: TensorSource
    header_notes: tuple[str, ...] = ()  # on metadata of a GGUF file

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the weight files in order. It is remembered by each file's path, size and times."""
        digests = [file_sha256(file) for file in self.source.files]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def shape(self) -> Shape:
        return shape_of(self.config)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of a weight of a matrix as it is read: the most that there is."""
        source = self.source
        return max(source.dtype(n).itemsize for n in source.names if len(source.shape(n)) > 1)

    @cached_property
    def notes(self) -> list[str]:
        """What a user should know of the files.

        Raises EdgezoError where the tensors are not those of the config, as transformers does.
        """
        module = _build(self)
        source_names(self, module)
        return [*self.header_notes, *_unused_note(self, module)]

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end a text: of the config, of generation_config.json, of a GGUF file's metadata and marks."""
        if self.path.is_file():
            return sorted(gguf_end_ids(read_header(self.path)))
        settings = self.path / "generation_config.json"
        values = read_json(settings) if settings.is_file() else {}
        also = values.get("eos_token_id") if isinstance(values, dict) else None
        ends: set[int] = set()
        for stated in (self.config.eos_token_id, also):
            listed = stated if isinstance(stated, list) else [stated]
            ends.update(n for n in listed if type(n) is int and 0 <= n < self.shape.vocab)
        return sorted(ends)

    @property
    def position_offset(self) -> int:
        """The number of a row's first position: RoBERTa counts from padding_idx + 1."""
        return int(self.config.pad_token_id) + 1 if self.kind == "masked" else 0


_SCORES = "score.weight"  # of a classifier of transformers', in the head's place


def open_model(path: Path) -> ModelFiles:
    """Read and check the config and the table of tensors. Raises EdgezoError for what edgezo cannot load."""
    path = Path(path)
    notes: tuple[str, ...] = ()
    if path.is_dir():
        config = read_config(path / "config.json")
    elif path.is_file():
        header = read_header(path)
        config = build_config(gguf_config(header), path)
        notes = tuple(metadata_notes(header))
    else:
        raise EdgezoError(f"There is no model at {path}.")
    source = open_tensors(path, config)
    if _SCORES in source.names:
        raise EdgezoError(
            f"{path} is a classifier of transformers' (it has {_SCORES}), and no language model.\n"
            'Use it by transformers.pipeline("text-classification"), or give the run that it was exported from.'
        )
    files = ModelFiles(path, config, FAMILIES[config.model_type].kind, source, notes)
    _check_sizes(files)
    return files


# Tables of learned positions, by the ends of their names.
_POSITION_TABLES = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")


def _check_sizes(files: ModelFiles) -> None:
    """EdgezoError where the config asks for what no tensor has, before anything of that size is made."""
    source = files.source
    with reading(f"{files.path}: its config", "Check config.json."):
        shape = files.shape
        wanted = {
            "a width": shape.hidden,
            "a vocabulary": shape.vocab,
            "inner layers": shape.intermediate,
            "heads of together": shape.heads * shape.head_dim,
        }
        shapes = {name: source.shape(name) for name in source.names}
    axes = {axis for axes in shapes.values() if 0 not in axes for axis in axes}
    asked = [f"{what} {size}" for what, size in wanted.items() if size not in axes]
    if not 0 < shape.layers <= len(shapes):
        asked.append(f"{shape.layers} layers of {len(shapes)} tensors")
    if not 0 < shape.kv_heads <= shape.heads:
        asked.append(f"{shape.kv_heads} key heads of {shape.heads}")
    tables = [axes for name, axes in shapes.items() if name.endswith(_POSITION_TABLES)]
    if shape.positions and shape.positions not in (axes[0] for axes in tables if axes):
        asked.append(f"a table of {shape.positions} positions")
    if asked:
        raise EdgezoError(
            f"{files.path} does not match its config, which asks for {', '.join(asked)}: no tensor has that size. "
            "Fetch the checkpoint again, or check config.json."
        )


# ----------------------------------------------------------------------------- module


class _EmptyOnMeta(TorchFunctionMode):
    """Inside, ``torch.empty`` gives meta tensors: parameters take no memory, and computed buffers stay real."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_meta(files: ModelFiles) -> nn.Module:
    """The module in eval mode: every parameter on meta in float32, every buffer real on the CPU.

    Tied parameters are one object. Where the config ties two matrices but the checkpoint stores two different ones,
    they are not tied, as in transformers.
    """
    module = _build(files)
    for names in _parameter_names(module).values():
        stored = [s for n in names if (s := _find(files.source, module, n)) is not None]
        first, *others = dict.fromkeys(stored) or [""]
        if any(not files.source.same_bytes(first, other) for other in others):
            files.config.tie_word_embeddings = False
            return _build(files)
    return module


def _auto(files: ModelFiles) -> Any:
    return AutoModelForMaskedLM if files.kind == "masked" else AutoModelForCausalLM


def model_class(files: ModelFiles) -> type[nn.Module]:
    """transformers' class of the model. The first use imports its code: 80 MB with all that it imports."""
    kind: type[nn.Module] = _auto(files)._model_mapping[type(files.config)]
    return kind


def _build(files: ModelFiles) -> nn.Module:
    auto = _auto(files)
    # Assertions, overflows: layers fail in many ways on odd sizes.
    with reading(f"{files.path}: the config of this model", "Check config.json.", any_kind=True):
        # Weights are read afterwards: to draw them takes most of the time, also where they have no memory.
        with _EmptyOnMeta(), no_init_weights():
            module: Any = auto.from_config(
                files.config,
                dtype=torch.float32,
                trust_remote_code=False,
                attn_implementation=None,  # the class's own: no config has chosen one
            )
        module.tie_weights()  # a part of what was left out
    # Small parameters made with ones() or zeros() are real: move them, keeping ties.
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(parameter.detach().to("meta"))
                part._parameters[name] = moved[parameter]
    module.requires_grad_(False)
    evaluated: nn.Module = module.eval()
    return evaluated


def source_names(files: ModelFiles, module: nn.Module) -> dict[str, str]:
    """Parameter name (as ``module.named_parameters()`` gives it) -> name in ``files.source``.

    Raises EdgezoError if a parameter has no tensor, or one of another shape.
    """
    stored_names: dict[str, str] = {}
    absent: list[str] = []
    misshapen: list[str] = []
    coded: list[str] = []
    parameters = dict(module.named_parameters())
    for names in _parameter_names(module).values():
        name = names[0]
        source = next((s for n in names if (s := _find(files.source, module, n)) is not None), None)
        if source is None:
            absent.append(name)
            continue
        stored_names[name] = source
        shape, expected = files.source.shape(source), tuple(parameters[name].shape)
        if shape != expected:
            misshapen.append(f"{source} is {list(shape)}, but the config needs {list(expected)}")
        if not files.source.dtype(source).is_floating_point:
            coded.append(f"{source} is {str(files.source.dtype(source)).removeprefix('torch.')}")
    if coded:
        raise EdgezoError(
            f"{files.path} holds codes of a quantised model in {len(coded)} tensors ({_some(coded)}), which only the "
            "library that made them reads. Give the full-precision checkpoint, which --precision quantises while it "
            "loads, or a GGUF file."
        )
    if absent or misshapen:
        lines = [f"{files.path} does not match its config."]
        if absent:
            lines.append(f"No tensor for {len(absent)} parameters: {_some(absent)}.")
        if misshapen:
            lines.append(f"{len(misshapen)} tensors of another shape: {_some(misshapen)}.")
        raise EdgezoError(" ".join(lines) + " Fetch the checkpoint again, or check config.json.")
    return stored_names


# Tensors that no parameter has and that change nothing: buffers that are computed from the config.
_COMPUTED = re.compile(
    r"(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|\.attn\.(masked_)?bias|position_ids|rope_freqs)$"
)
# Of a text and vision model, the part that is not built.
_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|multi_modal_projector)\.")


def _unused_note(files: ModelFiles, module: nn.Module) -> list[str]:
    """A note where the checkpoint holds tensors that the config asks nobody to read."""
    every = [name for names in _parameter_names(module).values() for name in names]
    used = {_find(files.source, module, name) for name in every}
    known = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    unused = [
        name
        for name in files.source.names
        if name not in used
        and not _COMPUTED.search(name)
        and not _VISION.search(name)
        and not any(re.search(pattern, name) for pattern in known)
    ]
    if not unused:
        return []
    return [
        f"{len(unused)} tensors of {files.path} are not used, since its config asks for no such parts: "
        f"{_some([clip(name, 80) for name in unused])}. If they belong to the model, its config is not its own: check "
        "it before you train"
    ]


def _some(items: list[str]) -> str:
    """At most four of ``items``, as one text."""
    return "; ".join(items[:4]) + ("; ..." if len(items) > 4 else "")


def _parameter_names(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every name of every parameter; a tied one has several, the first is the official one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _find(source: TensorSource, module: nn.Module, name: str) -> str | None:
    """The stored tensor with a parameter's name, or with its name behind other prefixes; None if there is none."""
    if name in source.names:
        return name
    base = str(getattr(module, "base_model_prefix", ""))
    wanted = _canonical(name, base)
    alike = [stored for stored in source.names if _canonical(stored, base) == wanted]
    if len(alike) > 1:
        listed = clip(", ".join(alike), 200)
        raise EdgezoError(
            f"Parameter {name!r} could be any of {listed}. Fetch the checkpoint again."
        )
    return alike[0] if alike else None


def _canonical(name: str, base: str) -> str:
    """A tensor's name without the prefixes in which checkpoints of one model differ.

    A checkpoint of the base model lacks its prefix (``h.0.`` for ``transformer.h.0.``), a text part of a larger model
    adds ``language_model.``, old ones call a norm's weight and bias gamma and beta.
    """
    prefixes = ("language_model.", *([base + "."] if base else []))
    while name.startswith(prefixes):
        name = name.split(".", 1)[1]
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


# ----------------------------------------------------------------------------- layers


def block_number(name: str, blocks_name: str) -> int | None:
    """The number of the block that a parameter or module belongs to; None where it is in no block."""
    if not name.startswith(blocks_name + "."):
        return None
    return int(name.removeprefix(blocks_name + ".").partition(".")[0])


def decoder_layers(module: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Name and list of the ``count`` decoder layers of a model, wherever its family keeps them.

    Raises EdgezoError if the module has no list of that length.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return name, part
    raise EdgezoError(
        f"the model has no list of {count} decoder layers, as its config says: check config.json"
    )
