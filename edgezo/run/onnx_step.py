"""One step on the ONNX engine: batch -> losses on both sides -> credit -> journal record -> update. As step.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edgezo.data.batches import Example, PackedRows, batch_indices, micro_batches, packed_rows
from edgezo.errors import BudgetExceeded
from edgezo.machine.files import atomic_write
from edgezo.machine.process_memory import peak_rss_bytes
from edgezo.network.onnx_engine import PlainProbe
from edgezo.run.journal_record import StepRecord
from edgezo.run.onnx_state import OnnxRunState, save_head
from edgezo.run.record_recipe import recipe_of
from edgezo.zo.bits import Key
from edgezo.zo.credit import Estimator

Result = TypeVar("Result")


@dataclass
class OnnxStepper:
    """Makes the steps of one run."""

    state: OnnxRunState

    @property
    def perturbs(self) -> bool:
        """Whether a step perturbs anything. For the exact head alone one plain forward is enough."""
        return bool(self.state.model.factors.values)

    @property
    def learns(self) -> bool:
        """Whether a step changes anything at all."""
        return self.perturbs or self.state.model.scorer.exact is not None

    @property
    def sides(self) -> int:
        return 2 if self.perturbs else 1

    # -- a step -------------------------------------------------------------------------------------------

    def step(self, step: int, step_size: float) -> StepRecord:
        """Perturb, record, apply; returns the record. Until the record is written nothing has changed."""
        state, cfg, model = self.state, self.state.cfg, self.state.model
        losses = self._losses_of_group(step, self.batch(step))
        credit = Estimator.of(cfg).credit(losses)
        record = StepRecord(step, cfg.sigma, step_size, not bool(credit.any()), losses, credit)
        state.journal.append(record)
        model.factors.apply([recipe_of(cfg, record)])
        if model.scorer.exact is not None:
            model.scorer.exact.update(cfg.head_lr * step_size / cfg.step)
            if (step + 1) % cfg.snapshot_every == 0:
                self.save(step + 1)
        return record

    def _losses_of_group(self, step: int, group: Sequence[Example]) -> np.ndarray:
        """Losses (2, B) fp32 of the step's batch; of plain forwards both lines are alike."""
        state, cfg, model = self.state, self.state.cfg, self.state.model
        losses = np.full((2, len(group)), np.nan, np.float32)
        probe = PlainProbe(Key(cfg.seed, step), cfg.sigma) if self.perturbs else None
        learn = 1.0 / (self.sides * len(group)) if model.scorer.exact is not None else 0.0
        try:
            for batch in self.packed(group):
                self.check_room("the next micro-batch")
                of_batch, _ = model.losses(batch, probe, learn=learn)
                losses[:, list(batch.slots)] = of_batch
        except BaseException:
            if model.scorer.exact is not None:
                model.scorer.exact.forget()
            raise
        finally:
            state.guard.check(item="the next step")
        return losses

    def plain_forward(self, group: Sequence[Example]) -> None:
        """The rows of a step without perturbation, both sides of them: what running the model takes."""
        for batch in self.packed(group):
            self.state.model.losses(batch, sides=2)

    def save(self, step: int) -> None:
        """Make the state after ``step`` steps durable: the journal first, since a snapshot refers to it."""
        self.state.journal.sync()
        save_head(self.state.files, self.state.model, step, self.state.journal.header)
        self.state.progress.saved(step)

    # -- which rows, and how they are split ---------------------------------------------------------------

    def batch(self, step: int) -> list[Example]:
        """The examples of a step's batch."""
        examples, cfg = self.state.examples, self.state.cfg
        return [examples[i] for i in batch_indices(len(examples), cfg.batch_size, cfg.seed, step)]

    def packed(self, group: Sequence[Example], times: int = 1) -> list[PackedRows]:
        """The micro-batches of a group, packed; ``times``: as many more rows pass at once."""
        parts = micro_batches(group, self.state.cfg.micro_batch * times)
        return [packed_rows([group[slot] for slot in slots], slots) for slots in parts]

    # -- memory -------------------------------------------------------------------------------------------

    def longest_first(self) -> None:
        """Run the longest possible micro-batch once and change nothing: what does not fit shows now, not late."""
        state, examples = self.state, self.state.examples
        order = sorted(range(len(examples)), key=lambda i: -examples[i].tokens)
        group = [examples[i] for i in order[: state.cfg.micro_batch]]
        (batch,) = self.packed(group)
        state.guard.check(self._need_bytes(), "the longest micro-batch")
        state.model.losses(batch, sides=2)
        state.inference_peak_bytes = peak_rss_bytes()
        if self.perturbs:
            state.model.losses(batch, PlainProbe(Key(state.cfg.seed, 0), state.cfg.sigma))
        state.guard.check(item="training")

    def check_room(self, item: str) -> None:
        """Raise BudgetExceeded unless there is room for a micro-batch, whose temporaries may already be in the heap."""
        self.state.guard.check_again(self._need_bytes(), item)

    def _need_bytes(self) -> int:
        """About what a micro-batch takes while it runs."""
        plan, cfg = self.state.plan, self.state.cfg
        forward_bytes = plan.phase_bytes("forward") - plan.phase_bytes("always")
        return forward_bytes * cfg.micro_batch // plan.micro_batch

    def fitting(self, step: int, work: Callable[[], Result]) -> Result:
        """``work()``, begun again with a smaller micro-batch as often as memory is short and that helps."""
        state = self.state
        while True:
            try:
                return work()
            except BudgetExceeded:
                before = state.cfg.micro_batch
                if before == 1:
                    raise
                self.save(step)
                state.split((before + 1) // 2)
                atomic_write(state.files.config, state.cfg.to_toml().encode())
                state.progress.note(
                    f"micro-batch {before} -> {state.cfg.micro_batch} after step {step}, memory is short: losses are "
                    "equal up to rounding"
                )
                state.log_line({"step": step, "micro_batch": state.cfg.micro_batch})
