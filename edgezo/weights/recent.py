"""The recipes of the last steps, for rules whose state is made anew from them (zo/rules.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgezo.zo.recipe import Recipe

History = Callable[
    [int, int], Iterable[Recipe]
]  # (first, stop) -> the recipes of steps [first, stop)


def is_live(recipe: Recipe) -> bool:
    """Whether a step changes anything: a skipped one leaves weights and state as they are."""
    return bool(recipe.decay) or bool(np.any(recipe.coefficients)) or recipe.anchor is not None


@dataclass
class Recent:
    """Live recipes of consecutive steps, up to ``stop``. A few numbers for each example and step."""

    recipes: list[Recipe] = field(default_factory=list)
    stop: int = 0

    def before(self, step: int, looks_back: float, history: History | None) -> list[Recipe]:
        """The live recipes of the ``looks_back`` steps before ``step``: those at hand, or from ``history``."""
        first = int(max(0, step - looks_back))
        if self.stop == step:
            return [r for r in self.recipes if r.step >= first]
        if not step:
            return []
        assert history is not None
        return [r for r in history(first, step) if is_live(r)]

    def add(self, recipes: Sequence[Recipe], looks_back: float) -> None:
        """Remember the next steps; others than the next begin anew, and are then only as many as they are."""
        if not recipes:
            return
        if recipes[0].step != self.stop:
            if recipes[0].step:  # what comes before them is not at hand
                return
            self.recipes = []
        self.stop = recipes[-1].step + 1
        kept = [*self.recipes, *(r for r in recipes if is_live(r))]
        self.recipes = [r for r in kept if r.step >= self.stop - looks_back]
