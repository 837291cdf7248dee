"""``edgezo report RUN --ask``: what needs the model once more, asked of the base and then of the run.

    untouched   the loss of texts that have nothing to do with the run's rows: how much of the language it has forgotten
    rows        of prompts and conversations: ten held-out rows with what base and run write after them

The base is loaded, asked, brought to the end of the run, and asked again, under the cap of the run. The result is
asked.json, which the page about the run shows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.data.sources import ReadFor
from edgezo.machine.busy_cores import beside_others
from edgezo.machine.files import atomic_write, to_json
from edgezo.machine.gpu_memory import confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import rss_bytes
from edgezo.plan.budget import portable
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.run.directory import RunFiles
from edgezo.run.evaluate import loaded, restore
from edgezo.run.figures import evaluate_rows
from edgezo.run.journal import open_journal
from edgezo.run.kept_answers import SHOWN_ROWS, as_text, shortened
from edgezo.run.overview import Overview
from edgezo.run.parent import open_with_parents
from edgezo.run.places import at_base, check_data_is_there, with_base
from edgezo.run.row_figures import EvaluatedRows
from edgezo.run.session import Opened, open_request, settle, without_states

TEXTS = Path(__file__).parents[1] / "data" / "untouched" / "texts.txt"
MOST_ASKED = 48  # tokens of an answer, where the run does not say


def ask(run: Overview, note: Callable[[str], None], base: str | None = None) -> dict[str, Any]:
    """Ask the base and the run, and write asked.json; returns what it holds. ``base``: where the base is now.

    Raises EdgezoError where base or rows are not there, and DoesNotFit where they do not fit into the run's cap.
    """
    cfg = portable(at_base(run.files.read_config(), base), confirmed(machine()))
    cfg = with_base(cfg, run.files.path, note)
    with open_journal(run.files.journal, resume=False) as journal:
        kind = str(journal.header["dataset"]["kind"])
    asked: dict[str, Any] = {"run": run.of_run}
    parts = cfg.parts
    if kind in ("label", "choice") and (parts.head or parts.readout or parts.weights):
        asked["untouched"] = None  # trained for label words: what is left reads no other text
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write_texts(Path(folder), kind)
            before, after, _ = _both(run.files, cfg, _of_texts(cfg, folder), note)
        asked["untouched"] = {"before": before.figures, "after": after.figures}
    if kind == "completion":
        check_data_is_there(cfg, run.files.path)
        few = replace(cfg, eval_limit=SHOWN_ROWS, max_new_tokens=cfg.max_new_tokens or MOST_ASKED)
        before, after, opened = _both(run.files, cfg, few, note)
        asked["rows"] = [
            {
                **as_text(opened.dataset.validation[i], opened.dataset, opened.tokenizer),
                "before": shortened(before.texts[i]),
                "after": shortened(after.texts[i]),
            }
            for i in range(len(after.texts))
        ]
    atomic_write(run.files.asked, (to_json(asked) + "\n").encode(), lock=True)
    return asked


class _Both(NamedTuple):
    """What a model answers before and after training, and to which rows."""

    before: EvaluatedRows
    after: EvaluatedRows
    opened: Opened


def _both(
    files: RunFiles, trained: RunConfig, cfg: RunConfig, note: Callable[[str], None]
) -> _Both:
    """Evaluate the base and then the run on the rows of ``cfg``. ``trained`` is the configuration of the run."""
    opened = open_request(without_states(cfg), ReadFor(training=False))
    for text in opened.dataset.notes:
        note(text)
    planned = settle(opened, confirmed(machine()), rss_bytes())
    with ExitStack() as at_end:
        at_end.enter_context(beside_others())
        model, memory = at_end.enter_context(loaded(planned))
        journal = at_end.enter_context(open_with_parents(files))
        with memory.short("an evaluation"):
            before = evaluate_rows(model, opened.dataset, opened.judge)
        restore(files, trained, opened, model, journal)
        with memory.short("an evaluation"):
            after = evaluate_rows(model, opened.dataset, opened.judge)
    return _Both(before, after, opened)


def _of_texts(cfg: RunConfig, folder: str) -> RunConfig:
    """The request of a run for other rows, with nothing that belongs to its own ones."""
    return replace(
        replace(cfg, task=None, template=None, labels=None, data_root=None, held_out=None),
        data=folder,
        objective=LOSS,
        max_new_tokens=None,
        eval_limit=None,
    )


def _write_texts(folder: Path, kind: str) -> None:
    """The texts as rows of the run's kind: prompts and completions, or texts."""
    texts = TEXTS.read_text(encoding="utf-8").strip().split("\n\n")
    if kind == "completion":
        halves = [text.partition(". ") for text in texts]
        rows = [{"prompt": f"{first}.", "completion": f" {rest}"} for first, _, rest in halves]
    else:
        rows = [{"text": text} for text in texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train.jsonl", "validation.jsonl"):
        (folder / name).write_text(lines, encoding="utf-8")
