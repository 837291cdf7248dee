"""The terminal: where results and progress are printed, and the live line of a run.

Progress goes to standard error; standard output holds results only.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from edgezo.cli.tables import opening_lines, plan_table
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


def stdout() -> Console:
    """A console on standard output, for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """A console on standard error, for progress."""
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
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


class TerminalProgress(Silent):
    """A RunProgress that prints: one live line on a terminal, about ``PLAIN_LINES`` plain lines elsewhere."""

    refreshes_per_s = REFRESHES_PER_S

    def __init__(self, console: Console | None = None, shows_plan: bool = False):
        """``shows_plan``: every item of the plan, before the five lines of the opening."""
        self._console = console or stderr()
        self._shows_plan = shows_plan
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._total = ""
        self._cap = ""
        self._metric = ""
        self._shown = 0.0  # fraction of the run at the last plain line
        self._start_s = self._shown_s = 0.0
        self._counted = "step"
        self._evaluates = False  # the live line is that of an evaluation
        self._start_fraction: float | None = None  # of the run, when this process began

    def note(self, text: str) -> None:
        console = self._live.console if self._live is not None else self._console
        console.print(Text(text))

    def opening(self, opening: Opening) -> None:
        if self._shows_plan:
            self._console.print(plan_table(opening.plan))
            self._console.print()
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
        """Begin the live line, on a terminal."""
        if not self._console.is_terminal:
            return
        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            refresh_per_second=REFRESHES_PER_S,
        )
        self._task = self._live.add_task("starting", total=1.0)
        self._live.start()

    def evaluated(self, rows: int, total: int) -> None:
        line = f"evaluating: row {rows}/{total}"
        if self._live is None and self._console.is_terminal and rows < total:
            self._draw()
            self._evaluates = True
        if self._live is not None and self._task is not None:
            whole = rows / total if self._evaluates else None  # else the line is that of training
            self._live.update(self._task, completed=whole, description=line)
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
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=fraction, description=line)
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
