"""The first part of a run with frozen blocks: rows pass them once, and their states at the cut are kept on disk.

Files lie in the cache, named after what they follow from: base, cut, precision and compute dtype. So another run on the
same rows, a resume, a study or a grid finds them there. Rows pass in the same batches whatever is there already, so a
row's states have the same bits wherever and whenever they were computed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from edgezo.data.batches import Batch, collate
from edgezo.data.passing import kept_rows, passing_batches
from edgezo.errors import EdgezoError
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_path
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.limits import PASS_SHARE, PASS_TOKENS
from edgezo.machine.process_memory import malloc_trim
from edgezo.machine.profiler import phase
from edgezo.run.directory import RunFiles, run_id
from edgezo.run.journal import Journal
from edgezo.run.manners import Manners
from edgezo.run.progress import RunProgress
from edgezo.run.session import Loaded, Planned, load_model
from edgezo.run.short_memory import guard_of
from edgezo.run.snapshots import temporary_overlay
from edgezo.run.states_cache import make_room, states_folder
from edgezo.run.stopping import StopRequest
from edgezo.weights.kept_states import STATE_FORMS, StateForm, StatesFile, digests_of
from edgezo.weights.layouts import DENSE_DTYPES
from edgezo.weights.saved import write_saved
from edgezo.weights.verified import open_saved

LOST_ROWS = "It says how many rows the run trains on: restore it from a copy, or start again with another --out."


def with_kept_rows(planned: Planned, rows: int) -> Planned:
    """The planned run with only the training rows whose states it keeps."""
    dataset = planned.opened.dataset
    dataset = replace(dataset, train=kept_rows(dataset.train, rows))
    return replace(planned, opened=replace(planned.opened, dataset=dataset))


@dataclass
class KeptStates:
    """States of rows, as a model asks for them (``Model.kept_states``)."""

    file: StatesFile
    dtype: torch.dtype

    def __call__(self, batch: Batch) -> Tensor:
        """States of a batch's tokens, (N, hidden) in the compute dtype."""
        out = torch.empty(len(batch.ids), self.file.hidden, dtype=self.dtype)
        start = 0
        for digest, length in zip(digests_of(batch), batch.lengths, strict=True):
            if not self.file.read(digest, out[start : start + length]):
                raise EdgezoError(
                    f"{self.file.path} lacks the states of a row of {length} tokens.\n"
                    "Go on with --resume, which computes them."
                )
            start += length
        return out


class Report(NamedTuple):
    """Where a pass shows what it does, and what may stop it or let it pause."""

    progress: RunProgress
    stop: StopRequest
    manners: Manners


@contextmanager
def states_of_run(
    planned: Planned, files: RunFiles, journal: Journal, report: Report
) -> Iterator[tuple[KeptStates, Planned]]:
    """The states of a run's rows, those that are missing computed first; and the run with only the training rows kept.

    Files are open until the block ends.
    Raises Interrupted, BudgetExceeded, or EdgezoError where the disk is full, with nothing left of this pass.
    """
    identity, hidden = _identity(planned), planned.opened.files.shape.hidden
    path = states_folder() / f"{identity[:32]}.states"
    file = StatesFile(path, hidden, _form(planned), identity)
    make_room(file.path)
    try:
        file.open()
        if file.damaged:
            report.progress.note(
                f"{file.path.name}: {file.damaged} rows were damaged; they pass again"
            )
        with report.stop.listening():
            rows = _passed_rows(file, planned, files, journal, report)
        file.finish()
        states = KeptStates(file, DENSE_DTYPES[planned.plan.compute_dtype])
        yield states, with_kept_rows(planned, rows)
    finally:
        file.close()


def _passed_rows(
    file: StatesFile, planned: Planned, files: RunFiles, journal: Journal, report: Report
) -> int:
    """Let the rows pass that are missing; returns how many training rows have states.

    A run of a given time keeps that number, since no resume can tell it again.
    """
    wanted, of_run = planned.plan.state_rows or 0, run_id(journal.header)
    if planned.cfg.for_s is None:
        return _pass(file, planned, wanted, math.inf, report)
    if files.kept.exists():
        with open_saved(files.kept, {"rows"}, of_run, LOST_ROWS) as saved:
            saved.read({})
            return _pass(file, planned, int(saved.metadata["rows"]), math.inf, report)
    if len(journal):
        raise EdgezoError(f"{files.path} has no {files.kept.name}.\n{LOST_ROWS}")
    rows = _pass(file, planned, wanted, PASS_SHARE * planned.cfg.for_s, report)
    with atomic_path(files.kept) as temporary:
        write_saved(temporary, [], {"rows": str(rows)}, run=of_run)
    return rows


def _form(planned: Planned) -> StateForm:
    exact = planned.cfg.states == "exact"
    return STATE_FORMS[planned.plan.compute_dtype if exact else str(planned.cfg.states)]


def _identity(planned: Planned) -> str:
    """What the states of given tokens follow from, as a digest."""
    plan, files = planned.plan, planned.opened.files
    facts = [files.content_hash, plan.first_trained, plan.precision, plan.compute_dtype]
    facts += [_form(planned).name, PASS_TOKENS]
    facts += [plan.device] if plan.device != "cpu" else []  # its sums have another order
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _pass(file: StatesFile, planned: Planned, wanted: int, limit_s: float, report: Report) -> int:
    """Let the rows pass that are not in the file, until ``wanted`` training rows are, or ``limit_s`` seconds are over.

    Returns the training rows whose states are kept: those of a batch at least, if there are so many.
    """
    least, rows = min(planned.cfg.batch_size, wanted), 0
    dataset = planned.opened.dataset
    total = len(dataset.validation) + wanted
    batches = passing_batches(dataset.validation, dataset.train, wanted, collate)
    begun_s = now_s()
    with ExitStack() as at_end:
        loaded: Loaded | None = None
        for number, passing in enumerate(batches):
            if now_s() - begun_s > limit_s and rows >= least:
                break
            digests = digests_of(passing.batch)
            if not all(map(file.holds, digests)):
                if loaded is None:
                    loaded = at_end.enter_context(_frozen_half(planned, report))
                share = max(passing.examples / total, (now_s() - begun_s) / limit_s)
                report.stop.check(0)
                report.manners.wait(0, limit_s - (now_s() - begun_s))
                shown = (number + 1, min(1.0, share))
                _pass_batch(file, loaded, passing.batch, digests, report, shown)
            rows = passing.trained
        del loaded
    gc.collect()  # the memory is free before the other half is loaded
    malloc_trim()
    return rows


def _pass_batch(
    file: StatesFile,
    loaded: Loaded,
    batch: Batch,
    digests: Sequence[bytes],
    report: Report,
    shown: tuple[int, float],
) -> None:
    """Let one batch pass and keep its states; ``shown`` are its number and the share of the pass that is then over."""
    begun_s = now_s()
    with phase("forward"), loaded.memory.short("a batch of the pass"):
        states = loaded.model.states_at_cut(batch).cpu()
    rows = zip(digests, states.split(batch.lengths), strict=True)
    new = [(digest, of_row) for digest, of_row in rows if not file.holds(digest)]
    file.append([digest for digest, _ in new], [of_row for _, of_row in new])
    number, fraction = shown
    report.progress.step(
        number,
        fraction=fraction,
        loss=None,
        step_s=now_s() - begun_s,
        rss_bytes=loaded.memory.held_bytes(),
    )


@contextmanager
def _frozen_half(planned: Planned, report: Report) -> Iterator[Loaded]:
    """The frozen blocks in memory, or on disk where the plan has no room for them, while rows pass them."""
    plan = planned.plan
    report.progress.note(f"rows pass the first {plan.first_trained} blocks, once")
    with ExitStack() as at_end:
        overlay = None
        if plan.pass_from_disk and plan.device == "cpu":
            overlay = at_end.enter_context(temporary_overlay())
        model, memory = load_model(planned, confirmed(machine()), overlay, half="below")
        at_end.enter_context(closing(model))
        guard_of(plan, memory).check(item="frozen blocks")
        report.progress.begin(done=0, steps=None, cap_bytes=plan.max_mem_bytes, counted="batch")
        at_end.callback(report.progress.close)
        yield Loaded(model, memory)
