"""Keys and values that attention keeps while a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.machine.matmul import compiled

REACH_STEP = 64  # kept tokens are read in multiples of so many
WIDENED_ROWS = 8  # rows whose keys and values are in fp32 at once


class KeyValues:
    """Keys and values of every attention layer, (rows, kv_heads, room, head_dim) each, padded at the end.

    Memory for them is taken inside ``apart(tokens of the forward)`` (process_memory.Heap).
    """

    def __init__(self, rows: int, room: int, apart: Callable[[int], AbstractContextManager[None]]):
        self.room, self._apart = room, apart
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # tokens of each row so far
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # keys and values of each layer
        self._next_rows = torch.arange(rows)  # rows of the next forward
        self._next_lengths: tuple[int, ...] = ()  # tokens of each, of prompts; (): one token each

    def expect(self, rows: Tensor, lengths: Sequence[int] = ()) -> None:
        """The next forward is over ``rows`` (R,): prompts of ``lengths`` tokens, or without lengths one token each."""
        self._next_rows, self._next_lengths = rows, tuple(lengths)

    def first_positions(self) -> Tensor:
        """Position of the first token of each row of the next forward, (R,) int64."""
        return self.lengths[self._next_rows]

    def took(self) -> None:
        """Count the tokens of the forward that has just run."""
        self.lengths[self._next_rows] += torch.tensor(self._next_lengths or 1)

    def keep(self, rows: Tensor) -> None:
        """Move ``rows`` (ascending) together and drop the others."""
        self.lengths = self.lengths[rows]
        for pair in self._kept.values():
            for part in pair:
                part[: len(rows)] = part[rows.to(part.device)]

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (n, kv_heads, head_dim) of this forward's tokens in one layer."""
        if module not in self._kept:
            shape = (len(self.lengths), key.shape[1], self.room, key.shape[2])
            with self._apart(len(key)):
                # Zeros: tokens that are not written yet have weight 0, and 0 * NaN would be NaN.
                self._kept[module] = key.new_zeros(shape), value.new_zeros(shape)
        for part, new in zip(self._kept[module], (key, value), strict=True):
            if not self._next_lengths:
                rows = torch.arange(len(self.lengths), device=part.device)
                part[rows, :, self.lengths.to(part.device)] = new
                continue
            start = 0
            for row, length in zip(self._next_rows.tolist(), self._next_lengths, strict=True):
                part[row, :, :length] = new[start : start + length].transpose(0, 1)
                start += length

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # (n, heads, head_dim), one token a row
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor | None:
        """Attention of each row's new token, (n, heads, head_dim); None for prompts, which read themselves only."""
        if self._next_lengths:
            return None
        n, heads, width = query.shape
        # In steps, so that there are few different shapes (machine/matmul.py); tokens past a row's end have weight 0.
        reach = min(self.room, -(-(int(self.lengths.max()) + 1) // REACH_STEP) * REACH_STEP)
        key, value = (part[:n, :, :reach] for part in self._kept[module])
        scale = scaling if scaling is not None else width**-0.5
        behind = self.lengths[:, None] - torch.arange(reach)  # (n, reach)
        seen = behind >= 0
        if window is not None:
            seen &= behind < window
        seen = seen[:, None, None].to(query.device)
        if softcap is None and not query.is_cuda:
            # One fused kernel: plain products would be compiled for each number of rows (machine/matmul.py).
            grouped = heads > key.shape[1]
            y = F.scaled_dot_product_attention(
                query[:, :, None], key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
            )
            return y[:, :, 0]
        if not compiled(query):
            return _weighed(query, key, value, seen, scale, softcap)
        y = torch.empty_like(query)
        for at in range(0, n, WIDENED_ROWS):
            rows = slice(at, at + WIDENED_ROWS)
            wide = [part[rows].float() for part in (query, key, value)]
            y[rows] = _weighed(wide[0], wide[1], wide[2], seen[rows], scale, softcap)
        return y


def _weighed(
    query: Tensor,  # (n, heads, head_dim)
    key: Tensor,  # (n, kv_heads, reach, head_dim)
    value: Tensor,
    seen: Tensor,  # (n, 1, 1, reach) bool
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention of one token a row, (n, heads, head_dim)."""
    n, heads, width = query.shape
    grouped = query.reshape(n, key.shape[1], -1, width)  # queries of the same key together
    scores = (grouped @ key.transpose(2, 3)).float() * scale  # (n, kv_heads, group, reach)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).to(value.dtype)
    return (weights @ value).reshape(n, heads, width)
