"""The first part of a run with ``--train probe``: a forward pass over training rows, and a linear probe fitted to them.

rows                 as many as the steps that follow will see, or as many as pass in READOUT_SHARE of the run's time
probe.states         their hidden states while the pass lasts (``StateFile``); a resume goes on behind them and
                     has the whole of that time again. Rows that are damaged there pass again
probe.safetensors    the linear probe, written once before the first step; resumes, evaluations and replays read it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgezo.data.batches import Example, batch_indices, pieces
from edgezo.data.packed import PackedExamples
from edgezo.errors import EdgezoError
from edgezo.machine.clock import now_s
from edgezo.machine.files import atomic_path
from edgezo.machine.limits import MOST_PASSES, READOUT_SHARE, WORDS_ROWS
from edgezo.machine.profiler import phase
from edgezo.network.loader import decoder_layers
from edgezo.network.model import Model
from edgezo.network.plain_readout import LEAST_ROWS, tried_blocks
from edgezo.network.readout import Fitted, ReadoutWeights, StateFile, Taps, fit
from edgezo.network.state_file import DamagedRow
from edgezo.run.directory import PROBE_KEYS, RunFiles, run_id
from edgezo.run.figures import evaluate_model
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.short_memory import MicroBatchFitter
from edgezo.run.state import RunState
from edgezo.run.step import Stepper
from edgezo.weights.saved import Saved, write_saved
from edgezo.weights.verified import open_saved


def recall(run: RunFiles, model: Model, hidden: int, of_run: str | None) -> FittedProbe | None:
    """Let ``model`` classify by the linear probe that the run has fitted; None where there is none yet.

    ``hidden`` is the size of the model's states, ``of_run`` the run that the file must belong to (None: any).
    Raises EdgezoError for a file that is damaged, or belongs to another run or model.
    """
    if not run.probe.exists():
        return None
    way_out = "It is the linear probe that the run was trained with: restore it from a copy, or start again."
    with open_saved(run.probe, PROBE_KEYS, of_run, way_out) as file:
        metadata = file.metadata
        figures: dict[str, Any] = {
            name: float(metadata[name]) for name in ("loss", "accuracy", "label_words_loss")
        }
        used = {"True": True, "False": False}[metadata["used"]]
        result = FittedProbe(used, int(metadata["rows"]), float(metadata["fit_s"]), figures)
        tensors = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in file.places.items()}
        file.read(tensors)
        readout = ReadoutWeights.of(tensors, hidden, model.context.device)
    figures["blocks"] = list(readout.blocks)
    if used:
        model.classify_by(readout)
    return result


def _save(run: RunFiles, fitted: Fitted, result: FittedProbe, of_run: str) -> None:
    """Write the linear probe as a whole or not at all."""
    metadata = {k: str(v) for k, v in result.to_dict().items() if k != "blocks"}
    tensors = [Saved.of(name, t.contiguous()) for name, t in fitted.readout.tensors().items()]
    with atomic_path(run.probe) as temporary:
        write_saved(temporary, tensors, metadata, run=of_run)


def take_over(source: RunFiles, of_source: str, run: RunFiles, of_run: str) -> None:
    """Write the linear probe of one run as that of another one, which goes on from it.

    Raises EdgezoError for a file that is damaged, or belongs to another run than ``of_source``.
    """
    with open_saved(source.probe, PROBE_KEYS, of_source, "Restore it from a copy.") as file:
        tensors = {n: torch.empty(p.shape, dtype=p.dtype) for n, p in file.places.items()}
        file.read(tensors)
        metadata = {key: file.metadata[key] for key in sorted(PROBE_KEYS)}
    saved = [Saved.of(name, tensor) for name, tensor in tensors.items()]
    with atomic_path(run.probe) as temporary:
        write_saved(temporary, saved, metadata, run=of_run)


class ReadoutPass:
    """The pass of one run."""

    def __init__(self, state: RunState, stepper: Stepper, fitter: MicroBatchFitter):
        shape, cfg = state.opened.files.shape, state.cfg
        self.state, self.stepper, self.fitter = state, stepper, fitter
        self.layers, self.blocks = (
            shape.layers,
            tried_blocks(shape.layers, state.plan.first_trained),
        )
        self.prompts = PackedExamples.of(state.examples).prompts()
        self.of_run = run_id(state.journal.header)
        self.states = StateFile(state.files.states, len(self.blocks), shape.hidden, self.of_run)
        self.begun_s = now_s()  # later by what evaluations took
        # One side passes here, where a step passes several, and the plan has room for them.
        self.sides = cfg.planned_sides
        self.group_size = cfg.batch_size * self.sides

    def run(self) -> FittedProbe:
        """Pass the rows, fit the linear probe, and let the model use it where it predicts better than label words.

        Raises Interrupted and BudgetExceeded; the states of rows that have passed are kept.
        """
        state, model = self.state, self.state.model
        rows, fitted, words_loss = self._passed()
        figures = {
            "loss": fitted.loss,
            "accuracy": fitted.accuracy,
            "label_words_loss": words_loss,
            "blocks": list(fitted.readout.blocks),
        }
        used = fitted.loss < words_loss or not state.cfg.parts.head
        result = FittedProbe(used, len(rows), self._spent_s(), figures)
        _save(state.files, fitted, result, self.of_run)
        self.states.path.unlink(missing_ok=True)
        if used:
            model.classify_by(fitted.readout)
        state.progress.note(result.sentence())
        return result

    def _passed(self) -> tuple[list[int], Fitted, float]:
        """The rows that have passed, the linear probe of them, and the mean loss of their label words.

        Rows whose states have changed on disk pass again. Raises EdgezoError where they change again and again.
        """
        model = self.state.model
        for _ in range(MOST_PASSES):
            model.taps = Taps.on(decoder_layers(model.module, self.layers)[1], self.blocks)
            try:
                rows = self._pass()
                words_loss = float(self.states.losses(len(rows)).nanmean())
                return rows, self._fit(rows), words_loss
            except DamagedRow:
                continue  # the next pass begins before that row
            finally:
                model.taps.remove()
                model.taps = None
        raise EdgezoError(
            f"{self.states.path} has changed on disk {MOST_PASSES} times while it was in use.\n"
            "Check the disk, or give an --out on another one."
        )

    def _spent_s(self) -> float:
        """Seconds of the pass, evaluations excluded."""
        return now_s() - self.begun_s

    def _fit(self, rows: Sequence[int]) -> Fitted:
        """The linear probe of the rows that have passed."""
        state = self.state
        labels = torch.tensor([state.examples[i].label for i in rows])
        classes = state.dataset.classes
        state.memory.trim()
        with phase("fit"), state.memory.short("the linear probe"):
            fitted = fit(
                lambda number: self.states.block(number, len(rows)),
                *(self.blocks, labels, classes),
                single=state.cfg.probe_reads == "one",
            )
        state.memory.trim()
        return fitted

    def _pass(self) -> list[int]:
        """Pass one group of rows after the other; returns which rows, in the order of ``states``."""
        state, cfg = self.state, self.state.cfg
        size, most = self.group_size, cfg.readout_rows(len(state.examples))
        order = batch_indices(len(state.examples), most, cfg.seed, 0)
        sound, written = self.states.rows(), self.states.written()
        done = min(sound, most) // size * size
        if sound < written:
            state.progress.note(
                f"{self.states.path.name} was damaged: rows from {done + 1:,} on pass again"
            )
        self.states.keep(done)
        limit_s = self._spent_s() + state.box.left_s() * (READOUT_SHARE if cfg.probing else 1.0)
        state.progress.note(f"a linear probe: one forward over up to {most:,} rows")
        state.progress.begin(
            done=0, steps=-(-most // size), cap_bytes=state.plan.max_mem_bytes, counted="batch"
        )
        try:
            while done < most and (done < LEAST_ROWS or self._spent_s() < limit_s):
                state.stop.check(0)
                self.begun_s += state.manners.wait(0, state.box.longest_pause_s(state.box.left_s()))
                before_s = self._spent_s()
                group = order[done : done + size]
                loss = self.fitter.fitting(0, partial(self._pass_group, group, done))
                done += len(group)
                state.progress.step(
                    -(-done // size),
                    fraction=min(1.0, max(done / most, self._spent_s() / limit_s)),
                    loss=loss,
                    step_s=self._spent_s() - before_s,
                    rss_bytes=state.memory.held_bytes(),
                )
                if cfg.eval_every and done < most:
                    every = cfg.eval_every * cfg.batch_size
                    if done // every > (done - len(group)) // every:
                        self._evaluate(order[:done])
        finally:
            state.progress.close()
        return order[:done]

    def _evaluate(self, rows: Sequence[int]) -> None:
        """Write to metrics.jsonl how good a linear probe of the rows so far would be."""
        before_s, state = self._spent_s(), self.state
        fitted = self._fit(rows)
        with state.model.classifying_by(fitted.readout):
            figures = evaluate_model(state.model, state.dataset)
        line = {"rows": len(rows), "pass_s": before_s, **figures}
        state.log_line({"step": 0, "eval": "probe", **line})
        self.begun_s += self._spent_s() - before_s

    def _pass_group(self, rows: Sequence[int], first: int) -> float | None:
        """Run rows, the first of which is number ``first`` of the pass, through the model and keep their states.

        Returns the mean loss of their label words; None where these are not scored.
        """
        taps = self.state.model.taps
        if taps is None:
            raise TypeError("states are kept only while taps are on the blocks")
        group = [self.prompts[i] for i in rows]
        losses = torch.zeros(len(group))
        states = [torch.empty(len(group), self.states.hidden) for _ in self.blocks]
        for slots, of_batch in self._losses(group):
            losses[slots] = of_batch
            for kept, state in zip(states, taps.take(), strict=True):
                kept[slots] = state.cpu()
        if self.state.dataset.endings and first < WORDS_ROWS:
            with taps.pause():
                for slots, of_batch in self._losses([self.state.examples[i] for i in rows]):
                    losses[slots] = of_batch
        self.states.append(states, losses, first)
        return None if losses.isnan().all() else float(losses.nanmean())

    def _losses(self, group: Sequence[Example]) -> Iterator[tuple[list[int], Tensor]]:
        """(slots, losses of these slots) of a group's micro-batches; nan of prompts that no label word follows."""
        state, model = self.state, self.state.model
        size, most_tokens = state.cfg.micro_batch, model.most_tokens
        if state.dataset.endings:  # the plan counts label words, so that more prompts have room
            size, most_tokens = len(group), self.stepper.tokens_at_once(size)
        for batch in pieces(group, size * self.sides, most_tokens and most_tokens * self.sides):
            self.stepper.check_room("the next micro-batch")
            with phase("forward"), state.memory.short("a micro-batch"):
                losses = model.losses(batch)[0][0]
            yield list(batch.slots), losses
