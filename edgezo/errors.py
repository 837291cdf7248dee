"""Errors that a user sees, each with the exit code of the command line's contract.

A message says what happened, with the number, and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class EdgezoError(Exception):
    """Something went wrong that is not a bug of edgezo: bad files, bad data, a full disk."""

    exit_code = 1


class UsageError(EdgezoError):
    """The request itself is wrong. Takes every problem found, so that one run shows them all."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DoesNotFit(EdgezoError):
    """The plan needs more than ``--max-mem``; nothing was started."""

    exit_code = 3


class BudgetExceeded(EdgezoError):
    """The run came too near ``--max-mem`` and stopped with its state saved."""

    exit_code = 4


class BaseMismatch(EdgezoError):
    """A journal belongs to other base weights than the ones given."""

    exit_code = 5


class NoSignal(EdgezoError):
    """The score of a run is the same whatever is perturbed; it stopped with its state saved."""


class Interrupted(EdgezoError):
    """Ctrl-C or SIGTERM; the state is saved and the message holds the resume command."""

    exit_code = 130


class SourceError(Exception):
    """Why one source did not give a model or data; where there is another, it is tried next."""
