"""The types in which a checkpoint stores its weights: a GGUF file's blocks are rounded, and so are other numbers."""

from __future__ import annotations

from collections.abc import Mapping

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})  # every other type holds codes and their scales


def shares(types: Mapping[str, int]) -> str:
    """Types for a person: "Q4_1 79.0 %, Q8_0 21.0 %". Types below a thousandth are left out."""
    total = sum(types.values()) or 1
    if len(types) == 1:
        return next(iter(types))
    most = [(kind, 100 * count / total) for kind, count in types.items()]
    return ", ".join(f"{kind} {share:.1f} %" for kind, share in most if share >= 0.1)


def rounded(types: Mapping[str, int]) -> tuple[str, ...]:
    """The types among these that hold codes, the most frequent first."""
    return tuple(kind for kind in types if kind not in FLOATS)
