"""The plan: itemised, honest about the cap, monotone, and computed without weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import FAST, MACHINE, MB, SMOL, SST2, item, plan, request

from edgezo.data.batches import Example
from edgezo.data.dataset import Dataset
from edgezo.data.token_stats import TokenStats
from edgezo.data.trees import Row
from edgezo.errors import DoesNotFit
from edgezo.machine import limits
from edgezo.network.cards import cards
from edgezo.plan import calibration, planner
from edgezo.plan.budget import default_budget, mb
from edgezo.plan.choices import PRECISIONS_TRIED
from edgezo.plan.config import Batched
from edgezo.plan.footprint import Footprint
from edgezo.plan.footprint_stored import ITEMS_OF_PART
from edgezo.plan.plan import PlanDoesNotFit
from edgezo.plan.planner import make_plan
from edgezo.plan.reasons import TENSORS_OF_PART
from edgezo.plan.shapes import MatrixShape, ModelShape, Shape
from edgezo.zo.parts import PARTS


def test_thin_products_are_not_compiled_where_there_are_c_kernels():
    without = SimpleNamespace(**{**vars(FAST), "c_kernels": False})

    def compiled(machine: object, **asked: object) -> int:
        planned = plan(machine=machine, max_mem_bytes=1500 * MB, precision="bf16", **asked)
        return next(item.bytes for item in planned.items if item.name == "compiled products")

    for train in ("lowrank", "full"):
        assert compiled(FAST, train=train) < compiled(without, train=train)
    wide = {"train": "lowrank", "rank": 80}  # more than the kernels take
    assert compiled(FAST, **wide) == compiled(without, **wide)


def test_every_matrix_of_a_card_is_counted_once():
    for card in cards().values():
        shape = ModelShape.of(card, card.name)
        matrices = sum(m.numel for m in (*shape.matrices, *shape.tables))
        assert matrices + shape.vector_elements == card.parameters
        assert 0 < shape.vector_elements < card.parameters / 100


def test_the_peak_is_the_permanent_items_and_the_largest_phase():
    planned = plan(max_mem_bytes=2000 * MB)
    phases = ("always", calibration.COMPUTE, *calibration.PHASES, calibration.RESERVE)
    sums = {phase: 0 for phase in phases}
    for i in planned.items:
        assert i.bytes >= 0 and i.reason
        sums[i.phase] += i.bytes
    computing = sums["compute"] + max(sums["forward"], sums["update"], sums["fit"])
    before = max(sums["read"], sums["load"])
    assert planned.planned_peak_bytes == sums["always"] + max(before, computing)
    assert planned.load_peak_bytes == sums["always"] + sums["load"]
    assert planned.phase_bytes("forward") - planned.phase_bytes("always") == sums["forward"]
    assert planned.needed_bytes == planned.planned_peak_bytes + sums["reserve"]
    assert sums["reserve"] == item(planned, "guard margin") == limits.GUARD_MARGIN_BYTES


def test_a_cap_has_room_for_the_reserves_as_well_as_for_the_peak():
    asked = {"precision": "int8", "micro_batch": 4, "residency": "resident"}
    needed = plan(**asked, max_mem_bytes=2000 * MB).needed_bytes
    assert plan(**asked, max_mem_bytes=needed).smallest_bytes == needed
    with pytest.raises(PlanDoesNotFit) as caught:
        plan(**asked, max_mem_bytes=needed - 1)
    assert caught.value.smallest_bytes == needed


def test_a_block_that_is_damaged_on_disk_has_room_to_be_made_again():
    """It is no part of the peak: that a disk damages a block is rare."""
    wide = cards()["smollm2-1.7b-instruct"]
    asked = {"precision": "int8", "train": "norms", "micro_batch": 1, "residency": "disk"}
    cfg = request(**asked, max_mem_bytes=2000 * MB)
    short = TokenStats("label", (8,), 1, 2, evaluated=8, evaluations=2)
    largest = 2048 * 8192  # weights of a matrix; its codes, and a tile that is being quantised
    for source_bytes in (2, 4):
        planned = make_plan(wide, cfg, FAST, short, source_bytes=source_bytes)
        repaired = planned.phase_bytes("always") + (source_bytes + 1) * largest + limits.TILE_BYTES
        room = planned.needed_bytes - item(planned, "guard margin")
        assert planned.planned_peak_bytes < repaired <= room < repaired + 10 * MB
    resident = plan(precision="int8", max_mem_bytes=2000 * MB)
    assert "repair" not in {i.name for i in resident.items}


def test_a_matrix_is_staged_as_its_checkpoint_has_it():
    cfg = request(precision="int4", max_mem_bytes=9000 * MB)
    shape = cards()["smollm2-1.7b-instruct"]
    staged = [
        item(make_plan(shape, cfg, MACHINE, SST2, source_bytes=n), "load staging") for n in (4, 2)
    ]
    assert staged[1] < staged[0] <= 2 * staged[1]


def test_later_steps_take_more_up_to_a_bound():
    sizes = [
        item(plan(steps=n, max_mem_bytes=2000 * MB), "later steps") for n in (1, 5, 26, 10_000)
    ]
    assert sizes[0] == 0 < sizes[1] < sizes[2] == sizes[3] == calibration.LATER_BYTES
    timed = plan(steps=None, for_s=60.0, max_mem_bytes=2000 * MB)
    assert item(timed, "later steps") < calibration.LATER_BYTES + 1


def test_a_masked_table_takes_noise_for_its_rows_in_use():
    masked = {"estimator": "sparse-mezo", "precision": "bf16", "max_mem_bytes": 9000 * MB}
    text = replace(SST2, kind="text", label_words=0)
    assert item(plan(SST2, **masked), "noise") < item(plan(text, **masked), "noise")


def test_a_peak_of_reading_is_no_higher_than_the_plan():
    cfg = request(max_mem_bytes=4000 * MB)
    known = {"base_bytes": 400 * MB}
    usual = make_plan(cards()[SMOL], cfg, MACHINE, SST2, **known, read_peak_bytes=430 * MB)
    assert (
        usual.planned_peak_bytes
        == make_plan(cards()[SMOL], cfg, MACHINE, SST2, **known).planned_peak_bytes
    )
    large = make_plan(cards()[SMOL], cfg, MACHINE, SST2, **known, read_peak_bytes=1500 * MB)
    assert large.planned_peak_bytes == 1500 * MB
    assert item(large, "reading") == large.planned_peak_bytes - sum(
        i.bytes for i in large.items if i.phase == "always"
    )
    with pytest.raises(PlanDoesNotFit):
        tight = replace(cfg, max_mem_bytes=1500 * MB)
        make_plan(cards()[SMOL], tight, MACHINE, SST2, **known, read_peak_bytes=1500 * MB)


def test_an_evaluation_takes_no_more_than_its_rows_do():
    """Memory is not planned for batches that the rows to evaluate on cannot fill."""
    rows = {
        "kind": "completion",
        "tokens": (40,) * 64,
        "scored": 8,
        "label_words": 0,
        "evaluated": 40,
    }
    written = {"written": 8, "prompt": 32, "evaluated_prompt": 32}
    few = TokenStats(**rows, **written, evaluations=4)
    many = replace(few, evaluations=4000)
    asked = {"max_mem_bytes": 4000 * MB, "batch_size": 2}
    a_token = 2 * 31 * 192 * 4  # keys and values of all blocks, and those of one that are copied
    assert item(plan(few, **asked), "keys and values") == 4 * 40 * a_token
    most = calibration.MOST_KEPT_TOKENS
    assert item(plan(many, **asked), "keys and values") == most * a_token
    assert item(plan(few, **asked), "activations") < item(plan(many, **asked), "activations")
    assert few.evaluated_at_once(512) == 160 and many.evaluated_at_once(512) == 512
    assert replace(few, evaluations=1, evaluated=900).evaluated_at_once(512) == 900


def test_scores_of_a_vocabulary_are_planned_by_chunks_and_positions():
    def logits(positions: int, precision: str) -> int:
        shape, cfg = ModelShape.of(cards()[SMOL], SMOL), Batched.of(request(), batch_size=1)
        tokens = TokenStats("completion", (positions,), positions, 0)
        footprint = Footprint(shape, cfg, tokens, bf16_fast=False, c_kernels=True, base_bytes=None)
        return footprint._logits(positions, precision)[0]

    chunk = limits.LOGITS_BYTES
    # Rows expanded to fp32, their logits as they are computed and in fp32 (tests/network/test_exact_head.py).
    assert 2.99 * chunk < logits(4000, "bf16") <= 3 * chunk
    assert 1.99 * chunk < logits(4000, "fp32") <= 2 * chunk, "fp32 rows are read as they are"
    assert chunk < logits(16, "bf16") < 1.1 * chunk, "few positions have few logits"


def test_updates_that_make_what_stays_leave_holes():
    """Codes made anew and guides lie between the tiles of an update (benchmarks/plan-error.json)."""
    text = replace(SST2, kind="text", label_words=0)

    def holes(**asked: object) -> int:
        planned = plan(text, max_mem_bytes=4000 * MB, train="full", **asked)
        return sum(i.bytes for i in planned.items if (i.name, i.phase) == ("holes", "update"))

    tiles = calibration.CODES_UPDATE_TILES * limits.TILE_BYTES
    assert holes(precision="int8") == int(calibration.UPDATE_HOLES * tiles)
    assert holes(precision="bf16", estimator="ag-grzo") > 0
    assert holes(precision="bf16") == 0


def test_the_exact_heads_own_step_is_counted():
    text = replace(SST2, kind="text", label_words=0)
    planned = plan(text, rank=32, max_mem_bytes=4000 * MB)
    assert item(planned, "head update") == 2 * 4 * 32 * 49_152
    assert item(plan(rank=32, max_mem_bytes=4000 * MB), "head update") == 0  # label words only


def test_the_largest_matrices_are_quantised_before_the_others_are_read():
    def staged(layers: int) -> int:
        shape = replace(cards()["qwen2.5-1.5b"], layers=layers)
        planned = make_plan(
            shape, request(precision="int8", max_mem_bytes=9000 * MB), MACHINE, SST2
        )
        return item(planned, "load staging")

    down = 8960 * 1536
    others = (
        2 * 1536 * 1536 + 2 * 256 * 1536 + 4 * (2 * 1536 + 2 * 256)
    )  # int8 codes of one block's q, k, v and o
    assert staged(1) == 4 * down + limits.TILE_BYTES - others
    assert staged(28) < 4 * 1536 * 1536 + limits.TILE_BYTES


def test_fused_matrices_are_counted_as_the_model_has_them():
    shape = ModelShape.of(cards()["phi-3-mini"], "phi")
    assert {(m.d_out, m.d_in) for m in shape.kinds} == {
        (9216, 3072),
        (3072, 3072),
        (16384, 3072),
        (3072, 8192),
    }
    assert sum(m.numel for m in shape.modules) == sum(m.numel for m in shape.block)


def test_weights_take_what_their_store_takes():
    n = 106_168_320  # weights in the linears of SmolLM2-135M
    table, rows = 49_152 * 576, 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
    cap = 4000 * MB
    assert item(plan(precision="fp32", max_mem_bytes=cap), "linear weights") == 4 * n
    assert item(plan(precision="bf16", max_mem_bytes=cap), "linear weights") == 2 * n
    assert item(plan(precision="int8", max_mem_bytes=cap), "linear weights") == n + 4 * rows
    assert item(plan(precision="int4", max_mem_bytes=cap), "embedding") == table + 4 * 49_152
    # rows fall into groups of 32, each with an fp32 scale and shift
    groups = n // 32
    assert item(plan(precision="int4", max_mem_bytes=cap), "linear weights") == n // 2 + 8 * groups


def test_stored_bytes_are_those_of_the_layouts():
    import torch

    from edgezo.weights.layouts import place

    for rows, cols in ((6, 576), (7, 128), (10, 50)):
        weight = torch.randn(rows, cols)
        for precision in ("fp32", "bf16", "fp16", "int8", "int4"):
            layout = place(weight, precision, table=False, rounding=None, trained=False)
            assert layout.nbytes() == MatrixShape("w", rows, cols).stored_bytes(precision)


def test_full_weights_with_the_low_plane_take_one_more_byte_each():
    stochastic = plan(train="full", rounding="stochastic", max_mem_bytes=4000 * MB)
    plane = plan(train="full", max_mem_bytes=4000 * MB)
    assert (plane.precision, plane.rounding, stochastic.rounding) == ("bf16", "plane", "stochastic")
    more = item(plane, "linear weights") - item(stochastic, "linear weights")
    assert more == 106_168_320


def test_weights_in_the_compute_dtype_are_read_as_they_are():
    names = {i.name for i in plan(machine=FAST, precision="bf16", max_mem_bytes=4000 * MB).items}
    assert "expanded weights" not in names
    assert item(plan(precision="bf16", max_mem_bytes=4000 * MB), "expanded weights") > 0


def test_longer_and_more_examples_take_more_activations():
    sizes = [
        item(plan(TokenStats("label", (n,), 1, 2), max_mem_bytes=90_000 * MB), "activations")
        for n in (10, 20, 80, 160)
    ]
    assert sizes[0] < sizes[1] < 2.6 * sizes[0], "in proportion, but for what the heap keeps"
    assert sizes[1] < sizes[2] == sizes[3] <= limits.REUSED_BYTES, "a batch runs in pieces"


def test_pieces_of_a_micro_batch_are_the_same_wherever_the_weights_are():
    long = TokenStats("label", (300,), 1, 2)
    planned = plan(long, max_mem_bytes=4000 * MB)
    assert planned.most_tokens is not None and planned.most_tokens < 16 * 300
    assert not planned.maps and "a piece of 16 examples" in str(planned.items)
    away = plan(long, max_mem_bytes=4000 * MB, residency="disk")
    assert away.most_tokens == planned.most_tokens, "so that losses have the same bits"
    one = plan(TokenStats("label", (2000,), 1, 2), max_mem_bytes=4000 * MB)
    assert one.maps, "an example is not split"


def test_lengths_of_the_data_bound_the_longest_micro_batch():
    assert SST2.longest(2) == 139
    assert SST2.longest(100) == sum(SST2.tokens) + 36 * 70
    row = Row((1, 2, 3), (2,), (4,))
    data = Dataset("choice", (Example((row, row), 0),), (), (), (), ())
    kept_bytes = data.token_stats().stored_bytes
    assert 16 < kept_bytes < 500
    expected = TokenStats("choice", (3,), 1, 0, 3.0, examples=1, stored_bytes=kept_bytes)
    assert data.token_stats() == expected


@pytest.mark.parametrize("cap", [650, 1000, 2000, 6000, 40_000])
def test_the_largest_card_fits_and_no_larger_one_does(cap):
    cfg = request(max_mem_bytes=cap * MB, max_length=128)
    causal = [card for card in cards().values() if card.kind == "causal"]
    planned = planner.largest_card(causal, cfg, MACHINE)
    assert planned is not None and planned.needed_bytes <= cap * MB
    own = next(card for card in causal if card.name == planned.model)
    for card in causal:
        if card.parameters > own.parameters:
            with pytest.raises(PlanDoesNotFit):
                make_plan(card, replace(cfg, model=card.name, residency="resident"), MACHINE)
    assert planner.largest_card(causal, request(max_mem_bytes=MB), MACHINE) is None


def test_the_time_of_a_step_follows_batch_tokens_and_speed():
    cap = 9000 * MB
    one = plan(TokenStats("label", (64,), 1, 2, 20.0), max_mem_bytes=cap)
    # 2 operations x 106,168,320 weights x 20 tokens x 16 examples x 2 sides at 60 % of 150 GFLOP/s
    assert one.step_s == pytest.approx(2 * 106_168_320 * 20 * 32 / 0.6e11)
    assert plan(TokenStats("label", (64,), 1, 2, 40.0), max_mem_bytes=cap).step_s == 2 * one.step_s
    twice = SimpleNamespace(**{**vars(MACHINE), "flops_s": 3e11})
    assert (
        plan(TokenStats("label", (64,), 1, 2, 20.0), twice, max_mem_bytes=cap).step_s
        == one.step_s / 2
    )


def test_without_data_rows_of_max_length_are_assumed_and_said():
    planned = plan(None, max_length=256, max_mem_bytes=4000 * MB)
    reason = next(i.reason for i in planned.items if i.name == "activations")
    assert "--max-length" in reason and f"{2 * 256 * 16:,}" in reason


def test_a_refusal_names_the_number_the_items_and_a_budget_that_works():
    with pytest.raises(PlanDoesNotFit) as caught:
        plan(precision="bf16", residency="resident", max_mem_bytes=640 * MB)
    error = caught.value
    assert isinstance(error, DoesNotFit) and error.exit_code == 3
    text = str(error)
    assert "640MB" in text and "linear weights" in text and "--precision int4 would need" in text
    smallest = mb(error.smallest_bytes)
    assert f"--max-mem {smallest}" in text
    fits = plan(precision="bf16", residency="resident", max_mem_bytes=smallest)
    assert f"--precision bf16 --micro-batch {fits.micro_batch}" in text
    assert fits.smallest_flags in text
    with pytest.raises(PlanDoesNotFit):
        plan(precision="bf16", residency="resident", max_mem_bytes=error.smallest_bytes - 1)


def test_a_refusal_offers_no_residency_that_the_request_cannot_have():
    """The state of a rule stays in memory, so weights on disk are no way out."""
    with pytest.raises(PlanDoesNotFit) as caught:
        plan(train="full", rule="momentum", residency="resident", max_mem_bytes=500 * MB)
    assert "--residency disk" not in str(caught.value) and "--train lowrank" in str(caught.value)


def test_every_part_that_can_be_trained_has_its_items_and_its_place_in_the_lists():
    assert set(ITEMS_OF_PART) == set(PARTS)
    in_the_model = {name for name, part in PARTS.items() if part.weights or part.vectors}
    assert set(TENSORS_OF_PART) == set(PARTS) - in_the_model


def test_a_cap_below_the_process_says_so():
    with pytest.raises(PlanDoesNotFit, match="The process alone takes 405MB"):
        plan(max_mem_bytes=100 * MB)


def test_a_measured_process_replaces_the_constant():
    cfg = request(max_mem_bytes=900 * MB)
    planned = make_plan(cards()[SMOL], cfg, MACHINE, SST2, base_bytes=371 * MB)
    assert item(planned, "base process") == 371 * MB


@given(
    low=st.integers(100, 4000),
    more=st.integers(0, 4000),
    train=st.sampled_from(["lowrank+head", "full", "norms", "scales+head"]),
    length=st.integers(8, 2048),
)
@settings(deadline=None, max_examples=80)
def test_more_memory_never_gives_less(low, more, train, length):
    """Precision first, then micro-batch; a plan stays under its cap and above the smallest."""
    tokens = TokenStats("completion", (length,), length, 0)

    def rank(cap: int) -> tuple[int, int]:
        try:
            planned = plan(tokens, train=train, max_mem_bytes=cap * MB)
        except PlanDoesNotFit as error:
            assert error.smallest_bytes > cap * MB
            return (-1, 0)
        assert planned.smallest_bytes <= planned.needed_bytes <= cap * MB
        assert planned.planned_peak_bytes <= planned.needed_bytes
        assert planned.micro_batch <= planned.batch_size
        precision = len(PRECISIONS_TRIED) - PRECISIONS_TRIED.index(planned.precision)
        return (precision, planned.residency == "resident", planned.micro_batch)

    assert rank(low) <= rank(low + more)


@given(heads=st.integers(1, 8), kv=st.integers(1, 8), layers=st.integers(1, 4), tied=st.booleans())
@settings(deadline=None)
def test_any_shape_can_be_planned(heads, kv, layers, tied):
    shape = Shape(
        layers=layers,
        hidden=32,
        intermediate=48,
        heads=heads,
        kv_heads=kv,
        head_dim=8,
        vocab=101,
        max_positions=64,
        tied=tied,
    )
    planned = make_plan(shape, request(max_mem_bytes=8000 * MB), MACHINE, SST2)
    assert planned.precision == "bf16" and planned.micro_batch == planned.batch_size


def test_every_decision_has_a_reason_and_settles_the_request():
    planned = plan(max_mem_bytes=650 * MB)
    assert all(d.reason for d in planned.decisions)
    settled = planned.settle(request(max_mem_bytes=650 * MB))
    assert settled.precision == planned.precision == "int8"
    assert settled.batch_size == 16 and settled.micro_batch == planned.micro_batch
    again = make_plan(cards()[SMOL], settled, MACHINE, SST2)
    assert again.items == planned.items
    assert planned.to_dict()["planned_peak_bytes"] == planned.planned_peak_bytes


def test_what_was_asked_for_is_not_overruled():
    planned = plan(precision="int4", batch_size=6, micro_batch=5, max_mem_bytes=4000 * MB)
    assert (planned.precision, planned.batch_size, planned.micro_batch) == ("int4", 6, 5)


def test_a_parameter_is_trained_or_frozen_and_listed():
    default = plan(max_mem_bytes=2000 * MB)
    assert any("low-rank" in name for name in default.trained)
    assert any("embedding" in name for name in default.frozen)
    full = plan(train="full", max_mem_bytes=2000 * MB)
    assert full.frozen == () and any("embedding" in name for name in full.trained)
    norms = plan(train="norms", max_mem_bytes=2000 * MB)
    assert norms.trained == ("norms and biases (35,136 values)",)


@given(total=st.integers(1, 10**13), share=st.floats(0, 1))
def test_the_default_budget_leaves_room_and_is_never_more_than_there_is(total, share):
    free = int(total * share)
    budget, reason = default_budget(SimpleNamespace(total_bytes=total, available_bytes=free))
    assert free // 2 <= budget <= free * 0.8 + 1
    assert "--max-mem not given" in reason
