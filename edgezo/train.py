"""The loop: batch -> two-sided losses -> credit -> journal -> one mutation of the weights.

    journal first, weights second: a record that is on disk stands for an update that is, or can be, applied.

What has no seed form (the exact head) is snapshotted every ``snapshot_every`` steps. A resume replays the records
up to the last snapshot and recomputes the steps after it, which gives the same bits; without an exact head nothing
needs recomputing.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from edgezo.config import RunConfig
from edgezo.data import Example, batch_indices, collate, micro_batches, tokens_of
from edgezo.errors import BudgetExceeded, EdgezoError, Interrupted
from edgezo.estimators import ESTIMATORS, Estimator, schedule
from edgezo.journal import (
    Journal,
    StepRecord,
    atomic_write,
    check_base,
    create_journal,
    open_journal,
    remove_leftovers,
)
from edgezo.memory import Guard, Meter, allocator_reuse, machine, rss_bytes
from edgezo.model import Model
from edgezo.noise import Key
from edgezo.planner import Plan
from edgezo.report import MetricsLog, RunProgress, Silent, to_json
from edgezo.session import (
    Opened,
    RunFiles,
    data_hash,
    evaluate_model,
    load_model,
    load_snapshot,
    open_request,
    recipe_of,
    replay_into,
    save_snapshot,
    settle,
)
from edgezo.weights import tensors_sha256

GUARD_MARGIN_BYTES = (
    16 << 20
)  # counters lag by up to 128 KiB a core, and the interpreter allocates too
PLAIN_FORWARDS = 8  # plain forwards timed in a run, for summary.json's forward_s


def finetune(
    cfg: RunConfig, *, resume: bool = False, progress: RunProgress | None = None
) -> dict[str, Any]:
    """Run, or go on with, a fine-tune in ``cfg.out``; returns what summary.json holds.

    Raises UsageError, DoesNotFit (before anything is written), BudgetExceeded and Interrupted (state saved),
    BaseMismatch, EdgezoError.
    """
    progress = progress or Silent()
    meter = Meter()
    opened = open_request(cfg)
    for note in opened.dataset.notes:
        progress.note(note)
    host = machine()
    base = meter.mark("base")
    plan = settle(opened, host, base.rss_bytes)
    progress.plan(plan)
    cfg = opened.cfg
    assert cfg.out is not None, "the command line names a run directory"
    run = RunFiles(Path(cfg.out))
    journal = _open_journal(run, opened, plan, resume, progress)
    with journal:
        model = load_model(opened, host)
        allocator_reuse()
        meter.mark("load")
        training = Training(run, cfg, opened, plan, model, journal, meter, progress)
        with _signals(training):
            return training.run_all()


def _open_journal(
    run: RunFiles, opened: Opened, plan: Plan, resume: bool, progress: RunProgress
) -> Journal:
    """The journal to append to. Nothing is on disk before this, and everything before it was checked."""
    cfg = opened.cfg
    base = opened.files.content_hash
    header = {
        "content_hash": base,
        "data_hash": data_hash(opened.dataset.train),
        "dataset": {
            "kind": opened.dataset.kind,
            "label_ids": list(opened.dataset.label_ids),
            "label_names": list(opened.dataset.label_names),
        },
        "config": {
            k: v for k, v in cfg.to_dict().items() if k not in ("out", "max_mem_bytes", "threads")
        },
    }
    if resume:
        journal = open_journal(run.journal, resume=True)
        check_base(journal.header, base)
        if journal.header.get("data_hash") != header["data_hash"]:
            journal.close()
            raise EdgezoError(
                f"{run.path} was trained on other rows than the ones that the data gives now.\n"
                "Restore the data files, or start a new run with another --out."
            )
        if journal.note:
            progress.note(journal.note)
        remove_leftovers(run.path)
    else:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EdgezoError(
                f"the run directory {run.path} cannot be made ({problem.strerror}).\nGive another --out."
            ) from problem
        atomic_write(run.config, cfg.to_toml().encode())
        journal = create_journal(run.journal, header)
    atomic_write(run.plan, to_json(plan.to_dict()).encode())
    return journal


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
    step_times_s: list[float] = field(default_factory=list)
    forward_times_s: list[float] = field(default_factory=list)

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.opened.dataset.train

    @property
    def estimator(self) -> Estimator:
        return ESTIMATORS[self.cfg.estimator]

    @property
    def probing(self) -> bool:
        """The exact head alone needs no probe, one side and no update of the store."""
        return bool(self.model.store.trainables)

    def run_all(self) -> dict[str, Any]:
        cfg, run = self.cfg, self.run
        self.guard = Guard(self.plan.max_mem_bytes, GUARD_MARGIN_BYTES)
        done, planned = self._restore()
        self.metrics = MetricsLog(run.metrics, keep_through=done if done else None)
        self._longest_first()
        before = self._evaluate("before") if done == 0 else _saved_evaluation(run)
        self.progress.begin(done=done, steps=cfg.steps, cap_bytes=self.plan.max_mem_bytes)
        start_s, excluded_s = time.monotonic(), 0.0
        step, first_loss, last_loss = done, None, float("nan")
        try:
            while True:
                elapsed_s = time.monotonic() - start_s - excluded_s
                fraction = step / cfg.steps if cfg.steps else elapsed_s / (cfg.for_s or 1.0)
                if fraction >= 1.0:
                    break
                if self.stop_asked:
                    raise Interrupted(
                        f"stopped after step {step}; everything is saved in {run.path}.\n"
                        f"Go on with: edgezo finetune --resume --out {run.path}"
                    )
                begun_s = time.monotonic()
                step_size = planned.get(step, cfg.step * schedule(cfg.schedule, fraction))
                last_loss = self._step(step, step_size)
                took_s = time.monotonic() - begun_s
                self.step_times_s.append(took_s)
                first_loss = last_loss if first_loss is None else first_loss
                step += 1
                aside_s = time.monotonic()
                if cfg.eval_every and step % cfg.eval_every == 0 and step != cfg.steps:
                    self._evaluate("during", step)
                self._time_plain_forward(step - 1)
                excluded_s += time.monotonic() - aside_s
                self.progress.step(
                    step,
                    fraction=min(1.0, step / cfg.steps if cfg.steps else fraction),
                    loss=last_loss,
                    step_s=took_s,
                    rss_bytes=rss_bytes(),
                )
        except BudgetExceeded as problem:
            self._save(step)
            raise BudgetExceeded(
                f"{problem}\nThe state after step {step} is saved in {run.path}."
            ) from problem
        except Interrupted:
            self._save(step)
            raise
        finally:
            self.progress.close()
        train_s = time.monotonic() - start_s - excluded_s
        self._save(step)
        after = self._evaluate("after", step)
        self.meter.mark("run")
        self.metrics.close()
        summary = self._summary(step, train_s, before, after, first_loss, last_loss)
        atomic_write(run.summary, (to_json(summary) + "\n").encode())
        return summary

    # -- one step -----------------------------------------------------------------------------------------

    def _step(self, step: int, step_size: float) -> float:
        """Probe, record, apply; the step's mean loss. Nothing has changed if it raises before the journal."""
        cfg, model = self.cfg, self.model
        assert cfg.batch_size is not None and cfg.micro_batch is not None
        group = self._group(step)
        sides = 2 if self.probing else 1
        losses = np.full((2, len(group)), np.nan, np.float32)
        learn = 1.0 / (sides * len(group)) if model.exact is not None else 0.0
        try:
            for slots in micro_batches(group, cfg.micro_batch):
                self.guard.check(item="the next micro-batch")
                batch = collate([group[s] for s in slots], slots)
                probe = model.probe(batch, Key(cfg.seed, step), cfg.sigma) if self.probing else None
                found, _ = model.losses(batch, probe, sides=sides, learn=learn)
                losses[:, slots] = found.numpy()
        except BaseException:
            if model.exact is not None:
                model.exact.gradient.zero_()  # half a step's gradient must not leak into a saved state
            raise
        credit = self.estimator.credit(losses) if self.probing else np.zeros(len(group), np.float32)
        skipped = not bool(credit.any())
        record = StepRecord(
            step, cfg.sigma, step_size, skipped, losses, credit, model.take_touched(len(group))
        )
        self.journal.append(record)
        model.store.apply([recipe_of(cfg, record)])
        if model.exact is not None:
            # The head follows the same schedule as the step.
            model.exact.update(cfg.head_lr * step_size / cfg.step)
            if (step + 1) % cfg.snapshot_every == 0:
                self._save(step + 1)
        finite = losses[np.isfinite(losses)]
        mean = float(finite.mean()) if finite.size else float("nan")
        self.metrics.write(
            {
                "step": step + 1,
                "loss": mean,
                "step_size": step_size,
                "delta_std": float(np.nanstd(losses[0] - losses[1])) if finite.size else None,
                "skipped": skipped and self.probing,
                "rss_bytes": rss_bytes(),
            }
        )
        return mean

    def _group(self, step: int) -> list[Example]:
        assert self.cfg.batch_size is not None
        picked = batch_indices(len(self.examples), self.cfg.batch_size, self.cfg.seed, step)
        return [self.examples[i] for i in picked]

    def _time_plain_forward(self, step: int) -> None:
        """Now and then time a plain forward over the 2B rows of the step that has just run."""
        every = max(1, (self.cfg.steps or 100) // PLAIN_FORWARDS)
        if step % every != every // 2:
            return
        group = self._group(step)
        assert self.cfg.micro_batch is not None
        begun_s = time.monotonic()
        for slots in micro_batches(group, self.cfg.micro_batch):
            self.model.losses(collate([group[s] for s in slots], slots), sides=2)
        self.forward_times_s.append(time.monotonic() - begun_s)

    # -- beginning and end --------------------------------------------------------------------------------

    def _restore(self) -> tuple[int, dict[int, float]]:
        """Bring the weights to where the journal stands: (steps done, step sizes of steps to be recomputed)."""
        journal, model = self.journal, self.model
        if not len(journal):
            return 0, {}
        stop = journal.next_step
        planned: dict[int, float] = {}
        if model.exact is not None:
            stop = load_snapshot(self.run, model)
            planned = {r.step: r.step_size for r in journal.records(stop)}
            journal.truncate_to(stop)
        replay_into(model, self.cfg, journal, stop)
        return stop, planned

    def _longest_first(self) -> None:
        """Run the longest possible micro-batch once, changing nothing: what does not fit shows now, not late."""
        assert self.cfg.micro_batch is not None
        longest = sorted(self.examples, key=tokens_of, reverse=True)[: self.cfg.micro_batch]
        need_bytes = self.plan.phase_bytes("forward") - self.plan.phase_bytes("always")
        self.guard.check(need_bytes, "the longest micro-batch")
        batch = collate(longest, range(len(longest)))
        probe = (
            self.model.probe(batch, Key(self.cfg.seed, 0), self.cfg.sigma) if self.probing else None
        )
        self.model.losses(batch, probe, sides=2 if self.probing else 1)
        self.model.take_touched(len(longest))
        self.guard.check(item="training")

    def _evaluate(self, when: str, step: int = 0) -> dict[str, Any]:
        found = evaluate_model(self.model, self.opened.dataset)
        self.metrics.write({"step": step, "eval": when, **found})
        return found

    def _save(self, step: int) -> None:
        """Make the state after ``step`` steps durable: the journal first, since a snapshot refers to it."""
        self.journal.sync()
        save_snapshot(self.run, self.model, step)

    def _summary(
        self,
        steps: int,
        train_s: float,
        before: dict[str, Any] | None,
        after: dict[str, Any],
        first_loss: float | None,
        last_loss: float,
    ) -> dict[str, Any]:
        cfg = self.cfg
        memory = self.meter.summary()
        return {
            "model": cfg.model,
            "estimator": cfg.estimator,
            "directions": cfg.directions,
            "trained": "+".join(cfg.train),
            "precision": cfg.precision,
            "steps": steps,
            "batch_size": cfg.batch_size,
            "micro_batch": cfg.micro_batch,
            "loss_first": first_loss,
            "loss_last": last_loss,
            "eval_before": before,
            "eval_after": after,
            "train_s": train_s,
            "step_s": _median(self.step_times_s),
            "forward_s": _median(self.forward_times_s),
            **memory,
            "planned_peak_bytes": self.plan.planned_peak_bytes,
            "max_mem_bytes": self.plan.max_mem_bytes,
            "trained_sha256": tensors_sha256(self.model.state()),
            "run": str(self.run.path),
        }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _saved_evaluation(run: RunFiles) -> dict[str, Any] | None:
    """The evaluation before the first step, of a run that is resumed."""
    import json

    if not run.metrics.exists():
        return None
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("eval") == "before":
            return {k: entry[k] for k in ("metric", "value", "n", "loss")}
    return None
