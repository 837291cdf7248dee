"""The exact head: its gradient is autograd's, its steps are Adam's, and its state can be saved."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from workshop import KEY, SIGMA, Case, Tried, cases, close, of

from edgezo.machine import limits
from edgezo.network.exact_head import ExactHead
from edgezo.weights.saved import Saved, saved_sha256

pytestmark = pytest.mark.usefixtures("one_thread")


HEADS: tuple[Case, ...] = (
    *(of("llama", "lowrank+head", kind=k) for k in ("label", "completion", "choice")),
    *(
        of(f, "head", kind=k)
        for f in ("gemma2", "roberta", "gpt2")
        for k in ("label", "completion")
    ),
    of("gemma2", "full+head", kind="choice"),
    of("llama", "head", kind="completion", tied=False, precision="int8"),
)


@cases(HEADS)
def test_the_exact_heads_gradient_is_autograds(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LOGITS_BYTES", 40_000)
    model, head = tried.model, tried.model.exact
    assert head is not None
    head.delta.copy_(torch.randn(head.delta.shape, generator=torch.Generator().manual_seed(1)) / 20)
    change = head.delta.double().requires_grad_()
    basis = None if head.basis is None else head.basis.double()
    total = torch.zeros((), dtype=torch.float64)
    wanted = torch.empty(2, len(tried.examples), dtype=torch.float64)
    for slot, example in enumerate(tried.examples):
        for side, sign in enumerate((1, -1)):
            tried.twin.load(reference.explicit_weights(model, KEY, slot, sign * SIGMA))
            loss = tried.twin.loss(example, change, basis)
            wanted[side, slot], total = loss.detach(), total + loss
    (gradient,) = torch.autograd.grad(total / wanted.numel(), change)
    head.gradient.zero_()
    probe = model.probe(tried.batch, KEY, SIGMA)
    computed, _ = model.losses(tried.batch, probe, sides=2, learn=1 / wanted.numel())
    close(computed, wanted, atol=1e-4)
    close(head.gradient, gradient, atol=2e-5 * float(gradient.abs().max()) + 1e-7, rtol=1e-3)
    assert gradient.abs().max() > 1e-3
    head.delta.zero_()
    head.gradient.zero_()


class Alive(TorchDispatchMode):
    """Counts, while it is entered, the most bytes made by operations that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if place not in given | self.known:
                self.known.add(place)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, place, size)
        return result

    def _freed(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


@cases([c for c in HEADS if c.kind == "completion" and c.precision == "fp32"])
def test_scores_of_a_vocabulary_take_three_chunks(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chunk_bytes = tried.model, 16_000
    monkeypatch.setattr(limits, "LOGITS_BYTES", chunk_bytes)
    hidden = torch.randn(64, model.scorer.head.matrix.layout.shape[1])
    ids = torch.arange(64)
    nll, gradient = model.scorer._vocabulary(hidden, ids, ids, None)
    with Alive() as alive:
        nll()
        gradient(torch.ones(64), None)
    # Three chunks: expanded rows of the head, their logits in the compute dtype and in fp32. The plan counts as much
    # (tests/plan/test_planner.py).
    beside = 64 * 20 * 4
    assert chunk_bytes < alive.most <= 3 * chunk_bytes + beside


def test_the_head_takes_the_steps_of_torch_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    head = ExactHead.for_labels(3, 20)
    weight = nn.Parameter(torch.zeros(3, 20))
    adam = torch.optim.Adam([weight], lr=0.01)
    for step in range(20):
        gradient = torch.randn(3, 20, generator=generator) * 10.0 ** -(step % 5)
        weight.grad = gradient.clone()
        head.gradient += gradient
        adam.step()
        head.update(0.01)
        close(head.delta, weight.detach(), atol=1e-7, rtol=1e-5)
        assert not head.gradient.any()


def test_the_heads_rate_is_in_units_of_the_score_whatever_the_states_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    features, error = (torch.randn(6, n, generator=generator) for n in (20, 3))
    moved = []
    for scale in (1.0, 1000.0):
        head = ExactHead.for_labels(3, 20)
        head.learn(slice(None), error, features * scale)
        head.forget()  # a step that was cut leaves nothing
        for rows in (slice(0, 2), slice(2, 3)):  # tiles of the vocabulary see the same positions
            head.learn(rows, error[:, rows], features * scale)
        head.update(0.5)
        mean = float(features.abs().sum(1).mean()) * scale
        close(head.delta.abs(), torch.full((3, 20), 0.5 / mean), atol=0.0, rtol=1e-4)
        head.gradient += scale
        head.update(0.5)
        moved.append(features * scale @ head.delta.T)
    close(moved[1], moved[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_gradient_that_is_not_finite_leaves_the_head_as_it_was(bad: float) -> None:
    head = ExactHead.for_labels(3, 20)
    head.gradient.fill_(0.5)
    head.update(0.01)
    before = {name: tensor.clone() for name, tensor in head.tensors().items()}
    head.gradient[1, 2] = bad
    head.update(0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in head.tensors().items())
    assert not head.gradient.any()


def _bits(head: ExactHead) -> str:
    return saved_sha256(Saved.of(name, tensor) for name, tensor in head.tensors().items())


def test_a_saved_head_goes_on_with_the_same_bits() -> None:
    def steps(head: ExactHead, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            head.gradient += torch.randn(head.delta.shape, generator=generator)
            head.update(0.01)

    first, second = (ExactHead.for_vocabulary(30, 20, 4, seed=1) for _ in range(2))
    steps(first, seed=0)
    second.load({name: tensor.clone() for name, tensor in first.tensors().items()})
    steps(first, seed=1)
    steps(second, seed=1)
    assert _bits(first) == _bits(second)
