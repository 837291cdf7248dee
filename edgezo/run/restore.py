"""What a resume brings back: the weights where the journal ends, the linear probe, and lines that a kill left out."""

from __future__ import annotations

from typing import NamedTuple

from edgezo.errors import EdgezoError
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.run.directory import RunFiles, load_snapshot, lost_head
from edgezo.run.journal import Journal
from edgezo.run.readout_pass import ReadoutResult, recall
from edgezo.run.recipes import replay_into


class Restored(NamedTuple):
    """Where a run goes on."""

    steps: int  # that the weights hold
    # By step, for those that are computed again: the step size that the journal had.
    step_sizes: dict[int, float]


def restore_weights(run: RunFiles, cfg: RunConfig, model: Model, journal: Journal) -> Restored:
    """Bring the weights of ``model`` to where the journal stands, or to the last snapshot before it.

    What no seed can rebuild (the exact head; whatever is trained along what layers read) is in a snapshot every
    ``snapshot_every`` steps. The steps after it are computed again, which gives the same bits.
    Raises EdgezoError where the snapshot or the end of the journal is lost.
    """
    if not len(journal):
        return Restored(0, {})
    stop = journal.next_step
    step_sizes: dict[int, float] = {}
    if model.needs_snapshots:
        gone = not run.snapshot.exists()
        if gone and cfg.steps is None and stop >= cfg.snapshot_every:
            raise lost_head(run, cfg, stop)
        stop = load_snapshot(run, model)
        if stop > journal.next_step:
            raise EdgezoError(
                f"{run.snapshot} is of step {stop}, but {journal.path.name} ends after step "
                f"{journal.next_step}: its end was lost.\n"
                f"Restore it from a copy, or remove {run.snapshot.name}: the steps are then "
                "computed again from the first one."
            )
        step_sizes = {r.step: r.step_size for r in journal.records(stop)}
        journal.truncate_to(stop)
    replay_into(model, stop)
    return Restored(stop, step_sizes)


def restore_readout(
    run: RunFiles, cfg: RunConfig, model: Model, journal: Journal, layers: int
) -> ReadoutResult | None:
    """Let the model use the run's linear probe again; None where it is not fitted yet.

    Raises EdgezoError where the journal has steps but the file is gone.
    """
    if not cfg.parts.readout:
        return None
    result = recall(run, model, layers)
    if result is None and len(journal):
        raise EdgezoError(
            f"{run.path} has {journal.next_step} steps in its journal, but {run.probe.name}, "
            "the linear probe that they were computed with, is not there.\n"
            "Restore it from a copy, or start again with another --out."
        )
    if result is not None:
        run.states.unlink(missing_ok=True)  # a kill may have left it
    return result
