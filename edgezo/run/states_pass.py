"""The first part of a run with frozen blocks: rows pass them once, and their states at the cut are kept on disk.

Files lie in the cache, named after what they follow from: base, cut, precision and compute dtype. So another run on the
same rows, a resume, a study or a grid finds them there. Rows pass in the same batches whatever is there already, so a
row's states have the same bits wherever and whenever they were computed.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edgezo.data.batches import Batch, Example, Row, permutation, tokens_of
from edgezo.data.batches import collate as packed
from edgezo.data.packed import PackedExamples
from edgezo.errors import EdgezoError
from edgezo.machine.clock import now_s
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.limits import PASS_TOKENS
from edgezo.machine.process_memory import malloc_trim
from edgezo.machine.profiler import phase
from edgezo.run.directory import temporary_overlay
from edgezo.run.progress import RunProgress
from edgezo.run.session import Loaded, Planned, load_model
from edgezo.run.short_memory import guard_of
from edgezo.run.state import StopRequest
from edgezo.run.states_cache import make_room, states_folder
from edgezo.weights.kept_states import FORMS, Form, StatesFile, digest_of
from edgezo.weights.layouts import DENSE_DTYPES

# Stream of the Philox generator for the order in which rows are kept. Its seed is always 0: runs with other seeds train
# on the same rows, and so find their states.
_ORDER = 2**63 + 2


def kept_rows(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """The training rows that are kept: the first ``count`` of ``_order``, as they stand in the data."""
    if count >= len(examples):
        return examples
    return PackedExamples(examples[int(i)] for i in np.sort(_order(examples)[:count]))


def _order(examples: Sequence[Example]) -> np.ndarray:
    """The order in which training rows pass, which no seed changes."""
    return permutation(len(examples), 0, _ORDER)


def with_kept_rows(planned: Planned) -> Planned:
    """The planned run with only the training rows whose states it keeps."""
    dataset, rows = planned.opened.dataset, planned.plan.state_rows or 0
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
        ids, start = batch.ids.numpy(), 0
        for length in batch.lengths:
            row = slice(start, start + length)
            if not self.file.read(digest_of(ids[row]), out[row]):
                raise EdgezoError(
                    f"{self.file.path} lacks the states of a row of {length} tokens.\n"
                    "Go on with --resume, which computes them."
                )
            start += length
        return out


@contextmanager
def states_of_run(
    planned: Planned, progress: RunProgress, stop: StopRequest
) -> Iterator[KeptStates]:
    """The states of all rows of a run; those that are missing are computed first. Files are open until the block ends.

    Raises Interrupted, BudgetExceeded, or EdgezoError where the disk is full, with nothing left of this pass.
    """
    file = StatesFile(
        states_folder() / f"{_identity(planned)[:32]}.states",
        planned.opened.files.shape.hidden,
        _form(planned),
        _identity(planned),
    )
    make_room(file.path)
    try:
        file.open()
        if file.damaged:
            progress.note(f"{file.path.name}: {file.damaged} rows were damaged; they pass again")
        missing = _missing(file, planned)
        if missing:
            _pass(file, planned, missing, progress, stop)
        file.finish()
        yield KeptStates(file, DENSE_DTYPES[planned.plan.compute_dtype])
    finally:
        file.close()


def _form(planned: Planned) -> Form:
    exact = planned.cfg.states == "exact"
    return FORMS[planned.plan.compute_dtype if exact else str(planned.cfg.states)]


def _identity(planned: Planned) -> str:
    """What the states of given tokens follow from, as a digest."""
    plan, files = planned.plan, planned.opened.files
    facts = [files.content_hash, plan.first_trained, plan.precision, plan.compute_dtype]
    facts += [_form(planned).name, PASS_TOKENS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _batches(planned: Planned) -> Iterator[list[Row]]:
    """All rows of a run in the batches in which they pass, those to train on first.

    A batch is what it is however many rows are kept, so the last one may have a few more.
    """
    dataset = planned.opened.dataset
    train, kept = dataset.train, planned.plan.state_rows or 0
    yield from _filled((train[int(i)] for i in _order(train)), min(kept, len(train)))
    yield from _filled(dataset.validation, len(dataset.validation))


def _filled(examples: Iterable[Example], count: int) -> Iterator[list[Row]]:
    """Batches of ``PASS_TOKENS`` tokens, or one example, that hold the first ``count`` examples."""
    batch: list[Row] = []
    tokens = 0
    for number, example in enumerate(examples):
        size = tokens_of(example)
        if batch and tokens + size > PASS_TOKENS:
            yield batch
            batch, tokens = [], 0
            if number >= count:
                return
        batch += example.rows
        tokens += size
    if batch:
        yield batch


def _missing(file: StatesFile, planned: Planned) -> list[int]:
    """Numbers of the batches of which rows are not in the file."""
    return [
        number
        for number, rows in enumerate(_batches(planned))
        if not all(file.holds(digest_of(row.ids)) for row in rows)
    ]


def _pass(
    file: StatesFile,
    planned: Planned,
    missing: list[int],
    progress: RunProgress,
    stop: StopRequest,
) -> None:
    """Let the missing batches pass the frozen blocks, and keep what these put out."""
    cap_bytes, wanted, done = planned.plan.max_mem_bytes, set(missing), 0
    count = planned.plan.first_trained
    progress.note(f"rows pass the first {count} blocks once: {len(missing):,} batches")
    progress.begin(done=0, steps=len(missing), cap_bytes=cap_bytes)
    with _frozen_half(planned) as (model, memory):
        guard = guard_of(planned.plan, memory)
        try:
            for number, rows in enumerate(_batches(planned)):
                if number not in wanted:
                    continue
                stop.check(0)
                guard.check(item="frozen blocks")
                begun_s = now_s()
                with phase("forward"), memory.short("a batch of the pass"):
                    states = model.states_at_cut(_batch_of(rows)).cpu()
                _keep(file, rows, states)
                done += 1
                progress.step(
                    done,
                    fraction=done / len(missing),
                    loss=None,
                    step_s=now_s() - begun_s,
                    rss_bytes=memory.held_bytes(),
                )
        finally:
            progress.close()
    del model  # its memory is free before the other half is loaded
    gc.collect()
    malloc_trim()


def _keep(file: StatesFile, rows: Sequence[Row], states: Tensor) -> None:
    """Add the rows of a batch that the file did not have when the pass began; ``states`` (N, hidden) are of all."""
    parts = states.split([len(row.ids) for row in rows])
    new = [
        (digest, part)
        for digest, part in zip((digest_of(row.ids) for row in rows), parts, strict=True)
        if not file.holds(digest)
    ]
    file.append([digest for digest, _ in new], [part for _, part in new])


@contextmanager
def _frozen_half(planned: Planned) -> Iterator[Loaded]:
    """The frozen blocks in memory, or on disk where the plan has no room for them."""
    with ExitStack() as at_end:
        overlay = None
        if planned.plan.pass_from_disk:
            overlay = at_end.enter_context(temporary_overlay())
        model, memory = load_model(planned, confirmed(machine()), overlay, half="below")
        yield Loaded(at_end.enter_context(closing(model)), memory)


def _batch_of(rows: Sequence[Row]) -> Batch:
    examples = [Example((row,), -1) for row in rows]
    return packed(examples, range(len(examples)))
