"""``edgezo eval`` and ``edgezo replay``: rebuild a run, or load a plain model, in memory. export.py does so too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.data.dataset import Dataset
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.busy_cores import beside_others
from edgezo.machine.files import atomic_path
from edgezo.machine.gpu_memory import Memory, confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Meter, peak_rss_bytes, rss_bytes
from edgezo.network import cards, loader
from edgezo.network.model import Model
from edgezo.plan.budget import choose_device, portable
from edgezo.plan.config import RunConfig
from edgezo.run.base_file import BaseFile
from edgezo.run.claims import prepare_replay
from edgezo.run.directory import RunFiles, lost_head, run_id, same_task, words_of_run
from edgezo.run.exported import Exported
from edgezo.run.figures import evaluate_model
from edgezo.run.journal import Journal
from edgezo.run.journal_header import check_base
from edgezo.run.parent import copy_parents, open_with_parents
from edgezo.run.places import (
    at_base,
    check_data_is_there,
    for_torch,
    found_again,
    rows_to_evaluate,
    with_base,
)
from edgezo.run.readout_pass import recall
from edgezo.run.recipes import follow, replay_into
from edgezo.run.restore import snapshot_step
from edgezo.run.session import (
    Loaded,
    Opened,
    Planned,
    base_file,
    keep_cap,
    load_model,
    open_request,
    settle,
    without_states,
)
from edgezo.run.snapshots import Elsewhere, InBase, temporary_overlay
from edgezo.run.summary import check_same_end, takes_roots
from edgezo.run.summary_file import finish_replay, how_far, saved_summary, unfinished
from edgezo.weights.saved import saved_sha256, trained_tensors, write_saved
from edgezo.weights.verified import open_saved

NOTED_S = 10.0  # an evaluation that is estimated to take longer says so


def evaluate(
    target: str,
    cfg: RunConfig,
    note: Callable[[str], None] = lambda text: None,
    over_other_weights: bool = False,
) -> dict[str, Any]:
    """Evaluate a model, or a run (a directory with config.toml), on the validation rows of ``cfg``'s data.

    Where that has none: of a run's own rows on those that its training held out, of others on all.

    ``note`` gets a sentence for everything that a user should know about the data. ``over_other_weights``: the model of
    ``cfg`` has other weights than the run's base, beside which stands what the run has trained. Returns metric, value,
    n, loss and the memory that it took; with other weights their file as "over".
    """
    meter = Meter()
    run = RunFiles(Path(target))
    is_run = run.config.is_file()
    trained = run.read_config() if is_run else None
    if trained is None:
        cfg = replace(cfg, train=("head",))  # the smallest: nothing is trained
    else:
        cfg = without_states(with_base(cfg, run.path, note))
        check_data_is_there(cfg, run.path)
    saved = None if trained is None else found_again(trained, run.path)
    opened = open_request(cfg, rows_to_evaluate(cfg, saved, words_of_run(run) if saved else ()))
    for text in opened.dataset.notes:
        note(text)
    base = meter.mark("base")
    planned = settle(opened, confirmed(machine()), base.rss_bytes)
    over = base_file(opened.files) if over_other_weights else None
    with in_memory(run, trained, planned, note, over) as (model, memory, steps, far):
        meter.mark("load")
        seconds = planned.plan.evaluation_s
        if seconds is not None and seconds > NOTED_S and model.readout is None:
            note(f"{planned.plan.evaluations:,} rows to evaluate: about {seconds:.0f} s, estimated")
        with memory.short("an evaluation"):
            figures = evaluate_model(model, opened.dataset, opened.judge)
    standing: dict[str, Any] = {"unfinished": far} if far else {}
    if over is not None:
        standing["over"] = over.to_dict()
    return {
        "model": target,
        "steps": steps,
        **standing,
        **figures,
        **meter.summary(),
        **memory.figures(),
    }


class Ready(NamedTuple):
    """A model in memory that answers as its run does."""

    model: Model
    memory: Memory
    steps: int  # of the run; 0 for a plain model
    unfinished: str  # how far a run is that has not ended; ""


@contextmanager
def in_memory(
    run: RunFiles,
    trained: RunConfig | None,
    planned: Planned,
    note: Callable[[str], None],
    over: BaseFile | None = None,
) -> Iterator[Ready]:
    """A run at its end, or as far as it is, or a model with the linear probe that was exported with it.

    It is there until the end of the block. ``trained`` is the configuration of the run; None for a model. ``over`` are
    other weights than those of its base.
    """
    with ExitStack() as at_end:
        at_end.enter_context(beside_others())
        model, memory = at_end.enter_context(loaded(planned))
        steps, far = 0, ""
        if trained is not None:
            journal = at_end.enter_context(open_with_parents(run))
            steps = restore(run, trained, planned.opened, model, journal, over)
            far = how_far(run, trained, steps)
            if over is not None and saved_summary(run).get("steps") == steps:
                _check_same_shape(run, model, over)
            for text in unfinished(run, trained, steps):
                note(text)
        elif (exported := Exported.at(planned.opened.files.path)) is not None and exported.probed:
            note(_with_exported_probe(exported, planned.opened, model))
        yield Ready(model, memory, steps, far)


@contextmanager
def loaded(planned: Planned, *, once: bool = False) -> Iterator[Loaded]:
    """The model in memory; blocks that do not fit lie on disk until the end of the block.

    ``once``: each block is looked at once, so that frozen ones are best read from the base's own files.
    """
    with ExitStack() as at_end:
        overlay: Elsewhere | None = None
        if once and not planned.cfg.parts.weights:
            overlay = InBase()
        elif planned.plan.blocks_on_disk:
            overlay = at_end.enter_context(temporary_overlay())
        model, memory = load_model(planned, machine(), overlay)
        yield Loaded(at_end.enter_context(closing(model)), memory)
        keep_cap(planned, memory, "The model was computed with")


def restore(
    run: RunFiles,
    cfg: RunConfig,
    opened: Opened,
    model: Model,
    journal: Journal,
    over: BaseFile | None = None,
) -> int:
    """Bring ``model`` to the end of a run, or of what replay wrote; returns the number of steps.

    ``journal`` has to stay open as long as the model is used: blocks elsewhere read it when they are bound. ``over``:
    weights that are not its base's, and are the model's.
    Raises BaseMismatch, or EdgezoError where a file is missing, damaged or of another task.
    """
    content = opened.files.content_hash if over is None else journal.header.get("content_hash", "")
    check_base(journal.header, content, opened.files.shape.vocab)
    _check_task(journal.header, cfg, opened.dataset)
    stop = journal.next_step
    hidden, of_run = opened.files.shape.hidden, run_id(journal.header)
    if cfg.parts.readout and recall(run, model, hidden, of_run) is None:
        raise EdgezoError(
            f"{run.path} has no {run.probe.name} yet: its linear probe is not fitted.\n"
            f"Go on with: edgezo finetune --resume --out {run.path}"
        )
    if run.trained.exists():
        steps = _load_trained(run, model, of_run)
        if not _trains_elsewhere(model):
            return steps
        stop = steps
    elif model.needs_snapshots:
        if stop and not run.snapshot.exists():
            raise lost_head(run, cfg, stop)
        stop = snapshot_step(run, model, journal)
    follow(model, cfg, journal)
    replay_into(model, cfg.since_base(stop))
    with model.heap.updating():
        model.store.finish(cfg.since_base(stop))
    return stop


def _check_same_shape(run: RunFiles, model: Model, over: BaseFile) -> None:
    """EdgezoError unless a run has the same trained values beside other weights as beside its base's.

    They come from the journal alone, but for the sizes of the matrices: those of another model give others.
    """
    if saved_sha256(model.saved()) != saved_summary(run).get("trained_sha256"):
        raise EdgezoError(
            f"{over.name} is no other file of the model that {run.path} was trained on: beside its weights the "
            "journal gives other values than the run ended with. Give the same model in another type."
        )


def _with_exported_probe(exported: Exported, opened: Opened, model: Model) -> str:
    """Let an exported model classify by the linear probe that goes with it, where the data is of the same task.

    Returns a sentence that says whether it does.
    """
    if not exported.same_task(opened.dataset):
        words = ", ".join(exported.names)
        return f"the linear probe beside this model tells {words} apart, which is another task: not used"
    exported.classify(model, opened.files.shape.hidden)
    return "classified by the linear probe that was exported with this model"


def _check_task(header: dict[str, Any], cfg: RunConfig, dataset: Dataset) -> None:
    """Raise EdgezoError where trained weights belong to other label words than the data has."""
    of_run = header["dataset"]
    parts = cfg.parts
    if same_task(of_run, dataset) or not (parts.head or parts.readout or parts.weights):
        return
    words = ", ".join(of_run["label_names"]) or of_run["kind"]
    raise EdgezoError(
        f"the run trained {'+'.join(cfg.train)} for {words}; this data has "
        f"{', '.join(dataset.label_names) or dataset.kind}.\n"
        "Evaluate it on data of the same task with the same label words in the same order (--labels)."
    )


def _trains_elsewhere(model: Model) -> bool:
    """Whether blocks that are not in memory have changed: the journal has what they became."""
    return any(trainable.away for trainable in model.store.trainables.values())


def _load_trained(run: RunFiles, model: Model, of_run: str) -> int:
    """Read what replay wrote; returns the steps. With blocks elsewhere only the head: the journal has the rest."""
    way_out = "Run edgezo replay again from the original run."
    with open_saved(run.trained, {"steps"}, of_run, way_out) as file:
        steps = int(file.metadata["steps"])
        into = {} if _trains_elsewhere(model) else trained_tensors(model.store)
        for part in model.learned.values():
            into |= part.trained()
        file.read(into)
    return steps


def replay(
    source: Path,
    out: Path,
    check: Callable[[str], None] = lambda digest: None,
    base: str | None = None,
) -> dict[str, Any]:
    """Rebuild the fine-tuned weights of run ``source`` from base and journal, without data or forwards.

    ``out`` gets every trained tensor (trained.safetensors) beside the run's configuration and journal; it can be
    evaluated like the run. The same bits as the run's: compare ``trained_sha256``. ``check`` gets it before anything is
    written. ``base`` is where the base is now, if not where the run has it.
    """
    run, made = RunFiles(source), RunFiles(out)
    cfg = at_base(run.read_config(), base)
    if run.path.resolve() == made.path.resolve():
        raise UsageError(f"{out} is the run itself. Give another --out.")
    with brought_back(run, cfg) as rebuilt:
        steps, model = rebuilt.steps, rebuilt.model
        digest = saved_sha256(model.saved())
        if saved_summary(run).get("steps") == steps and not takes_roots(cfg):
            check_same_end(run, cfg, model, digest)
        check(digest)
        prepare_replay(made)
        with atomic_path(made.trained) as temporary:
            write_saved(temporary, model.saved(), {"steps": str(steps)}, run=rebuilt.of_run)
        copy_parents(run, made)
    return finish_replay(run, made, cfg, steps, digest)


class Rebuilt(NamedTuple):
    """A run in memory, at its end."""

    planned: Planned
    model: Model
    steps: int
    of_run: str  # its identity


@contextmanager
def brought_back(run: RunFiles, cfg: RunConfig) -> Iterator[Rebuilt]:
    """A run in memory until the end of the block, rebuilt from its files and the base, without data or forward passes.

    ``cfg`` is the configuration of the run.
    """
    here = confirmed(machine())
    cfg = portable(with_base(for_torch(cfg), run.path), here)
    if not cfg.parts.weights and choose_device(cfg, here)[0] == "cpu":
        cfg = replace(cfg, residency="disk")  # each block is looked at once, and is read then
    peak_before_bytes = peak_rss_bytes()
    files = loader.open_model(cards.resolve(cfg.model))
    with ExitStack() as at_end:
        journal = at_end.enter_context(open_with_parents(run))
        check_base(journal.header, files.content_hash, files.shape.vocab)
        data = _shape_of_data(journal.header)
        opened = Opened(without_states(cfg), files, None, data, peak_before_bytes=peak_before_bytes)
        planned = settle(opened, here, rss_bytes())
        model, _ = at_end.enter_context(loaded(planned, once=True))
        steps = restore(run, cfg, opened, model, journal)
        yield Rebuilt(planned, model, steps, run_id(journal.header))


def _shape_of_data(header: dict[str, Any]) -> Dataset:
    """A data set without rows: kind and label words as the journal has them, because replay reads no data."""
    facts = header["dataset"]
    return Dataset(
        kind=facts["kind"],
        train=(),
        validation=(),
        label_ids=tuple(facts["label_ids"]),
        label_names=tuple(facts["label_names"]),
        notes=(),
    )
