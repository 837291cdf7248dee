"""What a linear probe's pass has come to, on every engine. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FittedProbe:
    """The outcome of a linear probe's pass, as probe.safetensors and summary.json keep it."""

    used: bool  # False: the label words predict better
    rows: int
    fit_s: float
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"used": self.used, "rows": self.rows, "fit_s": self.fit_s, **self.figures}

    def sentence(self) -> str:
        """The outcome in words."""
        by = (
            f"loss {self.figures['loss']:.4f} on rows held out, one by one; "
            f"the label words' is {self.figures['label_words_loss']:.4f}"
        )
        if not self.used:
            return f"no linear probe: {by}"
        blocks = ", ".join(map(str, self.figures["blocks"]))
        return f"a linear probe on blocks {blocks}, {self.rows:,} rows in {self.fit_s:.0f} s: {by}"
