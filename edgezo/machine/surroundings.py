"""What a run that is to disturb nobody looks at: the battery, the temperature, and what other programs compute.

All of it is what psutil reports. Nothing here imports torch.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil

from edgezo.machine.clock import now_s

# Sensors of processors, by the names of their drivers. Where none of them is there, the hottest of all sensors counts.
PROCESSOR_SENSORS = frozenset(
    ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "acpitz")
)


class Surroundings(NamedTuple):
    """The machine at one moment."""

    on_battery: bool | None  # None: it has no battery
    celsius: float | None  # of the hottest sensor of a processor; None: no sensor can be read
    others: float  # the share of the CPU time of all cores, since the last look, that other programs took: 0 to 1


class Watch:
    """Looks at the machine; shares of CPU time are those since the last look."""

    def __init__(self) -> None:
        self.cores = psutil.cpu_count() or 1
        self._at_s, self._computed_s = now_s(), self.computed_s()
        psutil.cpu_percent()  # which counts from now on

    def computed_s(self) -> float:
        """Seconds of CPU time that all threads of this process have taken since it began."""
        return time.process_time()

    def look(self) -> Surroundings:
        """The machine now."""
        at_s, computed_s = now_s(), self.computed_s()
        passed_s = self.cores * (at_s - self._at_s)
        mine = (computed_s - self._computed_s) / passed_s if passed_s > 0 else 0.0
        self._at_s, self._computed_s = at_s, computed_s
        others = min(1.0, max(0.0, psutil.cpu_percent() / 100 - mine))
        return Surroundings(on_battery(), celsius(), others)


def on_battery() -> bool | None:
    """Whether the machine takes its power from a battery now; None where it has none."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def celsius() -> float | None:
    """The temperature of the hottest sensor of a processor; None where the system reports none."""
    if not hasattr(psutil, "sensors_temperatures"):
        return None  # macOS and Windows
    sensors = psutil.sensors_temperatures()
    chosen = PROCESSOR_SENSORS & sensors.keys() or sensors.keys()
    return max((reading.current for name in chosen for reading in sensors[name]), default=None)
