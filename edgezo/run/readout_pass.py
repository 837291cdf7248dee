"""The first part of a run with ``--train probe``: one forward over training rows, and the linear probe fitted to them.

rows                 as many as the steps that follow will see, or as pass in PROBE_SHARE of a run's time
probe.states         what they showed (linear_probe.StateFile), while it lasts: a resume goes on behind it, and
                     has the whole of that time again
probe.safetensors    the probe, once and for all before the first step; a run that goes on, an evaluation and a
                     replay read it
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from edgezo.data.batches import Example, batch_indices, pieces
from edgezo.errors import EdgezoError
from edgezo.machine.files import atomic_path
from edgezo.machine.limits import PROBE_SHARE
from edgezo.machine.profiler import phase
from edgezo.network.attach import attach, reading
from edgezo.network.loader import decoder_layers
from edgezo.network.readout import LEAST_ROWS, Fitted, LinearProbe, StateFile, Taps, candidates, fit
from edgezo.run.session import evaluate_model
from edgezo.weights.safetensors_file import write_saved
from edgezo.weights.trainable import Saved

if TYPE_CHECKING:
    from edgezo.network.model import Model
    from edgezo.run.directory import RunFiles
    from edgezo.run.train import Training


@dataclass(frozen=True)
class Outcome:
    """What a pass has found, as the run keeps it."""

    used: bool  # False: the label words predict better
    rows: int
    fit_s: float
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"used": self.used, "rows": self.rows, "fit_s": self.fit_s, **self.figures}


def recall(run: RunFiles, model: Model, layers: int) -> Outcome | None:
    """Let ``model`` have the probe of a run that was fitted before; None where there is none yet.

    Raises EdgezoError for a file that is damaged or of another model.
    """
    if not run.probe.exists():
        return None
    try:
        with safe_open(run.probe, "pt") as file:
            said = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        figures: dict[str, Any] = {
            "loss": float(said["loss"]),
            "accuracy": float(said["accuracy"]),
            "label_words_loss": float(said["label_words_loss"]),
        }
        used = said["used"] == "True"
        found = Outcome(used, int(said["rows"]), float(said["fit_s"]), figures)
        probe = LinearProbe.of(tensors, model.context.device)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
        raise EdgezoError(
            f"{run.probe} is damaged ({problem}).\n"
            "It is the linear probe that the run was trained with; restore it from a copy, or start again."
        ) from problem
    figures["blocks"] = list(probe.blocks)
    if used:
        attach(model, layers, probe)
    return found


def save(run: RunFiles, fitted: Fitted, found: Outcome) -> None:
    """Write the probe, at once or not at all."""
    said = {"used": found.used, "rows": found.rows, "fit_s": found.fit_s, **found.figures}
    tensors = [Saved.of(name, t.contiguous()) for name, t in fitted.probe.tensors().items()]
    with atomic_path(run.probe) as temporary:
        write_saved(temporary, tensors, {k: str(v) for k, v in said.items() if k != "blocks"})


@dataclass
class ProbePass:
    """The pass of one run."""

    training: Training

    def __post_init__(self) -> None:
        shape = self.training.opened.files.shape
        self.layers, self.blocks = shape.layers, candidates(shape.layers)
        self.states = StateFile(self.training.run.states, len(self.blocks), shape.hidden)
        self.begun_s = time.monotonic()  # later by what evaluations took
        # One side passes here, where a step passes several, and the plan has room for them.
        cfg = self.training.cfg
        assert cfg.batch_size is not None
        self.sides = cfg.planned_sides
        self.group = cfg.batch_size * self.sides

    def run(self) -> Outcome:
        """Pass the rows, fit, keep what predicts better, and let the model use it.

        Raises Interrupted and BudgetExceeded; the rows that have passed are kept.
        """
        training, model = self.training, self.training.model
        model.taps = Taps.on(decoder_layers(model.module, self.layers)[1], self.blocks)
        try:
            rows = self._pass()
        finally:
            model.taps.remove()
            model.taps = None
        words_loss = float(self.states.losses(len(rows)).mean())
        fitted = self._fit(rows)
        found = Outcome(
            fitted.loss < words_loss or "head" not in training.cfg.train,
            len(rows),
            self._spent_s(),
            {
                "loss": fitted.loss,
                "accuracy": fitted.accuracy,
                "label_words_loss": words_loss,
                "blocks": list(fitted.probe.blocks),
            },
        )
        save(training.run, fitted, found)
        self.states.path.unlink(missing_ok=True)
        if found.used:
            attach(model, self.layers, fitted.probe)
        training.progress.note(_verdict(found))
        return found

    def _spent_s(self) -> float:
        """Seconds of the pass, evaluations excluded."""
        return time.monotonic() - self.begun_s

    def _fit(self, rows: Sequence[int]) -> Fitted:
        """The probe of the rows that have passed."""
        training = self.training
        labels = torch.tensor([training.examples[i].label for i in rows])
        classes = len(training.opened.dataset.label_ids)
        training.memory.trim()
        with phase("fit"), training.memory.short("the linear probe"):
            fitted = fit(
                lambda number: self.states.block(number, len(rows)), self.blocks, labels, classes
            )
        training.memory.trim()
        return fitted

    def _pass(self) -> list[int]:
        """Show the model one group of rows after the other; which rows, in the order of ``states``."""
        training, cfg = self.training, self.training.cfg
        size, most = self.group, cfg.probe_rows(len(training.examples))
        order = batch_indices(len(training.examples), most, cfg.seed, 0)
        done = min(self.states.rows(), most) // size * size
        self.states.keep(done)
        limit_s = cfg.for_s * (PROBE_SHARE if cfg.probing else 1.0) if cfg.for_s else math.inf
        groups, cap_bytes = -(-most // size), training.plan.max_mem_bytes
        training.progress.note(f"a linear probe: one forward over up to {most:,} rows")
        training.progress.begin(done=0, steps=groups, cap_bytes=cap_bytes)
        try:
            while done < most and (done < LEAST_ROWS or self._spent_s() < limit_s):
                training.check_stop(0)
                before_s = self._spent_s()
                group = [training.examples[i] for i in order[done : done + size]]
                loss = training.fitting(0, partial(self._show, group))
                done += len(group)
                training.progress.step(
                    -(-done // size),
                    fraction=min(1.0, max(done / most, self._spent_s() / limit_s)),
                    loss=loss,
                    step_s=self._spent_s() - before_s,
                    rss_bytes=training.memory.held_bytes(),
                )
                if cfg.eval_every and done < most:
                    every = cfg.eval_every * (cfg.batch_size or 1)
                    if done // every > (done - len(group)) // every:
                        self._evaluate(order[:done])
        finally:
            training.progress.close()
        return order[:done]

    def _evaluate(self, rows: Sequence[int]) -> None:
        """A line of metrics.jsonl: how good a probe of the rows so far would be."""
        before_s, training = self._spent_s(), self.training
        fitted = self._fit(rows)
        with reading(training.model, self.layers, fitted.probe):
            found = evaluate_model(training.model, training.opened.dataset)
        line = {"rows": len(rows), "pass_s": before_s, **found}
        training.log.write({"step": 0, "eval": "probe", **line})
        self.begun_s += self._spent_s() - before_s

    def _show(self, group: list[Example]) -> float:
        """Show the model a group, keep what it showed; the mean loss of the label words."""
        training, model = self.training, self.training.model
        assert training.cfg.micro_batch is not None and model.taps is not None
        most_tokens = model.most_tokens and model.most_tokens * self.sides
        losses = torch.zeros(len(group))
        found = [torch.empty(len(group), self.states.hidden) for _ in self.blocks]
        for batch in pieces(group, training.cfg.micro_batch * self.sides, most_tokens):
            training.check_room("the next micro-batch")
            slots = list(batch.slots)
            with phase("forward"), training.memory.short("a micro-batch"):
                losses[slots] = model.losses(batch)[0][0]
                for kept, state in zip(found, model.taps.take(), strict=True):
                    kept[slots] = state.cpu()
        self.states.append(found, losses)
        return float(losses.mean())


def _verdict(found: Outcome) -> str:
    told = found.figures
    by = f"loss {told['loss']:.4f} on rows held out, one by one; the label words' is {told['label_words_loss']:.4f}"
    if not found.used:
        return f"no linear probe: {by}"
    blocks = ", ".join(map(str, told["blocks"]))
    return f"a linear probe on blocks {blocks}, {found.rows:,} rows in {found.fit_s:.0f} s: {by}"
