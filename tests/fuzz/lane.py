"""The fuzz lane: cases of many kinds, each read in a worker process that is watched from outside.

    kind     a name, and a function that makes the case of a seed, lets edgezo read it, and says whether it was accepted
    case     a kind and a seed (a number): the same one on every machine

A case fails where it raises anything but EdgezoError, believes what is wrong (``Believed``), takes more memory or time
than ``Limits``, does not end, or ends its process. The worker measures; the parent only waits for answers, and goes on
with a new worker where one has ended or is silent. So no case can end the lane, or take the machine's memory.

    python -m fuzz.lane KIND SEED      one case again, in this process, with its traceback (PYTHONPATH=.:tests)

Standard library only: what a worker imports is the business of its table.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

TABLE = "fuzz.kinds:KINDS"
TESTS = Path(__file__).resolve().parents[1]
MB = 1_000_000
SPARE_BYTES = 2_000 * MB  # of address space, for a worker over what it has when it begins
SLOWEST = 3  # cases of a kind that are named


class Believed(Exception):
    """What was read is not what was written."""


class Elsewhere:
    """What a case has taken in processes that are not children of the worker."""

    cpu_s, memory_bytes = 0.0, 0

    @classmethod
    def add(cls, cpu_s: float, memory_bytes: int) -> None:
        cls.cpu_s += cpu_s
        cls.memory_bytes = max(cls.memory_bytes, memory_bytes)


class Kind(NamedTuple):
    """What makes and reads the case of a seed in a folder: whether it was accepted. Raises EdgezoError, or Believed."""

    read: Callable[[int, Path], bool]
    share: int = 1  # of the cases of a long run, beside those of the other kinds


class Limits(NamedTuple):
    """What a case may take."""

    memory_bytes: int = 256 * MB  # of resident memory, more than before the case
    seconds: float | None = (
        None  # of processor time, children's included; None: no clock is looked at
    )
    silent_s: float = 120.0  # the parent ends a worker that has said nothing for so long


USUAL = Limits()


class Answer(NamedTuple):
    """What became of a case."""

    kind: str
    seed: int
    wrong: str  # "" for a case that did not fail
    accepted: bool
    seconds: float
    memory_bytes: int


@dataclass
class Report:
    """All answers, by kind."""

    cases: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    slowest: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    largest: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    failures: list[Answer] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        kind = answer.kind
        self.cases[kind] = self.cases.get(kind, 0) + 1
        self.accepted[kind] = self.accepted.get(kind, 0) + answer.accepted
        self.seconds[kind] = self.seconds.get(kind, 0.0) + answer.seconds
        for worst, figure in (
            (self.slowest, answer.seconds),
            (self.largest, answer.memory_bytes),
        ):
            best = worst.setdefault(kind, [])
            best.append((figure, answer.seed))  # type: ignore[arg-type]
            best.sort(reverse=True)
            del best[SLOWEST:]
        if answer.wrong:
            self.failures.append(answer)

    def row(self, kind: str) -> str:
        cases, seconds = self.cases[kind], self.seconds[kind]
        longest, most = self.slowest[kind][0][0], self.largest[kind][0][0] / MB
        return (
            f"{kind:<18} {cases:>9,} {self.accepted[kind]:>9,} {1000 * seconds / cases:>8.2f} {longest:>10.2f} "
            f"{most:>8.1f}"
        )

    def table(self) -> str:
        """A line for each kind, and one for each failure with what runs it again."""
        head = ("cases", "accepted", "ms each", "longest s", "most MB")
        lines = ["{:<18} {:>9} {:>9} {:>8} {:>10} {:>8}".format("kind", *head)]
        lines += map(self.row, self.cases)
        lines.append(f"{sum(self.cases.values()):,} cases, {len(self.failures)} failures")
        lines += [
            f"{f.kind} {f.seed}: {f.wrong} (again: PYTHONPATH=.:tests python -m fuzz.lane {f.kind} {f.seed})"
            for f in self.failures[:100]
        ]
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The parent


def shared(kinds: Mapping[str, Kind], cases: int) -> dict[str, int]:
    """How many cases each kind has, of so many in all: by its share, and one at least."""
    total = sum(kind.share for kind in kinds.values())
    return {name: max(1, cases * kind.share // total) for name, kind in kinds.items()}


class Part(NamedTuple):
    """Cases that are still to run: so many of a kind, from a seed on."""

    kind: str
    first: int
    count: int

    def after(self, seed: int) -> Part:
        return Part(self.kind, seed + 1, self.first + self.count - seed - 1)


def run_lane(
    counts: Mapping[str, int],
    folder: Path,
    limits: Limits = USUAL,
    *,
    first_seed: int = 0,
    table: str = TABLE,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run so many cases of each kind, one after the other, and report. ``folder`` is empty and for the workers."""
    report = Report()
    todo = [Part(kind, first_seed, count) for kind, count in counts.items()]
    while todo:
        for answer in _answers(todo, folder, limits, table):
            report.add(answer)
            if answer.wrong:
                tell(f"{answer.kind} {answer.seed}: {answer.wrong}")
            todo[0] = todo[0].after(answer.seed)
            if not todo[0].count:
                del todo[0]
                tell(report.row(answer.kind))
    return report


def _answers(todo: Sequence[Part], folder: Path, limits: Limits, table: str) -> Iterator[Answer]:
    """Answers of one worker, until it has answered all or has ended; the last one says how it ended.

    ``todo`` is what the worker is given, and becomes what it has not answered.
    """
    with tempfile.TemporaryDirectory(dir=folder) as own, open(folder / "errors", "w+") as errors:
        question = json.dumps([todo, own, limits, table])
        with subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "fuzz.lane", "work", question],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
            cwd=own,
        ) as worker:
            assert worker.stdout is not None
            how = ""
            try:
                for line in _lines(worker.stdout, limits.silent_s):
                    yield Answer(*json.loads(line))
            except TimeoutError:
                how = f"no answer for {limits.silent_s:g} s"
                worker.kill()
            how = how or f"it ended with {worker.wait()}"
        if todo:
            errors.seek(0)
            said = " | ".join(errors.read().strip().splitlines()[-4:])
            yield Answer(*todo[0][:2], f"{how}: {said}"[:600], False, 0.0, 0)


def _lines(stream: IO[bytes], silent_s: float) -> Iterator[bytes]:
    """The lines of a pipe, until it ends. Raises TimeoutError where it is silent for so long."""
    rest = b""
    while True:
        if not select.select([stream], [], [], silent_s)[0]:
            raise TimeoutError
        piece = os.read(stream.fileno(), 1 << 16)
        if not piece:
            return
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole


# ---------------------------------------------------------------------------------------------
# The worker


def _kind_of(table: str, name: str) -> Kind:
    module, _, attribute = table.partition(":")
    kinds: Mapping[str, Kind] = getattr(importlib.import_module(module), attribute)
    return kinds[name]


def _work(todo: Sequence[Part], folder: Path, limits: Limits, table: str) -> None:
    """Answer each case by a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reader prints is no answer
    kinds = [_kind_of(table, part.kind) for part in todo]
    _limit_memory()
    for part, kind in zip(todo, kinds, strict=True):
        place = folder / part.kind
        place.mkdir()
        _once(
            kind, part.first, place
        )  # what is imported, and made for all cases, is no part of one
        for seed in range(part.first, part.first + part.count):
            outcome = _once(kind, seed, place)
            if not outcome[0] and _over(
                outcome, limits
            ):  # a library has grown, or the machine was busy
                outcome = _smaller(outcome, _once(kind, seed, place))
            wrong, *figures = outcome
            answers.write(json.dumps([part.kind, seed, wrong or _over(outcome, limits), *figures]))
            answers.write("\n")
            answers.flush()


Outcome = tuple[str, bool, float, int]  # wrong, accepted, seconds, bytes


def _over(outcome: Outcome, limits: Limits) -> str:
    _, _, seconds, memory_bytes = outcome
    if memory_bytes > limits.memory_bytes:
        return f"it takes {memory_bytes / MB:.0f} MB"
    if limits.seconds is not None and seconds > limits.seconds:
        return f"it takes {seconds:.1f} s"
    return ""


def _smaller(outcome: Outcome, again: Outcome) -> Outcome:
    """The figures of a case that was run twice."""
    wrong, accepted, seconds, memory_bytes = outcome
    return wrong or again[0], accepted, min(seconds, again[2]), min(memory_bytes, again[3])


def _once(kind: Kind, seed: int, folder: Path) -> Outcome:
    from edgezo.errors import EdgezoError

    before_bytes, begun_s, wrong, accepted = _begin(), _cpu_s(), "", False
    try:
        accepted = bool(kind.read(seed, folder))
    except EdgezoError as problem:
        wrong = "" if str(problem).strip() else "an error without a message"
    except Believed as problem:
        wrong = f"believed: {problem}"[:300]
    except KeyboardInterrupt:
        raise
    except BaseException as problem:
        last = traceback.extract_tb(problem.__traceback__)[-1]
        at = f"{Path(last.filename).name}:{last.lineno}"
        wrong = f"{type(problem).__name__} at {at}: {problem}"[:300]
    memory_bytes = max(_peak_bytes() - before_bytes, Elsewhere.memory_bytes)
    return wrong, accepted, _cpu_s() - begun_s, memory_bytes


def _begin() -> int:
    """Forget the peak; the resident bytes from which it grows."""
    Elsewhere.memory_bytes = 0
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    with open("/proc/self/status", "rb") as file:
        text = file.read()
    at = text.index(b"VmHWM:")
    return 1024 * int(text[at + 6 : text.index(b"kB", at)])


def _cpu_s() -> float:
    """Processor time of this process, of children that have ended, and of others."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Elsewhere.cpu_s + sum(usage.ru_utime + usage.ru_stime for usage in used)


def _limit_memory() -> None:
    """What takes far more memory than it may fails in this process, not the machine."""
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + SPARE_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: Iterable[str]) -> None:
    first, second = arguments
    if first == "work":
        todo, folder, limits, table = json.loads(second)
        _work([Part(*part) for part in todo], Path(folder), Limits(*limits), table)
        return
    with tempfile.TemporaryDirectory() as folder:
        begun_s = _cpu_s()
        try:
            accepted: Any = _kind_of(TABLE, first).read(int(second), Path(folder))
        finally:
            print(f"{_cpu_s() - begun_s:.2f} s, peak {_peak_bytes() / MB:.0f} MB")
        print("accepted" if accepted else "refused")


if __name__ == "__main__":  # ``Believed`` is that of this module by its name
    importlib.import_module("fuzz.lane").main(sys.argv[1:])
