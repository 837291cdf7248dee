"""Training on int8 codes: rounding to their grid, re-quantising them, and QuZO's two roundings on that grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from preset_trials import SIGMA, Killed, Maker
from small_plans import MACHINE
from torch import Tensor
from workshop import LABEL_IDS, make_examples

from edgezo.data.batches import collate
from edgezo.machine import limits
from edgezo.machine.limits import MOST_CODE
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import open_model
from edgezo.network.model import Model
from edgezo.plan.planner import make_plan
from edgezo.plan.request import make_config
from edgezo.run.journal import Journal
from edgezo.run.train import finetune
from edgezo.weights import requantise
from edgezo.weights.layouts import Int8
from edgezo.weights.saved import saved_sha256, saved_tensors
from edgezo.zo.noise import Key, exact_grid
from edgezo.zo.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 11


def random_int8(rows: int, cols: int, seed: int = 0) -> Int8:
    return Int8.quantise(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)))


# ----------------------------------------------------------------------------- rounding to the codes' grid


def test_rounding_goes_to_a_neighbour_and_has_no_bias() -> None:
    layout = random_int8(8, 4096)
    inside = layout.codes.abs() < MOST_CODE - 1
    values = layout.read(slice(0, 8)) + 0.3 * layout.scale
    total, tries = torch.zeros(8, 4096), 300
    for step in range(tries):
        rounded = layout.snap(values, Key(0, step), 5, slice(0, 8))
        steps = (rounded - values) / layout.scale
        assert bool((steps[inside].abs() < 1).all())
        total += steps
    mean = total[inside] / tries
    deviation = math.sqrt(0.3 * 0.7)
    assert abs(float(mean.mean())) < 5 * deviation / math.sqrt(tries * int(inside.sum()))
    assert float(mean.abs().max()) < 6 * deviation / math.sqrt(tries)


def test_values_on_the_grid_stay_there_and_are_read_back() -> None:
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-5
    codes = torch.arange(-MOST_CODE, MOST_CODE + 1).to(torch.int8).expand(64, -1).contiguous()
    layout, every = Int8(codes.clone(), scale), slice(0, 64)
    for step in range(40):
        rounded = layout.snap(layout.read(every), Key(0, step), 5, every)
        assert torch.equal(rounded, layout.read(every))
    layout.write(every, rounded)
    assert torch.equal(layout.codes, codes)


def test_a_value_past_the_range_stops_at_its_end_and_a_row_of_zeros_stays_finite() -> None:
    layout = Int8.quantise(torch.stack([torch.linspace(-1, 1, 255), torch.zeros(255)]))
    values = layout.read(slice(0, 2)) * 1.5 + torch.tensor([[0.0], [1e35]])
    rounded = layout.snap(values, Key(0, 0), 5, slice(0, 2))
    assert torch.isfinite(rounded).all()
    layout.write(slice(0, 2), rounded)
    assert layout.codes.abs().max() == MOST_CODE and (layout.codes[1] == MOST_CODE).all()


# ----------------------------------------------------------------------------- a plane below the codes


def test_a_plane_keeps_what_rounding_the_base_takes_and_leaves_the_codes_alone() -> None:
    values = torch.randn(9, 500, generator=torch.Generator().manual_seed(3))
    fine, coarse = Int8.quantise(values, plane=True), Int8.quantise(values)
    assert torch.equal(fine.codes, coarse.codes) and torch.equal(fine.scale, coarse.scale)
    every = slice(0, 9)
    seen = (layout.expand(every, torch.empty(9, 500)) for layout in (fine, coarse))
    assert torch.equal(*seen)  # what a forward reads
    # Half a fine step, and another half where the outermost of 256 is left out.
    assert bool(((fine.read(every) - values).abs() <= fine.scale / 256).all())
    assert fine.nbytes() == coarse.nbytes() + 9 * 500


def test_values_of_a_plane_are_read_back_and_its_codes_are_the_nearest() -> None:
    layout, every = Int8.quantise(_drawn(7, 300, 0), plane=True), slice(0, 7)
    for step in range(1, 30):
        values = layout.read(every) + 0.4 * layout.scale * _drawn(7, 300, step)
        values[step % 7] *= 1.3  # past the range: the row's scale grows
        rounded = layout.snap(values.clone(), Key(0, step), 5, every)
        assert bool(((rounded - values).abs() <= layout.scale / 256).all())
        layout.write(every, rounded)
        assert torch.equal(layout.read(every), rounded)
        assert torch.equal(layout.codes.float(), (rounded / layout.scale).round())
        assert layout.codes.abs().max() <= MOST_CODE


def _drawn(rows: int, cols: int, seed: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "directions"), [("llama", "signs"), ("gpt2", "rademacher")])
def test_codes_with_a_plane_stay_as_near_to_fp32_as_rounding_it_once(
    family: str, directions: str, tmp_path: Path
) -> None:
    pair = Pair(tiny_models.make(family, tmp_path), "label", directions, rounding="plane")
    for _ in range(40):
        pair.step(1e-3)
    once = pair.distance(pair.quantised())
    read = {}
    for name, trainable in pair.codes.store.trainables.items():
        read[name] = trainable.layout.expand(
            slice(0, trainable.target.rows), torch.empty(trainable.layout.shape)
        )
    assert (
        pair.distance() < 0.03 * once
    )  # with what is below the codes; 40 roundings to 1/256 of a step
    # What a forward sees.
    assert pair.distance(read) < 1.05 * once
    again = pair.again()
    again.store.replay(40)
    assert saved_sha256(saved_tensors(again.store)) == saved_sha256(saved_tensors(pair.codes.store))


# ----------------------------------------------------------------------------- re-quantising


def test_re_quantising_takes_a_bounded_number_of_sweeps_a_step() -> None:
    places, sweeps = [], 0
    for step in range(1, 5000):
        if requantise.requantise_due(step):
            places.append(step)
            sweeps += step
        assert requantise.last_requantised(step) == (places[-1] if places else 0)
        assert sweeps + step <= 6 * step + requantise.FIRST_STEPS
    gaps = np.diff([0, *places])
    assert all(g <= max(requantise.FIRST_STEPS, p / 4) for g, p in zip(gaps, places, strict=True))


def test_runs_of_recipes_end_where_re_quantising_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requantise, "FIRST_STEPS", 3)
    recipes = [Recipe(step, np.zeros(1, np.float32), 0.0) for step in range(1, 8)]
    runs = [[r.step for r in some] for some in requantise.split_where_due(recipes)]
    assert runs == [[1, 2], [3, 4, 5], [6, 7]]
    assert list(requantise.split_where_due([])) == []


DIRECTION_CASES = [
    *(("llama", "label", d, None) for d in ("signs", "gaussian", "shared", "lowrank-strict")),
    ("llama", "completion", "signs", None),
    ("llama", "label", "signs", False),  # an untied head: only the label words' rows move
    ("gpt2", "label", "rademacher", None),  # matrices that are stored the other way round
    ("gemma2", "completion", "subspace", None),
]


class Pair:
    """One journal on two stores: int8 codes and fp32 weights of the same model."""

    def __init__(self, path: Path, kind: str, directions: str, rounding: str = "anchored"):
        self.path, self.kind, self.directions = path, kind, directions
        self.rounding = rounding
        self.codes, self.exact = self.model("int8"), self.model("fp32")
        examples = make_examples(kind, False)
        self.batch = collate(examples, range(4))
        self.recipes: list[Recipe] = []
        self.codes.store.history = self.past

    def model(self, precision: str) -> Model:
        spec = ModelSpec(
            precision,
            ("full",),
            self.directions,
            SEED,
            rank=3,
            refresh=4,
            rounding=self.rounding,
            kind=self.kind,
            label_ids=LABEL_IDS if self.kind == "label" else (),
        )
        return assemble(open_model(self.path), spec)

    def past(self, first: int, stop: int) -> Iterable[Recipe]:
        return [r for r in self.recipes if first <= r.step < stop]

    def again(self) -> Model:
        """The model as loaded, with this journal as its history."""
        model = self.model("int8")
        model.store.history = self.past
        return model

    def step(self, size: float = 3e-3) -> None:
        """One step of both stores, with random coefficients for the directions of the examples."""
        number = len(self.recipes)
        model = self.codes
        model.losses(self.batch, model.probe(self.batch, Key(SEED, number), SIGMA), sides=2)
        c = np.random.default_rng(number).standard_normal(4) * size
        skipped = number % 5 == 3
        self.recipes.append(
            Recipe(
                number, exact_grid(c * (not skipped)), 0.001 * (number % 2), model.take_touched(4)
            )
        )
        for store in (self.codes.store, self.exact.store):
            store.apply(self.recipes[-1:])

    def distance(self, tensors: dict[str, Tensor] | None = None) -> float:
        """|codes - fp32| over all matrices; with ``tensors`` in place of the codes where they are given."""
        total = 0.0
        for name, trainable in self.exact.store.trainables.items():
            every = slice(0, trainable.target.rows)
            exact, layout = trainable.layout.read(every), self.codes.store.trainables[name].layout
            values = layout.read(every) if tensors is None else tensors[name]
            total += float((values - exact).double().square().sum())
        return math.sqrt(total)

    def quantised(self) -> dict[str, Tensor]:
        """The fp32 weights rounded once: the best that codes can be."""
        rounded = {}
        for name, trainable in self.exact.store.trainables.items():
            every = slice(0, trainable.target.rows)
            values = trainable.layout.read(every)
            int8 = isinstance(self.codes.store.trainables[name].layout, Int8)
            rounded[name] = Int8.quantise(values).read(every) if int8 else values
        return rounded


@pytest.mark.parametrize(("family", "kind", "directions", "tied"), DIRECTION_CASES)
def test_re_quantised_codes_are_those_of_fp32_weights_bit_for_bit(
    family: str,
    kind: str,
    directions: str,
    tied: bool | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requantise, "FIRST_STEPS", 3)
    pair = Pair(tiny_models.make(family, tmp_path, tied=tied), kind, directions)
    for steps in range(1, 8):
        pair.step()
        same = all(
            torch.equal(
                trainable.layout.read(slice(0, trainable.target.rows)), pair.quantised()[name]
            )
            for name, trainable in pair.codes.store.trainables.items()
        )
        assert same == requantise.requantise_due(steps), steps
    walked = saved_sha256(saved_tensors(pair.codes.store))
    # A resume between two of them: from the base, in other tiles, with the same bits.
    for tile_bytes in (limits.TILE_BYTES, 3000):
        monkeypatch.setattr(limits, "TILE_BYTES", tile_bytes)
        for replay in (lambda m: m.store.replay(7), lambda m: m.store.apply(pair.recipes)):
            model = pair.again()
            replay(model)
            assert saved_sha256(saved_tensors(model.store)) == walked
    pair.codes.store.finish(7)
    assert pair.distance() == pair.distance(pair.quantised())


def test_rounding_adds_up_unless_codes_are_re_quantised(tmp_path: Path) -> None:
    path = tiny_models.make("llama", tmp_path)
    ratios = {}
    for rounding in ("stochastic", "anchored"):
        pair = Pair(path, "label", "signs", rounding)
        for _ in range(70):
            pair.step(2e-3)
        pair.codes.store.finish(70)
        ratios[rounding] = pair.distance() / pair.distance(pair.quantised())
    assert ratios["anchored"] == 1.0
    assert ratios["stochastic"] > 3


def test_with_error_feedback_codes_never_leave_fp32_weights_by_a_grid_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requantise, "FIRST_STEPS", 16)
    pair = Pair(tiny_models.make("llama", tmp_path), "label", "signs", "feedback")
    for step in range(1, 41):
        pair.step(2e-3)
        for name, trainable in pair.codes.store.trainables.items():
            layout, every = trainable.layout, slice(0, trainable.target.rows)
            if not isinstance(layout, Int8):
                continue
            exact = pair.exact.store.trainables[name].layout.read(every)
            away = (layout.expand(every, torch.empty(layout.shape)) - exact).abs() / layout.scale
            assert away.max() < 1, (step, name)  # what the forward reads
            if requantise.requantise_due(step):
                best = Int8.quantise(exact, plane=True)
                assert torch.equal(layout.codes, best.codes), name
                assert torch.equal(layout.low, best.low), name
                assert (layout.read(every) - exact).abs().max() < layout.scale.max() / 250
    again = pair.again()
    again.store.replay(40)
    assert saved_sha256(saved_tensors(again.store)) == saved_sha256(saved_tensors(pair.codes.store))


def test_a_step_moves_codes_by_the_fp32_update_on_average(tmp_path: Path) -> None:
    pair = Pair(tiny_models.make("llama", tmp_path), "label", "signs", "stochastic")
    name, trainable = next(
        (n, r) for n, r in pair.codes.store.trainables.items() if "down_proj" in n
    )
    layout, every = trainable.layout, slice(0, trainable.target.rows)
    assert isinstance(layout, Int8)
    start, shift = layout.codes.clone(), layout.scale * 0.2
    total, tries = torch.zeros(layout.shape), 400
    for step in range(tries):
        layout.write(every, layout.snap(layout.read(every) + shift, Key(3, step), 1, every))
        total += (layout.codes - start).float()
        layout.codes.copy_(start)
    inside = start < MOST_CODE
    assert abs(float((total / tries)[inside].mean()) - 0.2) < 0.01, name


# ----------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("rounding", ["anchored", "stochastic", "feedback"])
@pytest.mark.parametrize("killed_after", [2, 3])
def test_a_run_that_was_cut_goes_on_and_replays_with_the_same_bits(
    rounding: str,
    killed_after: int,
    bench: Any,
    edgezo_json: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        requantise, "FIRST_STEPS", 3
    )  # a kill before it is due, and just when it is
    request = {"train": "full", "precision": "int8", "rounding": rounding, "steps": 5}
    whole = finetune(make_config(bench.settings(out=str(tmp_path / "whole"), **request)))
    split = make_config(bench.settings(out=str(tmp_path / "split"), **request, micro_batch=4))
    assert abs(finetune(split)["loss_last"] - whole["loss_last"]) < 0.05
    run, plain = tmp_path / "run", Journal.append

    def cut(journal: Journal, record: Any) -> None:
        plain(journal, record)
        if record.step == killed_after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", cut)
        with pytest.raises(Killed):
            finetune(make_config(bench.settings(out=str(run), **request)))
    code, part = edgezo_json("eval", "--model", run)
    assert code == 0 and part["steps"] == killed_after + 1
    code, resumed = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0, resumed
    for name in ("trained_sha256", "loss_last", "eval_after"):
        assert resumed[name] == whole[name], name
    code, again = edgezo_json("finetune", "--resume", "--out", run)
    assert code == 0 and again["trained_sha256"] == whole["trained_sha256"]
    code, replayed = edgezo_json("replay", run, "--out", tmp_path / "copy")
    assert code == 0 and replayed["trained_sha256"] == whole["trained_sha256"]
    for place in (run, tmp_path / "copy"):
        code, evaluated = edgezo_json("eval", "--model", place)
        assert code == 0 and evaluated["loss"] == whole["eval_after"]["loss"]


def test_a_plan_counts_what_re_quantising_reads_and_never_goes_to_disk(maker: Maker) -> None:
    shape = open_model(maker.path).shape
    plans = {
        rounding: make_plan(
            shape,
            maker.config("grzo", "int8", train="full", rounding=rounding),
            MACHINE,
            base_bytes=0,
        )
        for rounding in (None, "stochastic")
    }
    assert plans[None].rounding == "anchored"
    update = {r: next(i for i in p.items if i.phase == "update") for r, p in plans.items()}
    assert update[None].bytes > update["stochastic"].bytes
    assert "base" in update[None].reason and plans[None].residency == "resident"
    momentum = maker.config("lozo-m", "int8")
    plan = make_plan(shape, momentum, MACHINE, base_bytes=0)
    assert plan.rounding == "stochastic"
    assert any("momentum" in d.reason for d in plan.decisions if d.name == "rounding")


# ----------------------------------------------------------------------------- QuZO


@pytest.mark.parametrize("name", ["quzo", "qu-grzo"])
def test_every_weight_that_is_probed_is_a_code_times_its_scale(name: str, maker: Maker) -> None:
    store = maker.trial(name, "int8").model.store
    for trainable in store.trainables.values():
        layout, every = trainable.layout, slice(0, trainable.target.rows)
        if not isinstance(layout, Int8):
            continue
        steps = torch.zeros(layout.shape)
        for probing in (True, False):
            u = store.directions.dense_rows(Key(SEED, 1), trainable.target, every)
            shaped = store.mask.shape(
                u, Key(SEED, 1), trainable, every, lambda stored=layout: stored.read(slice(0, stored.shape[0])),
                probing=probing,
            )  # fmt: skip
            moved = SIGMA * shaped / layout.scale
            assert (moved - moved.round()).abs().max() < 1e-4
            for sign in (1, -1):
                assert (layout.codes + sign * moved.round()).abs().max() <= MOST_CODE
            steps = moved.round() - steps
        assert steps.abs().max() > 0  # the second rounding is another one
    assert make_config({"model": "m", "task": "t", "estimator": name, "precision": "int8"})


def test_both_roundings_on_the_grid_are_unbiased_and_independent(maker: Maker) -> None:
    store = maker.trial("quzo", "int8").model.store
    trainable = next(r for r in store.trainables.values() if isinstance(r.layout, Int8))
    layout, every, tries = trainable.layout, slice(0, trainable.target.rows), 300
    assert isinstance(layout, Int8)
    u = store.directions.dense_rows(Key(SEED, 1), trainable.target, every)
    width = layout.scale / SIGMA
    errors, crossed = torch.zeros(2, *layout.shape), 0.0
    inside = layout.codes.abs() + (u / width).abs() + 1 < MOST_CODE
    for step in range(tries):
        pair = [
            (
                store.mask.shape(
                    u, Key(SEED, step), trainable, every, lambda: layout.read(every), probing=p
                )
                - u
            )
            / width
            for p in (True, False)
        ]
        assert all(bool((e[inside].abs() < 1 + 1e-4).all()) for e in pair)
        crossed += float((pair[0] * pair[1])[inside].mean()) / tries
        errors += torch.stack(pair) / tries
    assert errors[:, inside].abs().max() < 6 * 0.5 / math.sqrt(tries)
    assert abs(crossed) < 0.02
