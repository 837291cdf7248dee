"""A run on the ONNX engine on one page: open, plan, load, fit the linear probe, step until done, evaluate. As train.py.

The process needs neither torch nor transformers. Settings, rows, directions, credit, journal, metrics, guard, summary
and exit codes are those of every run; what the engine has no place for is refused before (plan/engines.py).
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgezo.errors import BudgetExceeded, Interrupted, UsageError
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.hardware import machine
from edgezo.machine.limits import PLAIN_FORWARDS
from edgezo.machine.process_memory import (
    MAPPED_BYTES,
    Meter,
    allocator_reuse,
    check_cap_kept,
    malloc_trim,
    peak_rss_bytes,
    rss_bytes,
)
from edgezo.plan.config import RunConfig
from edgezo.plan.doubtful import doubts
from edgezo.run.claims import prepare
from edgezo.run.clock import TimeBox, TrainingClock
from edgezo.run.directory import (
    RunFiles,
    free_directory,
    refuse_links,
    reopen,
    run_header,
    run_id,
    save_skipped,
)
from edgezo.run.few_rows import settled_in_time
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal import create_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.kept_answers import WHEN, keep_answers
from edgezo.run.manners import Manners
from edgezo.run.metrics_log import RunLog, check_lines, step_line
from edgezo.run.onnx_figures import evaluate_on_onnx
from edgezo.run.onnx_probe import PlainReadoutPass
from edgezo.run.onnx_session import OnnxPlanned, load_onnx, open_onnx, settle_onnx
from edgezo.run.onnx_state import (
    OnnxRunState,
    begin_files,
    bring_back,
    recall_probe,
    trained_sha256,
)
from edgezo.run.onnx_states import states_on_onnx
from edgezo.run.onnx_step import OnnxStepper
from edgezo.run.opening import Opening
from edgezo.run.places import with_beginning
from edgezo.run.progress import RunProgress, Silent
from edgezo.run.record_recipe import journal_is_shaped
from edgezo.run.report import leave_report
from edgezo.run.stopping import StopRequest
from edgezo.run.summary_file import run_figures
from edgezo.run.training_loop import TrainingLoop
from edgezo.zo.credit import schedule


def finetune_onnx(
    cfg: RunConfig,
    *,
    resume: bool = False,
    progress: RunProgress | None = None,
    began_s: float | None = None,
) -> dict[str, Any]:
    """Run, or go on with, a fine-tune in ``cfg.out`` on this engine; returns what summary.json holds.

    Arguments and errors are those of ``train.finetune``.
    """
    if resume and cfg.out is None:
        raise UsageError("a resume needs the directory of the run to go on with (out)")
    out = cfg.out or free_directory(cfg.model, cfg.task or cfg.data or "data")
    cfg, files = replace(cfg, out=str(out)), RunFiles(Path(out))
    if not resume:
        cfg = with_beginning(cfg)
    if resume and cfg.micro_batch is None:
        cfg = replace(cfg, micro_batch=files.read_config().micro_batch)
    with ExitStack() as at_end:
        run = _started(cfg, files, resume, progress or Silent(), began_s, at_end)
        summary = run.to_the_end()
        before_bytes = run.state.opened.peak_before_bytes
        cap_bytes = run.state.plan.max_mem_bytes
    done = f"The run is complete in {files.path}"
    check_cap_kept(cap_bytes, peak_rss_bytes(), before_bytes, done)
    del run  # the page about it is made in the memory that the model had
    malloc_trim()
    leave_report(files, (progress or Silent()).note)
    return summary


def _started(
    cfg: RunConfig,
    files: RunFiles,
    resume: bool,
    progress: RunProgress,
    began_s: float | None,
    at_end: ExitStack,
) -> OnnxTraining:
    """A run with its plan made, its journal open and what it trains where the journal ends."""
    refuse_links(files)
    meter, stop = Meter(), StopRequest(files)
    manners = Manners(cfg, progress.note, stop.check)
    manners.check_machine(resume)
    planned = _planned(cfg, resume, meter, progress)
    cfg = planned.cfg
    header = run_header(planned.opened.manifest.base_sha256, planned.opened.dataset, cfg)
    journal = at_end.enter_context(reopen(files, header)) if resume else None
    if journal is not None:
        check_lines(files.metrics, run_id(journal.header))
    else:
        prepare(files)
        save_skipped(files, planned.opened.dataset)
        atomic_write(files.config, cfg.to_toml().encode())
        atomic_write(files.plan, to_json(_plan_file(planned)).encode())
    model = load_onnx(planned)
    at_end.callback(model.sessions.drop)
    allocator_reuse(MAPPED_BYTES)
    if journal is None:
        journal = create_journal(files.journal, header, shaped=journal_is_shaped(cfg))
        at_end.enter_context(journal)
    if cfg.keeps_states:
        passed = states_on_onnx(planned, model, files, journal, progress, stop)
        model.kept_states, planned = at_end.enter_context(passed)
    meter.mark("load")
    at_end.enter_context(stop.listening())
    steps = bring_back(files, cfg, model, journal)
    step_sizes = journal.step_sizes_from(steps)
    begin_files(files, journal, steps, progress)
    if resume:
        atomic_write(files.plan, to_json(_plan_file(planned)).encode())
        atomic_write(files.config, cfg.to_toml().encode())
    log = RunLog(files.metrics, keep_through=steps if resume else None, of_run=run_id(header))
    at_end.enter_context(closing(log))
    box = TimeBox(cfg.for_s, began_s)
    state = OnnxRunState(files, planned, model, journal, log, meter, progress, stop, manners, box)
    probe = recall_probe(files, model, run_id(header)) if cfg.parts.readout else None
    return OnnxTraining(state, steps, step_sizes, probe)


def _planned(cfg: RunConfig, resume: bool, meter: Meter, progress: RunProgress) -> OnnxPlanned:
    """Open the graphs and rows of a request, and plan it for this machine."""
    opened = open_onnx(cfg)
    for note in opened.dataset.notes:
        progress.note(note)
    computer = machine()
    for text in doubts(opened.cfg, computer.cores, opened.manifest.shape.max_positions):
        progress.note(text)
    base = meter.mark("base")
    if resume:
        planned = settle_onnx(opened, computer, base.rss_bytes)
    else:
        planned = settled_in_time(opened, lambda one: settle_onnx(one, computer, base.rss_bytes))
    dataset, settled = planned.opened.dataset, planned.cfg
    rows = (len(dataset.train), len(dataset.validation))
    about = (str(settled.task or settled.data), dataset.kind, dataset.label_names)
    progress.opening(Opening(planned.plan, settled, *about, *rows))
    return planned


def _plan_file(planned: OnnxPlanned) -> dict[str, Any]:
    """The content of plan.json."""
    opened, dataset, cfg = planned.opened, planned.opened.dataset, planned.cfg
    base = {"name": opened.manifest.base, "sha256": opened.manifest.base_sha256}
    data = {
        "name": Path(str(cfg.task or cfg.data)).name,
        "trained": len(dataset.train),
        "evaluated": len(dataset.validation),
    }
    return {**planned.plan.to_dict(), "sources": {"base": base, "data": data}}


class OnnxTraining(TrainingLoop[OnnxRunState, OnnxStepper]):
    """One run in progress, from its first step to its summary."""

    def __init__(
        self,
        state: OnnxRunState,
        steps: int,
        step_sizes: dict[int, float],
        probe: FittedProbe | None,
    ):
        super().__init__(state, OnnxStepper(state), steps, probe)
        self.step_sizes = step_sizes

    def to_the_end(self) -> dict[str, Any]:
        """Everything that is still to be done; returns what summary.json holds."""
        state, done = self.state, self.done
        self._write_lost_lines()
        state.box.earlier_s = self._seconds_before()
        state.manners.wait(done, state.box.longest_pause_s(state.box.left_s()))
        self.stepper.fitting(done, self.stepper.longest_first)
        before = state.log.evaluations.get(("before", 0))
        if not done and not state.model.readout:
            before = self._evaluate("before")
        if state.cfg.parts.readout and self.readout is None:
            try:
                self.readout = PlainReadoutPass(state, self.stepper).run()
            except (BudgetExceeded, Interrupted):
                self._save_and_report(0)
                raise
        steps, train_s = self._train()
        self.stepper.save(steps)
        after = self._evaluate("after", steps)
        state.meter.mark("run")
        summary = {
            **run_figures(state, steps, train_s, (before, after), self.readout),
            **self._peaks(),
            "trained_sha256": trained_sha256(state.model),
            "run": str(state.files.path),
        }
        atomic_write(state.files.summary, (to_json(summary) + "\n").encode())
        state.progress.finished(summary)
        return summary

    # -- the loop -----------------------------------------------------------------------------------------

    def _train(self) -> tuple[int, float]:
        """Steps until the run is over; (steps, seconds of training, those before a resume included)."""
        state, cfg, step = self.state, self.state.cfg, self.done
        state.progress.begin(done=step, steps=cfg.steps, cap_bytes=state.plan.max_mem_bytes)
        spent_s = self._seconds_before()
        clock, self.budget_s = TrainingClock(spent_s), spent_s + state.box.left_s(spent_s)
        try:
            while self.stepper.learns and self._fraction(step, clock.seconds()) < 1.0:
                state.stop.check(step)
                if self._rests(step, clock):
                    continue
                self._do_as_asked(step, clock)
                state.progress.before_step(step + 1)
                self._one_step(step, clock)
                step += 1
            return step, clock.seconds()
        except BudgetExceeded as problem:
            self._save_and_report(step)
            raise BudgetExceeded(
                f"{problem}\nThe state after step {step} is saved in {state.files.path}."
            ) from problem
        except Interrupted:
            self._save_and_report(step)
            raise
        finally:
            state.progress.close()

    def _one_step(self, step: int, clock: TrainingClock) -> None:
        """Make a step, and write and show its line."""
        state, cfg = self.state, self.state.cfg
        fraction = self._fraction(step, clock.seconds())
        scheduled = cfg.step * schedule(cfg.schedule, min(1.0, fraction))
        step_size = self.step_sizes.get(step, scheduled)
        begun_s = now_s()
        record = self.stepper.fitting(step, partial(self.stepper.step, step, step_size))
        line = {
            **self._line(record),
            "step_s": now_s() - begun_s,
            "rss_bytes": rss_bytes(),
        }
        every = max(1, (cfg.steps or 100) // PLAIN_FORWARDS)
        if step % every == every // 2:
            with self._pause(clock) as pause:
                self.stepper.plain_forward(self.stepper.batch(step))
            line["forward_s"] = pause.seconds
        state.log_line(line)
        state.progress.step(
            step + 1,
            fraction=min(1.0, (step + 1) / cfg.steps if cfg.steps else fraction),
            loss=line["loss"],
            step_s=line["step_s"],
            rss_bytes=line["rss_bytes"],
        )

    # -- beside the loop ----------------------------------------------------------------------------------

    def _line(self, record: StepRecord) -> dict[str, Any]:
        return step_line(record, self.stepper.perturbs)

    def _evaluate(self, when: str, step: int = 0) -> dict[str, Any]:
        state = self.state
        if (when, step) not in state.log.evaluations:
            malloc_trim()
            begun_s = now_s()
            shown = partial(state.progress.evaluated, total=len(state.dataset.validation))
            evaluated = evaluate_on_onnx(state.model, state.dataset, shown)
            took_s = now_s() - begun_s
            malloc_trim()
            if when in WHEN:
                keep_answers(state, when, evaluated)
            line = {"step": step, "eval": when, "took_s": took_s, **evaluated.figures}
            state.log_line(line)
        state.box.evaluation_s = state.log.evaluation_s
        return state.log.evaluations[when, step]

    def _peaks(self) -> dict[str, Any]:
        state, peak_bytes = self.state, peak_rss_bytes()
        inference_bytes = state.inference_peak_bytes
        return {
            "planned_peak_bytes": state.plan.planned_peak_bytes,
            "peak_rss_bytes": peak_bytes,
            "inference_peak_rss_bytes": inference_bytes and min(inference_bytes, peak_bytes),
            "max_mem_bytes": state.plan.max_mem_bytes,
        }
