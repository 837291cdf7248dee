"""A runnable model: transformers' module with its weights in a store and perturbed operations inside.

``Model.losses`` is the engine's one entry. assemble.py puts a model together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgezo.data.batches import Batch
from edgezo.machine.process_memory import Heap
from edgezo.network import packing
from edgezo.network.addax import Factors
from edgezo.network.exact_head import ExactHead
from edgezo.network.lora import Adapters
from edgezo.network.losses import Scorer
from edgezo.network.perturb import Context, Probe
from edgezo.network.readout import Readout, Taps
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Saved
from edgezo.zo.noise import Key
from edgezo.zo.recipe import TWO_SIDED, Evaluation

if TYPE_CHECKING:
    from edgezo.network.key_values import KeyValues


class Learned(Protocol):
    """A part that is trained by its own gradient, which adds up while micro-batches pass."""

    def forget(self) -> None:
        """Drop what this step has accumulated."""
        ...

    def update(self, rate: float) -> None:
        """One step along the gradient, which is then cleared."""
        ...

    def trained(self) -> dict[str, Tensor]: ...

    def tensors(self) -> dict[str, Tensor]:
        """State that a snapshot keeps."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass
class Model:
    """Module, store and task glued together. ``losses`` is the engine's one entry."""

    module: nn.Module
    store: WeightStore
    context: Context
    scorer: Scorer
    masked: bool
    position_offset: int
    evaluations: tuple[Evaluation, ...] = TWO_SIDED
    heap: Heap = field(default_factory=Heap)  # where temporaries lie
    most_tokens: int | None = None  # of one side, that should pass at once (Plan.most_tokens)
    kept_tokens: int = 0  # by rows that write at once in an evaluation (Plan.kept_tokens)
    label_rows: np.ndarray | None = None  # rows that every example of a tied label task touches
    frozen: list[str] = field(default_factory=list)
    taps: Taps | None = None  # what is looked at of a forward
    readout: Readout | None = None  # a linear probe in the head's place
    adapters: Adapters | None = None
    factors: Factors | None = None

    @property
    def exact(self) -> ExactHead | None:
        return self.scorer.exact

    @property
    def learned(self) -> dict[str, Learned]:
        """By the name of the part of ``--train``."""
        parts: dict[str, Learned | None] = {
            "head": self.exact,
            "lora": self.adapters,
            "lowrank": self.factors,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def forget(self) -> None:
        """Drop the gradients that a step has accumulated."""
        for part in self.learned.values():
            part.forget()

    def probe(self, batch: Batch, key: Key, sigma: float) -> Probe:
        """The probe of a batch's packed tokens, laid end to end once for each evaluation."""
        lengths = torch.tensor(batch.lengths)
        own, device = batch.row_example.repeat_interleave(lengths), self.context.device
        drawn = self.drawn
        example = [
            torch.full_like(own, e.candidate or 0) if drawn else own for e in self.evaluations
        ]
        side = torch.ones(len(own), dtype=self.context.dtype, device=device)
        return Probe(
            self.store.directions,
            key,
            sigma,
            range(drawn) if drawn else batch.slots,
            torch.cat(example).to(device),
            torch.cat([side * e.sign for e in self.evaluations]),
            mask=self.store.mask,
            signs=[e.sign for e in self.evaluations],
            owners=() if drawn else None,
            scales=self.store.scales,
        )

    @torch.no_grad()
    def losses(
        self, batch: Batch, probe: Probe | None = None, *, sides: int = 1, learn: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Losses (sides, b) fp32 and predictions (sides, b) of a packed batch, on the CPU.

        With a probe ``sides`` are the evaluations: the + side of every row, then the - side. ``learn``: see
        ``Scorer``; without a probe the gradient goes on to what else is trained by it, back through the blocks.
        """
        at = batch.score_index
        index = torch.cat([at + side * len(batch.ids) for side in range(sides)])
        tracked = learn > 0 and probe is None and self.goes_back
        try:
            ids = batch.ids.repeat(sides)
            with torch.set_grad_enabled(tracked):
                hidden, probe = self._states(ids, batch.lengths * sides, index, probe)
            if self.readout is not None:
                losses, predicted = self.readout(batch.labels, sides)
                return losses.cpu(), predicted.cpu()
            back = torch.zeros(hidden.shape, device=hidden.device) if tracked else None
            scored = hidden.detach()
            losses, predicted = self.scorer(scored, batch, probe, sides, learn, back)
            if back is not None:
                hidden.backward(back.to(hidden.dtype))
            return losses.cpu(), predicted.cpu()
        finally:
            self.context.probe = None

    @torch.no_grad()
    def next_tokens(
        self,
        batch: Batch,
        kept: KeyValues,
        probe: Probe | None = None,
        *,
        sides: int = 1,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The token that each side of each row of a batch goes on with, (sides, R) int64 on the CPU.

        Rows begin where ``kept`` says that they stand, which takes them in. ``ids`` (sides*N,) are the tokens where
        sides differ in them.
        """
        ids = batch.ids.repeat(sides) if ids is None else ids
        lengths = batch.lengths * sides
        try:
            index = torch.tensor(lengths).cumsum(0) - 1
            hidden, probe = self._states(ids, lengths, index, probe, kept)
            found = self.scorer.next_tokens(hidden, probe).cpu()
        finally:
            self.context.probe = None
        kept.took()
        return found.view(sides, -1)

    def _states(
        self,
        ids: Tensor,
        lengths: tuple[int, ...],
        index: Tensor,
        probe: Probe | None,
        kept: KeyValues | None = None,
    ) -> tuple[Tensor, Probe | None]:
        """What the head reads at the packed positions ``index`` (P,), (P, d), and the probe of those.

        ``ids`` (n,) are the tokens of rows of ``lengths``, all sides.
        """
        device = self.context.device
        plan = packing.Packing.of(lengths, device)
        positions = plan.positions() + self.position_offset
        if kept is not None:
            positions += kept.first_positions().repeat_interleave(torch.tensor(lengths))
        self.context.probe = probe
        self.heap.expect(len(ids))
        index = index.to(device)
        for taps in (self.taps, None if self.readout is None else self.readout.taps):
            if taps is not None:
                taps.index = index
        with packing.packed(plan, kept):
            hidden = self.module.base_model(  # type: ignore[operator]
                input_ids=ids[None].to(device),
                position_ids=positions[None].to(device),
                **self._extra(),
            )[0][0]
        if probe is not None:
            # From here on an operation's tokens are the scored positions (RoBERTa's head has linears too).
            self.context.probe = probe = probe.at(index)
        if self.scorer.kind != "label" and len(ids) > len(lengths):
            self.heap.give_back()
        return self.module.lm_head(hidden[index]), probe  # type: ignore[operator]

    def _extra(self) -> dict[str, object]:
        return {} if self.masked else {"use_cache": False}

    @property
    def drawn(self) -> int:
        """Directions that the whole batch is tried along; 0 where each example has its own."""
        return sum(e.candidate is not None for e in self.evaluations)

    def take_touched(self, group: int) -> tuple[np.ndarray, ...]:
        """Rows of embedding tables that each of the ``group`` examples used since the last call, sorted.

        One array for all where every direction is tried on every example.
        """
        group = 1 if self.drawn else group
        pairs, self.context.touched = self.context.touched, []
        if not pairs:
            return ()
        slot = np.concatenate([s for s, _ in pairs])
        rows = np.concatenate([r for _, r in pairs])
        found = []
        for example in range(group):
            own = np.unique(rows[slot == example])
            if self.label_rows is not None:
                own = np.union1d(own, self.label_rows)
            found.append(own)
        return tuple(found)

    @property
    def goes_back(self) -> bool:
        """Whether anything inside the blocks is trained by its gradient."""
        return self.adapters is not None or self.factors is not None

    @property
    def guided(self) -> bool:
        """Whether no seed has what the store trains: directions come from what the layers read, or gradients too.

        Then a snapshot has the weights, and no replay.
        """
        return self.store.directions.guided or self.factors is not None

    @property
    def needs_snapshots(self) -> bool:
        """Whether there is a state that no seed has."""
        return self.guided or bool(self.learned)

    def saved(self) -> list[Saved]:
        """Every trained tensor, those with a gradient of their own included."""
        found = self.store.saved()
        for part in self.learned.values():
            found += [Saved.of(name, tensor) for name, tensor in part.trained().items()]
        if self.readout is not None:
            probe = self.readout.probe.tensors()
            found += [Saved.of(name, tensor.contiguous()) for name, tensor in probe.items()]
        return found

    def close(self) -> None:
        """Let go of what weights elsewhere hold: files, threads, locked memory."""
        if self.store.residency is not None:
            self.store.residency.close()
