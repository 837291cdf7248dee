"""The one reader of the safetensors files that edgezo writes for itself: head, probe and trained.safetensors.

Nothing of such a file is used before these hold:

    the header        describes every byte of the file, and has the metadata of its kind
    the digest        that was written with the file is that of its bytes, the metadata included
    the run           that the file names is the one whose journal lies beside it
    the numbers       are finite, unless they are integers

Files of versions before there was a digest have neither it nor a run, and are read all the same. Tensors are read into
memory that is there already, a piece at a time, and each piece is hashed while it is in the cache.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import clip, parse_json, reading
from edgezo.machine.open_files import open_to_read
from edgezo.weights.plain_saved import DIGEST, DIGEST_AT, MOST_SAVED_HEADER, NO_DIGEST, OF_RUN
from edgezo.weights.safetensors_file import SAFETENSORS_NAMES, as_bytes, spans

_READ_BYTES = 4 << 20  # at a time
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


class SavedPlace(NamedTuple):
    """Where one tensor lies in the bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass
class SavedFile:
    """An open file of edgezo's whose header has been read. Its metadata and tensors are believed after ``read``."""

    path: Path
    metadata: dict[str, str]
    places: dict[str, SavedPlace]  # by name, in the order of the file
    way_out: str
    _file: BinaryIO = field(repr=False)
    _head: bytes = field(repr=False)

    @property
    def run(self) -> str | None:
        """The run that the file names; None in a file of an earlier version."""
        return self.metadata.get(OF_RUN)

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Read and verify the whole file, and fill the tensors ``into``, by name, of the shapes and dtypes in the file.

        Raises EdgezoError; the tensors may then have been overwritten in part.
        """
        for name, tensor in into.items():
            self._check_fits(name, tensor)
        digest = hashlib.sha256(self._head)
        self._file.seek(len(self._head))
        infinite = ""
        for name, place in self.places.items():
            for piece in self._fill(place, into.get(name)):
                digest.update(as_bytes(piece))
                infinite = infinite or ("" if _is_finite(piece) else name)
        if DIGEST in self.metadata and digest.hexdigest() != self.metadata[DIGEST]:
            raise EdgezoError(
                f"{self.path} is damaged: its bytes are not those that its digest was made of.\n{self.way_out}"
            )
        if infinite:
            why = (
                "the run has diverged" if DIGEST in self.metadata else "it is damaged, or diverged"
            )
            raise EdgezoError(
                f"{self.path}: the tensor {clip(infinite, 60)} holds values that are not finite: {why}.\n"
                "Restore the file from a copy, or start again with a smaller --step, --lora-lr or --head-lr."
            )

    def _check_fits(self, name: str, tensor: Tensor) -> None:
        """Raise EdgezoError unless the file has a tensor of this name, shape and dtype."""
        place = self.places.get(name)
        if place is not None and (place.shape, place.dtype) == (tuple(tensor.shape), tensor.dtype):
            return
        instead = "missing" if place is None else f"{place.shape} {place.dtype}"
        raise EdgezoError(
            f"{self.path}: the tensor {clip(name, 60)} should be {tuple(tensor.shape)} {tensor.dtype}, but it is "
            f"{clip(instead, 60)}. It belongs to another model, precision or --train choice.\n{self.way_out}"
        )

    def _fill(self, place: SavedPlace, target: Tensor | None) -> Iterator[Tensor]:
        """Read the next tensor of the file, into ``target`` if there is one; yields its pieces, flat."""
        whole = target
        if target is not None and not target.is_contiguous():
            whole = torch.empty(target.shape, dtype=target.dtype)
        width = place.dtype.itemsize
        most = _READ_BYTES // width
        buffer = torch.empty(min(most, place.nbytes // width), dtype=place.dtype)
        for first, last in spans(place.nbytes // width, most):
            piece = buffer[: last - first]
            self._read_into(as_bytes(piece))
            if whole is not None:
                whole.detach().view(-1)[first:last].copy_(piece)
            yield piece
        if target is not None and whole is not None and whole is not target:
            target.copy_(whole)

    def _read_into(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError("it has become shorter while it was read")
            done += count


@contextmanager
def open_saved(path: Path, keys: Set[str], run: str | None, way_out: str) -> Iterator[SavedFile]:
    """A file of edgezo's in which ``keys`` are the metadata of its kind; ``run`` is the run that it must belong to.

    ``run`` None: of whatever run. Everything that the block raises over what it reads becomes EdgezoError, which ends
    with ``way_out``. Raises EdgezoError for a file that is damaged, of another kind, or of another run.
    """
    with reading(path, way_out), os.fdopen(open_to_read(path), "rb", buffering=0) as file:
        saved = _open(path, file, keys, way_out)
        if run is not None and saved.run not in (None, run):
            saved.read({})  # a damaged name of its run is damage
            raise EdgezoError(
                f"{path} belongs to another run than the journal beside it.\n{way_out}"
            )
        yield saved


def _open(path: Path, file: BinaryIO, keys: Set[str], way_out: str) -> SavedFile:
    """Read the header. Raises ValueError, and what parsing raises, unless it is one of a file of edgezo's."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, MOST_SAVED_HEADER):
        raise ValueError(f"it has {size:,} bytes and no header within them")
    text = file.read(length)
    header = parse_json(text.decode("utf-8"))
    metadata = header.pop("__metadata__")
    if not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    extra = {DIGEST, OF_RUN} if DIGEST in metadata or OF_RUN in metadata else set()
    if metadata.keys() != keys | extra:
        names = clip(", ".join(sorted(metadata.keys() ^ (keys | extra))), 60)
        raise ValueError(f"its metadata lack, or have too much: {names}")
    head = prefix + text
    if extra:
        after = DIGEST_AT + len(NO_DIGEST)
        if head[DIGEST_AT:after] != metadata[DIGEST].encode():
            raise ValueError("its digest is not where it belongs")
        head = head[:DIGEST_AT] + NO_DIGEST.encode() + head[after:]
    places = _places(header, size - len(head))
    return SavedFile(path, metadata, places, way_out, file, head)


def _places(header: dict[str, Any], size: int) -> dict[str, SavedPlace]:
    """Where the tensors lie, in order. Raises ValueError unless each byte of ``size`` belongs to exactly one."""
    places = {}
    for name, fields in header.items():
        kind, shape, (first, last) = fields["dtype"], fields["shape"], fields["data_offsets"]
        if kind not in _DTYPES or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its tensor {clip(name, 60)} is of no kind that edgezo writes")
        if len(shape) > 8 or any(type(n) is not int or not 0 <= n <= 1 << 48 for n in shape):
            raise ValueError(f"its tensor {clip(name, 60)} has no shape")
        if type(first) is not int or last != first + math.prod(shape) * _DTYPES[kind].itemsize:
            raise ValueError(
                f"its tensor {clip(name, 60)} has another number of bytes than its shape"
            )
        places[name] = SavedPlace(_DTYPES[kind], tuple(shape), first, last - first)
    end = 0
    places = dict(sorted(places.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    for name, place in places.items():
        if place.offset != end:
            raise ValueError(f"its tensor {clip(name, 60)} begins at {place.offset:,}, not {end:,}")
        end += place.nbytes
    if end != size:
        raise ValueError(f"its tensors have {end:,} bytes, but {size:,} are there")
    return places


def _is_finite(piece: Tensor) -> bool:
    """Whether all numbers of a piece are finite, in one pass without temporaries."""
    if not piece.is_floating_point() or not piece.numel():
        return True
    low, high = torch.aminmax(piece)  # both propagate NaN
    return math.isfinite(low) and math.isfinite(high)
