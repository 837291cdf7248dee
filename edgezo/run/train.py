"""A run on one page: open, plan, load, fit the linear probe, step until done, evaluate, close.

What comes before the first step is in start.py, the steps themselves are in step.py, smaller micro-batches in
short_memory.py, ``--step auto`` in auto_step.py, the linear probe in readout_pass.py, and what a resume brings back in
restore.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgezo.data.batches import pieces
from edgezo.errors import BudgetExceeded, EdgezoError, Interrupted, NoSignal, UsageError
from edgezo.machine.busy_cores import beside_others
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.limits import PLAIN_FORWARDS
from edgezo.machine.links import directory_of_rank, rank_and_size
from edgezo.machine.process_memory import malloc_trim, rss_bytes
from edgezo.machine.profiler import phase, profiling
from edgezo.plan.config import RunConfig
from edgezo.run.auto_step import AutoStep
from edgezo.run.clock import TimeBox, TrainingClock
from edgezo.run.directory import RunFiles, free_directory, run_id
from edgezo.run.figures import evaluate_rows
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal_record import StepRecord
from edgezo.run.kept_answers import WHEN, keep_answers
from edgezo.run.metrics_log import step_line
from edgezo.run.objective import no_signal
from edgezo.run.parent import Parent
from edgezo.run.places import with_beginning
from edgezo.run.progress import RunProgress, Silent
from edgezo.run.ranks import joined
from edgezo.run.readout_pass import ReadoutPass, recall
from edgezo.run.report import leave_report
from edgezo.run.session import keep_cap
from edgezo.run.short_memory import MicroBatchFitter
from edgezo.run.start import Start, started
from edgezo.run.state import RunState
from edgezo.run.step import Stepper
from edgezo.run.summary import losses_of_step, peaks, summarise
from edgezo.run.training_loop import TrainingLoop
from edgezo.run.watching import watching
from edgezo.zo.axes import ROUNDINGS
from edgezo.zo.credit import schedule

SIGNAL_STEPS = 20  # a score that has told nothing in so many first steps ends the run


def finetune(
    cfg: RunConfig,
    *,
    resume: bool = False,
    progress: RunProgress | None = None,
    began_s: float | None = None,
    parent: Path | None = None,
) -> dict[str, Any]:
    """Run, or go on with, a fine-tune in ``cfg.out``; returns what summary.json holds.

    Without ``out`` a new run goes to runs/MODEL-DATA. A resume without a micro-batch takes the run's, which may have
    become smaller since the run began. ``began_s`` is when the command began (``clock.now_s``): --for then bounds all
    of it, reading, loading and evaluations included; None: --for bounds training alone. ``parent`` is the directory of
    a finished run that a new one goes on from (``request.settings_after`` gives the settings).
    Raises UsageError, DoesNotFit (before anything is written), BudgetExceeded and Interrupted (state saved),
    BaseMismatch, EdgezoError.
    """
    if resume and cfg.out is None:
        raise UsageError("a resume needs the directory of the run to go on with (out)")
    out = directory_of_rank(cfg.out) or free_directory(cfg.model, cfg.task or cfg.data or "data")
    cfg, files = replace(cfg, out=str(out)), RunFiles(Path(out))
    if rank_and_size()[0]:
        cfg = replace(cfg, log_to="none")  # rank 0's tracker has all that there is to log
    if not resume:
        cfg = with_beginning(cfg)
    older = None if parent is None else Parent.of(parent)
    if older is not None:
        cfg = older.followed_by(cfg)
    if resume and cfg.micro_batch is None:
        cfg = replace(cfg, micro_batch=files.read_config().micro_batch)
    with (
        watching(cfg, files, progress or Silent()) as progress,
        profiling(cfg.profile),
        beside_others(),
        joined(cfg) as ranks,
    ):
        box = TimeBox(cfg.for_s, began_s)
        with started(cfg, files, resume, progress, box, older, ranks) as start:
            run = Training(start)
            summary, had_ended = run.to_the_end(), run.ended is not None
            keep_cap(run.state.planned, run.state.memory, f"The run is complete in {files.path}")
        del run, start  # the page about it is made in the memory that the model had
        malloc_trim()
        if not (had_ended and files.report.exists()):
            leave_report(files, progress.note)
        return summary


class Training(TrainingLoop[RunState, Stepper]):
    """One run in progress, from its first step to its summary."""

    def __init__(self, start: Start):
        state = start.state
        super().__init__(state, Stepper(state), start.restored.steps, start.readout)
        self.restored, self.ended = start.restored, start.ended
        self.before, self.split_is_free = start.before, start.split_is_free
        self.fitter = MicroBatchFitter(state, self.stepper)
        self.auto_step = AutoStep(state, self.stepper, self.fitter)
        self.stopped = False  # before its last step, as a callback asked

    def to_the_end(self) -> dict[str, Any]:
        """Everything that is still to be done; returns what summary.json holds."""
        state, model, done = self.state, self.state.model, self.restored.steps
        self._write_lost_lines()
        if not self._any_lacks(self.ended is None):
            assert self.ended is not None
            return self.ended
        state.box.earlier_s = self._seconds_before()
        self._note_changes()
        state.manners.wait(done, state.box.longest_pause_s(state.box.left_s()))
        self.fitter.settle(done, may_grow=self.split_is_free)
        before = state.log.evaluations.get(("before", 0))
        if not done and (not model.readout or state.cfg.parent is not None):
            before = self._evaluate("before")
        if state.cfg.parts.readout and self.readout is None:
            self.readout = self._fit_readout()
        steps, train_s = self._train()
        self._close_weights(steps)
        if steps and state.log.skipped_steps == steps:
            state.progress.note(
                f"warning: all {steps} steps were skipped, because both sides of every perturbation scored the same, "
                "or no loss was finite. A larger --sigma may help, or an objective with finer scores."
            )
        after = self._evaluate("after", steps)
        state.meter.mark("run")
        sides = self.stepper.sides
        summary = summarise(state, sides, steps, train_s, before, after, self.readout)
        if self.stopped:
            summary["stopped"] = f"after step {steps}, as a callback asked"
        atomic_write(state.files.summary, (to_json(summary) + "\n").encode())
        state.progress.finished(summary)
        return summary

    # -- the loop -----------------------------------------------------------------------------------------

    def _train(self) -> tuple[int, float]:
        """Steps until the run is over; (steps, seconds of training, those before a resume included)."""
        state, cfg, step = self.state, self.state.cfg, self.restored.steps
        state.progress.begin(done=step, steps=cfg.steps, cap_bytes=state.plan.max_mem_bytes)
        spent_s = self._seconds_before()
        clock, self.budget_s = TrainingClock(spent_s), spent_s + state.box.left_s(spent_s)
        if state.ranks is not None:
            state.ranks.fraction_now = lambda: self._fraction_of_time(clock.seconds())
            state.ranks.begin(cfg.micro_batch, self.stepper.most_tokens)
        try:
            while not self._is_over(step, clock):
                state.stop.check(step)
                if self._rests(step, clock):
                    continue
                self._do_as_asked(step, clock)
                if state.progress.asks().stop:
                    if state.ranks is None:
                        self.stopped = True
                        break
                    state.stop.asked = (
                        True  # which the other processes hear of with this step's losses
                    )
                state.progress.before_step(step + 1)
                self._one_step(step, clock)
                step += 1
                self._check_signal(step)
            return step, clock.seconds()
        except BudgetExceeded as problem:
            self._save_and_report(step)
            raise BudgetExceeded(
                f"{problem}\nThe state after step {step} is saved in {state.files.path}."
            ) from problem
        except EdgezoError as problem:
            if isinstance(problem, Interrupted | NoSignal) or state.ranks is not None:
                self._save_and_report(step)
            raise
        finally:
            state.progress.close()

    def _check_signal(self, steps: int) -> None:
        """Raise NoSignal, with the cause, where a score has not once told two sides apart in the first steps."""
        judge, log = self.state.judge, self.state.log
        if judge is None or judge.score is None or not self.stepper.perturbs:
            return
        if steps >= SIGNAL_STEPS and log.skipped_steps == steps:
            journal = self.state.journal
            records = [journal.record(step) for step in range(steps - SIGNAL_STEPS, steps)]
            why = no_signal(records, self.state.cfg.objective)
            raise NoSignal(
                f"{why}\nThe state after step {steps} is saved in {self.state.files.path}."
            )

    def _one_step(self, step: int, clock: TrainingClock) -> None:
        """Make a step, and write and show its line."""
        state, cfg = self.state, self.state.cfg
        fraction = self._fraction(step, clock.seconds())
        stride = self.auto_step.stride(step)
        begun_s, moved = now_s(), self._moved_bytes()
        scheduled = cfg.step * stride.factor * schedule(cfg.schedule, min(1.0, fraction))
        step_size = self.restored.step_sizes.get(step, scheduled)
        with state.memory.short("an update"):  # names all allocations that no block inside names
            work = partial(self.stepper.step, step, step_size, stride)
            try:
                record = self.fitter.fitting(step, work)
            except BudgetExceeded:
                if state.ranks is not None:
                    state.ranks.fail(step)
                raise
        step_s = now_s() - begun_s
        line = {**self._line(record), "step_s": step_s, "rss_bytes": rss_bytes()}
        line |= {name: now - moved[name] for name, now in self._moved_bytes().items()}
        if self._times_plain_forward(step):
            with self._pause(clock) as pause:
                self._plain_forward(step)
            line["forward_s"] = pause.seconds
        state.log_line(line)
        state.progress.step(
            step + 1,
            fraction=min(1.0, (step + 1) / cfg.steps if cfg.steps else fraction),
            loss=line["loss"],
            step_s=step_s,
            rss_bytes=state.memory.held_bytes(),
        )

    def _is_over(self, step: int, clock: TrainingClock) -> bool:
        learns = self.stepper.perturbs or bool(self.state.model.learned)
        return not learns or self._fraction(step, clock.seconds()) >= 1.0

    def _fraction(self, step: int, train_s: float) -> float:
        ranks = self.state.ranks
        if ranks is None or self.state.cfg.steps:
            return super()._fraction(step, train_s)
        return ranks.fraction

    def _times_plain_forward(self, step: int) -> bool:
        if self.state.ranks is not None:
            return False  # the others would wait for it
        # With blocks on disk or in RAM only once: there it also applies the pending updates.
        wanted = PLAIN_FORWARDS if self.state.model.store.residency is None else 1
        every = max(1, (self.state.cfg.steps or 100) // wanted)
        return step % every == every // 2

    def _plain_forward(self, step: int) -> None:
        """A plain forward pass over the 2B rows of the batch that has just passed."""
        state = self.state
        group = self.stepper.batch(step)
        for batch in pieces(group, state.cfg.micro_batch, state.model.most_tokens):
            self.stepper.plain_forward(batch)

    def _moved_bytes(self) -> dict[str, int]:
        """Bytes of blocks elsewhere that were read and written so far; nothing where all are in memory."""
        residency = self.state.model.store.residency
        if residency is None:
            return {}
        kind, traffic = residency.medium.kind, residency.medium.traffic
        return {
            f"{kind}_read_bytes": traffic.read_bytes,
            f"{kind}_written_bytes": traffic.written_bytes,
        }

    # -- beside the loop ----------------------------------------------------------------------------------

    def _note_changes(self) -> None:
        """Say what this process does otherwise than the one before it."""
        state, done, before = self.state, self.restored.steps, self.before
        if before is not None and before.micro_batch != state.cfg.micro_batch:
            self.fitter.note_split(done, before.micro_batch, "as asked")
        if done and before is not None and before.device != state.cfg.device:
            state.progress.note(
                f"on {state.cfg.device} after step {done}, before on {before.device}: "
                "updates are equal, losses up to rounding"
            )

    @property
    def _evaluates_when_asked(self) -> bool:
        return self.state.ranks is None  # of one process alone the others know nothing

    def _peaks(self) -> dict[str, Any]:
        return peaks(self.state)

    def _line(self, record: StepRecord) -> dict[str, Any]:
        return step_line(losses_of_step(record, self.stepper.sides), self.stepper.perturbs)

    def _fit_readout(self) -> FittedProbe:
        """The pass over the rows; it counts as training."""
        state, ranks, result = self.state, self.state.ranks, None
        try:
            if ranks is None or not ranks.rank:
                result = ReadoutPass(state, self.stepper, self.fitter).run()
        except (BudgetExceeded, Interrupted):
            self._save_and_report(0)
            raise
        if ranks is not None:
            ranks.share_probe(state.files.probe)
        if result is None:
            hidden, of_run = state.opened.files.shape.hidden, run_id(state.journal.header)
            result = recall(state.files, state.model, hidden, of_run)
        assert result is not None
        return result

    def _evaluate(self, when: str, step: int = 0) -> dict[str, Any]:
        state = self.state
        lacks = (when, step) not in state.log.evaluations
        if self._any_lacks(lacks):
            state.memory.trim()  # its batches have other sizes, and would not fit in the holes of a step's
            with state.memory.short("an evaluation"):
                begun_s = now_s()
                shown = partial(state.progress.evaluated, total=len(state.dataset.validation))
                to_show = (state.model, state.dataset, state.judge, shown)
                evaluated = evaluate_rows(*to_show, divided=state.ranks)
                took_s = now_s() - begun_s
            state.memory.trim()
            if lacks:
                if when in WHEN:
                    keep_answers(state, when, evaluated)
                line = {"step": step, "eval": when, "took_s": took_s, **evaluated.figures}
                state.log_line(line)
        state.box.evaluation_s = state.log.evaluation_s
        return state.log.evaluations[when, step]

    def _any_lacks(self, lacks: bool) -> bool:
        """Whether something is still to be done: here, or at another process that a kill has left with less."""
        ranks = self.state.ranks
        return lacks if ranks is None else ranks.any_lacks(lacks)

    def _close_weights(self, steps: int) -> None:
        """Save, re-quantise what is re-quantised at the end, and write blocks that are elsewhere."""
        state, store = self.state, self.state.model.store
        self.stepper.save(steps)
        if ROUNDINGS[state.cfg.rounding or ""].requantised:
            with phase("update"), state.memory.short("the last re-quantisation"):
                with state.model.heap.updating():
                    store.finish(state.cfg.since_base(steps))
        if store.residency is not None:
            store.residency.flush()
