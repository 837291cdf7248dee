"""One step: batch -> losses on both sides -> credit -> journal record -> update of the weights.

    losses+-_i = L(theta +- sigma*D_i ; x_i)     a_i = credit(losses)     theta <- theta - sum_i c_i D_i,  c_i ~ a_i

The journal comes first, the weights second: a record that is on disk stands for an update that is, or can be, applied.
Whatever is trained along directions is changed in ``WeightStore.apply`` (weights/store.py) and nowhere else. What has a
gradient of its own (the exact head, LoRA's matrices) changes in its ``update``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from edgezo.data.batches import Batch, Example, batch_indices, collate, micro_batches
from edgezo.data.token_stats import TokenStats
from edgezo.machine.clock import now_s
from edgezo.machine.profiler import phase
from edgezo.network.first_order import split_by_length
from edgezo.network.probe import Probe
from edgezo.plan.calibration import HEAD_TEMPORARIES
from edgezo.run.echo import echo_of_step
from edgezo.run.finetuner import Tuner
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import recipe_of
from edgezo.run.snapshots import save_snapshot
from edgezo.run.state import RunState
from edgezo.weights.saved import saved_sha256
from edgezo.zo.credit import Estimator
from edgezo.zo.noise import Key


@dataclass(frozen=True)
class Stride:
    """How far a step perturbs and moves. ``--step auto`` changes it while a run goes on (auto_step.py)."""

    sigma: float  # size of the perturbation
    factor: float = 1.0  # of --step, before the schedule


@dataclass
class Stepper:
    """Makes the steps of one run."""

    state: RunState
    # What the learned parts asked of the gradients of the step that is being made.
    _known: dict[str, list[float]] = field(default_factory=dict)

    # -- a step -------------------------------------------------------------------------------------------

    def step(self, step: int, step_size: float, stride: Stride) -> StepRecord:
        """Perturb, record, apply; returns the record. Until the record is written nothing has changed."""
        cfg, model = self.state.cfg, self.state.model
        group = self._group(step)
        scales = None
        if self._tuner is not None:
            previous = self.state.journal.record(step - 1) if step else None
            scales = self._tuner.scale_step(previous)
        echo = echo_of_step(cfg, model.store, step, self.state.journal.record)
        model.store.echo = tuple(echo.tolist())
        losses, short = self._losses_of_group(step, group, stride)
        credit = self._credit(step, losses, short, stride.sigma)
        if cfg.anchored:
            credit = np.append(credit, self._anchor_credit(step)).astype(np.float32)
        credit = np.append(credit, echo)
        record = StepRecord(
            step,
            stride.sigma,
            step_size,
            not bool(credit[: len(credit) - cfg.carries].any()),
            losses,
            credit,
            self._touched(len(group)),
            scales,
        )
        guides = model.store.take_guides()
        self.state.journal.append(record)
        with phase("update"), model.heap.updating():
            model.store.apply([recipe_of(cfg, record)._replace(guides=guides)])
            for name, part in model.learned.items():
                moved_bytes = sum(tensor.nbytes for tensor in part.trained().values())
                model.heap.make_room(HEAD_TEMPORARIES * moved_bytes)
                # Parts with a learning rate follow the schedule of the step.
                rate = cfg.rates[name] * step_size / (cfg.step * stride.factor)
                part.update(rate, self._known.get(name))
        if model.needs_snapshots and (step + 1) % cfg.snapshot_every == 0:
            self.save(step + 1)
        return record

    def _losses_of_group(
        self, step: int, group: Sequence[Example], stride: Stride
    ) -> tuple[np.ndarray, list[int]]:
        """(losses, slots that are not perturbed). Losses are (sides, B) fp32; with SVRG those at the anchor follow."""
        cfg, model, sides = self.state.cfg, self.state.model, self.sides
        compared = cfg.anchored and not cfg.is_anchor(step)
        lines = 2 * sides if compared else sides if self.perturbs else 2
        losses = np.full((lines, len(group)), np.nan, np.float32)
        short, parts = self._parts(group)
        begun_s = now_s()
        queued: list[tuple[slice, tuple[int, ...], Tensor]] = []
        try:
            for batch, perturbed in parts:
                self.check_room("the next micro-batch")
                with phase("forward"), self.state.memory.short("a micro-batch"):
                    of_batch = self._losses_of_batch(batch, group, step, perturbed, stride.sigma)
                    first = slice(0, sides if compared else lines)
                    queued.append((first, batch.slots, of_batch))
                    if compared:
                        with model.store.at_anchor():
                            of_batch = self._losses_of_batch(
                                batch, group, step, perturbed, stride.sigma
                            )
                            queued.append((slice(sides, lines), batch.slots, of_batch))
            with phase("forward"):
                read, self._known = model.read([of_batch for _, _, of_batch in queued])
            for (of_side, slots, _), values in zip(queued, read, strict=True):
                losses[of_side, slots] = values
        except BaseException:
            model.store.take_guides(learn=False)
            model.forget()  # half a step's gradient must not leak into a saved state
            raise
        if self.state.ranks is not None:
            took_s, asked = now_s() - begun_s, self.state.stop.asked
            self.state.ranks.exchange(step, losses, took_s, asked, self._state_hash(step))
        return losses, short

    def _state_hash(self, step: int) -> int:
        """The first 64 bits of the trained state's SHA-256, every ``snapshot_every`` steps; else 0."""
        if step % self.state.cfg.snapshot_every:
            return 0
        return int(saved_sha256(self.state.model.saved())[:16], 16)

    def _losses_of_batch(
        self, batch: Batch, group: Sequence[Example], step: int, perturbed: bool, sigma: float
    ) -> Tensor:
        """Losses (sides, b) of a micro-batch of the step's group."""
        sides = self.sides if perturbed else 1
        learn = 1.0 / (sides * len(group)) if self.state.model.learned else 0.0
        cfg = self.state.cfg
        key = Key(cfg.seed, cfg.since_base(step)) if perturbed else None
        examples = [group[slot] for slot in batch.slots]
        return self.losses(batch, examples, key, sigma, learn, wait=False)

    def losses(
        self,
        batch: Batch,
        examples: Sequence[Example],
        key: Key | None,
        sigma: float,
        learn: float = 0.0,
        *,
        wait: bool = True,
    ) -> Tensor:
        """Losses of a micro-batch, (sides, b) fp32. With an objective they are minus its scores.

        Without ``wait`` they may still be computed on the model's device.

        ``key`` and ``sigma`` are those of the perturbation; without a key there is none, and one side.
        ``learn`` is an example's weight in the gradient of the exactly trained parts; 0 computes no gradient.
        """
        model, judge = self.state.model, self.state.judge
        sides = self.sides if key is not None else 1

        def probe(batch: Batch) -> Probe | None:
            return model.probe(batch, key, sigma) if key is not None else None

        if judge is not None and judge.score is not None:
            return judge.losses(model, batch, examples, probe, sides)
        return model.losses(batch, probe(batch), sides=sides, learn=learn, wait=wait)[0]

    @phase("forward")
    def plain_forward(self, batch: Batch) -> None:
        """The rows of a step's micro-batch without perturbation: what running the model takes."""
        with self.state.memory.short("a plain forward"):
            self.state.model.losses(batch, sides=self.sides if self.perturbs else 2)

    @phase("save")
    def save(self, step: int) -> None:
        """Make the state after ``step`` steps durable: the journal first, since a snapshot refers to it."""
        self.state.journal.sync()
        save_snapshot(self.state.files, self.state.model, step, self.state.journal.header)
        self.state.progress.saved(step)

    # -- credit -------------------------------------------------------------------------------------------

    def _credit(self, step: int, losses: np.ndarray, short: list[int], sigma: float) -> np.ndarray:
        """Credit (B,) of the perturbed examples, 0 for the others; then what the next step takes up of the credit."""
        estimator = Estimator.of(self.state.cfg)
        if estimator.carry is not None and self.perturbs:
            last = self.state.cfg.carries
            before = self.state.journal.record(step - 1).credit[-last:] if step else None
            return estimator.recorded(losses, sigma, step, before)
        if not short:
            return estimator.credit(losses)
        credit = np.zeros(losses.shape[1], np.float32)
        perturbed = np.setdiff1d(np.arange(len(credit)), short)
        if len(perturbed):
            credit[perturbed] = estimator.credit(losses[:, perturbed])
        return credit

    def _anchor_credit(self, step: int) -> float:
        """Mean credit of the anchor that ``step`` is compared with (MeZO-SVRG); 0 if ``step`` is an anchor."""
        since = step % self.state.cfg.refresh
        if not since:
            return 0.0
        return float(self.state.journal.record(step - since).credit[:-1].mean())

    def _touched(self, examples: int) -> tuple[np.ndarray, ...]:
        """Touched tokens as a record has them: a list for each of its credits, empty for what is carried; or one."""
        model, carried = self.state.model, self.state.cfg.carried
        touched = model.take_touched(examples)
        if model.candidates or not touched:
            return touched
        return (*touched, *[np.empty(0, np.int64)] * carried)

    # -- which rows, and how they are split ---------------------------------------------------------------

    def batch(self, step: int) -> list[Example]:
        """The examples of a step's batch. A run that goes on from another one takes up its order of rows."""
        examples, cfg = self.state.examples, self.state.cfg
        at, rows = cfg.since_base(step), cfg.batch_size // cfg.samples
        order = batch_indices(len(examples), rows, cfg.seed, at)
        return [examples[i] for i in order for _ in range(cfg.samples)]

    def _group(self, step: int) -> list[Example]:
        """The step's batch; for an anchor the batches of all steps that will be compared with it."""
        cfg = self.state.cfg
        steps = range(step, step + (cfg.refresh if cfg.is_anchor(step) else 1))
        return [example for s in steps for example in self.batch(s)]

    def _parts(self, group: Sequence[Example]) -> tuple[list[int], Iterator[tuple[Batch, bool]]]:
        """(slots without perturbation, packed micro-batches and whether each is perturbed)."""
        cfg, everything = self.state.cfg, list(range(len(group)))
        short, others = ([], everything) if self.perturbs else (everything, [])
        if self.state.model.factors is not None:
            short, others = split_by_length(group, cfg.short_tokens or 0)
        split = [(short, False, self.most_tokens_back), (others, True, self.most_tokens)]
        if self.state.ranks is not None:  # no step of theirs has examples that are not perturbed
            mine = self.state.ranks.mine(group, others)
            split = [(part, True, self.most_tokens) for part in mine]
        batches = (
            (collate([group[slots[i]] for i in part], [slots[i] for i in part]), perturbed)
            for slots, perturbed, most in split
            for part in micro_batches([group[s] for s in slots], cfg.micro_batch, most)
        )
        return short, batches

    # -- sizes --------------------------------------------------------------------------------------------

    @property
    def perturbs(self) -> bool:
        """Whether a step perturbs anything. For the exact head alone one unperturbed forward pass is enough."""
        return bool(self.state.model.store.trainables)

    @property
    def sides(self) -> int:
        """Forward passes over the batch in a step."""
        return len(self.state.model.evaluations) if self.perturbs else 1

    @property
    def writes(self) -> bool:
        """Whether a step writes answers. Then micro-batches are not split: ``generate`` splits the prompts itself."""
        judge = self.state.judge
        return judge is not None and judge.score is not None and judge.writes

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of one side in a piece of a micro-batch; None where micro-batches are not split."""
        return None if self.writes else self.state.model.most_tokens

    @property
    def most_tokens_back(self) -> int | None:
        """Tokens of a piece that is not perturbed."""
        model = self.state.model
        return model.most_tokens if model.factors is None else self.state.cfg.short_tokens

    def check_room(self, item: str) -> None:
        """Raise BudgetExceeded unless there is room for a micro-batch. Its temporaries may already be in the heap."""
        self.state.guard.check_again(self.need_bytes(self.state.cfg.micro_batch), item)

    def need_bytes(self, micro_batch: int) -> int:
        """About what a micro-batch of this size takes while it runs: its share of the plan's forward items."""
        plan = self.state.plan
        forward_bytes = plan.phase_bytes("forward") - plan.phase_bytes("always")
        return (
            forward_bytes
            * self.tokens_at_once(micro_batch)
            // self.tokens_at_once(plan.micro_batch)
        )

    def tokens_at_once(self, micro_batch: int) -> int:
        """The most tokens of one side that a micro-batch of this size holds at once."""
        return self._token_stats.at_once(micro_batch, self.most_tokens)

    @cached_property
    def _token_stats(self) -> TokenStats:
        return self.state.dataset.token_stats()

    @cached_property
    def _tuner(self) -> Tuner | None:
        """With --mask block: scales the directions of a step. Made at the first step, when all parts are settled."""
        finetuner = self.state.opened.finetuner
        if finetuner is None:
            return None
        return Tuner.of(finetuner, self.state.model.store, self.state.dataset)
