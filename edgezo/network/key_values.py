"""Keys and values that attention keeps while a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.machine.matmul import compiled


class KeyValues:
    """Keys and values of every attention layer, (rows, kv_heads, room, head_dim) each, padded at the end.

    ``apart(tokens of a forward)`` is where their memory is taken.
    """

    def __init__(self, rows: int, room: int, apart: Callable[[int], AbstractContextManager[None]]):
        self.room, self._apart = room, apart
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # tokens of each row so far
        self._held: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._here = torch.arange(rows)  # rows that the tokens of the next forward are of
        self._fill: tuple[int, ...] = ()  # their lengths, of prompts; () where each has one token

    def expect(self, rows: Tensor, lengths: Sequence[int] = ()) -> None:
        """Prompts of ``lengths`` tokens are next, of ``rows`` (R,); or without lengths one token of every row."""
        self._here, self._fill = rows, tuple(lengths)

    def first_positions(self) -> Tensor:
        """Position of the first token of each row of the next forward, (R,) int64."""
        return self.lengths[self._here]

    def took(self) -> None:
        """The forward is over: its tokens are in."""
        self.lengths[self._here] += torch.tensor(self._fill or 1)

    def keep(self, rows: Tensor) -> None:
        """Move ``rows`` (ascending) together; the others are gone."""
        self.lengths = self.lengths[rows]
        for held in self._held.values():
            for part in held:
                part[: len(rows)] = part[rows.to(part.device)]

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Take in keys and values (n, kv_heads, head_dim) of the tokens of this forward, in one layer."""
        if module not in self._held:
            shape = (len(self.lengths), key.shape[1], self.room, key.shape[2])
            with self._apart(len(key)):
                # Zeros: what is not there yet has weight 0, and 0 * NaN would be NaN.
                self._held[module] = key.new_zeros(shape), value.new_zeros(shape)
        for part, new in zip(self._held[module], (key, value), strict=True):
            if not self._fill:
                rows = torch.arange(len(self.lengths), device=part.device)
                part[rows, :, self.lengths.to(part.device)] = new
                continue
            start = 0
            for row, length in zip(self._here.tolist(), self._fill, strict=True):
                part[row, :, :length] = new[start : start + length].transpose(0, 1)
                start += length

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # (n, heads, head_dim) of one token of each row
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor | None:
        """What each row's new token reads, (n, heads, head_dim); None for prompts, which read themselves only."""
        if self._fill:
            return None
        n, heads, width = query.shape
        # As few different lengths as there can be (machine/matmul.py); what is beyond a row's end has weight 0.
        reach = min(self.room, -(-(int(self.lengths.max()) + 1) // REACH_STEP) * REACH_STEP)
        key, value = (part[:n, :, :reach] for part in self._held[module])
        scale = scaling if scaling is not None else width**-0.5
        behind = self.lengths[:, None] - torch.arange(reach)  # (n, reach)
        seen = behind >= 0
        if window is not None:
            seen &= behind < window
        seen = seen[:, None, None].to(query.device)
        if softcap is None and not query.is_cuda:
            # One fused kernel: of plain products each number of rows would be compiled, and kept (machine/matmul.py).
            grouped = heads > key.shape[1]
            asked = query[:, :, None]
            found = F.scaled_dot_product_attention(
                asked, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
            )
            return found[:, :, 0]
        if not compiled(query):
            return _weighed(query, key, value, seen, scale, softcap)
        found = torch.empty_like(query)
        for at in range(0, n, WIDENED_ROWS):
            rows = slice(at, at + WIDENED_ROWS)
            wide = [part[rows].float() for part in (query, key, value)]
            found[rows] = _weighed(wide[0], wide[1], wide[2], seen[rows], scale, softcap)
        return found


REACH_STEP = 64  # tokens that what is kept is read in multiples of


WIDENED_ROWS = 8  # whose keys and values are in fp32 at once


def _weighed(
    query: Tensor,  # (n, heads, head_dim)
    key: Tensor,  # (n, kv_heads, reach, head_dim)
    value: Tensor,
    seen: Tensor,  # (n, 1, 1, reach) bool
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of one token of each row, (n, heads, head_dim)."""
    n, heads, width = query.shape
    grouped = query.reshape(n, key.shape[1], -1, width)  # queries of the same key together
    scores = (grouped @ key.transpose(2, 3)).float() * scale  # (n, kv_heads, group, reach)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).to(value.dtype)
    return (weights @ value).reshape(n, heads, width)
