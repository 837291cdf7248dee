"""What a resume brings back: the weights where the journal ends, or at the last snapshot before, and the linear probe.

All of it is read before anything is written: a resume that is refused leaves the run's directory as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from edgezo.errors import EdgezoError
from edgezo.machine.files import remove_leftovers
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.run.directory import RunFiles, lost_head, run_id
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.journal import Journal
from edgezo.run.readout_pass import recall, take_over
from edgezo.run.recipes import replay_into
from edgezo.run.snapshots import load_snapshot
from edgezo.run.summary import check_same_end
from edgezo.run.summary_file import saved_summary
from edgezo.weights.saved import saved_sha256


class Restored(NamedTuple):
    """Where a run goes on."""

    steps: int  # that the weights hold
    # By step, for those that are computed again: the step size that the journal had. A run of a given time has it
    # from its clock, which no resume can ask again.
    step_sizes: dict[int, float]


def restore_weights(run: RunFiles, cfg: RunConfig, model: Model, journal: Journal) -> Restored:
    """Bring the weights of ``model`` to where the journal stands, or to the last snapshot before it.

    What no seed can rebuild (the exact head; whatever is trained along what layers read) is in a snapshot every
    ``snapshot_every`` steps. The steps after it are computed again, which gives the same bits. Files stay as they are.
    Raises EdgezoError where the snapshot or the end of the journal is lost.
    """
    stop = journal.next_step
    if model.needs_snapshots:
        gone = not run.snapshot.exists()
        if gone and cfg.steps is None and stop >= cfg.snapshot_every:
            raise lost_head(run, cfg, stop)
        stop = snapshot_step(run, model, journal)
    replay_into(model, cfg.since_base(stop))
    return Restored(stop, journal.step_sizes_from(stop))


def begin_weights(run: RunFiles, cfg: RunConfig, model: Model, journal: Journal) -> Restored:
    """Bring the weights of ``model`` to where a new run begins: the base, or what its parent has trained.

    What a run whose journal is gone has left is no state of the one that begins here. Raises as ``restore_weights``.
    """
    if journal.earlier is not None:
        if model.needs_snapshots:
            _load_of_parent(run, model, journal.earlier)
        replay_into(model, cfg.since_base(0))
    return Restored(0, {})


def _load_of_parent(run: RunFiles, model: Model, earlier: Journal) -> None:
    """Read the snapshot at the end of the parent. Raises EdgezoError where it is lost."""
    if load_snapshot(run.parent, model, earlier.header) != earlier.next_step:
        raise EdgezoError(
            f"{run.parent.snapshot}, the head after the {earlier.next_step} steps of the run that this one goes on "
            "from, is not there, or of another step.\nRestore it from a copy."
        )


def snapshot_step(run: RunFiles, model: Model, journal: Journal) -> int:
    """Read the snapshot into ``model``; returns the steps that it stands after.

    Before the first one a run stands where its parent ended. Raises EdgezoError where the journal has fewer.
    """
    if journal.earlier is not None and not run.snapshot.exists():
        _load_of_parent(run, model, journal.earlier)
        return 0
    stop = load_snapshot(run, model, journal.header)
    if stop > journal.next_step:
        raise EdgezoError(
            f"{run.snapshot} is of step {stop}, but {journal.path.name} ends after step "
            f"{journal.next_step}: its end was lost.\n"
            f"Restore it from a copy, or remove {run.snapshot.name}: the steps are then "
            "computed again from the first one."
        )
    return stop


def begin_writing(
    run: RunFiles, journal: Journal, restored: Restored, note: Callable[[str], None]
) -> None:
    """Make the directory that of a run at ``restored``: from here on a resume changes it.

    The journal's end is cut: an unfinished record, and records that are computed again. Both are kept beside it.
    """
    parent = journal.settings.parent
    if parent is not None and run.parent.probe.exists():
        if not (len(journal) and run.probe.exists()):
            take_over(run.parent, parent, run, run_id(journal.header))
    journal.repair()
    if journal.note:
        note(journal.note)
    journal.truncate_to(restored.steps)
    remove_leftovers(run.path)
    run.trained.unlink(
        missing_ok=True
    )  # written by a replay, and outdated by the steps that follow
    if not restored.steps:  # of a run whose journal is gone
        run.snapshot.unlink(missing_ok=True)
    if run.probe.exists():
        run.states.unlink(missing_ok=True)  # a kill may have left it


def restore_readout(
    run: RunFiles, cfg: RunConfig, model: Model, journal: Journal, hidden: int
) -> FittedProbe | None:
    """Let the model use the run's linear probe again, or that of its parent; None where it is not fitted yet.

    Raises EdgezoError where the journal has steps but the file is gone.
    """
    if not cfg.parts.readout:
        return None
    parent = cfg.parent
    if parent is not None and not (len(journal) and run.probe.exists()):
        result = recall(run.parent, model, hidden, parent)
    else:
        result = recall(run, model, hidden, run_id(journal.header))
    if result is None and (len(journal) or parent is not None):
        raise EdgezoError(
            f"{run.path} has {journal.next_step} steps in its journal, but {run.probe.name}, "
            "the linear probe that they were computed with, is not there.\n"
            "Restore it from a copy, or start again with another --out."
        )
    return result


def ended_before(
    files: RunFiles,
    cfg: RunConfig,
    model: Model,
    restored: Restored,
    readout: FittedProbe | None,
) -> dict[str, Any] | None:
    """The summary of a run that was over before; None where there is something to do.

    Raises EdgezoError where its files give other weights than it ended with.
    """
    done, summary = restored.steps, saved_summary(files)  # written at the end only
    if summary.get("steps") != done or not (done or readout is not None):
        return None
    with model.heap.updating():
        model.store.finish(cfg.since_base(done))
    check_same_end(files, cfg, model, saved_sha256(model.saved()))
    return summary
