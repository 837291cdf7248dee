"""Padding-free forwards: rows lie end to end in one token axis, and only attention sees them as rows.

transformers' modules run on a batch of one long row. Their attention is routed here (``ATTENTION`` is registered
in transformers' attention interface), which gathers rows of like length into small padded groups. Of rows that are
trees (data/trees.py) the trunks pass as rows, and each token behind them looks at its way to the root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgezo.data.trees import Tree
from edgezo.machine import kernels
from edgezo.machine.limits import PADDED_TOKENS, SCORE_COPIES, TILE_BYTES
from edgezo.machine.matmul import compiled
from edgezo.machine.philox import CPU
from edgezo.machine.transfers import uploaded

ATTENTION = "edgezo_packed"
LENGTH_STEP = 64  # softcapped products are padded to a multiple of so many tokens
_WASTE = 1.15  # most padded tokens of a group for each real one


@dataclass(frozen=True)
class Group:
    """Rows of like length, padded."""

    index: Tensor  # (R, T) int64 into the packed axis; padding repeats the row's first token
    valid: Tensor  # (R, T) bool: no padding
    at: tuple[Tensor, Tensor]  # (tokens,) int64 each: where ``valid`` is true
    full: bool  # no padding in any row


@dataclass(frozen=True)
class Branches:
    """What stands behind the trunk of one row that is a tree."""

    whole: slice  # the packed tokens of the row
    behind: slice  # those behind the trunk
    # Padded to multiples of LENGTH_STEP, M and T, so that there are few different shapes (machine/matmul.py):
    seen: Tensor  # (M, T) bool: whom the tokens behind the trunk look at; the padding looks at the first token
    at: Tensor  # (M,) int64: their positions
    depths: Tensor  # (T,) int64: positions of all
    depths_here: Tensor  # ``depths`` on the CPU

    @staticmethod
    def of(tree: Tree, start: int, device: torch.device) -> Branches:
        """The branches of a tree whose first token is the packed one at ``start``."""
        n, m = len(tree.ids), len(tree.ids) - tree.trunk
        seen = np.zeros((m + -m % LENGTH_STEP, n + -n % LENGTH_STEP), dtype=bool)
        seen[:m, :n] = tree.seen
        seen[m:, 0] = True
        at, depths = (np.zeros(size, dtype=np.int64) for size in seen.shape)
        at[:m], depths[:n] = tree.depths[tree.trunk :], tree.depths
        here = [torch.from_numpy(part) for part in (seen, at, depths)]
        seen_there, at_there, depths_there = (uploaded(part, device) for part in here)
        whole, behind = slice(start, start + n), slice(start + tree.trunk, start + n)
        return Branches(whole, behind, seen_there, at_there, depths_there, here[-1])

    def mask(self, window: int | None) -> Tensor:
        """Which tokens each token behind the trunk looks at, (1, 1, M, T) bool."""
        seen = self.seen
        if window is not None:
            seen = seen & (self.at[:, None] - self.depths[None] < window)
        return seen[None, None]

    def attend(
        self,
        parts: Sequence[Tensor],  # q, k, v of all packed tokens, (n, heads or kv_heads, head_dim)
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of the tokens behind the trunk, (m, heads, head_dim)."""
        sizes = (*self.seen.shape, self.seen.shape[1])
        places = (self.behind, self.whole, self.whole)
        padded = []
        for part, place, size in zip(parts, places, sizes, strict=True):
            tokens = part[place].transpose(0, 1)
            padded.append(F.pad(tokens, (0, 0, 0, size - tokens.shape[1]))[None])
        y = _attend(padded, self.mask(window), scale, softcap)
        return y[0, :, : self.behind.stop - self.behind.start].transpose(0, 1)


@dataclass(frozen=True)
class Trunks:
    """The trunks of trees and whole rows, as rows of a kernel."""

    index: Tensor  # (t,) int64 into the packed axis
    starts: Tensor  # (rows + 1,) int64 on the CPU: where each begins in ``index``
    longest: int

    @staticmethod
    def of(lengths: Sequence[int], starts: Sequence[int], device: torch.device) -> Trunks:
        """The first ``lengths`` tokens of rows that begin at ``starts``."""
        pairs = zip(starts[:-1], lengths, strict=True)
        index = torch.cat([torch.arange(start, start + n) for start, n in pairs])
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return Trunks(uploaded(index, device), ends, max(lengths))


@dataclass(frozen=True)
class Packing:
    """How the packed token axis falls into rows."""

    lengths: tuple[int, ...]
    groups: tuple[Group, ...]  # of the rows; of a tree, of its trunk
    starts: (
        Tensor  # (rows + 1,) int64 on the CPU: where each row begins, and where the last one ends
    )
    trunks: Trunks | None = None  # where some rows are trees
    branches: tuple[Branches, ...] = ()  # of the rows that are trees

    @staticmethod
    def of(
        lengths: tuple[int, ...],
        device: torch.device = CPU,
        trees: Sequence[Tree | None] = (),
    ) -> Packing:
        """The packing of rows of ``lengths`` tokens, some of which are trees; longest rows are grouped first."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        trunks = list(lengths)
        branches = []
        for row, tree in enumerate(trees):
            if tree is not None and tree.trunk < len(tree.ids):
                trunks[row] = tree.trunk
                branches.append(Branches.of(tree, starts[row], device))
        order = sorted(range(len(trunks)), key=lambda r: (-trunks[r], r))
        groups: list[Group] = []
        members: list[int] = []
        for row in order:
            if members:
                longest = trunks[members[0]]
                tokens = sum(trunks[m] for m in members) + trunks[row]
                padded = longest * (len(members) + 1)
                if padded > _WASTE * tokens or padded > PADDED_TOKENS:
                    groups.append(_group(members, trunks, starts, device))
                    members = []
            members.append(row)
        groups.append(_group(members, trunks, starts, device))
        return Packing(
            tuple(lengths),
            tuple(groups),
            torch.tensor(starts),
            Trunks.of(trunks, starts, device) if branches else None,
            tuple(branches),
        )

    def positions(self) -> Tensor:
        """Position of each token in its row, (n,) int64."""
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        for branches in self.branches:
            length = branches.whole.stop - branches.whole.start
            positions[branches.whole] = branches.depths_here[:length]
        return positions


def _group(
    members: list[int], lengths: Sequence[int], starts: list[int], device: torch.device
) -> Group:
    length = torch.tensor([lengths[m] for m in members])[:, None]
    begin = torch.tensor([starts[m] for m in members])[:, None]
    column = torch.arange(int(length.max()))[None]
    valid = column < length
    index = uploaded(begin + torch.where(valid, column, 0), device)
    row, column = (uploaded(at, device) for at in valid.nonzero(as_tuple=True))
    return Group(index, uploaded(valid, device), (row, column), bool(valid.all()))


class Kept(Protocol):
    """Keys and values that later forwards attend to (key_values.KeyValues)."""

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None: ...

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor | None: ...


_current: ContextVar[tuple[Packing, Kept | None]] = ContextVar("packing")


@contextmanager
def packed(packing: Packing, kept: Kept | None = None) -> Iterator[None]:
    """Inside this context attention stays within the rows of ``packing``, and reads ``kept`` where rows go on."""
    token = _current.set((packing, kept))
    try:
        yield
    finally:
        _current.reset(token)


def current_rows() -> tuple[int, ...] | None:
    """Tokens of each row of the forward that is running; None outside of ``packed``."""
    running = _current.get(None)
    return None if running is None else running[0].lengths


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, n, head_dim)
    key: Tensor,  # (1, kv_heads, n, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within rows, (1, n, heads, head_dim), and None for its weights: transformers' interface."""
    # 0 is no window: a kernel and torch would take it for different things.
    sliding_window, softcap = sliding_window or None, softcap or None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (n, heads, head_dim)
    packing, kept = _current.get()
    if kept is not None:
        kept.store(module, k, v)
        continued = kept.attend(module, q, scaling, sliding_window, softcap)
        if continued is not None:
            return continued[None], None
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    parts, trunks = (q, k, v), packing.trunks
    fused = None
    if softcap is None:
        rows = parts if trunks is None else tuple(part[trunks.index] for part in parts)
        starts = packing.starts if trunks is None else trunks.starts
        longest = max(packing.lengths) if trunks is None else trunks.longest
        fused = kernels.attention(
            rows[0], rows[1], rows[2], starts, longest, scale, bool(causal), sliding_window
        )
    if fused is not None and trunks is None:
        return fused[None], None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if fused is not None and trunks is not None:
        out[trunks.index] = fused
    else:
        for group in packing.groups:
            _attend_group(parts, group, bool(causal), sliding_window, scale, softcap, out)
    for branches in packing.branches:
        out[branches.behind] = branches.attend(parts, sliding_window, scale, softcap)
    return out[None], None


def _attend_group(
    parts: Sequence[Tensor],  # q, k, v of all packed tokens
    group: Group,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Write the attention of a group's rows into ``out`` (n, heads, head_dim)."""
    in_rows = [_rows_of(part, group).transpose(1, 2) for part in parts]  # (R, heads, T, head_dim)
    window = window if window is not None and window < in_rows[0].shape[2] else None
    # Padding stands at the end of a row, where a causal row never looks; other rows need it masked.
    plain = causal and window is None and softcap is None
    mask = None if plain else _mask(group, causal, window)
    y = _attend(in_rows, mask, scale, softcap).transpose(1, 2)  # (R, T, heads, head_dim)
    if group.full:
        out[group.index.reshape(-1)] = y.reshape(-1, *out.shape[1:])
    else:
        out[group.index[group.at]] = y[group.at]


def _rows_of(tokens: Tensor, group: Group) -> Tensor:
    """A group's rows (R, T, heads, head_dim) of packed tokens (n, heads, head_dim)."""
    flat = tokens.reshape(len(tokens), -1).index_select(0, group.index.reshape(-1))
    return flat.view(*group.index.shape, *tokens.shape[1:])


def _attend(
    parts: list[Tensor],  # q (R, heads, T, head_dim), k and v (R, kv_heads, S, head_dim)
    mask: Tensor
    | None,  # (R or 1, 1, T, S) bool, whom each token looks at; None: itself and those before it
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention within rows, (R, heads, T, head_dim)."""
    q, k, v = parts
    if torch.is_grad_enabled() and compiled(q):
        # The products of the backward pass are as long as the rows, and in bf16 each length would be compiled
        # (machine/matmul.py), at 2 MB.
        return _attend([part.float() for part in parts], mask, scale, softcap).to(q.dtype)
    repeat = q.shape[1] // k.shape[1]
    if softcap is not None:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        assert mask is not None
        return _softcapped_rows((q, k, v, mask), scale, softcap)
    if mask is not None and q.is_cuda:  # the fused kernels take a mask or grouped keys, not both
        k, v, repeat = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=repeat > 1
    )


def _mask(group: Group, causal: bool, window: int | None) -> Tensor:
    """Which tokens each token of a row looks at, (R, 1, T, T) bool."""
    length = group.index.shape[1]
    mask = group.valid[:, None, None, :].expand(-1, 1, length, -1)
    if not causal and window is None:
        return mask
    at = torch.arange(length, device=mask.device)
    distance = at[:, None] - at[None]
    near = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        near &= distance >= 0
    if window is not None:
        near &= distance.abs() < window
    return mask & near


def _softcapped_rows(parts: Sequence[Tensor], scale: float, softcap: float) -> Tensor:
    """Attention with softcapped scores, of q (R, heads, T, head_dim), k and v of S tokens and a mask (R, 1, T, S)."""
    q, k, v, mask = parts
    if not compiled(q):
        return _softcapped(parts, scale, softcap)
    # Row by row and padded, so that there are few different shapes (machine/matmul.py). No token looks at the padding.
    length = q.shape[2]
    more, more_keys = -length % LENGTH_STEP, -k.shape[2] % LENGTH_STEP
    q = F.pad(q, (0, 0, 0, more))
    k, v = (F.pad(part, (0, 0, 0, more_keys)) for part in (k, v))
    mask = F.pad(mask, (0, more_keys, 0, more))
    rows = [
        _softcapped([part[row : row + 1] for part in (q, k, v, mask)], scale, softcap)
        for row in range(len(q))
    ]
    return torch.cat(rows)[:, :, :length]


def _softcapped(parts: Sequence[Tensor], scale: float, softcap: float) -> Tensor:
    """Attention with softcapped scores, a piece of the queries at a time: scores are no larger than a tile."""
    q, k, v, mask = parts
    rows, heads, length, _ = q.shape
    a_query = rows * heads * k.shape[2] * 4
    at_once = max(1, TILE_BYTES // (SCORE_COPIES * a_query) // LENGTH_STEP) * LENGTH_STEP
    if length <= at_once:
        return _capped_piece(q, k, v, mask, scale, softcap)
    pieces = []
    for first in range(0, length, at_once):
        part = slice(first, first + at_once)
        queries, seen = q[:, :, part], mask[:, :, part]
        if torch.is_grad_enabled():  # scores are computed once more in the backward pass, not kept
            # Typed Any since torch's annotation leaves out the result.
            made: Any = checkpoint(
                _capped_piece, queries, k, v, seen, scale, softcap, use_reentrant=False
            )
            pieces.append(made)
        else:
            pieces.append(_capped_piece(queries, k, v, seen, scale, softcap))
    return torch.cat(pieces, 2)


def _capped_piece(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    scores = torch.tanh((q @ k.transpose(2, 3)) * scale / softcap) * softcap
    # Not -inf: a token of padding looks at nothing, and softmax would give NaN.
    return torch.softmax(scores.masked_fill(~mask, torch.finfo(q.dtype).min), -1) @ v


def register() -> None:
    """Register ``ATTENTION`` with transformers, which builds no mask as it has no mask function of that name."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
