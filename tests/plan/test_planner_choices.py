"""Plans: weights on disk, and which method a plan takes and why."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from small_plans import MACHINE, MB, SST2, item, plan, request

from edgezo.machine.gpu_figures import REFERENCE_CARD
from edgezo.network.cards import cards
from edgezo.plan import planner
from edgezo.plan.budget import mb
from edgezo.plan.config import RunConfig
from edgezo.plan.method import FIRST_ORDER_STEPS
from edgezo.plan.plan import Decision, PlanDoesNotFit
from edgezo.plan.planner import make_plan

# ---------------------------------------------------------------------------------------------
# Weights on disk


def test_disk_is_used_only_where_memory_is_too_small_and_keeps_what_fits():
    asked = {"precision": "bf16", "train": "full", "micro_batch": 16}
    resident = plan(**asked, max_mem_bytes=2000 * MB)
    assert (resident.residency, resident.disk_bytes) == ("resident", 0)
    least = plan(**asked, residency="disk", max_mem_bytes=2000 * MB)
    assert least.blocks_on_disk == 30
    previous = 31
    for cap in range(least.needed_bytes, resident.needed_bytes, 10 * MB):
        planned = plan(**asked, max_mem_bytes=cap)
        assert planned.residency == "disk" and planned.needed_bytes <= cap
        assert planned.blocks_on_disk <= previous, "more memory never sends more to disk"
        previous = planned.blocks_on_disk
    assert previous < 10


def test_the_overlay_holds_every_weight_with_its_plane():
    planned = plan(precision="bf16", train="full", residency="disk", max_mem_bytes=2000 * MB)
    weights = 106_168_320 + 49152 * 576
    assert 3 * weights < planned.disk_bytes < 3 * weights + 3 * MB
    frozen = plan(precision="int8", train="lowrank", residency="disk", max_mem_bytes=2000 * MB)
    assert weights < frozen.disk_bytes < 1.01 * weights + 3 * MB


def test_a_model_much_larger_than_the_cap_has_a_plan_from_disk():
    planned = make_plan(
        cards()["smollm2-1.7b-instruct"],
        request(train="full", precision="bf16", max_mem_bytes=1100 * MB),
        MACHINE,
        SST2,
    )
    assert planned.residency == "disk"
    with pytest.raises(PlanDoesNotFit, match="--residency disk"):
        make_plan(
            cards()["smollm2-1.7b-instruct"],
            request(train="full", precision="bf16", residency="resident", max_mem_bytes=1100 * MB),
            MACHINE,
            SST2,
        )


def test_the_largest_card_is_one_that_stays_in_memory():
    planned = planner.largest_card(cards().values(), request(max_mem_bytes=900 * MB), MACHINE)
    assert planned is not None and planned.residency == "resident"


def test_first_order_lora_is_named_where_it_fits():
    def decision(cap: int) -> Decision:
        planned = plan(max_mem_bytes=cap)
        return next(d for d in planned.decisions if d.name == "first-order LoRA")

    tight, wide = decision(590 * MB), decision(900 * MB)
    assert "does not fit" in tight.reason and "with stock peft and PyTorch" in tight.reason
    assert "fits with --estimator lora" in wide.reason
    needed = plan(estimator="lora", max_mem_bytes=900 * MB).needed_bytes
    assert wide.value == mb(needed)


@pytest.mark.parametrize(
    ("asked", "name", "why"),
    [
        (
            {},
            "default (linear probe + GRZO)",
            "in 100 steps or more --estimator lora does better, and it fits",
        ),
        (
            {"max_mem_bytes": 590 * MB},
            "default (linear probe + GRZO)",
            "lora would learn more in a step, but needs",
        ),
        ({"train": "lowrank"}, "GRZO", "forward passes alone take the least memory"),
        ({"estimator": "grzo"}, "GRZO", "as --estimator grzo asks"),
        ({"estimator": "lozo"}, "LOZO", "as --estimator lozo asks"),
        (
            {"estimator": "mezo", "train": "lowrank+probe"},
            "linear probe + MEZO",
            "--estimator mezo",
        ),
        ({"train": "probe"}, "linear probe", "a linear probe does best in few steps"),
        ({"estimator": "lora"}, "LoRA", "a gradient learns more in a step"),
        ({"objective": "accuracy"}, "GRZO", "a score of predictions (accuracy) has no gradient"),
    ],
)
def test_a_plan_says_in_one_sentence_why_a_method(
    asked: dict[str, Any], name: str, why: str
) -> None:
    planned = plan(**{"max_mem_bytes": 900 * MB, **asked})
    decision = next(d for d in planned.decisions if d.name == "method")
    assert decision.value == name
    assert why in decision.reason and decision.reason == planned.reason_of("method")
    assert ". " not in decision.reason  # one sentence


def test_auto_takes_first_order_lora_where_it_fits_and_says_why():
    def chosen(machine: object = MACHINE, **asked: object) -> tuple[str, str, RunConfig]:
        planned = plan(machine=machine, estimator="auto", **asked)
        reason = planned.reason_of("method")
        return planned.estimator, reason, planned.settle(request(estimator="auto", **asked))

    estimator, reason, settled = chosen(max_mem_bytes=900 * MB)
    assert estimator == settled.estimator == "lora" and settled.train == ("lora",)
    assert settled.step == request(estimator="lora").step and "first-order, and fits" in reason
    few = {"max_mem_bytes": 900 * MB, "steps": FIRST_ORDER_STEPS - 1}
    estimator, reason, settled = chosen(**few)
    assert estimator == "default" and "in only 99 steps a linear probe does better" in reason
    assert settled == plan(**few).settle(request(**few))
    step_s = plan(estimator="lora", residency="resident", max_mem_bytes=900 * MB).step_s
    for steps, wanted in ((FIRST_ORDER_STEPS - 1, "default"), (FIRST_ORDER_STEPS + 1, "lora")):
        timed = {"max_mem_bytes": 900 * MB, "for_s": steps * step_s, "steps": None}
        assert chosen(**timed)[0] == wanted
    estimator, reason, _ = chosen(max_mem_bytes=900 * MB, objective="accuracy")
    assert estimator == "default" and "a score of predictions (accuracy) has no gradient" in reason
    text = replace(SST2, kind="text", label_words=0)
    assert plan(text, estimator="auto", **few).estimator == "lora"  # nothing to classify
    resident = plan(estimator="lora", residency="resident", max_mem_bytes=900 * MB)
    least = resident.smallest_bytes
    estimator, reason, settled = chosen(max_mem_bytes=least - 5 * MB)
    assert settled == plan(max_mem_bytes=least - 5 * MB).settle(
        request(max_mem_bytes=least - 5 * MB)
    )
    assert estimator == "default" and mb(least) in reason
    gpu = SimpleNamespace(
        name="a GPU",
        total_bytes=9000 * MB,
        available_bytes=9000 * MB,
        figures=REFERENCE_CARD,
    )
    with_gpu = SimpleNamespace(**{**vars(MACHINE), "gpu": gpu})
    assert chosen(machine=with_gpu, max_mem_bytes=4000 * MB)[0] == "lora"


def test_lora_takes_what_it_keeps_of_every_block_and_nothing_of_the_size_of_the_model():
    planned = plan(estimator="lora", precision="int8", max_mem_bytes=900 * MB)
    again = plan(estimator="lora", precision="int8", rank=16, max_mem_bytes=900 * MB)
    assert item(again, "adapters") == 2 * item(planned, "adapters") == 16 * 16 * 30 * (5184 + 4992)
    assert planned.most_tokens is not None and planned.reused_tokens == 0
    forward_only = plan(precision="int8", max_mem_bytes=900 * MB)
    assert planned.planned_peak_bytes < 1.25 * forward_only.planned_peak_bytes
