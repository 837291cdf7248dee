"""Rotary positions of packed rows: each row is rotated as it would be alone.

Two ways to scale rotary positions choose the frequencies by the length of a row: dynamic NTK grows the base with every
token beyond the original positions, longrope has one set of factors for short rows and one for long rows. transformers
takes the largest position of a whole forward for that length, and dynamic NTK also keeps what an earlier forward
needed. Here a row's length decides about that row alone. All other ways (linear, yarn, llama3) have fixed frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgezo.network import packing

BY_LENGTH = frozenset({"dynamic", "longrope"})


def rope_tables(config: Any) -> dict[str, dict[str, Any]]:
    """The tables of rotary positions in a config by type of layer, "" where all layers share one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return {"": parameters}
    return {kind: table for kind, table in parameters.items() if isinstance(table, dict)}


def longrope_switch(config: Any) -> int | None:
    """The most tokens of a row with short factors; None for a model without longrope."""
    tables = [t for t in rope_tables(config).values() if t.get("rope_type") == "longrope"]
    return min((int(t["original_max_position_embeddings"]) for t in tables), default=None)


def one_frequency_tokens(config: Any) -> int | None:
    """The most tokens of rows that are all rotated by the same frequencies; None where every row is."""
    tables = [t for t in rope_tables(config).values() if t.get("rope_type") in BY_LENGTH]
    if not tables:
        return None
    original = [t.get("original_max_position_embeddings") for t in tables]
    return min(int(n) for n in (config.max_position_embeddings, *original) if n is not None)


class RotaryByRow(nn.Module):
    """Mixed into transformers' rotary module: rows of one length class pass through it together, others apart."""

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """cos and sin, (1, n, rotated) each, of packed rows with positions (1, n)."""
        named = {} if layer_type is None else {"layer_type": layer_type}
        lengths = packing.current_rows()
        kinds: Any = self.rope_type
        kind: str = kinds if layer_type is None else kinds[layer_type]
        if kind not in BY_LENGTH or lengths is None:
            return super().forward(x, position_ids, **named)
        row_ends = torch.tensor(lengths).cumsum(0) - 1
        reached = (
            position_ids[0, row_ends.to(position_ids.device)].cpu() + 1
        )  # a row's length so far
        classes = self._classes(reached, kind, layer_type)
        of_token = classes.repeat_interleave(torch.tensor(lengths)).to(position_ids.device)
        cos = sin = None
        for number in classes.unique().tolist():
            self._forget(kind, layer_type)
            at = (of_token == number).nonzero()[:, 0]
            part = super().forward(x, position_ids[:, at], **named)
            if cos is None or sin is None:
                shape = (1, len(of_token), part[0].shape[-1])
                cos, sin = part[0].new_empty(shape), part[1].new_empty(shape)
            cos[:, at], sin[:, at] = part
        return cos, sin

    def _classes(self, reached: Tensor, kind: str, layer_type: str | None) -> Tensor:
        """Equal numbers for rows whose frequencies are equal, (rows,) int64."""
        config: Any = self.config
        if kind == "dynamic":
            return reached.clamp(min=int(self.original_max_seq_len))  # type: ignore[arg-type]
        table = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        return (reached > table["original_max_position_embeddings"]).long()

    def _forget(self, kind: str, layer_type: str | None) -> None:
        """Drop the frequencies that a longer row has left behind."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        if kind == "dynamic":
            setattr(self, f"{prefix}inv_freq", getattr(self, f"{prefix}original_inv_freq"))
            setattr(self, f"{prefix}max_seq_len_cached", self.original_max_seq_len)


def rotate_by_row(module: nn.Module) -> None:
    """Let every rotary module whose frequencies depend on a row's length see the rows."""
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        if BY_LENGTH & (set(kinds.values()) if isinstance(kinds, dict) else {kinds}):
            part.__class__ = type("ByRow" + type(part).__name__, (RotaryByRow, type(part)), {})
