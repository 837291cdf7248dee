"""What a run reports while it goes on: the protocol of a progress display, one that shows nothing, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from edgezo.machine.hardware import format_bytes

if TYPE_CHECKING:
    from edgezo.run.opening import Opening


class RunProgress(Protocol):
    """What a run reports while it goes on; pass your own object to ``finetune`` as a callback."""

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

    def close(self) -> None:
        """Training is over, or was interrupted."""
        ...


class LiveProgress(RunProgress, Protocol):
    """Progress that is drawn anew while a run waits."""

    refreshes_per_s: int

    def refresh(self) -> None:
        """Draw it now."""
        ...


class Silent:
    """A RunProgress that shows nothing."""

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

    def close(self) -> None: ...


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
