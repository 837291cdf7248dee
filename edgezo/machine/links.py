"""Links between the processes of one run: bytes from one to another, over ``torch.distributed`` with gloo.

``torchrun`` and ``accelerate launch`` start the processes and tell each its number in the environment (RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Rank 0 is the hub: the others send to it and
receive from it, never to one another. What is sent are plain bytes of a known length, so that nothing that another
machine sends is ever unpickled.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from edgezo.errors import EdgezoError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

LOST_S = 900.0  # a process that nothing is heard of for so long is given up
LONGEST_BYTES = 1 << 30  # of one message
MEET_S = 0.02  # between two looks for the others, at the start
_LENGTH = struct.Struct("<Q")
_HERE = ("localhost", "127.0.0.1", "::1")


class PeerLost(EdgezoError):
    """Another process of the run has ended, or is not heard of any more."""


def rank_and_size() -> tuple[int, int]:
    """This process's number among those of its run, and how many there are; (0, 1) where it runs alone.

    Raises UsageError for an environment that no launcher makes.
    """
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not any(given):
        return 0, 1
    if not all(text.isdecimal() for text in given) or not int(given[0]) < int(given[1]):
        raise UsageError(
            f"the environment has RANK={given[0]!r} and WORLD_SIZE={given[1]!r}, which are no number of a process and "
            "no number of processes: unset both, or start edgezo with torchrun"
        )
    return int(given[0]), int(given[1])


def directory_of_rank(out: str | None) -> str | None:
    """The run directory of this process: ``out`` of rank 0, OUT.rankN beside it of the others.

    Raises UsageError where there are several processes and no ``out``.
    """
    rank, size = rank_and_size()
    if size == 1:
        return out
    if out is None:
        raise UsageError("a run on several processes needs --out: each of them has to know it")
    suffix = f".rank{rank}"
    return out if not rank or out.endswith(suffix) else out + suffix


def was_restarted(out: str | None) -> bool:
    """Whether a launcher has started this process again, since one of the run's has ended, and ``out`` has steps."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    return again and out is not None and os.path.exists(os.path.join(out, "journal.bin"))


class Worker:
    """A thread that waits for other processes: code in C lets no signal through to the thread that waits in it."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]]] = SimpleQueue()
        self.waits = False  # for others, also once the thread that asked has been interrupted
        threading.Thread(target=self._work, daemon=True).start()

    def do(self, work: Callable[[], Any]) -> None:
        """Do ``work`` in that thread, and raise what it raises. A signal is handled meanwhile."""
        over, problems = threading.Event(), list[BaseException]()

        def end(problem: BaseException | None) -> None:
            problems.extend([] if problem is None else [problem])
            over.set()

        self.waits = True
        self._asked.put((work, end))
        over.wait()
        self.waits = False
        if problems:
            raise problems[0]

    def _work(self) -> None:
        while True:
            work, end = self._asked.get()
            try:
                work()
            except BaseException as problem:
                end(problem)
            else:
                end(None)


class Links:
    """This process's links. Rank 0 has one to each other rank, the others have one to rank 0."""

    def __init__(self, rank: int, size: int, worker: Worker | None = None):
        self.rank, self.size = rank, size
        self._worker = worker or Worker()
        self.sent_bytes = self.received_bytes = 0  # the transport's own framing is not counted

    @property
    def others(self) -> Sequence[int]:
        """The ranks at the other ends of this process's links."""
        return range(1, self.size) if self.rank == 0 else (0,)

    # -- one message --------------------------------------------------------------------------------------

    def send(self, to: int, data: bytes) -> None:
        """Send ``data``, of a length that the receiver knows. Raises PeerLost."""
        import torch
        from torch import distributed

        if data:
            self._moved(
                to,
                lambda: distributed.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to),
            )
            self.sent_bytes += len(data)

    def receive(self, sender: int, n_bytes: int) -> bytes:
        """The next ``n_bytes`` bytes of a rank. Raises PeerLost."""
        import torch
        from torch import distributed

        if not n_bytes:
            return b""
        taken: Tensor = torch.empty(n_bytes, dtype=torch.uint8)
        self._moved(sender, lambda: distributed.recv(taken, sender))
        self.received_bytes += n_bytes
        return taken.numpy().tobytes()

    def send_sized(self, to: int, data: bytes) -> None:
        """Send ``data`` after its length."""
        self.send(to, _LENGTH.pack(len(data)))
        self.send(to, data)

    def receive_sized(self, sender: int) -> bytes:
        """What ``send_sized`` has sent. Raises EdgezoError for a length that no message has."""
        (n_bytes,) = _LENGTH.unpack(self.receive(sender, _LENGTH.size))
        if n_bytes > LONGEST_BYTES:
            raise EdgezoError(
                f"process {sender} of this run sends a message of {n_bytes} bytes, which no edgezo does: "
                "start all processes with one version of edgezo"
            )
        return self.receive(sender, n_bytes)

    # -- among all ----------------------------------------------------------------------------------------

    def spread(self, data: bytes | None) -> bytes:
        """Rank 0's ``data``, to all ranks."""
        if self.rank:
            return self.receive_sized(0)
        assert data is not None
        for rank in self.others:
            self.send_sized(rank, data)
        return data

    def collect(self, data: bytes) -> list[bytes]:
        """The data of all ranks in their order, at rank 0; [] elsewhere."""
        if self.rank:
            self.send_sized(0, data)
            return []
        return [data, *(self.receive_sized(rank) for rank in self.others)]

    def everyones(self, data: bytes) -> list[bytes]:
        """The data of all ranks in their order, at every rank."""
        collected = self.collect(data)
        return [self.spread(collected[rank] if collected else None) for rank in range(self.size)]

    def _moved(self, rank: int, move: Callable[[], Any]) -> None:
        try:
            self._worker.do(move)
        except (
            RuntimeError
        ) as problem:  # what torch raises where a peer is gone, or silent for LOST_S
            reason = str(problem).strip().splitlines()[-1][:200]
            raise PeerLost(
                f"process {rank} of this run's {self.size} is gone, or not heard of for {LOST_S:.0f} s ({reason}).\n"
                "Start them all again with --resume: the steps that any of them has recorded are kept."
            ) from problem


def name_together(store: Store, rank: int, size: int) -> str:
    """A name for these processes together, which none had before. Raises TimeoutError after ``LOST_S``.

    torchrun keeps its store when it starts processes again, and there gloo would find the addresses of those that are
    gone. So each process draws a token, and rank 0 repeats its own to each of the others beside the one that it finds
    there, until all have said that they have it. What earlier processes left has other tokens.
    """
    token, until_s = os.urandom(8).hex(), time.monotonic() + LOST_S
    if rank:
        store.set(f"edgezo/hello{rank}", token)
    waiting = set(range(1, size)) if rank == 0 else {rank}
    while True:
        if rank == 0:
            waiting = {peer for peer in waiting if not _has_heard(store, peer, token)}
        elif _read(store, f"edgezo/welcome{rank}").startswith(token):
            token = _read(store, f"edgezo/welcome{rank}").removeprefix(token)
            store.set(f"edgezo/heard{rank}", token)
            return token
        if not waiting:
            return token
        if time.monotonic() > until_s:
            raise TimeoutError(f"nothing is heard of {sorted(waiting) if rank == 0 else 'rank 0'}")
        time.sleep(MEET_S)


def _has_heard(store: Store, peer: int, token: str) -> bool:
    """Whether a process has rank 0's token; if not, it is told once more."""
    if _read(store, f"edgezo/heard{peer}") == token:
        return True
    if hello := _read(store, f"edgezo/hello{peer}"):
        store.set(f"edgezo/welcome{peer}", hello + token)
    return False


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


@contextmanager
def linked(rank: int, size: int) -> Iterator[Links]:
    """Links to the other processes, which a launcher has started, for the length of a block. Raises EdgezoError."""
    from torch import distributed

    if os.environ.get("MASTER_ADDR", "") in _HERE:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may lead nowhere
    worker, timeout = Worker(), timedelta(seconds=LOST_S)

    def meet() -> None:
        store, _, _ = next(distributed.rendezvous("env://", rank, size, timeout=timeout))
        apart = distributed.PrefixStore(name_together(store, rank, size), store)
        distributed.init_process_group(
            "gloo", store=apart, rank=rank, world_size=size, timeout=timeout
        )

    try:
        worker.do(meet)
    except (RuntimeError, ValueError, TimeoutError) as problem:
        reason = str(problem).strip().splitlines()[0][:200]
        raise EdgezoError(
            f"the {size} processes of this run do not find one another ({reason}).\n"
            "Start them with torchrun (--standalone on one machine, else --rdzv-endpoint HOST:PORT). Where a machine "
            "has several networks, GLOO_SOCKET_IFNAME names the one to use."
        ) from problem
    try:
        yield Links(rank, size, worker)
    finally:
        if (
            not worker.waits
        ):  # else it was interrupted, and what it waits for would be waited for here
            distributed.destroy_process_group()
