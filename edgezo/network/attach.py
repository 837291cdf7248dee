"""Lets a model classify by a linear probe: for good, or while its rows are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgezo.errors import EdgezoError
from edgezo.network.loader import decoder_layers
from edgezo.network.model import Model
from edgezo.network.readout import LinearProbe, Readout, Taps


def attach(model: Model, layers: int, probe: LinearProbe) -> None:
    """Let ``model``, of so many blocks, classify by ``probe`` from now on.

    What no loss depends on any more is neither run nor trained: blocks above the last one that is read, what comes
    after the blocks, and the exact head. Raises EdgezoError for a probe of another model.
    """
    prefix, blocks = decoder_layers(model.module, layers)
    last = max(probe.blocks)
    if last >= layers:
        raise EdgezoError(
            f"the linear probe reads block {last}, but the model has {layers}.\n"
            "It belongs to another model; restore the run's own file from a copy."
        )
    model.scorer.exact = None
    model.readout = Readout(probe, Taps.on(blocks, probe.blocks))
    names = [name for name, _ in model.module.named_modules()]
    read = set(names[: names.index(f"{prefix}.{last}")])
    read.update(n for n in names if f"{n}.".startswith(f"{prefix}.{last}."))
    model.store.keep_only([t for t in model.store.trainables if t.rpartition(".")[0] in read])
    parent, _, name = prefix.rpartition(".")
    setattr(model.module.get_submodule(parent), name, blocks[: last + 1])


@contextmanager
def reading(model: Model, layers: int, probe: LinearProbe) -> Iterator[None]:
    """Let ``model`` classify by ``probe`` inside this block, and be as it was behind it."""
    taps = Taps.on(decoder_layers(model.module, layers)[1], probe.blocks)
    model.readout = Readout(probe, taps)
    try:
        yield
    finally:
        model.readout = None
        taps.remove()
