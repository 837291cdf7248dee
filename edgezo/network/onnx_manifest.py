"""The manifest of a trainable export: what its graphs are, what their inputs mean, and the digest of every file.

Standard library only, so that a plan can be made from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import MOST_INDEX_BYTES, parse_json, read_small, reading
from edgezo.plan.shapes import Shape

_WEIGHT_DTYPES = {name: name for name in ("float32", "int8", "uint8")}
MANIFEST_FILE, FORM, VERSION = "manifest.json", "edgezo trainable graphs", 1
GRAPH_TOKENIZER = "tokenizer.json"
_WRITE_AGAIN = "Write it again: edgezo export MODEL --format onnx --trainable --out DIR."
_HASHED_BYTES = 1 << 20


class TrainedLinear(NamedTuple):
    """One linear whose low-rank factor is trained."""

    name: str  # of its weight, which the noise of its directions is addressed by
    rows: int
    cols: int


class PlacedWeight(NamedTuple):
    """A frozen weight of a block, which its graph takes as an input."""

    name: str  # of the input
    offset: int  # in the block's file of weights
    shape: tuple[int, ...]
    dtype: str  # float32, int8 or uint8


class BlockGraph(NamedTuple):
    """One block: its files, its linears in the order of the graph's inputs, and how its attention looks."""

    file: str  # of the graph, which blocks that compute the same share
    data: str
    weights: tuple[PlacedWeight, ...]
    linears: tuple[TrainedLinear, ...]
    kind: str  # of rotary positions
    window: int  # tokens that attention looks back; 0: all
    writing: str  # the file of its graph for writing; "" in exports from before there was one


class TableOfRows(NamedTuple):
    """A matrix of which a graph takes some rows as inputs, with their scales where they are codes."""

    data: str
    weights: tuple[PlacedWeight, ...]


def _placed(weights: Sequence[Sequence[Any]]) -> tuple[PlacedWeight, ...]:
    return tuple(
        PlacedWeight(str(name), int(at), tuple(map(int, shape)), _WEIGHT_DTYPES[dtype])
        for name, at, shape, dtype in weights
    )


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    path: Path  # the directory
    values: Mapping[str, Any]

    @cached_property
    def blocks(self) -> tuple[BlockGraph, ...]:
        return tuple(
            BlockGraph(
                str(block["file"]),
                str(block["data"]),
                _placed(block["weights"]),
                tuple(TrainedLinear(str(n), int(r), int(c)) for n, r, c in block["linears"]),
                str(block["kind"]),
                int(block["window"]),
                str(block.get("writing", "")),
            )
            for block in self.values["blocks"]
        )

    def table(self, name: str) -> TableOfRows:
        """The table (the embedding's) or the head's rows: some of them are inputs of a graph."""
        about = self.values["rows"][name]
        return TableOfRows(str(about["data"]), _placed(about["weights"]))

    @cached_property
    def shape(self) -> Shape:
        """Sizes of the model, for the planner."""
        return Shape(**self.values["shape"])

    @property
    def base_sha256(self) -> str:
        """The content of the base's weights, as the journals of every engine name it."""
        return str(self.values["base"]["sha256"])

    @property
    def base(self) -> str:
        """Where the base was when the graphs were written: a path, a card or a hub id."""
        return str(self.values["base"]["model"])

    @property
    def precision(self) -> str:
        return str(self.values["precision"])

    @property
    def softcap(self) -> float | None:
        cap = self.values["softcap"]
        return None if cap is None else float(cap)

    @property
    def rotary(self) -> Mapping[str, Mapping[str, Any]]:
        """Frequencies and scaling by kind."""
        return dict(self.values["rotary"])

    def file(self, name: str) -> Path:
        """The path of one of the files."""
        return self.path / name

    def bytes_of(self, *names: str) -> int:
        """Bytes of files together."""
        return sum(int(self.values["files"][name]["bytes"]) for name in names)

    def check_files(self) -> None:
        """Raise EdgezoError where a file is missing or is not the one that was written."""
        for name, about in self.values["files"].items():
            path = self.path / name
            if not path.is_file():
                raise EdgezoError(f"{path} is missing: {MANIFEST_FILE} names it.\n{_WRITE_AGAIN}")
            size, expected = path.stat().st_size, about["bytes"]
            if size != expected or sha256_of(path) != about["sha256"]:
                raise EdgezoError(
                    f"{path} is not the file that was written: it has {size:,} bytes of {expected:,}, or others.\n"
                    f"{_WRITE_AGAIN}"
                )


def is_trainable_export(path: Path) -> bool:
    """Whether a directory says that it is a trainable export."""
    return (path / MANIFEST_FILE).is_file()


def open_manifest(path: Path) -> Manifest:
    """The manifest of a directory. Raises EdgezoError where there is none, or one that edgezo did not write."""
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise EdgezoError(
            f"{path} is no trainable export: it has no {MANIFEST_FILE}.\n"
            "--engine onnx trains what this writes: edgezo export MODEL --format onnx --trainable --out DIR."
        )
    with reading(file, _WRITE_AGAIN):
        values = parse_json(read_small(file, MOST_INDEX_BYTES).decode("utf-8"))
        if not isinstance(values, dict) or values.get("form") != FORM:
            raise ValueError("it is no manifest of trainable graphs")
        if values["version"] != VERSION:
            raise ValueError(f"it has the version {values['version']}, and edgezo reads {VERSION}")
        manifest = Manifest(path, values)
        _check_values(manifest)
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raise KeyError, TypeError or ValueError unless every part is there, and files lie in the directory."""
    shape, blocks = manifest.shape, manifest.blocks
    if len(blocks) != shape.layers:
        raise ValueError(f"it has {len(blocks)} blocks of {shape.layers}")
    names = list(manifest.values["files"])
    of_blocks = (name for block in blocks for name in (block.file, block.data, block.writing))
    used = [*filter(None, of_blocks), *_fixed_files()]
    missing = [name for name in used if name not in names]
    if missing or any(Path(name).name != name for name in names):
        raise ValueError(f"files are missing or elsewhere: {', '.join(missing or names)[:200]}")
    if any(block.kind not in manifest.rotary for block in blocks):
        raise ValueError("a block has no rotary positions")
    _ = manifest.table("table"), manifest.table("head")
    _ = manifest.base_sha256, manifest.base, manifest.precision, manifest.softcap


def _fixed_files() -> Sequence[str]:
    return ("embed.onnx", "end.onnx", "rows.onnx", "head.onnx", GRAPH_TOKENIZER)


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read some of it at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASHED_BYTES):
            digest.update(piece)
    return digest.hexdigest()
