"""Rules: what a step makes of g, the weighted sum of directions, elementwise and tile by tile.

    sgd        g
    momentum   m <- 0.9 m + 0.1 g;  lr m            (LOZO-M, arXiv 2410.07698: in the coordinates of its basis)
    adam       m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 g^2;  lr m'/(sqrt(v') + 1e-8), m' and v' corrected for the
               zeros that they start from                                                   (arXiv 1412.6980)
    replayed-momentum, replayed-adam
               momentum and adam, whose m and v are made anew from the records of all steps
    adamezo    lr m/sqrt(v + 1e-8), m and v the sums of Adam over the last 16 steps        (arXiv 2605.00650)
    sign       lr sign(g)
    vote       a grid step of the codes times sign(g) where |g| >= z sqrt(votes), z the two-sided quantile of lr, the
               share of weights that would move if all losses were noise; sigma where weights are no codes    (nano-egg)
    orthogonal lr sqrt(rows) msign(N) V^T/sqrt(k), N the coordinates of g in a low-rank basis V     (orthogonal.py)
    centred    lr g/sqrt(v + 1e-8), v from the parts that ZO-AdaMU's direction is made of (directions.centred)

State is a function of the base, the seed and the journal: a replay goes through the steps and rebuilds it bit by bit,
so none of it is saved. For that, rounding must not depend on the tile: every operation below rounds once an element.
The rules that look back need not even keep it: in every step each tile goes through the g of the steps before from
zeros, with the bits of the rule that keeps its state. Step t then takes min(t, looks_back) more sweeps over the
directions of what is trained, and no byte. AdaMeZO's sums are not corrected for their zeros; how far it looks back is
ours.
A skipped step leaves state and weights as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

from edgezo.zo.adam import BETA1, BETA2, EPS
from edgezo.zo.axes import RULES


class Rule(NamedTuple):
    """One rule: its state and its step."""

    name: str
    states: tuple[str, ...]  # names of fp32 tensors beside each trained one, all zeros at the start
    # (state of some rows, which is changed in place; g (n, cols) fp32 there; steps so far, this one included)
    # -> the change of these rows at learning rate 1, (n, cols) fp32
    step: Callable[[Mapping[str, Tensor], Tensor, int], Tensor]

    @property
    def looks_back(self) -> float:
        """How many past steps the state is made from anew in every step; 0: it is kept."""
        return RULES[self.name].looks_back


def _average(average: Tensor, new: Tensor, beta: float) -> Tensor:
    """Take ``new`` into a moving average, in place."""
    return average.mul_(beta).add_(new * (1 - beta))


def _momentum(state: Mapping[str, Tensor], g: Tensor, steps: int) -> Tensor:
    return _average(state["momentum"], g, BETA1).clone()


def _adam(state: Mapping[str, Tensor], g: Tensor, steps: int) -> Tensor:
    first = _average(state["first"], g, BETA1)
    second = _average(state["second"], g.square(), BETA2)
    scale = (second / (1 - BETA2**steps)).sqrt_().add_(EPS)
    return (first / (1 - BETA1**steps)).div_(scale)


def _adamezo(state: Mapping[str, Tensor], g: Tensor, steps: int) -> Tensor:
    first = _average(state["first"], g, BETA1)
    second = _average(state["second"], g.square(), BETA2)
    return first / (second + EPS).sqrt_()


def votes_needed(share: float, voters: float) -> float:
    """How large a sum of so many +-1 has to be to pass a two-sided z-test at level ``share``, in (0, 1]."""
    if share <= 0:
        return math.inf
    return float(NormalDist().inv_cdf(1 - min(share, 1.0) / 2)) * math.sqrt(voters)


UPDATE_RULES = {
    rule.name: rule
    for rule in (
        Rule("sgd", (), lambda state, g, steps: g),
        Rule("momentum", ("momentum",), _momentum),
        Rule("adam", ("first", "second"), _adam),
        Rule("replayed-momentum", ("momentum",), _momentum),
        Rule("replayed-adam", ("first", "second"), _adam),
        Rule("adamezo", ("first", "second"), _adamezo),
        Rule("sign", (), lambda state, g, steps: g.sign()),
        Rule("vote", (), lambda state, g, steps: g),  # its change is made in weights/store.py
        Rule("orthogonal", (), lambda state, g, steps: g.sign()),  # of matrices: weights/store.py
        Rule("centred", (), lambda state, g, steps: g),
    )
}
