"""The gradient estimate is unbiased on quadratics, and as close to the true gradient as theory says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor
from workshop import KEY, Tried, Workshop, make_examples, of

from edgezo.data.batches import collate
from edgezo.zo.credit import preset
from edgezo.zo.directions import DIRECTION_KINDS, Target
from edgezo.zo.noise import Key, exact_grid
from edgezo.zo.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


QUADRATIC = {
    "matrix": Target("quadratic.weight", 6, 5, vector=False),
    "vector": Target("quadratic.bias", 7, 1, vector=True),
}


@pytest.mark.parametrize("shape", QUADRATIC)
@pytest.mark.parametrize("name", [d for d in DIRECTION_KINDS if d != "centred"])
def test_the_two_sided_estimate_of_a_quadratic_averages_to_its_gradient(
    name: str, shape: str
) -> None:
    # l(theta) = theta.H theta/2 + b.theta, so l(theta + s D) - l(theta - s D) = 2 s (H theta + b).D exactly.
    directions, target = DIRECTION_KINDS[name], QUADRATIC[shape]
    size, sigma = target.rows * target.cols, 0.1
    generator = np.random.default_rng(0)
    root = generator.standard_normal((size, size))
    h, b, theta = (
        root @ root.T / size,
        generator.standard_normal(size),
        generator.standard_normal(size),
    )

    def loss(at: np.ndarray) -> float:
        return float(at @ h @ at / 2 + b @ at)

    keys, per_key = (250, 16) if directions.factored else (1500, 1)
    total = torch.zeros(target.rows, target.cols, dtype=torch.float64)
    for step in range(keys):
        key = Key(3, step)
        delta = np.empty(per_key)
        for slot in range(per_key):
            d = (
                sigma
                * reference.direction(name, key, target, slot, directions.rank).numpy().ravel()
            )
            delta[slot] = loss(theta + d) - loss(theta - d)
        c = torch.from_numpy(delta / (2 * sigma * per_key)).float()
        total += directions.weighted_sum(key, target, c, slice(0, target.rows))
    mean = (total / keys).numpy().ravel()
    true = h @ theta + b
    # One estimate's entries have a standard deviation of about |g|; U shared by a group counts once.
    independent = keys * (1 if directions.dense else per_key)
    assert np.abs(mean - true).max() < 4.5 * np.linalg.norm(true) / math.sqrt(independent)
    assert np.linalg.norm(mean - true) < 0.3 * np.linalg.norm(true)


LLAMA = of("llama", "full")


@pytest.mark.parametrize("estimator, directions", [("grzo", "signs"), ("grzo", "rademacher")])
@pytest.mark.parametrize("size", (4, 16))
def test_the_cosine_to_the_true_gradient_grows_with_the_root_of_the_group(
    estimator: str, directions: str, size: int, workshop: Workshop
) -> None:
    # E[c_i D_i . g] = |g|^2 and |sum c_i D_i|^2 ~ sum |g_i|^2 d_i, so the cosine is near |g| B/sqrt(sum |g_i|^2 d_i).
    tried = replace(workshop.tried(replace(LLAMA, directions=directions)))
    tried.examples = make_examples("label", False, count=size, seed=1)
    gradients = _example_gradients(tried)
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}
    squares = [sum(float(g[n].square().sum()) for n in g) for g in gradients]
    places = [
        sum(trainable.target.cols * len(tried.used[n][i]) for n, trainable in _trainables(tried))
        for i in range(size)
    ]
    length = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
    noise = math.sqrt(sum(s * d for s, d in zip(squares, places, strict=True)))
    tries = 64
    cosine = np.mean([_estimate_cosine(tried, estimator, step, mean) for step in range(tries)])
    # A single cosine scatters by about 1/sqrt(d); group credit's common factor cancels.
    scatter = 1 / math.sqrt(min(places) * tries)
    assert abs(cosine - length * size / noise) < 4 * scatter + 0.05 * cosine
    assert cosine > 4 * scatter


def test_one_shared_direction_has_the_cosine_of_a_single_gaussian(workshop: Workshop) -> None:
    tried = workshop.tried(replace(LLAMA, directions="shared"))
    gradients = _example_gradients(tried)
    mean = {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}
    moved = {n: torch.unique(torch.cat(tried.used[n])) for n, _ in _trainables(tried)}
    places = sum(trainable.target.cols * len(moved[name]) for name, trainable in _trainables(tried))
    tries = 60
    cosine = np.mean([_estimate_cosine(tried, "mezo", step, mean) for step in range(tries)])
    # Example i of a shared direction moves only its own rows of an embedding, which turns U a little.
    assert abs(cosine * math.sqrt(places) - math.sqrt(2 / math.pi)) < 4 * 0.6 / math.sqrt(tries)


def _trainables(tried: Tried) -> Any:
    return tried.model.store.trainables.items()


def _example_gradients(tried: Tried) -> list[dict[str, Tensor]]:
    """Autograd's gradient of each example's loss by parameter, (rows, cols) each."""
    twin = tried.twin
    twin.load(reference.explicit_weights(tried.model))
    gradients = []
    for example in tried.examples:
        twin.module.zero_grad()
        twin.loss(example).backward()
        gradients.append(
            {
                name: twin.module.get_parameter(name)
                .grad.reshape(trainable.target.rows, -1)
                .clone()
                for name, trainable in _trainables(tried)
            }
        )
    return gradients


def _estimate_cosine(tried: Tried, estimator: str, step: int, true: dict[str, Tensor]) -> float:
    """The cosine between the negative update of one step and the gradient ``true``."""
    model, chosen = tried.model, preset(estimator)
    batch = collate(tried.examples, range(len(tried.examples)))
    losses, _ = model.losses(batch, model.probe(batch, Key(KEY.seed, step), 1e-3), sides=2)
    touched = model.take_touched(len(tried.examples))
    # A step that is large against fp32's rounding of the weights; its size does not enter the cosine.
    c = chosen.credit(losses.numpy())
    recipe = Recipe(step, exact_grid(c / np.abs(c).max()), 0.0, touched)
    before = tried.values()
    model.store.apply([recipe])
    after = tried.values()
    tried.restore()
    dot = sum(float(torch.sum((before[n] - after[n]) * true[n])) for n in true)
    length = math.sqrt(sum(float((before[n] - after[n]).square().sum()) for n in true))
    return dot / length / math.sqrt(sum(float(g.square().sum()) for g in true.values()))
