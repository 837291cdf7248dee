"""One step: batch -> two-sided losses -> credit -> journal -> one mutation of the weights.

journal first, weights second: a record that is on disk stands for an update that is, or can be, applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from edgezo.data.batches import Batch, Example, batch_indices, collate, micro_batches
from edgezo.data.token_stats import TokenStats
from edgezo.machine.gpu_memory import Memory
from edgezo.machine.process_memory import Guard, Meter
from edgezo.machine.profiler import phase
from edgezo.network.addax import divide
from edgezo.network.model import Model
from edgezo.plan.plan import Plan
from edgezo.plan.request import RunConfig
from edgezo.run.auto_step import Pace
from edgezo.run.directory import RunFiles, save_snapshot
from edgezo.run.finetuner import Tuner
from edgezo.run.journal import Journal, StepRecord
from edgezo.run.metrics_log import RunLog
from edgezo.run.progress import RunProgress
from edgezo.run.session import Opened, recipe_of
from edgezo.zo.credit import Estimator
from edgezo.zo.noise import Key

if TYPE_CHECKING:
    from torch import Tensor

    from edgezo.network.perturb import Probe


@dataclass
class Steps:
    """What a run's steps touch, and what a step is."""

    run: RunFiles
    cfg: RunConfig
    opened: Opened
    plan: Plan
    model: Model
    journal: Journal
    meter: Meter
    progress: RunProgress
    tuner: Tuner | None = None  # with a finetuner
    pace: Pace | None = None  # with --step auto, once it is measured
    guard: Guard = field(init=False)
    log: RunLog = field(init=False)

    @property
    def memory(self) -> Memory:
        return self.opened.memory

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.opened.dataset.train

    @property
    def estimator(self) -> Estimator:
        return Estimator.of(self.cfg)

    @property
    def probing(self) -> bool:
        """The exact head alone needs no probe, one side and no update of the store."""
        return bool(self.model.store.trainables)

    @property
    def sigma(self) -> float:
        """Size of a step's probe."""
        return self.cfg.sigma if self.pace is None else self.pace.sigma

    @property
    def factor(self) -> float:
        """Of --step, before the schedule."""
        return 1.0 if self.pace is None else self.pace.factor

    @property
    def sides(self) -> int:
        """Forwards over the batch in a step."""
        return len(self.model.evaluations) if self.probing else 1

    def step(self, step: int, step_size: float) -> StepRecord:
        """Probe, record, apply. Nothing has changed if it raises before the journal."""
        cfg, model = self.cfg, self.model
        assert cfg.batch_size is not None and cfg.micro_batch is not None
        group = self._group(step)
        sides, sigma = self.sides, self.sigma
        scales = None
        if self.tuner is not None:
            scales = self.tuner.tell(self.journal.record(step - 1) if step else None)
        compared = cfg.anchored and not cfg.is_anchor(step)
        kept = 2 * sides if compared else sides if self.probing else 2
        losses = np.full((kept, len(group)), np.nan, np.float32)
        short, parts = self._parts(group)
        try:
            for batch, probed in parts:
                self.check_room("the next micro-batch")
                with phase("forward"), self.memory.short("a micro-batch"):
                    found = self._losses(batch, group, step, probed)
                    losses[: sides if compared else kept, batch.slots] = found.numpy()
                    if compared:
                        with model.store.at_anchor():
                            again = self._losses(batch, group, step, probed)
                            losses[sides:, batch.slots] = again.numpy()
        except BaseException:
            model.store.take_guides(learn=False)
            model.forget()  # half a step's gradient must not leak into a saved state
            raise
        credit = self._credit(losses, short)
        if cfg.anchored:
            credit = np.append(credit, self._anchor_credit(step)).astype(np.float32)
        skipped = not bool(credit.any())
        touched = model.take_touched(len(group))
        record = StepRecord(step, sigma, step_size, skipped, losses, credit, touched, scales)
        guides = model.store.take_guides()
        self.journal.append(record)
        with phase("update"), model.heap.updating():
            model.store.apply([recipe_of(cfg, record)._replace(guides=guides)])
            for name, part in model.learned.items():
                # A rate of its own follows the same schedule as the step.
                part.update(cfg.rates[name] * step_size / (cfg.step * self.factor))
        if model.needs_snapshots and (step + 1) % cfg.snapshot_every == 0:
            self.save(step + 1)
        return record

    def _losses(self, batch: Batch, group: Sequence[Example], step: int, probed: bool) -> Tensor:
        """Of each side and example of a micro-batch of the step's group, (sides, b)."""
        sides = self.sides if probed else 1
        learn = 1.0 / (sides * len(group)) if self.model.learned else 0.0
        key = Key(self.cfg.seed, step) if probed else None
        return self.losses(batch, [group[slot] for slot in batch.slots], key, self.sigma, learn)

    def losses(
        self,
        batch: Batch,
        examples: Sequence[Example],
        key: Key | None,
        sigma: float,
        learn: float = 0.0,
    ) -> Tensor:
        """The model's losses of a micro-batch, or minus the objective, (sides, b); plain without a key."""
        judge, sides = self.opened.judge, self.sides if key is not None else 1

        def probe(batch: Batch) -> Probe | None:
            return self.model.probe(batch, key, sigma) if key is not None else None

        if judge is not None and judge.score is not None:
            return judge.losses(self.model, batch, examples, probe, sides)
        return self.model.losses(batch, probe(batch), sides=sides, learn=learn)[0]

    @property
    def writes(self) -> bool:
        """Whether a step writes answers: its micro-batches are whole, for the prompts pass in pieces."""
        judge = self.opened.judge
        return judge is not None and judge.score is not None and judge.writes

    @property
    def most_tokens(self) -> int | None:
        """Of one side, that a micro-batch is split into pieces of."""
        return None if self.writes else self.model.most_tokens

    def _parts(self, group: Sequence[Example]) -> tuple[list[int], Iterator[tuple[Batch, bool]]]:
        """(slots that no probe is needed for, packed micro-batches and whether each is probed)."""
        cfg, everything = self.cfg, list(range(len(group)))
        short, others = ([], everything) if self.probing else (everything, [])
        if self.model.factors is not None:
            short, others = divide(group, cfg.short_tokens or 0)
        assert cfg.micro_batch is not None
        split = ((short, False, self.most_back), (others, True, self.most_tokens))
        found = (
            (collate([group[slots[i]] for i in part], [slots[i] for i in part]), probed)
            for slots, probed, most in split
            for part in micro_batches([group[s] for s in slots], cfg.micro_batch, most)
        )
        return short, found

    @property
    def most_back(self) -> int | None:
        """Tokens of a piece that no probe is needed for."""
        return self.model.most_tokens if self.model.factors is None else self.cfg.short_tokens

    def _credit(self, losses: np.ndarray, short: list[int]) -> np.ndarray:
        """Credit of the probed examples; 0 of the others."""
        if not short:
            return self.estimator.credit(losses)
        credit = np.zeros(losses.shape[1], np.float32)
        others = np.setdiff1d(np.arange(len(credit)), short)
        if len(others):
            credit[others] = self.estimator.credit(losses[:, others])
        return credit

    def _anchor_credit(self, step: int) -> float:
        """The mean credit of the anchor that ``step`` is compared with; 0 of an anchor itself."""
        since = step % self.cfg.refresh
        return float(self.journal.record(step - since).credit[:-1].mean()) if since else 0.0

    def batch(self, step: int) -> list[Example]:
        assert self.cfg.batch_size is not None
        picked = batch_indices(len(self.examples), self.cfg.batch_size, self.cfg.seed, step)
        return [self.examples[i] for i in picked]

    def _group(self, step: int) -> list[Example]:
        """The step's batch; of an anchor those of all steps that will be compared with it."""
        steps = range(step, step + (self.cfg.refresh if self.cfg.is_anchor(step) else 1))
        return [example for s in steps for example in self.batch(s)]

    @phase("save")
    def save(self, step: int) -> None:
        """Make the state after ``step`` steps durable: the journal first, since a snapshot refers to it."""
        self.journal.sync()
        save_snapshot(self.run, self.model, step)

    def check_room(self, item: str) -> None:
        """BudgetExceeded unless there is room for a micro-batch, which has run before."""
        assert self.cfg.micro_batch is not None
        self.guard.check_again(self.need_bytes(self.cfg.micro_batch), item)

    def need_bytes(self, micro_batch: int) -> int:
        """About what a micro-batch takes while it runs: its part of the plan's. What does not shrink is small."""
        forward_bytes = self.plan.phase_bytes("forward") - self.plan.phase_bytes("always")
        return forward_bytes * self.at_once(micro_batch) // self.at_once(self.plan.micro_batch)

    def at_once(self, micro_batch: int) -> int:
        """Tokens of one side that such a micro-batch passes, or keeps, at once, at most."""
        return self.tokens.at_once(micro_batch, self.most_tokens)

    @cached_property
    def tokens(self) -> TokenStats:
        return self.opened.dataset.token_stats()
