"""``edgezo bench alignment``: how closely one step's estimate points along the true gradient of what is trained.

    measured   cosine of sum_i c_i D_i (before the rule) to the mean gradient of one batch, over many seeds
    theory     |g| B/sqrt(sum_i |g_i|^2 d_i) with a direction for each example, sqrt(2/pi)/sqrt(d) with one for the
               batch, sqrt(N/d) with N candidates; g_i is the gradient of example i, d_i the coordinates that it moves.
               Where a step leaves out blocks: that of the other blocks, times their share of |g|
    signal     by how much a probe changes the loss to first order, 2 sigma g_i.D_i, over what rounding in the forward
               and the curvature of the loss add to that: the ratio of the two standard deviations

The true gradient is autograd's, through transformers' own module in fp32 with the weights of the store, so it needs the
memory of a backward pass. It is taken at the weights where training starts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgezo.bench.accuracy_baselines import loss_of
from edgezo.bench.memory import UNLIMITED_BYTES, claim_results, write_results
from edgezo.data.batches import Example, batch_indices, collate
from edgezo.data.dataset import Dataset
from edgezo.errors import UsageError
from edgezo.machine.hardware import machine
from edgezo.network import loader
from edgezo.network.model import Model
from edgezo.plan.config import RunConfig, Settled
from edgezo.plan.request import make_config
from edgezo.run.finetuner import Tuner, load_finetuner
from edgezo.run.session import Opened, load_model, open_request, settle
from edgezo.weights.store import WeightStore
from edgezo.weights.tile import rows_by_direction
from edgezo.weights.trainable import Trainable
from edgezo.zo.axes import DIRECTIONS
from edgezo.zo.credit import Estimator
from edgezo.zo.masks import block_of
from edgezo.zo.noise import Key
from edgezo.zo.parts import without_exact
from edgezo.zo.presets import PRESETS, steps_by
from edgezo.zo.recipe import Recipe

Gradient = dict[str, Tensor]  # by trained tensor, (rows, cols) fp32


@dataclass(frozen=True)
class TrueGradient:
    """Gradients of a group of examples, by autograd."""

    squares: list[float]  # |g_i|^2 of each example
    mean: Gradient
    each: list[Gradient]  # g_i of each example; empty where they take too much memory

    @cached_property
    def length(self) -> float:
        """|g| of the mean gradient."""
        return math.sqrt(sum(float(g.square().sum()) for g in self.mean.values()))


class Comparison(NamedTuple):
    """One step's estimate beside the true gradient."""

    cosine: float
    blocks: dict[int, float]  # the cosine within each block
    theory: float | None  # the cosine that theory expects
    coordinates: float  # that an example moves, on average
    signal: (
        np.ndarray | None
    )  # (B,) change of each example's loss to first order; None where g_i are not kept
    noise: np.ndarray | None  # (B,) measured change less ``signal``


def bench_alignment(
    request: Mapping[str, Any],
    *,
    estimators: Sequence[str] = tuple(PRESETS),
    batch_sizes: Sequence[int] = (16,),
    tries: int = 20,
    out: Path,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every estimator (``name`` or ``name:directions``) at every batch size.

    ``request``: settings that all of them share; ``tries``: steps with directions of their own, for each row.
    Writes alignment.json and alignment.png to ``out``. Raises UsageError with every problem.
    """
    chosen = [point_config(request, name) for name in estimators]
    if any(n < 1 for n in (*batch_sizes, tries)):
        raise UsageError("--batch-sizes and --tries must be 1 or more")
    if exact := [name for name, cfg in zip(estimators, chosen, strict=True) if cfg.backward]:
        raise UsageError(
            f"{exact[0]} trains with the true gradient, which bench alignment compares estimates with; "
            "leave it out of --estimators"
        )
    claim_results(out)
    rows = []
    for name, cfg in zip(estimators, chosen, strict=True):
        for size in batch_sizes:
            rows.append({"estimator": name, **measure(replace(cfg, batch_size=size), tries)})
            note(line(rows[-1]))
    result = {"model": request.get("model"), "rows": rows}
    write_results(result, out / "alignment", chart, note)
    return result


def point_config(request: Mapping[str, Any], name: str) -> RunConfig:
    """The configuration of an estimator, ``name`` or ``name:directions``, on a CPU and without a cap.

    Unless the request says what to train, the preset's perturbed parts are trained, since the others have their exact
    gradient already. Raises UsageError.
    """
    estimator, _, directions = name.partition(":")
    preset = PRESETS.get(steps_by(estimator))
    settings = {**request, "estimator": estimator, "directions": directions or None}
    if preset is not None and preset.mask != "block":
        settings["finetuner"] = None  # only estimators with this mask take one
    settings |= {"max_mem_bytes": UNLIMITED_BYTES, "residency": "resident", "device": "cpu"}
    if settings.get("train") is None and preset is not None:
        settings["train"] = "+".join(without_exact(preset.train))
    return make_config(settings)


def line(row: Mapping[str, Any]) -> str:
    """A row of alignment.json as one line of text."""
    theory = row["cosine_theory"]
    expected = "" if theory is None else f", in theory {theory * math.sqrt(row['coordinates']):.2f}"
    measured = row["cosine_mean"] * math.sqrt(row["coordinates"])
    return f"{row['estimator']}, B = {row['batch_size']}: cosine x sqrt(d) {measured:.2f}{expected}"


def measure(cfg: RunConfig, tries: int) -> dict[str, Any]:
    """Measure one estimator at one batch size: a row of alignment.json."""
    opened = open_request(cfg)
    planned = settle(opened, machine(), 0)
    model, settled = load_model(planned, machine()).model, planned.cfg
    scales = None
    if settled.finetuner is not None:
        finetuner = load_finetuner(Path(settled.finetuner))
        nu_and_sigma = Tuner.of(finetuner, model.store, opened.dataset).scale_step(None)
        scales = nu_and_sigma[0] * nu_and_sigma[1:]
    train = opened.dataset.train
    group = [train[i] for i in batch_indices(len(train), settled.batch_size, settled.seed, 0)]
    # Where whole weights are trained, there is no room for the gradient of every example.
    truth = true_gradient(opened, model, group, keep_each=not settled.parts.weights)
    compared = [_compare(model, settled, group, truth, step, scales) for step in range(tries)]
    cosines = [c.cosine for c in compared]
    signals = [c.signal for c in compared if c.signal is not None]
    noises = [c.noise for c in compared if c.noise is not None]
    names = sorted({b for c in compared for b in c.blocks})
    return {
        "directions": settled.directions,
        "mask": settled.mask,
        "credit": settled.credit,
        "train": "+".join(settled.train),
        "precision": settled.precision,
        "compute_dtype": str(model.context.dtype).removeprefix("torch."),
        "batch_size": settled.batch_size,
        "sigma": settled.sigma,
        "tries": tries,
        "coordinates": max(c.coordinates for c in compared),
        "cosine_mean": float(np.mean(cosines)),
        "cosine_error": float(np.std(cosines) / math.sqrt(tries)),
        "cosine_theory": _mean([c.theory for c in compared]),
        "signal_to_noise": float(np.std(signals) / np.std(noises)) if signals else None,
        "blocks": {
            str(b): float(np.mean([c.blocks[b] for c in compared if b in c.blocks])) for b in names
        },
    }


def _compare(
    model: Model,
    cfg: Settled,
    group: list[Example],
    truth: TrueGradient,
    step: int,
    scales: np.ndarray | None,
) -> Comparison:
    """Probe the group with the directions of ``step`` and compare the estimate; ``scales``: of mask block."""
    store, length = model.store, truth.length
    recipe, losses = _probed(model, cfg, group, step)
    recipe = recipe._replace(scales=scales)
    sums = _sums_by_block(store, recipe, truth.mean)
    # |g| in the blocks that the step moves.
    moved_length = math.sqrt(sum(square for _, _, square in sums.values()))
    coordinates = _coordinates(store, recipe)
    signal = noise = None
    if truth.each and len(model.evaluations) == 2 and store.mask.name != "quantized":
        signal = _first_order_change(store, recipe, truth.each, cfg.sigma)
        noise = losses[0] - losses[1] - signal
    return Comparison(
        _cosine(sums.values(), length),
        {block: _cosine([s], math.sqrt(s[2])) for block, s in sums.items() if s[2]},
        _theory(cfg, length, moved_length, truth.squares, coordinates),
        coordinates,
        signal,
        noise,
    )


def _probed(
    model: Model, cfg: Settled, group: list[Example], step: int
) -> tuple[Recipe, np.ndarray]:
    """The recipe of a step's estimate, whose length means nothing, and the step's losses (sides, B) float64."""
    estimator = Estimator.of(cfg)
    batch = collate(group, range(len(group)))
    probe = model.probe(batch, Key(cfg.seed, step), cfg.sigma)
    losses = model.losses(batch, probe, sides=len(model.evaluations))[0].numpy()
    touched = model.take_touched(len(group))
    c = estimator.coefficients(estimator.credit(losses), 1.0, cfg.sigma)
    guides = model.store.take_guides()
    return Recipe(step, c, 0.0, touched, guides=guides), losses.astype(np.float64)


def _sums_by_block(store: WeightStore, recipe: Recipe, mean: Gradient) -> dict[int, np.ndarray]:
    """For each block that the step moves (-1: outside of all): estimate.g, |estimate|^2, |g|^2."""
    sums: dict[int, np.ndarray] = {}
    for trainable, part, estimate in store.estimate(recipe):
        true = mean[trainable.target.name][part].double()
        of_block = sums.setdefault(_block(trainable), np.zeros(3))
        of_block += [
            float((estimate * true).sum()),
            float(estimate.double().square().sum()),
            0.0,
        ]
    for trainable in store.trainables.values():
        if (block := _block(trainable)) in sums:
            sums[block][2] += float(mean[trainable.target.name].double().square().sum())
    return sums


def _block(trainable: Trainable) -> int:
    """The number of the block that a trained tensor is in; -1: outside of all."""
    block = block_of(trainable.target.name)
    return -1 if block is None else block


def _cosine(sums: Iterable[np.ndarray], length: float) -> float:
    """The cosine of the estimate to a gradient of this length, from ``_sums_by_block``; 0 where either is 0."""
    dot, square, _ = np.sum(list(sums), axis=0)
    return float(dot / (math.sqrt(square) * length)) if square and length else 0.0


def _coordinates(store: WeightStore, recipe: Recipe) -> float:
    """Coordinates that an example moves in the recipe's step, on average."""
    total = 0.0
    for trainable in store.trainables.values():
        if not store.scale(trainable, recipe):
            continue
        fixed = trainable.fixed_rows
        rows = float(trainable.target.rows if fixed is None else len(fixed))
        if trainable.touched_offset is not None:
            rows = float(np.mean([len(ids) for ids in rows_by_direction(trainable, recipe)]))
        total += rows * trainable.target.cols
    return total


def _theory(
    cfg: Settled, length: float, moved_length: float, squares: list[float], coordinates: float
) -> float | None:
    """The cosine that theory expects of a step; None where there is no formula for it.

    ``length``: |g|; ``moved_length``: |g| in what the step moves; ``squares``: |g_i|^2; ``coordinates``: d.
    """
    random = cfg.mask not in ("sparse", "hessian", "hessian-block", "block")
    if not random or DIRECTIONS[cfg.directions].guided or not length:
        return None  # the direction is not drawn at random, or not equally long in all coordinates
    share = moved_length / length
    if cfg.credit in (
        "mean",
        "clipped",
        "svrg",
        "scaled",
    ):  # svrg is measured in the step that sets its anchor
        return share * math.sqrt(2 / math.pi / coordinates)
    if cfg.tries:
        return share * math.sqrt(cfg.candidates / coordinates)
    if cfg.credit in ("group", "raw") and cfg.mask != "layers":
        # With group credit, the credit of a single example is its sign.
        single = math.sqrt(2 / math.pi) if len(squares) == 1 else 1.0
        return single * length * len(squares) / math.sqrt(sum(squares) * coordinates)
    return None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known; None where there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _first_order_change(
    store: WeightStore, recipe: Recipe, each: list[Gradient], sigma: float
) -> np.ndarray:
    """2 sigma g_i.D_i of every example, (B,) float64: how much its loss differs between the two sides."""
    dots = np.zeros(len(each))
    for slot, gradient in enumerate(each):
        one_hot = np.zeros(len(each), np.float32)
        one_hot[slot] = 1.0
        for trainable, part, direction in store.estimate(recipe._replace(coefficients=one_hot)):
            dots[slot] += float((direction * gradient[trainable.target.name][part]).sum())
    return 2 * sigma * dots


# ---------------------------------------------------------------------------------------------
# The true gradient


def true_gradient(
    opened: Opened, model: Model, group: Sequence[Example], *, keep_each: bool
) -> TrueGradient:
    """Gradients of a group's examples at the weights of the store; ``keep_each``: that of every example as well."""
    module = plain_module(opened, model)
    truth = TrueGradient([], {}, [])
    for example in group:
        module.zero_grad()
        example_loss(module, example, opened.dataset).backward()
        gradient = in_trained(module, model.store)
        for name, values in gradient.items():
            part = values / len(group)
            truth.mean[name] = truth.mean[name] + part if name in truth.mean else part
        truth.squares.append(sum(float(v.double().square().sum()) for v in gradient.values()))
        if keep_each:
            truth.each.append(gradient)
    return truth


def plain_module(opened: Opened, model: Model) -> Any:
    """transformers' own module in fp32, with copies of the weights that the store holds now."""
    files = replace(opened.files, config=copy.deepcopy(opened.files.config))
    module: Any = loader.build_meta(files)
    module.set_attn_implementation("eager")
    store = model.store
    for name, parameter in list(module.named_parameters()):
        owner_name, _, attribute = name.rpartition(".")
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
        owner._parameters[attribute] = nn.Parameter(values.clone())
    module.tie_weights()
    return module


def in_trained(module: Any, store: WeightStore) -> Gradient:
    """The module's gradient of every tensor that the store trains, in the coordinates of that tensor."""
    return {name: gradient_of(module, store, name).clone() for name in store.trainables}


def gradient_of(module: Any, store: WeightStore, name: str) -> Tensor:
    """The module's gradient of one trained tensor, (rows, cols) fp32.

    A view of ``grad`` where the tensor is a weight. For low-rank factors and gains it follows by the chain rule.
    """
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
    as_matrix: Tensor = gradient.reshape(store.trainables[name].target.rows, -1)
    return as_matrix


def example_loss(module: Any, example: Example, dataset: Dataset) -> Tensor:
    """The loss of an example as losses.Scorer gives it, but through the plain module, for autograd."""
    logits = [
        module(input_ids=torch.tensor(row.ids)[None]).logits[0][list(row.score_at)].float()
        for row in example.whole_rows
    ]
    return loss_of(logits, example, dataset)[0]


def chart(result: Mapping[str, Any], file: Path) -> None:
    """Draw a PNG with a bar for each row, cosine x sqrt(d), and a line where theory expects its end."""
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
    figure.savefig(file, dpi=130, format="png")
    plt.close(figure)
