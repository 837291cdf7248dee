"""What a run shows of itself while it goes on: a live line in a terminal or a notebook, plain lines elsewhere.

It goes to standard error, since standard output is for results; in a notebook it is shown below the cell.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from edgezo.machine.clock import now_s
from edgezo.machine.hardware import format_bytes
from edgezo.run.progress import Silent

if TYPE_CHECKING:
    from edgezo.run.opening import Opening

PLAIN_LINES = (
    20  # about how many lines of progress a run prints where standard error is no terminal
)
PLAIN_PAUSE_S = 5  # at least between lines of what is not training
REFRESHES_PER_S = 2  # how often the live line is drawn; each time costs about a millisecond
LEAST_WIDTH = 40  # columns; below it a table would have no room for a letter
PLAIN_WIDTH = 110  # columns of a table that goes to a file or a pipe


def console_on(file: TextIO) -> Console:
    """A console as wide as the terminal or ``COLUMNS``, else ``PLAIN_WIDTH`` columns; never too narrow for a table."""
    for name in (
        "COLUMNS",
        "LINES",
    ):  # no number, or 0 where nobody knows it: as if it were not there
        if re.fullmatch("0*[1-9][0-9]{0,5}", os.environ.get(name, "1"), re.ASCII) is None:
            del os.environ[name]
    width = None if file.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    console = Console(file=file, highlight=False, width=width)
    if console.width < LEAST_WIDTH:
        console.width = LEAST_WIDTH
    return console


def opening_lines(lines: Sequence[tuple[str, str]]) -> RenderableType:
    """What a run is about to do, a line each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what", no_wrap=True, style="bold")
    table.add_column("text")
    for what, text in lines:
        table.add_row(what, Text(text))
    return table


class _LiveLine(Protocol):
    """A line that is drawn again and again in its place."""

    def update(self, text: str, fraction: float | None) -> None:
        """``fraction`` of the whole is done; None: as before."""
        ...

    def refresh(self) -> None:
        """Draw it now."""
        ...

    def stop(self) -> None:
        """It is not drawn again."""
        ...


def _columns() -> list[Any]:
    bar = (BarColumn(bar_width=20), TaskProgressColumn())
    return [TextColumn("{task.description}"), *bar, TextColumn("eta"), TimeRemainingColumn()]


class _TerminalLine:
    """A line at the end of a terminal, which a thread draws."""

    def __init__(self, console: Console):
        self._progress = Progress(
            *_columns(), console=console, transient=True, refresh_per_second=REFRESHES_PER_S
        )
        self._task = self._progress.add_task("starting", total=1.0)
        self._progress.start()

    def update(self, text: str, fraction: float | None) -> None:
        self._progress.update(self._task, completed=fraction, description=text)

    def refresh(self) -> None:
        self._progress.refresh()

    def stop(self) -> None:
        self._progress.stop()


class _NotebookLine:
    """A line below the cell of a notebook. rich draws its own by ipywidgets, which need not be there."""

    def __init__(self, console: Console):
        from IPython.display import display  # there is no notebook without it

        self._progress = Progress(*_columns(), console=console, auto_refresh=False)
        self._task = self._progress.add_task("starting", total=1.0)
        self._place = display(self._drawn(), display_id=True)
        self._drawn_s = now_s()

    def _drawn(self) -> Table:
        return self._progress.make_tasks_table(self._progress.tasks)

    def update(self, text: str, fraction: float | None) -> None:
        self._progress.update(self._task, completed=fraction, description=text)
        if now_s() - self._drawn_s >= 1 / REFRESHES_PER_S:
            self.refresh()

    def refresh(self) -> None:
        self._drawn_s = now_s()
        self._place.update(self._drawn())

    def stop(self) -> None:
        self.refresh()


class Display(Silent):
    """A RunProgress that shows a live line in a terminal or a notebook, about ``PLAIN_LINES`` plain lines elsewhere."""

    refreshes_per_s = REFRESHES_PER_S

    def __init__(self, console: Console | None = None):
        """``console``: where it is shown; None: on standard error, or below the cell of a notebook."""
        self._console = console or console_on(sys.stderr)
        self._live: _LiveLine | None = None
        self._total = ""
        self._cap = ""
        self._metric = ""
        self._shown = 0.0  # fraction of the run at the last plain line
        self._start_s = self._shown_s = 0.0
        self._counted = "step"
        self._evaluates = False  # the live line is that of an evaluation
        self._start_fraction: float | None = None  # of the run, when this process began

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def opening(self, opening: Opening) -> None:
        self._console.print(opening_lines(opening.lines()))

    def begin(self, *, done: int, steps: int | None, cap_bytes: int, counted: str = "step") -> None:
        self._counted = counted
        self._total = f"/{steps}" if steps is not None else ""
        self._cap = format_bytes(cap_bytes)
        self._start_s, self._start_fraction, self._shown = now_s(), None, 0.0
        if done and counted == "step":
            self.note(f"resuming after step {done}")
        self._draw()

    def _draw(self) -> None:
        """Begin the live line, where there can be one."""
        if self._console.is_jupyter:
            self._live = _NotebookLine(self._console)
        elif self._console.is_terminal:
            self._live = _TerminalLine(self._console)

    def evaluated(self, rows: int, total: int) -> None:
        line = f"evaluating: row {rows}/{total}"
        if self._live is None and rows < total:
            self._draw()
            self._evaluates = self._live is not None
        if self._live is not None:
            self._live.update(
                line, rows / total if self._evaluates else None
            )  # else it is training's
            if self._evaluates and rows == total:
                self.close()
        elif rows < total and now_s() - self._shown_s >= PLAIN_PAUSE_S:
            self._shown_s = now_s()
            self.note(line)

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
        self._metric = metric or self._metric
        parts = [f"{self._counted} {step}{self._total}"]
        parts += [] if loss is None else [f"loss {loss:.4f}"]
        parts += [self._metric] if self._metric else []
        parts += [f"{step_s:.2f} s/{self._counted}", f"mem {format_bytes(rss_bytes)}/{self._cap}"]
        line = "  ".join(parts)
        if self._live is not None:
            self._live.update(line, fraction)
            return
        if self._start_fraction is None:
            self._start_fraction = fraction
        elif metric == "" and fraction < 1 and fraction - self._shown < 1 / PLAIN_LINES:
            return
        if self._counted != "step" and fraction < 1 and now_s() - self._shown_s < PLAIN_PAUSE_S:
            return
        self._shown, self._shown_s = fraction, now_s()
        self.note(line + self._eta(fraction))

    def _eta(self, fraction: float) -> str:
        """The seconds to go at the pace of this process, as text; empty until there is a pace."""
        done = fraction - (self._start_fraction or 0.0)
        if done <= 0 or fraction >= 1:
            return ""
        remaining_s = (now_s() - self._start_s) * (1 - fraction) / done
        return f"  eta {remaining_s:.0f} s"

    def refresh(self) -> None:
        """Draw the live line now."""
        if self._live is not None:
            self._live.refresh()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live, self._evaluates = None, False
