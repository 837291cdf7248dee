"""Losses of options from those of their tokens, where these lie on a GPU: nothing is read back, no sum has two orders.

On a CPU ``losses.Scorer`` adds token by token. A GPU that adds to one place does so in any order, so here the values of
a group are gathered in a row, padded, and each row is summed by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgezo.machine.transfers import uploaded


class Groups(NamedTuple):
    """Which values belong to each of n groups, on the device of the values."""

    places: Tensor  # (n, most) int64 into the values; padding repeats value 0
    inside: Tensor  # (n, most) bool: no padding

    @staticmethod
    def of(group: Tensor, n: int, device: torch.device) -> Groups:
        """The groups of values (m,): ``group`` (m,) int64 on the CPU has the number of each value's group."""
        order = torch.argsort(group, stable=True)
        count = torch.bincount(group, minlength=n)
        start = count.cumsum(0) - count
        column = torch.arange(max(1, int(count.max()) if n else 0))
        inside = column < count[:, None]
        place = torch.where(inside, start[:, None] + column, 0)
        index = order[place] if len(order) else place
        return Groups(uploaded(index, device), uploaded(inside, device))

    def rows(self, values: Tensor, padding: float) -> Tensor:
        """(n, most): the values (m,) of each group."""
        if not len(values):
            return torch.full(self.places.shape, padding, device=values.device)
        return torch.where(self.inside, values[self.places], padding)

    def sums(self, values: Tensor) -> Tensor:
        """(n,): the sum of each group."""
        return self.rows(values, 0.0).sum(1)

    def back(self, rows: Tensor, m: int) -> Tensor:
        """(m,): the values whose rows are ``rows`` (n, most); each value belongs to one group."""
        values = torch.zeros(m, device=rows.device)
        # Padding adds a zero to value 0, which no order changes.
        return values.index_put_(
            (self.places,), torch.where(self.inside, rows, 0.0), accumulate=True
        )


def choice(scores: Tensor, options: Groups, right: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (e,), predictions (e,) and -dL/d(score) of each of n options (n,), of e examples.

    ``scores`` (n,); ``options``: those of each example, in their order; ``right`` (e,) int64: the right one.
    """
    rows = options.rows(scores, float("-inf"))
    log_p = torch.log_softmax(rows, 1)
    losses = -log_p.gather(1, right[:, None])[:, 0]
    is_right = torch.arange(rows.shape[1], device=rows.device) == right[:, None]
    weight = is_right.float() - log_p.exp()
    return losses, rows.argmax(1), options.back(weight, n)
