"""A check of optimum-quanto as it is installed: whether its codes are those that edgezo stores."""

from __future__ import annotations

import torch

from edgezo.machine.limits import int4_group
from edgezo.weights.layouts import Int4, Int8

ROWS, COLUMNS = 64, 128


def disagreement() -> str:
    """What is wrong with a small matrix in int8 and int4, beside quanto's own tensors of it; "" where nothing is.

    Codes are compared, since quanto's own expansion of int4 compiles an extension first.
    """
    try:
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight
    except (ImportError, OSError) as failure:
        return f"optimum-quanto cannot be imported: {failure}"
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    int8, int4, size = Int8.quantise(weight), Int4.quantise(weight), int4_group(COLUMNS)
    try:
        theirs = quantize_weight(weight, qint8, 0, AbsmaxOptimizer()(weight, qint8, 0))
        if not torch.equal(int8.codes, theirs._data):
            return "int8 codes of edgezo and of optimum-quanto differ"
        scale, shift = MaxOptimizer()(weight.reshape(-1, size), qint4, 0)
        more = {"group_size": size, "optimized": False}
        packed = quantize_weight(weight, qint4, 0, scale, shift, **more)._data._data
        if not torch.equal(int4.packed.reshape(-1), packed.reshape(-1)):
            return "int4 codes of edgezo and of optimum-quanto differ"
    except Exception as failure:  # whatever a changed library raises
        return f"optimum-quanto fails over a small matrix: {type(failure).__name__}: {failure}"
    for name, layout, half_a_step in (
        ("int8", int8, int8.scale / 2),
        ("int4", int4, int4.scale.expand(-1, -1, size).reshape(ROWS, COLUMNS) / 2),
    ):
        expanded = layout.expand(slice(0, ROWS), torch.empty(ROWS, COLUMNS))
        if not bool(((expanded - weight).abs() <= half_a_step * 1.001).all()):
            return f"{name} codes are further from the weights than half a step"
    return ""
