"""``--format gguf`` and ``--format gguf-adapter``: a run's result for llama.cpp and what is built on it.

    gguf            the whole model with what was trained in its weights, tokenizer and chat template. Of a base that is
                    a GGUF file itself, tensors that were not trained are copied byte for byte, and the others are
                    stored in their type, where the ``gguf`` package encodes it (else as Q8_0, or F16)
    gguf-adapter    llama.cpp's LoRA file: what was trained beside frozen weights

Weights pass a tile at a time. What was written is then read back by the code that reads other people's files, and
compared with the run: a file that is not the run's, or no other than the base, is not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from edgezo.data.encoder import special_ids
from edgezo.errors import EdgezoError, UsageError
from edgezo.network.foreign_config import build_config
from edgezo.network.gguf_tokenizer import gguf_tokenizer
from edgezo.network.gguf_vocabulary import SAMPLES, tokenizer_entries
from edgezo.network.loader import ModelFiles, load_tokenizer, shape_of
from edgezo.run import exported
from edgezo.run.merged import Merged
from edgezo.weights.gguf_config import Architecture, architecture_of, gguf_config
from edgezo.weights.gguf_file import GgufSource
from edgezo.weights.gguf_header import PLAIN_DTYPES, GgufTensor, read_header
from edgezo.weights.gguf_metadata import model_entries, rope_factors
from edgezo.weights.gguf_write import (
    ENCODED,
    FILE_TYPES,
    Entry,
    GgufOut,
    architecture_for,
    encoded,
    entries_of,
    in_heads,
    number,
    stem_of,
    text,
    type_for,
    write_gguf,
)
from edgezo.weights.safetensors_file import read_into

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
_F32 = GGMLQuantizationType.F32
_NOT_COPIED = ("split.", "general.file_type", "general.quantization_version", "edgezo.")
_COPY_BYTES = 1 << 22  # of a tensor that is copied, at a time
# How far a stored number may be from what was to be stored, as a share of the largest in its block of 32.
_ROUNDING = {"Q8_0": 1 / 127}
_SHIFTED = 2**-22
_WINDOWED = ("gemma2", "gemma3_text", "phi3")  # types of models whose window a file states
_WITHOUT_HEAD = ("gemma2",)  # architectures that llama.cpp gives no head beside the table
# Settings of a config that are no sizes.
_COMPUTED_WITH = (
    *(
        "rope_parameters",
        "rms_norm_eps",
        "layer_norm_epsilon",
        "layer_types",
        "query_pre_attn_scalar",
    ),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_COARSE = 1 / 7  # of codes of four or five bits
_LEAST_FAR = 1e-6  # of a block so small that its scale is rounded too
_BLOCK = 32


def check_base(files: ModelFiles) -> None:
    """UsageError where a GGUF file has no place for the model or its tokenizer; nothing is written for it."""
    if isinstance(files.source, GgufSource):
        return
    model_entries(files.config)
    _tokenizer_entries(files)


def _tokenizer_entries(files: ModelFiles) -> dict[str, Entry]:
    tokenizer = load_tokenizer(files.path)
    return tokenizer_entries(tokenizer, files.shape.vocab, special_ids(tokenizer)[0])


@dataclass
class GgufExporter(Merged):
    """Writes a run as a GGUF file."""

    @cached_property
    def base(self) -> GgufSource | None:
        """The base, where it is a GGUF file."""
        return self.files.source if isinstance(self.files.source, GgufSource) else None

    @cached_property
    def named(self) -> tuple[str, Architecture]:
        """llama.cpp's name of the architecture, and its table."""
        if self.base is not None:
            return self.base.header.architecture, architecture_of(self.base.header)
        known = architecture_for(self.files.config.model_type)
        assert known is not None  # check_base
        return known

    def write(self, folder: Path, asked: str | None, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write model.gguf; ``asked`` is the type of --dtype. Raises EdgezoError for what cannot be read back."""
        notes: list[str] = []
        if self.rebuilt.model.exact is not None and self.named[0] in _WITHOUT_HEAD:
            raise UsageError(
                f"this run trained the head, and llama.cpp's {self.named[0]} takes its embedding table for it.\n"
                "Use --format hf, or train without the head: --train lowrank+norms."
            )
        tensors = {out.name: out for out in self._tensors(asked, notes)}
        probe = self.rebuilt.model.readout
        entries = {
            **self._entries(asked, tensors.values()),
            **exported.entries(about, None if probe is None else probe.weights),
        }
        path = folder / MODEL_FILE
        write_gguf(path, self.named[0], entries, tensors.values())
        self._check(path)
        size = sum(out.size_bytes for out in tensors.values())
        kinds = sorted({out.type.name for out in tensors.values()})
        return {
            "tensors": len(tensors),
            "weight_bytes": size,
            "dtype": "+".join(kinds),
            "notes": notes,
        }

    # -- metadata -----------------------------------------------------------------------------------------

    def _entries(self, asked: str | None, tensors: Iterable[GgufOut]) -> dict[str, Entry]:
        if self.base is not None:
            entries = entries_of(self.base.header, _NOT_COPIED)
            kind = self.base.header.metadata.get("general.file_type")
            file_type = FILE_TYPES[asked] if asked else kind
        else:
            entries = {**model_entries(self.files.config), **_tokenizer_entries(self.files)}
            file_type = FILE_TYPES[asked or "fp16"]
        name = Path(self.rebuilt.planned.cfg.model).name.removesuffix(".gguf")
        entries["general.name"] = text(f"{name} fine-tuned by edgezo")
        if isinstance(file_type, int):
            entries["general.file_type"] = number(int(file_type))
        if any(out.type not in PLAIN_DTYPES for out in tensors):
            entries["general.quantization_version"] = number(2)
        return entries

    # -- tensors ------------------------------------------------------------------------------------------

    def _tensors(self, asked: str | None, notes: list[str]) -> Iterator[GgufOut]:
        architecture, arch = self.named
        others: dict[str, GgufTensor] = dict(self.base.header.tensors) if self.base else {}
        otherwise: dict[str, int] = {}  # matrices that are stored in another type than was meant
        for name in self.parameters():
            stem = stem_of(arch, name)
            if stem is None:
                raise UsageError(
                    f"a GGUF file of the architecture {architecture} has no place for {name}"
                )
            stored = others.pop(stem, None)
            if stored is not None and not asked and not self.changed(name):
                yield _copied(stored)
                continue
            shape = tuple(self.meta.get_parameter(name).shape)
            if self.is_turned(name):
                shape = shape[::-1]
            kind, is_meant = self._type(asked, stored, stem, shape)
            if not is_meant:
                otherwise[kind.name] = otherwise.get(kind.name, 0) + 1
            yield GgufOut(stem, shape, kind, partial(self.stored_rows, name))
        for stored in others.values():  # rotary factors
            yield _copied(stored)
        if self.base is None and (factors := rope_factors(self.files.config)) is not None:
            yield GgufOut("rope_freqs.weight", tuple(factors.shape), _F32, lambda: [factors])
        notes += [
            f"{count} matrices are stored as {kind}, since the type that was meant cannot be encoded for them"
            for kind, count in otherwise.items()
        ]

    def _type(
        self, asked: str | None, stored: GgufTensor | None, stem: str, shape: tuple[int, ...]
    ) -> tuple[GGMLQuantizationType, bool]:
        if len(shape) == 1 or stem.startswith("position_embd"):
            return _F32, True  # as llama.cpp wants vectors
        if asked or self.base is None:
            return type_for(ENCODED[asked or "fp16"], shape)
        table = self.base.header.tensors.get(
            "output.weight", self.base.header.tensors["token_embd.weight"]
        )
        return type_for((stored or table).type, shape)

    def stored_rows(self, name: str) -> Iterator[Tensor]:
        """``rows`` as llama.cpp's converter changes them."""
        return _arranged(self.rows(name), name, self.named[1], self._head_rows(name))

    def _head_rows(self, name: str) -> int:
        """Rows of a head of q or k, where a file has them interleaved; else 0."""
        if not self.named[1].permuted:
            return 0
        c = self.files.config
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
        count = next((n for part, n in heads.items() if f".{part}." in name), 0)
        return int(self.meta.get_parameter(name).shape[0]) // count if count else 0

    # -- the file is read back ----------------------------------------------------------------------------

    def _check(self, path: Path) -> None:
        """EdgezoError unless the file, read as other people's are, is the model of the run, and not its base."""
        source = GgufSource(path)
        self._check_config(path, source)
        moved = False
        for name in self.parameters():
            self._check_tensor(source, name)
            moved = moved or (self.changed(name) and self._differs(source, name))
        trains = any(self.changed(name) for name in self.parameters())
        if trains and not moved and self.rebuilt.steps:
            raise EdgezoError(
                f"the weights that were written are those of the base, though {self.rebuilt.steps} steps have trained "
                f"{'+'.join(self.rebuilt.planned.cfg.train)}: what they moved is smaller than the type of the file can "
                "hold. Nothing is kept. Give --dtype fp32."
            )

    def _check_config(self, path: Path, source: GgufSource) -> None:
        config = build_config(gguf_config(source.header), path)
        tied = self.tied and self.rebuilt.model.exact is None
        wanted, made = self.files.config, config
        differ = [
            name
            for name in _COMPUTED_WITH
            if not _alike(getattr(wanted, name, None), getattr(made, name, None))
        ]
        if self.named[1].model_type in _WINDOWED and wanted.sliding_window != made.sliding_window:
            differ.append("windows")
        shape = self.files.shape
        if replace(shape_of(made), sliding_window=shape.sliding_window) != replace(
            shape, tied=tied
        ):
            differ.append("sizes")
        if self.base is None:
            ours, theirs = load_tokenizer(self.files.path), gguf_tokenizer(path)[0]
            texts = [t for t in SAMPLES if _ids(ours, t) != _ids(theirs, t)]
            differ += ["tokens of a text"] if texts else []
        if differ:
            raise EdgezoError(
                f"the GGUF file that was written reads back with other {', '.join(differ)} than the run has. "
                "Nothing is kept. Use --format hf."
            )

    def _check_tensor(self, source: GgufSource, name: str) -> None:
        """EdgezoError unless a tensor of the file is what the run has, to the rounding of its type."""
        if self.base is not None and not self.changed(name) and name in self.base.names:
            a, b = source.stored(name), self.base.stored(name)
            if a.type == b.type and _same_bytes(a, b):
                return
        kind = source.stored(name).type
        # Numbers that a plain type rounds, and nothing else does, are compared as they are stored.
        plain = None if self.named[1].shifts(name) else PLAIN_DTYPES.get(kind)
        dtype = plain or torch.float32
        whole = None if source.by_rows(name) else source.read(name, dtype)
        if whole is not None and self.is_turned(name):
            whole = whole.T
        at = 0
        for piece in self.rows(name):
            part = slice(at, at + len(piece))
            at = part.stop
            read = source.read(name, dtype, part) if whole is None else whole[part]
            if plain is not None:
                alike = torch.equal(read, piece.to(plain))
            else:  # a norm that is stored as w + 1 has lost the last digits of w
                share = (
                    _SHIFTED if self.named[1].shifts(name) else _ROUNDING.get(kind.name, _COARSE)
                )
                alike = _within(read, piece, share)
            if not alike:
                raise EdgezoError(
                    f"{name} reads back from the GGUF file ({kind.name}) as other numbers than the run has. "
                    "Nothing is kept. Check the disk, or use --format hf."
                )

    def _differs(self, source: GgufSource, name: str) -> bool:
        """Whether a tensor of the file is stored otherwise than the base's would be, in the same type."""
        stored = source.stored(name)
        at = stored.offset
        for piece in _arranged(self.base_rows(name), name, self.named[1], self._head_rows(name)):
            raw = encoded(piece, stored.type)
            there = bytearray(len(raw))
            read_into(stored.file, at, memoryview(there), name)
            if there != raw:
                return True
            at += len(raw)
        return False

    # -- an adapter ---------------------------------------------------------------------------------------

    def write_adapter(self, folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write adapter.gguf: llama.cpp adds alpha/rank * B (A x) to each matrix."""
        architecture, arch = self.named
        products = dict(self.products())
        tensors = []
        alpha = float(max(len(product.down) for product in products.values()))
        for module, product in products.items():
            name = f"{module}.weight"
            stem = stem_of(arch, name)
            if stem is None:
                raise UsageError(
                    f"a LoRA file of the architecture {architecture} has no place for {name}"
                )
            # alpha is one number of the file, and is divided by the rank of each matrix.
            up = product.up * (product.scale * len(product.down) / alpha)
            rows = list(_arranged(iter([up]), name, arch, self._head_rows(name)))
            down = product.down.contiguous()
            tensors.append(
                GgufOut(f"{stem}.lora_a", tuple(down.shape), _F32, partial(list, [down]))
            )
            tensors.append(GgufOut(f"{stem}.lora_b", tuple(up.shape), _F32, partial(list, rows)))
        entries = {
            "general.type": text("adapter"),
            "general.architecture": text(architecture),
            "general.name": text(f"{Path(self.rebuilt.planned.cfg.model).name} adapter by edgezo"),
            "adapter.type": text("lora"),
            "adapter.lora.alpha": Entry(alpha, GGUFValueType.FLOAT32),
            **exported.entries(about, None),
        }
        write_gguf(folder / ADAPTER_FILE, architecture, entries, tensors)
        self._check_adapter(folder / ADAPTER_FILE, tensors)
        size = sum(out.size_bytes for out in tensors)
        return {"tensors": len(tensors), "weight_bytes": size, "notes": []}

    def _check_adapter(self, path: Path, tensors: list[GgufOut]) -> None:
        """EdgezoError unless the file holds the factors, and they change something where there were steps."""
        header, moved = read_header(path), False
        for out in tensors:
            stored = header.tensors[out.name]
            raw = bytearray(stored.size_bytes)
            read_into(path, stored.offset, memoryview(raw), out.name)
            if bytes(raw) != b"".join(
                encoded(p, _F32) for p in out.pieces() if isinstance(p, Tensor)
            ):
                raise EdgezoError(
                    f"{out.name} reads back from {path.name} otherwise than it was written"
                )
            moved = moved or (out.name.endswith("lora_b") and any(raw))
        if self.rebuilt.steps and not moved:
            raise EdgezoError(
                f"the adapter changes nothing, though {self.rebuilt.steps} steps have trained it. Nothing is kept."
            )


# ---------------------------------------------------------------------------------------------


def _arranged(
    pieces: Iterator[Tensor], name: str, arch: Architecture, head_rows: int
) -> Iterator[Tensor]:
    """Pieces of a parameter as llama.cpp's converter stores them."""
    if head_rows:
        yield from in_heads(pieces, head_rows)
        return
    for piece in pieces:
        yield piece + 1 if arch.shifts(name) else piece


def _copied(stored: GgufTensor) -> GgufOut:
    return GgufOut(stored.name, stored.shape, stored.type, lambda: _raw(stored))


def _raw(stored: GgufTensor) -> Iterator[bytes]:
    """The bytes of a tensor of another file, a piece at a time."""
    for start in range(0, stored.size_bytes, _COPY_BYTES):
        piece = bytearray(min(_COPY_BYTES, stored.size_bytes - start))
        read_into(stored.file, stored.offset + start, memoryview(piece), stored.name)
        yield bytes(piece)


def _same_bytes(a: GgufTensor, b: GgufTensor) -> bool:
    return a.size_bytes == b.size_bytes and all(
        x == y for x, y in zip(_raw(a), _raw(b), strict=True)
    )


def _within(read: Tensor, wanted: Tensor, share: float) -> bool:
    """Whether numbers are those that were to be stored, to ``share`` of the largest in each block."""
    cols = wanted.shape[-1]
    width = _BLOCK if cols % _BLOCK == 0 else 1
    far = (read - wanted).abs().reshape(-1, width).amax(-1)
    most = wanted.abs().reshape(-1, width).amax(-1)
    return bool((far <= share * most + _LEAST_FAR).all())


def _alike(a: Any, b: Any) -> bool:
    """Whether two settings are equal but for the rounding of fp32; tables are compared by what they have."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = {k for k in a.keys() | b.keys() if a.get(k) is not None and b.get(k) is not None}
        return all(_alike(a[k], b[k]) for k in keys)
    if isinstance(a, float) and isinstance(b, float | int):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    return a == b or (not a and not b)  # 0 is none


def _ids(tokenizer: Any, sample: str) -> list[int]:
    return list(tokenizer(sample)["input_ids"])
