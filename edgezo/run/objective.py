"""Predictions as text and their scores: an objective for training, figures for an evaluation.

    label        the most likely label word
    choice       the most likely option
    completion   the text that the model writes after the prompt (network/generate.py), with perturbed weights in a step

An objective is a function (prediction, row) -> float, where higher is better. It need not be differentiable: the loss
of an example is minus its score. ``row`` has the fields of the row, and ``answers``, all right ones.
``module:function`` names a function of the user, from the current directory or wherever Python finds modules.
"""

from __future__ import annotations

import importlib
import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edgezo.data.batches import Batch, Example
from edgezo.data.dataset import Dataset
from edgezo.data.metrics import Fields, Metric, chosen, exact_match, means, numeric_match, token_f1
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.limits import EVAL_TOKENS
from edgezo.network.generate import generate
from edgezo.plan.data_fields import LOSS, OBJECTIVES
from edgezo.run.answering import AnswerText, evaluation_parts
from edgezo.zo.axes import DIRECTIONS

if TYPE_CHECKING:
    from edgezo.network.model import Model
    from edgezo.network.probe import Probe
    from edgezo.plan.config import RunConfig
    from edgezo.run.journal_record import StepRecord

Score = Callable[[str, Fields], float]

_METRICS: dict[str, Metric] = {
    "accuracy": chosen,
    "exact-match": exact_match,
    "token-f1": token_f1,
    "numeric-match": numeric_match,
}
assert set(OBJECTIVES) == {LOSS, *_METRICS}


def load_objective(name: str) -> Score | None:
    """The function that ``--objective`` names; None for the model's own loss.

    Raises UsageError where there is none.
    """
    if name == LOSS:
        return None
    if name in _METRICS:
        metric = _METRICS[name]
        return lambda prediction, row: metric(prediction, row["answers"])
    module_name, _, function = name.partition(":")
    with _current_directory_first():
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the result
                module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                raise UsageError(
                    f"--objective {name}: no module {error.name!r} in {os.getcwd()} or where Python looks "
                    "for modules; it is a file NAME.py, named without .py"
                ) from error
            raise UsageError(f"--objective {name}: {module_name} needs {error.name!r}") from error
        except (Exception, SystemExit) as error:  # a program of the user's: any error can come
            raise UsageError(
                f"--objective {name}: {module_name} cannot be imported: {_shown(error)}"
            ) from error
    target: Any = module
    for part in function.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        raise UsageError(f"--objective {name}: {module_name} has no function {function!r}")
    score: Score = target
    return score


def no_signal(records: Sequence[StepRecord], objective: str) -> str:
    """Why so many steps were skipped, all of them, and what to do; a score is minus a loss of ``records``."""
    losses = np.concatenate([record.losses.ravel() for record in records])
    scores = -losses[np.isfinite(losses)]
    tried = f"--objective {objective} has told nothing in {len(records)} steps, "
    if not len(scores):
        return (
            tried
            + "since no score was finite: --sigma is too large for this model, or its weights are damaged."
        )
    least, most = float(scores.min()), float(scores.max())
    if least < most:
        return (
            f"{tried}since both sides of every perturbation scored the same, though rows differ ({least:g} to "
            f"{most:g}): the perturbation changes no prediction. Give a larger --sigma, such as 5 times as large."
        )
    if most > 0:
        return f"{tried}since every prediction scored {most:g}: there is nothing to improve on these rows."
    return (
        f"{tried}since every prediction scored {most:g}: the model never answers right, so no step can be better than "
        "another. Give an easier objective first (token-f1, or a function with finer scores), or train with "
        "--objective loss until some answers are right."
    )


@contextmanager
def _current_directory_first() -> Iterator[None]:
    """Inside, modules of the current directory are found first; afterwards the directory is the last place to look."""
    directory = os.getcwd()
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(directory)
        if directory not in sys.path:
            sys.path.append(directory)


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Judge(AnswerText):
    """Turns the predictions of a model on one data set into texts, scores and figures."""

    objective: str
    score: Score | None

    @staticmethod
    def of(cfg: RunConfig, dataset: Dataset, tokenizer: Any, ends: Sequence[int]) -> Judge:
        """Raises UsageError for an objective that does not exist or does not suit the rows."""
        score = load_objective(cfg.objective)
        if score is not None:
            _check(cfg, dataset)
        ending = AnswerText.ends_of(tokenizer, ends)
        return Judge(dataset, tokenizer, ending, cfg.objective, score)

    @property
    def writes(self) -> bool:
        """Whether predictions are texts that the model writes."""
        return self.dataset.generation is not None

    # -- training -----------------------------------------------------------------------------------------

    def losses(
        self,
        model: Model,
        batch: Batch,
        examples: Sequence[Example],  # of the batch
        probe: Callable[[Batch], Probe | None],
        sides: int,
    ) -> Tensor:
        """Minus the score of each example on each side, (sides, b) fp32. EdgezoError for a score that is no number."""
        if self.writes:
            texts = self.write(model, examples, probe, sides, batch.slots, model.most_tokens)
        else:
            _, predicted = model.losses(batch, probe(batch), sides=sides)
            texts = [self.words(side.tolist(), examples) for side in predicted]
        return -torch.tensor(
            [[self.value(t, e) for t, e in zip(side, examples, strict=True)] for side in texts]
        )

    def words(self, predicted: Sequence[int], examples: Sequence[Example]) -> list[str]:
        """Label words or options by their number."""
        names = self.dataset.label_names
        return [
            (example.options or names)[i] for i, example in zip(predicted, examples, strict=True)
        ]

    def write(
        self,
        model: Model,
        examples: Sequence[Example],
        probe: Callable[[Batch], Probe | None] = lambda batch: None,
        sides: int = 1,
        slots: Sequence[int] | None = None,
        most_tokens: int | None = None,
    ) -> list[list[str]]:
        """The text that each side writes for each example: one list a side."""
        assert self.dataset.generation is not None
        ids_of_sides = generate(
            model,
            [example.prompt for example in examples],
            self.dataset.generation,
            self.over,
            sides=sides,
            probe=probe,
            slots=slots,
            most_tokens=most_tokens,
        )
        return [[self.answer(ids) for ids in side] for side in ids_of_sides]

    def value(self, prediction: str, example: Example) -> float:
        """The objective's score of one prediction. Raises EdgezoError unless it is a finite number."""
        assert self.score is not None and example.fields is not None
        # A copy, since the function is the user's and may change it.
        row = {**example.fields, "answers": [*example.fields["answers"]]}
        try:
            with redirect_stdout(sys.stderr):
                score = self.score(prediction, row)
        except (Exception, SystemExit) as error:  # of the user's function
            raise EdgezoError(
                f"--objective {self.objective} failed on the prediction {prediction!r}: {_shown(error)}\n"
                "Correct the function; a run that has begun goes on with --resume."
            ) from error
        shown = "a number beyond a float's range"  # which Python may refuse to print
        try:
            number = float(score) if isinstance(score, Real) else math.nan
            shown = reprlib.repr(score)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise EdgezoError(
                f"--objective {self.objective} gave {shown} for the prediction {prediction!r}; it has to "
                "give a finite number, higher for a better prediction."
            )
        return number

    # -- evaluation ---------------------------------------------------------------------------------------

    def texts(self, model: Model, chosen_at: Sequence[int]) -> list[str]:
        """Predictions of the validation rows; ``chosen_at`` are the options that were chosen, where there are any."""
        rows = self.dataset.validation
        return self._write_all(model, rows) if self.writes else self.words(chosen_at, rows)

    def figures(self, texts: Sequence[str]) -> dict[str, float]:
        """Metrics of these predictions of the validation rows, and their mean score by the objective."""
        rows = self.dataset.validation
        fields = [row.fields for row in rows if row.fields is not None]
        of_task = self.dataset.report
        figures = of_task(texts, fields) if of_task is not None else {}
        if self.score is not None:
            scores = [self.value(text, row) for text, row in zip(texts, rows, strict=True)]
            figures["objective"] = sum(scores) / max(1, len(scores))
        if of_task is None and self.writes:
            figures |= means(exact_match=exact_match, f1=token_f1)(texts, fields)
        return figures

    def _write_all(self, model: Model, rows: Sequence[Example]) -> list[str]:
        assert self.dataset.generation is not None
        texts = [""] * len(rows)
        for part in evaluation_parts(rows, self.dataset.generation.most, model.kept_tokens):
            (written,) = self.write(model, [rows[i] for i in part], most_tokens=EVAL_TOKENS)
            for i, text in zip(part, written, strict=True):
                texts[i] = text
        return texts


def _check(cfg: RunConfig, dataset: Dataset) -> None:
    kind, name = dataset.kind, cfg.objective
    if kind == "text":
        raise UsageError(
            f"--objective {name} scores a prediction, and rows of text have none: give rows with prompt and "
            "completion, or labels"
        )
    if kind == "completion" and name == "accuracy":
        raise UsageError(
            "--objective accuracy is for label words and options; for what a model writes take exact-match, "
            "token-f1 or numeric-match"
        )
    if kind == "completion" and DIRECTIONS[cfg.directions].guided:
        raise UsageError(
            f"--directions {cfg.directions} are made from what the layers read in one forward; a text is written "
            f"in many, so --objective {name} needs other directions"
        )
