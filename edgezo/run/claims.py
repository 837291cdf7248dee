"""The gate before a run or a replay writes: its directory is new, empty or edgezo's, and so is each file it replaces.

The marker of a directory (machine/ownership.py) says what edgezo made it for. It can have come with a copy of other
files, and a user may have put a config.toml beside it: so each file that is there has to show whose it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from edgezo.data.row_files import SKIPPED_BEGIN
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import is_leftover
from edgezo.machine.foreign import MOST_TOML_BYTES, parse_json, read_small
from edgezo.machine.open_files import files_inside, open_to_read
from edgezo.machine.ownership import check_made, claim
from edgezo.network.state_file import STATES_MAGIC
from edgezo.plan.request import from_toml, read_run_config
from edgezo.run.directory import PARENT_NAMES, PROBE_KEYS, RunFiles
from edgezo.run.given import GIVEN_MODEL, GIVEN_ROWS, is_given
from edgezo.run.journal import open_journal
from edgezo.run.metrics_log import check_form
from edgezo.weights.overlay_names import OVERLAY_MAGIC, OVERLAY_NAMES

Form = Callable[[Path], bool]
BOARD_NAMES = re.compile(r"events\.out\.tfevents\..+")  # TensorBoard's
_MOST_JSON_BYTES = 64 << 20


def _config(path: Path) -> bool:
    return read_run_config(path).to_toml().encode() == read_small(path, MOST_TOML_BYTES)


def _json(key: str, path: Path) -> bool:
    return key in parse_json(read_small(path, _MOST_JSON_BYTES).decode("utf-8"))


def _skipped(path: Path) -> bool:
    with os.fdopen(open_to_read(path), "rb") as file:
        return file.read(len(SKIPPED_BEGIN)) == SKIPPED_BEGIN


def _metrics(path: Path) -> bool:
    check_form(path)
    return True


def _saved(keys: set[str], path: Path) -> bool:
    from edgezo.weights.verified import open_saved  # it imports torch, which few directories need

    with open_saved(path, keys, None, ""):
        return True


def _report(path: Path) -> bool:
    from edgezo.run.report import is_report_file

    return is_report_file(path)


def _probe(path: Path) -> bool:
    return _saved(set(PROBE_KEYS), path)


def _journal(path: Path) -> bool:
    open_journal(path, resume=False).close()
    return True


def _begins(magic: bytes, path: Path) -> bool:
    """Whether a file begins so, or has not been begun to be written: a kill leaves it empty, or zeros."""
    with os.fdopen(open_to_read(path), "rb") as file:
        start = file.read(len(magic))
    return magic.startswith(start) or not any(start)


def _overlay(folder: Path) -> bool:
    return all(
        _begins(OVERLAY_MAGIC, folder / name) for name in files_inside(folder, OVERLAY_NAMES)
    )


def _of_parent(folder: Path) -> bool:
    forms: dict[str, Form] = {
        "head.safetensors": partial(_saved, {"step"}),
        "probe.safetensors": _probe,
    }
    names = files_inside(folder, PARENT_NAMES)
    others = [name for name in os.listdir(folder) if name not in names]
    return all(map(is_leftover, others)) and all(
        forms.get(name, _journal)(folder / name) for name in names
    )


def _board(folder: Path) -> bool:
    files = files_inside(folder, BOARD_NAMES)
    return files.keys() == set(os.listdir(folder)) and all(_events(folder / f) for f in files)


def _events(path: Path) -> bool:
    """Whether a file is one of TensorBoard's, or was not begun to be written."""
    with os.fdopen(open_to_read(path), "rb") as file:
        start = file.read(64)
    return not start or b"brain.Event" in start


# By name, for directories of a run and of a replay.
FORMS: Mapping[str, Form] = {
    "config.toml": _config,
    "plan.json": partial(_json, "planned_peak_bytes"),
    "metrics.jsonl": _metrics,
    "summary.json": partial(_json, "trained_sha256"),
    "skipped.jsonl": _skipped,
    "profile.json": partial(_json, "phases"),
    "predictions.json": partial(_json, "shown"),
    "asked.json": partial(_json, "untouched"),
    "report.html": _report,
    "replay.json": partial(_json, "trained_sha256"),
    "head.safetensors": partial(_saved, {"step"}),
    "trained.safetensors": partial(_saved, {"steps"}),
    "probe.safetensors": _probe,
    "states.safetensors": partial(_saved, {"rows"}),
    "probe.states": partial(_begins, STATES_MAGIC),
    "journal.bin": _journal,
    "journal-again.bin": partial(_begins, b"EZ"),
    "overlay": _overlay,
    GIVEN_ROWS: is_given,
    GIVEN_MODEL: is_given,
    "parent": _of_parent,
    "tensorboard": _board,
}


RUN, REPLAY = "run", "replay"  # kinds of directories (machine/ownership.py)


def prepare(run: RunFiles) -> None:
    """Make the directory of a new run. Raises UsageError, and changes nothing, where a run or other files are."""
    if os.path.lexists(run.journal):
        raise UsageError(
            f"{run.path} already holds a run. Go on with it (--resume --out {run.path}), "
            "or give another --out."
        )
    claim(run.path, RUN, _began_here, FORMS)


def prepare_replay(run: RunFiles) -> None:
    """Make the directory of a replay. Raises UsageError, and changes nothing, where a run or other files are."""
    if run.journal.exists() and not run.trained.exists():
        raise UsageError(
            f"{run.path} holds a run, which a replay would overwrite. Give another --out."
        )
    claim(run.path, REPLAY, _replayed_here, FORMS)


def check_ours(folder: Path) -> Path:
    """``folder``, the directory of a run or a replay. Raises UsageError where it is none, and changes nothing."""
    check_made(folder, (RUN, REPLAY), _has_journal, FORMS)
    return folder


def _began_here(folder: Path) -> bool:
    """Whether a run began in a directory without a marker: a version before there were markers was killed there."""
    run = RunFiles(folder)
    ours = {run.config.name, run.plan.name}
    try:
        text = read_small(run.config, MOST_TOML_BYTES).decode("utf-8")
        only_ours = all(n in ours or is_leftover(n) for n in os.listdir(folder))
        return only_ours and from_toml(text).to_toml() == text
    except (OSError, ValueError, EdgezoError):
        return False


def _replayed_here(folder: Path) -> bool:
    """Whether a directory without a marker is what a replay wrote."""
    return _has_journal(folder) and RunFiles(folder).trained.exists()


def _has_journal(folder: Path) -> bool:
    try:
        return _journal(RunFiles(folder).journal)
    except EdgezoError:
        return False
