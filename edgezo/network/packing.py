"""Padding-free forwards: rows lie end to end in one token axis, and only attention sees them as rows.

transformers' modules run on a batch of one long row. Their attention is routed here (``ATTENTION`` is registered
in transformers' attention interface), where rows of like length are gathered into small padded groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.machine import kernels
from edgezo.machine.matmul import compiled
from edgezo.weights.layouts import CPU

ATTENTION = "edgezo_packed"
_GROUP_TOKENS = 4096  # bound of one padded group: its scores and copies stay a tile
LENGTH_STEP = 64  # tokens that a row's own products are rounded up to
_WASTE = 1.15  # padded tokens of a group over real ones


@dataclass(frozen=True)
class Group:
    """Rows of like length: ``index`` (rows, longest) into the packed axis, ``valid`` marks what is no padding."""

    index: Tensor  # (R, T) int64; padding repeats the row's first token
    valid: Tensor  # (R, T) bool
    at: tuple[Tensor, Tensor]  # (tokens,) int64 each: where ``valid`` is true
    full: bool  # no padding at all


@dataclass(frozen=True)
class Packing:
    """How the packed token axis falls into rows."""

    lengths: tuple[int, ...]
    groups: tuple[Group, ...]
    starts: Tensor  # (rows + 1,) int64 on the CPU: where each begins, and where the last one ends

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device = CPU) -> Packing:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        order = sorted(range(len(lengths)), key=lambda r: (-lengths[r], r))
        groups: list[Group] = []
        members: list[int] = []
        for row in order:
            if members:
                longest = lengths[members[0]]
                tokens = sum(lengths[m] for m in members) + lengths[row]
                padded = longest * (len(members) + 1)
                if padded > _WASTE * tokens or padded > _GROUP_TOKENS:
                    groups.append(_group(members, lengths, starts, device))
                    members = []
            members.append(row)
        groups.append(_group(members, lengths, starts, device))
        return Packing(tuple(lengths), tuple(groups), torch.tensor(starts))

    def positions(self) -> Tensor:
        """Position of each token in its row, (n,) int64."""
        return torch.cat([torch.arange(length) for length in self.lengths])


def _group(
    members: list[int], lengths: tuple[int, ...], starts: list[int], device: torch.device
) -> Group:
    own = torch.tensor([lengths[m] for m in members])[:, None]
    begin = torch.tensor([starts[m] for m in members])[:, None]
    column = torch.arange(int(own.max()))[None]
    valid = column < own
    index = (begin + torch.where(valid, column, 0)).to(device)
    row, column = (at.to(device) for at in valid.nonzero(as_tuple=True))
    return Group(index, valid.to(device), (row, column), bool(valid.all()))


class Kept(Protocol):
    """Keys and values that later forwards attend to (generate.KeyValues)."""

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
    """Attention inside this context follows ``packing``; and what ``kept`` holds, where rows go on."""
    token = _current.set((packing, kept))
    try:
        yield
    finally:
        _current.reset(token)


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
    """Attention within rows; (1, n, heads, head_dim) and no weights, as transformers' interface asks."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (n, heads, head_dim)
    packing, kept = _current.get()
    if kept is not None:
        kept.store(module, k, v)
        continued = kept.attend(module, q, scaling, sliding_window, softcap)
        if continued is not None:
            return continued[None], None
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    if softcap is None:
        rows = (packing.starts, max(packing.lengths))
        fused = kernels.attention(q, k, v, *rows, scale, bool(causal), sliding_window)
        if fused is not None:
            return fused[None], None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in packing.groups:
        # (R, heads, T, head_dim) each
        in_rows = [_rows_of(part, group).transpose(1, 2) for part in (q, k, v)]
        found = _attend(in_rows, group, bool(causal), scale, sliding_window, softcap)
        found = found.transpose(1, 2)  # (R, T, heads, head_dim)
        if group.full:
            out[group.index.reshape(-1)] = found.reshape(-1, *out.shape[1:])
        else:
            out[group.index[group.at]] = found[group.at]
    return out[None], None


def _rows_of(tokens: Tensor, group: Group) -> Tensor:
    """(R, T, heads, head_dim) of packed (n, heads, head_dim), which as a rule lie token by token."""
    flat = tokens.reshape(len(tokens), -1).index_select(0, group.index.reshape(-1))
    return flat.view(*group.index.shape, *tokens.shape[1:])


def _attend(
    rows: list[Tensor],  # q, k, v of one group, (R, heads, T, head_dim) each
    group: Group,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = rows
    if torch.is_grad_enabled() and compiled(q):
        # Products on the way back are as long as the rows, and each length would be compiled (machine/matmul.py): 2 MB.
        wide = [part.float() for part in rows]
        return _attend(wide, group, causal, scale, window, softcap).to(q.dtype)
    length = q.shape[2]
    windowed = window is not None and window < length
    # Padding stands at the end of a row, where a causal row never looks; other rows need it masked.
    plain = causal and not windowed
    mask: Tensor | None = None
    if not plain or softcap is not None:
        mask = group.valid[:, None, None, :].expand(-1, 1, length, -1)
        if causal or windowed:
            at = torch.arange(length, device=q.device)
            distance = at[:, None] - at[None]
            near = torch.ones_like(distance, dtype=torch.bool)
            if causal:
                near &= distance >= 0
            if windowed:
                assert window is not None
                near &= distance.abs() < window
            mask = mask & near
    repeat = q.shape[1] // k.shape[1]
    if softcap is not None:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        assert mask is not None
        if not compiled(q):
            return _softcapped((q, k, v, mask), scale, softcap)
        # Row by row, and longer than it is: few different shapes (machine/matmul.py). No token looks at what is added.
        more = -length % LENGTH_STEP
        q, k, v = (F.pad(part, (0, 0, 0, more)) for part in (q, k, v))
        mask = F.pad(mask, (0, more, 0, more))
        found = [
            _softcapped([part[row : row + 1] for part in (q, k, v, mask)], scale, softcap)
            for row in range(len(q))
        ]
        return torch.cat(found)[:, :, :length]
    if mask is not None and q.is_cuda:  # the fused kernels take a mask or grouped keys, not both
        k, v, repeat = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=repeat > 1
    )


def _softcapped(rows: Sequence[Tensor], scale: float, softcap: float) -> Tensor:
    """Attention of q, k, v under a mask."""
    q, k, v, mask = rows
    scores = torch.tanh((q @ k.transpose(2, 3)) * scale / softcap) * softcap
    # Not -inf: a row of padding looks at nothing.
    return torch.softmax(scores.masked_fill(~mask, torch.finfo(q.dtype).min), -1) @ v


def register() -> None:
    """Make ``ATTENTION`` known to transformers; without a mask function of that name it builds no mask."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
