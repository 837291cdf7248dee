"""What the loop of a run does on every engine between its steps: time, pauses, evaluations, lines that a kill left out.

train.py and onnx_train.py have the loops themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from edgezo.run.clock import Pause, TrainingClock
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal_record import StepRecord
from edgezo.run.progress import peaks_line
from edgezo.run.run_parts import RunParts


class MakesSteps(Protocol):
    """A stepper, of any engine."""

    @property
    def perturbs(self) -> bool: ...

    def save(self, step: int) -> None: ...


State = TypeVar("State", bound=RunParts[Any, Any])
StepperOf = TypeVar("StepperOf", bound=MakesSteps)


class TrainingLoop(ABC, Generic[State, StepperOf]):
    """One run in progress, from its first step to its summary."""

    def __init__(
        self, state: State, stepper: StepperOf, done: int, readout: FittedProbe | None
    ) -> None:
        self.state, self.stepper = state, stepper
        self.done = done  # steps before this process
        self.readout = readout
        self.budget_s = math.inf  # seconds of training that --for leaves

    # -- what an engine has of its own --------------------------------------------------------------------

    @abstractmethod
    def _evaluate(self, when: str, step: int = 0) -> dict[str, Any]:
        """Evaluate once: a resumed run knows what was evaluated before."""

    @abstractmethod
    def _line(self, record: StepRecord) -> dict[str, Any]:
        """The line of a step, without what was measured."""

    @abstractmethod
    def _peaks(self) -> dict[str, Any]:
        """The figures that a run's memory is judged by: planned, measured, inference, cap."""

    @property
    def _evaluates_when_asked(self) -> bool:
        """Whether whoever watches the run may ask for an evaluation."""
        return True

    # -- between two steps --------------------------------------------------------------------------------

    def _do_as_asked(self, step: int, clock: TrainingClock) -> None:
        """Evaluate and save before a step, where the request or whoever watches the run asks for it."""
        every, asks = self.state.cfg.eval_every, self.state.progress.asks()
        asked = asks.evaluate and self._evaluates_when_asked
        if asked or (every and step and step % every == 0):
            with self._pause(clock):
                self._evaluate("during", step)
        if asks.save:
            self.stepper.save(step)

    def _rests(self, step: int, clock: TrainingClock) -> bool:
        """Pause where the request asks for it; whether there was a pause, in which the time may have run out."""
        state = self.state
        if not state.manners.asked:
            return False
        most_s = state.box.longest_pause_s(self.budget_s - clock.seconds())
        with self._pause(clock):
            return state.manners.wait(step, most_s) > 0

    def _fraction(self, step: int, train_s: float) -> float:
        """How much of the run is over, by steps or by time."""
        steps = self.state.cfg.steps
        return step / steps if steps else self._fraction_of_time(train_s)

    def _fraction_of_time(self, train_s: float) -> float:
        return train_s / self.budget_s if self.budget_s > 0 else 1.0

    @contextmanager
    def _pause(self, clock: TrainingClock) -> Iterator[Pause]:
        """A block that does not count as training, but is inside the box of the whole command."""
        with clock.paused() as pause:
            yield pause
        if self.state.box.began_s is not None:
            self.budget_s -= pause.seconds

    def _seconds_before(self) -> float:
        """Seconds of training so far: steps of earlier processes, the linear probe, and what --step auto measured."""
        log, readout = self.state.log, self.readout
        spent_s = sum(log.step_times_s)
        if readout is not None and self.state.cfg.parent is None:  # else a parent has fitted it
            spent_s += readout.fit_s
        return spent_s + sum(pace["took_s"] for pace in log.paces.values())

    # -- beside the loop ----------------------------------------------------------------------------------

    def _write_lost_lines(self) -> None:
        """Write to metrics.jsonl the steps whose lines a kill left out."""
        log = self.state.log
        for record in self.state.journal.records(log.last_step):
            if record.step < self.done:
                log.write({**self._line(record), "step_s": None, "rss_bytes": None})

    def _save_and_report(self, step: int) -> None:
        """Save the state of a run that ends early, and say what memory it has taken."""
        self.stepper.save(step)
        self.state.progress.note(f"peak memory: {peaks_line(self._peaks())}")
