"""Plans of every card of models/ for the GPUs of laptops, with the figures of gpu_figures.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgezo.data.token_stats import TokenStats
from edgezo.errors import EdgezoError
from edgezo.machine import gpu_figures, hardware
from edgezo.machine.gpu_figures import MEASURED_CARDS, REFERENCE_CARD, figures_of, keep
from edgezo.machine.hardware import Gpu
from edgezo.network.cards import cards
from edgezo.plan.plan import Plan, PlanDoesNotFit
from edgezo.plan.planner import make_plan
from edgezo.plan.request import make_config

MB, GB = 10**6, 10**9
SIZES = (6, 8, 12, 16, 24)
DISPLAY_BYTES = 700 * MB  # what the display and other programs hold of a laptop's card
SST2 = TokenStats("label", (70, 69, 66, *[60] * 61), 1, 2)
PRECISIONS = ("int4", "int8", "bf16", "fp32")
# Precision and residency by card: what the table of docs/gpu.md shows.
WANTED = {
    "smollm2-1.7b-instruct": "bf16 bf16 bf16 bf16 bf16",
    "llama-3.2-3b": "int8 int8 bf16 bf16 bf16",
    "qwen2.5-7b": "int4+ int4 int8 int8 bf16",
    "llama-3-8b": "int4+ int4 int8 int8 bf16",
    "opt-13b": "int4+ int4+ int4 int8 int8",
    "qwen2.5-14b": "int4+ int4+ int4+ int4 int8",
    "opt-30b": "int4+ int4+ int4+ int4+ int4+",
}


def laptop(gigabytes: int, **figures: object) -> SimpleNamespace:
    total = gigabytes * GB
    gpu = Gpu(0, "a laptop's card", total, total - DISPLAY_BYTES, "GPU-1")
    return SimpleNamespace(
        total_bytes=32 * GB,
        available_bytes=24 * GB,
        cores=8,
        bf16_fast=False,
        flops_s=5e11,
        bf16_flops_s=1e12,
        c_kernels=True,
        gpu=gpu,
        **figures,
    )


def plan(card: str, gigabytes: int, **asked: object) -> Plan:
    request = {"model": card, "task": "sst2", "max_mem_bytes": gigabytes * GB, **asked}
    return make_plan(cards()[card], make_config(request), laptop(gigabytes), SST2)


@pytest.mark.parametrize("card", cards())
def test_every_card_has_a_plan_for_every_laptop(card):
    ranks = []
    for gigabytes in SIZES:
        planned = plan(card, gigabytes)
        assert planned.device == "cuda"
        assert planned.needed_bytes <= planned.max_mem_bytes == gigabytes * GB - DISPLAY_BYTES
        assert planned.host_bytes <= 24 * GB
        ranks.append((PRECISIONS.index(planned.precision), -planned.blocks_in_host))
    assert ranks == sorted(ranks), "a larger card is never planned lower"


def test_the_table_of_the_docs_is_that_of_the_plans():
    page = (Path(__file__).parents[2] / "docs/gpu.md").read_text(encoding="utf-8")
    for card, wanted in WANTED.items():
        cells = []
        for gigabytes in SIZES:
            planned = plan(card, gigabytes)
            away = "+" if planned.residency == "host" else ""
            cells.append(f"{planned.precision}{away}")
        assert " ".join(cells) == wanted, card
        assert f"| {card} | {' | '.join(cells)} |" in page


def test_what_other_programs_hold_is_not_planned_with():
    planned = plan("llama-3-8b", 12)
    reason = next(d.reason for d in planned.decisions if d.name == "max_mem_bytes")
    assert "700MB of the GPU's 12000MB" in reason and "other programs" in reason
    assert plan("llama-3-8b", 12, max_mem_bytes=8 * GB).max_mem_bytes == 8 * GB


def test_a_card_that_the_ram_has_no_room_for_is_refused():
    machine = laptop(8)
    machine.available_bytes = 4 * GB
    with pytest.raises(PlanDoesNotFit, match="RAM"):
        request = make_config({"model": "opt-30b", "task": "sst2", "device": "cuda"})
        make_plan(cards()["opt-30b"], request, machine, SST2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path))
    return tmp_path


def test_figures_of_the_users_card_come_before_those_of_the_table(cache):
    assert figures_of("a laptop's card") == REFERENCE_CARD
    assert figures_of(MEASURED_CARDS[0].card) == MEASURED_CARDS[0]
    mine = replace(REFERENCE_CARD, card="a laptop's card", context_bytes=300 * MB)
    file = keep(mine)
    assert figures_of("a laptop's card") == mine and figures_of("another") == REFERENCE_CARD
    keep(replace(mine, card="another"))
    assert figures_of("a laptop's card") == mine, "cards do not replace each other"
    machine = laptop(8)
    machine.gpu = replace(machine.gpu, figures=mine)
    request = make_config({"model": "llama-3-8b", "task": "sst2"})
    items = make_plan(cards()["llama-3-8b"], request, machine, SST2).items
    assert next(i.bytes for i in items if i.name == "CUDA context") == 300 * MB
    assert json.loads(file.read_text())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a laptop\'s card": 1}', "[" * 100_000])
def test_a_damaged_file_of_figures_is_as_none(cache, text):
    (cache / gpu_figures.FILE).write_text(text)
    assert figures_of("a laptop's card") == REFERENCE_CARD


def test_figures_that_cannot_be_right_are_not_kept(cache):
    wrong = replace(REFERENCE_CARD, context_bytes=-5)
    with pytest.raises(EdgezoError, match="other programs"):
        keep(wrong)
    assert not (cache / gpu_figures.FILE).exists()


def test_a_note_says_whose_figures_a_plan_counts_with():
    gpu = laptop(8).gpu
    assert "doctor --calibrate" in hardware.planned_with(gpu)
    mine = replace(REFERENCE_CARD, card=gpu.name)
    assert "its own" in hardware.planned_with(replace(gpu, figures=mine))


def test_calibration_without_a_gpu_says_so(edgezo, monkeypatch):
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: ())
    code, _, err = edgezo("doctor", "--calibrate")
    assert code == 1 and "no GPU to measure" in err and "nvidia-smi" in err
