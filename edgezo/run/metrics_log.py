"""metrics.jsonl: one line for each step and evaluation; a summary takes its medians from them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgezo.errors import EdgezoError
from edgezo.machine.files import to_json
from edgezo.run.journal_record import StepRecord


class MetricsLog:
    """Appends one JSON object a line and hands it to the operating system at once."""

    def __init__(self, path: Path, keep_through: int | None = None):
        """Start an empty file; or go on, and cut lines of steps after ``keep_through`` and an unfinished last line.

        Raises EdgezoError if the file can't be written.
        """
        self.path = path
        try:
            if keep_through is None:
                self._file = path.open("w", encoding="utf-8", buffering=1)
            else:
                if path.exists():
                    os.truncate(path, _bytes_through(path, keep_through))
                self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise EdgezoError(f"can't write {path}: {error.strerror}") from error

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the file."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. Its "step" is the number of steps done. Raises EdgezoError if the disk refuses it."""
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
            if name.endswith(("_read_bytes", "_written_bytes")):
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


def _bytes_through(path: Path, step: int) -> int:
    """Bytes of the leading lines that are whole and of no step after ``step``."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step_of_line = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n") or step_of_line > step:
                break
            size += len(line)
    return size
