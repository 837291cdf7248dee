"""When memory is short: the longest micro-batch first, and smaller ones from then on where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from edgezo.data.batches import Batch, Example, collate, micro_batches, tokens_of
from edgezo.errors import BudgetExceeded
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Guard
from edgezo.machine.profiler import phase
from edgezo.network.addax import divide
from edgezo.run.session import split_less
from edgezo.run.step import Steps
from edgezo.zo.noise import Key

Result = TypeVar("Result")


@dataclass
class Room(Steps):
    """A run's steps, fitted into the memory that there is."""

    inference_peak_bytes: int | None = None

    def fitting(self, step: int, work: Callable[[], Result]) -> Result:
        """``work()``, begun anew with a smaller micro-batch as often as memory is short and that helps."""
        while True:
            try:
                return work()
            except BudgetExceeded:
                if not self._shrink(step):
                    raise

    def _shrink(self, step: int) -> bool:
        """Halve the micro-batch until it has room, for this run and its resumes; False: not even one example has.

        The directions stay, but losses of another split are equal to rounding only. What a resume computes again, it
        must split as the run did: so the state is saved first, and from here on nothing before it is computed again.
        """
        assert self.cfg.micro_batch is not None
        before = smaller = self.cfg.micro_batch
        room_bytes = self.guard.room_bytes()
        while smaller > 1:
            smaller = (smaller + 1) // 2
            saves = self.at_once(smaller) < self.at_once(before)
            if saves and self.need_bytes(smaller) <= room_bytes:
                break
        else:
            return False
        self.save(step)
        self.cfg = replace(self.cfg, micro_batch=smaller)
        atomic_write(self.run.config, self.cfg.to_toml().encode())
        self.note_split(step, before, "memory is short")
        return True

    def note_split(self, step: int, before: int | None, why: str) -> None:
        now = self.cfg.micro_batch
        self.progress.note(
            f"micro-batch {before} -> {now} after step {step}, {why}: losses are equal up to rounding"
        )
        self.log.write({"step": step, "micro_batch": now})

    def longest_first(self) -> None:
        """Run the longest possible micro-batch once, changing nothing: what does not fit shows now, not late."""
        assert self.cfg.micro_batch is not None
        batch = self._longest(self.examples, self.model.most_tokens)
        self.guard.check(self.need_bytes(self.cfg.micro_batch), "the longest micro-batch")
        # Before the first probe there was nothing but inference in this process: loading, and this.
        before_bytes = self.memory.peak_bytes()
        self.plain_forward(batch)
        peak_bytes = self.memory.peak_bytes()
        if peak_bytes == before_bytes:
            # Loading took more, or a resume's replay, which is not inference.
            peak_bytes = max(self.memory.load_peak_bytes, self.memory.held_bytes())
        self.inference_peak_bytes = peak_bytes
        probe = (
            self.model.probe(batch, Key(self.cfg.seed, 0), self.cfg.sigma) if self.probing else None
        )
        with phase("forward"), self.memory.short("the longest micro-batch"):
            learn = 1.0 if self.model.adapters is not None else 0.0  # a backward pass takes more
            self.model.losses(batch, probe, sides=self.sides, learn=learn)
            if self.writes:
                self._write_longest()
            if self.model.factors is not None:
                self._back_first()
        self.model.forget()
        self.model.take_touched(len(batch.slots))
        self.model.store.take_guides(learn=False)
        self.memory.look_again()
        self.guard.check(item="training")

    def _write_longest(self) -> None:
        """Let the micro-batch with the longest prompts write once, under the first probe."""
        judge, cfg = self.opened.judge, self.cfg
        assert judge is not None and cfg.micro_batch is not None
        longest = sorted(self.examples, key=lambda example: -len(example.prompt))[: cfg.micro_batch]
        probe = partial(self.model.probe, key=Key(cfg.seed, 0), sigma=cfg.sigma)
        judge.write(self.model, longest, probe, self.sides, None, self.model.most_tokens)

    def _back_first(self) -> None:
        """Run the longest possible piece of short examples once, there and back."""
        slots, _ = divide(self.examples, self.cfg.short_tokens or 0)
        if slots:
            short = [self.examples[slot] for slot in slots]
            self.model.losses(self._longest(short, self.most_back), learn=1.0)

    def _longest(self, examples: Sequence[Example], most_tokens: int | None) -> Batch:
        """The micro-batch of most tokens that comes of these examples, packed."""
        assert self.cfg.micro_batch is not None
        parts = micro_batches(examples, self.cfg.micro_batch, most_tokens)
        slots = max(parts, key=lambda part: sum(tokens_of(examples[s]) for s in part))
        return collate([examples[slot] for slot in slots], range(len(slots)))

    @phase("forward")
    def plain_forward(self, batch: Batch) -> None:
        """The rows of a step's micro-batch with no probe: what running the model takes."""
        with self.memory.short("a plain forward"):
            self.model.losses(batch, sides=self.sides if self.probing else 2)

    def set_guard(self) -> None:
        self.guard = Guard(
            self.plan.max_mem_bytes,
            self.memory.margin_bytes,
            rss=self.memory.held_bytes,
            planned_bytes=self.plan.planned_peak_bytes,
            trim=self.memory.trim,
        )

    def replan(self) -> bool:
        """Correct the plan once by what the longest micro-batch took; True if a larger one fits now."""
        base_bytes, planned = self.meter.summary()["base_rss_bytes"], self.plan
        plan = split_less(self.opened, confirmed(machine()), base_bytes, self.memory.peak_bytes())
        if plan is None:
            return False
        self.plan, self.cfg = plan, self.opened.cfg
        self.model.heap = replace(self.model.heap, trims=plan.maps)
        self.model.kept_tokens = plan.kept_tokens
        atomic_write(self.run.plan, to_json(plan.to_dict()).encode())
        atomic_write(self.run.config, self.cfg.to_toml().encode())
        self.set_guard()
        self.note_split(0, planned.micro_batch, "the longest batch took less than planned")
        return True
