"""Trials of presets: a tiny model with every choice of a preset, beside a reference that holds explicit weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny_models
import torch
from torch import Tensor
from workshop import LABEL_IDS, make_examples

from edgezo.data.batches import collate, micro_batches
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import ModelFiles, build_meta, open_model
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig
from edgezo.plan.request import make_config
from edgezo.run.echo import echo_of_step
from edgezo.run.finetuner import Finetuner
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import recipe_of
from edgezo.weights.store import WeightStore
from edgezo.zo.axes import DIRECTIONS
from edgezo.zo.credit import Estimator
from edgezo.zo.noise import Key, exact_grid
from edgezo.zo.presets import PRESETS
from edgezo.zo.recipe import Recipe

SEED, SIGMA, STEPS = 11, 0.01, 3


# What a preset does not keep to the letter, and why (the rest is exact).
UPDATED_ALONG_ANOTHER = ("quzo", "qu-grzo")  # an independent rounding of what was probed


def stores(name: str) -> tuple[str, ...]:
    precisions = ("fp32", "bf16", "int8")
    return precisions if "full" in PRESETS[name].train else (*precisions, "int4")


ON_STORES = [(name, store) for name in PRESETS for store in stores(name)]


presets = pytest.mark.parametrize("name", PRESETS)


on_stores = pytest.mark.parametrize(("name", "precision"), ON_STORES)


def make_finetuner(files: ModelFiles, path: Path, drawn: float = 0.1, **about: str) -> str:
    """A finetuner with drawn networks for a model's parameters, each of its own mind."""
    names = [name for name, _ in build_meta(files).named_parameters()]
    finetuner = Finetuner.plain(names, seed=5)
    generator = torch.Generator().manual_seed(6)
    finetuner.weights[2].copy_(torch.randn(finetuner.weights[2].shape, generator=generator) * drawn)
    finetuner.save(path, about)
    return str(path)


@dataclass
class Trial:
    """A preset, a model to try it on, and a group of examples."""

    cfg: RunConfig
    model: Model
    twin: reference.Twin
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.examples = make_examples("label", False)
        self.estimator = Estimator.of(self.cfg)
        self.pull = 0.0
        self.carried: np.ndarray | None = None
        self.records: dict[int, StepRecord] = {}
        self.used = [self.twin.rows_used(example) for example in self.examples]

    def losses(self, step: int, size: int = 4) -> np.ndarray:
        """The losses (S, B) of a step, computed in micro-batches of ``size``."""
        self.scales = finetuner_scales(self.cfg, self.model.store, step)
        self.echo = self._echo(step)
        self.model.store.echo = tuple(self.echo.tolist())
        sides = len(self.model.evaluations)
        losses = np.empty((sides, len(self.examples)), np.float32)
        at_anchor = np.empty_like(losses)
        for slots in micro_batches(self.examples, size):
            batch = collate([self.examples[s] for s in slots], slots)
            probe = self.model.probe(batch, Key(SEED, step), self.cfg.sigma)
            losses[:, slots] = self.model.losses(batch, probe, sides=sides)[0].numpy()
            if compared(self.cfg, step):
                with self.model.store.at_anchor():
                    at_anchor[:, slots] = self.model.losses(batch, probe, sides=sides)[0].numpy()
        return np.concatenate([losses, at_anchor]) if compared(self.cfg, step) else losses

    def _echo(self, step: int) -> np.ndarray:
        """What directions take up of the steps before; made up where this trial did not make them."""
        entry = DIRECTIONS[self.cfg.directions]
        if step and step - 1 not in self.records and entry.echoes:
            drawn = exact_grid(np.random.default_rng(step).standard_normal(self.cfg.carries) / 2)
            return drawn if entry.per_example else np.where(np.arange(len(drawn)) <= step, drawn, 0)
        return echo_of_step(self.cfg, self.model.store, step, self.records.__getitem__)

    def record(self, step: int, losses: np.ndarray) -> StepRecord:
        credit = self.estimator.recorded(losses, self.cfg.sigma, step, self.carried)
        self.carried = credit[len(credit) - self.cfg.carried :]
        if self.cfg.is_anchor(step):
            self.pull = float(credit.mean())
        credit = with_pull(self.cfg, step, credit, self.pull)
        touched = self.model.take_touched(len(self.examples))
        if len(touched) > 1:
            touched += (np.empty(0, np.int64),) * self.cfg.carried
        credit = np.append(credit, self.echo).astype(np.float32)
        skipped = not credit[: len(credit) - self.cfg.carries].any()
        record = StepRecord(
            step, self.cfg.sigma, self.cfg.step, skipped, losses, credit, touched, self.scales
        )
        self.records[step] = record
        return record

    def recipe(self, step: int, losses: np.ndarray) -> Recipe:
        guides = self.model.store.take_guides()
        return recipe_of(self.cfg, self.record(step, losses))._replace(guides=guides)

    def run(self, steps: int = STEPS) -> list[Recipe]:
        recipes = []
        for step in range(steps):
            recipes.append(self.recipe(step, self.losses(step)))
            self.model.store.apply(recipes[-1:])
        return recipes

    def values(self) -> dict[str, Tensor]:
        trainables = self.model.store.trainables.items()
        return {
            name: trainable.layout.read(slice(0, trainable.target.rows)).double()
            for name, trainable in trainables
        }

    def directions(self, step: int, name: str) -> list[Tensor]:
        """D_i of each direction, zero where it does not move the tensor: in rows of an embedding that were not used."""
        store, key = self.model.store, Key(SEED, step)
        trainable = store.trainables[name]
        weights = reference.seen_values(trainable)
        number = self.model.candidates or len(self.examples)
        directions = []
        for slot in range(number):
            d = reference.masked(store, trainable, key, slot, weights)
            used_rows = [used[name] for used in self.used if name in used]
            if used_rows:
                moved = torch.zeros(trainable.target.rows, 1, dtype=torch.float64)
                moved[torch.cat(used_rows) if self.model.candidates else used_rows[slot]] = 1
                d = d * moved
            directions.append(d)
        return directions


def compared(cfg: RunConfig, step: int) -> bool:
    """Whether the losses of a step are computed at SVRG's anchor as well."""
    return cfg.anchored and not cfg.is_anchor(step)


def with_pull(cfg: RunConfig, step: int, credit: np.ndarray, pull: float) -> np.ndarray:
    """The credit that a journal record holds: with SVRG that of the anchor's step comes last."""
    if not cfg.anchored:
        return credit
    return np.append(credit, 0.0 if cfg.is_anchor(step) else pull).astype(np.float32)


def finetuner_scales(cfg: RunConfig, store: WeightStore, step: int) -> np.ndarray | None:
    """Give the store scales as a finetuner would, others for every tensor and step; returns what a record holds."""
    if cfg.mask != "block":
        return None
    names = sorted(store.trainables)
    sigma = np.random.default_rng(step).uniform(0.6, 1.4, len(names)).astype(np.float32)
    sizes = np.array([math.prod(store.trainables[n].layout.shape) for n in names])
    nu = np.float32(np.sqrt(sizes.sum() / (sizes * sigma**2).sum()))
    store.scales = dict(zip(names, (nu * sigma).tolist(), strict=True))
    return np.concatenate(([nu], sigma)).astype(np.float32)


class Maker:
    def __init__(self, folder: Path):
        self.path = tiny_models.make("llama", folder)

    def model(self, cfg: RunConfig, dtype: torch.dtype = torch.float32) -> Model:
        spec = ModelSpec(
            precision=cfg.precision or "fp32",
            train=cfg.train,
            directions=cfg.directions,
            seed=SEED,
            rank=cfg.rank,
            rounding=cfg.rounding or "plane",
            label_ids=LABEL_IDS,
            dtype=dtype,
            mask=cfg.mask,
            rule=cfg.rule,
            keep=cfg.keep,
            sigma=cfg.sigma,
            refresh=cfg.refresh,
            evaluations=Estimator.of(cfg).evaluations,
            anchored=cfg.anchored,
            decay_to=cfg.weight_decay_to,
        )
        return assemble(open_model(self.path), spec)

    def config(self, name: str, precision: str = "fp32", **changes: Any) -> RunConfig:
        request = {"model": "m", "task": "t", "estimator": name, "precision": precision}
        request |= {"finetuner": "f"} if PRESETS[name].mask == "block" else {}
        train = tuple(part for part in PRESETS[name].train if part != "head")
        return make_config({**request, "sigma": SIGMA, "train": train, **changes})

    def trial(self, name: str, precision: str = "fp32", **changes: Any) -> Trial:
        if DIRECTIONS[PRESETS[name].directions].echoes:  # records have numbers for each example
            changes = {"batch_size": 4, **changes}
        if PRESETS[name].rule == "vote":  # four examples agree too seldom for its usual share
            changes = {"step": 0.7, **changes}
        cfg = self.config(name, precision, **changes)
        module = tiny_models.random_model("llama", attn_implementation="eager")
        return Trial(
            cfg, self.model(cfg), reference.Twin(module, kind="label", label_ids=LABEL_IDS)
        )


def settle(trial: Trial) -> None:
    """Move factors, gains and curvatures away from where they start."""
    generator = torch.Generator().manual_seed(3)
    for name, trainable in trial.model.store.trainables.items():
        every = slice(0, trainable.target.rows)
        step = torch.randn(trainable.layout.shape, generator=generator) * (
            0.1 if "#" in name else 1e-3
        )
        values = trainable.layout.read(every) + step
        trainable.layout.write(
            every, trainable.layout.snap(values, Key(0, 0), trainable.target.id, every)
        )
        for state in trial.model.store.mask.states:
            values_of_state = trainable.state[state]
            values_of_state.copy_(torch.rand(values_of_state.shape, generator=generator) + 0.5)


def probed_of_quantized(store: Any, trainable: Any, key: Key, slot: int, weights: Tensor) -> Tensor:
    """D_i with U rounded as the probe rounds it."""
    every = slice(0, trainable.target.rows)
    u = store.directions.dense_rows(key, trainable.target, every)
    rounded = store.mask.shape(u, key, trainable, every, lambda: weights.float(), probing=True)
    d = reference.direction(store.directions.name, key, trainable.target, slot)
    return d / u.double() * rounded.double()


class Killed(BaseException):
    """Raised where a process is killed. No code of edgezo catches it."""
