"""metrics.jsonl: one line for each step and evaluation; a summary takes its medians from them.

A resume reads times and evaluations back, and with --step auto the sigma and the step that it goes on with. So every
line has a checksum, ``crc``: CRC-32 (8 hexadecimal digits) of the run's identity, of every byte of the file before the
line, and of the line's JSON without it. Lines that are changed, lost, repeated or of another run are thus seen by the
lines after them. The lines with which a file of an earlier version begins have none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import statistics
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgezo.machine.files import to_json, write_error
from edgezo.machine.foreign import parse_json, reading
from edgezo.machine.open_files import open_inside
from edgezo.run.journal_record import StepRecord

_MOVED = ("_read_bytes", "_written_bytes")  # ends of the names of bytes that a step has moved


class MetricsLog:
    """Appends one JSON object a line and hands it to the operating system at once."""

    def __init__(self, path: Path, keep_through: int | None = None, of_run: str = ""):
        """Start an empty file; or go on, and cut lines of steps after ``keep_through`` and an unfinished last line.

        ``of_run`` is the identity of the run that the lines are of, if they are of one. Raises EdgezoError if the file
        can't be written, is a link, or has a line that is damaged.
        """
        self.path, self.of_run = path, of_run
        try:
            self._fd = open_inside(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            self._size_bytes, self._crc = 0, _crc_of(of_run)
        except OSError as error:
            raise write_error(path, "the metrics", error) from error
        try:
            if keep_through is not None:
                self._size_bytes, self._crc = _through(path, keep_through, of_run)
            os.ftruncate(self._fd, self._size_bytes)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise write_error(path, "the metrics", error) from error
            raise

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the file. Raises EdgezoError for one that is damaged."""
        return read_lines(self.path, self.of_run)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. Its "step" is the number of steps done.

        Raises EdgezoError if the disk refuses it; the file is then as before.
        """
        line = _with_crc(record, self._crc)
        data = line.encode()
        try:
            written = os.write(self._fd, data)
            if written < len(data):  # a short write is how a full disk shows first
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written")
        except BaseException as error:
            with contextlib.suppress(
                OSError
            ):  # an unfinished line that stays is cut by the next resume
                os.ftruncate(self._fd, self._size_bytes)
            if isinstance(error, OSError):
                raise write_error(self.path, f"a line of {len(data)} bytes", error) from error
            raise
        self._size_bytes += len(data)
        self._crc = _crc_of(line, self._crc)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RunLog(MetricsLog):
    """The metrics of a run, which a resume reads back: times, evaluations, paces of --step auto."""

    def __init__(self, path: Path, keep_through: int | None = None, of_run: str = ""):
        super().__init__(path, keep_through, of_run)
        self.step_times_s: list[float] = []
        self.forward_times_s: list[float] = []
        self.moved: dict[str, list[int]] = {}  # bytes of blocks elsewhere, one value a step
        self.evaluations: dict[tuple[str, int], dict[str, Any]] = {}  # by when and step
        self.paces: dict[
            int, dict[str, Any]
        ] = {}  # of --step auto, by the step from which they hold
        self.evaluation_s = 0.0  # of the longest evaluation
        self.last_step = self.skipped_steps = 0
        for line in self.lines():
            self._take_in(line)

    def write(self, record: Mapping[str, Any]) -> None:
        super().write(record)
        self._take_in(record)

    def _take_in(self, line: Mapping[str, Any]) -> None:
        if "eval" in line:
            figures = {k: v for k, v in line.items() if k not in ("step", "eval", "took_s")}
            self.evaluation_s = max(self.evaluation_s, line.get("took_s") or 0.0)
            self.evaluations[line["eval"], line["step"]] = figures
            return
        if "pace" in line:
            self.paces[line["step"]] = line["pace"]
            return
        self.last_step = line["step"]
        self.skipped_steps += bool(line.get("skipped"))
        for name, times_s in (("step_s", self.step_times_s), ("forward_s", self.forward_times_s)):
            if line.get(name) is not None:
                times_s.append(line[name])
        for name, value in line.items():
            if name.endswith(_MOVED):
                self.moved.setdefault(name, []).append(value)

    def figures(self) -> dict[str, Any]:
        """Medians: seconds of a step and of a plain forward pass (None if there was none), bytes moved by a step."""
        return {
            "step_s": _median(self.step_times_s),
            "forward_s": _median(self.forward_times_s),
            **{name: int(statistics.median(values)) for name, values in self.moved.items()},
        }


def step_line(record: StepRecord, perturbs: bool) -> dict[str, Any]:
    """The line of a step, as far as its journal record tells it."""
    both = record.losses[:, np.isfinite(record.losses).all(axis=0)]
    spread = both[0] - both[1] if len(both) > 1 else both[0]
    return {
        "step": record.step + 1,
        "loss": mean_loss(record.losses),
        "step_size": record.step_size,
        "delta_std": float(np.std(spread)) if both.size else None,
        "skipped": record.skipped and perturbs,
    }


def mean_loss(losses: np.ndarray) -> float:
    """Mean of the finite losses of (sides, B); NaN if there is none."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if finite.size else float("nan")


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def check_lines(path: Path, of_run: str) -> None:
    """Raise EdgezoError, and change nothing, where a line of the metrics.jsonl of a run is damaged."""
    with contextlib.suppress(FileNotFoundError):
        for _ in _whole_lines(path, of_run):
            pass


def read_lines(path: Path, of_run: str) -> list[dict[str, Any]]:
    """The whole lines of the metrics.jsonl of a run, as far as they are written; [] without the file.

    Raises EdgezoError for one that is damaged.
    """
    with contextlib.suppress(FileNotFoundError):
        return [line.values for line in _whole_lines(path, of_run)]
    return []


def check_form(path: Path) -> None:
    """Raise EdgezoError where a file is no metrics.jsonl of edgezo's, of whatever run it may be."""
    with reading(path), os.fdopen(open_inside(path, os.O_RDONLY), "rb") as file:
        for raw in file:
            if raw.endswith(b"\n") and not _OWN_NAMES & _values_of(raw.decode("utf-8")).keys():
                raise ValueError("a line of it is none that edgezo writes")


class _Line(NamedTuple):
    """A whole line of a file."""

    values: dict[str, Any]  # without its checksum
    size_bytes: int
    crc: int  # of the run and of every byte up to the end of the line


def _through(path: Path, step: int, of_run: str) -> tuple[int, int]:
    """Bytes of the leading lines that are whole and of no step after ``step``, and the checksum of them."""
    size_bytes, crc = 0, _crc_of(of_run)
    for line in _whole_lines(path, of_run):
        if line.values["step"] > step:
            break
        size_bytes, crc = size_bytes + line.size_bytes, line.crc
    return size_bytes, crc


def _whole_lines(path: Path, of_run: str) -> Iterator[_Line]:
    """The lines of a file, without an unfinished one at its end. Raises EdgezoError for a line that is damaged."""
    crc, checked = _crc_of(of_run), False
    way_out = "Restore the file from a copy; without --step auto you can also remove that line and all after it."
    with os.fdopen(open_inside(path, os.O_RDONLY), "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            with reading(f"{path}: line {number:,}", way_out):
                text = raw.decode("utf-8")
                values = _values_of(text)
                if "crc" in values:
                    checked = True
                    del values["crc"]
                    if text != _with_crc(values, crc):
                        raise ValueError(
                            "its checksum does not fit: it or a line before it is damaged"
                        )
                elif checked or _CRC_AT_END.search(text):
                    raise ValueError("it has no checksum")
            crc = zlib.crc32(raw, crc)
            yield _Line(values, len(raw), crc)


def _values_of(text: str) -> dict[str, Any]:
    """A line as a resume may use it. Raises ValueError, TypeError or KeyError for any other."""
    line = parse_json(text)
    if type(line) is not dict or type(line["step"]) is not int or line["step"] < 0:
        raise ValueError("it has no step")
    numbers = [line.get("step_s"), line.get("forward_s")]
    numbers += [value for name, value in line.items() if name.endswith(_MOVED)]
    if "pace" in line:
        if not line.keys() <= {"step", "pace", "crc"}:
            raise ValueError("it has more than a pace")
        numbers += [line["pace"][name] for name in ("sigma", "factor", "began", "took_s")]
    if not all(value is None or type(value) in (int, float) for value in numbers):
        raise ValueError("a number is none")
    if type(line.get("eval", "")) is not str:
        raise ValueError("its evaluation has no name")
    return line


_OWN_NAMES = {"step_size", "eval", "pace"}  # a line has one of them
_CRC_AT_END = re.compile(r'"[0-9a-f]{8}"\}\n$')  # whatever damage has made of the name before it


def _with_crc(values: Mapping[str, Any], before: int) -> str:
    """A line; ``before`` is the checksum of what stands before it."""
    return to_json({**values, "crc": f"{_crc_of(to_json(values), before):08x}"}) + "\n"


def _crc_of(text: str, before: int = 0) -> int:
    return zlib.crc32(text.encode(), before)
