"""A run or the graphs of a model in memory that answer on ONNX Runtime, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgezo.data.batches import Example, packed_rows
from edgezo.errors import EdgezoError
from edgezo.machine.files import user_path
from edgezo.machine.hardware import machine
from edgezo.machine.process_memory import ReadingGuard, malloc_trim, peak_rss_bytes, rss_bytes
from edgezo.network.onnx_engine import OnnxModel
from edgezo.network.onnx_manifest import is_trainable_export
from edgezo.network.onnx_writing import check_writes, write_all, write_one
from edgezo.network.plain_tokenizer import PlainTokenizer
from edgezo.network.sampling import Sampler
from edgezo.plan.budget import default_budget
from edgezo.plan.config import RunConfig
from edgezo.run.answering import AnswerText, evaluation_parts, scores_in_parts
from edgezo.run.called import usable
from edgezo.run.directory import RunFiles
from edgezo.run.journal import open_journal
from edgezo.run.onnx_session import OnnxOpened, load_onnx, open_graphs, settle_onnx
from edgezo.run.onnx_state import as_read
from edgezo.run.onnx_use import restored
from edgezo.run.predictor import Predictor, asked_dataset, asker_of
from edgezo.run.summary_file import how_far, unfinished


@dataclass
class OnnxAnswers:
    """Answers of a model in memory (``answering.Answering``)."""

    model: OnnxModel
    written: AnswerText
    kept_tokens: int  # whose keys and values are kept at once

    @property
    def probed(self) -> bool:
        return self.model.readout is not None

    def scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        return scores_in_parts(as_read(self.model, examples), self._answered)

    def _answered(self, examples: Sequence[Example]) -> np.ndarray:
        return self.model.answers(packed_rows(examples, range(len(examples))))

    def texts(self, examples: Sequence[Example], most: int) -> list[str]:
        texts = [""] * len(examples)
        for part in evaluation_parts(examples, most, self.kept_tokens):
            prompts = [examples[i].prompt for i in part]
            for i, ids in zip(
                part, write_all(self.model, prompts, most, self.written.over), strict=True
            ):
                texts[i] = self.written.answer(ids)
        return texts

    def tokens_after(
        self, prompt: Sequence[int], most: int, sampler: Sampler | None
    ) -> Iterator[int]:
        return write_one(self.model, prompt, most, sampler)

    def figures(self) -> dict[str, Any]:
        return {}


@contextmanager
def predictor_on_onnx(
    target: str, cfg: RunConfig, note: Callable[[str], None]
) -> Iterator[Predictor]:
    """As ``predict.predictor``, on ONNX Runtime."""
    run = RunFiles(Path(target))
    trained = run.read_config() if run.config.is_file() else None
    kind: str | None = None
    names: tuple[str, ...] = ()
    guard = ReadingGuard(cfg.max_mem_bytes or default_budget(usable(machine()))[0])
    if trained is None:
        cfg = replace(cfg, train=("head",))  # the smallest: nothing is trained
    else:
        cfg = replace(cfg, states=None if cfg.blocks == "all" else "none", state_rows=None)
        with open_journal(run.journal, resume=False) as journal:
            facts = journal.header["dataset"]
        kind, names = facts["kind"], tuple(facts["label_names"])
        if not is_trainable_export(user_path(cfg.model)):
            raise EdgezoError(
                f"{run.path} was trained over the graphs in {cfg.model}, which are not there.\n"
                "Say where they are now: --base DIR. With PyTorch, --base MODEL takes the model itself."
            )
    manifest = open_graphs(cfg)
    tokenizer = PlainTokenizer.of(manifest)
    asker = asker_of(cfg, tokenizer, manifest.shape, kind, names)
    for text in asker.notes:
        note(text)
    dataset = asked_dataset(asker)
    ending = AnswerText.ends_of(tokenizer, manifest.values["end_ids"])
    written = AnswerText(dataset, tokenizer, ending)
    malloc_trim()
    peak_bytes = peak_rss_bytes()
    read_bytes = peak_bytes if peak_bytes > guard.peak_before_bytes else 0
    before_bytes = guard.peak_before_bytes
    opened = OnnxOpened(cfg, manifest, tokenizer, dataset, before_bytes, read_bytes)
    planned = settle_onnx(opened, machine(), rss_bytes(), trains=False)
    model, steps, far = load_onnx(planned), 0, ""
    try:
        if trained is None:
            model.scorer.exact = None
        else:
            with open_journal(run.journal, resume=False) as journal:
                steps = restored(run, trained, opened, model, journal)
            far = how_far(run, trained, steps)
            for text in unfinished(run, trained, steps):
                note(text)
        answers = OnnxAnswers(model, written, planned.plan.kept_tokens)
        used = Predictor(target, answers, asker, written, guard, steps, far)
        if not used.classifies and asker.may_write:
            check_writes(model)
        try:
            yield used
        finally:
            used.end_askers()
    finally:
        model.sessions.drop()
