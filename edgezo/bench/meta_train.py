"""``edgezo meta-train``: learn how long the noise of each block should be (arXiv 2510.00419, learning to learn).

    told        s_b of every trained tensor, by the finetuner as it is now (run/finetuner.py)
    estimate    e = sum_i c_i D_i of a step at theta: the same probe, credit and directions as in a run
    meta-loss   L(theta'), theta'_b = theta_b - s_b e_b, of the same batch; c_i and e_b are constants in it, so

                dL(theta')/ds_b = -<grad_b L(theta'), e_b>,    and from s_b on by autograd, through nu as well
    networks    <- networks - rate * gradient/|gradient|
    theta       <- theta - lr * v,  v = 0.8 v + grad L(theta)      the trajectory, of true gradients; lr falls to 0

Tasks take turns in an order that is shuffled every round, and after ``restart`` steps the trajectory begins again at
the base. The published code sees nu as a constant and takes the gradient as long as it is; here the step's length
does not depend on that of the estimate, which the credits differ in, while blocks keep their proportions.

Like bench alignment this runs backward. It holds the weights in fp32 twice, their gradient, and momentum
and start of what is trained: about 20 bytes a trained weight. Example by example, so that activations stay small.
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
from edgezo.machine.process_memory import rss_bytes
from edgezo.network.model import Model
from edgezo.plan.budget import default_budget, mb
from edgezo.plan.request import RunConfig, make_config
from edgezo.plan.shapes import ModelShape
from edgezo.run.finetuner import Finetuner, Tuner
from edgezo.run.journal import StepRecord
from edgezo.run.session import Opened, load_model, open_request, read_data, recipe_of, settle
from edgezo.weights.trainable import Trainable
from edgezo.zo import noise
from edgezo.zo.credit import Estimator
from edgezo.zo.noise import Key
from edgezo.zo.presets import EXACT, PRESETS
from edgezo.zo.recipe import Recipe

SHARINGS = ("block", "layer")
MOMENTUM, LONGEST_GRADIENT = 0.8, 1.0  # of the trajectory


@dataclass(frozen=True)
class MetaRequest:
    """What ``meta_train`` is asked to do beside the fields of a run's configuration."""

    steps: int = 200
    restart: int = 50  # steps of a trajectory
    sharing: str = "block"  # one network for each parameter, or for each layer
    rate: float = 0.05  # length of the networks' step
    lr: float = 0.01  # of the trajectory


def meta_train(
    said: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    request: MetaRequest,
    out: Path,
    *,
    max_mem_bytes: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a finetuner and write it to ``out``, at every restart and at the end; returns figures.

    ``said``: fields of a run's configuration that all tasks share; ``tasks``: for each what differs, its ``task`` or
    ``data``. ``max_mem_bytes``: refuse what takes more. A function of these and the seed.
    Raises UsageError, DoesNotFit and EdgezoError.
    """
    configs = _configs(said, tasks, request)
    if out.exists():
        raise UsageError(f"{out} exists already. Remove it, or give another --out.")
    opened = open_request(configs[0])
    others = [read_data(cfg, opened.files, opened.tokenizer) for cfg in configs[1:]]
    trainer = MetaTrainer.of(opened, [opened.dataset, *others], request, max_mem_bytes)
    about = {
        "model": trainer.opened.files.content_hash,
        "tasks": ",".join(str(cfg.task or Path(str(cfg.data)).name) for cfg in configs),
        "estimator": trainer.cfg.estimator,
        **{name: str(getattr(request, name)) for name in ("sharing", "steps", "restart")},
        "seed": str(trainer.cfg.seed),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    trainer.finetuner.save(out, about)  # where it cannot be written, that shows now
    history = []
    for step in range(request.steps):
        history.append(trainer.step(step))
        if (step + 1) % request.restart == 0:
            trainer.finetuner.save(out, about)
        if (step + 1) % max(1, request.steps // 20) == 0:
            note(_line(step + 1, history[-max(1, request.steps // 20) :]))
    trainer.finetuner.save(out, about)
    gains = [row["gain"] for row in history if math.isfinite(row["gain"])]
    half = len(gains) // 2
    return {
        "out": str(out),
        "blocks": len(trainer.finetuner.blocks),
        **about,
        "loss_first": history[0]["loss"],
        "loss_last": history[-1]["loss"],
        # What one forward-only step takes off the loss, early and late.
        "gain_first": float(np.mean(gains[:half])) if half else None,
        "gain_last": float(np.mean(gains[half:])) if gains else None,
        "scales": trainer.spread(),
        "steps": request.steps,
    }


def _line(step: int, rows: Sequence[Mapping[str, float]]) -> str:
    loss, gain = (float(np.mean([row[name] for row in rows])) for name in ("loss", "gain"))
    return f"meta-step {step}: loss {loss:.4f}, a step takes off {gain:.2e}"


def _configs(
    said: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]], request: MetaRequest
) -> list[RunConfig]:
    """A configuration for each task. Raises UsageError with every problem."""
    said = {"estimator": "zo-finetuner", **said}
    problems = (
        [] if tasks else ["--task or --data is missing: give one or more tasks to learn from"]
    )
    if request.sharing not in SHARINGS:
        problems.append(f"--sharing {request.sharing} is not one of {', '.join(SHARINGS)}")
    for name in ("steps", "restart"):
        if getattr(request, name) < 1:
            problems.append(f"--{name} must be at least 1, not {getattr(request, name)}")
    row = PRESETS.get(str(said.get("estimator")))
    if row is None or row.mask != "block":
        names = ", ".join(name for name, r in PRESETS.items() if r.mask == "block")
        problems.append(f"--estimator {said['estimator']} asks no finetuner; one of {names} does")
    fixed: dict[str, Any] = {"precision": "fp32", "residency": "resident", "device": "cpu"}
    fixed |= {"max_mem_bytes": UNLIMITED_BYTES}
    configs = []
    for task in tasks:
        try:
            # Without a finetuner, which is what comes of this: so not as a request for a run.
            configs.append(make_config({**said, **task, **fixed}, need_data=False))
        except UsageError as wrong:
            problems += wrong.problems
    trained = {part for cfg in configs for part in cfg.train}
    if other := sorted(trained & {*EXACT, "scales"}):
        problems.append(
            f"--train {'+'.join(other)}: a finetuner is trained with full, lowrank, norms"
        )
    if problems:
        raise UsageError(list(dict.fromkeys(problems)))
    return configs


# ---------------------------------------------------------------------------------------------
# One step


@dataclass
class Place:
    """Where a trained tensor is in transformers' own module."""

    row: Trainable
    weight: Tensor  # (rows, cols of the weight), a view of the parameter
    frozen: Tensor | None  # of a low-rank factor: the matrix beside it, and its basis
    basis: Tensor | None

    @torch.no_grad()
    def put(self, rows: slice | Tensor, values: Tensor) -> None:
        """Let the module's weight be that of ``values`` (n, cols) of the trained tensor."""
        if self.frozen is not None and self.basis is not None:
            values = self.frozen[rows] + values @ self.basis
        self.weight[rows] = values


@dataclass
class MetaTrainer:
    """A finetuner being trained: networks, the model in a store and in a plain module, and the trajectory."""

    cfg: RunConfig
    request: MetaRequest
    opened: Opened
    model: Model
    module: Any
    finetuner: Finetuner
    datasets: Sequence[Dataset]
    tuners: list[Tuner] = field(init=False)  # one a task: what an example moves differs
    places: dict[str, Place] = field(init=False)
    start: dict[str, Tensor] = field(init=False)
    momentum: dict[str, Tensor] = field(init=False)
    previous: dict[int, StepRecord] = field(default_factory=dict)  # the last step on each task

    @staticmethod
    def of(
        opened: Opened, datasets: Sequence[Dataset], request: MetaRequest, max_mem_bytes: int | None
    ) -> MetaTrainer:
        """Load the model for all tasks. Raises UsageError and DoesNotFit."""
        if len({dataset.kind == "label" for dataset in datasets}) > 1:
            raise UsageError(
                "tasks that score label words and tasks that score text do not go into one "
                "meta-training: they train other rows of the embedding. Give tasks of one kind."
            )
        # The rows of every task's label words are trained; which are scored changes with the task.
        words = tuple(sorted({word for dataset in datasets for word in dataset.label_ids}))
        opened = replace(opened, dataset=replace(opened.dataset, label_ids=words))
        _check_room(opened, max_mem_bytes)
        model = load_model(opened, machine())
        names = dict.fromkeys(n.partition("#")[0] for n in model.store.trainables)
        blocks = dict.fromkeys(layer_of(n) if request.sharing == "layer" else n for n in names)
        finetuner = Finetuner.plain(tuple(blocks), opened.cfg.seed)
        module = plain_module(opened, model)
        return MetaTrainer(opened.cfg, request, opened, model, module, finetuner, datasets)

    def __post_init__(self) -> None:
        store = self.model.store
        for weights in self.finetuner.weights:
            weights.requires_grad_(True)
        self.tuners = [Tuner.of(self.finetuner, store, dataset) for dataset in self.datasets]
        self.places = {name: _place(self.module, self.model, name) for name in store.trainables}
        self.start = {name: row.values.clone() for name, row in store.trainables.items()}
        self.momentum = {name: torch.zeros_like(held) for name, held in self.start.items()}
        trained = {name.partition("#")[0] for name in self.places}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(
                name in trained
            )  # the rest needs no gradient, nor memory for it
        rows = self.model.label_rows
        self._label_offset = (
            0 if rows is None else int(rows[0]) - min(self.opened.dataset.label_ids)
        )

    def step(self, number: int) -> dict[str, float]:
        """One meta-step; what it measured. Does nothing to the networks where a loss is not finite."""
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
            self._put_here()
        loss = self._backward(group, task)
        self._walk(self.request.lr * (1 - within / self.request.restart))
        return {"task": task, "loss": loss, "ahead": ahead, "gain": loss - ahead}

    def spread(self) -> dict[str, float]:
        """Smallest, median and largest scale that a first step at the base would be told."""
        self._begin_again()
        told = self.tuners[0].tell(None)
        least, median, most = np.quantile(told[0] * told[1:], (0, 0.5, 1)).tolist()
        return {"least": least, "median": median, "most": most}

    def _begin_again(self) -> None:
        for name, row in self.model.store.trainables.items():
            row.values.copy_(self.start[name])
            self.momentum[name].zero_()
        self.previous.clear()
        self._put_here()

    def _score(self, task: int) -> None:
        """Let the model's loss be that of a task."""
        dataset, model = self.datasets[task], self.model
        words = torch.tensor(dataset.label_ids, dtype=torch.int64)
        model.scorer = replace(model.scorer, kind=dataset.kind, label_ids=words)
        if model.label_rows is not None:
            model.label_rows = np.unique(np.array(dataset.label_ids, np.int64) + self._label_offset)

    def _group(self, task: int, turn: int) -> list[Example]:
        train, size = self.datasets[task].train, self.cfg.batch_size
        assert size is not None
        return [train[i] for i in batch_indices(len(train), size, self.cfg.seed, turn)]

    def _probed(
        self, number: int, task: int, group: Sequence[Example]
    ) -> tuple[StepRecord, Tensor]:
        """The step that a run would take here, and the features that it was told by."""
        cfg, model, previous = self.cfg, self.model, self.previous.get(task)
        assert cfg.micro_batch is not None
        features = self.tuners[task].features(previous)
        told = self.tuners[task].tell(previous, features)
        sides = len(model.evaluations)
        losses = np.full((sides, len(group)), np.nan, np.float32)
        for batch in pieces(group, cfg.micro_batch, model.most_tokens):
            probe = model.probe(batch, Key(cfg.seed, number), cfg.sigma)
            losses[:, batch.slots] = model.losses(batch, probe, sides=sides)[0].numpy()
        credit = Estimator.of(cfg).credit(losses)
        touched, skipped = model.take_touched(len(group)), not bool(credit.any())
        record = StepRecord(number, cfg.sigma, cfg.step, skipped, losses, credit, touched, told)
        return record, features

    def _scales(self, task: int, features: Tensor) -> Tensor:
        """s_b of the trained tensors by name, (n,) float64, for autograd: what ``Tuner.tell`` told."""
        tuner = self.tuners[task]
        sigma = self.finetuner.sigma(features)[tuner.places]
        sizes = torch.from_numpy(tuner.sizes)
        return sigma * torch.sqrt(sizes.sum() / (sizes * sigma.square()).sum())

    def _put_ahead(self, recipe: Recipe, scales: Sequence[float]) -> None:
        """theta' into the module."""
        by_name = dict(zip(self.tuners[0].names, scales, strict=True))
        for row, rows, estimate in self.model.store.estimate(recipe):
            moved = row.layout.read(rows).sub_(estimate * by_name[row.target.name])
            self.places[row.target.name].put(rows, moved)

    def _put_here(self) -> None:
        """theta into the module."""
        for place in self.places.values():
            place.put(slice(0, place.row.target.rows), place.row.values)

    def _slopes(self, recipe: Recipe) -> Tensor:
        """dL(theta')/ds_b of the trained tensors by name, (n,) float64, from the module's gradient."""
        store = self.model.store
        found = dict.fromkeys(self.tuners[0].names, 0.0)
        for row, rows, estimate in store.estimate(recipe):
            gradient = gradient_of(self.module, store, row.target.name)[rows]
            found[row.target.name] -= float((gradient * estimate).sum(dtype=torch.float64))
        return torch.tensor(list(found.values()), dtype=torch.float64)

    def _learn(self, scales: Tensor, slopes: Tensor) -> None:
        """One step of the networks, of the request's length, against the meta-loss."""
        if not bool(torch.isfinite(slopes).all()):
            return
        found = torch.autograd.grad((scales * slopes).sum(), self.finetuner.weights)
        length = math.sqrt(sum(float(g.square().sum()) for g in found))
        if 0 < length < math.inf:
            with torch.no_grad():
                for weights, gradient in zip(self.finetuner.weights, found, strict=True):
                    weights.sub_(gradient, alpha=self.request.rate / length)

    def _backward(self, group: Sequence[Example], task: int) -> float:
        """The group's mean loss in the module, whose gradient it leaves there."""
        self.module.zero_grad()
        total = 0.0
        for example in group:
            loss = example_loss(self.module, example, self.datasets[task]) / len(group)
            loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _walk(self, lr: float) -> None:
        """The trajectory's step along the true gradient; none where that is not finite."""
        store = self.model.store
        squares = [
            float(gradient_of(self.module, store, name).square().sum(dtype=torch.float64))
            for name in self.places
        ]
        length = math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf
        if length < math.inf:
            share = min(1.0, LONGEST_GRADIENT / length) if length else 1.0
            for name, place in self.places.items():
                held = self.momentum[name].mul_(MOMENTUM)
                held.add_(gradient_of(self.module, store, name), alpha=share)
                place.row.values.sub_(held, alpha=lr)
        self._put_here()


def task_of(number: int, tasks: int, seed: int) -> tuple[int, int]:
    """(which task, how many rounds it had) of a step: every round has each task once, in an order of its own."""
    turn, at = divmod(number, tasks)
    order = noise.permutation(Key(seed, turn), noise.tensor_id("tasks"), noise.CHOICE, tasks)
    return int(order[at]), turn


def layer_of(name: str) -> str:
    """The layer that a parameter is of (``model.layers.3``), or its own name outside of all."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name


def _place(module: Any, model: Model, name: str) -> Place:
    weight, _, kind = name.partition("#")
    parameter = module.get_parameter(weight).detach()
    owner = module.get_submodule(weight.rpartition(".")[0])
    row = model.store.trainables[name]
    view = parameter.T if isinstance(owner, Conv1D) and parameter.dim() == 2 else parameter
    if kind != "lowrank":
        return Place(row, view.view(-1, 1) if view.dim() == 1 else view, None, None)
    layout = model.store.layouts[weight]
    (frozen,) = layout.tensors().values()  # of a dense fp32 store
    return Place(row, view, frozen, model.store.basis(weight, layout.shape[1]))


def _check_room(opened: Opened, max_mem_bytes: int | None) -> None:
    """Settle the request, and refuse what the machine or the cap has no room for."""
    host = machine()
    plan = settle(opened, host, rss_bytes())
    shape = ModelShape.of(opened.files.shape, opened.cfg.model)
    weights = sum(m.numel for m in (*shape.matrices, *shape.tables)) + shape.vector_elements
    # Module and gradient; momentum and start of what is trained (of factors that is little).
    copies = 4 if "full" in opened.cfg.train else 2
    needed = plan.planned_peak_bytes + 4 * copies * weights
    cap, why = default_budget(host) if max_mem_bytes is None else (max_mem_bytes, "as given")
    if needed > cap:
        raise DoesNotFit(
            f"meta-training takes about {mb(needed)}, and there are {mb(cap)} ({why}): it runs "
            "backward, with the weights twice in fp32.\nUse a smaller model, --train lowrank, fewer "
            "--batch-size examples, or a larger --max-mem."
        )
