"""How a signal ends a run: between two steps, with everything saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from edgezo.errors import Interrupted
from edgezo.run.directory import RunFiles


@dataclass
class StopRequest:
    """Whether Ctrl-C or SIGTERM has asked the run to stop between two steps."""

    files: RunFiles
    asked: bool = False
    # In a run of several processes: whether all have agreed to stop. A step that some leave out is waited for.
    agreed: Callable[[bool], bool] | None = None

    def check(self, step: int) -> None:
        """Raise Interrupted, with the command that goes on, if the run was asked to stop."""
        if self.asked if self.agreed is None else self.agreed(self.asked):
            raise Interrupted(
                f"stopped after step {step}; everything is saved in {self.files.path}.\n"
                f"Go on with: edgezo finetune --resume --out {self.files.path}"
            )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a first signal asks the run to stop between two steps, and a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
