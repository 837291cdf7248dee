"""What a run would do, before it starts: its plan, and its first batch. No weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgezo.data.sources import DataRequest
from edgezo.errors import EdgezoError, SourceError, UsageError
from edgezo.machine.files import user_path
from edgezo.machine.hardware import Machine, machine
from edgezo.network import cards
from edgezo.plan.config import RunConfig
from edgezo.plan.doubtful import doubts
from edgezo.plan.fields import DEFAULT_BATCH
from edgezo.plan.plan import Plan
from edgezo.plan.planner import largest_card, make_plan

if TYPE_CHECKING:
    from edgezo.plan.shapes import Shape

_HUB_CONFIG = "config.json"


def plan(
    cfg: RunConfig, note: Callable[[str], None] = lambda text: None, parent: Path | None = None
) -> Plan:
    """The plan of a request for this machine.

    Rows, where they are given, are read and tokenised for their lengths; by their characters where the model is not on
    this machine. Without rows, a model with a card needs neither weights nor tokenizer, and PyTorch is not imported.
    ``note`` is called with remarks for the user. ``parent`` is the run that this one would go on from.
    Raises UsageError and EdgezoError for rows and models that cannot be used, DoesNotFit.
    """
    if cfg.engine == "onnx":
        return _onnx_plan(cfg, note)
    if parent is not None:
        from edgezo.run.parent import Parent

        cfg = Parent.of(parent).followed_by(cfg)
    if cfg.data is None and cfg.task is None:
        shape = model_shape(cfg.model, note)
        return make_plan(shape, cfg, _doubting(cfg, shape, note))
    if not cards.is_here(cfg.model):
        return _rough_plan(cfg, note)
    from edgezo.machine.process_memory import rss_bytes
    from edgezo.run.few_rows import settled_in_time
    from edgezo.run.session import open_request, settle

    if cfg.log_to != "none":
        from edgezo.run.trackers import tracker_callback

        tracker_callback(cfg.log_to)  # as a run would, whose process it is part of
    opened = open_request(cfg)
    for text in opened.dataset.notes:
        note(text)
    here = _doubting(cfg, opened.files.shape, note)
    # As a run would, which is now what this process is.
    return settled_in_time(opened, lambda one: settle(one, here, rss_bytes())).plan


def _rough_plan(cfg: RunConfig, note: Callable[[str], None]) -> Plan:
    """The plan of a model that is not on this machine: of its sizes, and of rows by their characters.

    No weight is fetched: whether a model fits is known before. Raises UsageError and EdgezoError, DoesNotFit.
    """
    from edgezo.data.rough_lengths import LEAST_CHARS_A_TOKEN, rough_lengths
    from edgezo.machine.process_memory import ReadingGuard
    from edgezo.plan.budget import default_budget

    shape, here = model_shape(cfg.model, note), machine()
    card = cards.find_card(cfg.model)
    source = "its card" if card is not None else "its config.json"
    note(
        f"{cfg.model} is not on this machine, and a plan fetches no weights. This one is made from {source}, and "
        f"{LEAST_CHARS_A_TOKEN} characters of a row count as a token, without its tokenizer: rather too many. "
        "finetune fetches the model, and plans with its tokens"
    )
    known = {f.name for f in fields(DataRequest)} & {f.name for f in fields(RunConfig)}
    request = DataRequest(**{name: getattr(cfg, name) for name in known})
    guard, notes = ReadingGuard(cfg.max_mem_bytes or default_budget(here)[0]), list[str]()
    masked = card is not None and card.kind == "masked"  # prompts around a mask need the tokenizer
    tokens = None if masked else rough_lengths(request, guard, notes)
    for text in notes:
        note(text)
    if tokens is not None and not tokens.classes and cfg.parts.readout:
        cfg = replace(cfg, train=tuple(part for part in cfg.train if part != "probe") or ("head",))
    return make_plan(shape, cfg, _doubting(cfg, shape, note), tokens)


def _onnx_plan(cfg: RunConfig, note: Callable[[str], None]) -> Plan:
    """The plan of a request on the ONNX engine, whose graphs have every size."""
    from edgezo.machine.process_memory import rss_bytes
    from edgezo.run.few_rows import settled_in_time
    from edgezo.run.onnx_session import open_onnx, settle_onnx

    if cfg.data is None and cfg.task is None:
        raise UsageError("a plan for --engine onnx needs the rows: give --data or --task")
    opened = open_onnx(cfg)
    for text in opened.dataset.notes:
        note(text)
    here = _doubting(cfg, opened.manifest.shape, note)
    return settled_in_time(opened, lambda one: settle_onnx(one, here, rss_bytes())).plan


def _doubting(cfg: RunConfig, shape: Shape, note: Callable[[str], None]) -> Machine:
    """This machine, once ``note`` was called with what is doubtful in a request for it."""
    here = machine()
    for text in doubts(cfg, here.cores, shape.max_positions):
        note(text)
    return here


def largest(cfg: RunConfig) -> Plan | None:
    """The plan of the largest model with a card, and of the request's kind, that fits its budget; None: none does."""
    card = cards.find_card(cfg.model)
    kind = card.kind if card is not None else "causal"
    return largest_card([c for c in cards.cards().values() if c.kind == kind], cfg, machine())


def model_shape(model: str, note: Callable[[str], None]) -> Shape:
    """Sizes of a card, a local model or a hub id; from the hub, only config.json is fetched.

    ``note`` is called with what is odd in a model's files.
    """
    if not user_path(model).exists():
        card = cards.find_card(model)
        if card is not None:
            return card
        if model.count("/") == 1 and not model.startswith((".", "~", "/")):
            return _hub_shape(model)
    path = cards.resolve(model)
    from edgezo.network import loader

    files = loader.open_model(path)
    for text in files.notes:
        note(text)
    return files.shape


def _hub_shape(repo: str) -> Shape:
    """Sizes of a model on the hub. Raises EdgezoError without a connection or for an unknown family."""
    from edgezo.network import loader
    from edgezo.network.foreign_config import read_config

    repository = cards.HubSource(repo).repository
    try:
        folder = (
            repository.cached([_HUB_CONFIG]) or repository.fetch(lambda names: [_HUB_CONFIG])[0]
        )
    except SourceError as problem:
        raise EdgezoError(
            f"can't fetch the configuration of {repo} from the hub: {problem}\n"
            "Give --model a local directory, a .gguf file or a card (see edgezo models)."
        ) from problem
    return loader.shape_of(read_config(folder / _HUB_CONFIG))


def show_batch(cfg: RunConfig) -> str:
    """The tokens of the first step's batch, with those marked that are scored. Raises UsageError without rows."""
    from edgezo.data.batches import batch_indices
    from edgezo.data.dataset import show_batch

    if cfg.engine == "onnx":
        from edgezo.run.onnx_session import open_onnx

        of_onnx = open_onnx(cfg)
        dataset, tokenizer = of_onnx.dataset, of_onnx.tokenizer
    else:
        from edgezo.run.session import open_request

        opened = open_request(cfg)
        dataset, tokenizer = opened.dataset, opened.tokenizer
    train = dataset.train
    if not train:
        raise UsageError("there are no training rows to show; give --data or --task")
    size = cfg.batch_size or cfg.micro_batch or DEFAULT_BATCH
    picked = [train[i] for i in batch_indices(len(train), size, cfg.seed, 0)]
    return show_batch(picked, dataset, tokenizer)
