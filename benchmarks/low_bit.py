"""How far do int8 codes drift from fp32 weights when all weights are trained? One journal is applied to both.

    python benchmarks/low_bit.py --model MODEL [--steps 300] [--methods grzo quzo qzo] [--every 50]
    python benchmarks/low_bit.py --run RUN [--own DIR]   # with the journal of an fp32 run of --train full

The steps are those of a run, or made up, as no forward is needed: credits from N(0,1) (times --delta where a credit is
in units of the loss), linear decay, 40 tokens an example, drawn with a probability of 1/rank. Distances are Frobenius
norms over all matrices that are stored in int8, relative to the fp32 weights of the same step. ``quantised`` is the
distance after rounding those weights once, ``ratio`` the distance of a store over that. Two stores with one journal
differ by storage alone. With --own, the request of the run is also trained again on int8 codes, whose losses then
differ, and the ends are compared.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgezo.machine.limits import tiles
from edgezo.network import cards
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import ModelFiles, open_model
from edgezo.plan.config import RunConfig
from edgezo.plan.request import make_config
from edgezo.run.directory import RunFiles
from edgezo.run.journal import open_journal
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import recipe_of
from edgezo.run.train import finetune
from edgezo.weights.layouts import Int8
from edgezo.weights.store import WeightStore
from edgezo.zo.credit import schedule
from edgezo.zo.recipe import Recipe

LABELS = (28, 253)  # tokens of made-up label words
TOKENS = 40  # of a made-up example


class Journal(NamedTuple):
    """A run's steps, and what a store needs to follow them."""

    cfg: RunConfig
    recipes: list[Recipe]
    kind: str
    label_ids: tuple[int, ...]


def made_up(cfg: RunConfig, batch_size: int, vocab: int, steps: int, delta: float) -> Journal:
    """A journal of random credits and tokens."""
    rng = np.random.default_rng(cfg.seed)
    scale = 1.0 if cfg.credit == "group" else delta
    recipes = []
    for step in range(steps):
        credit = (scale * rng.standard_normal(batch_size)).astype(np.float32)
        drawn = np.exp(rng.uniform(0, math.log(vocab), (batch_size, TOKENS))).astype(np.int64)
        touched = tuple(np.union1d(ids, LABELS) for ids in drawn - 1)
        size = cfg.step * schedule(cfg.schedule, step / steps)
        losses = np.zeros((2, batch_size), np.float32)
        record = StepRecord(step, cfg.sigma, size, False, losses, credit, touched)
        recipes.append(recipe_of(cfg, record))
    return Journal(cfg, recipes, "label", LABELS)


def of_run(run: RunFiles) -> Journal:
    """The journal of a run."""
    cfg = run.read_config()
    with open_journal(run.journal, resume=False) as journal:
        recipes = [recipe_of(cfg, record) for record in journal.records()]
        data = journal.header["dataset"]
    return Journal(cfg, recipes, data["kind"], tuple(data["label_ids"]))


def store_of(
    files: ModelFiles, journal: Journal, precision: str, mask: str, rounding: str
) -> WeightStore:
    """The weights of the base in a store that follows the journal."""
    cfg, recipes = journal.cfg, journal.recipes
    spec = ModelSpec(
        precision,
        cfg.train,
        cfg.directions,
        cfg.seed,
        rank=cfg.rank,
        rounding=rounding,
        kind=journal.kind,
        label_ids=journal.label_ids,
        mask=mask,
        keep=cfg.keep,
        sigma=cfg.sigma,
        refresh=cfg.refresh,
    )
    store = assemble(files, spec).store
    store.history = lambda first, stop: recipes[first:stop]
    return store


def rows_of(store: WeightStore, name: str, part: slice) -> Tensor:
    """Rows ``part`` of the weights that a forward uses, gains included, (n, cols) fp32."""
    layout = store.layouts[name]
    values = layout.expand(part, torch.empty(part.stop - part.start, layout.shape[1]))
    gain = store.trainables.get(f"{name}#gain")
    return values if gain is None else values * (1 + gain.values[part])


def distances(exact: WeightStore, stores: Iterable[WeightStore]) -> list[float]:
    """Distances to the fp32 weights, over their norm: of those weights rounded once, then of each store."""
    stores = list(stores)
    squares, norm = np.zeros(1 + len(stores)), 0.0
    for name, layout in stores[0].layouts.items():
        assert isinstance(layout, Int8)
        for part in tiles(*layout.shape):
            true = rows_of(exact, name, part)
            norm += float(true.double().square().sum())
            once = Int8.quantise(true).read(slice(0, len(true)))
            compared = [once, *(rows_of(store, name, part) for store in stores)]
            squares += [float((values - true).double().square().sum()) for values in compared]
    return [math.sqrt(s / norm) for s in squares]


def moved(exact: WeightStore, base: WeightStore) -> float:
    """Distance of the fp32 weights to the base, over their norm."""
    square = norm = 0.0
    for name, layout in base.layouts.items():
        for part in tiles(*layout.shape):
            start, now = rows_of(base, name, part), rows_of(exact, name, part)
            square += float((now - start).double().square().sum())
            norm += float(now.double().square().sum())
    return math.sqrt(square / norm)


def by_storage(files: ModelFiles, journal: Journal, every: int) -> None:
    """Apply one journal to every store, and print the distances on the way."""
    cfg, steps = journal.cfg, len(journal.recipes)
    exact = store_of(files, journal, "fp32", "none", "stochastic")
    kinds = {"stochastic": "stochastic"}
    if cfg.mask == "none" and cfg.parts.weights:
        kinds |= {"plane": "plane", "anchored": "anchored"}
    if cfg.parts.gains and not cfg.parts.weights:
        kinds = {"gains on codes": "stochastic"}
    stores = {k: store_of(files, journal, "int8", cfg.mask, r) for k, r in kinds.items()}
    spent = dict.fromkeys(["fp32", *stores], 0.0)
    print(
        f"{cfg.estimator}: {cfg.directions}, mask {cfg.mask}, sigma {cfg.sigma:g}, step {cfg.step:g}, {steps} steps"
    )
    print(f"{'step':>6}{'quantised':>11}" + "".join(f"{k:>16}{'ratio':>8}" for k in stores))

    def line(label: str) -> None:
        once, *rest = distances(exact, stores.values())
        cells = "".join(f"{d:16.6f}{d / once:8.3f}" for d in rest)
        print(f"{label:>6}{once:11.6f}{cells}", flush=True)

    for start in range(0, steps, every):
        some = journal.recipes[start : start + every]
        for name, store in {"fp32": exact, **stores}.items():
            begun_s = time.monotonic()
            store.apply(some)
            spent[name] += time.monotonic() - begun_s
        line(str(start + len(some)))
    for name, store in stores.items():
        begun_s = time.monotonic()
        store.finish(steps)
        spent[name] += time.monotonic() - begun_s
    line("end")
    base = store_of(files, journal, "fp32", "none", "stochastic")
    print(f"fp32 weights have moved by {moved(exact, base):.4f} of their norm")
    print(
        "  ".join(f"{name} {s / steps:.3f} s a step" for name, s in spent.items())
        + ", updates and re-quantising only\n"
    )


def by_training(run: RunFiles, files: ModelFiles, journal: Journal, out: Path) -> None:
    """Train the run's request again on codes, and print the distances of the ends: here the losses differ too."""
    cfg = journal.cfg
    exact = store_of(files, journal, "fp32", "none", "stochastic")
    exact.apply(journal.recipes)
    print(f"trained again, {len(journal.recipes)} steps: distance of the end to the fp32 run's")
    for rounding in ("stochastic", "plane", "anchored"):
        place = out / rounding
        request = {**cfg.to_dict(), "precision": "int8", "rounding": rounding, "out": str(place)}
        if not (place / "summary.json").exists():
            finetune(make_config({}, request))  # in a lower layer, settings may be unused
        again = of_run(RunFiles(place))
        store = store_of(files, again, "int8", cfg.mask, rounding)
        store.replay(len(again.recipes))
        store.finish(len(again.recipes))
        once, distance = distances(exact, [store])
        print(f"{rounding:>12}{distance:11.6f}  ratio {distance / once:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a card, directory or .gguf file")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--own", dest="again", type=Path, help="where to train again")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["grzo", "quzo", "qzo"])
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--step", type=float)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.run is not None:
        run = RunFiles(args.run)
        journal = of_run(run)
        files = open_model(cards.resolve(journal.cfg.model))
        by_storage(files, journal, args.every)
        if args.again is not None:
            by_training(run, files, journal, args.again)
        return
    files = open_model(cards.resolve(args.model))
    for name in args.methods:
        settings = {"estimator": name, "batch_size": args.batch_size, "step": args.step}
        train = "scales" if name.startswith("qzo") else "full"
        cfg = make_config(
            settings, {"model": args.model, "task": "sst2", "train": train, "precision": "fp32"}
        )
        cfg = replace(cfg, steps=args.steps)
        by_storage(
            files,
            made_up(cfg, args.batch_size, files.shape.vocab, args.steps, args.delta),
            args.every,
        )


if __name__ == "__main__":
    main()
