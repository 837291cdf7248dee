"""The parts of a model that a run can train (``--train``), as a table: one row a part. Standard library only.

What a part takes is counted in plan/footprint_stored.py, what builds it stands in network/assemble.py, and what an
export makes of it in run/export.py; each of them has one entry a part.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple


class Part(NamedTuple):
    """A row of the table. The flags after ``perturbed`` say what of a model the part is."""

    name: str  # as --train has it
    reason: str  # what a plan says of it; {rank} stands for --rank
    perturbed: bool = True  # trained along directions; False: by its own gradient, or fitted
    weights: bool = False  # the matrices themselves
    vectors: bool = False  # norm weights and biases
    factors: bool = False  # low-rank factors beside every linear, V fixed
    gains: bool = False  # one gain for each output row of a linear
    adapters: bool = False  # LoRA's A and B beside every linear
    head: bool = False  # the head, by its exact gradient
    readout: bool = False  # a linear probe on hidden states

    @property
    def in_base(self) -> bool:
        """Whether training changes the base's own tensors, so that no adapter beside it can hold the result."""
        return self.weights or self.vectors or self.gains


PARTS = {
    part.name: part
    for part in (
        Part("lowrank", "rank-{rank} factors in fp32 beside frozen weights", factors=True),
        Part("full", "every weight", weights=True, vectors=True),
        Part("norms", "norm weights and biases", vectors=True),
        Part("scales", "one gain per output row", gains=True),
        Part("head", "the head exactly, from the same forward", perturbed=False, head=True),
        Part(
            "probe",
            "a linear probe on the blocks that know most, by one forward over the rows",
            perturbed=False,
            readout=True,
        ),
        Part(
            "lora",
            "rank-{rank} A and B in fp32 beside frozen weights, by their gradient",
            perturbed=False,
            adapters=True,
        ),
    )
}


class Trained(NamedTuple):
    """What a request trains: each flag of the table, true where any of its parts has it."""

    perturbed: bool
    weights: bool
    vectors: bool
    factors: bool
    gains: bool
    adapters: bool
    head: bool
    readout: bool


@cache
def trained(names: tuple[str, ...]) -> Trained:
    """The flags of these parts together. Raises KeyError for a name that is not in the table."""
    rows = [PARTS[name] for name in names]
    return Trained(*(any(getattr(row, flag) for row in rows) for flag in Trained._fields))


def without_exact(names: Iterable[str]) -> tuple[str, ...]:
    """The parts that are trained along directions, in the order given."""
    return tuple(name for name in names if PARTS[name].perturbed)
