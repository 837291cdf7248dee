"""States of rows at a model's cut, kept on disk: what the frozen blocks put out for each token, computed once.

======  ==========  =========================================================================================
offset  type        field
======  ==========  =========================================================================================
0       8 bytes     magic ``89 45 5A 4B 0D 0A 1A 0A``
8       2 u32       format version, 1; hidden
16      32 bytes    digest of what the states follow from beside a row's tokens: base, cut, precision (``identity``)
48      u32         CRC of the bytes before
52      rows        digest of the tokens, 16 bytes; their number n, u32; CRC of the data; CRC of these 24 bytes; data
======  ==========  =========================================================================================

The data of a row are n x hidden values in the compute dtype or in bf16, or, as int8, n x hidden codes and then n fp32
scales, one a token. A row is known by its tokens, so rows that are alike are kept once, and a file serves every request
for the same base and cut. The file only grows: after a kill it has every row that was written whole, and a row that is
damaged is written again at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgezo.data.batches import Batch
from edgezo.weights.plain_states import CODES, SCALE_BYTES, PlainStatesFile, digest_of


class StateForm(NamedTuple):
    """How a state is kept."""

    name: str
    dtype: torch.dtype  # of a value on disk
    scaled: bool = False  # codes, with a scale for each token

    def row_bytes(self, tokens: int, hidden: int) -> int:
        """Bytes of the states of so many tokens."""
        return tokens * (hidden * self.dtype.itemsize + (SCALE_BYTES if self.scaled else 0))

    def pack(self, states: Tensor) -> np.ndarray:
        """States (n, hidden) as bytes, flat uint8."""
        if not self.scaled:
            return _raw(states.to(self.dtype).contiguous())
        wide = states.float()
        scale = wide.abs().amax(1, keepdim=True) / CODES
        codes = torch.round(wide / scale.clamp(min=torch.finfo(torch.float32).tiny))
        return np.concatenate([_raw(codes.to(torch.int8)), _raw(scale)])

    def unpack(self, raw: Tensor, out: Tensor) -> None:
        """Fill ``out`` (n, hidden) with the states that ``raw`` (flat uint8) holds."""
        tokens, hidden = out.shape
        size = tokens * hidden * self.dtype.itemsize
        values = raw[:size].view(self.dtype).view(tokens, hidden)
        if not self.scaled:
            out.copy_(values)
            return
        scale = torch.from_numpy(raw[size:].numpy().copy()).view(torch.float32)
        out.copy_(values.float() * scale[:, None])


def _raw(values: Tensor) -> np.ndarray:
    return values.reshape(-1).view(torch.uint8).numpy()


STATE_FORMS = {
    form.name: form
    for form in (
        StateForm("fp32", torch.float32),
        StateForm("bf16", torch.bfloat16),
        StateForm("int8", torch.int8, scaled=True),
    )
}


def digests_of(batch: Batch) -> list[bytes]:
    """The digests of a batch's rows."""
    ids, digests, start = batch.ids.numpy(), [], 0
    for length, tree in zip(batch.lengths, batch.trees, strict=True):
        digests.append(digest_of(ids[start : start + length], () if tree is None else tree.parents))
        start += length
    return digests


class StatesFile(PlainStatesFile):
    """``PlainStatesFile`` for tensors."""

    form: StateForm

    def read(self, digest: bytes, out: Tensor) -> bool:
        """Fill ``out`` (n, hidden) with the states of a row of n tokens; False where they are not here.

        Raises EdgezoError where they are not as they were written.
        """
        raw = self.read_raw(digest, len(out))
        if raw is None:
            return False
        self.form.unpack(torch.frombuffer(raw, dtype=torch.uint8), out)
        return True
