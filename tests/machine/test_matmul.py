"""Products made in pieces of a few sizes: the values are those of one product, and shapes are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Bench
from test_lora import learn, opened
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workshop import KEY, LOW, SIGMA, Tried, Workshop, cases, make_examples, of

from edgezo.data.batches import Example, collate, micro_batches
from edgezo.data.tasks import Generation
from edgezo.machine import matmul
from edgezo.machine.limits import PRODUCT_ROWS, TILE_BYTES
from edgezo.machine.matmul import addmm_, along, mm, pieces
from edgezo.network.generate import generate
from edgezo.network.perturb import EXPANDED, Context
from edgezo.weights.saved import load_trained


@pytest.fixture
def bf16():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).bfloat16()


def test_pieces_cover_the_rows_once_and_only_the_last_is_not_full():
    for n in range(1, 5000, 7):
        cover = list(pieces(n))
        starts = [at for at, _ in cover]
        assert starts == [sum(size for _, size in cover[:i]) for i in range(len(cover))]
        assert {size for _, size in cover} <= set(PRODUCT_ROWS)
        assert starts[-1] < n <= sum(size for _, size in cover)
        # Nothing cheaper: a row that is missing costs as much as one that is there.
        if n <= PRODUCT_ROWS[-1]:
            above = min(size for size in PRODUCT_ROWS if size >= n)
            spent = sum(size + matmul.CALL_ROWS for _, size in cover)
            assert n < spent <= above + matmul.CALL_ROWS


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 200, 700, 1039, 2111])
@pytest.mark.parametrize("k, m", [(48, 96), (96, 5), (7, 96), (576, 192)])
def test_values_are_those_of_one_product(bf16, n, k, m):
    x, w, y = bf16(n, k), bf16(m, k), bf16(n, m)
    exact = x.double() @ w.T.double()
    # A bf16 result is rounded once, to 2^-9 of itself; sums of k products in fp32 are far closer.
    close = {"rtol": 2**-8, "atol": 2**-10}
    assert torch.allclose(mm(x, w.T).double(), exact, **close)
    whole = torch.full((n, m + 3), 9.0).bfloat16()
    assert mm(x, w.T, whole[:, 1 : m + 1]).data_ptr() == whole[:, 1:].data_ptr()
    assert torch.allclose(whole[:, 1 : m + 1].double(), exact, **close)
    assert (whole[:, 0] == 9).all() and (whole[:, m + 1 :] == 9).all()
    total = y.double() + exact
    assert torch.allclose(addmm_(y.clone(), x, w.T).double(), total, **close)
    # Each piece is rounded: to 2^-9 of a sum of k products, four standard deviations large at most.
    rounding = 2**-9 * 4 * k**0.5
    assert torch.allclose(along(w, x.T.contiguous()).double(), exact.T, rtol=2**-8, atol=rounding)


def test_a_row_does_not_depend_on_what_it_is_beside(bf16):
    x, w = bf16(300, 64), bf16(32, 64)
    x[:20] = float("nan")
    product = mm(x, w.T)
    assert product[:20].isnan().all() and product[20:].isfinite().all()
    assert mm(x[20:], w.T).isfinite().all()


def test_other_products_pass_whole():
    x, w = torch.randn(700, 8), torch.randn(5, 8)
    assert torch.equal(mm(x, w.T), torch.mm(x, w.T))
    assert torch.equal(addmm_(torch.ones(700, 5), x, w.T), torch.ones(700, 5).addmm_(x, w.T))
    assert torch.equal(along(x.T.contiguous(), x), x.T @ x)


def test_few_shapes_are_compiled_however_many_numbers_of_tokens_there_are(bf16, monkeypatch):
    seen = set()
    real = torch.mm

    def noted(a, b, **kwargs):
        seen.add((a.shape, b.shape))
        return real(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", noted)
    w = bf16(96, 64)
    for n in range(1, 2048, 13):
        mm(bf16(n, 64), w.T)
    assert len(seen) == len(PRODUCT_ROWS)
    seen.clear()
    for examples in range(1, 17):  # of a micro-batch
        mm(bf16(100, 64), bf16(examples, 64).T)
    assert len(seen) == 1


class Lengths(TorchDispatchMode):
    """Notes the lengths and strides of all that bf16 products read while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in args if isinstance(a, Tensor)]
        if func.overloadpacket.__name__ in PRODUCTS and given[0].dtype == torch.bfloat16:
            for a in given:
                self.seen |= {
                    n for length, n in zip(a.shape, a.stride(), strict=True) if length > 1
                }
                self.seen |= set(a.shape)
        return func(*args, **(kwargs or {}))


PRODUCTS = (
    "mm",
    "addmm",
    "addmm_",
    "bmm",
    "baddbmm",
    "baddbmm_",
    "matmul",
    "linear",
    "mv",
    "addmv",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


@cases(LOW)
@pytest.mark.usefixtures("one_thread")
def test_bf16_products_have_the_same_few_shapes_and_strides_for_all_batches(
    tried: Tried, workshop: Workshop
) -> None:
    """A kernel is compiled for each shape and kept, so that memory would grow with every batch (machine/matmul.py)."""
    model = workshop.model(tried.case, torch.bfloat16)
    load_trained(model.store, tried.start)
    few, many, more = (
        make_examples(tried.case.kind, model.masked, n, seed)
        for seed, n in ((0, 1), (1, 16), (2, 16))
    )

    def lengths(examples: Sequence[Example], *sizes: int) -> set[int]:
        with Lengths() as mode:
            for part in (part for n in sizes for part in micro_batches(examples, n)):
                batch = collate([examples[slot] for slot in part], part)
                model.losses(batch, model.probe(batch, KEY, SIGMA), sides=2)
                model.losses(batch)
                model.take_touched(len(examples))
                model.store.take_guides(learn=False)
        return mode.seen

    known = lengths(few, 1) | lengths(many, 16)
    assert known & set(PRODUCT_ROWS)
    # Other rows in batches of the same and of other sizes.
    assert lengths(more, 16, 5) <= known | set(PRODUCT_ROWS) | {32, 48}  # or thin axes


@pytest.mark.parametrize("kind", ["label", "completion"])
@pytest.mark.parametrize("estimator", ["lora", "addax"])
@pytest.mark.usefixtures("one_thread")
def test_a_backward_pass_multiplies_few_shapes_whatever_the_rows_are(
    estimator: str, kind: str, bench: Bench
) -> None:
    more = {} if estimator == "lora" else {"train": "lowrank", "short_tokens": 1000}
    settled, model = opened(
        bench, kind, bf16_fast=True, estimator=estimator, precision="bf16", **more
    )
    rows = list(settled.dataset.train)

    def lengths(examples: Sequence[Example], size: int) -> set[int]:
        with Lengths() as mode:
            learn(model, examples, size, None)
        return mode.seen

    known = lengths(rows[:1], 1) | lengths(rows[:16], 16)
    assert known & set(PRODUCT_ROWS)
    for size in (16, 3, 5):
        assert lengths(rows[16:32], size) <= known | set(PRODUCT_ROWS) | {32, 48}


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the latter's scores are capped
@pytest.mark.usefixtures("one_thread")
def test_writing_multiplies_few_shapes_however_many_rows_there_are(
    family: str, workshop: Workshop
) -> None:
    case = replace(of(family, "lowrank", kind="completion", tied=False), precision="bf16")
    model = workshop.model(case, torch.bfloat16)
    numbers = np.random.default_rng(0)

    def lengths(*counts: int) -> set[int]:
        with Lengths() as mode:
            for n in counts:
                prompts = [
                    numbers.integers(5, 300, size).tolist() for size in numbers.integers(1, 9, n)
                ]
                generate(model, prompts, Generation(5), lambda ids: ids[-1] % 3 == 0)
        return mode.seen

    known = lengths(16, 16)
    assert lengths(3, 5, 7, 11, 13) <= known | set(PRODUCT_ROWS) | {32, 48}


def test_the_memory_of_a_tile_has_room_for_any_other():
    """A larger tile that comes later lies in the same memory, so that a smaller one leaves no hole."""
    context = Context(torch.bfloat16)
    context.keep_tile(TILE_BYTES)
    small = context.buffer(EXPANDED, 4, 8)
    large = context.buffer(EXPANDED, 1024, TILE_BYTES // 2048)
    assert small.data_ptr() == large.data_ptr() and large.nbytes == TILE_BYTES
