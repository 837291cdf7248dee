"""``edgezo bench alignment``: how near one step's estimate points to the true gradient, in what is trained.

    measured   cosine of sum_i c_i D_i (before the rule) to the mean gradient of one batch, over many seeds
    theory     |g| B/sqrt(sum_i |g_i|^2 d_i) for a direction per example, sqrt(2/pi)/sqrt(d) for one for the batch,
               sqrt(N/d) for N candidates; g_i the gradient of example i, d_i the coordinates that it moves. Where a
               step leaves blocks alone: of the others, times their share of |g|
    signal     how far what a probe does to the loss, 2 sigma g_i.D_i, stands above what the forward's arithmetic and
               the loss's curvature add to it: the ratio of the two standard deviations

The true gradient is autograd's, through transformers' own module in fp32 with the store's weights, so it needs the
memory of a backward pass. It is taken where training starts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgezo.bench.accuracy_baselines import loss_of
from edgezo.bench.memory import UNLIMITED_BYTES, write_results
from edgezo.data.batches import Example, batch_indices, collate
from edgezo.data.dataset import Dataset
from edgezo.errors import UsageError
from edgezo.machine.hardware import machine
from edgezo.network import loader
from edgezo.network.model import Model
from edgezo.plan.request import RunConfig, make_config
from edgezo.run.finetuner import Tuner, load_finetuner
from edgezo.run.session import Opened, load_model, open_request, settle
from edgezo.weights.store import WeightStore
from edgezo.weights.trainable import Trainable
from edgezo.zo.credit import Estimator
from edgezo.zo.masks import block_of
from edgezo.zo.noise import Key
from edgezo.zo.presets import DIRECTIONS, EXACT, PRESETS
from edgezo.zo.recipe import Recipe

Gradient = dict[str, Tensor]  # of every trained tensor, (rows, cols) fp32


def bench_alignment(
    request: Mapping[str, Any],
    *,
    estimators: Sequence[str] = tuple(PRESETS),
    batch_sizes: Sequence[int] = (16,),
    tries: int = 20,
    out: Path,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every estimator (``name`` or ``name:directions``) at every batch size; writes alignment.json and .png.

    ``request``: fields of a configuration that all have in common. Raises UsageError with every problem found.
    """
    chosen = [point_config(request, name) for name in estimators]
    if any(n < 1 for n in (*batch_sizes, tries)):
        raise UsageError("--batch-sizes and --tries are 1 or more")
    if exact := [name for name, cfg in zip(estimators, chosen, strict=True) if cfg.backward]:
        raise UsageError(f"{exact[0]} takes the gradient itself, which estimates are compared with")
    rows = []
    for name, cfg in zip(estimators, chosen, strict=True):
        for size in batch_sizes:
            rows.append({"estimator": name, **measure(replace(cfg, batch_size=size), tries)})
            note(line(rows[-1]))
    result = {"model": request.get("model"), "rows": rows}
    write_results(result, out / "alignment", chart, note)
    return result


def point_config(request: Mapping[str, Any], name: str) -> RunConfig:
    estimator, _, directions = name.partition(":")
    row = PRESETS.get(estimator)
    said = {**request, "estimator": estimator, "directions": directions or None}
    if row is not None and row.mask != "block":
        said["finetuner"] = None  # for the rows that ask one
    said |= {"max_mem_bytes": UNLIMITED_BYTES, "residency": "resident", "device": "cpu"}
    if said.get("train") is None and row is not None:  # the head has its exact gradient already
        said["train"] = "+".join(part for part in row.train if part not in EXACT)
    return make_config(said)


def line(row: Mapping[str, Any]) -> str:
    theory = row["cosine_theory"]
    expected = "" if theory is None else f", in theory {theory * math.sqrt(row['coordinates']):.2f}"
    measured = row["cosine_mean"] * math.sqrt(row["coordinates"])
    return f"{row['estimator']}, B = {row['batch_size']}: cosine x sqrt(d) {measured:.2f}{expected}"


def measure(cfg: RunConfig, tries: int) -> dict[str, Any]:
    """One row of the table."""
    opened = open_request(cfg)
    settle(opened, machine(), 0)
    model = load_model(opened, machine())
    cfg = opened.cfg
    assert cfg.batch_size is not None
    scales = None
    if cfg.finetuner is not None:
        finetuner = load_finetuner(Path(cfg.finetuner))
        nu_and_sigma = Tuner.of(finetuner, model.store, opened.dataset).tell(None)
        scales = nu_and_sigma[0] * nu_and_sigma[1:]
    train = opened.dataset.train
    group = [train[i] for i in batch_indices(len(train), cfg.batch_size, cfg.seed, 0)]
    small = "full" not in cfg.train  # enough to keep every example's gradient
    own, mean = example_gradients(opened, model, group, keep=small)
    squares = [g["square"] for g in own]
    length = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
    cosines, blocks, told, noise, theories = [], [], [], [], []
    places = 0.0
    for step in range(tries):
        recipe, losses = _step(model, cfg, group, step)
        recipe = recipe._replace(scales=scales)
        found = _dots(model.store, recipe, mean)
        seen = math.sqrt(sum(part[2] for part in found.values()))
        moved = _places(model.store, recipe)
        places = max(places, moved)
        theories.append(_theory(cfg, length, seen, squares, moved))
        cosines.append(_cosine(found.values(), length))
        blocks.append({b: _cosine([v], math.sqrt(v[2])) for b, v in found.items() if v[2]})
        if small and len(model.evaluations) == 2 and model.store.mask.name != "quantized":
            signal = _predicted(model.store, recipe, own, cfg)
            told.append(signal)
            noise.append(losses[0] - losses[1] - signal)
    names = sorted({b for found in blocks for b in found})
    return {
        "directions": cfg.directions,
        "mask": cfg.mask,
        "credit": cfg.credit,
        "train": "+".join(cfg.train),
        "precision": cfg.precision,
        "compute_dtype": str(model.context.dtype).removeprefix("torch."),
        "batch_size": cfg.batch_size,
        "sigma": cfg.sigma,
        "tries": tries,
        "coordinates": places,
        "cosine_mean": float(np.mean(cosines)),
        "cosine_error": float(np.std(cosines) / math.sqrt(tries)),
        "cosine_theory": _mean(theories),
        "signal_to_noise": float(np.std(told) / np.std(noise)) if told else None,
        "blocks": {str(b): float(np.mean([f[b] for f in blocks if b in f])) for b in names},
    }


def _step(
    model: Model, cfg: RunConfig, group: list[Example], step: int
) -> tuple[Recipe, np.ndarray]:
    """The recipe of a step's estimate, of a size that does not matter, and its losses."""
    estimator = Estimator.of(cfg)
    batch = collate(group, range(len(group)))
    probe = model.probe(batch, Key(cfg.seed, step), cfg.sigma)
    losses = model.losses(batch, probe, sides=len(model.evaluations))[0].numpy()
    touched = model.take_touched(len(group))
    c = estimator.coefficients(estimator.credit(losses), 1.0, cfg.sigma)
    guides = model.store.take_guides()
    return Recipe(step, c, 0.0, touched, guides=guides), losses.astype(np.float64)


def _dots(store: WeightStore, recipe: Recipe, mean: Gradient) -> dict[int, np.ndarray]:
    """By block (-1: outside of all): estimate.g, |estimate|^2, |g|^2."""
    found: dict[int, np.ndarray] = {}
    for row, part, g in store.estimate(recipe):
        true = mean[row.target.name][part].double()
        sums = found.setdefault(_block(row), np.zeros(3))
        sums += [float((g * true).sum()), float(g.double().square().sum()), 0.0]
    for row in store.trainables.values():
        if (b := _block(row)) in found:
            found[b][2] += float(mean[row.target.name].double().square().sum())
    return found


def _block(row: Trainable) -> int:
    block = block_of(row.target.name)
    return -1 if block is None else block


def _cosine(sums: Any, length: float) -> float:
    dot, square, _ = np.sum(list(sums), axis=0)
    return float(dot / (math.sqrt(square) * length)) if square and length else 0.0


def _places(store: WeightStore, recipe: Recipe) -> float:
    """Coordinates that an example moves in the recipe's step, on average."""
    total = 0.0
    for row in store.trainables.values():
        if not store.scale(row, recipe):
            continue
        rows = float(row.target.rows if row.fixed_rows is None else len(row.fixed_rows))
        if row.touched_offset is not None:
            rows = float(np.mean([len(ids) for ids in store.own_rows(row, recipe)]))
        total += rows * row.target.cols
    return total


def _theory(
    cfg: RunConfig, length: float, seen: float, squares: list[float], places: float
) -> float | None:
    """Expected cosine of a step that moves ``places`` coordinates, in which the gradient is ``seen`` long."""
    drawn = cfg.mask not in ("sparse", "hessian", "hessian-block", "block")
    if not drawn or DIRECTIONS[cfg.directions].guided or not length:
        return None  # what is left is not drawn at random, or not as long everywhere
    share = seen / length
    if cfg.credit in ("mean", "clipped", "svrg"):  # of svrg an anchor's step is measured
        return share * math.sqrt(2 / math.pi / places)
    if cfg.credit == "candidates":
        return share * math.sqrt(cfg.candidates / places)
    if cfg.credit in ("group", "raw") and cfg.mask != "layers":
        # One example's credit is its sign under group credit.
        lone = math.sqrt(2 / math.pi) if len(squares) == 1 else 1.0
        return lone * length * len(squares) / math.sqrt(sum(squares) * places)
    return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _predicted(
    store: WeightStore, recipe: Recipe, own: list[dict[str, Any]], cfg: RunConfig
) -> np.ndarray:
    """2 sigma g_i.D_i of every example, (B,) float64."""
    found = np.zeros(len(own))
    for slot in range(len(own)):
        one = np.zeros(len(own), np.float32)
        one[slot] = 1.0
        for row, part, d in store.estimate(recipe._replace(coefficients=one)):
            found[slot] += float((d * own[slot]["gradient"][row.target.name][part]).sum())
    return 2 * cfg.sigma * found


# ---------------------------------------------------------------------------------------------
# The true gradient


def example_gradients(
    opened: Opened, model: Model, group: Sequence[Example], *, keep: bool
) -> tuple[list[dict[str, Any]], Gradient]:
    """For each example its ``square`` |g_i|^2 (and ``gradient``, if kept), and the mean gradient."""
    module = plain_module(opened, model)
    own: list[dict[str, Any]] = []
    mean: Gradient = {}
    for example in group:
        module.zero_grad()
        example_loss(module, example, opened.dataset).backward()
        g = in_trained(module, model.store)
        for name, values in g.items():
            mean[name] = mean[name] + values / len(group) if name in mean else values / len(group)
        square = sum(float(v.double().square().sum()) for v in g.values())
        own.append({"square": square} | ({"gradient": g} if keep else {}))
    return own, mean


def plain_module(opened: Opened, model: Model) -> Any:
    """transformers' own module in fp32 with the weights that the store holds now."""
    files = replace(opened.files, config=copy.deepcopy(opened.files.config))
    module: Any = loader.build_meta(files)
    module.set_attn_implementation("eager")
    store = model.store
    for name, parameter in list(module.named_parameters()):
        owner_name, _, own = name.rpartition(".")
        owner: nn.Module = module.get_submodule(owner_name)
        if name in store.layouts:
            layout = store.layouts[name]
            values = layout.expand(slice(0, layout.shape[0]), torch.empty(layout.shape))
            values = values.T.contiguous() if isinstance(owner, Conv1D) else values
        elif name in store.trainables:
            values = store.trainables[name].values[:, 0].clone()
        else:
            values = store.vectors[name].float()
        assert values.shape == parameter.shape, name
        owner._parameters[own] = nn.Parameter(values.clone())
    module.tie_weights()
    return module


def in_trained(module: Any, store: WeightStore) -> Gradient:
    """The module's gradients in the coordinates of what the store trains."""
    return {name: gradient_of(module, store, name).clone() for name in store.trainables}


def gradient_of(module: Any, store: WeightStore, name: str) -> Tensor:
    """The module's gradient of one trained tensor, (rows, cols); a view where it can be."""
    weight, _, kind = name.partition("#")
    owner = module.get_submodule(weight.rpartition(".")[0])
    parameter = module.get_parameter(weight)
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    values = parameter.detach()
    if isinstance(owner, Conv1D) and gradient.dim() == 2:
        gradient, values = gradient.T, values.T
    if kind == "lowrank":
        gradient = gradient @ store.basis(weight, gradient.shape[1]).T
    elif kind == "gain":
        gradient = (gradient * values).sum(1)
    found: Tensor = gradient.reshape(store.trainables[name].target.rows, -1)
    return found


def example_loss(module: Any, example: Example, dataset: Dataset) -> Tensor:
    """As objective.Scorer has it, through the plain module."""
    logits = [
        module(input_ids=torch.tensor(row.ids)[None]).logits[0][list(row.score_at)].float()
        for row in example.rows
    ]
    return loss_of(logits, example, dataset)[0]


def chart(result: Mapping[str, Any], file: Path) -> None:
    """Cosine x sqrt(d) of each row beside its theory. PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, panel = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)))
    for at, row in enumerate(rows):
        scale = math.sqrt(row["coordinates"])
        panel.barh(at, row["cosine_mean"] * scale, xerr=row["cosine_error"] * scale, color="C0")
        if row["cosine_theory"] is not None:
            panel.plot([row["cosine_theory"] * scale] * 2, [at - 0.4, at + 0.4], color="black")
    panel.set_yticks(
        range(len(rows)), [f"{r['estimator']}, B = {r['batch_size']}, {r['train']}" for r in rows]
    )
    panel.invert_yaxis()
    panel.set_xlabel("cosine to the true gradient x sqrt(d); the line is theory")
    figure.suptitle(f"{result['model']}: alignment")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
