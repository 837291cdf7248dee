"""Pauses between steps, as ``--when``, ``--max-temp`` and ``--max-cpu`` ask: a run that leaves the machine to others.

A pause changes nothing but the time: the step after it is what it would have been. Its time is no training, so it is in
no step's time, and does not count against ``--for`` where that bounds training alone. Where ``--for`` bounds the whole
command, a pause ends with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from edgezo.errors import UsageError
from edgezo.machine.clock import now_s
from edgezo.machine.surroundings import Watch
from edgezo.plan.config import RunConfig

NEXT_LOOK_S = 1.0  # between two looks at the machine
IDLE = 0.25  # on an idle machine other programs take a smaller share of the CPU time than this,
QUIET_LOOKS = (
    10  # and a run that has paused for them goes on after so many looks in a row that say so
)
COOLER_C = 5.0  # a run that has paused for the temperature goes on when it is lower by so much
LEAST_REST_S = 0.05  # shorter rests are put off until they have added up
LEAST_SHARE = (
    0.02  # of the CPU time: where --max-cpu leaves less to this run, it waits for other programs
)

sleep = time.sleep


class Rest(NamedTuple):
    """Why a run does not go on now, and for how long it sleeps before the next look."""

    option: str
    why: str  # "": a rest for what the run itself has computed, which needs no line each time
    seconds: float


class Manners:
    """The pauses of one process of a run."""

    def __init__(self, cfg: RunConfig, note: Callable[[str], None], check: Callable[[int], None]):
        """``note`` shows a line; ``check(step)`` raises where the run was asked to stop."""
        self._cfg, self._note, self._check = cfg, note, check
        self.asked = cfg.when != "always" or cfg.max_temp is not None or cfg.max_cpu is not None
        self._quiet = QUIET_LOOKS  # looks in a row that showed an idle machine
        self._explained = False
        if self.asked:
            self._watch = Watch()
            self._machine, self._looked_s = self._watch.look(), now_s()
            self._begin_again()

    def check_machine(self, resume: bool) -> None:
        """Say what this machine cannot tell.

        Raises UsageError for --max-temp where there is no sensor. A resume, whose run may have begun on another
        machine, goes on without it.
        """
        if not self.asked:
            return
        if self._cfg.max_temp is not None and self._machine.celsius is None:
            if not resume:
                raise UsageError(
                    "--max-temp: this machine reports no temperature of its processor. Leave the option out; "
                    "--max-cpu 50 keeps it cooler."
                )
            self._note("this machine reports no temperature, so --max-temp has no effect")
        if self._cfg.when == "plugged-in" and self._machine.on_battery is None:
            self._note("this machine reports no battery: --when plugged-in has no effect")

    def wait(self, step: int, most_s: float = math.inf) -> float:
        """Pause after ``step`` steps for as long as is asked, and at most ``most_s`` seconds.

        Returns the seconds of the pause. Raises what ``check`` raises, about a second after it would.
        """
        if not self.asked:
            return 0.0
        begun_s, shown, rested = now_s(), "", False
        while (rest := self._rest(rested)) is not None:
            left_s = begun_s + most_s - now_s()
            if left_s <= 0:
                break
            if rest.why and rest.option != shown:
                self._note(f"paused after step {step}, as {rest.option} asks: {rest.why}")
                shown = rest.option
            elif not self._explained and not rest.why:
                self._note(f"rests between steps, as {rest.option} asks")
                self._explained = True
            sleep(min(rest.seconds, left_s))
            rested = True
            self._check(step)
        paused_s = now_s() - begun_s if rested else 0.0
        if shown:
            self._note(f"goes on after a pause of {paused_s:.0f} s")
        if rested or now_s() - self._begun_s >= NEXT_LOOK_S:
            self._begin_again()
        return paused_s

    def _rest(self, resting: bool) -> Rest | None:
        """Why to pause now, or to go on pausing; None where all is well."""
        if now_s() - self._looked_s >= NEXT_LOOK_S:
            self._machine, self._looked_s = self._watch.look(), now_s()
            self._quiet = self._quiet + 1 if self._machine.others < IDLE else 0
        cfg, machine = self._cfg, self._machine
        others = f"other programs take {machine.others:.0%} of the CPU"
        if cfg.when == "plugged-in" and machine.on_battery:
            return Rest("--when plugged-in", "the machine runs on its battery", NEXT_LOOK_S)
        if cfg.when == "idle" and self._quiet < (QUIET_LOOKS if resting else 1):
            return Rest("--when idle", others, NEXT_LOOK_S)
        if cfg.max_temp is not None and machine.celsius is not None:
            if machine.celsius > cfg.max_temp - (COOLER_C if resting else 0):
                hot = f"the processor has {machine.celsius:.0f} C"
                return Rest(f"--max-temp {cfg.max_temp:g}", hot, NEXT_LOOK_S)
        if cfg.max_cpu is None:
            return None
        option, share = f"--max-cpu {cfg.max_cpu:g}", cfg.max_cpu / 100 - machine.others
        if share < LEAST_SHARE:
            return Rest(option, others, NEXT_LOOK_S)
        computed_s = (self._watch.computed_s() - self._computed_s) / self._watch.cores
        rest_s = computed_s / share - (now_s() - self._begun_s)
        return Rest(option, "", min(rest_s, NEXT_LOOK_S)) if rest_s >= LEAST_REST_S else None

    def _begin_again(self) -> None:
        """What the run computes from now on is what the next rest is for."""
        self._begun_s, self._computed_s = now_s(), self._watch.computed_s()
