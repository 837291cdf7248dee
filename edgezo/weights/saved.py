"""What training has changed, as tensors: to be hashed and written to a file. verified.py reads such files."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine.limits import tiles
from edgezo.weights.plain_saved import DIGEST, DIGEST_AT, NO_DIGEST, OF_RUN
from edgezo.weights.safetensors_file import SAFETENSORS_NAMES
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Trainable


class Saved(NamedTuple):
    """One tensor to be hashed or written, some rows at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]  # consecutive rows, all of the tensor in turn

    @staticmethod
    def of(name: str, tensor: Tensor) -> Saved:
        """A tensor that is in memory, as one piece."""
        return Saved(name, tuple(tensor.shape), tensor.dtype, lambda: [tensor])

    def bytes(self) -> Iterator[memoryview]:
        """The raw bytes of each piece, in order."""
        for piece in self.pieces():
            yield piece.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data


def saved_tensors(store: WeightStore) -> list[Saved]:
    """Every trained tensor of the store (low-order planes included), wherever its bytes are."""
    return [
        Saved(
            trainable.target.name + suffix,
            tuple(tensor.shape),
            tensor.dtype,
            functools.partial(_pieces, store, trainable, suffix),
        )
        for trainable in store.trainables.values()
        for suffix, tensor in trainable.layout.tensors().items()
    ]


def _pieces(store: WeightStore, trainable: Trainable, suffix: str) -> Iterator[Tensor]:
    """One raw tensor, a tile at a time; a block that is not in memory is bound for it."""
    if trainable.away:
        assert store.residency is not None
        store.residency.bind_owner(trainable.target.name)
    for rows in tiles(*trainable.layout.shape):
        yield trainable.layout.raw(rows)[suffix]


def saved_sha256(saved: Iterable[Saved]) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and bytes, in name order: equal exactly when every bit is equal."""
    digest = hashlib.sha256()
    for tensor in sorted(saved, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}\n".encode())
        for piece in tensor.bytes():
            digest.update(piece)
    return digest.hexdigest()


def write_saved(
    path: Path, tensors: Sequence[Saved], metadata: dict[str, str], *, run: str | None = None
) -> None:
    """Write a new safetensors file, one piece in memory at a time. Raises FileExistsError where there is one.

    With ``run``, the identity of the run that it belongs to, the file has a digest of all its bytes too.
    safetensors' own ``save_file`` takes tensors that are all in memory; trained weights on disk never are.
    """
    if run is not None:
        metadata = {DIGEST: NO_DIGEST, OF_RUN: run, **metadata}
    head = _head(tensors, metadata)
    digest = hashlib.sha256(head)
    with open(path, "xb") as file:
        file.write(head)
        for tensor in tensors:
            for piece in tensor.bytes():
                file.write(piece)
                if run is not None:
                    digest.update(piece)
        if run is not None:  # the file has its name only later, so nobody sees it without
            file.seek(DIGEST_AT)
            file.write(digest.hexdigest().encode())


def _head(tensors: Sequence[Saved], metadata: dict[str, str]) -> bytes:
    """What stands before the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def trained_tensors(store: WeightStore) -> dict[str, Tensor]:
    """Every trained tensor by name, the stored tensors themselves. Not for blocks that are not in memory."""
    return {
        trainable.target.name + suffix: tensor
        for trainable in store.trainables.values()
        for suffix, tensor in trainable.layout.tensors().items()
    }


def snapshot_tensors(store: WeightStore) -> dict[str, Tensor]:
    """``trained_tensors``, the state of rule and mask, and the bases of guided directions, by name.

    For runs whose directions no seed gives again: they go on from a snapshot, not from the journal.
    """
    trainables = store.trainables.values()
    states = {f"{t.target.name}@{name}": s for t in trainables for name, s in t.state.items()}
    bases = {f"{t.target.name}@basis": t.basis for t in trainables if t.basis is not None}
    return trained_tensors(store) | states | bases


def load_trained(store: WeightStore, tensors: dict[str, Tensor]) -> None:
    """Copy the values that ``trained_tensors`` gave in another process into the store.

    Raises EdgezoError where a tensor is missing or has another shape or dtype.
    """
    for name, stored in trained_tensors(store).items():
        given = tensors.get(name)
        if given is None or given.shape != stored.shape or given.dtype != stored.dtype:
            instead = "missing" if given is None else f"{tuple(given.shape)} {given.dtype}"
            raise EdgezoError(
                f"the trained tensor {name} should be {tuple(stored.shape)} {stored.dtype}, but it is {instead}.\n"
                "The file belongs to another model, precision or --train choice."
            )
        stored.copy_(given)
