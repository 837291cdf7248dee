"""From a command line to a request: options over the TOML file, over settings of the run or the card, over defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.errors import UsageError
from edgezo.machine.files import user_path
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import EVAL_ROWS, LOSS
from edgezo.plan.fields import FREE_ON_RESUME, OF_PRESET, flag
from edgezo.plan.request import (
    check_after,
    make_config,
    read_layer,
    read_run_config,
    read_settings,
    settings_after,
)
from edgezo.zo.parts import PARTS
from edgezo.zo.presets import DEFAULT, steps_by

# Settings of a run that belong to its data: another task has its own ones, and other rows are read by them.
OF_DATA = ("data_root", "template", "labels", "label_field", "max_new_tokens", "speaker")


def request(
    given: Mapping[str, Any], config_file: str | None, *, need_data: bool = True
) -> RunConfig:
    """The request of a command: ``given`` are its options by field name, None where one is not given."""
    from edgezo.network.cards import find_card

    from_file = read_settings(config_file) if config_file is not None else {}
    model = given.get("model") or from_file.get("model")
    card = find_card(model) if isinstance(model, str) else None
    of_card = dict(card.settings) if card is not None else {}
    estimator = given.get("estimator") or from_file.get("estimator") or DEFAULT
    by_hand = any(given.get(name) or from_file.get(name) for name in ("mask", "credit", "rule"))
    if by_hand or steps_by(estimator) != steps_by(of_card.get("estimator", DEFAULT)):
        for name in OF_PRESET:  # these were measured with the card's estimator
            of_card.pop(name, None)
    return make_config(given, from_file, of_card, need_data=need_data)


class Asked(NamedTuple):
    """A fine-tune as it is asked for."""

    cfg: RunConfig
    resuming: bool = False  # there are steps to go on from
    parent: Path | None = None  # the finished run that a new one goes on from


def new_request(
    given: Mapping[str, Any], config_file: str | None, *, need_data: bool = True
) -> Asked:
    """A new run: over a model, or where --model is a run, what that has trained and as it was trained.

    ``given`` has --more-steps too. Raises UsageError.
    """
    given, from_file = {**given}, {} if config_file is None else read_settings(config_file)
    more, in_file = given.pop("more_steps"), from_file.pop("model", None)
    model = given["model"] or in_file
    saved = saved_config(Path(model)) if isinstance(model, str) else None
    if more is not None:
        if saved is None:
            raise UsageError(
                "--more-steps goes on from a run: name its directory by --model RUN, or give --steps"
            )
        if given["steps"] is not None or given["for_s"] is not None:
            raise UsageError("--more-steps says how long: leave out --steps and --for")
        given["steps"] = more
    base = given.pop("base")
    if saved is None:
        _refuse_base(base, model)
        return Asked(request(given, config_file, need_data=need_data))
    asked = read_layer(from_file, []) | read_layer(given, [])
    check_after(saved, Path(str(model)), asked)
    layer = settings_after(saved)
    if given["device"] not in (None, saved.device):  # the cap was that of the other device
        layer["max_mem_bytes"] = None
    if given["task"] is not None or from_file.get("task") is not None:
        layer |= dict.fromkeys(OF_DATA)
    from edgezo.run.places import at_base, check_data_is_there, with_base

    run = Path(str(model))
    cfg = make_config({**given, "model": None}, from_file, layer, need_data=need_data)
    cfg = with_base(at_base(cfg, base), run)
    check_data_is_there(cfg, run)
    return Asked(cfg, parent=run)


def _refuse_base(base: str | None, model: object) -> None:
    """Raise UsageError where --base stands beside something else than a run."""
    if base is not None:
        raise UsageError(f"--base is that of a run, and {model} is none: leave it out")


def finetune_request(
    given: Mapping[str, Any], config_file: str | None, resume: bool, note: Callable[[str], None]
) -> Asked:
    """The request of a fine-tune: new, or to go on with in its directory.

    Raises UsageError where a run would be overwritten, or resumed with other settings than it began with.
    """
    out = given["out"]
    has_steps = out is not None and (Path(out) / "journal.bin").exists()
    if not resume:
        if has_steps:
            raise UsageError(
                f"{out} already holds a run. Go on with it (--resume --out {out}), "
                "or give another --out."
            )
        asked = new_request(given, config_file)
        return asked._replace(cfg=_with_sample(asked.cfg))
    if given["more_steps"] is not None:
        raise UsageError(
            "--resume goes on to the end of a run as it was asked for. For more steps than that, leave it out: "
            f"--model {out} --more-steps {given['more_steps']}, and a new --out."
        )
    given = {**given, "model": given["model"] or given["base"]}
    del given["more_steps"], given["base"]
    from edgezo.run.places import check_data_is_there, given_now, with_base

    if out is None:
        raise UsageError("--resume needs --out RUN, the directory of the run to go on with")
    saved = saved_config(Path(out))
    if saved is None:
        if given["model"] is None and config_file is None:
            raise UsageError(f"there is nothing to resume in {out}: it has no config.toml")
        note(f"there is nothing to resume in {out}; starting from the first step")
        return Asked(_with_sample(request(given, config_file)))
    layer = _settings_of_run(saved, given)
    cfg = make_config({**given, "model": given["model"] or saved.model}, layer)
    cfg = given_now(replace(cfg, out=out), given)
    cfg = with_base(cfg, Path(out), note)
    check_data_is_there(cfg, Path(out))
    changed = [
        f"{flag(f.name)} was {getattr(saved, f.name)} when the run began, "
        f"not {getattr(cfg, f.name)}; a resumed run goes on as it began"
        for f in fields(cfg)
        if f.name not in FREE_ON_RESUME and getattr(cfg, f.name) != getattr(saved, f.name)
    ]
    if changed:
        raise UsageError(changed)
    return Asked(cfg, has_steps)


def _with_sample(cfg: RunConfig) -> RunConfig:
    """The request of a new run, which is evaluated on a sample of the rows unless it says otherwise.

    With --for there may be time for fewer rows than that (plan/evaluated.py).
    """
    if cfg.eval_limit is not None:
        return cfg
    return replace(cfg, eval_limit=EVAL_ROWS, eval_rows=None if cfg.for_s is None else EVAL_ROWS)


def evaluation_request(
    given: Mapping[str, Any], config_file: str | None, other_base: str | None = None
) -> tuple[str, RunConfig]:
    """(model or run to evaluate, request): a run is evaluated with its own settings, but for what ``given`` changes.

    ``other_base`` is another file of the run's base, over which it is to be evaluated. Raises UsageError.
    """
    from edgezo.machine.hardware import machine
    from edgezo.plan.budget import portable

    given = {**given}
    model, base = given["model"], given.pop("base")
    saved = saved_config(Path(model)) if model is not None else None
    if other_base is not None:
        _check_other_base(saved, base)
        base = other_base
    if saved is None:
        _refuse_base(base, model)
        asks_of_rows = given["data"] or given["task"] or config_file
        if model is not None and not asks_of_rows and not os.path.lexists(user_path(model)):
            raise UsageError(
                f"there is no run {model} here (edgezo runs lists the runs in a folder). A model that is no run is "
                "evaluated on rows: give --data or --task."
            )
        cfg = request(given, config_file)
        return cfg.model, cfg
    layer = _settings_of_run(portable(saved, machine()), given)
    del layer["eval_limit"], layer["eval_rows"]  # all, where training was content with a sample
    if given["task"] is not None:
        for name in OF_DATA:
            del layer[name]
        layer["objective"] = LOSS  # the run's objective belongs to its data
    elif given["data"] is not None:
        del layer["data_root"]
        layer |= settings_of_rows(Path(model))
    cfg = make_config({**given, "model": None, "objective": None}, layer)
    from edgezo.run.places import at_base, rows_are_new

    if given.get("held_out") is None and rows_are_new(cfg, saved):
        cfg = replace(cfg, held_out=None)  # a share of the rows that the run was trained on
    if given["objective"] is not None:
        # Checked apart from the run: an evaluation trains nothing by it, so any trained part may stand beside it.
        asked = {"model": str(model), "objective": given["objective"]}
        cfg = replace(cfg, objective=make_config(asked, need_data=False).objective)
    return str(model), at_base(cfg, base)


def _check_other_base(saved: RunConfig | None, base: str | None) -> None:
    """Raise UsageError unless what a run has trained can stand beside other weights than its base's."""
    if saved is None:
        raise UsageError("--other-base is for a run: give --model RUN")
    if base is not None:
        raise UsageError("--base is the run's own base, and --other-base another: give one")
    if inside := [part for part in saved.train if PARTS[part].in_base]:
        raise UsageError(
            f"--other-base measures what lies beside frozen weights, and this run trained {'+'.join(inside)}, which is "
            "made of its own base"
        )
    if saved.parent is not None:
        raise UsageError("--other-base is not for a run that goes on from another run")
    if saved.engine == "onnx":
        raise UsageError("--other-base is not for a run on --engine onnx")


def settings_of_rows(run: Path) -> dict[str, Any]:
    """The settings by which a run reads its rows, for other rows of the same kind."""
    from edgezo.data.tasks import TASKS

    saved = saved_config(run)
    if saved is None:
        return {}
    asked = {name: getattr(saved, name) for name in OF_DATA if name != "data_root"}
    task = TASKS.get(saved.task or "")
    if task is not None and task.generation is None and task.prepare is None and not task.options:
        of_task = {name: getattr(task, name) for name in ("template", "labels", "label_field")}
        asked |= {name: value for name, value in of_task.items() if asked[name] in (None, "label")}
    return {name: value for name, value in asked.items() if value is not None}


def saved_config(run: Path) -> RunConfig | None:
    """The configuration of a run directory, or None if there is none."""
    from edgezo.run.places import found_again

    file = run / "config.toml"
    if not file.is_file():
        return None
    return found_again(read_run_config(file), run)


def _settings_of_run(saved: RunConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, below what is given now. Its cap and residency belong to its device."""
    layer = saved.to_dict()
    if given["device"] not in (None, saved.device):
        layer |= {"max_mem_bytes": None, "residency": None}
    return layer
