"""The first part of a run with ``--train probe``: one forward over training rows, and the linear probe fitted to them.

rows         as many as the steps that follow will see, or as pass in SHARE of a run's time; MOST_ROWS at most
probe.states what they showed (linear_probe.StateFile), while it lasts: a resume goes on behind it
probe.safetensors  the probe, once and for all before the first step; a run that goes on, an evaluation and a
             replay read it
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from edgezo.config import RunConfig
from edgezo.data import Example, batch_indices, pieces
from edgezo.errors import EdgezoError
from edgezo.files import atomic_path
from edgezo.linear_probe import (
    LEAST_ROWS,
    Fitted,
    LinearProbe,
    StateFile,
    Taps,
    attach,
    candidates,
    fit,
)
from edgezo.profiler import phase
from edgezo.residency import decoder_layers
from edgezo.rundir import write_saved
from edgezo.weights import Saved

if TYPE_CHECKING:
    from edgezo.model import Model
    from edgezo.rundir import RunFiles
    from edgezo.train import Training

MOST_ROWS = 4096
SHARE = 0.7  # of a run's time, where something else is trained after it


@dataclass(frozen=True)
class Outcome:
    """What a pass has found, as the run keeps it."""

    used: bool  # False: the label words predict better
    rows: int
    fit_s: float
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"used": self.used, "rows": self.rows, "fit_s": self.fit_s, **self.figures}


def rows_wanted(cfg: RunConfig, rows: int) -> int:
    """Training rows, of so many, that the probe is fitted to where time does not bound the run."""
    assert cfg.batch_size is not None
    asked = cfg.steps * cfg.batch_size if cfg.steps else MOST_ROWS
    return min(asked, MOST_ROWS, rows)


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

    def run(self) -> Outcome:
        """Pass the rows, fit, keep what predicts better, and let the model use it.

        Raises Interrupted and BudgetExceeded; the rows that have passed are kept.
        """
        training, cfg, model = self.training, self.training.cfg, self.training.model
        shape = training.opened.files.shape
        blocks = candidates(shape.layers)
        states = StateFile(training.run.states, len(blocks), shape.hidden)
        begun_s = time.monotonic()
        model.taps = Taps.on(decoder_layers(model.module, shape.layers)[1], blocks)
        try:
            rows = self._pass(states)
        finally:
            model.taps.remove()
            model.taps = None
        labels = torch.tensor([training.examples[i].label for i in rows])
        classes = len(training.opened.dataset.label_ids)
        words_loss = float(states.losses(len(rows)).mean())
        training.memory.trim()
        with phase("update"), training.memory.short("the linear probe"):
            fitted = fit(lambda number: states.block(number, len(rows)), blocks, labels, classes)
        training.memory.trim()
        found = Outcome(
            fitted.loss < words_loss or "head" not in cfg.train,
            len(rows),
            time.monotonic() - begun_s,
            {
                "loss": fitted.loss,
                "accuracy": fitted.accuracy,
                "label_words_loss": words_loss,
                "blocks": list(fitted.probe.blocks),
            },
        )
        save(training.run, fitted, found)
        states.path.unlink(missing_ok=True)
        if found.used:
            attach(model, shape.layers, fitted.probe)
        training.progress.note(_verdict(found))
        return found

    def _pass(self, states: StateFile) -> list[int]:
        """Show the model one group of rows after the other; which rows, in the order of ``states``."""
        training, cfg = self.training, self.training.cfg
        assert cfg.batch_size is not None
        most = rows_wanted(cfg, len(training.examples))
        order = batch_indices(len(training.examples), most, cfg.seed, 0)
        size = cfg.batch_size
        done = min(states.rows(), most) // size * size
        states.keep(done)
        training.progress.note(f"a linear probe: one forward over up to {most:,} rows")
        training.progress.begin(
            done=0, steps=-(-most // size), cap_bytes=training.plan.max_mem_bytes
        )
        begun_s = time.monotonic()
        try:
            while done < most:
                spent = (time.monotonic() - begun_s) / (
                    cfg.for_s * self._share if cfg.for_s else math.inf
                )
                if spent >= 1 and done >= LEAST_ROWS:
                    break
                training.check_stop(0)
                group_s = time.monotonic()
                group = [training.examples[i] for i in order[done : done + size]]
                losses = training.fitting(0, partial(self._group, group, states))
                done += len(group)
                training.progress.step(
                    -(-done // size),
                    fraction=max(done / most, min(1.0, spent)),
                    loss=losses,
                    step_s=time.monotonic() - group_s,
                    rss_bytes=training.memory.held_bytes(),
                )
        finally:
            training.progress.close()
        return order[:done]

    @property
    def _share(self) -> float:
        """Of the run's time."""
        return SHARE if self.training.cfg.perturbs else 1.0

    def _group(self, group: list[Example], states: StateFile) -> float:
        """Show the model a group, keep what it showed; the mean loss of the label words."""
        training, model = self.training, self.training.model
        assert training.cfg.micro_batch is not None and model.taps is not None
        losses = torch.zeros(len(group))
        found = [torch.empty(len(group), states.hidden) for _ in range(states.blocks)]
        for batch in pieces(group, training.cfg.micro_batch, model.most_tokens):
            training.check_room("the next micro-batch")
            slots = list(batch.slots)
            with phase("forward"), training.memory.short("a micro-batch"):
                losses[slots] = model.losses(batch)[0][0]
                for kept, state in zip(found, model.taps.take(), strict=True):
                    kept[slots] = state.cpu()
        states.append(found, losses)
        return float(losses.mean())


def _verdict(found: Outcome) -> str:
    told = found.figures
    by = f"loss {told['loss']:.4f} on rows held out, one by one; the label words' is {told['label_words_loss']:.4f}"
    if not found.used:
        return f"no linear probe: {by}"
    blocks = ", ".join(map(str, told["blocks"]))
    return f"a linear probe on blocks {blocks}, {found.rows:,} rows in {found.fit_s:.0f} s: {by}"
