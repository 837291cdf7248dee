"""Settings that are allowed and hardly meant: each is named to the user, with what is usual. None is refused here."""

from __future__ import annotations

from edgezo.plan.config import RunConfig
from edgezo.plan.fields import FIELDS
from edgezo.zo.presets import AUTO, default_step, preset_of

LARGE_STEP = 50  # times the usual step
LARGE_SIGMA = 0.1  # of a weight's own size, about: the losses then say nothing of the weights


def doubts(cfg: RunConfig, cores: int, positions: int) -> list[str]:
    """Warnings about a request on a machine of ``cores``, for a model that is made for ``positions`` tokens."""
    odd = []
    if cfg.threads is not None and cfg.threads > cores:
        odd.append(
            f"--threads {cfg.threads}, but {cores} cores can be used: threads wait for each other; "
            f"--threads {cores} is faster"
        )
    if cfg.max_length > max(positions, FIELDS["max_length"].default):
        odd.append(
            f"--max-length {cfg.max_length} is beyond the {positions} tokens that the model is made for: what stands "
            f"there is read badly, and memory is planned for it; --max-length {positions} cuts rows before it"
        )
    if (cfg.probing or cfg.backward) and not cfg.step_auto and cfg.estimator != AUTO:
        usual = _usual_step(cfg)
        if cfg.step > LARGE_STEP * usual:
            odd.append(
                f"--step {cfg.step:g} is {cfg.step / usual:.0f} times the usual {usual:g}: losses will grow; "
                f"give about --step {usual:g}"
            )
    if cfg.probing and cfg.sigma > LARGE_SIGMA:
        usual_sigma = FIELDS["sigma"].usual
        odd.append(
            f"--sigma {cfg.sigma:g} perturbs weights by about as much as they are; give about --sigma {usual_sigma:g}"
        )
    return [f"warning: {text}" for text in odd]


def _usual_step(cfg: RunConfig) -> float:
    """The step that the request would have without one."""
    preset = preset_of(cfg.estimator)
    return preset.step if cfg.backward else default_step(preset, cfg.credit, cfg.rule)
