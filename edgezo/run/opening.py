"""What a run says before it starts, in five lines: model, data, method, memory and time."""

from __future__ import annotations

from typing import NamedTuple

from edgezo.machine.clock import duration, seconds
from edgezo.machine.hardware import format_bytes
from edgezo.plan.config import Settled
from edgezo.plan.evaluated import ROWS_EVALUATED
from edgezo.plan.method import is_default
from edgezo.plan.plan import Plan
from edgezo.zo.parts import PARTS
from edgezo.zo.presets import DEFAULT, steps_by

MOST_NAMES = 4  # labels that are named
LONG_S = 6 * 3600  # from here on a run is estimates how to be shorter

# What is learned from a row, by the kind of the data.
_LEARNED = {
    "choice": "which option of a row is right",
    "completion": "the completion of each prompt",
    "text": "every token of a text",
}
# Parts of --train as they are said to a user.
_SAID_OF = {
    "lowrank": "low-rank factors",
    "full": "all weights",
    "norms": "norms and biases",
    "scales": "a gain for each row",
    "head": "the head by its exact gradient",
    "probe": "a linear probe in closed form",
    "lora": "LoRA adapters by their gradient",
}


class Opening(NamedTuple):
    """A run before its first step."""

    plan: Plan
    cfg: Settled
    source: str  # where the rows are from
    kind: str  # of the data
    labels: tuple[str, ...]  # the candidates' names; none where rows have no common ones
    trained: int  # rows to train on
    evaluated: int  # rows to evaluate on

    def lines(self) -> list[tuple[str, str]]:
        """(what, text) of each line."""
        return [
            ("model", self._model()),
            ("data", self._data()),
            ("method", self._method()),
            ("memory", self._memory()),
            ("time", self._time()),
        ]

    def _model(self) -> str:
        plan, cfg = self.plan, self.cfg
        where = {"disk": ", the last blocks read from disk", "host": ", the last blocks in RAM"}
        text = f"{plan.model} in {plan.precision}, computed in {plan.compute_dtype}"
        text += where.get(plan.residency, "")
        if cfg.parent is not None:
            text += f"; goes on after {cfg.parent_steps:,} steps of the run {cfg.parent[:12]}"
        return text

    def _data(self) -> str:
        learned = _LEARNED.get(self.kind, "a label")
        if self.labels:
            named = ", ".join(self.labels[:MOST_NAMES])
            more = ", ..." if len(self.labels) > MOST_NAMES else ""
            learned = f"one of {len(self.labels)} labels ({named}{more})"
        rows = f"{self.trained:,} rows to train on, {self.evaluated:,} to evaluate on"
        return f"{self.source}: {rows}{self._fewer_rows()}; learns {learned}"

    def _fewer_rows(self) -> str:
        """Why --for has no time to evaluate on more rows, where that is so."""
        why = [d.reason for d in self.plan.decisions if d.name == ROWS_EVALUATED]
        return f" ({why[0]})" if why else ""

    def _method(self) -> str:
        cfg = self.cfg
        parts = [_SAID_OF[part] for part in cfg.train if not PARTS[part].perturbed]
        if cfg.parts.readout and cfg.parent is not None:
            parts = ["the linear probe (or the head) of that run"]
        elif cfg.parts.readout and cfg.parts.head:
            probe, head = _SAID_OF["probe"], _SAID_OF["head"]
            parts = [f"{probe} (or {head}, where label words predict better)"]
        perturbed = [_SAID_OF[part] for part in cfg.train if PARTS[part].perturbed]
        if perturbed:
            then = "then " if cfg.parts.readout else ""
            parts.append(
                f"{then}{steps_by(cfg.estimator)} on {' and '.join(perturbed)} by forward passes alone"
            )
        where = f" of the last {cfg.blocks} blocks" if self.plan.first_trained else ""
        rows = f"{cfg.batch_size} rows a step"
        name = f"{DEFAULT}: " if is_default(cfg) else ""
        return f"{name}{', '.join(parts)}{where}; {rows}. Why: {self.plan.reason_of('method')}"

    def _memory(self) -> str:
        plan = self.plan
        return (
            f"{format_bytes(plan.planned_peak_bytes)} planned of {format_bytes(plan.max_mem_bytes)}"
        )

    def _time(self) -> str:
        cfg, parts = self.cfg, self.seconds()
        estimates = ", ".join(f"{name} {duration(s)}" for name, s in parts.items())
        if cfg.for_s is not None:
            inside = f", of that {estimates}" if estimates else ""
            return f"{duration(cfg.for_s)} in all (--for){inside}"
        total_s = sum(parts.values())
        text = f"about {duration(total_s)}: {estimates} (an estimate; the first steps show more)"
        if total_s > LONG_S:
            text += (
                ". That is long: --for 1h ends it sooner, --blocks auto makes steps cheaper, and so do shorter rows "
                "(--max-length) and a smaller model"
            )
        return text

    def seconds(self) -> dict[str, float]:
        """Estimated seconds of each part of the run; with --for, of what is not training."""
        plan, cfg, parts = self.plan, self.cfg, dict[str, float]()
        row_s = plan.step_s / (2 * cfg.batch_size)  # of a row on one side
        if plan.state_rows:
            rows = plan.state_rows + self.evaluated
            parts[f"{rows:,} rows through the frozen blocks"] = rows * plan.pass_row_s
        if not cfg.for_s and (rows := cfg.readout_rows(self.trained)):
            parts[f"a linear probe of {rows:,} rows"] = rows * row_s
        if plan.evaluation_s:
            parts[f"2 evaluations of {self.evaluated:,} rows"] = 2 * plan.evaluation_s
        if cfg.steps:
            parts[f"{cfg.steps:,} steps of {seconds(plan.step_s)}"] = cfg.steps * plan.step_s
        return parts
