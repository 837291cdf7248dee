"""What finetune, eval and replay share: a request becomes open files and rows, then a plan, then a model in memory.

RunConfig -> open_request -> Opened -> settle -> Planned -> load_model -> Loaded
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from edgezo.data.dataset import Dataset, load_dataset
from edgezo.data.packed import PackedExamples
from edgezo.data.sources import DataRequest
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.foreign import clip
from edgezo.machine.gpu_memory import Memory, open_memory
from edgezo.machine.hardware import Machine, machine
from edgezo.machine.matmul import keep_panel
from edgezo.machine.process_memory import (
    MAPPED_BYTES,
    Guard,
    Heap,
    ReadingGuard,
    allocator_reuse,
    check_cap_kept,
    malloc_trim,
    peak_rss_bytes,
)
from edgezo.machine.profiler import phase
from edgezo.network import cards, loader
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.cut import Half
from edgezo.network.loader import ModelFiles
from edgezo.network.model import Model
from edgezo.network.rotary import longrope_switch, one_frequency_tokens
from edgezo.plan.budget import budget, choose_device, default_budget, mb
from edgezo.plan.calibration import UNSEEN_BYTES
from edgezo.plan.config import RunConfig, Settled
from edgezo.plan.data_fields import LOSS
from edgezo.plan.plan import Plan, PlanDoesNotFit
from edgezo.plan.planner import make_plan
from edgezo.run.called import peak_before_bytes, present_caller, usable
from edgezo.run.directory import Overlay, data_hash, dataset_facts
from edgezo.run.finetuner import Finetuner
from edgezo.run.objective import Judge
from edgezo.run.states_cache import states_room_bytes
from edgezo.weights.home import Medium
from edgezo.weights.layouts import DENSE_DTYPES
from edgezo.weights.ram import HostMedium
from edgezo.zo.credit import Estimator

# Settings that a replay does not need: the journal's header leaves them out.
NOT_IN_HEADER = (
    *("out", "max_mem_bytes", "device", "threads", "profile", "finetuner", "began_in"),
    *("when", "max_temp", "max_cpu", "log_to"),
)


@dataclass(frozen=True)
class Opened:
    """A request with its files and rows open. No weight has been read."""

    cfg: RunConfig
    files: ModelFiles
    tokenizer: Any
    dataset: Dataset
    finetuner: Finetuner | None = None  # with --mask block, for training
    judge: Judge | None = None  # where predictions are written or scored
    peak_before_bytes: int = 0  # of this process's memory, before it began to read
    read_peak_bytes: int = 0  # and until all was read; 0: not higher than before


@dataclass(frozen=True)
class Planned:
    """An opened request with its plan, and with everything decided that the request left open."""

    opened: Opened
    cfg: Settled
    plan: Plan


class Loaded(NamedTuple):
    """A model in memory, and the memory that the cap is on."""

    model: Model
    memory: Memory


def open_request(cfg: RunConfig, *, to_train: bool = True) -> Opened:
    """Find the model, check its files, read and tokenise the rows; those to evaluate on only unless ``to_train``.

    Raises UsageError for rows or settings that do not go together, EdgezoError for files that cannot be read, and
    DoesNotFit where reading them takes more than the cap.
    """
    before_bytes = peak_before_bytes()
    guard = ReadingGuard(ram_cap_bytes(cfg, usable(machine())))
    files = loader.open_model(cards.resolve(cfg.model))
    loader.model_class(files)  # its code is part of the process that a plan starts from
    tokenizer = loader.load_tokenizer(files.path)
    dataset = read_data(cfg, files, tokenizer, guard, to_train)
    cfg = replace(_for_kind(cfg, dataset), written_at=dataset.written_at)
    judge = _judge_of(cfg, files, tokenizer, dataset)
    malloc_trim()  # memory that parsing has freed is no part of the process that a plan starts from
    peak_bytes = peak_rss_bytes()
    read_bytes = peak_bytes if peak_bytes > before_bytes else 0
    return Opened(cfg, files, tokenizer, dataset, None, judge, before_bytes, read_bytes)


def ram_cap_bytes(cfg: RunConfig, machine: Machine) -> int:
    """The cap on this process's memory: --max-mem, or its default where that is not given or caps a GPU's memory."""
    try:
        on_gpu = choose_device(cfg, machine)[0] == "cuda"
    except UsageError:  # the plan will say so
        on_gpu = False
    if cfg.max_mem_bytes is None or on_gpu:
        return default_budget(machine)[0]
    return cfg.max_mem_bytes


def keep_cap(planned: Planned, memory: Memory, done: str) -> None:
    """Raise BudgetExceeded where this process has gone over the cap of its plan; ``done`` says what is saved."""
    on_cpu = planned.plan.device == "cpu"
    before_bytes = planned.opened.peak_before_bytes if on_cpu else 0
    check_cap_kept(planned.plan.max_mem_bytes, memory.peak_bytes(), before_bytes, done)


def _judge_of(cfg: RunConfig, files: ModelFiles, tokenizer: Any, dataset: Dataset) -> Judge | None:
    """The judge of predictions, where the task or the request asks for more than loss and accuracy."""
    if cfg.objective == LOSS and dataset.generation is None and dataset.report is None:
        return None
    return Judge.of(cfg, dataset, tokenizer, files.end_ids)


def _for_kind(cfg: RunConfig, dataset: Dataset) -> RunConfig:
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


def read_data(
    cfg: RunConfig,
    files: ModelFiles,
    tokenizer: Any,
    guard: Guard | None = None,
    to_train: bool = True,
) -> Dataset:
    """The rows of a request, tokenised, all of them within the model's vocabulary and positions."""
    shared = {f.name for f in fields(DataRequest)} & {f.name for f in fields(RunConfig)}
    request = DataRequest(
        judged=cfg.objective != LOSS,
        to_train=to_train,
        **{name: getattr(cfg, name) for name in shared},
    )
    masked, most = files.kind == "masked", one_frequency_tokens(files.config)
    dataset = load_dataset(request, tokenizer, masked=masked, guard=guard, most_in_tree=most)
    notes = (*files.notes, *getattr(tokenizer, "edgezo_notes", ()), *dataset.notes)
    splits = [PackedExamples.of(split) for split in (dataset.train, dataset.validation)]
    _check_tokens(dataset, splits, files, tokenizer)
    if files.shape.positions:  # a learned table: there is nothing beyond its end
        positions = files.shape.max_positions - files.position_offset
        _check_lengths(dataset, splits, positions, files.path)
    if dataset.generation is not None:
        _check_writing(dataset, splits, files)
        notes += _end_note(dataset.generation.most, files, tokenizer)
    return replace(dataset, notes=notes)


def _check_tokens(
    dataset: Dataset, splits: Sequence[PackedExamples], files: ModelFiles, tokenizer: Any
) -> None:
    """EdgezoError for a token without a row in the embedding and the head, wherever a forward or a loss uses it."""
    uses = {
        "a label word": max(dataset.label_ids, default=0),
        "a row": max(split.largest_id() for split in splits),
    }
    use, token = max(uses.items(), key=lambda item: item[1])
    if token < files.shape.vocab:
        return
    text = tokenizer.convert_ids_to_tokens(token)
    is_end = token in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    raise EdgezoError(
        f"the tokenizer of {files.path} gives the token {token} ({clip(repr(text), 60)}, in {use}), but the model "
        f"has rows for {files.shape.vocab} tokens only.\n"
        + (
            "Name one of the model's tokens as eos_token in tokenizer_config.json, or resize the model's embedding."
            if is_end
            else "The two do not belong together: fetch the model again, or resize its embedding."
        )
    )


def _check_writing(dataset: Dataset, splits: Sequence[PackedExamples], files: ModelFiles) -> None:
    """UsageError where an answer would go from short to long rotary factors: keys that are kept have the old ones."""
    assert dataset.generation is not None
    switch, most = longrope_switch(files.config), dataset.generation.most
    if switch is None:
        return
    sizes = np.concatenate([split.prompt_lengths() for split in splits])
    crossing = sizes[(sizes <= switch) & (switch < sizes + most - 1)]
    if len(crossing):
        longest = int(crossing.max())
        raise UsageError(
            f"a prompt of {longest} tokens and its answer may have {longest + most}, and beyond {switch} "
            f"tokens {files.path} turns all positions by other factors: give a smaller --max-length or "
            f"--max-new-tokens, or prompts of more than {switch} tokens"
        )


def _end_note(most: int, files: ModelFiles, tokenizer: Any) -> tuple[str, ...]:
    """A note where no token ends an answer."""
    end = tokenizer.eos_token_id
    if files.end_ids or (end is not None and end < files.shape.vocab):
        return ()
    return (
        f"{files.path} names no token that ends a text, so every answer has {most} tokens: name one as eos_token in "
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


def without_states(cfg: RunConfig) -> RunConfig:
    """The request of a run with the whole model in memory: no states are kept where nothing is trained."""
    return replace(cfg, states=None if cfg.blocks == "all" else "none", state_rows=None)


def header_of(opened: Opened, cfg: RunConfig) -> dict[str, Any]:
    """What the journal remembers of a run: enough to replay it, and to refuse another base, other rows or settings."""
    finetuner = opened.finetuner
    return {
        **({} if finetuner is None else {"finetuner_hash": finetuner.sha256}),
        "content_hash": opened.files.content_hash,
        "data_hash": data_hash(opened.dataset.train),
        "dataset": dataset_facts(opened.dataset),
        "config": {k: v for k, v in cfg.without_absent().items() if k not in NOT_IN_HEADER},
    }


def plan_file(planned: Planned) -> dict[str, Any]:
    """The content of plan.json: the plan, and what is known of the run's files wherever they are later."""
    files, dataset, cfg = planned.opened.files, planned.opened.dataset, planned.cfg
    base = {
        "name": ", ".join(file.name for file in files.source.files),
        "bytes": sum(file.stat().st_size for file in files.source.files),
        "sha256": files.content_hash,
    }
    data = {
        "name": Path(str(cfg.task or cfg.data)).name,
        "trained": len(dataset.train),
        "evaluated": len(dataset.validation),
    }
    return {**planned.plan.to_dict(), "sources": {"base": base, "data": data}}


# ---------------------------------------------------------------------------------------------
# Planning


def settle(opened: Opened, machine: Machine, base_bytes: int, correction_bytes: int = 0) -> Planned:
    """Plan the request for this machine.

    ``base_bytes`` is the resident memory of the process now; ``correction_bytes`` what a forward pass took more than
    planned. Raises PlanDoesNotFit with the smallest budget that would work.
    """
    on_cpu = choose_device(opened.cfg, machine)[0] == "cpu"
    plan = make_plan(
        opened.files.shape,
        opened.cfg,
        usable(machine) if on_cpu else machine,
        opened.dataset.token_stats(),
        base_bytes=base_bytes,
        read_peak_bytes=opened.read_peak_bytes,
        source_bytes=opened.files.weight_bytes,
        correction_bytes=correction_bytes,
        states_room_bytes=None if opened.cfg.blocks == "all" else states_room_bytes(),
        caller=present_caller(),
    )
    return Planned(opened, plan.settle(opened.cfg), plan)


def split_less(
    planned: Planned, machine: Machine, base_bytes: int, peak_bytes: int
) -> Planned | None:
    """The plan with a larger micro-batch, if the longest one took so little that there is room; else None.

    ``peak_bytes`` is the measured peak over the longest micro-batch. A plan is corrected once,
    and only downwards: where memory allows less than planned, the guard halves the micro-batch.
    """
    before, opened = planned.plan, planned.opened
    planned_bytes = before.phase_bytes("forward")
    free = replace(opened, cfg=planned.cfg.reopened(micro_batch=None))
    with suppress(PlanDoesNotFit):
        # The first forward is not the largest that there will be.
        correction_bytes = min(0, peak_bytes + UNSEEN_BYTES - planned_bytes)
        again = settle(free, machine, base_bytes, correction_bytes)
        larger = again.plan.micro_batch > before.micro_batch
        if larger and again.plan.blocks_on_disk == before.blocks_on_disk:
            return replace(again, opened=opened)
    return None


def settle_again(opened: Opened, machine: Machine, base_bytes: int) -> Planned:
    """``settle`` for a run that goes on: nothing but its micro-batch may become smaller.

    Raises PlanDoesNotFit with the ways to go on.
    """
    try:
        return settle(opened, machine, base_bytes)
    except PlanDoesNotFit as problem:
        cfg = opened.cfg
        cap_bytes = budget(cfg, machine)[0]
        ways = [f"--max-mem {mb(problem.smallest_bytes)} or more"]
        micro_batch = cfg.micro_batch or 1
        while micro_batch > 1:
            micro_batch = (micro_batch + 1) // 2
            with suppress(PlanDoesNotFit):
                split = replace(opened, cfg=replace(cfg, micro_batch=micro_batch))
                settle(split, machine, base_bytes)
                ways.append(f"with --micro-batch {micro_batch} (losses are equal up to rounding)")
                break
        raise PlanDoesNotFit(
            f"{cfg.out} needs {mb(problem.smallest_bytes)} to go on as it is, but --max-mem is "
            f"{mb(cap_bytes)}. Nothing in it has changed.\n"
            f"Go on with --resume and {', or '.join(ways)}.",
            problem.smallest_bytes,
            problem.items,
        ) from problem


# ---------------------------------------------------------------------------------------------
# Loading


@phase("load")
def load_model(
    planned: Planned, machine: Machine, overlay: Overlay | None = None, half: Half = "whole"
) -> Loaded:
    """Read the weights into memory one tensor at a time; blocks that the plan has no room for go to ``overlay``.

    ``half``: only the frozen blocks, or only those above them, where the plan keeps states.

    Raises DoesNotFit where the disk has no room for the overlay; then nothing was written. Raises BudgetExceeded where
    reading has gone over the cap.
    """
    plan = planned.plan
    memory = open_memory(plan.device, plan.max_mem_bytes, machine)
    keep_cap(planned, memory, "Nothing was started")
    device = torch.device(plan.device)
    spec = replace(_spec_of(planned, device, _medium_of(planned, device, overlay, half)), half=half)
    if plan.panel_columns:
        keep_panel(plan.panel_columns)
    with memory.short("loading"):
        model = assemble(planned.opened.files, spec)
    malloc_trim()
    model.most_tokens, model.kept_tokens = plan.most_tokens, plan.kept_tokens
    if device.type == "cpu":
        allocator_reuse(MAPPED_BYTES)
        model.context.keep_tile(plan.tile_bytes)
        model.heap = Heap(plan.reused_tokens, plan.maps)
    else:
        allocator_reuse()  # the RAM is not what is short
    return Loaded(model, memory)


def _medium_of(
    planned: Planned, device: torch.device, overlay: Overlay | None, half: Half
) -> Medium | None:
    """Where blocks lie that do not stay in the memory with the cap; None where all of them stay."""
    plan, layers = planned.plan, planned.opened.files.shape.layers
    if half == "below":
        return None if overlay is None else overlay.medium(0)
    if plan.blocks_on_disk:
        if overlay is None:
            raise TypeError("a plan with blocks on disk needs a place for them")
        overlay.check_room(plan.disk_bytes)
        return overlay.medium(layers - plan.blocks_on_disk)
    if plan.blocks_in_host:
        return HostMedium(device, layers - plan.blocks_in_host)
    return None


def _spec_of(planned: Planned, device: torch.device, away: Medium | None) -> ModelSpec:
    cfg, dataset = planned.cfg, planned.opened.dataset
    return ModelSpec(
        precision=cfg.precision,
        train=cfg.train,
        directions=cfg.directions,
        seed=cfg.seed,
        rank=cfg.rank,
        rounding=cfg.rounding or "plane",
        kind=dataset.kind,
        label_ids=dataset.label_ids,
        dtype=DENSE_DTYPES[planned.plan.compute_dtype],
        device=device,
        away=away,
        mask=cfg.mask,
        rule=cfg.rule,
        keep=cfg.keep,
        sigma=cfg.sigma,
        refresh=cfg.refresh,
        evaluations=Estimator.of(cfg).evaluations,
        anchored=cfg.anchored,
        decay=cfg.weight_decay,
        decay_to=cfg.weight_decay_to,
        mixed=cfg.mixed,
        first_trained=planned.plan.first_trained,
    )
