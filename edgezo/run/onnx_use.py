"""Uses of a run on the ONNX engine: ``edgezo eval`` and ``edgezo replay`` without torch. As evaluate.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_path, user_path
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import Meter
from edgezo.network.onnx_engine import OnnxModel
from edgezo.network.onnx_manifest import open_manifest
from edgezo.plan.config import RunConfig
from edgezo.plan.engines import on_graphs
from edgezo.run.claims import prepare_replay
from edgezo.run.directory import RunFiles, run_id, same_task, words_of_run
from edgezo.run.journal import Journal, open_journal
from edgezo.run.journal_header import check_base
from edgezo.run.onnx_figures import evaluate_on_onnx
from edgezo.run.onnx_session import OnnxOpened, load_onnx, model_over, open_onnx, settle_onnx
from edgezo.run.onnx_state import bring_back, trained_arrays, trained_sha256
from edgezo.run.places import check_data_is_there, found_again, rows_to_evaluate
from edgezo.run.summary_file import finish_replay, how_far, saved_summary
from edgezo.weights.plain_saved import write_arrays


def evaluate_onnx(
    target: str, cfg: RunConfig, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Evaluate graphs, or a run over them, on the validation rows of ``cfg``'s data.

    ``note`` gets a sentence for everything that a user should know. Returns metric, value, n, loss and the memory that
    it took. Raises as ``open_onnx``, and EdgezoError for a run that is damaged or of another base or task.
    """
    meter, run = Meter(), RunFiles(Path(target))
    trained = run.read_config() if run.config.is_file() else None
    if trained is None:
        cfg = replace(cfg, train=("head",))  # the smallest: nothing is trained
    else:
        cfg = replace(cfg, states=None if cfg.blocks == "all" else "none")
        check_data_is_there(cfg, run.path)
    saved = None if trained is None else found_again(trained, run.path)
    opened = open_onnx(cfg, rows_to_evaluate(cfg, saved, words_of_run(run) if saved else ()))
    for text in opened.dataset.notes:
        note(text)
    base = meter.mark("base")
    planned = settle_onnx(opened, machine(), base.rss_bytes, trains=False)
    model, steps, far = load_onnx(planned), 0, ""
    if trained is not None:
        with open_journal(run.journal, resume=False) as journal:
            steps = restored(run, trained, opened, model, journal)
            far = how_far(run, trained, steps)
    meter.mark("load")
    figures = evaluate_on_onnx(model, opened.dataset).figures
    standing = {"unfinished": far} if far else {}
    return {"model": target, "steps": steps, **standing, **figures, **meter.summary()}


def restored(
    run: RunFiles, cfg: RunConfig, opened: OnnxOpened, model: OnnxModel, journal: Journal
) -> int:
    """Bring ``model`` to the end of a run; its steps. Raises EdgezoError for another base or task."""
    check_base(journal.header, opened.manifest.base_sha256)
    facts = journal.header["dataset"]
    if (cfg.parts.head or cfg.parts.readout) and not same_task(facts, opened.dataset):
        raise EdgezoError(
            f"the run trained {'+'.join(cfg.train)} for {', '.join(facts['label_names']) or facts['kind']}; this data "
            f"has {', '.join(opened.dataset.label_names) or opened.dataset.kind}.\n"
            "Evaluate it on data of the same task with the same label words in the same order (--labels)."
        )
    return bring_back(run, cfg, model, journal)


# ---------------------------------------------------------------------------------------------
# Replay


def replay_on_onnx(source: Path, out: Path, base: str | None = None) -> dict[str, Any]:
    """Rebuild what run ``source`` has trained from the graphs' manifest and its journal, without data or forwards.

    A run of either engine: journals mean the same on both. ``out`` is as ``evaluate.replay`` writes it.
    """
    run, made = RunFiles(source), RunFiles(out)
    cfg = run.read_config()
    if run.path.resolve() == made.path.resolve():
        raise UsageError(f"{out} is the run itself. Give another --out.")
    cfg = on_graphs(replace(cfg, model=base or cfg.model))
    manifest = open_manifest(user_path(cfg.model))
    with open_journal(run.journal, resume=False) as journal:
        check_base(journal.header, manifest.base_sha256)
        facts = journal.header["dataset"]
        model = model_over(manifest, cfg, facts["kind"], facts["label_ids"])
        steps = bring_back(run, run.read_config(), model, journal)
        of_run = run_id(journal.header)
    digest = trained_sha256(model)
    summary = saved_summary(run)
    if summary.get("steps") == steps and summary.get("trained_sha256") != digest:
        raise EdgezoError(
            f"{run.path} has ended, but its files give other weights than it ended with. One of them was changed.\n"
            "Restore its journal, snapshot, probe and summary.json from one copy."
        )
    prepare_replay(made)
    with atomic_path(made.trained) as temporary:
        write_arrays(temporary, trained_arrays(model), {"steps": str(steps)}, of_run)
    return finish_replay(run, made, cfg, steps, digest)
