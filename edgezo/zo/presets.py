"""The estimators as a table: a preset is a choice on each of five axes. Standard library only.

    losses          L(theta + sigma*D_i ; x), L(theta - sigma*D_i ; x), ...    D_i = mask(directions)
    a               = credit(losses)
    g               = sum_i a_i D_i, in the units of the credit
    theta          <- (1 - decay)*theta - rule(g)                              of what is trained

The cost of a preset follows from its choices: forwards from the credit and the mask, state from the rule and the mask.
axes.py has the choices on each axis; plan/conflicts.py says which combinations mean nothing, and why.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edgezo.zo.axes import (
    CREDITS,
    DIRECTIONS,
    KAPPA,
    MASKS,
    PER_WEIGHT,
    RATE,
    ROUNDINGS,
    RULES,
    SHARE,
    in_span,
    mean_forwards,
    step_meaning,
)


class Preset(NamedTuple):
    """A forward-only estimator: a choice on each axis, and the settings that go with it."""

    name: str
    directions: str
    credit: str
    paper: str
    step: float
    mask: str = "none"
    rule: str = "sgd"
    sigma: float = 2e-3
    train: tuple[str, ...] = ("lowrank",)
    rounding: str | None = None
    keep: float = 0.25
    refresh: int = 50
    note: str = ""  # how it differs from the paper

    def describe(self) -> dict[str, Any]:
        """What ``edgezo estimators`` prints of a preset; costs are for the settings of the preset."""
        mask, rule, credit = MASKS[self.mask], RULES[self.rule], CREDITS[self.credit]
        return {
            "name": self.name,
            "paper": self.paper,
            "directions": self.directions,
            "mask": self.mask,
            "credit": self.credit,
            "rule": self.rule,
            "train": list(self.train),
            "step": self.step,
            "sigma": self.sigma,
            "step_meaning": step_meaning(self.credit, self.rule),
            "equation": self.equation,
            "forwards": mean_forwards(self.credit, self.mask, 8, self.refresh),
            "state_values": mask.state + rule.state + credit.anchored,
            "state": self.state,
            "noise": "a tile" if DIRECTIONS[self.directions].dense or mask.dense else "none",
            "note": self.note,
        }

    @property
    def equation(self) -> str:
        """D, credit and rule in the module's symbols."""
        parts = [f"D = {DIRECTIONS[self.directions].text}"]
        if self.mask != "none":
            parts.append(f"mask: {MASKS[self.mask].text}")
        return "; ".join(
            [*parts, f"a = {CREDITS[self.credit].text}", f"step: {RULES[self.rule].text}"]
        )

    @property
    def state(self) -> str:
        """What is kept beside the weights, in fp32."""
        values = MASKS[self.mask].state + RULES[self.rule].state + CREDITS[self.credit].anchored
        if not values:
            return "none"
        per = "row and rank" if in_span(self.directions) else "trained value"
        per = "row" if MASKS[self.mask].by_row else per
        return f"{values} per {per}"


FULL = ("full",)
GRZO = "GRZO, arXiv 2606.02857"
MEZO = "MeZO, arXiv 2305.17333"
LOZO = "LOZO, arXiv 2410.07698"
SPARSE = "Sparse-MeZO, arXiv 2402.15751"
DAP = "DAP, arXiv 2510.19975"
TUNER = "ZO Fine-tuner, arXiv 2510.00419"
SIGN_FACTORS = "both factors are signs, where the paper draws normals: their products are exact"
LOW_BIT = (
    "with --precision int8 perturbations and updates lie on the grid of the codes; on dense weights directions have "
    "8 bits"
)
SCALED = (
    "an embedding table counts by the tokens of an example, where the release counts 15 a row of the batch; "
    "the release's factor of 10 on the learning rate is part of --step"
)
GAINS = "trains gains relative to the scales of a row, where the paper moves the scales themselves"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("grzo", "signs", "group", GRZO, 0.1),
        Preset("grzo-raw", "signs", "raw", f"{GRZO}, its mode 'two'", 1e-4),
        Preset("grzo-one-sided", "signs", "one-sided", f"{GRZO}, its mode 'one'", 0.05),
        Preset("grzo-uniform", "signs", "uniform", f"{GRZO}, an ablation: no signal", 0.05),
        Preset(
            "replayed-momentum",
            "signs",
            "group",
            f"{GRZO}, with momentum",
            0.1,
            rule="replayed-momentum",
            note="ours: the momentum has the bits of --rule momentum, and nothing is kept: step t goes through the "
            "records of all t steps before it",
        ),
        Preset(
            "eggroll",
            "rank-signs",
            "centred",
            "EGGROLL, arXiv 2511.16652",
            0.1,
            note="factors are signs, where the paper draws normals, so that sums are exact; fitness is the difference "
            "of a pair of losses of one example, z-scored over the batch, where the paper scores a population on the "
            "same prompts; with --rank 1 the direction is that of `signs`",
        ),
        Preset(
            "vote",
            "signs",
            "vote",
            "nano-egg, arXiv 2511.16652",
            1e-3,
            rule="vote",
            train=FULL,
            rounding="stochastic",
            note="for --precision int8: codes move by whole steps; norms, biases and weights that are no codes move by "
            "sigma; factors are signs, where nano-egg draws int8 normals",
        ),
        Preset(
            "qes",
            "signs",
            "centred",
            "QES, arXiv 2602.03120",
            0.1,
            train=FULL,
            rounding="feedback",
            note="for --precision int8: what rounding takes from a code is kept in 8 bits, and made anew from base and "
            "journal now and then, exactly, where QES replays the last seeds; perturbations are not rounded to codes",
        ),
        Preset("mezo", "shared", "mean", MEZO, 1e-4),
        Preset("mezo-adam", "shared", "mean", f"{MEZO}, with Adam", 1e-3, rule="adam"),
        Preset(
            "replayed-adam",
            "shared",
            "mean",
            f"{MEZO}, with Adam",
            1e-3,
            rule="replayed-adam",
            note="mezo-adam to the bit, and nothing is kept: step t goes through the records of all t steps before it",
        ),
        Preset(
            "adamezo",
            "shared",
            "mean",
            "AdaMeZO, arXiv 2605.00650",
            1e-3,
            rule="adamezo",
            note="the moments look back 16 steps; that number is ours",
        ),
        Preset(
            "mezo-svrg",
            "shared",
            "svrg",
            "MeZO-SVRG, arXiv 2404.08080",
            1e-5,
            refresh=10,
            note="the anchor's estimate takes the batches up to the next anchor, where the paper takes every row; "
            "--refresh steps follow one direction, so --step has to be that much smaller than MeZO's",
        ),
        Preset(
            "zo-adamu",
            "centred",
            "mean",
            "ZO-AdaMU, arXiv 2312.15184",
            1e-4,
            rule="centred",
            note="the fresh share 0.5 and the weight 0.9 are constant, where the paper anneals them; "
            "both moments are made from the seeds of 8 steps, so that none is stored; m is divided by the root of v, "
            "where the paper divides by the root of v^2: m/v has no finite variance",
        ),
        Preset(
            "fzoo",
            "rademacher",
            "candidates",
            "FZOO, arXiv 2506.09034",
            0.05,
            note="the N directions share U and differ by r_j s_j^T, so one pass serves them all",
        ),
        Preset(
            "zo-dap",
            "aligned",
            "mean",
            DAP,
            1e-4,
            note="the estimate is that of the last 4 steps, made anew from their records, where the release draws a "
            "batch for it",
        ),
        Preset(
            "dap-grzo",
            "aligned-signs",
            "group",
            f"{GRZO} on {DAP}",
            0.1,
            note="ours: each example's direction is aligned with the last step's estimate",
        ),
        Preset(
            "conmezo",
            "cone",
            "mean",
            "ConMeZO, arXiv 2511.02757",
            1e-4,
            note="the moving average is made anew from the records of the last 4 steps, where the paper keeps it; "
            "there is no warm-up",
        ),
        Preset(
            "meazo",
            "shared",
            "scaled",
            "MEAZO, arXiv 2605.03869",
            1e-3,
            note="the running mean is one number, and each record holds it; its weight 0.999 is Adam's",
        ),
        Preset(
            "bszo",
            "gaussian",
            "posterior",
            "BSZO, arXiv 2601.01452",
            1e-3,
            note="from the abstract: a Kalman filter over a step's directions, whose noise follows the residuals; its "
            "constants, and that each direction is observed once, are ours; the directions differ by r_j s_j^T, so "
            "that one pass serves all",
        ),
        Preset("lezo", "shared", "mean", "LeZO, arXiv 2410.09823", 1e-4, mask="layers", keep=0.25),
        Preset(
            "hizoo",
            "shared",
            "mean",
            "HiZOO, arXiv 2402.15173",
            1e-4,
            mask="hessian",
            note="the update divides by the curvature of the perturbation, where the release takes the new one",
        ),
        Preset(
            "hizoo-block",
            "shared",
            "mean",
            "HiZOO, arXiv 2402.15173, a scalar a block",
            1e-4,
            mask="hessian-block",
            note="a block is a row of a matrix; one perturbation of the whole model measures nearly the same curvature "
            "for all rows, so the step shrinks by itself, at a fraction of the state",
        ),
        Preset("lozo", "lowrank-shared", "mean", LOZO, 1e-4, train=FULL, note=SIGN_FACTORS),
        Preset(
            "lozo-m",
            "lowrank-shared",
            "mean",
            LOZO,
            1e-4,
            rule="momentum",
            train=FULL,
            note=SIGN_FACTORS,
        ),
        Preset(
            "lo-grzo", "lowrank", "group", f"{GRZO} on LOZO", 0.1, train=FULL, note=SIGN_FACTORS
        ),
        Preset(
            "lo-grzo-strict",
            "lowrank-strict",
            "group",
            f"{GRZO} on LOZO, s = 1",
            0.1,
            train=FULL,
            note=SIGN_FACTORS,
        ),
        Preset(
            "zo-muon",
            "lowrank-strict",
            "candidates",
            "ZO-Muon, arXiv 2602.17155",
            1e-4,
            rule="orthogonal",
            train=FULL,
            note="the basis is of signs, where the paper decomposes normals, and is on the side of the inputs; vectors "
            "move by their sign; a step is the same for matrices of all sizes",
        ),
        Preset(
            "subzero",
            "subspace",
            "mean",
            "SubZero, arXiv 2410.08989",
            1e-4,
            train=FULL,
            refresh=1000,
            note="columns are orthonormal because each row belongs to one of them, where the paper decomposes normals",
        ),
        Preset("sparse-mezo", "shared", "mean", SPARSE, 1e-4, mask="sparse", train=FULL),
        Preset(
            "sparse-grzo",
            "gaussian",
            "group",
            f"{GRZO} on {SPARSE}",
            0.1,
            mask="sparse",
            train=FULL,
        ),
        Preset(
            "quzo",
            "shared",
            "mean",
            "QuZO, arXiv 2502.12346",
            1e-4,
            mask="quantized",
            train=FULL,
            rounding="stochastic",
            note=LOW_BIT,
        ),
        Preset(
            "qu-grzo",
            "gaussian",
            "group",
            f"{GRZO} on QuZO",
            0.1,
            mask="quantized",
            train=FULL,
            rounding="stochastic",
            note=LOW_BIT,
        ),
        Preset(
            "qzo", "shared", "clipped", "QZO, arXiv 2505.13430", 1e-5, train=("scales",), note=GAINS
        ),
        Preset(
            "agzo",
            "activation-shared",
            "mean",
            "AGZO, arXiv 2601.17261",
            1e-5,
            train=FULL,
            note="the basis is that of the step before after one power iteration, where the paper spends a forward on "
            "it; a run is resumed from snapshots",
        ),
        Preset(
            "ag-grzo",
            "activation",
            "group",
            f"{GRZO} on AGZO, arXiv 2601.17261",
            0.1,
            train=FULL,
            note="each example has a direction, where AGZO has one basis for the batch; a run is resumed from "
            "snapshots, since no seed can rebuild its directions",
        ),
        Preset("qzo-grzo", "signs", "group", f"{GRZO} on QZO", 0.1, train=("scales",), note=GAINS),
        Preset(
            "zo-finetuner", "shared", "mean", TUNER, 1e-4, mask="block", train=FULL, note=SCALED
        ),
        Preset(
            "zo-finetuner-grzo",
            "signs",
            "group",
            f"{GRZO} on {TUNER}",
            0.1,
            mask="block",
            train=FULL,
            note=SCALED,
        ),
    )
}


class FirstOrder(NamedTuple):
    """An estimator that trains by gradients, so that the axes mean nothing for it."""

    name: str
    paper: str
    equation: str
    step: float
    train: tuple[str, ...]
    state: int  # fp32 values for each trained value
    step_meaning: str
    beside: tuple[str, ...] = ()  # parts that a request may add
    note: str = ""

    def describe(self) -> dict[str, Any]:
        """What ``edgezo estimators`` prints of it."""
        axes = dict.fromkeys(("directions", "mask", "credit", "rule", "sigma"))
        return {
            **axes,
            "name": self.name,
            "paper": self.paper,
            "train": list(self.train),
            "step": self.step,
            "step_meaning": self.step_meaning,
            "equation": self.equation,
            "forwards": BACKWARD_PASSES,
            "state_values": self.state,
            "state": f"{self.state} per trained value",
            "noise": "none",
            "note": self.note,
        }


# Cost of a step by gradients, in forwards over the batch: a forward, another block by block, and the backward pass,
# which needs the gradients of inputs alone.
BACKWARD_PASSES = 3
FIRST_ORDER = {
    entry.name: entry
    for entry in (
        FirstOrder(
            "lora",
            "LoRA, arXiv 2106.09685",
            "y = W x + 8/rank B (A x); A and B by AdamW",
            1e-3,
            ("lora",),
            2,
            "learning rate of AdamW",
            note="first-order: a backward pass through one recomputed block at a time, over the same frozen base; "
            "a run is resumed from snapshots, since no seed can rebuild what it trains",
        ),
        FirstOrder(
            "addax",
            "Addax, arXiv 2410.06441",
            "A <- A - AdamW(gradient of the short examples) - kappa sum_i a_i sigma D_i of the others, "
            "D_i = r_i t_i^T, a_i = delta_i/std_j(delta_j)",
            0.1,
            ("lowrank",),
            2,
            KAPPA,
            beside=("head",),
            note="gradients for examples that are short enough for the memory (--short-tokens), GRZO for the others; "
            "the two have separate learning rates, where the paper weighs both into one SGD step; a run is resumed "
            "from snapshots",
        ),
    )
}
# What a request that names no estimator trains: a readout, and a preset below it. It has a name of its own, so that
# what the readout reaches is never booked under the preset's name.
DEFAULT, DEFAULT_PRESET = "default", "grzo"
DEFAULT_TRAIN = ("lowrank", "head", "probe")
_OF_DEFAULT = f"{DEFAULT_PRESET} below a linear probe or the exact head"
AUTO = "auto"
ESTIMATORS = (*PRESETS, *FIRST_ORDER)


def preset_of(estimator: str) -> Preset:
    """The choices that stand where a request with this ``--estimator`` leaves them.

    Those of ``default`` also stand until ``auto`` is decided. What is trained by its gradient has no axes, and those
    of the default stand there.
    """
    if (preset := PRESETS.get(estimator)) is not None:
        return preset
    preset = PRESETS[DEFAULT_PRESET]._replace(name=estimator)
    if (first_order := FIRST_ORDER.get(estimator)) is not None:
        return preset._replace(step=first_order.step, train=first_order.train)
    return preset._replace(train=DEFAULT_TRAIN, note=_OF_DEFAULT)


def steps_by(estimator: str) -> str:
    """The name under which steps along directions are booked: those of ``default`` are its preset's."""
    return DEFAULT_PRESET if estimator == DEFAULT else estimator


def usual_codes(estimator: str) -> str:
    """How int8 codes that are trained keep small steps, where they can be re-quantised."""
    preset = PRESETS.get(estimator)
    rounding = None if preset is None else preset.rounding
    return rounding if rounding and ROUNDINGS[rounding].requantised else "anchored"


def default_step(preset: Preset, credit: str, rule: str) -> float:
    """The preset's step where a step means the same with this credit and rule, else what is usual for its meaning."""
    meaning = step_meaning(credit, rule)
    if CREDITS[credit].anchored and credit != preset.credit:
        # --refresh steps follow one direction.
        anchored = PRESETS["mezo-svrg"]
        return anchored.step * anchored.refresh / preset.refresh
    if step_meaning(preset.credit, preset.rule) == meaning:
        return preset.step
    return {KAPPA: 0.1, RATE: 1e-4, PER_WEIGHT: 1e-3, SHARE: 1e-3}[meaning]
