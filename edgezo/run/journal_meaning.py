"""What a journal may say: the schema of its header, and what the records of a run with those settings have to be.

A journal is sent from one machine to another, and whoever makes one can make its checksums right. So after the bytes
are whole their meaning is checked, before anything is done by it:

    header    known keys alone, each of its type; settings are read as those of a command line are
    record    as many losses, credits and lists of tokens as the settings make, scales only with a finetuner, sigma and
              step size within what the settings allow; recipes.py compares it with the model's tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from edgezo.errors import UsageError
from edgezo.plan.config import RunConfig
from edgezo.plan.fields import DEFAULT_BATCH, FIELDS
from edgezo.plan.request import completed
from edgezo.run.journal_record import (
    COUNT_BYTES,
    FIXED_BYTES,
    LAYOUTS,
    SHAPE_BYTES,
    RecordHead,
    StepRecord,
    is_shaped,
)
from edgezo.zo.credit import Estimator

KINDS = ("label", "choice", "completion", "text")  # of datasets
DATASET_KEYS = {"kind", "label_ids", "label_names"}
MOST_TOKENS = 2**31  # of a vocabulary
# An automatic sigma is at most 8 times that of the settings, or an eighth of it (auto_step.py).
MOST_TIMES = 8.001
MOST_SCALE = 1.001e6  # of a finetuner: its sigmas, and their normaliser (finetuner.py)


class RecordShape(NamedTuple):
    """How many numbers a record holds."""

    evaluations: int  # S
    examples: int  # B
    credits: int  # K
    lists: int  # of touched tokens, where there are any

    @property
    def least_bytes(self) -> int:
        """Bytes of a record without scales and touched tokens."""
        follows_from_b = (self.evaluations, self.credits) == (2, self.examples)
        numbers = self.evaluations * self.examples + self.credits
        return FIXED_BYTES + (0 if follows_from_b else SHAPE_BYTES) + 4 * numbers


@dataclass(frozen=True)
class Meaning:
    """What the header of a run's journal says."""

    cfg: RunConfig  # the settings that the run began with
    scaled: bool  # a finetuner scales its directions

    @staticmethod
    def of(header: Mapping[str, Any]) -> Meaning:
        """Read a header. Raises ValueError with the first thing in it that no run writes."""
        scaled = "finetuner_hash" in header
        hashes = ("content_hash", "data_hash", *(("finetuner_hash",) if scaled else ()))
        _check_keys(header, {*hashes, "dataset", "config"}, "it")
        for name in hashes:
            if not isinstance(header[name], str) or not header[name]:
                raise ValueError(f"{name} is {_shown(header[name])}, where text belongs")
        _check_dataset(header["dataset"])
        return Meaning(_settings(header["config"]), scaled)

    # -- how many numbers a record holds ------------------------------------------------------------------

    def shape(self, step: int) -> RecordShape:
        """The shape of the record of ``step``."""
        return self._shapes[self._refresh > 0 and step % self._refresh == 0]

    @cached_property
    def _refresh(self) -> int:
        """Steps between two anchors (SVRG); 0: there are none."""
        return self.cfg.refresh if self.cfg.anchored else 0

    @cached_property
    def _shapes(self) -> tuple[RecordShape, RecordShape]:
        """The shape of a record, and that of an anchor's."""
        cfg = self.cfg
        examples = cfg.batch_size or DEFAULT_BATCH
        evaluations = len(Estimator.of(cfg).evaluations) if cfg.probing else 2
        more = cfg.carried
        if cfg.probing and cfg.tries:
            return (RecordShape(evaluations, examples, cfg.candidates + more, 1),) * 2
        # Compared steps are evaluated at the anchor too; an anchor takes the batches of all that are compared with it.
        here_and_there = evaluations * (2 if cfg.anchored and cfg.probing else 1)
        together = examples * max(1, self._refresh)
        return (
            RecordShape(here_and_there, examples, examples + more, examples + more),
            RecordShape(evaluations, together, together + more, together + more),
        )

    def least_bytes(self, step: int, scales: int = 2) -> int:
        """Bytes of the shortest record that ``step`` can have, with so many ``scales`` if it has any."""
        return self.shape(step).least_bytes + (COUNT_BYTES + 4 * scales if self.scaled else 0)

    @cached_property
    def touches(self) -> bool:
        """Whether records may name the tokens that examples touched, so that their length is not known beforehand."""
        return self.cfg.parts.weights

    def head_problem(self, head: RecordHead, scales: int | None) -> str:
        """Why a record cannot begin like this; "" where it can. ``scales``: of the records before, None without any."""
        if head.examples != self.shape(head.step).examples:
            shown = self.shape(head.step).examples
            return f"it is of {head.examples} examples, where the run's settings make {shown}"
        least_bytes = self.least_bytes(head.step, scales or 2)
        is_known = not self.touches and not (self.scaled and scales is None)
        if head.length < least_bytes or (is_known and head.length != least_bytes):
            return f"it has {head.length} bytes, where the run's settings make {least_bytes}"
        return ""

    def is_one_record(
        self, n_bytes: int, step: int, longest_bytes: int, scales: int | None
    ) -> bool:
        """Whether an end of so many bytes, where the record of ``step`` belongs, can only be one record.

        Its head is damaged. ``longest_bytes`` and ``scales`` are of the records before: 0 and None without any.
        """
        least, following = (self.least_bytes(s, scales or 2) for s in (step, step + 1))
        is_known = not self.touches and not (self.scaled and scales is None)
        most_bytes = least if is_known else longest_bytes or n_bytes
        return n_bytes <= most_bytes and n_bytes < least + following

    def problem(self, record: StepRecord) -> str:
        """What a record of this run, whose numbers are finite, cannot be; "" where it can be one."""
        shape, cfg = self.shape(record.step), self.cfg
        shapes = (*record.losses.shape, len(record.credit))
        if shapes != shape[:3]:
            shown = "{} evaluations of {} examples and {} credits"
            return f"it has {shown.format(*shapes)}, where the settings make {shown.format(*shape)}"
        if len(record.touched) not in (0, shape.lists if self.touches else 0):
            return f"it has touched tokens of {len(record.touched)} examples"
        if record.skipped == bool(record.credit[: shape.credits - cfg.carries].any()):
            return f"it is {'' if record.skipped else 'not '}marked as skipped, against its credits"
        least, most = (cfg.sigma, cfg.sigma)
        if cfg.step_auto:
            least, most = least / MOST_TIMES, most * MOST_TIMES
        if not least <= record.sigma <= most:
            return f"its sigma is {record.sigma:g}, and the run's --sigma {cfg.sigma:g}"
        # The clock of a run of a given time may pass its end before the last step: earlier versions then made its size
        # negative.
        if abs(record.step_size) > cfg.step and not cfg.step_auto:
            return f"its step size is {record.step_size:g}, and the run's --step {cfg.step:g}"
        return self._scales_problem(record)

    def _scales_problem(self, record: StepRecord) -> str:
        if (record.scales is not None) != self.scaled:
            return f"it has {'no scales' if self.scaled else 'scales, and the run no finetuner'}"
        if record.scales is not None:
            if len(record.scales) < 2:
                return "it has no scale of a tensor"
            if not record.skipped and not np.all(
                (record.scales >= 0) & (record.scales <= MOST_SCALE)
            ):
                return f"a scale is not between 0 and {MOST_SCALE:g}"
        return ""


def format_problem(record: StepRecord, version: int) -> str:
    """Why a record cannot stand in a journal of this format; "" where it can."""
    layout = (version - 1) % LAYOUTS + 1
    if layout < 2 and is_shaped(record):
        return f"format {version} has two losses and one credit an example"
    if layout < LAYOUTS and record.scales is not None:
        return f"only formats {LAYOUTS} and {2 * LAYOUTS} have scales"
    return ""


def _check_keys(values: Any, keys: set[str], what: str) -> None:
    """Raise ValueError unless ``values`` is an object with exactly these keys."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is {_shown(values)}, where an object belongs")
    if missing := sorted(keys - values.keys()):
        raise ValueError(f"{what} has no {missing[0]}")
    if unknown := sorted(values.keys() - keys):
        raise ValueError(f"{what} has {_shown(unknown[0])}, which this edgezo does not know")


def _check_dataset(facts: Any) -> None:
    """Raise ValueError unless these are the facts of a dataset (directory.dataset_facts)."""
    _check_keys(facts, DATASET_KEYS, "dataset")
    kind, ids, names = facts["kind"], facts["label_ids"], facts["label_names"]
    if kind not in KINDS:
        raise ValueError(f"the dataset's kind is {_shown(kind)}, and not one of {', '.join(KINDS)}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("label_names are not a list of texts")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < MOST_TOKENS for i in ids):
        raise ValueError("label_ids are not a list of token numbers")
    if len(set(ids)) != len(ids) or len(ids) != (len(names) if kind == "label" else 0):
        raise ValueError(f"{len(ids)} label_ids with {len(names)} names in a dataset of {kind}")
    if kind == "label" and not ids:
        raise ValueError("a dataset of labels without labels")


def _settings(config: Any) -> RunConfig:
    """The settings of a header. Raises ValueError for those that no request makes."""
    _check_keys(config, {*config} & {*FIELDS} if isinstance(config, Mapping) else set(), "config")
    try:
        return completed(config)
    except UsageError as problem:
        raise ValueError(f"config: {_short(problem.problems[0])}") from problem
    except (ArithmeticError, RecursionError, TypeError) as problem:
        raise ValueError(f"config: a setting cannot be read ({_short(problem)})") from problem


def _shown(value: Any) -> str:
    """A value of a foreign file, short enough for a message."""
    is_plain = isinstance(value, str | float | bool | None) or type(value) is int
    return _short(repr(value) if is_plain else type(value).__name__)


def _short(text: object) -> str:
    return f"{str(text)[:117]}..." if len(str(text)) > 120 else str(text)
