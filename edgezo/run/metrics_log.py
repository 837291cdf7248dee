"""metrics.jsonl: a line for each step and evaluation, and what a summary takes from them."""

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
from edgezo.run.journal import StepRecord


class MetricsLog:
    """Appends one JSON object a line; what is written is with the operating system at once."""

    def __init__(self, path: Path, keep_through: int | None = None):
        """Start anew, or with ``keep_through`` go on: lines of later steps and a torn tail are cut.

        Raises EdgezoError where the file can't be written.
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
        """What the file holds now."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def write(self, record: Mapping[str, Any]) -> None:
        """``record`` has a "step": the number of steps done."""
        try:
            self._file.write(to_json(record) + "\n")
        except OSError as error:
            raise EdgezoError(
                f"can't write {self.path}: {error.strerror}. The run can go on with --resume."
            ) from error

    def close(self) -> None:
        self._file.close()


class RunLog(MetricsLog):
    """The same, with what its lines say of the run so far; a resume reads it back."""

    def __init__(self, path: Path, keep_through: int | None = None):
        super().__init__(path, keep_through)
        self.step_times_s: list[float] = []
        self.forward_times_s: list[float] = []
        self.moved: dict[str, list[int]] = {}  # bytes of weights elsewhere, a step
        self.evaluations: dict[tuple[str, int], dict[str, Any]] = {}  # by when and step
        self.paces: dict[int, dict[str, Any]] = {}  # by the step they hold from
        self.last_step = self.skipped_steps = 0
        for line in self.lines():
            self._take_in(line)

    def write(self, record: Mapping[str, Any]) -> None:
        super().write(record)
        self._take_in(record)

    def _take_in(self, line: Mapping[str, Any]) -> None:
        if "eval" in line:
            found = {k: v for k, v in line.items() if k not in ("step", "eval")}
            self.evaluations[line["eval"], line["step"]] = found
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
        """Medians: seconds of a step and of a plain forward (None where there was none), bytes moved a step."""
        return {
            "step_s": _median(self.step_times_s),
            "forward_s": _median(self.forward_times_s),
            **{name: int(statistics.median(values)) for name, values in self.moved.items()},
        }


def step_line(record: StepRecord, probing: bool) -> dict[str, Any]:
    """A step as far as the journal knows it."""
    both = record.losses[:, np.isfinite(record.losses).all(axis=0)]
    spread = both[0] - both[1] if len(both) > 1 else both[0]
    return {
        "step": record.step + 1,
        "loss": mean_loss(record.losses),
        "step_size": record.step_size,
        "delta_std": float(np.std(spread)) if both.size else None,
        "skipped": record.skipped and probing,
    }


def mean_loss(losses: np.ndarray) -> float:
    """Over what is finite of (sides, B) losses."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if finite.size else float("nan")


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _bytes_through(path: Path, step: int) -> int:
    """Length of the leading part whose lines are whole and of no later step."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                found = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n") or found > step:
                break
            size += len(line)
    return size
