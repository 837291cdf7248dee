"""Plans of the smallest card on a machine that the tests describe."""

from __future__ import annotations

from types import SimpleNamespace

from edgezo.data.token_stats import TokenStats
from edgezo.network.cards import cards
from edgezo.plan.config import RunConfig
from edgezo.plan.plan import Plan
from edgezo.plan.planner import make_plan
from edgezo.plan.request import make_config

MB = 1_000_000
SMOL = "smollm2-135m-instruct"
SST2 = TokenStats("label", (70, 69, 66, *[60] * 61), 1, 2)
MACHINE = SimpleNamespace(
    total_bytes=8000 * MB,
    available_bytes=6000 * MB,
    cores=2,
    bf16_fast=False,
    flops_s=1.5e11,
    bf16_flops_s=3e11,
    c_kernels=True,
    gpu=None,
)
FAST = SimpleNamespace(**{**vars(MACHINE), "bf16_fast": True})


def request(**asked: object) -> RunConfig:
    return make_config({"model": SMOL, "task": "sst2", **asked})


def plan(tokens: TokenStats | None = SST2, machine: object = MACHINE, **asked: object) -> Plan:
    return make_plan(cards()[SMOL], request(**asked), machine, tokens)


def item(planned: Plan, name: str) -> int:
    return sum(i.bytes for i in planned.items if i.name == name)
