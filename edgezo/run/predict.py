"""``edgezo predict`` and ``edgezo.load``: a run or a model in memory, and rows that become predictions as they come.

Prompt, template and label words are those that the run was trained with: its configuration and its journal say them.
No row that it was trained on is read. The models of each engine are read by torch_answers.py and onnx_answers.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgezo.errors import UsageError
from edgezo.machine.files import user_path
from edgezo.machine.hardware import machine
from edgezo.network.onnx_manifest import is_trainable_export
from edgezo.plan.budget import portable
from edgezo.plan.config import RunConfig
from edgezo.plan.engines import on_graphs
from edgezo.plan.fields import flag
from edgezo.plan.plan import PlanDoesNotFit
from edgezo.plan.request import make_config
from edgezo.run.called import called, with_threads
from edgezo.run.directory import RunFiles
from edgezo.run.places import at_base, for_torch, uses_graphs, with_base
from edgezo.run.predictor import Predictor

# Settings by which a plain model is asked; a run has them of its own.
_OF_ASKING = ("task", "labels", "label_field")


def load(
    target: str | os.PathLike[str],
    *,
    note: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Predictor:
    """A run (its directory) or a model (a card, a directory, a GGUF file) in memory, to predict and write with.

    ``settings`` are those of ``edgezo predict``: ``max_mem_bytes``, ``max_new_tokens``, and for a model ``template``,
    ``labels`` or ``task``; of a run ``base``, where its base is now.
    ``note`` gets what a user should know. Use it in a ``with`` block, or call ``close``.
    Raises EdgezoError where the run or the model cannot be read, UsageError for settings that mean nothing here, and
    DoesNotFit where it does not fit into the cap.
    """
    name = os.fspath(target)
    with called(), ExitStack() as at_end:
        cfg = use_request(name, settings)
        threads = with_threads(cfg.threads) if cfg.engine == "torch" else nullcontext()
        at_end.enter_context(threads)
        used = at_end.enter_context(predictor(name, cfg, note))
        used.at_end = at_end.pop_all()
    return used


def use_request(target: str, given: Mapping[str, Any]) -> RunConfig:
    """The request to use a run as it was trained, but for what ``given`` changes; or a plain model.

    Of a run ``given`` may say where its ``base`` is now: over graphs it is used on ONNX Runtime, else with torch.
    """
    run = RunFiles(Path(target))
    base = given.get("base")
    given = {name: value for name, value in given.items() if name != "base"}
    if not run.config.is_file():
        if base is not None:
            raise UsageError(f"--base is that of a run, and {target} is none: leave it out")
        if is_trainable_export(user_path(target)):
            return make_config({**given, "model": target, "engine": "onnx"}, need_data=False)
        return make_config({**given, "model": target}, _asked_by_export(target), need_data=False)
    if refused := [flag(name) for name in _OF_ASKING if given.get(name) is not None]:
        raise UsageError(
            f"{target} is a run, which is asked as it was trained: leave out {', '.join(refused)}"
        )
    saved = run.read_config()
    given = {**given, "objective": None}
    if uses_graphs(run.path, base):
        return make_config(given, on_graphs(at_base(saved, base)).to_dict(), need_data=False)
    layer = portable(for_torch(at_base(saved, base)), machine()).to_dict()
    if given.get("device") not in (None, saved.device):  # the cap was that of the other device
        layer |= {"max_mem_bytes": None, "residency": None}
    return make_config(given, layer, need_data=False)


def base_of(target: str) -> str:
    """The model that a run was trained over. Raises UsageError for what is no run."""
    run = RunFiles(Path(target))
    if not run.config.is_file():
        raise UsageError(f"{target} is no run, and has no base here: name a model, --compare MODEL")
    return with_base(run.read_config(), run.path).model


def _asked_by_export(target: str) -> dict[str, Any]:
    """The settings by which an export of edgezo's is asked; {} for anything else, such as the name of a card."""
    path = user_path(target)
    if not path.exists():
        return {}
    from edgezo.run.exported import Exported  # it imports torch

    exported = Exported.at(path)
    return {} if exported is None else exported.settings


@contextmanager
def predictor(
    target: str, cfg: RunConfig, note: Callable[[str], None] = lambda text: None
) -> Iterator[Predictor]:
    """A run (a directory with config.toml) or a model in memory, until the end of the block.

    ``cfg`` is the request: of a run its own settings, but for what is asked now. ``note`` gets what a user should know.
    Raises EdgezoError for a run that is damaged or of another base, DoesNotFit where it does not fit into the cap.
    """
    if cfg.engine == "onnx":
        from edgezo.run.onnx_answers import predictor_on_onnx as opened
    else:
        from edgezo.run.torch_answers import predictor_on_torch as opened
    with opened(target, cfg, note) as used:
        yield used


@contextmanager
def predictor_with_room(
    target: str, cfg: RunConfig, lengths: Sequence[int], note: Callable[[str], None], what: str
) -> Iterator[Predictor]:
    """As ``predictor``, for rows of the first of ``lengths`` tokens that the cap has room for.

    Where that is not the first, ``note`` is told how long ``what`` may be. Raises PlanDoesNotFit of the last length.
    """
    for length in lengths:
        with ExitStack() as at_end:
            try:
                asked = replace(cfg, max_length=length)
                used = at_end.enter_context(predictor(target, asked, note))
            except PlanDoesNotFit:
                if length == lengths[-1]:
                    raise
                continue
            used.shorter = length != lengths[0]
            if used.shorter:
                note(f"{what} may have {length:,} tokens: the cap has no room for {lengths[0]:,}")
            yield used
            return
