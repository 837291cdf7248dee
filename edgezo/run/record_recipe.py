"""The recipe of a journal record: all that its update needs follows from the record, the request and the base."""

from __future__ import annotations

from edgezo.errors import EdgezoError
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import GROUPS, flag
from edgezo.run.journal import Journal
from edgezo.run.journal_record import StepRecord
from edgezo.zo.axes import DIRECTIONS
from edgezo.zo.credit import Estimator
from edgezo.zo.recipe import TWO_SIDED, Recipe

# Settings that decide what a record does to the weights. Others of a run may be changed by hand in its config.toml.
OF_UPDATE = (
    *(field.name for field in GROUPS["method"].fields if not field.free_on_resume),
    *("precision", "batch_size", "step", "step_auto", "sigma", "seed"),
    *("weight_decay", "weight_decay_to"),
    *("parent", "parent_steps"),
)


def recipe_of(cfg: RunConfig, record: StepRecord) -> Recipe:
    """The update that a journal record stands for. Its step is counted from the base."""
    estimator, credit = Estimator.of(cfg), record.credit
    step, anchor, pull, echo = cfg.since_base(record.step), None, 0.0, None
    if cfg.carried:
        credit, last = credit[: -cfg.carried], credit[-cfg.carried :]
        echo = last if DIRECTIONS[cfg.directions].echoes else None
    if cfg.anchored:
        # The last credit of the record is the anchor's mean, so that a record holds all that its step needs.
        anchor = step - record.step % cfg.refresh
        pull = float(estimator.coefficients(last, record.step_size, record.sigma)[0])
    if record.skipped:
        return Recipe(step, 0 * credit, 0.0, (), anchor=anchor)
    return Recipe(
        step,
        estimator.coefficients(credit, record.step_size, record.sigma),
        # The decay follows the schedule of the step.
        cfg.weight_decay * record.step_size / cfg.step,
        record.touched[: len(credit)],
        record.step_size,
        estimator.curvature(record.losses, record.sigma),
        None if record.scales is None else record.scales[0] * record.scales[1:],
        anchor,
        pull,
        echo,
    )


def journal_is_shaped(cfg: RunConfig) -> bool:
    """Whether records hold something else than two losses and one credit an example."""
    evaluations = Estimator.of(cfg).evaluations
    other = evaluations != TWO_SIDED or cfg.carried > 0
    return other and cfg.probing


def check_settings(cfg: RunConfig, journal: Journal) -> None:
    """Raise EdgezoError where an update by ``cfg`` is another one than the settings in the journal make."""
    now, began = cfg.to_dict(), journal.settings.to_dict()
    for name in OF_UPDATE:
        if now[name] != began[name]:
            raise EdgezoError(
                f"{journal.path} was written with {flag(name)} {began[name]}, but the config.toml beside it has "
                f"{now[name]}: they belong to different runs, or one was changed. Restore both from one copy."
            )
