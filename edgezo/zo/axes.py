"""The axes of an estimator as tables: directions, masks, credits and rules. Standard library only.

An entry says what the plan and the conflicts need to know of a choice: forwards, state, what --step means with it.
The functions behind the names are in credit.py, directions.py, masks.py and rules.py; presets.py names combinations.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class RoundingEntry(NamedTuple):
    """What the plan and the stores need to know of a choice of --rounding."""

    plane: bool = False  # 8 more bits beside each weight keep what rounding takes away
    requantised: bool = False  # int8 codes are made anew from base and journal, now and then


class DirectionEntry(NamedTuple):
    """What the plan and the conflicts need to know of a choice of --directions."""

    per_example: bool  # one D_i for each example (or candidate); False: one D for the whole batch
    text: str
    dense: bool = True  # a factor of the weight's size is made, tile by tile
    refreshed: bool = False  # its basis is drawn anew every --refresh steps
    echoes: bool = False  # takes up directions of past steps: a record has the numbers
    summed: bool = False  # a sum of --rank products of two sign vectors
    guided: bool = False  # made from the inputs of a layer, so neither seed nor journal has it


class MaskEntry(NamedTuple):
    """What the plan and the conflicts need to know of a choice of --mask."""

    text: str
    state: int = 0  # fp32 values for each trained value
    forwards: int = 0  # beside those of the credit
    by_row: bool = False  # the state has a value for each row of a matrix, not for each weight
    dense: bool = False
    tiles: int = 0  # fp32 tiles beside those of an update
    noise_tiles: float = 0  # and beside those of dense noise in a forward


class CreditEntry(NamedTuple):
    """What the plan and the conflicts need to know of a choice of --credit."""

    per_example: bool  # goes with directions per example; False: with one for the whole batch
    forwards: int
    text: str
    step: str  # what --step means with it
    # Compares losses with those at an anchor, the weights of every --refresh-th step. That takes a second copy of what
    # is trained, and so many times the forwards of a step.
    anchored: bool = False
    tries: bool = (
        False  # the whole batch along each of --candidates directions, beside a forward without any
    )
    by_row: bool = False  # compares the --samples of one row with each other
    carries: int = 0  # numbers at the end of a record's credit, which the next step takes up


class RuleEntry(NamedTuple):
    """What the plan and the conflicts need to know of a choice of --rule."""

    text: str
    state: int = 0  # fp32 values for each trained value
    step: str = ""  # what --step means with it; "": what it means with the credit
    # Steps whose records its state is made from anew, in every step, so that none is kept; math.inf: all of them.
    looks_back: float = 0
    remade: int = 0  # tiles of fp32 values that making it anew takes

    @property
    def states(self) -> bool:
        """Whether it has a state, kept or made anew: then a step moves rows that no example used."""
        return bool(self.state or self.looks_back)


KAPPA = "kappa: the fraction of the perturbation that one unit of credit moves the weights by"
RATE = "learning rate of the gradient estimate"
SHARE = "share of the weights that move in a step if losses tell nothing"
PER_WEIGHT = "about how far one step moves a weight"

ECHO_DEPTH = 4  # past steps whose noise a direction takes up, where it is one for the batch
ROUNDINGS = {
    "": RoundingEntry(),  # nothing is rounded, or it is not decided yet
    "plane": RoundingEntry(plane=True),
    "stochastic": RoundingEntry(),
    "anchored": RoundingEntry(requantised=True),
    "feedback": RoundingEntry(plane=True, requantised=True),
}
DIRECTIONS = {
    "signs": DirectionEntry(True, "r_i s_i^T, no weight-sized noise", dense=False),
    "rank-signs": DirectionEntry(
        True,
        "sum_k r_ik s_ik^T/sqrt(rank), no weight-sized noise",
        dense=False,
        summed=True,
    ),
    "rademacher": DirectionEntry(True, "U*(r_i s_i^T), U of +-1"),
    "gaussian": DirectionEntry(True, "U*(r_i s_i^T), U of N(0,1)"),
    "shared": DirectionEntry(False, "U of N(0,1), one for the batch"),
    "lowrank": DirectionEntry(True, "(A V^T)*(r_i s_i^T)/sqrt(rank)", refreshed=True),
    "lowrank-strict": DirectionEntry(
        True, "diag(r_i) A V^T/sqrt(rank): updates stay in span V", refreshed=True
    ),
    "lowrank-shared": DirectionEntry(
        False, "A V^T/sqrt(rank), one for the batch", dense=False, refreshed=True
    ),
    "subspace": DirectionEntry(
        False, "P Z Q^T, P and Q with orthonormal columns, Z of N(0,1)", dense=False, refreshed=True
    ),
    "centred": DirectionEntry(False, "around their own moving average, one for the batch"),
    "aligned": DirectionEntry(
        False, "z + ((s |g| - g.z)/|g|^2) g, z of N(0,1), g the last steps' estimate", echoes=True
    ),
    "cone": DirectionEntry(
        False,
        "sin(1.35) z + cos(1.35) sqrt(d) m/|m|, z of N(0,1), m of the last steps",
        echoes=True,
    ),
    "aligned-signs": DirectionEntry(
        True,
        "D_i + ((s_i |g| - g.D_i)/|g|^2) g, D_i = r_i s_i^T, g the last step's estimate",
        dense=False,
        echoes=True,
    ),
    "activation": DirectionEntry(
        True,
        "r_i v_i^T, v_i = X_i^T z_i/|X_i^T z_i| of the inputs X_i of example i to the layer",
        dense=False,
        guided=True,
    ),
    "activation-shared": DirectionEntry(
        False,
        "A V^T, one for the batch, V a basis of the last step's inputs by power iteration",
        dense=False,
        guided=True,
    ),
}

MASKS = {
    "none": MaskEntry("every trained value"),
    "sparse": MaskEntry(
        "the --keep smallest of a matrix's weights, by size", dense=True, tiles=1, noise_tiles=0.5
    ),
    "layers": MaskEntry("a --keep share of the blocks, drawn every step"),
    "hessian": MaskEntry(
        "over the root of a running diagonal curvature", 1, 1, dense=True, noise_tiles=2
    ),
    "hessian-block": MaskEntry(
        "over the root of a running curvature, one for each row of a matrix",
        *(1, 1),
        by_row=True,
        dense=True,
        noise_tiles=2,
    ),
    "quantized": MaskEntry(
        "rounded to 8 bits, once for the perturbation and again for the update",
        dense=True,
        tiles=2,  # the rounded values, and what they are compared with
        noise_tiles=2,
    ),
    "block": MaskEntry("times s_b of each tensor from --finetuner, sum_b d_b s_b^2 = sum_b d_b"),
}

CREDITS = {
    "group": CreditEntry(True, 2, "delta_i/std_j(delta_j)", KAPPA),
    "centred": CreditEntry(True, 2, "(delta_i - mean_j(delta_j))/std_j(delta_j)", KAPPA),
    "by-prompt": CreditEntry(
        True, 2, "delta_i/std(l of the same row's --samples, both sides)", KAPPA, by_row=True
    ),
    "vote": CreditEntry(True, 2, "sign(delta_i)", SHARE),
    "raw": CreditEntry(True, 2, "delta_i", RATE),
    "one-sided": CreditEntry(True, 1, "(l+_i - mean_j(l+_j))/std_j(l+_j)", KAPPA),
    "uniform": CreditEntry(True, 1, "1, whatever the losses are", KAPPA),
    "mean": CreditEntry(False, 2, "mean_i(delta_i)", RATE),
    "clipped": CreditEntry(False, 2, "mean_i(delta_i), its slope clipped at 100", RATE),
    "svrg": CreditEntry(
        False,
        2,
        "mean_i(delta_i) minus that at the anchor; plus the anchor's mean over --refresh batches, along its D",
        RATE,
        anchored=True,
    ),
    "candidates": CreditEntry(
        True, 1, "(l_j - l_0)/std_k(l_k) of --candidates directions", KAPPA, tries=True
    ),
    "scaled": CreditEntry(
        False,
        2,
        "delta_i/(sqrt(v) + 1e-8), v a running mean of mean_i(delta_i)^2",
        PER_WEIGHT,
        carries=1,
    ),
    "posterior": CreditEntry(
        True,
        1,
        "y_j/(1 + n_j), y_j = (l_j - l_0)/sigma of --candidates directions, n_j a running mean of y^2",
        RATE,
        tries=True,
        carries=1,
    ),
}

RULES = {
    "sgd": RuleEntry("g"),
    "momentum": RuleEntry("m = 0.9 m + 0.1 g", 1),
    "adam": RuleEntry("m/(sqrt(v) + 1e-8), betas 0.9 and 0.999", 2, PER_WEIGHT),
    "replayed-momentum": RuleEntry(
        "m = 0.9 m + 0.1 g, made anew from all records", looks_back=math.inf, remade=3
    ),
    "replayed-adam": RuleEntry(
        "m/(sqrt(v) + 1e-8), betas 0.9 and 0.999, made anew from all records",
        step=PER_WEIGHT,
        looks_back=math.inf,
        remade=4,
    ),
    "adamezo": RuleEntry(
        "m/sqrt(v + 1e-8), betas 0.9 and 0.999, made anew from the last 16 records",
        step=PER_WEIGHT,
        looks_back=16,
        remade=4,
    ),
    "sign": RuleEntry("sign(g)", 0, PER_WEIGHT),
    "vote": RuleEntry(
        "sign(g) where |g| passes a z-test at level --step, times one step of the codes' grid",
        step=SHARE,
    ),
    "orthogonal": RuleEntry(
        "sqrt(rows) msign(N) V^T/sqrt(rank) of g = N V^T/sqrt(rank); of a vector sign(g)",
        step=PER_WEIGHT,
        remade=1,
    ),
    "centred": RuleEntry("g/sqrt(v + 1e-8), v of the parts that the direction is made of"),
}


def forwards(credit: str, mask: str, candidates: int) -> int:
    """Forward passes over the batch in a step."""
    drawn = candidates if CREDITS[credit].tries else 0
    return CREDITS[credit].forwards + drawn + MASKS[mask].forwards


def mean_forwards(credit: str, mask: str, candidates: int, refresh: int) -> float:
    """Forward passes over a batch in a step, on average.

    With an anchor, its step passes ``refresh`` batches, and every other step one batch at two places.
    """
    once = forwards(credit, mask, candidates)
    if not CREDITS[credit].anchored:
        return once
    return once * (refresh + 2 * (refresh - 1)) / refresh


def in_span(directions: str) -> bool:
    """Whether every update lies in the span of a basis, so that a rule may keep its state in coordinates."""
    return directions in ("lowrank-strict", "lowrank-shared")


def step_meaning(credit: str, rule: str) -> str:
    """What --step means with a credit and a rule."""
    return RULES[rule].step or CREDITS[credit].step
