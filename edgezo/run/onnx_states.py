"""The pass of frozen blocks on the ONNX engine: rows go once through them, and their states are kept on disk.

As states_pass.py, with the same files in the cache. The graphs below the cut are loaded one by one for each batch and
released, so that the pass takes the memory of one block.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from edgezo.data.batches import PackedRows, packed_rows
from edgezo.data.passing import kept_rows, passing_batches
from edgezo.errors import EdgezoError
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_path
from edgezo.machine.limits import PASS_SHARE, PASS_TOKENS
from edgezo.machine.process_memory import malloc_trim, rss_bytes
from edgezo.network.onnx_engine import OnnxModel
from edgezo.run.directory import RunFiles, run_id
from edgezo.run.journal import Journal
from edgezo.run.onnx_session import OnnxPlanned
from edgezo.run.progress import RunProgress
from edgezo.run.states_cache import make_room, states_folder
from edgezo.run.stopping import StopRequest
from edgezo.weights.plain_saved import read_arrays, write_arrays
from edgezo.weights.plain_states import (
    PLAIN_STATE_FORMS,
    PlainStateForm,
    PlainStatesFile,
    row_digests,
)

_LOST_ROWS = "It says how many rows the run trains on: restore it from a copy, or start again with another --out."


@dataclass
class PlainKeptStates:
    """States of rows, as a model asks for them (``OnnxModel.kept_states``)."""

    file: PlainStatesFile
    form: PlainStateForm

    def __call__(self, batch: PackedRows) -> np.ndarray:
        """States of a batch's tokens, (n, hidden) fp32."""
        out, start = np.empty((len(batch.ids), self.file.hidden), np.float32), 0
        for digest, length in zip(row_digests(batch), batch.lengths, strict=True):
            raw = self.file.read_raw(digest, length)
            if raw is None:
                raise EdgezoError(
                    f"{self.file.path} lacks the states of a row of {length} tokens.\n"
                    "Go on with --resume, which computes them."
                )
            out[start : start + length] = self.form.unpack(raw, length, self.file.hidden)
            start += length
        return out


@contextmanager
def states_on_onnx(
    planned: OnnxPlanned,
    model: OnnxModel,
    files: RunFiles,
    journal: Journal,
    progress: RunProgress,
    stop: StopRequest,
) -> Iterator[tuple[PlainKeptStates, OnnxPlanned]]:
    """The states of a run's rows, those that are missing computed first; and the run with only the rows kept.

    The file is open until the block ends. Raises Interrupted, or EdgezoError where the disk is full.
    """
    cfg, manifest = planned.cfg, planned.opened.manifest
    form = PLAIN_STATE_FORMS["fp32" if cfg.states == "exact" else str(cfg.states)]
    facts = [manifest.base_sha256, planned.plan.first_trained, manifest.precision, form.name]
    identity = hashlib.sha256(json.dumps([*facts, "onnx", PASS_TOKENS]).encode()).hexdigest()
    path = states_folder() / f"{identity[:32]}.states"
    file = PlainStatesFile(path, manifest.shape.hidden, form, identity)
    make_room(path)
    try:
        file.open()
        if file.damaged:
            progress.note(f"{path.name}: {file.damaged} rows were damaged; they pass again")
        with stop.listening():
            run_pass = _Pass(file, planned, model, progress, stop)
            rows = run_pass.rows_of_run(files, journal)
        file.finish()
        yield PlainKeptStates(file, form), _with_rows(planned, rows)
    finally:
        file.close()


def _with_rows(planned: OnnxPlanned, rows: int) -> OnnxPlanned:
    """The planned run with only the training rows whose states it keeps."""
    dataset = planned.opened.dataset
    dataset = replace(dataset, train=kept_rows(dataset.train, rows))
    return replace(planned, opened=replace(planned.opened, dataset=dataset))


@dataclass
class _Pass:
    """The pass of one run."""

    file: PlainStatesFile
    planned: OnnxPlanned
    model: OnnxModel
    progress: RunProgress
    stop: StopRequest

    def rows_of_run(self, files: RunFiles, journal: Journal) -> int:
        """Let the rows pass that are missing; returns how many training rows have states.

        A run of a given time keeps that number, since no resume can tell it again.
        """
        cfg, of_run = self.planned.cfg, run_id(journal.header)
        wanted = self._wanted()
        if cfg.for_s is None:
            return self._pass(wanted, math.inf)
        if files.kept.exists():
            metadata, _ = read_arrays(files.kept, {"rows"}, of_run, _LOST_ROWS)
            return self._pass(int(metadata["rows"]), math.inf)
        if len(journal):
            raise EdgezoError(f"{files.path} has no {files.kept.name}.\n{_LOST_ROWS}")
        rows = self._pass(wanted, PASS_SHARE * cfg.for_s)
        with atomic_path(files.kept) as temporary:
            write_arrays(temporary, {}, {"rows": str(rows)}, of_run)
        return rows

    def _wanted(self) -> int:
        """Training rows whose states are kept, unless time ends the pass before."""
        cfg, count = self.planned.cfg, len(self.planned.opened.dataset.train)
        asked = cfg.state_rows or (cfg.steps * cfg.batch_size if cfg.steps else count)
        return min(count, asked)

    def _pass(self, wanted: int, limit_s: float) -> int:
        dataset = self.planned.opened.dataset
        least, rows = min(self.planned.cfg.batch_size, wanted), 0
        total = len(dataset.validation) + wanted
        batches = passing_batches(dataset.validation, dataset.train, wanted, packed_rows)
        begun_s, first = now_s(), self.planned.plan.first_trained
        shown = False
        for number, (batch, passed, trained) in enumerate(batches):
            if now_s() - begun_s > limit_s and rows >= least:
                break
            digests = row_digests(batch)
            if not all(map(self.file.holds, digests)):
                if not shown:
                    self.progress.note(f"rows pass the first {first} blocks, once")
                    cap_bytes = self.planned.plan.max_mem_bytes
                    self.progress.begin(done=0, steps=None, cap_bytes=cap_bytes, counted="batch")
                    shown = True
                self.stop.check(0)
                before_s = now_s()
                self._keep(batch, digests)
                share = max(passed / total, (now_s() - begun_s) / limit_s)
                self.progress.step(
                    number + 1,
                    fraction=min(1.0, share),
                    loss=None,
                    step_s=now_s() - before_s,
                    rss_bytes=rss_bytes(),
                )
            rows = trained
        if shown:
            self.progress.close()
            malloc_trim()
        return rows

    def _keep(self, batch: PackedRows, digests: Sequence[bytes]) -> None:
        """Let one batch pass, and keep its states."""
        states = self.model.below(batch, keep=False)
        ends = np.cumsum(batch.lengths)[:-1]
        rows = zip(digests, np.split(states, ends), strict=True)
        new = [(digest, of_row) for digest, of_row in rows if not self.file.holds(digest)]
        self.file.append([digest for digest, _ in new], [of_row for _, of_row in new])
