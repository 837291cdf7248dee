"""What finetune, eval and replay share: a request becomes open files and rows, then a plan, then a model in memory.

RunConfig -> open_request -> Opened -> settle -> Planned -> load_model -> Loaded
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edgezo.data.dataset import Dataset
from edgezo.data.sources import TRAINING, ReadFor
from edgezo.errors import UsageError
from edgezo.machine.first_use import compute_once
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
from edgezo.plan.calibration import ACTIVATIONS, FORWARD_HOLES, UNSEEN_BYTES
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.plan.evaluated import as_before
from edgezo.plan.numbers import compute_dtype
from edgezo.plan.plan import PlanDoesNotFit
from edgezo.plan.planner import make_plan
from edgezo.run.base_file import BaseFile
from edgezo.run.called import peak_before_bytes, present_caller, usable
from edgezo.run.directory import run_header
from edgezo.run.finetuner import Finetuner
from edgezo.run.objective import Judge
from edgezo.run.read_rows import ReadingModel, for_kind, read_rows
from edgezo.run.run_parts import PlannedRun
from edgezo.run.snapshots import Elsewhere
from edgezo.run.states_cache import states_room_bytes
from edgezo.weights.home import Medium
from edgezo.weights.layouts import DENSE_DTYPES
from edgezo.weights.ram import HostMedium
from edgezo.weights.tensor_source import stored_types
from edgezo.zo.credit import Estimator


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


Planned = PlannedRun[Opened]


class Loaded(NamedTuple):
    """A model in memory, and the memory that the cap is on."""

    model: Model
    memory: Memory


def open_request(cfg: RunConfig, read_for: ReadFor = TRAINING) -> Opened:
    """Find the model, check its files, read and tokenise the rows; those to evaluate on only unless they are to train.

    Raises UsageError for rows or settings that do not go together, EdgezoError for files that cannot be read, and
    DoesNotFit where reading them takes more than the cap.
    """
    before_bytes, here = peak_before_bytes(), machine()
    guard = ReadingGuard(ram_cap_bytes(cfg, usable(here)))
    files = loader.open_model(cards.resolve(cfg.model))
    loader.model_class(files)  # its code is part of the process that a plan starts from
    tokenizer = loader.load_tokenizer(files.path)
    dataset = read_data(cfg, files, tokenizer, guard, read_for)
    cfg = replace(for_kind(cfg, dataset), written_at=dataset.written_at)
    judge = _judge_of(cfg, files, tokenizer, dataset)
    if not _on_gpu(cfg, here):  # what the first computation brings is part of that process too
        compute_once(DENSE_DTYPES[compute_dtype(cfg.precision or "bf16", here.bf16_fast)[0]])
    malloc_trim()  # memory that parsing has freed is no part of the process that a plan starts from
    peak_bytes = peak_rss_bytes()
    read_bytes = peak_bytes if peak_bytes > before_bytes else 0
    return Opened(cfg, files, tokenizer, dataset, None, judge, before_bytes, read_bytes)


def _on_gpu(cfg: RunConfig, machine: Machine) -> bool:
    """Whether the request computes on a GPU; not where it asks for one that is not here, as the plan will say."""
    with suppress(UsageError):
        return choose_device(cfg, machine)[0] == "cuda"
    return False


def ram_cap_bytes(cfg: RunConfig, machine: Machine) -> int:
    """The cap on this process's memory: --max-mem, or its default where that is not given or caps a GPU's memory."""
    if cfg.max_mem_bytes is None or _on_gpu(cfg, machine):
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


def read_data(
    cfg: RunConfig,
    files: ModelFiles,
    tokenizer: Any,
    guard: Guard | None = None,
    read_for: ReadFor = TRAINING,
) -> Dataset:
    """The rows of a request, tokenised, all of them within the model's vocabulary and positions."""
    about = ReadingModel(
        path=files.path,
        shape=files.shape,
        masked=files.kind == "masked",
        notes=tuple(files.notes),
        position_offset=files.position_offset,
        end_ids=tuple(files.end_ids),
        most_in_tree=one_frequency_tokens(files.config),
        switch=longrope_switch(files.config),
    )
    return read_rows(cfg, about, tokenizer, guard, read_for)


def without_states(cfg: RunConfig) -> RunConfig:
    """The request of a run with the whole model in memory: no states are kept where nothing is trained."""
    return replace(cfg, states=None if cfg.blocks == "all" else "none", state_rows=None)


def header_of(opened: Opened, cfg: RunConfig) -> dict[str, Any]:
    """What the journal remembers of a run (``run_header``)."""
    finetuner = None if opened.finetuner is None else opened.finetuner.sha256
    return run_header(opened.files.content_hash, opened.dataset, cfg, finetuner)


def plan_file(planned: Planned) -> dict[str, Any]:
    """The content of plan.json: the plan, and what is known of the run's files wherever they are later."""
    files, dataset, cfg = planned.opened.files, planned.opened.dataset, planned.cfg
    size_bytes = sum(file.stat().st_size for file in files.source.files)
    base = {**base_file(files).to_dict(), "bytes": size_bytes}
    data = {
        "name": Path(str(cfg.task or cfg.data)).name,
        "trained": len(dataset.train),
        "evaluated": len(dataset.validation),
    }
    return {**planned.plan.to_dict(), "sources": {"base": base, "data": data}}


def base_file(files: ModelFiles) -> BaseFile:
    """The file of an open model's weights."""
    names = ", ".join(file.name for file in files.source.files)
    return BaseFile(names, files.content_hash, stored_types(files.source))


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
        planned = settle(opened, machine, base_bytes)
        return replace(planned, plan=as_before(planned.cfg, planned.plan))
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
    planned: Planned, machine: Machine, overlay: Elsewhere | None = None, half: Half = "whole"
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
        takes = {item.name: item.bytes for item in plan.items if item.phase == "forward"}
        block_bytes, hole_bytes = takes.get(ACTIVATIONS, 0), takes.get(FORWARD_HOLES, 0)
        planned_bytes = plan.planned_peak_bytes
        heap = Heap(plan.reused_tokens, plan.maps, planned_bytes, block_bytes, hole_bytes)
        model.heap = heap
        model.store.after_tile = heap.keep_to_plan
        for block in model.blocks:
            block.register_forward_hook(lambda *_: heap.keep_to_plan())
    else:
        allocator_reuse()  # the RAM is not what is short
    return Loaded(model, memory)


def _medium_of(
    planned: Planned, device: torch.device, overlay: Elsewhere | None, half: Half
) -> Medium | None:
    """Where blocks lie that do not stay in the memory with the cap; None where all of them stay."""
    plan, layers = planned.plan, planned.opened.files.shape.layers
    if half == "below":
        if plan.pass_from_disk and device.type != "cpu":
            return HostMedium(device, 0)
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
