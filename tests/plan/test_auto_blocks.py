"""How many blocks ``--blocks auto`` trains, and why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edgezo.data.token_stats import TokenStats
from edgezo.machine.limits import MB
from edgezo.network.cards import cards
from edgezo.plan.plan import Plan, PlanDoesNotFit
from edgezo.plan.planner import make_plan
from edgezo.plan.request import make_config

LAYERS = 30
MACHINE = SimpleNamespace(
    total_bytes=24_000 * MB,
    available_bytes=20_000 * MB,
    base_bytes=380 * MB,
    cores=2,
    flops_s=1e11,
    bf16_flops_s=4e11,
    bf16_fast=True,
    c_kernels=True,
    gpu=None,
)
LABELS = TokenStats("label", (60,), 1, 2, mean=30.0, examples=4000)
TEXT = TokenStats("text", (60,), 60, 0, mean=30.0, examples=4000)


def planned(tokens: TokenStats, cap: str = "2GB", **asked: object) -> Plan:
    cfg = make_config({"model": "m", "data": "d", "max_mem": cap, "blocks": "auto", **asked})
    return make_plan(cards()["smollm2-135m-instruct"], cfg, MACHINE, tokens)


def reason(plan: Plan) -> str:
    return next(d.reason for d in plan.decisions if d.name == "blocks")


@pytest.mark.parametrize(
    ("tokens", "asked", "blocks", "why"),
    [
        (TEXT, {}, 10, "most of what is learned sits there"),
        (LABELS, {}, 15, "a linear probe may read best from the middle on"),
        (LABELS, {"estimator": "lora"}, 10, "most of what is learned sits there"),
        (LABELS, {"train": "lowrank"}, 10, "most of what is learned sits there"),
    ],
)
def test_as_many_blocks_as_what_is_trained_asks_for(tokens, asked, blocks, why):
    plan = planned(tokens, **asked)
    assert plan.blocks == str(blocks) and plan.first_trained == LAYERS - blocks
    assert why in reason(plan)


def test_a_small_cap_takes_fewer_blocks_before_weights_go_to_the_disk():
    least = planned(TEXT, residency="resident", cap="20GB", precision="bf16")
    sizes = []
    for blocks in ("10", "8", "5", "2"):
        plan = planned(TEXT, "20GB", blocks=blocks, precision="bf16", residency="resident")
        sizes.append(plan.smallest_bytes)
    assert sizes == sorted(sizes, reverse=True) and least.blocks == "10"
    between = f"{(sizes[1] + sizes[2]) // 2 // MB + 1}MB"
    plan = planned(TEXT, between, precision="bf16")
    assert plan.blocks == "5" and not plan.blocks_on_disk
    assert "no more of them fit into the cap without the disk" in reason(plan)


def test_a_cap_below_all_is_refused_with_the_smallest_that_works():
    with pytest.raises(PlanDoesNotFit) as refused:
        planned(TEXT, "300MB")
    smallest = refused.value.smallest_bytes
    assert planned(TEXT, f"{smallest // MB + 1}MB").needed_bytes <= smallest + MB


@pytest.mark.parametrize("steps", [50, 1000])
def test_the_reason_counts_epochs_and_the_share_of_the_time(steps):
    text = reason(planned(TEXT, steps=steps, batch_size=16))
    seen = 16 * steps
    passing = min(seen, 4000)
    share = 1 / 3 + 2 / 3 * passing / (2 * seen)
    assert f"{seen / passing:.1f} epochs in about {share:.0%} of the time" in text


def test_rows_that_need_every_block_train_all_of_them_and_it_is_said():
    written = TokenStats("completion", (60,), 8, 0, examples=400, written=8)
    plan = planned(written)
    assert not plan.first_trained
    assert plan.blocks == "all" and "each new token passes every block" in reason(plan)
