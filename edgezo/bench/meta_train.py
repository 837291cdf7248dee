"""``edgezo meta-train``: learn a scale for the directions of each block (arXiv 2510.00419, learning to learn).

    scales      s_b of every trained tensor, from the networks of the finetuner as they are now (run/finetuner.py)
    estimate    e = sum_i c_i D_i of a step at theta, with the probe, credit and directions of a run
    meta-loss   L(theta') of the same batch, theta'_b = theta_b - s_b e_b, in which c_i and e_b are constants, so

                dL(theta')/ds_b = -<grad_b L(theta'), e_b>,    and from s_b on by autograd, through nu as well
    networks    <- networks - rate * gradient/|gradient|
    theta       <- theta - lr * v,  v = 0.8 v + grad L(theta): the trajectory, along true gradients; lr falls to 0

Tasks take turns, in an order that is shuffled in every round. After ``restart`` steps the trajectory starts again at
the base. The published code treats nu as a constant and takes the gradient at the length that it has. Here a step of
the networks always has the length ``rate``, since the length of the estimate differs from credit to credit; the
proportions between blocks are kept.

Like bench alignment, this runs backward. It holds the weights in fp32 twice, their gradient, and for what is trained
its momentum and its start: about 20 bytes for each trained weight. Examples pass one at a time, so that activations
stay small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from edgezo.bench.alignment import example_loss, gradient_of, plain_module
from edgezo.bench.memory import UNLIMITED_BYTES
from edgezo.data.batches import Example, batch_indices, pieces
from edgezo.data.dataset import Dataset
from edgezo.errors import DoesNotFit, UsageError
from edgezo.machine.hardware import machine
from edgezo.machine.ownership import check_new_file
from edgezo.machine.process_memory import rss_bytes
from edgezo.network.model import Model
from edgezo.plan.budget import default_budget, mb
from edgezo.plan.config import RunConfig, Settled
from edgezo.plan.request import make_config
from edgezo.plan.shapes import ModelShape
from edgezo.run.finetuner import Finetuner, Tuner
from edgezo.run.journal_record import StepRecord
from edgezo.run.record_recipe import recipe_of
from edgezo.run.session import Opened, Planned, load_model, open_request, read_data, settle
from edgezo.weights.trainable import Trainable
from edgezo.zo import noise
from edgezo.zo.credit import Estimator
from edgezo.zo.noise import Key
from edgezo.zo.parts import PARTS
from edgezo.zo.presets import PRESETS
from edgezo.zo.recipe import Recipe

SHARINGS = ("block", "layer")
MOMENTUM = 0.8  # of the trajectory
LONGEST_GRADIENT = 1.0  # longer ones are scaled down to this before they enter the momentum


@dataclass(frozen=True)
class MetaRequest:
    """What ``meta_train`` is asked to do, beside the settings of a run."""

    steps: int = 200
    restart: int = 50  # steps of a trajectory
    sharing: str = (
        "block"  # block: each parameter has a network; layer: parameters of a layer share one
    )
    rate: float = 0.05  # length of the networks' step
    lr: float = 0.01  # learning rate of the trajectory at its start


def meta_train(
    settings: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    request: MetaRequest,
    out: Path,
    *,
    max_mem_bytes: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a finetuner and write it to the file ``out``, at every restart and at the end; returns figures.

    ``settings``: those of a run that all tasks share; ``tasks``: for each the settings that differ, its ``task`` or
    ``data``. ``max_mem_bytes``: refuse to start where more is needed. The result is a function of these and the seed.
    Raises UsageError, DoesNotFit and EdgezoError.
    """
    configs = _configs(settings, tasks, request)
    check_new_file(out)
    opened = open_request(configs[0])
    others = [read_data(cfg, opened.files, opened.tokenizer) for cfg in configs[1:]]
    trainer = MetaTrainer.of(opened, [opened.dataset, *others], request, max_mem_bytes)
    about = {
        "model": opened.files.content_hash,
        "tasks": ",".join(str(cfg.task or Path(str(cfg.data)).name) for cfg in configs),
        "estimator": trainer.cfg.estimator,
        **{name: str(getattr(request, name)) for name in ("sharing", "steps", "restart")},
        "seed": str(trainer.cfg.seed),
    }
    trainer.finetuner.save(
        out, about
    )  # a place that cannot be written is an error now, not at the end
    history = []
    for step in range(request.steps):
        history.append(trainer.step(step))
        if (step + 1) % request.restart == 0:
            trainer.finetuner.save(out, about)
        if (step + 1) % max(1, request.steps // 20) == 0:
            note(_line(step + 1, history[-max(1, request.steps // 20) :]))
    trainer.finetuner.save(out, about)
    return {
        "out": str(out),
        "blocks": len(trainer.finetuner.blocks),
        **about,
        **_progress(history),
        "scales": trainer.spread(),
        "steps": request.steps,
    }


def _progress(history: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Losses at both ends, and the mean gain of a forward-only step in the first and in the second half.

    The gain is what the step takes off the loss; None where no step was finite.
    """
    gains = [row["gain"] for row in history if math.isfinite(row["gain"])]
    half = len(gains) // 2
    return {
        "loss_first": history[0]["loss"],
        "loss_last": history[-1]["loss"],
        "gain_first": float(np.mean(gains[:half])) if half else None,
        "gain_last": float(np.mean(gains[half:])) if gains else None,
    }


def _line(step: int, rows: Sequence[Mapping[str, float]]) -> str:
    """A line of progress: means over the last steps."""
    loss, gain = (float(np.mean([row[name] for row in rows])) for name in ("loss", "gain"))
    return f"meta-step {step}: loss {loss:.4f}, a forward-only step lowers it by {gain:.2e}"


def _configs(
    settings: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]], request: MetaRequest
) -> list[RunConfig]:
    """A configuration for each task. Raises UsageError with every problem."""
    settings = {"estimator": "zo-finetuner", **settings}
    problems = (
        [] if tasks else ["--task or --data is missing: give one or more tasks to learn from"]
    )
    if request.sharing not in SHARINGS:
        problems.append(f"--sharing {request.sharing} is not one of {', '.join(SHARINGS)}")
    for name in ("steps", "restart"):
        if getattr(request, name) < 1:
            problems.append(f"--{name} must be at least 1, not {getattr(request, name)}")
    usable = [name for name, preset in PRESETS.items() if preset.mask == "block"]
    if settings["estimator"] not in usable:
        problems.append(
            f"--estimator {settings['estimator']} uses no finetuner; give one of {', '.join(usable)}"
        )
    fixed: dict[str, Any] = {"precision": "fp32", "residency": "resident", "device": "cpu"}
    fixed |= {"max_mem_bytes": UNLIMITED_BYTES}
    configs = []
    for task in tasks:
        try:
            # need_data=False: a run with these estimators needs the file of a finetuner, which is made only now.
            configs.append(make_config({**settings, **task, **fixed}, need_data=False))
        except UsageError as wrong:
            problems += wrong.problems
    parts = {PARTS[name] for cfg in configs for name in cfg.train}
    if other := sorted(part.name for part in parts if part.gains or not part.perturbed):
        problems.append(
            f"--train {'+'.join(other)} has no scales to learn; train full, lowrank or norms"
        )
    if problems:
        raise UsageError(list(dict.fromkeys(problems)))
    return configs


# ---------------------------------------------------------------------------------------------
# One step


@dataclass
class Place:
    """A trained tensor, and the parameter of transformers' own module that it is part of."""

    trainable: Trainable
    weight: Tensor  # (rows, cols of the weight), a view of the parameter
    # Of a low-rank factor, else None:
    frozen: Tensor | None  # the matrix beside it, (rows, cols of the weight)
    basis: Tensor | None  # (rank, cols of the weight)

    @torch.no_grad()
    def put(self, rows: slice | Tensor, values: Tensor) -> None:
        """Set rows of the module's weight to what they are with ``values`` (n, cols) of the trained tensor."""
        if self.frozen is not None and self.basis is not None:
            values = self.frozen[rows] + values @ self.basis
        self.weight[rows] = values


@dataclass
class MetaTrainer:
    """A finetuner in training: its networks, the model in a store and in transformers' module, and the trajectory."""

    cfg: Settled
    request: MetaRequest
    opened: Opened
    model: Model
    module: Any
    finetuner: Finetuner
    datasets: Sequence[Dataset]
    tuners: list[Tuner] = field(
        init=False
    )  # one for each task: their examples move other numbers of rows
    places: dict[str, Place] = field(init=False)
    start: dict[str, Tensor] = field(init=False)  # values of each trained tensor at the base
    momentum: dict[str, Tensor] = field(init=False)  # v of each trained tensor
    previous: dict[int, StepRecord] = field(default_factory=dict)  # the last step on each task

    @staticmethod
    def of(
        opened: Opened, datasets: Sequence[Dataset], request: MetaRequest, max_mem_bytes: int | None
    ) -> MetaTrainer:
        """Load the model for all tasks. Raises UsageError for tasks that do not go together, and DoesNotFit."""
        if len({dataset.kind == "label" for dataset in datasets}) > 1:
            raise UsageError(
                "tasks that score label words and tasks that score text do not go into one "
                "meta-training: they train other rows of the embedding. Give tasks of one kind."
            )
        # The embedding rows of the label words of all tasks are trained; a step scores those of its task.
        words = tuple(sorted({word for dataset in datasets for word in dataset.label_ids}))
        opened = replace(opened, dataset=replace(opened.dataset, label_ids=words))
        planned = _with_room(opened, max_mem_bytes)
        model = load_model(planned, machine()).model
        names = dict.fromkeys(n.partition("#")[0] for n in model.store.trainables)
        blocks = dict.fromkeys(layer_of(n) if request.sharing == "layer" else n for n in names)
        finetuner = Finetuner.plain(tuple(blocks), planned.cfg.seed)
        module = plain_module(opened, model)
        return MetaTrainer(planned.cfg, request, opened, model, module, finetuner, datasets)

    def __post_init__(self) -> None:
        store = self.model.store
        for weights in self.finetuner.weights:
            weights.requires_grad_(True)
        self.tuners = [Tuner.of(self.finetuner, store, dataset) for dataset in self.datasets]
        self.places = {name: _place(self.module, self.model, name) for name in store.trainables}
        self.start = {name: one.values.clone() for name, one in store.trainables.items()}
        self.momentum = {name: torch.zeros_like(values) for name, values in self.start.items()}
        trained = {name.partition("#")[0] for name in self.places}
        for name, parameter in self.module.named_parameters():
            # The others need no gradient, nor memory for one.
            parameter.requires_grad_(name in trained)
        rows = self.model.label_rows
        self._label_offset = (
            0 if rows is None else int(rows[0]) - min(self.opened.dataset.label_ids)
        )

    def step(self, number: int) -> dict[str, float]:
        """Make one meta-step.

        Returns its task, the loss at theta, the loss at theta' (``ahead``) and the ``gain`` from one to the other.
        Where the losses of the probe are not finite, the networks stay as they are, and ``ahead`` and ``gain`` are NaN.
        """
        within = number % self.request.restart
        if number and not within:
            self._begin_again()
        task, turn = task_of(number, len(self.datasets), self.cfg.seed)
        self._score(task)
        group = self._group(task, turn)
        record, features = self._probed(number, task, group)
        recipe = recipe_of(self.cfg, record)._replace(scales=None)
        self.previous[task] = record
        ahead = math.nan
        if not record.skipped:
            scales = self._scales(task, features)
            self._put_ahead(recipe, scales.detach().tolist())
            ahead = self._backward(group, task)
            self._learn(scales, self._slopes(recipe))
            self._put_theta()
        loss = self._backward(group, task)
        self._walk(self.request.lr * (1 - within / self.request.restart))
        return {"task": task, "loss": loss, "ahead": ahead, "gain": loss - ahead}

    def spread(self) -> dict[str, float]:
        """Smallest, median and largest scale of the first step at the base."""
        self._begin_again()
        nu_and_sigma = self.tuners[0].scale_step(None)
        scales = nu_and_sigma[0] * nu_and_sigma[1:]
        least, median, most = np.quantile(scales, (0, 0.5, 1)).tolist()
        return {"least": least, "median": median, "most": most}

    def _begin_again(self) -> None:
        """Start a new trajectory at the base."""
        for name, trainable in self.model.store.trainables.items():
            trainable.values.copy_(self.start[name])
            self.momentum[name].zero_()
        self.previous.clear()
        self._put_theta()

    def _score(self, task: int) -> None:
        """Make the model score the rows of a task."""
        dataset, model = self.datasets[task], self.model
        words = torch.tensor(dataset.label_ids, dtype=torch.int64)
        model.scorer = replace(model.scorer, kind=dataset.kind, label_ids=words)
        if model.label_rows is not None:
            model.label_rows = np.unique(np.array(dataset.label_ids, np.int64) + self._label_offset)

    def _group(self, task: int, turn: int) -> list[Example]:
        """The examples of a step on a task that has had ``turn`` steps before."""
        train, cfg = self.datasets[task].train, self.cfg
        return [train[i] for i in batch_indices(len(train), cfg.batch_size, cfg.seed, turn)]

    def _probed(
        self, number: int, task: int, group: Sequence[Example]
    ) -> tuple[StepRecord, Tensor]:
        """The record of the step that a run would make at theta, and the features that its scales follow from."""
        cfg, model, previous = self.cfg, self.model, self.previous.get(task)
        features = self.tuners[task].features(previous)
        nu_and_sigma = self.tuners[task].scale_step(previous, features)
        sides = len(model.evaluations)
        losses = np.full((sides, len(group)), np.nan, np.float32)
        for batch in pieces(group, cfg.micro_batch, model.most_tokens):
            probe = model.probe(batch, Key(cfg.seed, number), cfg.sigma)
            losses[:, batch.slots] = model.losses(batch, probe, sides=sides)[0].numpy()
        credit = Estimator.of(cfg).credit(losses)
        touched, skipped = model.take_touched(len(group)), not bool(credit.any())
        of_step = (number, cfg.sigma, cfg.step, skipped, losses, credit, touched, nu_and_sigma)
        return StepRecord(*of_step), features

    def _scales(self, task: int, features: Tensor) -> Tensor:
        """s_b of the trained tensors by their names, (n,) float64: what ``Tuner.scale_step`` gives, for autograd."""
        tuner = self.tuners[task]
        sigma = self.finetuner.sigma(features)[tuner.places]
        sizes = torch.from_numpy(tuner.sizes)
        return sigma * torch.sqrt(sizes.sum() / (sizes * sigma.square()).sum())

    def _put_ahead(self, recipe: Recipe, scales: Sequence[float]) -> None:
        """Set the module's weights to theta'."""
        by_name = dict(zip(self.tuners[0].names, scales, strict=True))
        for trainable, rows, estimate in self.model.store.estimate(recipe):
            name = trainable.target.name
            moved = trainable.layout.read(rows).sub_(estimate * by_name[name])
            self.places[name].put(rows, moved)

    def _put_theta(self) -> None:
        """Set the module's weights to theta."""
        for place in self.places.values():
            place.put(slice(0, place.trainable.target.rows), place.trainable.values)

    def _slopes(self, recipe: Recipe) -> Tensor:
        """dL(theta')/ds_b in the order of ``_scales``, (n,) float64, from the gradients that the module holds."""
        store = self.model.store
        slopes = dict.fromkeys(self.tuners[0].names, 0.0)
        for trainable, rows, estimate in store.estimate(recipe):
            name = trainable.target.name
            gradient = gradient_of(self.module, store, name)[rows]
            slopes[name] -= float((gradient * estimate).sum(dtype=torch.float64))
        return torch.tensor(list(slopes.values()), dtype=torch.float64)

    def _learn(self, scales: Tensor, slopes: Tensor) -> None:
        """Make one step of the networks down the meta-loss, of the length ``request.rate``; none if not finite."""
        if not bool(torch.isfinite(slopes).all()):
            return
        gradients = torch.autograd.grad((scales * slopes).sum(), self.finetuner.weights)
        length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        if 0 < length < math.inf:
            with torch.no_grad():
                for weights, gradient in zip(self.finetuner.weights, gradients, strict=True):
                    weights.sub_(gradient, alpha=self.request.rate / length)

    def _backward(self, group: Sequence[Example], task: int) -> float:
        """The mean loss of a group; afterwards the parameters of the module hold its gradient."""
        self.module.zero_grad()
        total = 0.0
        for example in group:
            loss = example_loss(self.module, example, self.datasets[task]) / len(group)
            loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _walk(self, lr: float) -> None:
        """Make one step of the trajectory along the true gradient; none where that is not finite."""
        store = self.model.store
        squares = [
            float(gradient_of(self.module, store, name).square().sum(dtype=torch.float64))
            for name in self.places
        ]
        length = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
        if length < math.inf:
            share = min(1.0, LONGEST_GRADIENT / length) if length else 1.0
            for name, place in self.places.items():
                momentum = self.momentum[name].mul_(MOMENTUM)
                momentum.add_(gradient_of(self.module, store, name), alpha=share)
                place.trainable.values.sub_(momentum, alpha=lr)
        self._put_theta()


def task_of(number: int, tasks: int, seed: int) -> tuple[int, int]:
    """(number of the task, rounds before this one) of a step. Every round has each task once, in a random order."""
    turn, at = divmod(number, tasks)
    order = noise.permutation(Key(seed, turn), noise.tensor_id("tasks"), noise.CHOICE, tasks)
    return int(order[at]), turn


def layer_of(name: str) -> str:
    """The layer that a parameter is in (``model.layers.3``); outside of all layers, the name of the parameter."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name


def _place(module: Any, model: Model, name: str) -> Place:
    """Where the trained tensor ``name`` is in transformers' own module."""
    weight, _, kind = name.partition("#")
    parameter = module.get_parameter(weight).detach()
    owner = module.get_submodule(weight.rpartition(".")[0])
    trainable = model.store.trainables[name]
    view = parameter.T if isinstance(owner, Conv1D) and parameter.dim() == 2 else parameter
    if kind != "lowrank":
        return Place(trainable, view.view(-1, 1) if view.dim() == 1 else view, None, None)
    layout = model.store.layouts[weight]
    (frozen,) = layout.tensors().values()  # a dense fp32 layout has one tensor
    return Place(trainable, view, frozen, model.store.basis(weight, layout.shape[1]))


def _with_room(opened: Opened, max_mem_bytes: int | None) -> Planned:
    """Plan the request. Raises DoesNotFit where the machine or the cap has no room for a meta-training."""
    host = machine()
    planned = settle(opened, host, rss_bytes())
    shape = ModelShape.of(opened.files.shape, opened.cfg.model)
    weights = sum(m.numel for m in (*shape.matrices, *shape.tables)) + shape.vector_elements
    # The module and its gradient; of what is trained momentum and start, which are small for factors.
    copies = 4 if planned.cfg.parts.weights else 2
    needed_bytes = planned.plan.needed_bytes + 4 * copies * weights
    cap_bytes, why = max_mem_bytes, "--max-mem"
    if cap_bytes is None:
        cap_bytes, why = default_budget(host)
    if needed_bytes > cap_bytes:
        raise DoesNotFit(
            f"meta-training takes about {mb(needed_bytes)}, but the cap is {mb(cap_bytes)} ({why}): it runs "
            "backward, with the weights twice in fp32.\nUse a smaller model, --train lowrank, a smaller "
            "--batch-size, or a larger --max-mem."
        )
    return planned
