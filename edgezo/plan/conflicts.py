"""Requests whose parts are fine alone and mean nothing together, each with its reason.

Everywhere ``v`` is a request by field name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgezo.plan.fields import LOSS, OBJECTIVES, OF_PRESET, UNROUNDED, flag
from edgezo.zo.presets import (
    AUTO,
    CREDITS,
    DIRECTIONS,
    EXACT,
    FIRST_ORDER,
    MASKS,
    PER_WEIGHT,
    PRESETS,
    RULES,
)

PACED = ("group", "mean")  # credits that --step auto has a formula for (run/auto_step.py)


def combinations(v: Mapping[str, Any], need_data: bool) -> list[str]:
    """What is wrong with a request; data is part of it where ``need_data``."""
    train, problems = v["train"], []
    if v["model"] is None:
        problems.append(
            "--model is missing: a card (see edgezo models), a directory, a .gguf file or a hub id"
        )
    if need_data and v["data"] is None and v["task"] is None:
        problems.append("--data or --task is missing: there is nothing to learn from")
    if v["data_root"] is not None and v["task"] is None:
        problems.append(
            "--data-root is where --task looks for its data; without --task give --data"
        )
    if (
        need_data
        and v["mask"] == "block"
        and v["finetuner"] is None
        and not EXACT.issuperset(train)
    ):
        problems.append(
            "--mask block needs --finetuner FILE: edgezo meta-train makes one, and "
            "edgezo convert-finetuner reads a published one"
        )
    problems += _of_axes(v)
    if v["step_auto"] and (why := cannot_pace(v)):
        problems.append(f"--step auto: {why}; give --step a number")
    if v["objective"] not in OBJECTIVES and not re.fullmatch(r"[\w.]+:[\w.]+", v["objective"]):
        problems.append(
            f"--objective {v['objective']!r} is not one of {', '.join(OBJECTIVES)}, nor module:function, "
            "a Python function (prediction, row) -> float"
        )
    if v["objective"] != LOSS:
        if v["estimator"] in FIRST_ORDER:
            problems.append(
                f"--estimator {v['estimator']} with --objective {v['objective']}: it follows the gradient of a loss, "
                "and a score of predictions has none; use a forward-only row"
            )
        elif "head" in train:
            problems.append(
                f"--train {'+'.join(train)} with --objective {v['objective']}: the exact head follows the gradient "
                "of a loss, and a score of predictions has none; leave out head"
            )
    if "full" in train and v["precision"] == "int4":
        problems.append(
            "--train full with --precision int4: its codes are frozen; "
            "train lowrank, norms, scales or head there, or use int8 or bf16"
        )
    for part in ("lowrank", "norms", "scales"):
        if "full" in train and part in train:
            problems.append(
                f"--train full+{part}: full weights already hold what {part} would train"
            )
    if {"full", "probe"} <= set(train):
        problems.append(
            "--train full+probe: a probe reads the blocks alone, so no loss depends on the head's table; "
            "use full, full+head, or lowrank+probe"
        )
    if v["rounding"] is not None:
        if "full" not in train:
            problems.append(
                "--rounding says how full weights keep small steps; it needs --train full"
            )
        if v["precision"] in UNROUNDED:
            problems.append(
                f"--rounding with --precision {v['precision']}: {UNROUNDED[v['precision']]}"
            )
        elif (v["rounding"], v["precision"], v["mask"]) == ("plane", "int8", "quantized"):
            problems.append(
                "--mask quantized moves codes by whole steps of their grid; "
                "--rounding plane has a finer one: use --rounding stochastic"
            )
        elif v["rounding"] == "anchored" and v["precision"] != "int8":
            problems.append(
                "--rounding anchored makes int8 codes anew from base and journal; it needs --precision int8"
            )
        elif v["rounding"] == "anchored" and (why := cannot_anchor(v)):
            problems.append(f"--rounding anchored: {why}; use --rounding stochastic")
    if v["residency"] == "host" and v["device"] == "cpu":
        problems.append(
            "--residency host keeps blocks in the RAM beside a GPU; with --device cpu use disk"
        )
    if v["residency"] == "disk" and v["device"] == "cuda":
        problems.append(
            "--residency disk with --device cuda: blocks reach a GPU from the RAM; "
            "use --residency host, or --device cpu"
        )
    if v["batch_size"] is not None and v["micro_batch"] is not None:
        if v["micro_batch"] > v["batch_size"]:
            problems.append(
                f"--micro-batch {v['micro_batch']} is more than "
                f"--batch-size {v['batch_size']}, which it splits"
            )
    return problems


def unused(said: Mapping[str, Any], v: Mapping[str, Any]) -> list[str]:
    """What the user said in this command and the run would silently ignore."""
    train = v["train"]
    probing = not EXACT.issuperset(train)
    first = FIRST_ORDER.get(v["estimator"])
    said = {**said, "step": said.get("step", said.get("step_auto"))}
    drawn = DIRECTIONS[v["directions"]]
    rules = {
        "rank": (
            {"lowrank", "lora"} & set(train)
            or drawn.refreshed
            or (drawn.guided and not drawn.per_example),
            "it is the rank of --train lowrank or lora, and of low-rank directions",
        ),
        "keep": (v["mask"] in ("sparse", "layers"), "it is what --mask sparse or layers leaves"),
        "refresh": (
            drawn.refreshed or CREDITS[v["credit"]].anchored,
            "only low-rank directions have a basis that is drawn anew, and only --credit svrg an anchor",
        ),
        "candidates": (v["credit"] == "candidates", "only --credit candidates draws them"),
        **{
            name: (v["estimator"] == "addax", "only --estimator addax has short examples")
            for name in ("short_tokens", "short_lr")
        },
        "finetuner": (
            v["mask"] == "block" and probing,
            "only --mask block (--estimator zo-finetuner) asks one for scales",
        ),
        "head_lr": ("head" in train, "it is the learning rate of --train head"),
        "sigma": (probing, f"--train {'+'.join(train)} alone perturbs nothing"),
        "step": (
            probing or first is not None,
            "--train head or probe alone perturbs nothing; a head's rate is --head-lr",
        ),
    }
    if first is not None:
        axes = "directions, masks and credits are of forward-only rows"
        rules |= {name: (False, axes) for name in ("directions", "mask", "credit", "rule")}
    if v["estimator"] == AUTO:
        chosen = "--estimator auto decides it with the estimator; name that to say it"
        rules |= {name: (False, chosen) for name in OF_PRESET}
    return [
        f"{flag(name)} has no effect here: {reason}"
        for name, (used, reason) in rules.items()
        if said.get(name) is not None and not used
    ]


def _of_axes(v: Mapping[str, Any]) -> list[str]:
    """Choices on the axes that mean nothing together, each with its reason. ``v``: a request by field name."""
    if v["estimator"] in FIRST_ORDER:
        return _of_first_order(v)
    if "lora" in v["train"]:
        return ["--train lora goes along its own gradient: it needs --estimator lora"]
    directions, mask, credit, rule = (v[n] for n in ("directions", "mask", "credit", "rule"))
    train, found = v["train"], []
    many = CREDITS[credit].per_example
    if many and not DIRECTIONS[directions].per_example:
        found.append(
            f"--directions {directions} with {_credit(v)}: it compares one direction per example; "
            "one direction for the whole batch is --estimator mezo, or --credit mean"
        )
    if not many and DIRECTIONS[directions].per_example:
        shared = ", ".join(n for n, d in DIRECTIONS.items() if not d.per_example)
        found.append(
            f"--directions {directions} with {_credit(v)}: it has one direction for the whole "
            f"batch ({shared})"
        )
    if mask == "sparse" and "full" not in train:
        found.append(
            "--mask sparse chooses among a matrix's own weights by their size; it needs --train full"
        )
    if mask == "quantized" and directions not in ("gaussian", "shared"):
        found.append(
            f"--mask quantized with --directions {directions}: they lie on every grid already; "
            "it rounds gaussian or shared ones"
        )
    if mask == "block" and RULES[rule].step == PER_WEIGHT:
        found.append(
            f"--mask block with --rule {rule}: how far it moves a weight does not follow from how "
            "long the direction was, so the scales would be lost; use sgd or momentum"
        )
    if MASKS[mask].forwards and (credit != "mean" or directions != "shared"):
        found.append(
            f"--mask {mask} measures the curvature along one direction of the whole batch: "
            "it needs --credit mean and --directions shared"
        )
    if CREDITS[credit].anchored:
        if directions != "shared" or mask != "none" or rule != "sgd":
            found.append(
                f"{_credit(v)} compares one direction at two places: "
                "it needs --directions shared, --mask none and --rule sgd"
            )
        if {"full", "head"} & set(train):
            found.append(
                f"{_credit(v)} keeps a second copy of what is trained and knows the loss at it: "
                "--train full would hold the model twice, and the exact head has no anchor; "
                "it needs --train lowrank, norms or scales"
            )
    if rule == "adam" and DIRECTIONS[directions].refreshed:
        found.append(
            f"--rule adam with --directions {directions}: second moments cannot follow a basis "
            "that is drawn anew; use sgd or momentum"
        )
    if (rule == "centred") != (directions == "centred"):
        found.append(
            "--directions centred and --rule centred are two halves of ZO-AdaMU: "
            "the rule scales by the parts that the direction is made of"
        )
    if DIRECTIONS[directions].guided:
        if not {"full", "lowrank"} & set(train):
            found.append(
                f"--directions {directions} are made from what matrices read; it needs --train full or lowrank"
            )
        if mask not in ("none", "layers"):
            found.append(
                f"--mask {mask} with --directions {directions}: it shapes weight-sized noise, which they have not"
            )
        if not DIRECTIONS[directions].per_example and ("lowrank" in train or RULES[rule].state):
            found.append(
                f"--directions {directions} follow a basis that turns at every step: a rule's state cannot, and "
                "low-rank factors have no use for another one; use --rule sgd and --train full"
            )
        if credit == "candidates":
            found.append(
                f"--directions {directions} with {_credit(v)}: it tries a direction on every example, "
                "but theirs are each example's own"
            )
    if v["residency"] in ("disk", "host") and (why := needs_memory(v)):
        found.append(f"--residency {v['residency']} with --train full: {why}")
    return found


def _of_first_order(v: Mapping[str, Any]) -> list[str]:
    row, found = FIRST_ORDER[v["estimator"]], []
    if not set(row.train) - set(row.less) <= set(v["train"]) <= set(row.train):
        found.append(
            f"--train {'+'.join(v['train'])} with --estimator {row.name}: it trains {'+'.join(row.train)} alone"
        )
    if "cuda" in (v["device"],) or v["residency"] == "host":
        found.append(
            f"--estimator {row.name} on a GPU: its backward pass is counted and measured on the CPU only; "
            "use --device cpu"
        )
    return found


def needs_memory(v: Mapping[str, Any]) -> str:
    """Why full weights have to stay in memory, or ''."""
    if "full" not in v["train"]:
        return ""
    if RULES[v["rule"]].state or MASKS[v["mask"]].state:
        name = f"--rule {v['rule']}" if RULES[v["rule"]].state else f"--mask {v['mask']}"
        return f"the state of {name} is kept beside the weights, in memory"
    if v["mask"] == "block":
        return "--mask block asks for mean and variance of every trained tensor at every step"
    if DIRECTIONS[v["directions"]].guided:
        return (
            f"a block that is elsewhere takes its updates later, from seeds, and --directions {v['directions']} "
            "have none"
        )
    if v["mask"] == "sparse":
        return "--mask sparse reads the base's weights once more for its thresholds"
    if v["precision"] == "int8":
        return "int8 codes that are trained stay in memory; with bf16 they need not"
    return ""


def cannot_anchor(v: Mapping[str, Any]) -> str:
    """Why int8 codes cannot be made anew from base and journal alone, or ''."""
    if RULES[v["rule"]].state or MASKS[v["mask"]].state:
        name = f"--rule {v['rule']}" if RULES[v["rule"]].state else f"--mask {v['mask']}"
        return f"the state of {name} would have to be made anew with the codes"
    if DIRECTIONS[v["directions"]].guided:
        return f"no journal has --directions {v['directions']}"
    if v["mask"] in ("sparse", "quantized"):
        return f"what --mask {v['mask']} left of a direction depends on the codes of that step"
    return ""


def cannot_pace(v: Mapping[str, Any]) -> str:
    """Why --step auto cannot tell a step from probes, or ''."""
    if v["estimator"] in FIRST_ORDER or v["estimator"] == AUTO:
        return f"--estimator {v['estimator']} has a rate of a gradient's, which no probe tells"
    if v["credit"] not in PACED:
        return f"--credit {v['credit']} has no step that a slope and a curvature tell ({', '.join(PACED)} have)"
    if v["rule"] != "sgd":
        return f"--rule {v['rule']} scales what probes tell by a state of its own"
    if MASKS[v["mask"]].state or v["mask"] == "block":
        return f"--mask {v['mask']} scales what probes tell by a state of its own"
    if DIRECTIONS[v["directions"]].guided:
        return f"--directions {v['directions']} follow the rows, so that rows cannot share one"
    return ""


def _credit(v: Mapping[str, Any]) -> str:
    """How the credit came to be: by the preset's name or by itself."""
    own = PRESETS[v["estimator"]].credit == v["credit"]
    return f"--estimator {v['estimator']}" if own else f"--credit {v['credit']}"
