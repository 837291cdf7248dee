"""Journal records become updates: the recipe of a record, and the replay of a journal.

A recipe is all that an update needs; it follows from the record, the request and the base alone. A record of the past
comes from a file, so it is compared with the model before its recipe is applied.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from edgezo.errors import EdgezoError
from edgezo.machine.profiler import phase
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.run.journal import Journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import check_settings, recipe_of
from edgezo.zo.recipe import Recipe


def follow(
    model: Model,
    cfg: RunConfig,
    journal: Journal,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Let the model take past updates from ``journal``: for a replay, and for blocks elsewhere that lack some.

    Steps are counted from the base: those of the run's parents come first, each made by its own settings.
    ``note`` gets a sentence when a block on disk was damaged and is made again. Raises EdgezoError where ``cfg`` is of
    another run than the journal; taking updates raises it where a record does not fit the model.
    """
    check_settings(cfg, journal)
    # The model's store keeps this function. A plain reference back would keep model and files until a collection.
    model_ref = weakref.ref(model)

    def recipes(first: int, stop: int) -> Iterator[Recipe]:
        model = model_ref()
        if model is None:
            raise TypeError("updates are taken while the model is there")
        if stop > (end := cfg.since_base(journal.next_step)):
            raise EdgezoError(
                f"the weights saved beside {journal.path} are of step {stop}, but it ends after step "
                f"{end}: its end was lost. Restore it from a copy."
            )
        for part in journal.chain():
            made_by = cfg if part is journal else part.settings
            for record in part.records(max(0, first - made_by.parent_steps)):
                if made_by.since_base(record.step) >= stop:
                    return
                yield _checked_recipe(model, made_by, part, record)

    model.store.history = recipes
    if model.store.residency is not None:
        model.store.residency.note = note


@phase("update")
def replay_into(model: Model, stop: int) -> None:
    """Apply the updates before step ``stop`` from the base to weights as loaded. The model must follow a journal.

    Does nothing where a snapshot holds the weights, or for step 0.
    """
    if stop and not model.guided:
        with model.heap.updating():
            model.store.replay(stop)


def _checked_recipe(model: Model, cfg: RunConfig, journal: Journal, record: StepRecord) -> Recipe:
    """The update of a record of the past. Raises EdgezoError where it does not fit the model, or is not finite."""
    problem = _misfit(model, record)
    if not problem:
        with np.errstate(all="ignore"):
            recipe = recipe_of(cfg, record)
        numbers = (recipe.decay, recipe.rate, recipe.curvature, recipe.pull)
        lists = (recipe.coefficients, () if recipe.scales is None else recipe.scales)
        if all(map(math.isfinite, numbers)) and all(np.isfinite(values).all() for values in lists):
            return recipe
        problem = "its update is not finite"
    raise EdgezoError(
        f"{journal.path}: the record of step {record.step} does not fit the model: {problem}. No run over this base "
        "wrote it: restore the file from a copy."
    )


def _misfit(model: Model, record: StepRecord) -> str:
    """Why a record cannot be of a run with this model; "" where it can."""
    trainables = model.store.trainables.values()
    if record.scales is not None and len(record.scales) != 1 + len(trainables):
        return f"it has {len(record.scales) - 1} scales, and {len(trainables)} tensors are trained"
    tables = [
        (trainable.touched_offset, trainable.touched_offset + trainable.target.rows)
        for trainable in trainables
        if trainable.touched_offset is not None
    ]
    lists = (1 if model.candidates else len(record.credit)) if tables else 0
    if len(record.touched) != lists and not (record.skipped and not record.touched):
        return f"it has touched tokens of {len(record.touched)} examples, where {lists} belong"
    for ids in record.touched:
        inside = np.zeros(len(ids), bool)
        for start, stop in tables:
            inside |= (ids >= start) & (ids < stop)
        if not inside.all():
            return f"it names the row {ids[~inside][0]}, and no embedding table has it"
    return ""
