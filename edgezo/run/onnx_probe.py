"""The linear probe on the ONNX engine: a forward over training rows, and a fit to their states. As readout_pass.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from edgezo.data.batches import Example, batch_indices
from edgezo.data.packed import PackedExamples
from edgezo.errors import EdgezoError
from edgezo.machine.clock import now_s
from edgezo.machine.limits import MOST_PASSES, READOUT_SHARE, WORDS_ROWS
from edgezo.machine.process_memory import malloc_trim, rss_bytes
from edgezo.network.plain_readout import LEAST_ROWS, PlainFit, fit_readout, tried_blocks
from edgezo.network.state_file import DamagedRow, PlainStateFile
from edgezo.run.directory import run_id
from edgezo.run.fitted_probe import FittedProbe
from edgezo.run.onnx_state import OnnxRunState, classify_by, save_probe
from edgezo.run.onnx_step import OnnxStepper


class PlainReadoutPass:
    """The pass of one run."""

    def __init__(self, state: OnnxRunState, stepper: OnnxStepper):
        self.state, self.stepper = state, stepper
        shape = state.opened.manifest.shape
        self.blocks = tried_blocks(shape.layers, state.plan.first_trained)
        self.prompts = PackedExamples.of(state.dataset.train).prompts()
        self.of_run = run_id(state.journal.header)
        self.states = PlainStateFile(
            state.files.states, len(self.blocks), shape.hidden, self.of_run
        )
        self.begun_s = now_s()
        self.sides = state.cfg.planned_sides
        self.size = state.cfg.batch_size * self.sides

    def run(self) -> FittedProbe:
        """Pass the rows, fit, and let the model use the probe where it predicts better than label words."""
        state, model = self.state, self.state.model
        rows, fitted, words_loss = self._passed()
        figures = {
            "loss": fitted.loss,
            "accuracy": fitted.accuracy,
            "label_words_loss": words_loss,
            "blocks": list(fitted.weights.blocks),
        }
        used = fitted.loss < words_loss or not state.cfg.parts.head
        result = FittedProbe(used, len(rows), now_s() - self.begun_s, figures)
        save_probe(state.files, fitted.weights, result, self.of_run)
        self.states.path.unlink(missing_ok=True)
        if used:
            classify_by(model, fitted.weights)
        state.progress.note(result.sentence())
        return result

    def _passed(self) -> tuple[list[int], PlainFit, float]:
        for _ in range(MOST_PASSES):
            try:
                rows = self._pass()
                labels = np.array([self.state.dataset.train[i].label for i in rows], np.int64)
                malloc_trim()
                fitted = fit_readout(
                    partial(self.states.block_array, rows=len(rows)),
                    self.blocks,
                    labels,
                    self.state.dataset.classes,
                    single=self.state.cfg.probe_reads == "one",
                )
                malloc_trim()
                return rows, fitted, float(np.nanmean(self.states.losses_array(len(rows))))
            except DamagedRow:
                continue  # the next pass begins before that row
        raise EdgezoError(
            f"{self.states.path} has changed on disk {MOST_PASSES} times while it was in use.\n"
            "Check the disk, or give an --out on another one."
        )

    def _pass(self) -> list[int]:
        """Pass one group of rows after the other; returns which rows, in the order of ``states``."""
        state, cfg = self.state, self.state.cfg
        most = cfg.readout_rows(len(self.prompts))
        order = batch_indices(len(self.prompts), most, cfg.seed, 0)
        done = min(self.states.rows(), most) // self.size * self.size
        self.states.keep(done)
        limit_s = state.box.left_s() * (READOUT_SHARE if cfg.probing else 1.0)
        state.progress.note(f"a linear probe: one forward over up to {most:,} rows")
        state.progress.begin(
            done=0,
            steps=-(-most // self.size),
            cap_bytes=state.plan.max_mem_bytes,
            counted="batch",
        )
        try:
            while done < most and (done < LEAST_ROWS or now_s() - self.begun_s < limit_s):
                state.stop.check(0)
                before_s = now_s()
                group = order[done : done + self.size]
                loss = self.stepper.fitting(0, partial(self._pass_group, group, done))
                done += len(group)
                state.progress.step(
                    -(-done // self.size),
                    fraction=min(1.0, max(done / most, (now_s() - self.begun_s) / limit_s)),
                    loss=loss,
                    step_s=now_s() - before_s,
                    rss_bytes=rss_bytes(),
                )
        finally:
            state.progress.close()
        return order[:done]

    def _pass_group(self, rows: Sequence[int], first: int) -> float | None:
        """Run rows and keep their states; the mean loss of their label words, None where these are not scored."""
        state, model = self.state, self.state.model
        group = [self.prompts[i] for i in rows]
        losses = np.full(len(group), np.nan, np.float32)
        states = np.empty((len(group), len(self.blocks), self.states.hidden), np.float16)
        for batch in self.stepper.packed(group, self.sides):
            self.stepper.check_room("the next micro-batch")
            slots = list(batch.slots)
            taken = model.states_of(batch, self.blocks)
            for number, block in enumerate(self.blocks):
                states[slots, number] = taken[block]
            if state.dataset.label_ids:
                losses[slots] = model.scorer.losses(taken[-1], batch, 1, 0.0)[0][0]
        if state.dataset.endings and first < WORDS_ROWS:
            losses[:] = self._words_losses([state.dataset.train[i] for i in rows])
        self.states.append_arrays(states, losses, first)
        return None if np.isnan(losses).all() else float(np.nanmean(losses))

    def _words_losses(self, group: Sequence[Example]) -> np.ndarray:
        """Losses (n,) of label words of several tokens."""
        losses = np.empty(len(group), np.float32)
        for batch in self.stepper.packed(group):
            losses[list(batch.slots)] = self.state.model.losses(batch)[0][0]
        return losses
