"""The safetensors files that edgezo writes for itself, as numpy arrays: what saved.py and verified.py are with torch.

Files of both have one form, so that each engine reads what the other wrote: a digest of all bytes and the run that
the file belongs to stand in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import parse_json, reading
from edgezo.machine.open_files import open_to_read

# Metadata of the safetensors files that edgezo writes for itself.
DIGEST = "sha256"  # SHA-256 (hex) of the file with these 64 characters as zeros
OF_RUN = "run"  # the run that the file belongs to (directory.run_id)
NO_DIGEST = "0" * 64
DIGEST_AT = 8 + len(f'{{"__metadata__":{{"{DIGEST}":"')  # offset in the file
MOST_SAVED_HEADER = 4 << 20  # bytes: 40,000 tensors, a hundred times as many as a model has
_ARRAY_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}


def write_arrays(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], run: str
) -> None:
    """Write a new file. Raises FileExistsError where there is one."""
    names = {dtype: name for name, dtype in _ARRAY_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {DIGEST: NO_DIGEST, OF_RUN: run, **metadata}}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        about = {"dtype": names[values.dtype], "shape": list(values.shape)}
        header[name] = {**about, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with open(path, "xb") as file:
        file.write(head)
        for values in tensors.values():
            raw = np.ascontiguousarray(values).tobytes()
            file.write(raw)
            digest.update(raw)
        file.seek(DIGEST_AT)
        file.write(digest.hexdigest().encode())


def read_arrays(
    path: Path, keys: Set[str], run: str | None, way_out: str
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """(metadata, tensors) of a file in which ``keys`` are the metadata of its kind, verified by its digest.

    ``run`` is the run that it must belong to (None: any). Raises EdgezoError, which ends with ``way_out``, for a file
    that is damaged, of another kind, of another run, or without a digest.
    """
    with reading(path, way_out), os.fdopen(open_to_read(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MOST_SAVED_HEADER):
            raise ValueError(f"it has {size:,} bytes and no header within them")
        text = file.read(length)
        header = parse_json(text.decode("utf-8"))
        metadata: dict[str, str] = header.pop("__metadata__")
        if metadata.keys() != keys | {DIGEST, OF_RUN}:
            raise ValueError(f"its metadata are {', '.join(sorted(metadata))}"[:200])
        body = file.read()
        head = prefix + text
        after = DIGEST_AT + len(NO_DIGEST)
        head = head[:DIGEST_AT] + NO_DIGEST.encode() + head[after:]
        if hashlib.sha256(head + body).hexdigest() != metadata[DIGEST]:
            raise ValueError("its bytes are not those that its digest was made of")
        if run is not None and metadata[OF_RUN] != run:
            raise EdgezoError(
                f"{path} belongs to another run than the journal beside it.\n{way_out}"
            )
        tensors = {}
        for name, about in header.items():
            first, last = about["data_offsets"]
            dtype: np.dtype[Any] = _ARRAY_DTYPES[about["dtype"]]
            values = np.frombuffer(body, dtype, (last - first) // dtype.itemsize, first)
            tensors[name] = values.reshape(about["shape"]).copy()
            if not np.isfinite(tensors[name]).all():
                raise ValueError(f"its tensor {name} holds values that are not finite"[:200])
    return metadata, tensors
