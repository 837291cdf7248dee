"""The terminal: where results and progress are printed.

Progress goes to standard error; standard output holds results only.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from edgezo.cli.tables import plan_table
from edgezo.run.display import Display, console_on

if TYPE_CHECKING:
    from edgezo.run.opening import Opening


def stdout() -> Console:
    """A console on standard output, for results."""
    return console_on(sys.stdout)


def stderr() -> Console:
    """A console on standard error, for progress."""
    return console_on(sys.stderr)


class TerminalProgress(Display):
    """The display of a command, which may show the whole plan first."""

    def __init__(self, console: Console | None = None, shows_plan: bool = False):
        """``shows_plan``: every item of the plan, before the five lines of the opening."""
        super().__init__(console)
        self._shows_plan = shows_plan

    def opening(self, opening: Opening) -> None:
        if self._shows_plan:
            self._console.print(plan_table(opening.plan))
            self._console.print()
        super().opening(opening)
