"""The rows of a request, read and tokenised for a model, and refused where that has no room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgezo.data.dataset import Dataset, load_dataset
from edgezo.data.packed import PackedExamples
from edgezo.data.sources import TRAINING, DataRequest, ReadFor
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.foreign import clip
from edgezo.machine.process_memory import Guard
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.plan.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class ReadingModel:
    """What reading rows has to know of the model that they are for."""

    path: Path
    shape: Shape
    masked: bool = False
    notes: tuple[str, ...] = ()  # what a user should know of its files
    position_offset: int = 0  # the number of a row's first position
    end_ids: tuple[int, ...] = ()  # tokens that end a text
    most_in_tree: int | None = None  # tokens of options that may pass as one tree
    switch: int | None = None  # tokens up to which a row has short rotary factors


def read_rows(
    cfg: RunConfig,
    model: ReadingModel,
    tokenizer: Any,
    guard: Guard | None = None,
    read_for: ReadFor = TRAINING,
) -> Dataset:
    """The rows of a request, tokenised, all of them within the model's vocabulary and positions."""
    shared = {f.name for f in fields(DataRequest)} & {f.name for f in fields(RunConfig)}
    request = DataRequest(
        judged=cfg.objective != LOSS,
        read_for=read_for,
        **{name: getattr(cfg, name) for name in shared},
    )
    dataset = load_dataset(
        request, tokenizer, masked=model.masked, guard=guard, most_in_tree=model.most_in_tree
    )
    notes = (*model.notes, *getattr(tokenizer, "edgezo_notes", ()), *dataset.notes)
    splits = [PackedExamples.of(split) for split in (dataset.train, dataset.validation)]
    _check_tokens(dataset, splits, model, tokenizer)
    if model.shape.positions:  # a learned table: there is nothing beyond its end
        positions = model.shape.max_positions - model.position_offset
        _check_lengths(dataset, splits, positions, model.path)
    if dataset.generation is not None:
        _check_writing(dataset, splits, model)
        notes += _end_note(dataset.generation.most, model, tokenizer)
    dataset = replace(dataset, notes=notes)
    return dataset if cfg.eval_rows is None else dataset.evaluated_on(cfg.eval_rows)


def for_kind(cfg: RunConfig, dataset: Dataset) -> RunConfig:
    """The request for such rows: only rows with label words have classes that a linear probe tells apart."""
    if dataset.classes or not cfg.parts.readout:
        return cfg
    train = tuple(part for part in cfg.train if part != "probe")
    if not train:
        raise UsageError(
            f"--train probe tells classes apart, but these rows are of the kind {dataset.kind}.\n"
            "Use --train head, or lowrank+head."
        )
    return replace(cfg, train=train)


def _check_tokens(
    dataset: Dataset, splits: Sequence[PackedExamples], model: ReadingModel, tokenizer: Any
) -> None:
    """EdgezoError for a token without a row in the embedding and the head, wherever a forward or a loss uses it."""
    uses = {
        "a label word": max(dataset.label_ids, default=0),
        "a row": max(split.largest_id() for split in splits),
    }
    use, token = max(uses.items(), key=lambda item: item[1])
    if token < model.shape.vocab:
        return
    text = tokenizer.convert_ids_to_tokens(token)
    is_end = token in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    raise EdgezoError(
        f"the tokenizer of {model.path} gives the token {token} ({clip(repr(text), 60)}, in {use}), but the model "
        f"has rows for {model.shape.vocab} tokens only.\n"
        + (
            "Name one of the model's tokens as eos_token in tokenizer_config.json, or resize the model's embedding."
            if is_end
            else "The two do not belong together: fetch the model again, or resize its embedding."
        )
    )


def _check_writing(dataset: Dataset, splits: Sequence[PackedExamples], model: ReadingModel) -> None:
    """UsageError where an answer would go from short to long rotary factors: keys that are kept have the old ones."""
    assert dataset.generation is not None
    switch, most = model.switch, dataset.generation.most
    if switch is None:
        return
    sizes = np.concatenate([split.prompt_lengths() for split in splits])
    crossing = sizes[(sizes <= switch) & (switch < sizes + most - 1)]
    if len(crossing):
        longest = int(crossing.max())
        raise UsageError(
            f"a prompt of {longest} tokens and its answer may have {longest + most}, and beyond {switch} "
            f"tokens {model.path} turns all positions by other factors: give a smaller --max-length or "
            f"--max-new-tokens, or prompts of more than {switch} tokens"
        )


def _end_note(most: int, model: ReadingModel, tokenizer: Any) -> tuple[str, ...]:
    """A note where no token ends an answer."""
    end = tokenizer.eos_token_id
    if model.end_ids or (end is not None and end < model.shape.vocab):
        return ()
    return (
        f"{model.path} names no token that ends a text, so every answer has {most} tokens: name one as eos_token in "
        "tokenizer_config.json, or give --max-new-tokens",
    )


def _check_lengths(
    dataset: Dataset, splits: Sequence[PackedExamples], positions: int, path: Path
) -> None:
    """UsageError for rows, or prompts and their answers, of more tokens than the model has positions."""
    longest = max(split.longest_row() for split in splits)
    if longest > positions:
        raise UsageError(
            f"a row has {longest} tokens, but {path} has only {positions} positions: give --max-length {positions}"
        )
    if dataset.generation is not None:
        prompt = max(int(split.prompt_lengths().max(initial=0)) for split in splits)
        longest = prompt + dataset.generation.most
        if longest > positions:
            raise UsageError(
                f"a prompt and its answer may have {longest} tokens, but {path} has only "
                f"{positions} positions: give a smaller --max-length or --max-new-tokens"
            )
