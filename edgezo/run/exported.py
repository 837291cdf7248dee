"""What an export says of its run, for edgezo's own use: how it is asked, and its linear probe.

A directory has ``edgezo.json``, with probe.safetensors beside it; a GGUF file has both in its metadata, where other
programs pass over them:

    edgezo.about             JSON: the run, its base, its data, how rows become prompts
    edgezo.probe.blocks      the blocks that are read, int32
    edgezo.probe.bias        float32, one for each class
    edgezo.probe.weight      float32, (blocks, classes, hidden) row by row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGUFValueType
from torch import Tensor

from edgezo.data.dataset import Dataset
from edgezo.machine.files import to_json
from edgezo.machine.foreign import MOST_CONFIG_BYTES, parse_json, read_small, reading
from edgezo.network.model import Model
from edgezo.network.readout import ReadoutWeights
from edgezo.plan.config import RunConfig
from edgezo.run.directory import RunFiles, same_task
from edgezo.run.readout_pass import recall
from edgezo.weights.file_kinds import is_gguf
from edgezo.weights.gguf_header import GgufHeader, read_header
from edgezo.weights.gguf_write import Entry, numbers, text

# Settings by which rows become prompts.
ASKED_BY = ("task", "template", "labels", "label_field", "max_length", "max_new_tokens", "text_end")
_DECIDING = ("task", "template", "labels", "label_field")  # of them, what decides the labels
_DEFAULTS = {"label_field": "label"}
_ABOUT, _PROBE = "edgezo.about", "edgezo.probe"
_WAY_OUT = "Export the run again."


def asked_by(cfg: RunConfig) -> dict[str, Any]:
    """The settings of a run by which its rows become prompts."""
    values = {name: getattr(cfg, name) for name in ASKED_BY}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Exported:
    """An export that stands in a directory or a GGUF file."""

    path: Path
    about: Mapping[str, Any]  # what edgezo.json holds
    header: GgufHeader | None  # of a GGUF file

    @staticmethod
    def at(path: Path) -> Exported | None:
        """What edgezo has exported to ``path``; None for anything else. Raises EdgezoError where it is damaged."""
        folder = RunFiles(path)
        if path.is_dir() and (folder.exported.is_file() or folder.probe.is_file()):
            probed = folder.probe.is_file()
            what = (
                f"{path} {'has a linear probe' if probed else 'is an export'}, but what it is for"
            )
            left_out = (folder.probe if probed else folder.exported).name
            way_out = f"{_WAY_OUT[:-1]}, or remove {left_out} to use the model without it."
            with reading(f"{what} ({folder.exported.name})", way_out):
                raw = read_small(folder.exported, MOST_CONFIG_BYTES).decode("utf-8")
                return Exported(path, _checked(parse_json(raw)), None)
        if not path.is_file() or not is_gguf(path):
            return None
        header = read_header(path)
        about = header.metadata.get(_ABOUT)
        if not isinstance(about, str):
            return None
        with reading(f"{path}: {_ABOUT} in its metadata", _WAY_OUT):
            return Exported(path, _checked(parse_json(about)), header)

    @property
    def kind(self) -> str:
        """The kind of the rows that the run was trained on."""
        return str(self.about["dataset"]["kind"])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return tuple(self.about["dataset"]["label_names"])

    @property
    def settings(self) -> dict[str, Any]:
        """How it is asked. Exports of earlier versions do not say."""
        asked = self.about.get("asked_by")
        return {k: v for k, v in asked.items() if k in ASKED_BY} if isinstance(asked, dict) else {}

    def asks_as(self, cfg: RunConfig) -> bool:
        """Whether a request has the prompts and labels of the run."""
        return all(self.settings.get(n, _DEFAULTS.get(n)) == getattr(cfg, n) for n in _DECIDING)

    @property
    def probed(self) -> bool:
        """Whether a linear probe goes with it."""
        if self.header is not None:
            return f"{_PROBE}.blocks" in self.header.metadata
        return RunFiles(self.path).probe.is_file()

    def same_task(self, dataset: Dataset) -> bool:
        """Whether a data set has the labels that the run was trained on."""
        return same_task(self.about["dataset"], dataset)

    def classify(self, model: Model, hidden: int) -> None:
        """Let ``model``, whose states have ``hidden`` numbers, classify by the linear probe.

        Raises EdgezoError for one that is damaged, or of another model.
        """
        if self.header is None:
            recall(RunFiles(self.path), model, hidden, self.about.get("run_id"))
            return
        with reading(f"{self.path}: the linear probe in its metadata", _WAY_OUT):
            tensors = _probe_tensors(self.header, hidden)
            model.classify_by(ReadoutWeights.of(tensors, hidden, model.context.device))


def _checked(about: Any) -> dict[str, Any]:
    """``about`` with the entries that are read. Raises KeyError, TypeError and ValueError for something else."""
    facts = about["dataset"]
    ids, names = list(facts["label_ids"]), list(facts["label_names"])
    kinds = {type(i) for i in ids} <= {int} and {type(name) for name in names} <= {str}
    if not isinstance(facts["kind"], str) or not kinds:
        raise ValueError("it does not say what the run was trained on")
    return dict(about)


def entries(about: Mapping[str, Any], probe: ReadoutWeights | None) -> dict[str, Entry]:
    """The metadata of a GGUF file by which ``Exported.at`` knows it."""
    made = {_ABOUT: text(to_json(about))}
    if probe is not None:
        floats = GGUFValueType.FLOAT32
        made |= {
            f"{_PROBE}.blocks": numbers(list(probe.blocks), GGUFValueType.INT32),
            f"{_PROBE}.bias": numbers(probe.bias.tolist(), floats),
            f"{_PROBE}.weight": numbers(probe.weight.flatten().tolist(), floats),
        }
    return made


def _probe_tensors(header: GgufHeader, hidden: int) -> dict[str, Tensor]:
    blocks, bias, weight = (header.numbers(f"{_PROBE}.{n}") for n in ("blocks", "bias", "weight"))
    return {
        "probe.blocks": torch.tensor(blocks, dtype=torch.int64),
        "probe.bias": torch.tensor(bias, dtype=torch.float32),
        "probe.weight": torch.tensor(weight, dtype=torch.float32).view(
            len(blocks), len(bias), hidden
        ),
    }
