"""``edgezo eval`` and ``edgezo replay``: a run, or a plain model, brought back into memory; export.py does it too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from edgezo.data.dataset import Dataset
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_path, atomic_write, to_json
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Meter, rss_bytes
from edgezo.network import cards, loader
from edgezo.network.model import Model
from edgezo.plan.budget import portable
from edgezo.plan.request import RunConfig
from edgezo.run.directory import RunFiles, load_snapshot, lost_head, temporary_overlay
from edgezo.run.journal import Journal, check_base, open_journal
from edgezo.run.readout_pass import recall
from edgezo.run.session import (
    Opened,
    evaluate_model,
    follow,
    load_model,
    open_request,
    replay_into,
    settle,
)
from edgezo.weights.safetensors_file import write_saved
from edgezo.weights.store import saved_sha256


def evaluate(
    target: str, cfg: RunConfig, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Metric of a model or of a run (a directory with config.toml) on the validation rows of ``cfg``'s data.

    ``note`` is told what there is to say about the data.
    """
    meter = Meter()
    run = RunFiles(Path(target))
    is_run = run.config.is_file()
    trained = run.read_config() if is_run else None
    if trained is None:
        cfg = replace(cfg, train=("head",))  # the smallest: nothing is trained
    opened = open_request(cfg)
    for text in opened.dataset.notes:
        note(text)
    base = meter.mark("base")
    settle(opened, confirmed(machine()), base.rss_bytes)
    with ExitStack() as held:
        model = held.enter_context(loaded(opened))
        steps = 0
        if trained is not None:
            journal = held.enter_context(open_journal(run.journal, resume=False))
            steps = restore(run, trained, opened, model, journal)
        elif run.probe.is_file():
            note(_with_exported_probe(run, opened, model))
        meter.mark("load")
        with opened.memory.short("an evaluation"):
            found = evaluate_model(model, opened.dataset, opened.judge)
    return {"model": target, "steps": steps, **found, **meter.summary(), **opened.memory.figures()}


@contextmanager
def loaded(opened: Opened) -> Iterator[Model]:
    """The model in memory; what does not fit lies elsewhere until the end of the block."""
    with ExitStack() as held:
        overlay = None
        if opened.plan is not None and opened.plan.blocks_on_disk:
            overlay = held.enter_context(temporary_overlay())
        yield held.enter_context(closing(load_model(opened, machine(), overlay)))


def restore(run: RunFiles, cfg: RunConfig, opened: Opened, model: Model, journal: Journal) -> int:
    """Bring ``model`` to the end of a run or of what replay wrote; returns the steps. Checks the base.

    ``journal`` has to stay open as long as the model is used: blocks elsewhere read it when they are bound.
    """
    check_base(journal.header, opened.files.content_hash)
    _check_task(journal.header, cfg, opened.dataset)
    stop = journal.next_step
    if "probe" in cfg.train and recall(run, model, opened.files.shape.layers) is None:
        raise EdgezoError(
            f"{run.path} has no {run.probe.name} yet: its linear probe is not fitted.\n"
            f"Go on with: edgezo finetune --resume --out {run.path}"
        )
    if run.trained.exists():
        steps = _load_trained(run, model)
        if model.store.residency is None:
            return steps
        stop = steps
    elif model.needs_snapshots:
        if stop and not run.snapshot.exists():
            raise lost_head(run, cfg, stop)
        stop = load_snapshot(run, model)
    follow(model, cfg, journal)
    replay_into(model, stop)
    with model.heap.updating():
        model.store.finish(stop)
    return stop


def _with_exported_probe(folder: RunFiles, opened: Opened, model: Model) -> str:
    """Let an exported model classify by the probe beside it, where the data is that of its run; what was done."""
    try:
        began = json.loads(folder.exported.read_text(encoding="utf-8"))["dataset"]
        ours = _same_task(began, opened.dataset)
        words = ", ".join(began["label_names"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise EdgezoError(
            f"{folder.path} has a linear probe, but what it is for cannot be read from {folder.exported.name} "
            f"({problem}).\nExport the run again, or remove {folder.probe.name} to evaluate without it."
        ) from problem
    if not ours:
        return f"the linear probe beside this model tells {words} apart, which is another task: not used"
    recall(folder, model, opened.files.shape.layers)
    return "classified by the linear probe that was exported with this model"


def _same_task(began: dict[str, Any], dataset: Dataset) -> bool:
    return began["kind"] == dataset.kind and tuple(began["label_ids"]) == dataset.label_ids


def _check_task(header: dict[str, Any], cfg: RunConfig, dataset: Dataset) -> None:
    """A trained head, and a full table, belong to the label words that the run was trained with."""
    began = header["dataset"]
    if _same_task(began, dataset) or not {"head", "probe", "full"} & set(cfg.train):
        return
    words = ", ".join(began["label_names"]) or began["kind"]
    raise EdgezoError(
        f"the run trained {'+'.join(cfg.train)} for {words}; this data has "
        f"{', '.join(dataset.label_names) or dataset.kind}.\n"
        "Evaluate it on data of the same task with the same label words in the same order (--labels)."
    )


def _load_trained(run: RunFiles, model: Model) -> int:
    """Read what replay wrote; where blocks are elsewhere only the head, for the rest is in the journal."""
    try:
        with safe_open(run.trained, "pt") as file:
            steps = int(file.metadata()["steps"])
            learned = {
                n: file.get_tensor(n) for part in model.learned.values() for n in part.trained()
            }
        tensors = load_file(run.trained) if model.store.residency is None else {}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
        raise EdgezoError(
            f"{run.trained} cannot be read ({problem}).\nRun edgezo replay again from the original run."
        ) from problem
    if model.store.residency is None:
        model.store.load_trained(tensors)
    for part in model.learned.values():
        for name, held in part.trained().items():
            held.copy_(learned[name])
    return steps


def replay(source: Path, out: Path) -> dict[str, Any]:
    """Rebuild the fine-tuned weights of run ``source`` from base and journal, without data or forwards.

    ``out`` gets every trained tensor (trained.safetensors) beside the run's configuration and journal; it can be
    evaluated like the run. The same bits as the run's: compare ``trained_sha256``.
    """
    run, made = RunFiles(source), RunFiles(out)
    cfg = run.read_config()
    if made.journal.exists() and not made.trained.exists():
        raise UsageError(f"{out} holds a run, which a replay would overwrite. Give another --out.")
    with brought_back(run, cfg) as found:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EdgezoError(
                f"{out} cannot be made ({problem.strerror}).\nGive another --out."
            ) from problem
        steps, model = found.steps, found.model
        with atomic_path(made.trained) as temporary:
            write_saved(temporary, model.saved(), {"steps": str(steps)})
        digest = saved_sha256(model.saved())
        # The configuration last: with it the directory counts as a run, and is a whole one.
        kept = [(run.journal, made.journal), (run.config, made.config)]
        if run.probe.exists():
            kept.insert(0, (run.probe, made.probe))
        for own, copy in kept:
            atomic_write(copy, own.read_bytes())
    result = {"run": str(source), "out": str(out), "steps": steps, "trained_sha256": digest}
    atomic_write(out / "replay.json", (to_json(result) + "\n").encode())
    return result


class Brought(NamedTuple):
    """A run in memory, at its end."""

    opened: Opened
    model: Model
    steps: int


@contextmanager
def brought_back(run: RunFiles, cfg: RunConfig) -> Iterator[Brought]:
    """A run in memory until the end of the block, from its own files and the base: no data, no forwards.

    ``cfg`` is the configuration that the run has.
    """
    cfg = portable(cfg, confirmed(machine()))
    files = loader.open_model(cards.resolve(cfg.model))
    with ExitStack() as held:
        journal = held.enter_context(open_journal(run.journal, resume=False))
        check_base(journal.header, files.content_hash)
        opened = Opened(cfg, files, None, _shape_of_data(journal.header))
        settle(opened, confirmed(machine()), rss_bytes())
        model = held.enter_context(loaded(opened))
        yield Brought(opened, model, restore(run, cfg, opened, model, journal))


def _shape_of_data(header: dict[str, Any]) -> Dataset:
    """The data's kind and label words, which the journal remembers: replay reads no data."""
    found = header["dataset"]
    return Dataset(
        kind=found["kind"],
        train=(),
        validation=(),
        label_ids=tuple(found["label_ids"]),
        label_names=tuple(found["label_names"]),
        notes=(),
    )
