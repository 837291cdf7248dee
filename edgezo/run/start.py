"""Before the first step: a request is opened and planned, its model loaded, its journal opened and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.links import rank_and_size
from edgezo.machine.process_memory import Meter
from edgezo.machine.profiler import phase
from edgezo.network.cut import Half
from edgezo.plan.config import RunConfig
from edgezo.plan.doubtful import doubts
from edgezo.run.claims import prepare
from edgezo.run.clock import TimeBox
from edgezo.run.directory import RunFiles, refuse_links, reopen, run_id, save_skipped
from edgezo.run.few_rows import settled_in_time
from edgezo.run.finetuner import load_finetuner
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal import create_journal
from edgezo.run.manners import Manners
from edgezo.run.metrics_log import RunLog, check_lines
from edgezo.run.opening import Opening
from edgezo.run.parent import Parent, attach_parents
from edgezo.run.progress import RunProgress
from edgezo.run.ranks import Ranks, without_head
from edgezo.run.recipes import follow
from edgezo.run.record_recipe import journal_is_shaped
from edgezo.run.restore import (
    Restored,
    begin_weights,
    begin_writing,
    ended_before,
    restore_readout,
    restore_weights,
)
from edgezo.run.session import (
    Loaded,
    Planned,
    header_of,
    load_model,
    open_request,
    plan_file,
    settle,
    settle_again,
)
from edgezo.run.short_memory import guard_of
from edgezo.run.snapshots import Overlay
from edgezo.run.state import RunState
from edgezo.run.states_pass import Report, states_of_run
from edgezo.run.stopping import StopRequest
from edgezo.run.summary import save_profile


class Start(NamedTuple):
    """A run that is ready for its steps."""

    state: RunState
    restored: Restored
    readout: FittedProbe | None
    before: RunConfig | None  # the configuration that a resume found in the run directory
    split_is_free: (
        bool  # the plan chose the micro-batch, so it may still grow before the first step
    )
    ended: dict[str, Any] | None  # the summary of a run that was over before


@contextmanager
def started(
    cfg: RunConfig,
    files: RunFiles,
    resume: bool,
    progress: RunProgress,
    box: TimeBox,
    parent: Parent | None,
    ranks: Ranks | None,
) -> Iterator[Start]:
    """A run with its plan made, its journal open and its weights where the journal ends; closed after the block."""
    refuse_links(files)
    meter, split_is_free = Meter(), cfg.micro_batch is None
    stop = StopRequest(files)
    manners = Manners(cfg, progress.note, stop.check)
    manners.check_machine(resume)
    if ranks is not None:
        cfg = without_head(cfg, progress.note)
    planned = _plan(cfg, resume, meter, progress, parent)
    if ranks is not None:
        planned, split_is_free = ranks.divide(planned, cfg.micro_batch), False
    cfg, header = planned.cfg, header_of(planned.opened, planned.cfg)
    with ExitStack() as at_end:
        journal = at_end.enter_context(reopen(files, header)) if resume else None
        if journal is not None:
            check_lines(files.metrics, run_id(journal.header))
        else:
            prepare(files)
            if parent is not None:
                parent.copy_to(files)
            save_skipped(files, planned.opened.dataset)
            atomic_write(files.config, cfg.to_toml().encode())
            atomic_write(files.plan, to_json(plan_file(planned)).encode())
        if ranks is not None:
            ranks.check_alike(header)
            header = ranks.standing(journal, header)
        at_end.callback(save_profile, files, progress.note)
        begins = journal is None and ranks is None
        kind = {"shaped": journal_is_shaped(cfg), "scaled": cfg.finetuner is not None}
        states = None
        if planned.cfg.keeps_states:
            if journal is None:  # before the pass, so that a resume goes on with it
                journal = at_end.enter_context(create_journal(files.journal, header, **kind))
            passed = states_of_run(planned, files, journal, Report(progress, stop, manners))
            states, planned = at_end.enter_context(passed)
        model, memory = _load(planned, Overlay.of(files, header), resume)
        model.kept_states = states
        at_end.callback(model.close)
        if journal is None:  # last, so that a model that cannot be loaded leaves no run behind
            journal = at_end.enter_context(create_journal(files.journal, header, **kind))
        meter.mark("load")
        memory.loaded()
        at_end.enter_context(stop.listening())
        if ranks is not None:
            ranks.join(model, journal, files.probe)
            stop.agreed = ranks.has_to_stop
        attach_parents(journal, files)
        follow(model, cfg, journal, progress.note)
        readout = restore_readout(files, cfg, model, journal, planned.opened.files.shape.hidden)
        bring = begin_weights if begins else restore_weights
        restored = bring(files, cfg, model, journal)
        before = files.read_config() if files.config.exists() else None
        ended = ended_before(files, cfg, model, restored, readout)
        # Nothing refuses a resume from here on, so that a refusal has changed nothing.
        begin_writing(files, journal, restored, progress.note)
        if resume and ended is None:
            atomic_write(files.plan, to_json(plan_file(planned)).encode())
        if before != cfg:
            atomic_write(files.config, cfg.to_toml().encode())
        kept = restored.steps if resume else None
        log = RunLog(files.metrics, keep_through=kept, of_run=run_id(journal.header))
        at_end.enter_context(closing(log))
        guard = guard_of(planned.plan, memory)
        at = (files, planned, model, journal, log, meter, progress, stop, manners, box)
        state = RunState(*at, memory=memory, guard=guard, ranks=ranks)
        yield Start(state, restored, readout, before, split_is_free, ended)


def _plan(
    cfg: RunConfig, resume: bool, meter: Meter, progress: RunProgress, parent: Parent | None
) -> Planned:
    """Open the files and rows of a request, and plan it for this machine."""
    with phase("import"):
        opened = open_request(cfg)
    if parent is not None:
        parent.check(opened.files, opened.dataset)
    if cfg.finetuner is not None:
        opened = replace(opened, finetuner=load_finetuner(Path(cfg.finetuner)))
    for note in opened.dataset.notes:
        progress.note(note)
    computer = confirmed(machine())
    for text in doubts(opened.cfg, computer.cores, opened.files.shape.max_positions):
        progress.note(text)
    base = meter.mark("base")
    if resume:
        planned = settle_again(opened, computer, base.rss_bytes)
    elif rank_and_size()[1] > 1:  # each process would evaluate on other rows
        planned = settle(opened, computer, base.rss_bytes)
    else:
        planned = settled_in_time(opened, lambda one: settle(one, computer, base.rss_bytes))
    progress.opening(opening_of(planned))
    return planned


def opening_of(planned: Planned) -> Opening:
    """A run before its first step, as it is shown."""
    cfg, dataset = planned.cfg, planned.opened.dataset
    rows = (len(dataset.train), len(dataset.validation))
    about = (str(cfg.task or cfg.data), dataset.kind, dataset.label_names)
    return Opening(planned.plan, cfg, *about, *rows)


def _load(planned: Planned, overlay: Overlay, resume: bool) -> Loaded:
    """The model in memory. A resume uses the overlay of an earlier process; a new run removes it."""
    if not resume or not planned.plan.blocks_on_disk:
        overlay.remove()
    try:
        half: Half = "above" if planned.cfg.keeps_states else "whole"
        return load_model(planned, confirmed(machine()), overlay, half)
    except BaseException:
        if not resume:
            overlay.remove()
        raise
