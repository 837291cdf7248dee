"""What a run reports while it goes on: its protocol, an object that shows nothing, several as one, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edgezo.machine.hardware import format_bytes

if TYPE_CHECKING:
    from edgezo.run.opening import Opening


class Asks(NamedTuple):
    """What is asked of a run between two steps."""

    stop: bool = False  # end as if this had been the last step
    evaluate: bool = False
    save: bool = False  # make the state durable now


class RunProgress(Protocol):
    """What a run reports while it goes on. Derive your own object from ``Silent``, which does nothing of it."""

    def note(self, text: str) -> None:
        """Something worth a line: a file that is fetched, rows that were cut."""
        ...

    def opening(self, opening: Opening) -> None:
        """What the run is about to do: its plan, and what it was made for."""
        ...

    def begin(self, *, done: int, steps: int | None, cap_bytes: int, counted: str = "step") -> None:
        """Training starts after ``done`` steps, or a pass over rows; ``steps`` is None where time bounds it.

        ``counted`` is what ``step`` counts: a step, or a batch of a pass.
        """
        ...

    def step(
        self,
        step: int,
        *,
        fraction: float,
        loss: float | None,
        step_s: float,
        rss_bytes: int,
        metric: str = "",
    ) -> None:
        """Step number ``step`` (from 1) is done, and ``fraction`` (0 to 1) of the run with it.

        ``loss`` is None where none is computed.
        """
        ...

    def evaluated(self, rows: int, total: int) -> None:
        """An evaluation has been over ``rows`` of its ``total`` rows."""
        ...

    def before_step(self, step: int) -> None:
        """Step number ``step`` (from 1) begins."""
        ...

    def logged(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl is written: of a step, or of an evaluation (``eval``)."""
        ...

    def saved(self, step: int) -> None:
        """The state after ``step`` steps is on disk, so that a resume goes on from there."""
        ...

    def asks(self) -> Asks:
        """What the run is to do before its next step."""
        ...

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is complete; ``summary`` is what summary.json holds."""
        ...

    def close(self) -> None:
        """Training is over, or was interrupted; an evaluation may follow."""
        ...


class LiveProgress(RunProgress, Protocol):
    """Progress that is drawn anew while a run waits."""

    refreshes_per_s: int

    def refresh(self) -> None:
        """Draw it now."""
        ...


class Silent:
    """A RunProgress that shows nothing, and asks for nothing."""

    def note(self, text: str) -> None: ...

    def opening(self, opening: Opening) -> None: ...

    def begin(
        self, *, done: int, steps: int | None, cap_bytes: int, counted: str = "step"
    ) -> None: ...

    def step(
        self,
        step: int,
        *,
        fraction: float,
        loss: float | None,
        step_s: float,
        rss_bytes: int,
        metric: str = "",
    ) -> None: ...

    def evaluated(self, rows: int, total: int) -> None: ...

    def before_step(self, step: int) -> None: ...

    def logged(self, line: Mapping[str, Any]) -> None: ...

    def saved(self, step: int) -> None: ...

    def asks(self) -> Asks:
        return Asks()

    def finished(self, summary: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Several:
    """A RunProgress that passes everything on to several others, in their order."""

    def __init__(self, others: Sequence[RunProgress]):
        self._others = others

    def note(self, text: str) -> None:
        for other in self._others:
            other.note(text)

    def opening(self, opening: Opening) -> None:
        for other in self._others:
            other.opening(opening)

    def begin(self, **how: Any) -> None:
        for other in self._others:
            other.begin(**how)

    def step(self, step: int, **figures: Any) -> None:
        for other in self._others:
            other.step(step, **figures)

    def evaluated(self, rows: int, total: int) -> None:
        for other in self._others:
            other.evaluated(rows, total)

    def before_step(self, step: int) -> None:
        for other in self._others:
            other.before_step(step)

    def logged(self, line: Mapping[str, Any]) -> None:
        for other in self._others:
            other.logged(line)

    def saved(self, step: int) -> None:
        for other in self._others:
            other.saved(step)

    def asks(self) -> Asks:
        """What any of them asks for."""
        return Asks(*map(any, zip(*(other.asks() for other in self._others), strict=True)))

    def finished(self, summary: Mapping[str, Any]) -> None:
        for other in self._others:
            other.finished(summary)

    def close(self) -> None:
        for other in self._others:
            other.close()


def _has(summary: Mapping[str, Any], *names: str) -> bool:
    return all(summary.get(name) is not None for name in names)


def peaks_line(summary: Mapping[str, Any]) -> str:
    """Planned, measured, inference, cap: the peaks by which a run is judged."""
    unit = "cuda" if _has(summary, "cuda_peak_bytes") else "rss"
    peak = summary["cuda_peak_bytes" if unit == "cuda" else "peak_rss_bytes"]
    parts = [f"measured {format_bytes(peak)}"]
    if _has(summary, "planned_peak_bytes"):
        parts.insert(0, f"planned {format_bytes(summary['planned_peak_bytes'])}")
    if _has(summary, f"inference_peak_{unit}_bytes"):
        inference = summary[f"inference_peak_{unit}_bytes"]
        parts.append(f"{peak / inference:.2f} x inference {format_bytes(inference)}")
    if _has(summary, "max_mem_bytes"):
        cap = summary["max_mem_bytes"]
        kept = "kept" if peak <= cap else "NOT kept"
        parts.append(f"cap {format_bytes(cap)} {kept} ({100 * peak / cap:.0f} % used)")
    return ", ".join(parts)
