"""A runnable model: transformers' module with its weights in a store and perturbed operations inside.

``Model.losses`` is what a step calls. assemble.py puts a model together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgezo.data.batches import Batch, Example
from edgezo.data.packed import PackedExamples
from edgezo.data.trees import Tree
from edgezo.errors import EdgezoError
from edgezo.machine.process_memory import Heap
from edgezo.machine.transfers import uploaded
from edgezo.network import packing
from edgezo.network.cut import Cut
from edgezo.network.exact_head import ExactHead
from edgezo.network.first_order import Adapters, LearnedFactors
from edgezo.network.losses import Scorer
from edgezo.network.perturb import Context
from edgezo.network.probe import Probe
from edgezo.network.readout import Readout, ReadoutWeights, Taps
from edgezo.weights.saved import Saved, saved_tensors
from edgezo.weights.store import WeightStore
from edgezo.zo.noise import Key
from edgezo.zo.recipe import TWO_SIDED, Evaluation

if TYPE_CHECKING:
    from edgezo.network.key_values import KeyValues


class Learned(Protocol):
    """A part that is trained by its gradient, which adds up while micro-batches pass."""

    def forget(self) -> None:
        """Drop the gradient that this step has added up."""
        ...

    def asks(self) -> Tensor:
        """(k,) fp32: what ``update`` has to know of the gradient, where the gradient is."""
        ...

    def update(self, rate: float, known: Sequence[float] | None = None) -> None:
        """Take one step along the gradient, and clear it. ``known``: what ``asks`` gave; None: it is read here."""
        ...

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors that are saved from here, by name."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """State that a snapshot keeps."""
        ...

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors()`` gave."""
        ...


@dataclass
class Model:
    """A module, the store of its weights, and the task that it is scored by."""

    module: nn.Module
    store: WeightStore
    context: Context
    scorer: Scorer
    masked: bool  # a masked language model; else a causal one
    position_offset: int  # the number of a row's first position
    blocks_name: str  # where the module keeps its decoder layers
    evaluations: tuple[Evaluation, ...] = TWO_SIDED
    heap: Heap = field(default_factory=Heap)  # where temporaries lie
    most_tokens: int | None = None  # tokens of one side that should pass at once (Plan.most_tokens)
    # Tokens whose keys and values an evaluation keeps at once (Plan.kept_tokens).
    kept_tokens: int = 0
    label_rows: np.ndarray | None = None  # rows that every example of a tied label task touches
    frozen: list[str] = field(default_factory=list)
    taps: Taps | None = None  # keeps hidden states of some blocks while rows pass
    readout: Readout | None = None  # a linear probe in the head's place
    adapters: Adapters | None = None
    factors: LearnedFactors | None = None
    cut: Cut | None = None  # where blocks below the first trained one are frozen
    # Gives the states of a batch at the cut, (N, hidden), where they are kept; None: the blocks below run.
    kept_states: Callable[[Batch], Tensor] | None = None

    @property
    def exact(self) -> ExactHead | None:
        return self.scorer.exact

    @property
    def learned(self) -> dict[str, Learned]:
        """What is trained by its gradient, by the name of the part of ``--train``."""
        parts: dict[str, Learned | None] = {
            "head": self.exact,
            "lora": self.adapters,
            "lowrank": self.factors,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def forget(self) -> None:
        """Drop the gradients that this step has added up."""
        for part in self.learned.values():
            part.forget()

    # -- a linear probe -----------------------------------------------------------------------------------

    def reads(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples as they have to pass: a linear probe reads prompts, and no label word behind them."""
        return examples if self.readout is None else PackedExamples.of(examples).prompts()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers that run."""
        blocks = self.module.get_submodule(self.blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def classify_by(self, weights: ReadoutWeights) -> None:
        """Classify by a linear probe from now on.

        What no loss depends on any more is neither run nor trained: blocks above the last one that is read, what comes
        after the blocks, and the exact head. Raises EdgezoError for a probe of another model.
        """
        blocks, last = self.blocks, max(weights.blocks)
        if last >= len(blocks):
            raise EdgezoError(
                f"the linear probe reads block {last}, but the model has {len(blocks)} blocks.\n"
                "The probe belongs to another model: restore the run's probe.safetensors from a copy."
            )
        self.scorer.exact = None
        self.readout = Readout(weights, Taps.on(blocks, weights.blocks))
        names = [name for name, _ in self.module.named_modules()]
        prefix = f"{self.blocks_name}.{last}"
        used = set(names[: names.index(prefix)])
        used.update(name for name in names if f"{name}.".startswith(f"{prefix}."))
        self.store.keep_only([t for t in self.store.trainables if t.rpartition(".")[0] in used])
        parent, _, name = self.blocks_name.rpartition(".")
        setattr(self.module.get_submodule(parent), name, blocks[: last + 1])

    @contextmanager
    def classifying_by(self, weights: ReadoutWeights) -> Iterator[None]:
        """Classify by a linear probe inside this context only. Every block still runs."""
        taps = Taps.on(self.blocks, weights.blocks)
        self.readout = Readout(weights, taps)
        try:
            yield
        finally:
            self.readout = None
            taps.remove()

    # -- forwards -----------------------------------------------------------------------------------------

    @property
    def candidates(self) -> int:
        """Directions that the whole batch is tried along; 0 where each example has its own."""
        return sum(e.candidate is not None for e in self.evaluations)

    def probe(self, batch: Batch, key: Key, sigma: float) -> Probe:
        """The probe of a batch's packed tokens, laid end to end once for each evaluation."""
        lengths = torch.tensor(batch.lengths)
        by_token = batch.row_example.repeat_interleave(lengths)  # (N,) each token's example
        device, candidates = self.context.device, self.candidates
        directions = [
            torch.full_like(by_token, e.candidate or 0) if candidates else by_token
            for e in self.evaluations
        ]
        ones = torch.ones(len(by_token), dtype=self.context.dtype, device=device)
        return Probe(
            self.store.directions._replace(echo=self.store.echo),
            key,
            sigma,
            range(candidates) if candidates else batch.slots,
            uploaded(torch.cat(directions), device),
            torch.cat([ones * e.sign for e in self.evaluations]),
            mask=self.store.mask,
            signs=[e.sign for e in self.evaluations],
            owners=() if candidates else None,
            scales=self.store.scales,
            example_here=torch.cat(directions),
        )

    @torch.no_grad()
    def losses(
        self,
        batch: Batch,
        probe: Probe | None = None,
        *,
        sides: int = 1,
        learn: float = 0.0,
        wait: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Losses (sides, b) fp32 and predictions (sides, b) int64 of a packed batch, on the CPU.

        Without ``wait`` they stay on the model's device, which goes on computing them (``read``).

        With a probe ``sides`` are its evaluations: the + side of every row, then the - side. ``learn`` is the weight of
        these losses in the gradients that are added up (``Scorer``); without a probe the gradient also goes back
        through the blocks, to adapters and factors.
        """
        at = batch.score_index
        index = torch.cat([at + side * len(batch.ids) for side in range(sides)])
        tracked = learn > 0 and probe is None and self.has_backward_pass
        try:
            ids = batch.ids.repeat(sides)
            cut = None if self.cut is None else self.states_at_cut(batch).repeat(sides, 1)
            with torch.set_grad_enabled(tracked):
                trees = batch.trees * sides
                hidden, probe = self._states(
                    ids, batch.lengths * sides, index, probe, at_cut=cut, trees=trees
                )
            if self.readout is not None:
                losses, predicted = self.readout(batch.labels, sides)
                return (losses.cpu(), predicted.cpu()) if wait else (losses, predicted)
            d_hidden = torch.zeros(hidden.shape, device=hidden.device) if tracked else None
            states = hidden.detach()
            losses, predicted = self.scorer(states, batch, probe, sides, learn, d_hidden)
            if d_hidden is not None:
                hidden.backward(d_hidden.to(hidden.dtype))
            return (losses.cpu(), predicted.cpu()) if wait else (losses, predicted)
        finally:
            self.context.probe = None

    def read(self, losses: Sequence[Tensor]) -> tuple[list[np.ndarray], dict[str, list[float]]]:
        """The losses of micro-batches as fp32 arrays of their shapes, and what each learned part asks (``Learned``).

        One copy from the device brings all of it: nothing else in a step waits.
        """
        asked = {name: part.asks() for name, part in self.learned.items()}
        pieces = [piece.reshape(-1).float() for piece in (*losses, *asked.values())]
        if not pieces:
            return [], {}
        read = torch.cat([piece.to(pieces[0].device) for piece in pieces]).cpu().numpy()
        parts = np.split(read, np.cumsum([len(piece) for piece in pieces])[:-1])
        shaped = [part.reshape(one.shape) for part, one in zip(parts, losses, strict=False)]
        answers = [part.tolist() for part in parts[len(losses) :]]
        return shaped, dict(zip(asked, answers, strict=True))

    @torch.no_grad()
    def states_at_cut(self, batch: Batch) -> Tensor:
        """What the frozen blocks put out for a batch: (N, hidden) in the compute dtype, once and not for each side."""
        if self.kept_states is not None:
            return uploaded(self.kept_states(batch), self.context.device)
        assert self.cut is not None
        self.heap.expect(len(batch.ids))
        for taps in self._taps():
            taps.index = None  # what they are on does not run
        with self.cut.below():
            plan = packing.Packing.of(batch.lengths, self.context.device, batch.trees)
            self._run(batch.ids, plan, None)
        return self.cut.take()

    @torch.no_grad()
    def answers(self, batch: Batch) -> Tensor:
        """What predictions of a packed batch are made of, on the CPU.

        Logits (b, K) fp32 of the classes, from the linear probe or the label words; for other kinds (O,), each option's
        mean log-probability of its tokens.
        """
        hidden, _ = self._states(
            batch.ids, batch.lengths, batch.score_index, None, trees=batch.trees
        )
        if self.readout is not None:
            return self.readout.logits().cpu()
        return self.scorer.answers(hidden, batch)

    @torch.no_grad()
    def next_tokens(
        self,
        batch: Batch,
        kept: KeyValues,
        probe: Probe | None = None,
        *,
        sides: int = 1,
        ids: Tensor | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The token that follows each row of a batch on each side, (sides, R) int64 on the CPU.

        A row begins at the position where ``kept`` stands, which then takes in the row's keys and values. ``ids``
        (sides*N,) are the tokens where the sides differ in them. ``choose`` makes tokens (n,) of logits (n,
        vocabulary); without it they are the most likely ones.
        """
        ids = batch.ids.repeat(sides) if ids is None else ids
        lengths = batch.lengths * sides
        try:
            index = torch.tensor(lengths).cumsum(0) - 1
            hidden, probe = self._states(ids, lengths, index, probe, kept)
            if choose is None:
                tokens = self.scorer.next_tokens(hidden, probe).cpu()
            else:
                tokens = choose(self.scorer.vocabulary_logits(hidden))
        finally:
            self.context.probe = None
        kept.took()
        return tokens.view(sides, -1)

    def _states(
        self,
        ids: Tensor,
        lengths: tuple[int, ...],
        index: Tensor,
        probe: Probe | None,
        kept: KeyValues | None = None,
        at_cut: Tensor | None = None,
        trees: Sequence[Tree | None] = (),
    ) -> tuple[Tensor, Probe | None]:
        """What the head reads at the packed positions ``index`` (P,): (P, d), and the probe of those positions.

        ``ids`` (n,) are the tokens of rows of ``lengths``, all sides; ``trees`` says which rows are trees; ``at_cut``
        (n, hidden) are their states at the cut.
        """
        device = self.context.device
        plan = packing.Packing.of(lengths, device, trees)
        self.context.probe = probe
        self.heap.expect(len(ids))
        index = uploaded(index, device)
        for taps in self._taps():
            taps.index = index
        with nullcontext() if at_cut is None or self.cut is None else self.cut.above(at_cut):
            hidden = self._run(ids, plan, kept)
        if probe is not None:
            # From here on an operation's tokens are the scored positions (RoBERTa's head has linears too).
            self.context.probe = probe = probe.at(index)
        if self.scorer.kind != "label" and len(ids) > len(lengths):
            self.heap.give_back()
        return self.module.lm_head(hidden[index]), probe  # type: ignore[operator]

    def _taps(self) -> list[Taps]:
        """What keeps hidden states of blocks now."""
        of_readout = None if self.readout is None else self.readout.taps
        return [taps for taps in (self.taps, of_readout) if taps is not None]

    def _run(self, ids: Tensor, plan: packing.Packing, kept: KeyValues | None) -> Tensor:
        """The module without its head on packed tokens (n,): (n, d)."""
        device = self.context.device
        positions = plan.positions() + self.position_offset
        if kept is not None:
            positions += kept.first_positions().repeat_interleave(torch.tensor(plan.lengths))
        options = {} if self.masked else {"use_cache": False}
        with packing.packed(plan, kept):
            hidden: Tensor = self.module.base_model(  # type: ignore[operator]
                input_ids=uploaded(ids[None], device),
                position_ids=uploaded(positions[None], device),
                **options,
            )[0][0]
        return hidden

    def take_touched(self, group: int) -> tuple[np.ndarray, ...]:
        """Rows of embedding tables that each of the ``group`` examples used since the last call, sorted.

        One array for all examples where every direction is tried on every example.
        """
        group = 1 if self.candidates else group
        touched, self.context.touched = self.context.touched, []
        if not touched:
            return ()
        pairs = [one.pairs() for one in touched]
        slot = np.concatenate([s for s, _ in pairs])
        rows = np.concatenate([r for _, r in pairs])
        by_example = []
        for example in range(group):
            rows_of_example = np.unique(rows[slot == example])
            if self.label_rows is not None:
                rows_of_example = np.union1d(rows_of_example, self.label_rows)
            by_example.append(rows_of_example)
        return tuple(by_example)

    # -- what is saved ------------------------------------------------------------------------------------

    @property
    def has_backward_pass(self) -> bool:
        """Whether anything inside the blocks is trained by its gradient."""
        return self.adapters is not None or self.factors is not None

    @property
    def guided(self) -> bool:
        """Whether no seed can rebuild what the store trains, so that a snapshot has it and a replay does not make it.

        Its directions come from what the layers read, or it takes gradients too.
        """
        return self.store.directions.guided or self.factors is not None

    @property
    def needs_snapshots(self) -> bool:
        """Whether there is state that no seed can rebuild."""
        return self.guided or bool(self.learned)

    def saved(self) -> list[Saved]:
        """Every trained tensor, whether by directions, by its gradient or fitted."""
        saved = saved_tensors(self.store)
        for part in self.learned.values():
            saved += [Saved.of(name, tensor) for name, tensor in part.trained().items()]
        if self.readout is not None:
            tensors = self.readout.weights.tensors()
            saved += [Saved.of(name, tensor.contiguous()) for name, tensor in tensors.items()]
        return saved

    def close(self) -> None:
        """Close the files, threads and locked memory of weights that are elsewhere."""
        if self.store.residency is not None:
            self.store.residency.close()
