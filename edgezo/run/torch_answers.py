"""A run or a model in memory that answers with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgezo.data.batches import Example, collate
from edgezo.machine.files import user_path
from edgezo.machine.gpu_memory import Memory, confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.limits import EVAL_TOKENS
from edgezo.machine.process_memory import ReadingGuard, malloc_trim, peak_rss_bytes, rss_bytes
from edgezo.network import cards, loader
from edgezo.network.generate import write_one
from edgezo.network.model import Model
from edgezo.network.sampling import Sampler
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.run.answering import evaluation_parts, scores_in_parts
from edgezo.run.called import usable
from edgezo.run.directory import RunFiles
from edgezo.run.evaluate import in_memory
from edgezo.run.exported import Exported
from edgezo.run.objective import Judge
from edgezo.run.parent import open_with_parents
from edgezo.run.places import with_base
from edgezo.run.predictor import Predictor, asked_dataset, asker_of
from edgezo.run.session import Opened, ram_cap_bytes, settle, without_states


@dataclass
class TorchAnswers:
    """Answers of a model in memory (``answering.Answering``)."""

    model: Model
    memory: Memory
    judge: Judge

    @property
    def probed(self) -> bool:
        return self.model.readout is not None

    def scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        with self.memory.short("predictions"):
            return scores_in_parts(self.model.reads(examples), self._answered)

    def _answered(self, examples: Sequence[Example]) -> np.ndarray:
        answers: np.ndarray = self.model.answers(collate(examples, range(len(examples)))).numpy()
        return answers

    def texts(self, examples: Sequence[Example], most: int) -> list[str]:
        texts = [""] * len(examples)
        with self.memory.short("answers"):
            for part in evaluation_parts(examples, most, self.model.kept_tokens):
                chosen = [examples[i] for i in part]
                (written,) = self.judge.write(self.model, chosen, most_tokens=EVAL_TOKENS)
                for i, text in zip(part, written, strict=True):
                    texts[i] = text
        return texts

    def tokens_after(
        self, prompt: Sequence[int], most: int, sampler: Sampler | None
    ) -> Iterator[int]:
        choose = None if sampler is None else _of_tensors(sampler)
        return write_one(self.model, prompt, most, choose)

    def figures(self) -> dict[str, Any]:
        return self.memory.figures()


def _of_tensors(sampler: Sampler) -> Callable[[Tensor], Tensor]:
    """Tokens (n,) int64 of logits (n, vocabulary), drawn on the CPU."""
    return lambda logits: torch.from_numpy(sampler(logits.float().cpu().numpy()))


@contextmanager
def predictor_on_torch(
    target: str, cfg: RunConfig, note: Callable[[str], None]
) -> Iterator[Predictor]:
    """As ``predict.predictor``, with torch."""
    run = RunFiles(Path(target))
    trained = run.read_config() if run.config.is_file() else None
    guard = ReadingGuard(ram_cap_bytes(cfg, usable(machine())))
    kind: str | None = None
    names: tuple[str, ...] = ()
    with ExitStack() as at_end:
        if trained is None:
            cfg = replace(cfg, train=("head",))  # the smallest: nothing is trained
            path = user_path(target)
            exported = Exported.at(path) if path.exists() else None
            if exported is not None and exported.asks_as(cfg):
                kind, names = exported.kind, exported.names
        else:
            cfg = with_base(cfg, run.path, note)
            with open_with_parents(run) as journal:
                facts = journal.header["dataset"]
            kind, names = facts["kind"], tuple(facts["label_names"])
        files = loader.open_model(cards.resolve(cfg.model))
        loader.model_class(files)  # its code is part of the process that a plan starts from
        tokenizer = loader.load_tokenizer(files.path)
        masked, offset = files.kind == "masked", files.position_offset
        asker = asker_of(cfg, tokenizer, files.shape, kind, names, masked=masked, offset=offset)
        for text in (*files.notes, *asker.notes):
            note(text)
        dataset = asked_dataset(asker)
        judge = Judge.of(replace(cfg, objective=LOSS), dataset, tokenizer, files.end_ids)
        malloc_trim()
        read_bytes = max(0, peak_rss_bytes())
        asked = without_states(cfg)
        opened = Opened(asked, files, tokenizer, dataset, None, judge, guard.peak_before_bytes)
        if read_bytes > guard.peak_before_bytes:
            opened = replace(opened, read_peak_bytes=read_bytes)
        planned = settle(opened, confirmed(machine()), rss_bytes())
        model, memory, steps, far = at_end.enter_context(in_memory(run, trained, planned, note))
        used = Predictor(
            target, TorchAnswers(model, memory, judge), asker, judge, guard, steps, far
        )
        at_end.callback(used.end_askers)
        yield used
