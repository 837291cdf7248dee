"""Journal records become updates: the recipe of a record, and the replay of a journal.

A recipe is all that an update needs; it follows from the record, the request and the base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from edgezo.machine.profiler import phase
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.run.journal import Journal
from edgezo.run.journal_record import StepRecord
from edgezo.zo.credit import Estimator
from edgezo.zo.recipe import TWO_SIDED, Recipe


def recipe_of(cfg: RunConfig, record: StepRecord) -> Recipe:
    """The update that a journal record stands for."""
    estimator, credit = Estimator.of(cfg), record.credit
    anchor, pull = None, 0.0
    if cfg.anchored:
        # The last credit of the record is the anchor's mean, so that a record holds all that its step needs.
        anchor = record.step - record.step % cfg.refresh
        credit, last = credit[:-1], credit[-1:]
        pull = float(estimator.coefficients(last, record.step_size, record.sigma)[0])
    if record.skipped:
        return Recipe(record.step, 0 * credit, 0.0, (), anchor=anchor)
    return Recipe(
        record.step,
        estimator.coefficients(credit, record.step_size, record.sigma),
        # The decay follows the schedule of the step.
        cfg.weight_decay * record.step_size / cfg.step,
        record.touched,
        record.step_size,
        estimator.curvature(record.losses, record.sigma),
        None if record.scales is None else record.scales[0] * record.scales[1:],
        anchor,
        pull,
    )


def journal_is_shaped(cfg: RunConfig) -> bool:
    """Whether records hold something else than two losses and one credit an example."""
    evaluations = Estimator.of(cfg).evaluations
    other = evaluations != TWO_SIDED or cfg.anchored
    return other and cfg.probing


def follow(
    model: Model,
    cfg: RunConfig,
    journal: Journal,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Let the model take past updates from ``journal``: for a replay, and for blocks elsewhere that lack some.

    ``note`` gets a sentence when a block on disk was damaged and is made again.
    """

    def recipes(first: int, stop: int) -> Iterator[Recipe]:
        for record in journal.records(first):
            if record.step >= stop:
                return
            yield recipe_of(cfg, record)

    model.store.history = recipes
    if model.store.residency is not None:
        model.store.residency.note = note


@phase("update")
def replay_into(model: Model, stop: int) -> None:
    """Apply the updates before step ``stop`` to weights as loaded. The model must follow a journal.

    Does nothing where a snapshot holds the weights.
    """
    if not model.guided:
        with model.heap.updating():
            model.store.replay(stop)
