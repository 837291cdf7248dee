"""metrics.jsonl: one line for each step and evaluation; a summary takes its medians from them.

A resume reads times and evaluations back, and with --step auto the sigma and the step that it goes on with: the only
numbers here that weights depend on, so those lines have a checksum.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgezo.errors import EdgezoError
from edgezo.machine.files import to_json
from edgezo.machine.foreign import parse_json, reading
from edgezo.machine.open_files import open_inside
from edgezo.run.journal_record import StepRecord

_MOVED = ("_read_bytes", "_written_bytes")  # ends of the names of bytes that a step has moved


class MetricsLog:
    """Appends one JSON object a line and hands it to the operating system at once."""

    def __init__(self, path: Path, keep_through: int | None = None):
        """Start an empty file; or go on, and cut lines of steps after ``keep_through`` and an unfinished last line.

        Raises EdgezoError if the file can't be written, is a link, or has a line that is damaged.
        """
        self.path = path
        try:
            fd = open_inside(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise EdgezoError(f"can't write {path}: {error.strerror}") from error
        self._file = os.fdopen(fd, "a", encoding="utf-8", buffering=1)
        try:
            os.ftruncate(fd, 0 if keep_through is None else _bytes_through(path, keep_through))
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise EdgezoError(f"can't write {path}: {error.strerror}") from error
            raise

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the file. Raises EdgezoError for one that is damaged."""
        return [line for line, _ in _whole_lines(self.path)]

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. Its "step" is the number of steps done. Raises EdgezoError if the disk refuses it."""
        if "pace" in record:
            record = {**record, "crc": _crc_of(record)}
        try:
            self._file.write(to_json(record) + "\n")
        except OSError as error:
            raise EdgezoError(
                f"can't write {self.path}: {error.strerror}. The run can go on with --resume."
            ) from error

    def close(self) -> None:
        self._file.close()


class RunLog(MetricsLog):
    """The metrics of a run, which a resume reads back: times, evaluations, paces of --step auto."""

    def __init__(self, path: Path, keep_through: int | None = None):
        super().__init__(path, keep_through)
        self.step_times_s: list[float] = []
        self.forward_times_s: list[float] = []
        self.moved: dict[str, list[int]] = {}  # bytes of blocks elsewhere, one value a step
        self.evaluations: dict[tuple[str, int], dict[str, Any]] = {}  # by when and step
        self.paces: dict[
            int, dict[str, Any]
        ] = {}  # of --step auto, by the step from which they hold
        self.last_step = self.skipped_steps = 0
        for line in self.lines():
            self._take_in(line)

    def write(self, record: Mapping[str, Any]) -> None:
        super().write(record)
        self._take_in(record)

    def _take_in(self, line: Mapping[str, Any]) -> None:
        if "eval" in line:
            figures = {k: v for k, v in line.items() if k not in ("step", "eval")}
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


def check_lines(path: Path) -> None:
    """Raise EdgezoError, and change nothing, where a line of a run's metrics.jsonl is damaged."""
    with contextlib.suppress(FileNotFoundError):
        for _ in _whole_lines(path):
            pass


def _bytes_through(path: Path, step: int) -> int:
    """Bytes of the leading lines that are whole and of no step after ``step``."""
    size = 0
    for line, size_bytes in _whole_lines(path):
        if line["step"] > step:
            break
        size += size_bytes
    return size


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The lines of a file with their bytes, without an unfinished one at its end.

    Raises EdgezoError for a line that is damaged.
    """
    with os.fdopen(open_inside(path, os.O_RDONLY), "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            way_out = (
                "Restore the file from a copy; without --step auto you can also remove that line."
            )
            with reading(f"{path}: line {number:,}", way_out):
                line = _line_of(raw)
            yield line, len(raw)


def _line_of(raw: bytes) -> dict[str, Any]:
    """A line as a resume may use it. Raises ValueError, TypeError or KeyError for any other."""
    line = parse_json(raw.decode("utf-8"))
    if type(line) is not dict or type(line["step"]) is not int or line["step"] < 0:
        raise ValueError("it has no step")
    numbers = [line.get("step_s"), line.get("forward_s")]
    numbers += [value for name, value in line.items() if name.endswith(_MOVED)]
    if "pace" in line or "crc" in line:
        if "crc" in line and line["crc"] != _crc_of({"step": line["step"], "pace": line["pace"]}):
            raise ValueError("its checksum does not fit")
        if not line.keys() <= {"step", "pace", "crc"}:
            raise ValueError("it has more than a pace")
        numbers += [line["pace"][name] for name in ("sigma", "factor", "began", "took_s")]
    if not all(value is None or type(value) in (int, float) for value in numbers):
        raise ValueError("a number is none")
    if type(line.get("eval", "")) is not str:
        raise ValueError("its evaluation has no name")
    return line


def _crc_of(line: Mapping[str, Any]) -> str:
    """CRC (8 hexadecimal digits) of the JSON of a line."""
    return f"{zlib.crc32(to_json(line).encode()):08x}"
