"""What finetune, eval and replay have in common: a request becomes files, data, a plan and a model in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgezo.data.batches import Example, collate, evaluation_batches
from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.gpu_memory import Memory, ProcessMemory, open_memory
from edgezo.machine.hardware import Machine
from edgezo.machine.process_memory import Heap, allocator_reuse, malloc_trim
from edgezo.machine.profiler import phase
from edgezo.network import cards, loader
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.model import Model
from edgezo.plan.budget import budget, mb
from edgezo.plan.fields import LOSS
from edgezo.plan.plan import Plan, PlanDoesNotFit
from edgezo.plan.planner import make_plan
from edgezo.plan.request import RunConfig
from edgezo.run.journal import Journal, StepRecord
from edgezo.run.objective import Judge
from edgezo.weights.layouts import DENSE_DTYPES
from edgezo.weights.ram import HostMedium
from edgezo.zo.credit import Estimator
from edgezo.zo.recipe import TWO_SIDED, Recipe

if TYPE_CHECKING:
    from edgezo.network.loader import ModelFiles
    from edgezo.run.directory import Overlay
    from edgezo.run.finetuner import Finetuner
    from edgezo.weights.home import Medium


@dataclass
class Opened:
    """A request with its files and data open; no weight has been read."""

    cfg: RunConfig
    files: ModelFiles
    tokenizer: Any
    dataset: Dataset
    plan: Plan | None = None  # once settled
    memory: Memory = field(default_factory=ProcessMemory)  # once loaded: where the cap is
    finetuner: Finetuner | None = None  # of training with --mask block
    judge: Judge | None = None  # where predictions are written or scored


def open_request(cfg: RunConfig) -> Opened:
    """Resolve the model, check its files, read and tokenise the data."""
    files = loader.open_model(cards.resolve(cfg.model))
    loader.model_class(files)  # its code is part of the process that a plan starts from
    tokenizer = loader.load_tokenizer(files.path)
    dataset = read_data(cfg, files, tokenizer)
    cfg = _for_kind(cfg, dataset.kind)
    opened = Opened(cfg, files, tokenizer, dataset)
    opened.judge = judge_of(opened)
    malloc_trim()  # what parsing has left in the heap is no part of the process that a plan starts from
    return opened


def judge_of(opened: Opened) -> Judge | None:
    """What turns predictions into figures, where the task or the request asks for more than loss and accuracy."""
    cfg, dataset = opened.cfg, opened.dataset
    if cfg.objective == LOSS and dataset.generation is None and dataset.report is None:
        return None
    return Judge.of(cfg, dataset, opened.tokenizer, _end_ids(opened.files))


def _for_kind(cfg: RunConfig, kind: str) -> RunConfig:
    """The request for rows of this kind: only label words have classes that a linear probe tells apart."""
    if kind == "label" or "probe" not in cfg.train:
        return cfg
    train = tuple(part for part in cfg.train if part != "probe")
    if not train:
        raise UsageError(
            f"--train probe tells classes apart, but these rows are of the kind {kind}.\n"
            "Use --train head, or lowrank+head."
        )
    return replace(cfg, train=train)


def read_data(cfg: RunConfig, files: ModelFiles, tokenizer: Any) -> Dataset:
    request = DataRequest(
        data=cfg.data,
        task=cfg.task,
        data_root=cfg.data_root,
        template=cfg.template,
        labels=cfg.labels,
        label_field=cfg.label_field,
        max_length=cfg.max_length,
        eval_limit=cfg.eval_limit,
        held_out=cfg.held_out,
        seed=cfg.seed,
        judged=cfg.objective != LOSS,
        max_new_tokens=cfg.max_new_tokens,
    )
    dataset = load_dataset(request, tokenizer, masked=files.kind == "masked")
    examples = (*dataset.train, *dataset.validation)
    used = (*dataset.label_ids, *(max(row.ids, default=0) for e in examples for row in e.rows))
    if max(used) >= files.shape.vocab:
        raise EdgezoError(
            f"the tokenizer of {files.path} gives the token {max(used)}, but the model has only "
            f"{files.shape.vocab} words.\nThe two do not belong together: fetch the model again."
        )
    if files.shape.positions:  # a learned table: there is nothing beyond its end
        positions = files.shape.max_positions - files.position_offset
        _check_lengths(dataset, examples, positions, files.path)
    return dataset


def _check_lengths(
    dataset: Dataset, examples: Sequence[Example], positions: int, path: Path
) -> None:
    """UsageError for rows, or prompts and their answers, of more tokens than the model has positions."""
    longest = max(len(row.ids) for example in examples for row in example.rows)
    if longest > positions:
        raise UsageError(
            f"a row has {longest} tokens, but {path} knows {positions} positions: give --max-length {positions}"
        )
    if dataset.generation is not None:
        longest = max(len(e.prompt) for e in examples) + dataset.generation.most
        if longest > positions:
            raise UsageError(
                f"a prompt and its answer may have {longest} tokens, but {path} knows "
                f"{positions} positions: give a smaller --max-length or --max-new-tokens"
            )


def _end_ids(files: ModelFiles) -> list[int]:
    """Tokens that end a text by the model's configuration."""
    found = getattr(files.config, "eos_token_id", None)
    return list(found) if isinstance(found, list) else [] if found is None else [int(found)]


def settle(opened: Opened, machine: Machine, base_bytes: int, correction_bytes: int = 0) -> Plan:
    """Plan the request against this machine; afterwards ``opened.cfg`` has nothing left open."""
    tokens = opened.dataset.token_stats()
    plan = make_plan(
        opened.files.shape,
        opened.cfg,
        machine,
        tokens,
        base_bytes=base_bytes,
        correction_bytes=correction_bytes,
    )
    opened.cfg, opened.plan = plan.settle(opened.cfg), plan
    return plan


def split_less(opened: Opened, machine: Machine, base_bytes: int, peak_bytes: int) -> Plan | None:
    """The plan with a larger micro-batch, if ``peak_bytes``, measured over the longest one, leave room for it.

    A plan is corrected once: where memory allows less than planned, the guard sees to it.
    """
    before = opened.plan
    assert before is not None
    planned_bytes = before.phase_bytes("forward") - opened.memory.margin_bytes
    free = replace(opened, cfg=replace(opened.cfg, micro_batch=None))
    with suppress(PlanDoesNotFit):
        plan = settle(free, machine, base_bytes, min(0, peak_bytes - planned_bytes))
        if plan.micro_batch > before.micro_batch and plan.blocks_on_disk == before.blocks_on_disk:
            opened.cfg, opened.plan = free.cfg, plan
            return plan
    return None


def settle_again(opened: Opened, machine: Machine, base_bytes: int) -> Plan:
    """`settle` for a run that goes on, which can be split further and that is all.

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


@phase("load")
def load_model(opened: Opened, machine: Machine, overlay: Overlay | None = None) -> Model:
    """Stream the weights into memory, and into ``overlay`` what the plan has no room for.

    Raises DoesNotFit where the disk has no room for the overlay; then nothing was written.
    """
    cfg, plan = opened.cfg, opened.plan
    assert cfg.precision is not None and plan is not None, "a plan says where weights go"
    opened.memory = open_memory(plan.device, plan.max_mem_bytes, machine)
    device, layers = torch.device(plan.device), opened.files.shape.layers
    away: Medium | None = None
    if plan.blocks_on_disk:
        assert overlay is not None, "weights on disk need a place"
        overlay.check_room(plan.disk_bytes)
        away = overlay.medium(layers - plan.blocks_on_disk)
    elif plan.blocks_in_host:
        away = HostMedium(device, layers - plan.blocks_in_host)
    spec = ModelSpec(
        precision=cfg.precision,
        train=cfg.train,
        directions=cfg.directions,
        seed=cfg.seed,
        rank=cfg.rank,
        rounding=cfg.rounding or "plane",
        kind=opened.dataset.kind,
        label_ids=opened.dataset.label_ids,
        dtype=DENSE_DTYPES[plan.compute_dtype],
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
        mixed=cfg.mixed,
    )
    with opened.memory.short("loading"):
        model = assemble(opened.files, spec)
    malloc_trim()
    model.most_tokens, model.kept_tokens = plan.most_tokens, plan.kept_tokens
    if device.type == "cpu":
        model.heap = Heap(plan.reused_tokens, plan.maps)
    else:
        allocator_reuse()  # the RAM is not what is short
    return model


# ---------------------------------------------------------------------------------------------
# Steps from records


def recipe_of(cfg: RunConfig, record: StepRecord) -> Recipe:
    """The update that a journal record stands for: all that replay needs."""
    estimator, credit = Estimator.of(cfg), record.credit
    anchor, pull = None, 0.0
    if cfg.anchored:
        # The last one of the record is the mean of the anchor's, so that a record says all of its step.
        anchor = record.step - record.step % cfg.refresh
        credit, last = credit[:-1], credit[-1:]
        pull = float(estimator.coefficients(last, record.step_size, record.sigma)[0])
    if record.skipped:
        return Recipe(record.step, 0 * credit, 0.0, (), anchor=anchor)
    return Recipe(
        record.step,
        estimator.coefficients(credit, record.step_size, record.sigma),
        # The decay follows the schedule of the step.
        cfg.weight_decay * record.step_size / cfg.step,
        record.touched,
        record.step_size,
        estimator.curvature(record.losses, record.sigma),
        None if record.scales is None else record.scales[0] * record.scales[1:],
        anchor,
        pull,
    )


def journal_is_shaped(cfg: RunConfig) -> bool:
    """Whether a step's record holds other than two losses and one credit an example."""
    evaluations = Estimator.of(cfg).evaluations
    other = evaluations != TWO_SIDED or cfg.anchored
    return other and cfg.probing


def follow(model: Model, cfg: RunConfig, journal: Journal) -> None:
    """Let ``replay_into``, and blocks elsewhere that lack updates, take them from ``journal``."""

    def recipes(first: int, stop: int) -> Iterator[Recipe]:
        for record in journal.records(first):
            if record.step >= stop:
                return
            yield recipe_of(cfg, record)

    model.store.history = recipes


@phase("update")
def replay_into(model: Model, stop: int) -> None:
    """Apply the updates before step ``stop`` of the journal that the model follows to weights as loaded.

    Nothing where a snapshot has the weights.
    """
    if not model.guided:
        with model.heap.updating():
            model.store.replay(stop)


# ---------------------------------------------------------------------------------------------
# Evaluation


@phase("eval")
def evaluate_model(model: Model, dataset: Dataset, judge: Judge | None = None) -> dict[str, Any]:
    """Metric over the validation rows: accuracy where there is a right answer, else the mean loss.

    A judge gives its own: the first of its figures is the metric, the others go by their names.
    """
    examples = dataset.validation
    total_loss, right = 0.0, 0
    chosen = [0] * len(examples)
    for batch in evaluation_batches(examples):
        packed = collate([examples[i] for i in batch], range(len(batch)))
        losses, predicted = model.losses(packed)
        total_loss += float(losses.double().sum())
        right += int((predicted[0] == packed.labels).sum())
        for i, option in zip(batch, predicted[0].tolist(), strict=True):
            chosen[i] = option
    texts = judge.texts(model, chosen) if judge is not None else []
    return figures_of(dataset, total_loss, right, judge, texts)


def figures_of(
    dataset: Dataset, total_loss: float, right: int, judge: Judge | None, texts: Sequence[str]
) -> dict[str, Any]:
    """The figures of an evaluation from its sums, and from the predictions ``texts`` where there is a judge."""
    n = len(dataset.validation)
    loss = total_loss / n if n else float("nan")
    figures = {"loss": loss}
    if dataset.kind in ("label", "choice"):
        figures = {"accuracy": right / n if n else 0.0}
    if judge is not None:
        found = judge.figures(texts)
        own = judge.writes or dataset.report is not None
        figures = found if own else {**figures, **found}
    metric, value = next(iter(figures.items()))
    others = {k: v for k, v in figures.items() if k != metric or k == "objective"}
    return {"metric": metric, "value": value, "n": n, "loss": loss, **others}
