"""One setting of a run: its name, kind, bounds, default and help text, and how a value of it is read.

Standard library only.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from edgezo.machine.foreign import clip
from edgezo.machine.meant import nearest, plain_number
from edgezo.zo.presets import DEFAULT, PRESETS, preset_of

MOST_CHOICES_LISTED = 12  # choices that a message lists beside a near one

Kind = Literal["str", "int", "float", "bool", "duration", "bytes", "choice", "train", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """A setting of a run."""

    name: str  # in RunConfig, journals and configuration files
    kind: Kind
    help: str = ""
    brief: str = ""  # one line of it, for a setting of every day; "" for others
    metavar: str = ""  # of the option; "": its choices
    default: Any = None
    default_text: str = ""  # what a run does without a value, where the default does not tell
    example: Any = None  # a value to show where there is no default
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False  # the lowest value itself is not allowed
    choices: tuple[str, ...] = ()
    alias: str = ""  # a shorter name, on the command line and in files
    everything: int | None = None  # the number that "all" in place of a value stands for
    auto: str | None = None  # the setting that "auto" in place of a value switches on
    required: bool = False
    of_preset: bool = False  # the estimator's preset decides it where the request does not
    free_on_resume: bool = False  # may differ when a run is resumed

    @property
    def usual(self) -> Any:
        """What a run takes without a value: the default, or what ``--estimator default`` has. None: it depends."""
        return getattr(preset_of(DEFAULT), self.name) if self.of_preset else self.default

    @property
    def default_words(self) -> str:
        """The default as help texts and pages show it; "" where there is nothing to tell."""
        if self.default_text or self.usual is None:
            return self.default_text
        if self.of_preset and len({getattr(preset, self.name) for preset in PRESETS.values()}) > 1:
            return f"the estimator's; {as_text(self.usual)} by default"
        return as_text(self.usual)

    def read(self, value: Any) -> Any:
        """``value``, from the command line or a file, as RunConfig has it. Raises ValueError or UsageError."""
        match self.kind:
            case "str":
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"needs text, not {value!r}")
                return value
            case "choice":
                if value not in self.choices:
                    raise ValueError(f"{value!r} is not one of {self._listed(value)}")
                return value
            case "bool":
                if not isinstance(value, bool):
                    raise ValueError(f"needs true or false, not {value!r}")
                return value
            case "train":
                return self._read_parts(value)
            case "blocks":
                return value if value in ("all", "auto") else str(self._read_number(value))
        return self._read_number(value)

    def _read_parts(self, value: Any) -> tuple[str, ...]:
        """The parts to train, each once, in the order of the choices."""
        parts = value.split("+") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not parts:
            raise ValueError(
                f"needs one or more of {', '.join(self.choices)} joined by +, not {value!r}"
            )
        names = [part.strip() if isinstance(part, str) else part for part in parts]
        unknown = [name for name in names if name not in self.choices]
        if unknown:
            wrong = ", ".join(map(repr, unknown))
            near = nearest(unknown[0], self.choices)
            raise ValueError(f"{wrong} is not one of {', '.join(self.choices)}; join by +{near}")
        return tuple(name for name in self.choices if name in names)

    def _read_number(self, value: Any) -> int | float:
        if isinstance(value, str):
            value = self._number_of(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            words = [name for name, is_taken in self._words() if is_taken]
            needed = " or ".join(["a number", *words])
            raise ValueError(f"needs {needed}, not {value!r}{plain_number(value)}")
        whole = self.kind in ("int", "bytes", "blocks")
        if not is_finite(value) or (whole and int(value) != value):
            shown = clip(repr(value), 60)
            raise ValueError(f"needs a {'whole' if whole else 'finite'} number, not {shown}")
        value = int(value) if whole else float(value)
        if value < self.low or (self.open_low and value == self.low):
            bound = "above" if self.open_low else "at least"
            raise ValueError(f"must be {bound} {self.low:g}, not {value:g}")
        if value > self.high:
            raise ValueError(f"must be at most {self.high:g}, not {value:g}")
        return value

    def _words(self) -> tuple[tuple[str, bool], ...]:
        """Words, and whether the setting takes them in place of a number."""
        return ("all", self.everything is not None or self.kind == "blocks"), (
            "auto",
            self.auto is not None or self.kind == "blocks",
        )

    def _listed(self, value: object) -> str:
        """The choices, and the nearest; of many choices the nearest alone."""
        near = nearest(value, self.choices)
        if near and len(self.choices) > MOST_CHOICES_LISTED:
            return f"the {len(self.choices)} choices{near}"
        return f"{', '.join(self.choices)}{near}"

    def _number_of(self, text: str) -> int | float | str:
        """The number that ``text`` stands for, in the units of this setting; the text where it is none."""
        if self.kind == "duration":
            return parse_duration(text)
        if self.kind == "bytes":
            # Imported here, because hardware.py imports psutil, which nothing else of a request needs.
            from edgezo.machine.hardware import parse_bytes

            return parse_bytes(text)
        if self.everything is not None and text == "all":
            return self.everything
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
        return text


_TIME_UNITS = {
    **dict.fromkeys(("", "s", "sec", "secs", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}
_TIME_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)", re.ASCII)


def is_finite(number: int | float) -> bool:
    """Whether a float can hold a number. A whole number may be too large for it."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def as_text(value: Any) -> str:
    """A value as the command line takes it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case tuple():
            return "+".join(value)
    return str(value)


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``120s``, ``2min``, ``10m``, ``1.5h``, ``1h30m`` or ``1 day``. Raises ValueError."""
    parts = _TIME_PART.findall(text)
    units = [_TIME_UNITS.get(unit.lower()) for _, unit in parts]
    whole = "".join(number + unit for number, unit in parts) == "".join(text.split())
    known = [unit for unit in units if unit is not None]
    # A number without a unit is seconds, but not behind other units: 1h30 may be minutes. Larger units come first.
    falling = all(before > after for before, after in itertools.pairwise(known))
    unclear = len(parts) > 1 and not parts[-1][1]
    if not parts or not whole or len(known) < len(parts) or not falling or unclear:
        raise ValueError(
            f"{clip(repr(text), 60)} is not a duration; write for example 120s, 10m, 1.5h or 1h30m"
        )
    return math.fsum(float(number) * unit for (number, _), unit in zip(parts, known, strict=True))
