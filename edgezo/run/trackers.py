"""``--log-to``: a run's losses and evaluations in a tracker as well, by transformers' own callback for it.

Nothing is logged elsewhere unless a run asks for it. What a tracker sends over the network, and where it writes, is up
to its own environment variables; the settings below stand where the user has none, so that nothing is sent unasked.
A tracker that fails ends its log, and not the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from typing import Any, NamedTuple

from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerCallback

from edgezo.errors import UsageError
from edgezo.machine.foreign import clip
from edgezo.run.callbacks import TrainerCallbacks
from edgezo.run.directory import RunFiles

_PROJECT = "edgezo"


class Tracker(NamedTuple):
    """What logging to a tracker needs, and what it does unless its environment says otherwise."""

    packages: tuple[str, ...]  # one of these has to be installed
    install: str  # what installs it
    settings: dict[str, str]  # of its environment, where the user has not set them
    where: str  # where its log is
    # Function of the package that opens its store, so that the memory of that is planned, too; "" where there is none.
    opens: str = ""
    ends: str = ""  # function of the package that ends a run; "" where the callback does


TRACKERS = {
    "tensorboard": Tracker(
        ("tensorboard", "tensorboardX"),
        "pip install tensorboard",
        {},
        "in {board} (tensorboard --logdir {board}), or where TENSORBOARD_LOGGING_DIR says",
    ),
    "wandb": Tracker(
        ("wandb",),
        "pip install wandb",
        {
            **{"WANDB_MODE": "offline", "WANDB_PROJECT": _PROJECT, "WANDB_CONSOLE": "off"},
            "WANDB_ERROR_REPORTING": "false",
        },
        "with WANDB_MODE={WANDB_MODE} (online sends it; wandb sync sends later what is offline)",
        ends="finish",
    ),
    "mlflow": Tracker(
        ("mlflow",),
        "pip install mlflow",
        {"MLFLOW_EXPERIMENT_NAME": _PROJECT, "MLFLOW_DISABLE_TELEMETRY": "true"},
        "in this folder, or where MLFLOW_TRACKING_URI says",
        opens="search_experiments",
    ),
    "trackio": Tracker(
        ("trackio",),
        "pip install trackio",
        {"GRADIO_ANALYTICS_ENABLED": "False"},
        "on this machine (trackio show), or where TRACKIO_SPACE_ID says",
    ),
}


def tracker_callback(name: str) -> TrainerCallback:
    """transformers' callback for a tracker, which it imports: what that takes is part of the process that is planned.

    Raises UsageError, with the command that installs it, where the tracker is not there.
    """
    tracker = TRACKERS[name]
    if not any(importlib.util.find_spec(package) for package in tracker.packages):
        raise UsageError(
            f"--log-to {name} needs the package {tracker.packages[0]}, which is not installed: {tracker.install}"
        )
    for setting, value in tracker.settings.items():
        os.environ.setdefault(setting, value)
    try:
        with redirect_stdout(sys.stderr):
            (kind,) = get_reporting_integration_callbacks([name])
            callback: TrainerCallback = kind()
            if tracker.opens:
                getattr(importlib.import_module(tracker.packages[0]), tracker.opens)()
    except Exception as problem:  # whatever a package raises that does not work here
        raise UsageError(
            f"--log-to {name}: the package {tracker.packages[0]} cannot be used ({_first_line(problem)}). "
            f"Install it again ({tracker.install}), or leave the option out."
        ) from problem
    return callback


class TrackerLog(TrainerCallbacks):
    """A RunProgress that passes a run on to a tracker. ``note`` gets where the log is, and why it ends early."""

    def __init__(self, name: str, files: RunFiles, note: Callable[[str], None]):
        """Raises UsageError where the tracker is not there."""
        callback = tracker_callback(name)
        if (
            getattr(callback, "logging_dir", "") is None
        ):  # TensorBoard's, without a place of its own
            callback.logging_dir = str(files.board)  # type: ignore[attr-defined]
        super().__init__([callback], run_name=files.path.name, project=_PROJECT)
        self._name, self._note, self._failed = name, note, False
        self._where = TRACKERS[name].where.format(board=files.board, **os.environ)

    def begin(self, *, done: int, steps: int | None, cap_bytes: int, counted: str = "step") -> None:
        """Say where the log is, and open it."""
        if counted == "step":
            self._note(f"logged to {self._name} {self._where}")
        super().begin(done=done, steps=steps, cap_bytes=cap_bytes, counted=counted)

    def end(self) -> None:
        """The run is over, or was interrupted: end its log."""
        tracker = TRACKERS[self._name]
        with suppress(Exception), redirect_stdout(sys.stderr):  # it may have failed before
            if tracker.ends:
                getattr(importlib.import_module(tracker.packages[0]), tracker.ends)()

    def _call(self, event: str, **more: Any) -> None:
        if self._failed:
            return
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the result
                super()._call(event, **more)
        except Exception as problem:  # a full disk, a network that is gone, a login that is missing
            self._failed = True
            self._note(
                f"--log-to {self._name} has failed: the run goes on, and logs nothing more there "
                f"({_first_line(problem)})"
            )


def _first_line(problem: Exception) -> str:
    return clip(str(problem).strip().partition("\n")[0], 200) or type(problem).__name__
