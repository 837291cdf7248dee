"""What a reader of a run's figures should know, in sentences: above all why a metric has not moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from edgezo.data.classes import Change, change, largest_class
from edgezo.run.base_file import BaseFile, measured_by, other_weights
from edgezo.run.overview import FINISHED, UNFINISHED, Overview


class Answers(NamedTuple):
    """The classes of the validation rows, by number: the right ones, and those that were predicted."""

    names: Sequence[str]
    right: Sequence[int]
    before: Sequence[int]  # () where the run was not evaluated then
    after: Sequence[int]

    @staticmethod
    def of(kept: Mapping[str, Any]) -> Answers | None:
        """From predictions.json; None where rows have no classes, or none was predicted yet.

        Raises ValueError, TypeError or LookupError for numbers that are none of a class, or lists of other lengths.
        """
        names, right = [str(name) for name in kept.get("names", ())], kept.get("labels", ())
        before, after = (kept.get(when, {}).get("chosen", ()) for when in ("before", "after"))
        if not names or not right or not (before or after):
            return None
        for numbers in (right, before, after):
            if numbers and len(numbers) != len(right):
                raise ValueError("its lists are of different lengths")
            if any(type(n) is not int or not 0 <= n < len(names) for n in numbers):
                raise ValueError("a number in it is no class")
        return Answers(names, right, before, after)

    @property
    def last(self) -> Sequence[int]:
        return self.after or self.before

    @property
    def change(self) -> Change | None:
        """From before to after; None where one of the two is missing."""
        if not (self.before and self.after):
            return None
        return change(self.right, self.before, self.after)


def remarks(
    run: Overview, lines: Sequence[Mapping[str, Any]], answers: Answers | None
) -> list[str]:
    """What to know about the figures of a run. ``lines`` are those of its metrics.jsonl."""
    sentences = [*_of_training(run, lines)]
    if run.state == FINISHED:
        sentences += _of_metric(run.summary, answers)
    if answers is not None:
        sentences += _of_classes(run.summary, answers)
    return sentences


def of_base(run: Overview) -> Iterator[str]:
    """What to know about the weights that a run was trained on, where they were rounded."""
    sources = run.plan().get("sources")
    base = BaseFile.saved(sources.get("base")) if isinstance(sources, Mapping) else None
    if (
        base is not None
        and run.cfg is not None
        and (sentence := other_weights(base, run.cfg.model))
    ):
        yield f"{sentence[0].upper()}{sentence[1:]}. {measured_by(run.cfg.model)}."


def _of_training(run: Overview, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if run.state == UNFINISHED and not run.steps:
        yield "No step is made yet."
        return
    skipped = sum(bool(line.get("skipped")) for line in lines)
    if run.steps and skipped == run.steps:
        yield (
            f"All {run.steps} steps were skipped: both sides of every perturbation scored the same, or no loss was "
            "finite. So the steps have trained nothing along directions. A larger --sigma may help."
        )
    elif skipped:
        yield f"{skipped} of {run.steps} steps were skipped, because their losses told nothing."
    if run.state != FINISHED:
        return
    summary, probe = run.summary, run.summary.get("probe") or {}
    if not run.steps:
        only = "only the linear probe was fitted" if probe.get("used") else "nothing was trained"
        yield f"No step was made: {only}."
    if probe.get("used"):
        yield (
            f"The linear probe alone has an accuracy of {probe['accuracy']:.3f} on its {probe['rows']:,} training "
            "rows, each held out in turn. What the steps after it add was not measured apart: the evaluation before "
            "training is of the label words, without a probe."
        )
        first, last = summary.get("loss_first"), summary.get("loss_last")
        if first is not None and last is not None and last >= first:
            yield (
                "The training loss does not fall, since it begins low: the linear probe was fitted to the same rows."
            )
    elif probe:
        yield "The linear probe predicted no better than the label words, so it is not used."


def _of_metric(summary: Mapping[str, Any], answers: Answers | None) -> Iterator[str]:
    before, after = summary.get("eval_before"), summary.get("eval_after")
    if not (before and after) or before["metric"] != after["metric"]:
        return
    metric, moved = after["metric"], after["value"] - before["value"]
    if not after["n"]:
        yield "There was no row to evaluate on."
        return
    changed = answers.change if answers is not None else None
    if moved == 0:
        yield _unmoved(metric, before, after, changed)
    elif changed is not None:
        yield (
            f"{changed.gained} rows that were wrong are right now, and {changed.lost} that were right are wrong: "
            f"a difference of {changed.difference:+.3f} ± {changed.standard_error:.3f}."
        )
    error = changed.standard_error if changed is not None else after.get("standard_error")
    if moved and error and abs(moved) < 2 * error:
        yield (
            f"A {metric} that changes by {moved:+.3f} over {after['n']} rows may be chance (2 standard errors are "
            f"{2 * error:.3f}). More held-out rows would tell."
        )


def _unmoved(
    metric: str, before: Mapping[str, Any], after: Mapping[str, Any], changed: Change | None
) -> str:
    """Why a metric is after training what it was before."""
    loss = f"the loss of these rows went from {before['loss']:.4f} to {after['loss']:.4f}"
    if before["loss"] == after["loss"]:
        return f"The {metric} has not moved, and neither has the loss: training did not change a single answer."
    if changed is None:
        return f"The {metric} has not moved, but {loss}."
    if changed.gained or changed.lost:
        return f"The {metric} has not moved: {changed.gained} rows became right and as many became wrong; {loss}."
    if changed.other:
        return f"The {metric} has not moved: {changed.other} rows have another answer, which is wrong as well; {loss}."
    return (
        f"The {metric} has not moved: {loss}, but for no row did another label become the likeliest. More steps or a "
        "larger --step may change their order."
    )


def _of_classes(summary: Mapping[str, Any], answers: Answers) -> Iterator[str]:
    largest, share = largest_class(answers.right)
    if len(set(answers.right)) == 1:
        yield (
            f"Every held-out row has the label {answers.names[largest]!r}: the accuracy only says how often it is "
            "predicted. Hold out rows of every label."
        )
        return
    predicted = set(answers.last)
    if len(predicted) == 1:
        (only,) = predicted
        yield f"Every row is predicted as {answers.names[only]!r}: the labels are not told apart."
    after = summary.get("eval_after") or {}
    if after.get("metric") == "accuracy" and after["value"] <= share:
        yield (
            f"That is no better than answering {answers.names[largest]!r}, the most frequent label, every time, which "
            f"gives {share:.3f}."
        )
