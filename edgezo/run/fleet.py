"""The server of a fleet: a run whose rows lie on devices that come and go, and never leave them.

    group of step t    rows of all devices, numbered device by device: batch_indices(rows of the fleet, B, seed, t)
    slice              the slots of the group whose rows a device has; it computes their losses (fleet_messages.py)
    record             losses of all slices together, credit, step size; appended to the journal, then sent to devices

The server has the journal, with the identity of the base in its header. It has no model, and sees no row: only how many
a device has. Device names with the numbers of their rows are kept beside the journal, so that a server that is started
again goes on. Where the rows of one data set are divided among devices in their order, the journal is that of
``edgezo finetune`` over all of them with the same micro-batches.

A device that answers anything but the losses it was asked for is refused by name, and its slice is computed by others,
with rows of theirs. Where nobody can, the losses are NaN: those examples move nothing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from edgezo.data.batches import batch_indices
from edgezo.errors import EdgezoError
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.foreign import clip
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.run.fleet_messages import (
    DeviceReport,
    Order,
    Tally,
    losses_problem,
    outlying,
    read_report,
)
from edgezo.run.fleet_settings import check_divisible, differing, free_settings, identity
from edgezo.run.journal import Journal
from edgezo.run.journal_record import StepRecord
from edgezo.zo.credit import Estimator, schedule

BOOK = "devices.json"  # beside the journal: each device's first row and its rows
MOST_RECORDS_BYTES = 1 << 20  # of an order
MOST_NAME = 100  # characters
GLANCE_S, GLANCE_EVERY_S = (
    10.0,
    15.0,
)  # that a device which has been silent is waited for, and how often


class Transport(Protocol):
    """What carries messages to devices. Its numbers of devices are those of its connections."""

    def nodes(self) -> Sequence[int]:
        """The devices that are connected now."""
        ...

    def exchange(self, messages: Mapping[int, bytes], wait_s: float) -> Mapping[int, bytes]:
        """Send, and return the answers that come within ``wait_s``."""
        ...

    def rest(self) -> None:
        """Wait a little for devices to come."""
        ...


class Rules(NamedTuple):
    """What a server asks of its devices."""

    devices: int = 1  # that a new fleet waits for; their rows are numbered by their names
    patience_s: float = 60.0  # that a slice waits for the device that has its rows
    most_refusals: int = 3  # of answers of a device, before it is asked no more
    most_rows: int = 1_000_000  # of a device: who claims many gets many slots of every group
    # An example counts if its losses differ by at most so many times the group's median difference; 0: always.
    most_times_median: float = 0.0


@dataclass
class Member:
    """A device that has been with the fleet."""

    name: str
    first: int  # number of its first row in the fleet
    rows: int
    node: int | None = None  # None: it is not there
    steps: int = 0  # records that it has
    refusals: int = 0
    silences: int = 0  # orders in a row that it has let the time pass for
    absences: int = 0  # steps in a row that have waited for it in vain
    lost_s: float = -math.inf  # when it stopped to answer
    state: tuple[int, int] = (0, 0)  # steps, and the hash of its trained state after them


class DeviceRefused(Exception):
    """Why an answer of a device, or the device itself, cannot be used."""


@dataclass
class Fleet:
    """The server's side of one run."""

    journal: Journal
    book: Path  # JSON: each device's first row and its rows, by name
    rules: Rules = field(default_factory=Rules)
    note: Callable[[str], None] = print
    clock: Callable[[], float] = now_s
    members: dict[str, Member] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    sent_bytes: int = 0  # of orders and reports, without the transport's framing
    received_bytes: int = 0

    def __post_init__(self) -> None:
        self.cfg = self.journal.settings
        check_divisible(self.cfg)
        self.evaluations = len(Estimator.of(self.cfg).evaluations)
        self.batch_size = self.cfg.batch_size or DEFAULT_BATCH
        for step in range(self.journal.next_step):
            self.tally.add(self.journal.encoded(step))
        self._met: set[int] = set()
        self._silent: dict[int, float] = {}  # connections, and when they were asked last
        if self.book.exists():
            self.members = _read_book(self.book)

    # -- the run ------------------------------------------------------------------------------------------

    def run(self, transport: Transport) -> None:
        """Make the steps that the journal lacks, and bring all devices that are there to its end."""
        steps = self.cfg.steps or 0
        self.gather(transport)
        while self.journal.next_step < steps:
            self.step(transport)
        self._meet(transport)
        self._catch_up(transport, least_bytes=0)

    def gather(self, transport: Transport) -> None:
        """Wait for the devices that a new fleet begins with."""
        while not self.members:
            reports = self._greet(transport)
            while len(reports) < self.rules.devices:
                transport.rest()
                reports |= self._greet(transport)
                there = set(transport.nodes())
                reports = {node: report for node, report in reports.items() if node in there}
            self._enter(reports)

    def step(self, transport: Transport) -> StepRecord:
        """One step: ask, gather, append."""
        step, cfg = self.journal.next_step, self.cfg
        losses = self._losses(transport, step)
        if self.rules.most_times_median:
            out = outlying(losses, self.rules.most_times_median)
            losses[:, out] = np.nan
            if len(out):
                self.note(f"step {step}: {len(out)} examples are left out, far from the median")
        credit = Estimator.of(cfg).credit(losses)
        size = cfg.step * schedule(cfg.schedule, min(1.0, step / (cfg.steps or 1)))
        record = StepRecord(step, cfg.sigma, size, not bool(credit.any()), losses, credit)
        self.journal.append(record)
        self.journal.sync()  # or devices could have a record that a power loss has taken from here
        self.tally.add(self.journal.encoded(step))
        return record

    @property
    def rows(self) -> int:
        """Rows of all devices together."""
        return sum(member.rows for member in self.members.values())

    def present(self) -> list[Member]:
        """The devices that can be asked, by the numbers of their rows."""
        there = [m for m in self.members.values() if m.node is not None]
        return sorted(there, key=lambda member: member.first)

    # -- who is there -------------------------------------------------------------------------------------

    def _meet(self, transport: Transport) -> None:
        """Take in who has come, and who has gone."""
        self._enter(self._greet(transport))

    def _greet(self, transport: Transport) -> dict[int, DeviceReport]:
        """Ask the devices that are new who they are; the reports of those that can be of this fleet."""
        there = set(transport.nodes())
        for member in self.members.values():
            if member.node not in there:
                member.node = None
        self._met &= there
        self._silent = {node: at_s for node, at_s in self._silent.items() if node in there}
        hello = Order(self.journal.run, 0, 0, self.journal.head_bytes()).encoded()
        reports: dict[int, DeviceReport] = {}
        now = self.clock()
        again = {n for n, at_s in self._silent.items() if now - at_s >= GLANCE_EVERY_S}
        for nodes, wait_s in (
            (there - self._met - self._silent.keys(), self.rules.patience_s),
            (again, GLANCE_S),
        ):
            answers = self._exchange(transport, dict.fromkeys(sorted(nodes), hello), wait_s)
            for node in nodes:
                self._silent[node] = self.clock()
            for node in answers:
                del self._silent[node]
            self._met |= answers.keys()
            for node, data in answers.items():
                try:
                    reports[node] = self._introduced(data)
                except (DeviceRefused, ValueError) as problem:
                    self.note(f"device at connection {node} is refused: {problem}")
        return reports

    def _introduced(self, data: bytes) -> DeviceReport:
        """The report of a device that can be of this fleet. Raises DeviceRefused, ValueError."""
        report = read_report(data)
        name, rows = report.text.get("name"), report.text.get("rows")
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= MOST_NAME):
            raise DeviceRefused("it gives no name")
        if "problem" in report.text:
            raise DeviceRefused(f"{name}: {clip(str(report.text['problem']), 600)}")
        if type(rows) is not int or not 0 < rows <= self.rules.most_rows:
            raise DeviceRefused(f"{name} has no number of rows from 1 to {self.rules.most_rows}")
        mine = identity(self.journal.header, free_settings(self.cfg))
        if names := differing(mine, report.text):
            raise DeviceRefused(f"{name} differs from this fleet in {clip(', '.join(names), 600)}")
        known = self.members.get(name)
        if known is not None and known.rows != rows:
            raise DeviceRefused(f"{name} has {rows} rows, and had {known.rows}")
        if known is not None and self._is_out(known):
            raise DeviceRefused(f"{name} is asked no more")
        self._check_journal(report)
        return report

    def _check_journal(self, report: DeviceReport) -> None:
        """Raise DeviceRefused unless the journal of a device is the beginning of this one."""
        if report.run != self.journal.run:
            raise DeviceRefused("its journal is of another run")
        if report.steps > len(self.tally):
            raise DeviceRefused(f"it has {report.steps} steps, and this journal {len(self.tally)}")
        if report.journal != self.tally.after(report.steps):
            raise DeviceRefused(f"its first {report.steps} records are not those of this journal")

    def _enter(self, reports: Mapping[int, DeviceReport]) -> None:
        """Make members of the devices that have introduced themselves. Rows of new ones are numbered by their names."""
        arrived = sorted(reports.items(), key=lambda item: str(item[1].text["name"]))
        known = len(self.members)
        for _, report in arrived:
            name = str(report.text["name"])
            if name not in self.members:
                self.members[name] = Member(name, self.rows, report.text["rows"])
        if len(self.members) > known:  # before anything is asked of them
            numbers = {member.name: [member.first, member.rows] for member in self.members.values()}
            atomic_write(self.book, to_json(numbers).encode())
        for node, report in arrived:
            member = self.members[str(report.text["name"])]
            member.node, member.steps, member.absences = node, report.steps, 0
            self.note(f"{member.name} is here, after step {report.steps}, with {member.rows} rows")

    # -- a step -------------------------------------------------------------------------------------------

    def _losses(self, transport: Transport, step: int) -> np.ndarray:
        """Losses (S, B) fp32 of the step's group; NaN where no device has given any."""
        cfg = self.cfg
        losses = np.full((self.evaluations, self.batch_size), np.nan, np.float32)
        self._meet(transport)
        group = batch_indices(self.rows, self.batch_size, cfg.seed, cfg.since_base(step))
        missing, begun_s = dict(enumerate(group)), self.clock()
        tried: dict[int, set[str]] = {slot: set() for slot in missing}
        rested = False
        while missing:
            slices, waits = self._slices(missing, tried, begun_s)
            if slices:
                for slot in self._ask(transport, step, slices, losses):
                    del missing[slot]
                for name, pairs in slices.items():
                    if self.members[name].node is not None:
                        for slot in pairs.keys() & missing.keys():
                            tried[slot].add(name)
            elif self.present() and not waits:
                self.note(f"step {step}: {len(missing)} examples are left out, nobody has losses")
                break
            else:
                if not rested:
                    self.note(f"step {step} waits for the devices of {len(missing)} examples")
                rested = True
                transport.rest()
            self._meet(transport)
        for owner in {owner.name: owner for owner in map(self._owner, group)}.values():
            owner.absences += owner.node is None
        return losses

    def _is_awaited(self, member: Member, begun_s: float) -> bool:
        """Whether a step that began then waits for a device that is not there."""
        if member.node is not None or self._is_out(member):
            return False
        since_s = max(begun_s, member.lost_s)
        few = member.absences < self.rules.most_refusals
        return few and self.clock() - since_s < self.rules.patience_s

    def _slices(
        self, missing: Mapping[int, int], tried: Mapping[int, set[str]], begun_s: float
    ) -> tuple[dict[str, dict[int, int]], bool]:
        """Who computes which slots with which of its rows; and whether others still wait for their device."""
        there, waits = self.present(), False
        slices: dict[str, dict[int, int]] = {}
        for slot, row in missing.items():
            owner = self._owner(row)
            taker: Member | None = owner
            if owner.name in tried[slot] or owner.node is None:
                able = [member for member in there if member.name not in tried[slot]]
                taker = able[slot % len(able)] if able else None
                if self._is_awaited(owner, begun_s):
                    taker, waits = None, True
            if taker is not None:
                slices.setdefault(taker.name, {})[slot] = (row - taker.first) % taker.rows
        return slices, waits

    def _owner(self, row: int) -> Member:
        return next(m for m in self.members.values() if m.first <= row < m.first + m.rows)

    def _ask(
        self,
        transport: Transport,
        step: int,
        slices: Mapping[str, Mapping[int, int]],
        losses: np.ndarray,
    ) -> list[int]:
        """Ask for the losses of slices, and write them into ``losses``; the slots that are done."""
        self._catch_up(transport, MOST_RECORDS_BYTES)
        orders = {}
        for name, pairs in slices.items():
            member = self.members[name]
            if member.node is not None:
                orders[name] = self._order(member, step, [*pairs], [*pairs.values()])
        reports = self._answers(transport, orders)
        self._check_states()
        done: list[int] = []
        for name, report in reports.items():
            if self.members[name].node is None:
                continue
            slots = [*slices[name]]
            if problem := losses_problem(report.losses, self.evaluations, len(slots)):
                self._refuse(self.members[name], problem)
            else:
                losses[:, slots] = report.losses
                done += slots
        return done

    def _order(
        self, member: Member, step: int, slots: Sequence[int] = (), rows: Sequence[int] = ()
    ) -> Order:
        """An order with the records that a device lacks, as many as an order may hold."""
        records: list[bytes] = []
        size = 0
        for at in range(member.steps, self.journal.next_step):
            if size > MOST_RECORDS_BYTES:
                break
            records.append(self.journal.encoded(at))
            size += len(records[-1])
        return Order(self.journal.run, step, member.steps, b"", records, slots, rows)

    def _answers(
        self, transport: Transport, orders: Mapping[str, Order]
    ) -> dict[str, DeviceReport]:
        """The reports of devices that have taken the records of their orders in."""
        nodes = {name: self.members[name].node for name in orders}
        messages = {
            node: orders[name].encoded() for name, node in nodes.items() if node is not None
        }
        begun_s = self.clock()
        answers = self._exchange(transport, messages, self.rules.patience_s)
        in_time = self.clock() - begun_s < self.rules.patience_s
        reports: dict[str, DeviceReport] = {}
        for name, order in orders.items():
            member = self.members[name]
            data = answers.get(member.node) if member.node is not None else None
            if data is None:
                self._lose(member, in_time)
                continue
            try:
                report = read_report(data)
                if "problem" in report.text:
                    raise DeviceRefused(clip(str(report.text["problem"]), 600))
                self._check_journal(report)
                if report.steps != order.first + len(order.records):
                    raise DeviceRefused(f"it is after step {report.steps}, with other records")
            except (DeviceRefused, ValueError) as problem:
                self._refuse(member, str(problem))
                continue
            member.steps, member.state = report.steps, (report.steps, report.state)
            member.silences = 0
            reports[name] = report
        return reports

    def _catch_up(self, transport: Transport, least_bytes: int) -> None:
        """Send records to the devices that lack more than ``least_bytes`` of them."""
        while True:
            orders = {}
            for member in self.present():
                order = self._order(member, self.journal.next_step)
                if sum(map(len, order.records)) > least_bytes:
                    orders[member.name] = order
            if not orders:
                return
            self._answers(transport, orders)

    def _check_states(self) -> None:
        """Refuse the devices whose trained state differs from that of most, after the same step."""
        by_step: dict[int, list[Member]] = {}
        for member in self.present():
            steps, state = member.state
            if state:
                by_step.setdefault(steps, []).append(member)
        for members in by_step.values():
            usual = Counter(member.state[1] for member in members).most_common(1)[0][0]
            for member in members:
                if member.state[1] != usual:
                    member.refusals = self.rules.most_refusals - 1
                    self._refuse(member, "its weights differ from those of the other devices")

    def _is_out(self, member: Member) -> bool:
        """Whether a device is asked no more, until the server is started again."""
        return max(member.refusals, member.silences) >= self.rules.most_refusals

    def _lose(self, member: Member, in_time: bool) -> None:
        """A device has not answered; ``in_time``: its connection said so, as where its process has ended."""
        if member.node is not None:
            self._silent[member.node] = self.clock()
            self._met.discard(member.node)
        member.node, member.lost_s = None, self.clock()
        member.silences += not in_time
        self.note(f"{member.name} does not answer")

    def _refuse(self, member: Member, why: str) -> None:
        """Do not use an answer; a device that has given too many of them is asked no more."""
        member.refusals += 1
        self.note(
            f"{member.name} is refused ({member.refusals} of {self.rules.most_refusals}): {why}"
        )
        if self._is_out(member):
            member.node = None
        elif member.node is not None:
            self._met.discard(member.node)  # it is asked again who it is, and what it has

    def _exchange(
        self, transport: Transport, messages: Mapping[int, bytes], wait_s: float
    ) -> Mapping[int, bytes]:
        if not messages:
            return {}
        answers = transport.exchange(messages, wait_s)
        self.sent_bytes += sum(map(len, messages.values()))
        self.received_bytes += sum(map(len, answers.values()))
        return answers


def _read_book(book: Path) -> dict[str, Member]:
    """The devices that a server has written down. Raises EdgezoError for any other text."""
    members: dict[str, Member] = {}
    rows_so_far = 0
    try:
        for name, (first, rows) in json.loads(book.read_text(encoding="utf-8")).items():
            if first != rows_so_far or type(rows) is not int or rows < 1:
                raise ValueError(f"the rows of {name} are not numbered after those before")
            members[name] = Member(name, first, rows)
            rows_so_far += rows
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise EdgezoError(
            f"{book} is not what a fleet's server has written ({problem}). Restore it from a copy."
        ) from problem
    return members
