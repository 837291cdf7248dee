"""A device of a fleet: a base model, rows that never leave it, and a copy of the fleet's journal.

``Device.answer(order) -> report``: takes the records of an order in, and gives the losses of a slice. The device's
directory is that of a run, so everything that reads a run reads it: replay, chat, export. Nothing of the model is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgezo.data.batches import collate, micro_batches
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_write, remove_leftovers, to_json
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Meter
from edgezo.plan.config import BEFORE, RunConfig
from edgezo.plan.request import make_config
from edgezo.run.claims import prepare
from edgezo.run.clock import TimeBox
from edgezo.run.directory import RunFiles, run_id
from edgezo.run.fleet_messages import NOTHING, DeviceReport, Order, Tally, read_order
from edgezo.run.fleet_settings import (
    check_divisible,
    differing,
    free_settings,
    identity,
    settings_alike,
)
from edgezo.run.journal import Journal, open_journal
from edgezo.run.journal_header import check_base
from edgezo.run.manners import Manners
from edgezo.run.metrics_log import RunLog, step_line
from edgezo.run.progress import Silent
from edgezo.run.ranks import what_is_not_sent
from edgezo.run.recipes import follow, recipe_of, replay_into
from edgezo.run.session import (
    Planned,
    header_of,
    load_model,
    open_request,
    plan_file,
    settle,
)
from edgezo.run.short_memory import guard_of
from edgezo.run.snapshots import Overlay
from edgezo.run.state import RunState
from edgezo.run.step import Stepper
from edgezo.run.stopping import StopRequest
from edgezo.run.summary import losses_of_step
from edgezo.weights.saved import saved_sha256
from edgezo.weights.store import RECIPES_AT_ONCE
from edgezo.zo.noise import Key


class Device:
    """One device. Its model is loaded when a first order brings the fleet's settings, and stays in memory."""

    def __init__(self, settings: Mapping[str, Any], name: str, note: Callable[[str], None] = print):
        """``settings`` by field: ``out``, the directory, ``data``, and what else the device has otherwise."""
        self.settings, self.name, self.note = dict(settings), name, note
        if not self.settings.get("out"):
            raise UsageError("a device needs out, a directory for its copy of the fleet's journal")
        self.files = RunFiles(Path(str(self.settings["out"])))
        self._open = ExitStack()
        self._tally = Tally()
        self._state: RunState | None = None
        self._introduction: dict[str, Any] = {}

    def close(self) -> None:
        """Close the journal, and free the model."""
        self._open.close()
        self._state = None

    def answer(self, data: bytes) -> bytes:
        """The report to an order, as bytes. What cannot be done is in its text: nothing is raised for any bytes."""
        try:
            return self._report(read_order(data)).encoded()
        except (EdgezoError, ValueError) as problem:
            self.note(f"{self.name}: {problem}")
            text = {"name": self.name, "problem": str(problem)}
            state = self._state
            steps = len(self._tally)
            run = 0 if state is None else state.journal.run
            return DeviceReport(run, steps, self._tally.after(steps), 0, NOTHING, text).encoded()

    def losses(self, step: int, slots: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Losses (S, n) fp32 of rows in these slots of a step's group. Raises ValueError, EdgezoError."""
        state = self._state
        assert state is not None
        if step != state.journal.next_step:
            raise ValueError(f"losses of step {step}, after step {state.journal.next_step}")
        if len({*slots}) != len(slots) or max(slots) >= state.cfg.batch_size:
            raise ValueError("its slots are twice there, or beyond the group")
        if max(rows) >= len(state.examples):
            raise ValueError(f"row {max(rows)} of a device that has {len(state.examples)}")
        stepper, cfg = Stepper(state), state.cfg
        group = [state.examples[row] for row in rows]
        key = Key(cfg.seed, cfg.since_base(step))
        losses = np.full((stepper.sides, len(group)), np.nan, np.float32)
        for part in micro_batches(group, cfg.micro_batch, stepper.most_tokens):
            stepper.check_room("the next micro-batch")
            with state.memory.short("a micro-batch"):
                examples = [group[at] for at in part]
                batch = collate(examples, [slots[at] for at in part])
                losses[:, part] = stepper.losses(batch, examples, key, cfg.sigma).numpy()
        return losses

    def trained_sha256(self) -> str:
        """SHA-256 (hex) of all that is trained, as in the summary of a run."""
        assert self._state is not None
        return saved_sha256(self._state.model.saved())

    # -- orders -------------------------------------------------------------------------------------------

    def _report(self, order: Order) -> DeviceReport:
        if self._state is None:
            self._begin(order)
        state = self._state
        assert state is not None
        if order.run != state.journal.run:
            raise EdgezoError(f"{self.files.path} holds a journal of another run than the fleet's")
        if order.records:
            self._take(order)
        losses = self.losses(order.step, order.slots, order.rows) if order.slots else NOTHING
        steps = len(self._tally)
        text = self._introduction if order.header else {}
        hashed = order.records and not steps % state.cfg.snapshot_every
        state_hash = int(self.trained_sha256()[:16], 16) if hashed else 0
        where = (state.journal.run, steps, self._tally.after(steps))
        return DeviceReport(*where, state_hash, losses, text)

    def _take(self, order: Order) -> None:
        """Append the records that the device lacks, and make their updates. Raises EdgezoError."""
        state = self._state
        assert state is not None
        journal = state.journal
        if order.first > journal.next_step:
            raise EdgezoError(
                f"records from step {order.first} on, but the device is after step {journal.next_step}"
            )
        lacking = order.records[journal.next_step - order.first :]
        for at in range(0, len(lacking), RECIPES_AT_ONCE):
            self._apply(state, lacking[at : at + RECIPES_AT_ONCE])

    def _apply(self, state: RunState, records: Sequence[bytes]) -> None:
        """Append records, and make their updates in one sweep over what is trained. Raises EdgezoError."""
        journal, model, sides = state.journal, state.model, Stepper(state).sides
        recipes = []
        try:
            for data in records:
                journal.append_encoded(data)
                self._tally.add(data)
                record = journal.record(journal.next_step - 1)
                recipes.append(recipe_of(self._cfg_of_updates, record))
                line = step_line(losses_of_step(record, sides), True)
                state.log_line({**line, "step_s": None, "rss_bytes": None})
        finally:  # those before a damaged one are in the journal
            with model.heap.updating():
                model.store.apply(recipes)

    # -- the first order ----------------------------------------------------------------------------------

    def _begin(self, order: Order) -> None:
        """Open the journal, or begin it with the header of an order; load the model and replay. Raises EdgezoError."""
        new = not self.files.journal.exists()
        if new:
            if not order.header:
                raise EdgezoError("the device has no journal yet, and the order no header")
            prepare(self.files)
            atomic_write(self.files.journal, order.header)
        at_end = ExitStack()
        try:
            journal = at_end.enter_context(open_journal(self.files.journal, resume=True))
            if journal.run != order.run:
                raise EdgezoError(
                    f"{self.files.path} holds a journal of another run than the fleet's: give another directory"
                )
            self._state = self._loaded(journal, at_end)
        except BaseException:
            at_end.close()
            if new:
                with contextlib.suppress(OSError):
                    self.files.journal.unlink()
            raise
        self._open = at_end

    def _loaded(self, journal: Journal, at_end: ExitStack) -> RunState:
        """The state of a run at the end of ``journal``. Raises EdgezoError."""
        header, began = journal.header, journal.settings
        fleets = {"model": began.model, "precision": began.precision}
        cfg = make_config(self.settings, {**fleets, **settings_alike(header, began)}, BEFORE)
        check_divisible(cfg)
        meter = Meter()
        opened = open_request(cfg)
        planned = settle(opened, confirmed(machine()), meter.mark("base").rss_bytes)
        check_base(header, opened.files.content_hash)
        mine = identity(header_of(opened, planned.cfg), free_settings(began))
        if names := differing(identity(header, free_settings(began)), mine):
            raise UsageError(f"this device differs from the fleet in {', '.join(names)}")
        # Updates are those of the fleet's precision: trained factors have the same bits beside any.
        self._cfg_of_updates: RunConfig = replace(planned.cfg, precision=began.precision)
        model, memory = load_model(planned, confirmed(machine()), Overlay.of(self.files, header))
        at_end.callback(model.close)
        if (why := what_is_not_sent(model)) is not None:
            raise UsageError(f"this fleet cannot train so: {why}")
        follow(model, self._cfg_of_updates, journal, self.note)
        journal.repair()
        replay_into(model, self._cfg_of_updates.since_base(journal.next_step))
        self._tally = Tally()
        for step in range(journal.next_step):
            self._tally.add(journal.encoded(step))
        self._introduction = {"name": self.name, "rows": len(opened.dataset.train), **mine}
        self._write(planned)
        log = RunLog(self.files.metrics, journal.next_step, run_id(header))
        at_end.callback(log.close)
        progress, stop = Silent(), StopRequest(self.files)
        manners, guard = Manners(cfg, self.note, stop.check), guard_of(planned.plan, memory)
        at = (self.files, planned, model, journal, log, meter, progress, stop, manners)
        return RunState(*at, TimeBox(None), memory=memory, guard=guard)

    def _write(self, planned: Planned) -> None:
        """The files beside the journal by which the directory is that of a run."""
        remove_leftovers(self.files.path)
        atomic_write(self.files.config, self._cfg_of_updates.to_toml().encode())
        atomic_write(self.files.plan, to_json(plan_file(planned)).encode())
