"""One run on several processes, which ``torchrun`` or ``accelerate launch`` starts: each computes a part of a step.

A step of GRZO is its losses: every process that has the base, the rows and the journal makes the same update. So the
processes send losses and nothing else, each to rank 0 and back (machine/links.py). With S losses an example:

    to rank 0    step u32, flags u32, seconds f32, first 8 bytes of the trained state's SHA-256 or 0, its own losses
    from rank 0  step u32, flags u32, share of the run that is over f64, the losses of the other examples

36 bytes and 4 S B a process and step, and 4 bytes a process every 8 steps. Which process computes which micro-batch
follows from the rows' tokens and from how fast each process was, and changes no loss: micro-batches are divided as in a
run of one process. Every process writes a run directory of its own, with the whole journal: rank 0 the one of --out,
rank N one beside it. When processes start again, those whose journals are behind get the records that they lack, and
replay them. Weights are never sent.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgezo import __version__
from edgezo.data.batches import Example, micro_batches
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_write
from edgezo.machine.links import Links, linked, rank_and_size
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import FREE_ON_RESUME
from edgezo.run.fleet_settings import differing
from edgezo.run.journal import Journal
from edgezo.run.session import Planned

_UP = struct.Struct("<IIfQ")
_DOWN = struct.Struct("<IId")
_START = struct.Struct("<dqQ")
_STOP, _FAILED, _DIVERGED, _RATES = 1, 2, 4, 8  # flags
RATES_EVERY = 8  # steps between two divisions of the work by how fast processes are


class Standing(NamedTuple):
    """Where a process begins."""

    steps: int  # that its journal has; -1 without a journal
    header: Mapping[str, Any]  # the journal's, or the one that it would write


class Ranks:
    """The processes of one run, as one of them sees them."""

    def __init__(self, links: Links):
        self.links = links
        self.rates = [1.0] * links.size  # tokens a second of each rank, or 1 where not measured
        self.stops = False  # the processes have agreed to stop after this step
        self.fraction = 0.0  # of the run that is over, by rank 0's clock
        self.fraction_now: Callable[[], float] = lambda: 0.0
        self.micro_batch, self.most_tokens = 1, None  # type: int, int | None
        self._owner = np.zeros(0, np.int64)  # rank of each slot of the step
        self._tokens = [0.0] * links.size  # of each rank's part of the step
        self._lines = 2
        self._steps_begun = False
        self._steps, self._leader = [-1] * links.size, 0  # of their journals; whose is the longest
        self._measured: list[float | None] = [None] * links.size

    @property
    def rank(self) -> int:
        return self.links.rank

    @property
    def size(self) -> int:
        return self.links.size

    # -- before the first step ----------------------------------------------------------------------------

    def divide(self, planned: Planned, asked: int | None) -> Planned:
        """The plan with micro-batches of which each process gets one; ``asked``: the micro-batch of the request."""
        cfg = planned.cfg
        most = math.ceil(cfg.batch_size / self.size)
        return (
            planned
            if asked or cfg.micro_batch <= most
            else replace(planned, cfg=replace(cfg, micro_batch=most))
        )

    def check_alike(self, header: Mapping[str, Any]) -> None:
        """Raise EdgezoError, at every process, unless all have the same base, rows, settings and version."""
        config = {k: v for k, v in header["config"].items() if k not in FREE_ON_RESUME}
        mine = {**header, "config": config, "version": __version__}
        every = [json.loads(data) for data in self.links.everyones(json.dumps(mine).encode())]
        first = every[0]
        for rank, other in enumerate(every):
            if names := differing(first, other):
                raise EdgezoError(
                    f"process {rank} of this run differs from process 0 in {', '.join(names)}: all need the same "
                    "version of edgezo, base, rows and settings (device, residency and --max-mem may differ)"
                )

    def standing(self, journal: Journal | None, header: Mapping[str, Any]) -> dict[str, Any]:
        """The header of the run's journal: of those that there are, else rank 0's. Raises EdgezoError for two runs."""
        mine = {
            "steps": -1 if journal is None else journal.next_step,
            "header": header if journal is None else journal.header,
        }
        every = [
            Standing(**json.loads(data)) for data in self.links.everyones(json.dumps(mine).encode())
        ]
        self._steps = [standing.steps for standing in every]
        begun = [rank for rank, steps in enumerate(self._steps) if steps >= 0]
        for rank in begun:
            if every[rank].header != every[begun[0]].header:
                raise EdgezoError(
                    f"the directories of the processes {begun[0]} and {rank} hold two different runs.\n"
                    "Give the directories of one run, or a new --out."
                )
        self._leader = max(range(self.size), key=lambda rank: self._steps[rank])
        return dict(every[self._leader].header if begun else every[0].header)

    def join(self, model: Model, journal: Journal, probe: Path) -> None:
        """Bring all journals to the longest one, and the linear probe to every process that lacks it.

        Raises UsageError for a run whose steps need more than losses.
        """
        if (why := what_is_not_sent(model)) is not None:
            raise UsageError(
                f"this run cannot be divided among processes: {why}, or run it on one process"
            )
        first = max(0, min(self._steps))
        records: list[bytes] = []
        if self.rank == self._leader:
            records = [journal.encoded(step) for step in range(first, journal.next_step)]
        packed = self._from_leader(b"".join(len(r).to_bytes(4, "little") + r for r in records))
        lacking = [*_unpacked(packed)][journal.next_step - first :]
        if self.rank != self._leader and lacking:
            journal.repair()
            for data in lacking:
                journal.append_encoded(data)
        file = self._from_leader(
            probe.read_bytes() if self.rank == self._leader and probe.exists() else b""
        )
        if file and not probe.exists():
            atomic_write(probe, file)

    def share_probe(self, probe: Path) -> None:
        """The linear probe that rank 0 has fitted, to all."""
        file = self.links.spread(None if self.rank else probe.read_bytes())
        if self.rank:
            atomic_write(probe, file)

    def share(self, value: Mapping[str, Any] | None) -> dict[str, Any]:
        """Rank 0's ``value``, ready for JSON, to all."""
        shared: dict[str, Any] = json.loads(
            self.links.spread(None if self.rank else json.dumps(value).encode())
        )
        return shared

    def has_to_stop(self, asked: bool) -> bool:
        """Whether this process stops where it was ``asked`` to: once steps are made, when all have agreed to."""
        return self.stops if self._steps_begun else asked

    def any_lacks(self, lacks: bool) -> bool:
        """Whether something is lacking at any process: what a kill has left may differ from one to another."""
        return b"1" in self.links.everyones(b"1" if lacks else b"0")

    def begin(self, micro_batch: int, most_tokens: int | None) -> None:
        """Agree on how steps are divided, and on how much of the run is over, before the first step."""
        mine = _START.pack(
            self.fraction_now(), -1 if most_tokens is None else most_tokens, micro_batch
        )
        self.fraction, most, self.micro_batch = _START.unpack(
            self.links.spread(None if self.rank else mine)
        )
        self.most_tokens = None if most < 0 else most
        self._steps_begun = True

    def _from_leader(self, data: bytes) -> bytes:
        """The data of the process with the longest journal, at all."""
        if self._leader:  # by way of rank 0
            if self.rank == self._leader:
                self.links.send_sized(0, data)
            elif self.rank == 0:
                data = self.links.receive_sized(self._leader)
        return self.links.spread(None if self.rank else data)

    # -- a step -------------------------------------------------------------------------------------------

    def mine(self, group: Sequence[Example], slots: Sequence[int]) -> list[list[int]]:
        """The parts of ``slots`` that this process computes, each a micro-batch as agreed. All divide them alike."""
        parts = [
            [slots[i] for i in part]
            for part in micro_batches([group[s] for s in slots], self.micro_batch, self.most_tokens)
        ]
        tokens = [float(sum(group[s].tokens for s in part)) for part in parts]
        self._owner = np.zeros(len(group), np.int64)
        self._tokens = [0.0] * self.size
        taken: list[list[int]] = []
        for part, count in sorted(zip(parts, tokens, strict=True), key=lambda item: -item[1]):
            rank = min(
                range(self.size), key=lambda r: ((self._tokens[r] + count) / self.rates[r], r)
            )
            self._tokens[rank] += count
            self._owner[part] = rank
            if rank == self.rank:
                taken.append(part)
        return taken

    def exchange(
        self, step: int, losses: np.ndarray, took_s: float, stop: bool, state_hash: int
    ) -> None:
        """Fill ``losses`` (S, B) fp32 with those of the other processes.

        ``state_hash``: of the trained state before this step, 0 for none. Raises EdgezoError, at every process, where
        two have different weights or one cannot go on.
        """
        self._lines = len(losses)
        flags = _STOP if stop else 0
        if self.rank == 0:
            self._as_hub(step, losses, took_s, flags, state_hash)
        else:
            part = losses[:, self._owner == self.rank]
            self.links.send(
                0, _UP.pack(step, flags, took_s, state_hash) + part.astype("<f4").tobytes()
            )
            self._take_reply(step, losses)

    def fail(self, step: int) -> None:
        """Let the others know that this process cannot make the step, so that none of them waits for it."""
        blank = np.full((self._lines, len(self._owner)), np.nan, np.float32)
        if self.rank:
            part = blank[:, self._owner == self.rank]
            self.links.send(0, _UP.pack(step, _FAILED, 0.0, 0) + part.tobytes())
            return
        self._collect(step, blank)
        for rank in self.links.others:
            self._reply(rank, step, _FAILED, blank)

    def _as_hub(
        self, step: int, losses: np.ndarray, took_s: float, flags: int, state_hash: int
    ) -> None:
        times, hashes = [took_s], [state_hash]
        for of_rank in self._collect(step, losses):
            flags |= of_rank[0]
            times.append(of_rank[1])
            hashes.append(of_rank[2])
        other = next((rank for rank, value in enumerate(hashes) if value != state_hash), None)
        flags |= 0 if other is None else _DIVERGED
        flags |= 0 if (step + 1) % RATES_EVERY else _RATES
        self.fraction = self.fraction_now()
        for rank in self.links.others:
            self._reply(rank, step, flags, losses)
        self._measure(times)
        if flags & _RATES:
            known = [rate for rate in self._measured if rate is not None]
            usual = sum(known) / len(known) if known else 1.0
            data = struct.pack(f"<{self.size}f", *(rate or usual for rate in self._measured))
            for rank in self.links.others:
                self.links.send(rank, data)
            self._use_rates(data)
        self._obey(step, flags, f"process {other}" if other is not None else "another process")

    def _measure(self, times: Sequence[float]) -> None:
        """Take in how long each process took for its part of a step."""
        for rank, (tokens, took_s) in enumerate(zip(self._tokens, times, strict=True)):
            if tokens and took_s > 0:
                measured, before = tokens / took_s, self._measured[rank]
                self._measured[rank] = measured if before is None else (measured + before) / 2

    def _collect(self, step: int, losses: np.ndarray) -> list[tuple[int, float, int]]:
        """(flags, seconds, hash) of the other ranks, whose losses are written into ``losses``."""
        heads = []
        for rank in self.links.others:
            theirs = self._owner == rank
            size = 4 * len(losses) * int(theirs.sum())
            data = self.links.receive(rank, _UP.size + size)
            at, flags, took_s, state_hash = _UP.unpack_from(data)
            if at != step:
                raise _out_of_step(rank, at, step)
            losses[:, theirs] = np.frombuffer(data, "<f4", offset=_UP.size).reshape(len(losses), -1)
            heads.append((flags, took_s, state_hash))
        return heads

    def _reply(self, rank: int, step: int, flags: int, losses: np.ndarray) -> None:
        others = losses[:, self._owner != rank]
        self.links.send(
            rank, _DOWN.pack(step, flags, self.fraction) + others.astype("<f4").tobytes()
        )

    def _take_reply(self, step: int, losses: np.ndarray) -> None:
        others = self._owner != self.rank
        data = self.links.receive(0, _DOWN.size + 4 * len(losses) * int(others.sum()))
        at, flags, self.fraction = _DOWN.unpack_from(data)
        if at != step:
            raise _out_of_step(0, at, step)
        losses[:, others] = np.frombuffer(data, "<f4", offset=_DOWN.size).reshape(len(losses), -1)
        if flags & _RATES:
            self._use_rates(self.links.receive(0, 4 * self.size))
        self._obey(step, flags, "process 0")

    def _use_rates(self, data: bytes) -> None:
        rates = struct.unpack(f"<{self.size}f", data)
        if all(rate > 0 and math.isfinite(rate) for rate in rates):
            self.rates = list(rates)

    def _obey(self, step: int, flags: int, who: str) -> None:
        if flags & _FAILED:
            raise EdgezoError(
                f"another process of this run has stopped before step {step}: its own message says why.\n"
                "Every step before is recorded. Start all of them again with --resume."
            )
        if flags & _DIVERGED:
            raise EdgezoError(
                f"before step {step} this process and {who} have different weights: their memory, their files or "
                "their versions of PyTorch differ.\nRemove the directory of the wrong one, and start all again with "
                "--resume: it is then rebuilt from the journal."
            )
        self.stops = bool(flags & _STOP)

    def figures(self) -> dict[str, int]:
        """What of this process's summary is about the others."""
        links = self.links
        sent = {"sent_bytes": links.sent_bytes, "received_bytes": links.received_bytes}
        return {"rank": self.rank, "processes": self.size, **sent}

    # -- an evaluation ------------------------------------------------------------------------------------

    def has_batch(self, number: int) -> bool:
        """Whether this process evaluates a batch."""
        return number % self.size == self.rank

    def merge_rows(self, batches: Sequence[Sequence[int]], values: np.ndarray) -> None:
        """Fill ``values`` (rows, k) fp64 with the rows that other processes have evaluated, at every process."""
        for number, data in enumerate(
            self.links.everyones(self._of_rank(batches, values, self.rank).tobytes())
        ):
            rows = [row for at in range(number, len(batches), self.size) for row in batches[at]]
            values[rows] = np.frombuffer(data, values.dtype).reshape(len(rows), values.shape[1])

    def _of_rank(
        self, batches: Sequence[Sequence[int]], values: np.ndarray, rank: int
    ) -> np.ndarray:
        return values[[row for at in range(rank, len(batches), self.size) for row in batches[at]]]


def _out_of_step(rank: int, at: int, step: int) -> EdgezoError:
    return EdgezoError(
        f"process {rank} of this run is at step {at}, and this one at step {step}: start all again with --resume"
    )


def _unpacked(packed: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(packed):
        size = int.from_bytes(packed[at : at + 4], "little")
        yield packed[at + 4 : at + 4 + size]
        at += 4 + size


def what_is_not_sent(model: Model) -> str | None:
    """Why a run cannot be divided among processes: what its steps need beside losses; None where it can."""
    if model.learned:
        return (
            f"{', '.join(model.learned)} is trained by its gradient, and a gradient is not sent: give --train lowrank, "
            "or probe+lowrank for rows with labels"
        )
    if model.guided:
        return "its directions are made from the inputs of layers, which are not sent: give --directions signs"
    if any(t.touched_offset is not None for t in model.store.trainables.values()):
        return "rows of the embedding move by the tokens of each example, which are not sent: give --train lowrank"
    return None


@contextmanager
def joined(cfg: RunConfig) -> Iterator[Ranks | None]:
    """The processes of a run for the length of a block; None where it has one."""
    rank, size = rank_and_size()
    if size == 1:
        yield None
        return
    if cfg.step_auto:
        raise UsageError("--step auto measures with one process: give --step a number")
    with linked(rank, size) as links:
        yield Ranks(links)


def without_head(cfg: RunConfig, note: Callable[[str], None]) -> RunConfig:
    """The request without the exact head, whose gradient is not sent. Raises UsageError where nothing else is left."""
    train = tuple(part for part in cfg.train if part != "head")
    if train == cfg.train:
        return cfg
    if not train:
        raise UsageError(
            "--train head is trained by its gradient, which processes do not send: give --train lowrank"
        )
    note(
        f"several processes: the exact head is not trained, as its gradient would be sent; --train {'+'.join(train)}"
    )
    return replace(cfg, train=train)
