"""When memory is short: the longest micro-batch runs first, and micro-batches are halved where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from edgezo.data.batches import Batch, Example, collate, longest_micro_batch
from edgezo.data.packed import PackedExamples
from edgezo.errors import BudgetExceeded
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.gpu_memory import Memory, confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Guard
from edgezo.machine.profiler import phase
from edgezo.network.first_order import split_by_length
from edgezo.plan.plan import Plan
from edgezo.run.session import split_less
from edgezo.run.state import RunState
from edgezo.run.step import Stepper
from edgezo.zo.noise import Key

Result = TypeVar("Result")


def guard_of(plan: Plan, memory: Memory) -> Guard:
    """The guard of a plan's cap on this memory."""
    return Guard(
        plan.max_mem_bytes,
        memory.margin_bytes,
        rss=memory.held_bytes,
        planned_bytes=plan.planned_peak_bytes,
        trim=memory.trim,
    )


@dataclass
class MicroBatchFitter:
    """Fits the micro-batches of a run into the memory that there is."""

    state: RunState
    stepper: Stepper

    def fitting(self, step: int, work: Callable[[], Result]) -> Result:
        """``work()``, begun again with a smaller micro-batch as often as memory is short and that helps.

        Raises BudgetExceeded where not even one example has room.
        """
        while True:
            try:
                return work()
            except BudgetExceeded:
                if not self._shrink(step):
                    raise

    def _shrink(self, step: int) -> bool:
        """Halve the micro-batch until it has room, for this run and its resumes; False: not even one example has.

        The directions stay, but losses of another split are equal to rounding only. What a resume computes again it
        has to split as the run did: so the state is saved first, and nothing before it is ever computed again.
        """
        before = smaller = self.state.cfg.micro_batch
        room_bytes = self.state.guard.room_bytes()
        while smaller > 1:
            smaller = (smaller + 1) // 2
            saves = self.stepper.tokens_at_once(smaller) < self.stepper.tokens_at_once(before)
            if saves and self.stepper.need_bytes(smaller) <= room_bytes:
                break
        else:
            return False
        self.stepper.save(step)
        self.state.split(smaller)
        atomic_write(self.state.files.config, self.state.cfg.to_toml().encode())
        self.note_split(step, before, "memory is short")
        return True

    def note_split(self, step: int, before: int | None, why: str) -> None:
        """Say, and write to metrics.jsonl, that the micro-batch has changed."""
        now = self.state.cfg.micro_batch
        self.state.progress.note(
            f"micro-batch {before} -> {now} after step {step}, {why}: losses are equal up to rounding"
        )
        self.state.log_line({"step": step, "micro_batch": now})

    def settle(self, done: int, *, may_grow: bool) -> None:
        """Run the longest micro-batch; where ``may_grow`` and it took less than planned, plan a larger one."""
        self.fitting(done, self.longest_first)
        as_planned = self.state.cfg.micro_batch == self.state.plan.micro_batch
        if may_grow and as_planned and self._replan():
            self.fitting(done, self.longest_first)

    def longest_first(self) -> None:
        """Run the longest possible micro-batch once and change nothing: what does not fit shows now, not late."""
        state, stepper = self.state, self.stepper
        batch = self._longest(state.examples, state.model.most_tokens)
        state.guard.check(stepper.need_bytes(state.cfg.micro_batch), "the longest micro-batch")
        # Before the first perturbation there was nothing but inference in this process: loading, and this.
        before_bytes = state.memory.peak_bytes()
        stepper.plain_forward(batch)
        peak_bytes = state.memory.peak_bytes()
        if peak_bytes == before_bytes:
            # Loading took more, or a resume's replay, which is not inference.
            peak_bytes = max(state.memory.load_peak_bytes, state.memory.held_bytes())
        state.inference_peak_bytes = peak_bytes
        self._perturb_once(batch)
        state.model.forget()
        state.model.take_touched(len(batch.slots))
        state.model.store.take_guides(learn=False)
        state.memory.measure_context()
        state.guard.check(item="training")

    def _perturb_once(self, batch: Batch) -> None:
        """What a step does with its longest micro-batch, backward passes and written answers included."""
        model, cfg, stepper = self.state.model, self.state.cfg, self.stepper
        probe = model.probe(batch, Key(cfg.seed, 0), cfg.sigma) if stepper.perturbs else None
        with phase("forward"), self.state.memory.short("the longest micro-batch"):
            learn = 1.0 if model.adapters is not None else 0.0  # a backward pass takes more
            model.losses(batch, probe, sides=stepper.sides, learn=learn)
            if stepper.writes:
                self._write_longest()
            if model.factors is not None:
                self._back_first()

    def _write_longest(self) -> None:
        """Let the micro-batch with the longest prompts write once, under the first perturbation."""
        state, cfg, judge = self.state, self.state.cfg, self.state.judge
        assert judge is not None  # as Stepper.writes has it
        if isinstance(state.examples, PackedExamples):
            lengths = state.examples.prompt_lengths()
        else:
            lengths = np.array([len(example.prompt) for example in state.examples])
        slots = np.argsort(-lengths, kind="stable")[: cfg.micro_batch].tolist()
        longest = [state.examples[slot] for slot in slots]
        probe = partial(state.model.probe, key=Key(cfg.seed, 0), sigma=cfg.sigma)
        judge.write(state.model, longest, probe, self.stepper.sides, None, state.model.most_tokens)

    def _back_first(self) -> None:
        """Run the longest possible piece of short examples once, forwards and backwards (addax)."""
        examples = self.state.examples
        slots, _ = split_by_length(examples, self.state.cfg.short_tokens or 0)
        if slots:
            short = [examples[slot] for slot in slots]
            batch = self._longest(short, self.stepper.most_tokens_back)
            self.state.model.losses(batch, learn=1.0)

    def _longest(self, examples: Sequence[Example], most_tokens: int | None) -> Batch:
        """The micro-batch of these examples with the most tokens, packed."""
        if isinstance(examples, PackedExamples):
            counts = examples.token_counts()
        else:
            counts = np.array([example.tokens for example in examples])
        slots = longest_micro_batch(counts, self.state.cfg.micro_batch, most_tokens)
        return collate([examples[slot] for slot in slots], range(len(slots)))

    def _replan(self) -> bool:
        """Correct the plan once by what the longest micro-batch took; True if a larger one fits now."""
        state, before = self.state, self.state.plan.micro_batch
        base_bytes = state.meter.summary()["base_rss_bytes"]
        peak_bytes = state.memory.peak_bytes()
        again = split_less(state.planned, confirmed(machine()), base_bytes, peak_bytes)
        if again is None:
            return False
        state.planned, plan = again, again.plan
        state.model.heap.trims = plan.maps
        state.model.heap.planned_bytes = plan.planned_peak_bytes
        state.model.kept_tokens = plan.kept_tokens
        atomic_write(state.files.plan, to_json(plan.to_dict()).encode())
        atomic_write(state.files.config, state.cfg.to_toml().encode())
        state.guard = guard_of(plan, state.memory)
        self.note_split(0, before, "the longest batch took less than planned")
        return True
