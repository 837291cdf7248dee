"""The loop: batch -> two-sided losses -> credit -> journal -> one mutation of the weights.

    journal first, weights second: a record that is on disk stands for an update that is, or can be, applied.

What has no seed form (the exact head; all that is trained along what the layers read) is snapshotted every
``snapshot_every`` steps. A resume replays the records up to the last snapshot and recomputes the steps after it, which
gives the same bits; where all has a seed nothing needs recomputing.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from edgezo.addax import divide
from edgezo.config import RunConfig
from edgezo.data import Batch, Example, batch_indices, collate, micro_batches, pieces, tokens_of
from edgezo.device import confirmed
from edgezo.errors import BudgetExceeded, EdgezoError, Interrupted
from edgezo.estimators import Estimator, schedule
from edgezo.files import atomic_write, remove_leftovers
from edgezo.finetuner import Tuner, load_finetuner
from edgezo.journal import Journal, StepRecord, create_journal
from edgezo.machine import machine
from edgezo.memory import Guard, Meter, peak_rss_bytes, rss_bytes
from edgezo.model import Model
from edgezo.noise import Key
from edgezo.planner import Plan
from edgezo.presets import AUTO
from edgezo.probe_pass import Outcome, ProbePass, recall
from edgezo.profiler import phase, profiling, running
from edgezo.report import RunProgress, Silent, peaks_line, to_json
from edgezo.rundir import (
    Overlay,
    RunFiles,
    header_of,
    load_snapshot,
    lost_head,
    prepare,
    reopen,
    save_snapshot,
)
from edgezo.runlog import RunLog, mean_loss, step_line
from edgezo.session import (
    Opened,
    evaluate_model,
    follow,
    journal_is_shaped,
    load_model,
    open_request,
    recipe_of,
    replay_into,
    settle,
    settle_again,
    split_less,
)
from edgezo.shapes import TokenStats
from edgezo.weights import saved_sha256

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

FORWARD_ONLY = ("directions", "mask", "credit", "rule")  # axes that a backward pass has no use for
PLAIN_FORWARDS = 8  # plain forwards timed in a run, for summary.json's forward_s


def finetune(
    cfg: RunConfig, *, resume: bool = False, progress: RunProgress | None = None
) -> dict[str, Any]:
    """Run, or go on with, a fine-tune in ``cfg.out``; returns what summary.json holds.

    A resume without a micro-batch takes the run's, which may have shrunk since the run began.
    Raises UsageError, DoesNotFit (before anything is written), BudgetExceeded and Interrupted (state saved),
    BaseMismatch, EdgezoError.
    """
    if resume and cfg.micro_batch is None and cfg.out is not None:
        cfg = replace(cfg, micro_batch=RunFiles(Path(cfg.out)).read_config().micro_batch)
    with profiling(cfg.profile):
        return _finetune(cfg, resume, progress or Silent())


def _finetune(cfg: RunConfig, resume: bool, progress: RunProgress) -> dict[str, Any]:
    meter = Meter()
    with phase("import"):
        opened = open_request(cfg)
    if cfg.finetuner is not None:
        opened.finetuner = load_finetuner(Path(cfg.finetuner))
    for note in opened.dataset.notes:
        progress.note(note)
    host = confirmed(machine())
    base = meter.mark("base")
    split_is_free = cfg.micro_batch is None
    plan = (settle_again if resume else settle)(opened, host, base.rss_bytes)
    if cfg.estimator == AUTO:
        progress.note(next(d.reason for d in plan.decisions if d.name == "estimator"))
    progress.plan(plan)
    cfg = opened.cfg
    assert cfg.out is not None, "the command line names a run directory"
    run, header = RunFiles(Path(cfg.out)), header_of(opened)
    with ExitStack() as held:
        if resume:
            journal = held.enter_context(reopen(run, header, progress))
        else:
            prepare(run)
            atomic_write(run.config, cfg.to_toml().encode())
        atomic_write(run.plan, to_json(plan.to_dict()).encode())
        held.callback(_save_profile, run, progress)
        overlay = Overlay.of(run, header)
        if not resume or not plan.blocks_on_disk:
            overlay.remove()
        try:
            model = load_model(opened, host, overlay)
        except BaseException:
            if not resume:
                overlay.remove()
            raise
        held.callback(model.close)
        if not resume:  # last, so that a model that cannot be loaded leaves no run behind
            kind = {"shaped": journal_is_shaped(cfg), "scaled": cfg.finetuner is not None}
            journal = held.enter_context(create_journal(run.journal, header, **kind))
        remove_leftovers(run.path)
        run.trained.unlink(missing_ok=True)  # what a replay left would be older than what follows
        meter.mark("load")
        opened.memory.loaded()
        training = Training(run, cfg, opened, plan, model, journal, meter, progress)
        training.resumed, training.split_is_free = resume, split_is_free
        with _signals(training):
            return training.run_all()


def _save_profile(run: RunFiles, progress: RunProgress) -> None:
    """profile.json of this process, however the run ends. A measurement that cannot be written fails no run."""
    profiler = running()
    if profiler is None:
        return
    found = profiler.report()
    if "forward" not in found["phases"] and run.summary.exists():
        return  # the run was over before: what it measured stays
    try:
        atomic_write(run.profile, (to_json(found) + "\n").encode())
    except EdgezoError as problem:
        progress.note(f"no profile of this run: {problem}")


@contextmanager
def _signals(training: Training) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the loop to stop between two steps; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if training.stop_asked:
            raise KeyboardInterrupt
        training.stop_asked = True

    previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class Training:
    """One run in progress: everything that the loop touches."""

    run: RunFiles
    cfg: RunConfig
    opened: Opened
    plan: Plan
    model: Model
    journal: Journal
    meter: Meter
    progress: RunProgress
    stop_asked: bool = False
    resumed: bool = False
    split_is_free: bool = False  # the plan chose the micro-batch, and nothing was computed with it
    inference_peak_bytes: int | None = None
    tuner: Tuner | None = None  # with a finetuner
    probe: Outcome | None = None  # of --train probe, once it is fitted

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
    def sides(self) -> int:
        """Forwards over the batch in a step."""
        return len(self.model.evaluations) if self.probing else 1

    def run_all(self) -> dict[str, Any]:
        run = self.run
        self.memory = self.opened.memory
        self._guard()
        follow(self.model, self.cfg, self.journal)
        self.probe = self._known_probe()
        if self.model.store.residency is not None:
            self.model.store.residency.note = self.progress.note
        done, planned = self._restore()
        saved = run.read_config() if run.config.exists() else None
        if saved != self.cfg:  # by a resume; nothing is written before the state was read
            atomic_write(run.config, self.cfg.to_toml().encode())
        self.log = RunLog(run.metrics, keep_through=done if self.resumed else None)
        with closing(self.log):
            self._recall(done)
            finished = _saved_summary(run)  # written at the end only
            if finished.get("steps") == done and (done or self.probe is not None):
                with self.model.heap.updating():
                    self.model.store.finish(done)
                if finished["trained_sha256"] == saved_sha256(self.model.saved()):
                    return finished
            if saved is not None and saved.micro_batch != self.cfg.micro_batch:
                self._note_split(done, saved.micro_batch, "as asked")
            if done and saved is not None and saved.device != self.cfg.device:
                self.progress.note(
                    f"on {self.cfg.device} after step {done}, before on {saved.device}: "
                    "updates are equal, losses up to rounding"
                )
            self.fitting(done, self._longest_first)
            unshrunk = self.cfg.micro_batch == self.plan.micro_batch
            if self.split_is_free and unshrunk and self._split_less():
                self.fitting(done, self._longest_first)
            before = self.log.evaluations.get(("before", 0))
            if not done and not self.model.readout:
                before = self._evaluate("before")
            if "probe" in self.cfg.train and self.probe is None:
                self.probe = self._fit_probe()
            if (finetuner := self.opened.finetuner) is not None:
                self.tuner = Tuner.of(finetuner, self.model.store, self.opened.dataset)
            step, train_s = self._loop(done, planned)
            self._save(step)
            if self.cfg.rounding == "anchored":
                heap = self.model.heap
                with phase("update"), self.memory.short("the last anchor"), heap.updating():
                    self.model.store.finish(step)
            if self.model.store.residency is not None:
                self.model.store.residency.flush()
            after = self._evaluate("after", step)
            self.meter.mark("run")
            summary = self._summary(step, train_s, before, after)
            if (profiler := running()) is not None:
                summary["phases"] = profiler.phases()
        atomic_write(run.summary, (to_json(summary) + "\n").encode())
        return summary

    def _loop(self, done: int, planned: dict[int, float]) -> tuple[int, float]:
        """Steps until the run is over; (steps, seconds of training, those before a resume included)."""
        cfg = self.cfg
        self.progress.begin(done=done, steps=cfg.steps, cap_bytes=self.plan.max_mem_bytes)
        spent_s = sum(self.log.step_times_s) + (self.probe.fit_s if self.probe is not None else 0.0)
        start_s, excluded_s = time.monotonic() - spent_s, 0.0
        step = done
        try:
            while True:
                train_s = time.monotonic() - start_s - excluded_s
                fraction = self._fraction(step, train_s)
                if fraction >= 1.0 or not (self.probing or self.model.learned):
                    return step, train_s
                self.check_stop(step)
                begun_s = time.monotonic()
                if cfg.eval_every and step and step % cfg.eval_every == 0:
                    self._evaluate("during", step)
                    excluded_s += time.monotonic() - begun_s
                    begun_s = time.monotonic()
                moved = self._moved()
                step_size = planned.get(step, cfg.step * schedule(cfg.schedule, fraction))
                with self.memory.short("an update"):  # or what else nothing smaller stands for
                    record = self.fitting(step, partial(self._step, step, step_size))
                took_s = time.monotonic() - begun_s
                step += 1
                line = {**self._line(record), "step_s": took_s, "rss_bytes": rss_bytes()}
                line |= {name: now - moved[name] for name, now in self._moved().items()}
                if (forward_s := self._time_plain_forward(record.step)) is not None:
                    line["forward_s"] = forward_s
                    excluded_s += forward_s
                self.log.write(line)
                self.progress.step(
                    step,
                    fraction=min(1.0, step / cfg.steps if cfg.steps else fraction),
                    loss=line["loss"],
                    step_s=took_s,
                    rss_bytes=self.memory.held_bytes(),
                )
        except BudgetExceeded as problem:
            self._stopped(step)
            raise BudgetExceeded(
                f"{problem}\nThe state after step {step} is saved in {self.run.path}."
            ) from problem
        except Interrupted:
            self._stopped(step)
            raise
        finally:
            self.progress.close()

    def check_stop(self, step: int) -> None:
        """Interrupted if Ctrl-C or SIGTERM has asked for it."""
        if self.stop_asked:
            raise Interrupted(
                f"stopped after step {step}; everything is saved in {self.run.path}.\n"
                f"Go on with: edgezo finetune --resume --out {self.run.path}"
            )

    def _moved(self) -> dict[str, int]:
        """Bytes of weights elsewhere read and written so far; nothing where all are in memory."""
        residency = self.model.store.residency
        if residency is None:
            return {}
        kind, traffic = residency.medium.kind, residency.medium.traffic
        return {
            f"{kind}_read_bytes": traffic.read_bytes,
            f"{kind}_written_bytes": traffic.written_bytes,
        }

    def _stopped(self, step: int) -> None:
        """What a run that ends early leaves: its state, and the verdict on its memory so far."""
        self._save(step)
        self.progress.note(f"peak memory: {peaks_line(self._peaks())}")

    def _fraction(self, step: int, train_s: float) -> float:
        """How much of the run is over, by steps or by time."""
        return step / self.cfg.steps if self.cfg.steps else train_s / (self.cfg.for_s or 1.0)

    # -- one step -----------------------------------------------------------------------------------------

    def _step(self, step: int, step_size: float) -> StepRecord:
        """Probe, record, apply. Nothing has changed if it raises before the journal."""
        cfg, model = self.cfg, self.model
        assert cfg.batch_size is not None and cfg.micro_batch is not None
        group = self._group(step)
        sides = self.sides
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
        record = StepRecord(step, cfg.sigma, step_size, skipped, losses, credit, touched, scales)
        guides = model.store.take_guides()
        self.journal.append(record)
        with phase("update"), model.heap.updating():
            model.store.apply([recipe_of(cfg, record)._replace(guides=guides)])
            for name, part in model.learned.items():
                # A rate of its own follows the same schedule as the step.
                part.update(cfg.rates[name] * step_size / cfg.step)
        if model.needs_snapshots and (step + 1) % cfg.snapshot_every == 0:
            self._save(step + 1)
        return record

    def _losses(self, batch: Batch, group: Sequence[Example], step: int, probed: bool) -> Tensor:
        """Of each side and example of a micro-batch, (sides, b): the model's own, or minus the objective."""
        judge, sides = self.opened.judge, self.sides if probed else 1
        probe = partial(self.model.probe, key=Key(self.cfg.seed, step), sigma=self.cfg.sigma)
        if judge is not None and judge.score is not None:
            examples = [group[slot] for slot in batch.slots]
            return judge.losses(self.model, batch, examples, probe, sides)
        learn = 1.0 / (sides * len(group)) if self.model.learned else 0.0
        found, _ = self.model.losses(
            batch, probe(batch) if probed else None, sides=sides, learn=learn
        )
        return found

    @property
    def writes(self) -> bool:
        """Whether a step writes answers: its micro-batches are whole, for the prompts pass in pieces."""
        judge = self.opened.judge
        return judge is not None and judge.score is not None and judge.writes

    @property
    def _most_tokens(self) -> int | None:
        """Of one side, that a micro-batch is split into pieces of."""
        return None if self.writes else self.model.most_tokens

    def _parts(self, group: Sequence[Example]) -> tuple[list[int], Iterator[tuple[Batch, bool]]]:
        """(slots that no probe is needed for, packed micro-batches and whether each is probed)."""
        cfg, everything = self.cfg, list(range(len(group)))
        short, others = ([], everything) if self.probing else (everything, [])
        if self.model.factors is not None:
            short, others = divide(group, cfg.short_tokens or 0)
        assert cfg.micro_batch is not None
        split = ((short, False, self._most_back), (others, True, self._most_tokens))
        found = (
            (collate([group[slots[i]] for i in part], [slots[i] for i in part]), probed)
            for slots, probed, most in split
            for part in micro_batches([group[s] for s in slots], cfg.micro_batch, most)
        )
        return short, found

    @property
    def _most_back(self) -> int | None:
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

    # -- when memory is short -----------------------------------------------------------------------------

    def fitting(self, step: int, work: Callable[[], Result]) -> Result:
        """``work()``, begun anew with a smaller micro-batch as often as memory is short and that helps."""
        while True:
            try:
                return work()
            except BudgetExceeded:
                if not self._shrink(step):
                    raise

    def check_room(self, item: str) -> None:
        """BudgetExceeded unless there is room for a micro-batch, which has run before."""
        assert self.cfg.micro_batch is not None
        self.guard.check_again(self._need_bytes(self.cfg.micro_batch), item)

    def _need_bytes(self, micro_batch: int) -> int:
        """About what a micro-batch takes while it runs: its part of the plan's. What does not shrink is small."""
        forward_bytes = self.plan.phase_bytes("forward") - self.plan.phase_bytes("always")
        return forward_bytes * self._at_once(micro_batch) // self._at_once(self.plan.micro_batch)

    def _at_once(self, micro_batch: int) -> int:
        """Tokens of one side that such a micro-batch passes, or keeps, at once, at most."""
        return self._tokens.at_once(micro_batch, self._most_tokens)

    @cached_property
    def _tokens(self) -> TokenStats:
        return TokenStats.of(self.opened.dataset)

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
            saves = self._at_once(smaller) < self._at_once(before)
            if saves and self._need_bytes(smaller) <= room_bytes:
                break
        else:
            return False
        self._save(step)
        self.cfg = replace(self.cfg, micro_batch=smaller)
        atomic_write(self.run.config, self.cfg.to_toml().encode())
        self._note_split(step, before, "memory is short")
        return True

    def _note_split(self, step: int, before: int | None, why: str) -> None:
        now = self.cfg.micro_batch
        self.progress.note(
            f"micro-batch {before} -> {now} after step {step}, {why}: losses are equal up to rounding"
        )
        self.log.write({"step": step, "micro_batch": now})

    def _batch(self, step: int) -> list[Example]:
        assert self.cfg.batch_size is not None
        picked = batch_indices(len(self.examples), self.cfg.batch_size, self.cfg.seed, step)
        return [self.examples[i] for i in picked]

    def _group(self, step: int) -> list[Example]:
        """The step's batch; of an anchor those of all steps that will be compared with it."""
        steps = range(step, step + (self.cfg.refresh if self.cfg.is_anchor(step) else 1))
        return [example for s in steps for example in self._batch(s)]

    def _time_plain_forward(self, step: int) -> float | None:
        """Now and then the seconds of a plain forward over the 2B rows of the batch that has just passed."""
        # With weights on disk only once: a plain forward there does the next step's updates and writes.
        wanted = PLAIN_FORWARDS if self.model.store.residency is None else 1
        every = max(1, (self.cfg.steps or 100) // wanted)
        if step % every != every // 2:
            return None
        group = self._batch(step)
        assert self.cfg.micro_batch is not None
        begun_s = time.monotonic()
        for batch in pieces(group, self.cfg.micro_batch, self.model.most_tokens):
            self._plain_forward(batch)
        return time.monotonic() - begun_s

    @phase("forward")
    def _plain_forward(self, batch: Batch) -> None:
        """The rows of a step's micro-batch with no probe: what running the model takes."""
        with self.memory.short("a plain forward"):
            self.model.losses(batch, sides=self.sides if self.probing else 2)

    # -- beginning and end --------------------------------------------------------------------------------

    def _restore(self) -> tuple[int, dict[int, float]]:
        """Bring the weights to where the journal stands: (steps done, step sizes of steps to be recomputed)."""
        journal, model = self.journal, self.model
        if not len(journal):
            return 0, {}
        stop = journal.next_step
        planned: dict[int, float] = {}
        if model.needs_snapshots:
            gone = not self.run.snapshot.exists()
            if gone and self.cfg.steps is None and stop >= self.cfg.snapshot_every:
                raise lost_head(self.run, self.cfg, stop)
            stop = load_snapshot(self.run, model)
            if stop > journal.next_step:
                raise EdgezoError(
                    f"{self.run.snapshot} is of step {stop}, but {journal.path.name} ends after step "
                    f"{journal.next_step}: its end was lost.\n"
                    f"Restore it from a copy, or remove {self.run.snapshot.name}: the steps are then "
                    "computed again from the first one."
                )
            planned = {r.step: r.step_size for r in journal.records(stop)}
            journal.truncate_to(stop)
        replay_into(model, stop)
        return stop, planned

    def _known_probe(self) -> Outcome | None:
        """The run's own linear probe, back in the model. EdgezoError where there are steps, but it is gone."""
        if "probe" not in self.cfg.train:
            return None
        found = recall(self.run, self.model, self.opened.files.shape.layers)
        if found is None and len(self.journal):
            raise EdgezoError(
                f"{self.run.path} has {self.journal.next_step} steps in its journal, but {self.run.probe.name}, "
                "the linear probe that they were computed with, is not there.\n"
                "Restore it from a copy, or start again with another --out."
            )
        if found is not None:
            self.run.states.unlink(missing_ok=True)  # a kill may have left it
        return found

    def _fit_probe(self) -> Outcome:
        """The pass over the rows; it counts as training."""
        try:
            return ProbePass(self).run()
        except (BudgetExceeded, Interrupted):
            self._stopped(0)
            raise

    def _recall(self, done: int) -> None:
        """Add the steps that a kill left out of metrics.jsonl."""
        for record in self.journal.records(self.log.last_step):
            if record.step < done:
                self.log.write({**self._line(record), "step_s": None, "rss_bytes": None})

    def _line(self, record: StepRecord) -> dict[str, Any]:
        return step_line(self._own(record), self.probing)

    def _own(self, record: StepRecord) -> StepRecord:
        """The record without losses at an anchor, which are not those of the weights being trained."""
        return replace(record, losses=record.losses[: max(2, self.sides)])

    def _longest_first(self) -> None:
        """Run the longest possible micro-batch once, changing nothing: what does not fit shows now, not late."""
        assert self.cfg.micro_batch is not None
        parts = micro_batches(self.examples, self.cfg.micro_batch, self.model.most_tokens)
        slots = max(parts, key=lambda part: sum(tokens_of(self.examples[s]) for s in part))
        batch = collate([self.examples[slot] for slot in slots], range(len(slots)))
        self.guard.check(self._need_bytes(self.cfg.micro_batch), "the longest micro-batch")
        # Before the first probe there was nothing but inference in this process: loading, and this.
        before_bytes = self.memory.peak_bytes()
        self._plain_forward(batch)
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
        self.model.take_touched(len(slots))
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
        assert self.cfg.micro_batch is not None
        slots, _ = divide(self.examples, self.cfg.short_tokens or 0)
        short = [self.examples[slot] for slot in slots]
        parts = micro_batches(short, self.cfg.micro_batch, self._most_back)
        longest = max(parts, key=lambda part: sum(tokens_of(short[s]) for s in part), default=[])
        if longest:
            batch = collate([short[s] for s in longest], range(len(longest)))
            self.model.losses(batch, learn=1.0)

    def _guard(self) -> None:
        self.guard = Guard(
            self.plan.max_mem_bytes,
            self.memory.margin_bytes,
            rss=self.memory.held_bytes,
            planned_bytes=self.plan.planned_peak_bytes,
            trim=self.memory.trim,
        )

    def _split_less(self) -> bool:
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
        self._guard()
        self._note_split(0, planned.micro_batch, "the longest batch took less than planned")
        return True

    def _evaluate(self, when: str, step: int = 0) -> dict[str, Any]:
        """Evaluate once: a resumed run knows what was evaluated before."""
        if (when, step) not in self.log.evaluations:
            self.memory.trim()  # its batches have other sizes, and would not fit in the holes of a step's
            with self.memory.short("an evaluation"):
                found = evaluate_model(self.model, self.opened.dataset, self.opened.judge)
            self.memory.trim()
            self.log.write({"step": step, "eval": when, **found})
        return self.log.evaluations[when, step]

    @phase("save")
    def _save(self, step: int) -> None:
        """Make the state after ``step`` steps durable: the journal first, since a snapshot refers to it."""
        self.journal.sync()
        save_snapshot(self.run, self.model, step)

    def _peaks(self) -> dict[str, int | None]:
        """The four figures that a run is judged by."""
        peak_bytes, inference_bytes = peak_rss_bytes(), self.inference_peak_bytes
        if inference_bytes is not None and self.memory.unit == "rss":
            # The kernel counts pages in batches, so that a peak may read lower later on than it did.
            inference_bytes = min(inference_bytes, peak_bytes)
        return {
            "planned_peak_bytes": self.plan.planned_peak_bytes,
            "peak_rss_bytes": peak_bytes,
            f"inference_peak_{self.memory.unit}_bytes": inference_bytes,
            "max_mem_bytes": self.plan.max_mem_bytes,
            **self.memory.figures(),
        }

    def _summary(
        self,
        steps: int,
        train_s: float,
        before: dict[str, Any] | None,
        after: dict[str, Any],
    ) -> dict[str, Any]:
        cfg, probe = self.cfg, self.probe
        memory = self.meter.summary()
        unused = "head" if self.model.readout else "probe"
        return {
            "model": cfg.model,
            "device": cfg.device,
            "estimator": cfg.estimator,
            **{
                name: getattr(cfg, name) if "lora" not in cfg.train else None
                for name in FORWARD_ONLY
            },
            "objective": cfg.objective,
            "trained": "+".join(part for part in cfg.train if part != unused),
            "precision": cfg.precision,
            "steps": steps,
            "batch_size": cfg.batch_size,
            "micro_batch": cfg.micro_batch,
            "loss_first": mean_loss(self._own(self.journal.record(0)).losses) if steps else None,
            "loss_last": mean_loss(self._own(self.journal.record(steps - 1)).losses)
            if steps
            else None,
            "eval_before": before,
            "eval_after": after,
            "train_s": train_s,
            **memory,
            "residency": self.plan.residency,
            **self.log.figures(),
            **({} if probe is None else {"probe": probe.to_dict()}),
            **self._peaks(),
            "trained_sha256": saved_sha256(self.model.saved()),
            "run": str(self.run.path),
        }


def _saved_summary(run: RunFiles) -> dict[str, Any]:
    """summary.json of a run that has ended; {} where there is none that can be read."""
    try:
        found = json.loads(run.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
