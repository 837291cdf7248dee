"""What can be said before a run: its plan and one of its batches. No weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.hardware import machine
from edgezo.network import cards
from edgezo.plan.plan import Plan
from edgezo.plan.planner import DEFAULT_BATCH, largest_card, make_plan
from edgezo.plan.request import RunConfig

if TYPE_CHECKING:
    from edgezo.plan.shapes import Shape

_TIMEOUT_S = 5


def plan(cfg: RunConfig, note: Callable[[str], None] = lambda text: None) -> Plan:
    """The plan for this machine. Data, where it is given, is read and tokenised for its lengths.

    A card needs nothing else: no weights, no tokenizer, and PyTorch is not imported.
    Raises UsageError and EdgezoError for bad data and models, DoesNotFit.
    """
    if cfg.data is None and cfg.task is None:
        return make_plan(model_shape(cfg.model), cfg, machine())
    try:
        cards.resolve(cfg.model, progress=note)
    except EdgezoError as error:
        card = cards.find_card(cfg.model)
        if card is None:
            raise
        note(
            f"{error}\nwithout its tokenizer every row is planned at --max-length {cfg.max_length}"
        )
        return make_plan(card, cfg, machine())
    from edgezo.run.session import open_request

    opened = open_request(cfg)
    for text in opened.dataset.notes:
        note(text)
    return make_plan(opened.files.shape, cfg, machine(), opened.dataset.token_stats())


def largest(cfg: RunConfig) -> Plan | None:
    """The plan of the largest model with a card that the request's budget has room for."""
    own = cards.find_card(cfg.model)
    kind = own.kind if own is not None else "causal"
    return largest_card([c for c in cards.cards().values() if c.kind == kind], cfg, machine())


def model_shape(model: str) -> Shape:
    """Sizes of a card, a local model, or a hub id (of which only config.json is fetched)."""
    if not Path(model).expanduser().exists():
        card = cards.find_card(model)
        if card is not None:
            return card
        if model.count("/") == 1 and not model.startswith((".", "~", "/")):
            return _hub_shape(model)
    path = cards.resolve(model)
    from edgezo.network import loader

    return loader.open_model(path).shape


def _hub_shape(repo: str) -> Shape:
    from huggingface_hub import hf_hub_download
    from transformers import AutoConfig

    from edgezo.network import loader

    try:
        file = hf_hub_download(repo, "config.json", etag_timeout=_TIMEOUT_S)
        config = AutoConfig.from_pretrained(file, trust_remote_code=False).get_text_config()
    except Exception as error:  # the hub client and transformers raise many types
        first = str(error).strip().partition("\n")[0]
        raise EdgezoError(
            f"the configuration of {repo} can't be had from the hub: {first}\n"
            "Give --model a local directory, a .gguf file or a card (see edgezo models)."
        ) from error
    if config.model_type not in loader.FAMILIES:
        raise EdgezoError(
            f"{repo} is of type {config.model_type!r}; edgezo loads {', '.join(loader.FAMILIES)}."
        )
    return loader.shape_of(config)


def show_batch(cfg: RunConfig) -> str:
    """The tokens of the first step's batch, what is scored in them marked."""
    from edgezo.data.batches import batch_indices
    from edgezo.data.dataset import show_batch
    from edgezo.run.session import open_request

    opened = open_request(cfg)
    train = opened.dataset.train
    if not train:
        raise UsageError("there are no training rows to show")
    size = cfg.batch_size or cfg.micro_batch or DEFAULT_BATCH
    picked = [train[i] for i in batch_indices(len(train), size, cfg.seed, 0)]
    return show_batch(picked, opened.dataset, opened.tokenizer)
