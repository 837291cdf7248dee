"""Which file a run was trained on: a hub id names a model, and a GGUF file of that model has other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgezo.network.cards import HubSource, find_card
from edgezo.weights.stored_types import rounded, shares


@dataclass(frozen=True)
class BaseFile:
    """The weights that a run was trained on."""

    name: str  # of the file, or of the files
    sha256: str  # hex
    types: Mapping[str, int]  # values in each stored type

    @staticmethod
    def saved(about: object) -> BaseFile | None:
        """What plan.json says of the base; None of a run from before it named types, and of anything else."""
        if not isinstance(about, Mapping) or not isinstance(about.get("types"), Mapping):
            return None
        types = {str(k): int(v) for k, v in about["types"].items() if isinstance(v, int)}
        return BaseFile(str(about.get("name")), str(about.get("sha256")), types) if types else None

    def to_dict(self) -> dict[str, Any]:
        """For plan.json and edgezo.json."""
        return {"name": self.name, "sha256": self.sha256, "types": dict(self.types)}

    @property
    def rounded(self) -> str:
        """The types that hold codes, most frequent first: "Q4_1 and Q8_0"; "" where all are floating-point numbers."""
        return " and ".join(rounded(self.types))

    def described(self) -> str:
        """The file for a person: "x.gguf (Q4_1 79.0 %, Q8_0 21.0 %)"."""
        return f"{self.name} ({shares(self.types)})"


def hub_of(model: str) -> str | None:
    """The hub id of a card's model; None for a model without a card, or a card without one."""
    card = find_card(model)
    return next((s.repo for s in card.sources if isinstance(s, HubSource)), None) if card else None


def other_weights(base: BaseFile, model: str) -> str:
    """A sentence: that a rounded file is not the model of its name; "" where the file is not rounded."""
    if not base.rounded:
        return ""
    whose = hub_of(model)
    named = f"the weights of {whose} on the hub" if whose else "the model's weights before rounding"
    return (
        f"the run read {base.described()}. These are not {named}: they were rounded to {base.rounded}, so they are "
        "other numbers. The evaluation is that of the file's weights"
    )


def measured_by(model: str) -> str:
    """By which command a run over a rounded file is measured over the weights before rounding."""
    return f"edgezo eval --model RUN --other-base {hub_of(model) or 'MODEL'} measures it over the others"
