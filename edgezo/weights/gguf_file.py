"""GGUF: the container, its tensors under Hugging Face names, and the config in its metadata.

The header is parsed here with bounded plain reads: the ``gguf`` package's reader makes one mapped
array per vocabulary entry (7 s and 170 MB for 49,152 tokens). Its block formats are what
``gguf.quants`` decodes, a bounded number of rows at a time, straight into the output tensor.

What llama.cpp's converter changes is undone per architecture: it interleaves the rows of q and k
(``llama``), stores Gemma's norm weights as w + 1, and transposes GPT-2's Conv1D.
Source: convert_hf_to_gguf.py of llama.cpp; transformers/modeling_gguf_pytorch_utils.py.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.weights.safetensors_file import (
    PIECE_ELEMENTS,
    check_finite,
    equal_ranges,
    read_into,
    spans,
)

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_BLOCKS = tuple(
    GGMLQuantizationType[name]
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
_SCALARS = dict(zip(range(8), ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"), strict=True))
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


# ----------------------------------------------------------------------------- container


@dataclass(frozen=True)
class GgufTensor:
    """One row of the file's tensor table; ``shape`` is in torch order (slowest axis first)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor table. An array of strings is kept as its length."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


class _Cursor:
    """Bounded reads of the header: no length in the file is believed before it is checked."""

    def __init__(self, stream: BinaryIO, path: Path):
        self._stream = stream
        self._path = path
        self.size = path.stat().st_size
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.fault(f"needs {count} more bytes")
        self.position += count
        return self._stream.read(count)

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.fault(f"holds a value of unknown type {kind}")
        element, count = self.number("<I"), self.number("<Q")
        if element == _STRING:
            for _ in range(count):
                self.take(self.number("<Q"))
            return count
        if element not in _SCALARS:
            raise self.fault(f"holds an array of unknown type {element}")
        layout = _SCALARS[element]
        raw = self.take(count * struct.calcsize(layout))
        return list(struct.unpack(f"<{count}{layout[1]}", raw))

    def fault(self, what: str) -> EdgezoError:
        return EdgezoError(
            f"{self._path}: the GGUF header {what} at byte {self.position} of {self.size}. "
            "The file is damaged or incomplete: fetch it again."
        )


def read_header(path: Path) -> GgufHeader:
    """Parse and check the header of a GGUF file (version 2 or 3, little-endian)."""
    with open(path, "rb", buffering=1 << 18) as stream:
        cursor = _Cursor(stream, path)
        try:
            return _parse(cursor, path)
        except (UnicodeDecodeError, struct.error, OverflowError, MemoryError) as problem:
            raise cursor.fault(f"cannot be read ({problem})") from problem


def _parse(cursor: _Cursor, path: Path) -> GgufHeader:
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise EdgezoError(f"{path} is not a GGUF file (it starts with {magic!r}).")
    version, tensor_count, value_count = (cursor.number(code) for code in ("<I", "<Q", "<Q"))
    if version not in (2, 3):
        raise EdgezoError(f"{path} is GGUF version {version}; edgezo reads versions 2 and 3.")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.fault(f"holds the key {key!r} twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    table = []
    for _ in range(tensor_count):
        name, axes = cursor.text(), cursor.number("<I")
        if not 1 <= axes <= 4:
            raise cursor.fault(f"gives tensor {name!r} {axes} axes")
        shape = tuple(reversed([cursor.number("<Q") for _ in range(axes)]))
        table.append((name, shape, cursor.number("<I"), cursor.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fault(f"gives an alignment of {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(path, metadata, _checked(cursor, path, table, start))


def _checked(
    cursor: _Cursor, path: Path, table: list[tuple[str, tuple[int, ...], int, int]], start: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for name, shape, number, offset in table:
        if name in tensors:
            raise cursor.fault(f"holds tensor {name!r} twice")
        kind = _tensor_type(path, name, number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise cursor.fault(f"gives tensor {name!r} rows of {shape[-1]}, no multiple of {block}")
        size = math.prod(shape) // block * block_bytes
        tensors[name] = GgufTensor(name, kind, shape, start + offset, size)
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.size_bytes)):
        if tensor.offset < end:
            raise cursor.fault(f"lets tensor {tensor.name!r} overlap another one")
        end = tensor.offset + tensor.size_bytes
        if end > cursor.size:
            raise EdgezoError(
                f"{path} has {cursor.size} bytes, tensor {tensor.name!r} ends at byte {end}. "
                "The file is damaged or incomplete: fetch it again."
            )
    return tensors


def _tensor_type(path: Path, name: str, number: int) -> GGMLQuantizationType:
    known = (*_PLAIN, *_BLOCKS)
    if number in [int(kind) for kind in known]:
        return GGMLQuantizationType(number)
    try:
        found = GGMLQuantizationType(number).name
    except ValueError:
        found = f"number {number}"
    raise EdgezoError(
        f"{path}: tensor {name!r} is stored as {found}; edgezo reads "
        + ", ".join(kind.name for kind in known)
        + "."
    )


# ----------------------------------------------------------------------------- architectures


@dataclass(frozen=True)
class _Architecture:
    """How one llama.cpp architecture maps to a transformers model."""

    model_type: str
    names: dict[str, str]  # stem of a GGUF name -> Hugging Face name, {} the block
    config: dict[str, str]  # metadata key without the architecture -> config key
    permuted: bool = False  # q and k rows interleaved
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()  # stems stored (out, in) for a Conv1D


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
    "llama": _Architecture("llama", _NAMES, _LLAMA_CONFIG, permuted=True),
    "qwen2": _Architecture("qwen2", _NAMES, _CONFIG),
    "qwen3": _Architecture("qwen3", _NAMES, _CONFIG),
    "gemma2": _Architecture(
        "gemma2", _GEMMA_NAMES, _CONFIG | _SLIDING | _SOFTCAP, norm_plus_one=True
    ),
    "gemma3": _Architecture("gemma3_text", _GEMMA_NAMES, _CONFIG | _SLIDING, norm_plus_one=True),
    "phi3": _Architecture("phi3", _PHI3_NAMES, _CONFIG | _SLIDING),
    "gpt2": _Architecture(
        "gpt2",
        _GPT2_NAMES,
        _GPT2_CONFIG,
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}
_IGNORED = ("rope_freqs", "rope_factors_long", "rope_factors_short")  # config, not weights


def _architecture(header: GgufHeader) -> _Architecture:
    if header.architecture not in _ARCHITECTURES:
        raise EdgezoError(
            f"{header.path} holds a model of architecture {header.architecture!r}. "
            f"edgezo reads GGUF files of {', '.join(_ARCHITECTURES)}."
        )
    return _ARCHITECTURES[header.architecture]


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The keyword arguments of ``AutoConfig.for_model`` that the metadata amounts to."""
    arch = _architecture(header)
    found: dict[str, Any] = {"model_type": arch.model_type}
    for key, target in arch.config.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is not None:
            found[target] = value
    stated_sizes = {key: found.get(arch.config[key]) for key in _REQUIRED}
    needed = [k for k, v in stated_sizes.items() if type(v) is not int or v < 1]
    if needed:
        raise EdgezoError(f"{header.path}: the metadata has no usable {', '.join(needed)}.")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise EdgezoError(f"{header.path} has no token_embd.weight, so it is no language model.")
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    stated = (found[arch.config["block_count"]], found[arch.config["embedding_length"]])
    if stated != (len(blocks), embedding.shape[-1]):
        raise EdgezoError(
            f"{header.path}: the metadata states {stated[0]} blocks of width {stated[1]}, the "
            f"tensors are {len(blocks)} of width {embedding.shape[-1]}. Fetch the file again."
        )
    found["vocab_size"] = embedding.shape[0]
    found["tie_word_embeddings"] = "output.weight" not in header.tensors
    if "num_attention_heads" in found and "head_dim" not in found:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    output = header.tensors.get("blk.0.attn_output.weight")
    width = found.get("num_attention_heads", 0) * found.get("head_dim", 0)
    if output is not None and width and output.shape[-1] != width:
        raise EdgezoError(
            f"{header.path}: the metadata states heads of {width} values together, the attention "
            f"output takes {output.shape[-1]}. Fetch the file again."
        )
    if "blk.0.attn_q.bias" in header.tensors and arch.model_type == "llama":
        found["attention_bias"] = True
    if (header.architecture, found.get("num_hidden_layers")) in (("gemma2", 46), ("gemma3", 62)):
        # The 27B models scale attention by the mean width of a head; no key of the file says so.
        found["query_pre_attn_scalar"] = found["hidden_size"] // found["num_attention_heads"]
    for role in ("bos", "eos"):
        found[f"{role}_token_id"] = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
    found["pad_token_id"] = header.metadata.get("tokenizer.ggml.padding_token_id")
    if arch.model_type != "gpt2":
        found["rope_parameters"] = _rope(header, found)
    return found


def _rope(header: GgufHeader, found: dict[str, Any]) -> dict[str, Any]:
    theta = float(header.metadata.get(f"{header.architecture}.rope.freq_base", 10000.0))
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "rope_factors_long.weight" in header.tensors:
        raise EdgezoError(
            f"{header.path} scales its rotary positions ({scaling}), which edgezo cannot take "
            "from a GGUF. Use the safetensors checkpoint of this model."
        )
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        factor = header.metadata[f"{header.architecture}.rope.scaling.factor"]
        plain = {"rope_type": "linear", "rope_theta": theta, "factor": float(factor)}
    if header.architecture == "gemma3":
        # llama.cpp states one base; the sliding layers of every Gemma 3 use this one, unscaled.
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return {"full_attention": plain, "sliding_attention": local}
    if "rope_freqs.weight" in header.tensors:
        return _llama3_rope(header, theta, found["head_dim"])
    return plain


def _llama3_rope(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.x: the file has the factor of each frequency, the config wants the rule."""
    factors = _read_plain(header, "rope_freqs.weight").double()  # (head_dim / 2,)
    factor = factors.max().item()
    rule = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    smooth = ((8192 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
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
    tensor = header.tensors[name]
    if tensor.type not in _PLAIN:
        raise EdgezoError(f"{header.path}: {name} is quantised, which no converter does.")
    raw = bytearray(tensor.size_bytes)
    read_into(header.path, tensor.offset, memoryview(raw), name)
    return torch.frombuffer(raw, dtype=_PLAIN[tensor.type]).view(tensor.shape)


# ----------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class _Layout:
    """Where the decoded rows of one tensor go in the Hugging Face tensor."""

    heads: int = 0  # rows of q and k are interleaved within so many heads; 0: they are not
    minus_one: bool = False
    transposed: bool = False


class GgufSource:
    """The tensors of a GGUF file: F32, F16 and BF16 as stored, blocks as float32."""

    def __init__(self, path: Path, piece_elements: int = PIECE_ELEMENTS):
        self.header = read_header(path)
        self._piece = piece_elements
        self._tensors: dict[str, GgufTensor] = {}
        self._layouts: dict[str, _Layout] = {}
        arch = _architecture(self.header)
        for tensor in self.header.tensors.values():
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
            stem = match[2] if match else ""
            if match is None or stem not in arch.names:
                if stem in _IGNORED:
                    continue
                raise EdgezoError(f"{path}: edgezo does not know the tensor {tensor.name!r}.")
            name = arch.names[stem].format(match[1]) + "." + match[3]
            self._tensors[name] = tensor
            self._layouts[name] = self._layout(arch, stem, tensor)

    def _layout(self, arch: _Architecture, stem: str, tensor: GgufTensor) -> _Layout:
        if arch.permuted and stem in ("attn_q", "attn_k"):
            key = "attention.head_count" + ("_kv" if stem == "attn_k" else "")
            prefix = self.header.architecture
            heads = self.header.metadata.get(
                f"{prefix}.{key}", self.header.metadata.get(f"{prefix}.attention.head_count")
            )
            if type(heads) is not int or heads < 1 or tensor.shape[0] % (2 * heads):
                raise EdgezoError(
                    f"{self.header.path}: {tensor.name} has {tensor.shape[0]} rows, which do not "
                    f"split into {heads} heads of even width."
                )
            return _Layout(heads=heads)
        return _Layout(
            minus_one=arch.norm_plus_one and stem.endswith("norm"),
            transposed=stem in arch.transposed and len(tensor.shape) == 2,
        )

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def files(self) -> list[Path]:
        return [self.header.path]

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._tensors[name].shape
        return shape[::-1] if self._layouts[name].transposed else shape

    def dtype(self, name: str) -> torch.dtype:
        return _PLAIN.get(self._tensors[name].type, torch.float32)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None
    ) -> Tensor:
        tensor, layout, shape = self._tensors[name], self._layouts[name], self.shape(name)
        if rows is not None:
            if layout.transposed or layout.heads:
                raise ValueError(f"{name} is not stored row by row")
            row_bytes, count = tensor.size_bytes // shape[0], rows.stop - rows.start
            offset = tensor.offset + rows.start * row_bytes
            shape = (count, *shape[1:])
            tensor = replace(tensor, shape=shape, offset=offset, size_bytes=count * row_bytes)
        out = torch.empty(shape, dtype=dtype or self.dtype(name))
        if layout.transposed:
            grid = out.T  # rows of the file are columns of the module
        else:
            grid = out.view(_grid(tensor))
        order = _deinterleaved(tensor.shape[0], layout.heads) if layout.heads else None
        for first, last, values in self._rows(tensor):
            if layout.minus_one:
                values = values.float() - 1.0
            place = slice(first, last) if order is None else order[first:last]
            grid[place] = values.to(out.dtype)
        check_finite(out, name, self.header.path)
        return out

    def same_bytes(self, first: str, second: str) -> bool:
        a, b = self._tensors[first], self._tensors[second]
        path = self.header.path
        return (a.type, a.shape) == (b.type, b.shape) and equal_ranges(
            path, a.offset, path, b.offset, a.size_bytes
        )

    def _rows(self, tensor: GgufTensor) -> Iterator[tuple[int, int, Tensor]]:
        """``(first, last, values)`` over the rows; values is (last - first, columns)."""
        total, columns = _grid(tensor)
        row_bytes = tensor.size_bytes // total
        raw = bytearray(row_bytes * min(total, max(1, self._piece // columns)))
        for first, last in spans(total, len(raw) // row_bytes):
            piece = memoryview(raw)[: (last - first) * row_bytes]
            offset = tensor.offset + first * row_bytes
            read_into(self.header.path, offset, piece, f"tensor {tensor.name!r}")
            if tensor.type in _PLAIN:
                rows = torch.frombuffer(piece, dtype=_PLAIN[tensor.type])
            else:
                blocks = np.frombuffer(piece, dtype=np.uint8).reshape(last - first, row_bytes)
                # float16 scales of a damaged block overflow; check_finite reports the tensor
                with np.errstate(all="ignore"):
                    rows = torch.from_numpy(dequantize(blocks, tensor.type))
            yield first, last, rows.view(last - first, columns)


def _grid(tensor: GgufTensor) -> tuple[int, int]:
    """(rows, columns). A bias is one column, so that its rows are the rows of its matrix."""
    if len(tensor.shape) == 1 and tensor.name.endswith(".bias") and tensor.type in _PLAIN:
        return tensor.shape[0], 1
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _deinterleaved(rows: int, heads: int) -> Tensor:
    """(rows,) int64: the Hugging Face row of each stored row.

    Stored as (head, dim/2, 2), wanted as (head, 2, dim/2).
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
