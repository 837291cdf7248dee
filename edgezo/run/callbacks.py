"""transformers' ``TrainerCallback``s on a run of edgezo: they get the events of a Trainer, with its objects.

What a Trainer has and a run has not is None: model (its weights are perturbed in place, and no PreTrainedModel),
processing_class, optimizer, lr_scheduler, and both dataloaders. There is no event between the forward passes of a
step and its update, since the update is a part of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from edgezo.errors import UsageError
from edgezo.run.opening import Opening
from edgezo.run.progress import Asks, Silent

# Evaluations that a Trainer would make; those of an unfinished linear probe are none.
_EVALUATIONS = ("before", "during", "after")
_FOR_BEST = "loss"  # the metric by which the best step is known, as a Trainer has it


class TrainerCallbacks(Silent):
    """A RunProgress that passes a run on to TrainerCallbacks.

    Events: on_init_end, on_train_begin, on_epoch_begin, on_step_begin, on_step_end, on_log, on_evaluate, on_save (the
    state is on disk: a resume goes on from there), on_epoch_end, on_train_end. A run that is interrupted, or that
    stops at its cap, ends without on_train_end, as a Trainer does. Of ``TrainerControl`` should_training_stop,
    should_evaluate and should_save are obeyed before the next step; every step is logged.

    Logs of a step: ``loss``, ``learning_rate`` (the size of the step, after the schedule), ``epoch``, ``step_s``
    (seconds), ``rss_bytes``. Metrics of an evaluation: ``eval_loss``, ``eval_`` and the name of the run's metric,
    ``eval_runtime`` (seconds), ``eval_samples_per_second``, ``epoch``.
    """

    def __init__(
        self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], **arguments: Any
    ):
        """``arguments`` are of TrainingArguments, above those that the run gives, such as ``run_name``.

        Raises UsageError for what is no TrainerCallback.
        """
        self._callbacks = [one() if isinstance(one, type) else one for one in callbacks]
        for callback in self._callbacks:
            if not isinstance(callback, TrainerCallback):
                kind = type(callback).__name__
                raise UsageError(
                    f"callbacks: a {kind} is no transformers.TrainerCallback. Derive its class from that."
                )
        self._arguments = arguments
        self._state, self._control = TrainerState(), TrainerControl()
        self._args: TrainingArguments | None = None
        self._began = False
        self._waiting: list[Mapping[str, Any]] = []  # evaluations from before the beginning
        self._rows, self._batch_size = 1, 1

    # -- what the run reports -----------------------------------------------------------------------------

    def opening(self, opening: Opening) -> None:
        cfg = opening.cfg
        self._rows, self._batch_size = max(1, opening.trained), cfg.batch_size
        of_run = {
            "output_dir": cfg.out,
            "run_name": cfg.out,
            "max_steps": cfg.steps or -1,
            "per_device_train_batch_size": cfg.batch_size,
            "learning_rate": cfg.step,
            "weight_decay": cfg.weight_decay,
            "seed": cfg.seed,
            "logging_steps": 1,
            "save_steps": cfg.snapshot_every,
            "eval_strategy": "steps" if cfg.eval_every else "no",
            "eval_steps": cfg.eval_every or None,
            "metric_for_best_model": _FOR_BEST,
            "use_cpu": cfg.device == "cpu",
            "report_to": "none",
        }
        self._args = TrainingArguments(**{**of_run, **self._arguments})
        self._call("on_init_end")

    def begin(self, *, done: int, steps: int | None, cap_bytes: int, counted: str = "step") -> None:
        if counted != "step":  # a pass over rows comes before training
            return
        state = self._state
        state.global_step, state.max_steps = done, steps or 0
        state.num_train_epochs = math.ceil((steps or 0) * self._batch_size / self._rows)
        state.logging_steps = 1
        state.train_batch_size = self._batch_size
        state.epoch = self._epoch(done)
        self._began = True
        self._call("on_train_begin")
        for line in self._waiting:
            self._evaluation(line)
        self._call("on_epoch_begin")

    def before_step(self, step: int) -> None:
        if int(self._epoch(step - 1)) > int(self._epoch(step - 2)) and step > 1:
            self._call("on_epoch_end")
            self._control.should_epoch_stop = False
            self._call("on_epoch_begin")
        self._control.should_save = self._control.should_evaluate = self._control.should_log = False
        self._call("on_step_begin")

    def logged(self, line: Mapping[str, Any]) -> None:
        if line.get("eval") in _EVALUATIONS:
            if self._began:
                self._evaluation(line)
            else:
                self._waiting.append(line)
        elif "step_size" in line:
            self._state.global_step = line["step"]
            self._state.epoch = self._epoch(line["step"])
            self._call("on_step_end")
            self._log({"loss": line["loss"], "learning_rate": line["step_size"]} | _measured(line))

    def saved(self, step: int) -> None:
        if self._began:
            self._control.should_save = False
            self._call("on_save")

    def asks(self) -> Asks:
        control = self._control
        return Asks(control.should_training_stop, control.should_evaluate, control.should_save)

    def finished(self, summary: Mapping[str, Any]) -> None:
        if not self._began:
            return
        steps, train_s = summary["steps"], summary["train_s"]
        figures = {"train_runtime": train_s, "peak_rss_bytes": summary["peak_rss_bytes"]}
        if train_s > 0:
            figures["train_steps_per_second"] = steps / train_s
            figures["train_samples_per_second"] = steps * self._batch_size / train_s
        self._log(figures)
        self._call("on_epoch_end")
        self._call("on_train_end")

    # -- what the callbacks get ---------------------------------------------------------------------------

    def _epoch(self, step: int) -> float:
        """How often the training rows have been passed after ``step`` steps."""
        return step * self._batch_size / self._rows

    def _log(self, figures: Mapping[str, Any]) -> None:
        logs = {**figures, "epoch": self._state.epoch}
        self._state.log_history.append({**logs, "step": self._state.global_step})
        self._control.should_log = False
        self._call("on_log", logs=logs)

    def _evaluation(self, line: Mapping[str, Any]) -> None:
        took_s, state = line["took_s"], self._state
        metrics = {"eval_loss": line["loss"], f"eval_{line['metric']}": line["value"]}
        metrics["eval_runtime"] = took_s
        if took_s > 0:
            metrics["eval_samples_per_second"] = line["n"] / took_s
        self._log(metrics)
        self._control.should_evaluate = False
        self._call("on_evaluate", metrics={**metrics, "epoch": state.epoch})
        if line["eval"] == "during" and self._args is not None:
            name, larger = self._args.metric_for_best_model, self._args.greater_is_better
            value = metrics.get(f"eval_{str(name).removeprefix('eval_')}")
            best = state.best_metric
            if value is not None and (best is None or (value > best if larger else value < best)):
                state.best_metric, state.best_global_step = value, state.global_step

    def _call(self, event: str, **more: Any) -> None:
        nothing = dict.fromkeys(
            (
                "model",
                "processing_class",
                "optimizer",
                "lr_scheduler",
                "train_dataloader",
                "eval_dataloader",
            )
        )
        for callback in self._callbacks:
            answer = getattr(callback, event)(
                self._args, self._state, self._control, **nothing, **more
            )
            self._control = (
                answer or self._control
            )  # a callback that changes nothing may return None


def _measured(line: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and memory of a step."""
    return {name: line[name] for name in ("step_s", "rss_bytes")}
