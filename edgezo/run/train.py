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
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edgezo.data.batches import pieces
from edgezo.errors import BudgetExceeded, EdgezoError, Interrupted
from edgezo.machine.files import atomic_write, remove_leftovers, to_json
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Meter, peak_rss_bytes, rss_bytes
from edgezo.machine.profiler import phase, profiling, running
from edgezo.plan.request import RunConfig
from edgezo.run.auto_step import CHECK_EVERY, DIRECTIONS, Pace, Pacer
from edgezo.run.directory import (
    Overlay,
    RunFiles,
    header_of,
    load_snapshot,
    lost_head,
    prepare,
    reopen,
)
from edgezo.run.finetuner import Tuner, load_finetuner
from edgezo.run.journal import StepRecord, create_journal
from edgezo.run.metrics_log import RunLog, mean_loss, step_line
from edgezo.run.progress import RunProgress, Silent, peaks_line
from edgezo.run.readout_pass import Outcome, ProbePass, recall
from edgezo.run.session import (
    evaluate_model,
    follow,
    journal_is_shaped,
    load_model,
    open_request,
    replay_into,
    settle,
    settle_again,
)
from edgezo.run.short_memory import Room
from edgezo.weights.store import saved_sha256
from edgezo.zo.credit import schedule
from edgezo.zo.presets import AUTO

if TYPE_CHECKING:
    pass

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
class Training(Room):
    """One run in progress, from its beginning to its end."""

    stop_asked: bool = False
    resumed: bool = False
    split_is_free: bool = False  # the plan chose the micro-batch, and nothing was computed with it
    probe: Outcome | None = None  # of --train probe, once it is fitted

    def run_all(self) -> dict[str, Any]:
        run = self.run
        self.set_guard()
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
                self.note_split(done, saved.micro_batch, "as asked")
            if done and saved is not None and saved.device != self.cfg.device:
                self.progress.note(
                    f"on {self.cfg.device} after step {done}, before on {saved.device}: "
                    "updates are equal, losses up to rounding"
                )
            self.fitting(done, self.longest_first)
            unshrunk = self.cfg.micro_batch == self.plan.micro_batch
            if self.split_is_free and unshrunk and self.replan():
                self.fitting(done, self.longest_first)
            before = self.log.evaluations.get(("before", 0))
            if not done and not self.model.readout:
                before = self._evaluate("before")
            if "probe" in self.cfg.train and self.probe is None:
                self.probe = self._fit_probe()
            if (finetuner := self.opened.finetuner) is not None:
                self.tuner = Tuner.of(finetuner, self.model.store, self.opened.dataset)
            step, train_s = self._loop(done, planned)
            self.save(step)
            if self.cfg.rounding == "anchored":
                heap = self.model.heap
                with phase("update"), self.memory.short("the last anchor"), heap.updating():
                    self.model.store.finish(step)
            if self.model.store.residency is not None:
                self.model.store.residency.flush()
            if step and self.log.skipped_steps == step:
                self.progress.note(
                    f"warning: all {step} steps were skipped, so probes taught nothing: both sides of every one "
                    "scored the same, or nothing finite. A larger --sigma may help, or an objective with finer scores."
                )
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
        spent_s += sum(pace["took_s"] for pace in self.log.paces.values())
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
                if cfg.step_auto:
                    self._keep_pace(step)
                    begun_s = time.monotonic()
                moved = self._moved()
                step_size = planned.get(
                    step, cfg.step * self.factor * schedule(cfg.schedule, fraction)
                )
                with self.memory.short("an update"):  # or what else nothing smaller stands for
                    record = self.fitting(step, partial(self.step, step, step_size))
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

    def _keep_pace(self, step: int) -> None:
        """Measure sigma and step where it is time to."""
        if self.pace is None and self.log.paces:
            at = max(self.log.paces)
            self.pace = Pace.of(at, self.log.paces[at])
        pacer = Pacer(self)
        if not pacer.due(step):
            return
        first = self.pace is None
        self.pace = self.fitting(step, partial(pacer.measure, step))
        self.log.write({"step": step, "pace": self.pace.to_dict()})
        if self.pace.why:
            self.progress.note(f"warning: no signal for --step auto: {self.pace.why}")
        elif first:
            self.progress.note(
                f"step auto: {self.cfg.step * self.pace.factor:.3g} at sigma {self.pace.sigma:.3g}, from "
                f"{DIRECTIONS} directions in {self.pace.took_s:.0f} s; looked at again every {CHECK_EVERY} steps"
            )

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
        self.save(step)
        self.progress.note(f"peak memory: {peaks_line(self._peaks())}")

    def _fraction(self, step: int, train_s: float) -> float:
        """How much of the run is over, by steps or by time."""
        return step / self.cfg.steps if self.cfg.steps else train_s / (self.cfg.for_s or 1.0)

    def _time_plain_forward(self, step: int) -> float | None:
        """Now and then the seconds of a plain forward over the 2B rows of the batch that has just passed."""
        # With weights on disk only once: a plain forward there does the next step's updates and writes.
        wanted = PLAIN_FORWARDS if self.model.store.residency is None else 1
        every = max(1, (self.cfg.steps or 100) // wanted)
        if step % every != every // 2:
            return None
        group = self.batch(step)
        assert self.cfg.micro_batch is not None
        begun_s = time.monotonic()
        for batch in pieces(group, self.cfg.micro_batch, self.model.most_tokens):
            self.plain_forward(batch)
        return time.monotonic() - begun_s

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

    def _evaluate(self, when: str, step: int = 0) -> dict[str, Any]:
        """Evaluate once: a resumed run knows what was evaluated before."""
        if (when, step) not in self.log.evaluations:
            self.memory.trim()  # its batches have other sizes, and would not fit in the holes of a step's
            with self.memory.short("an evaluation"):
                found = evaluate_model(self.model, self.opened.dataset, self.opened.judge)
            self.memory.trim()
            self.log.write({"step": step, "eval": when, **found})
        return self.log.evaluations[when, step]

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
