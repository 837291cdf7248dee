"""The Triton kernels, run by Triton's interpreter on a CPU (conftest.py): noise, updates, codes have the CPU's bits.

On a GPU the same tests compile them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton_place  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from workshop import SIGMA, Workshop, make_examples, of

from edgezo.data.batches import collate
from edgezo.machine import gpu_kernels
from edgezo.machine.gpu_kernels import SignRows
from edgezo.weights.fused_update import fusible
from edgezo.weights.layouts import Dense, Int4, Int8, moved, place
from edgezo.weights.saved import saved_tensors
from edgezo.weights.store import WeightStore
from edgezo.zo import noise
from edgezo.zo.directions import DIRECTION_KINDS
from edgezo.zo.noise import Key, exact_grid
from edgezo.zo.recipe import Recipe

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEY = Key(2**63 + 12345, 7)
FLOATS = [torch.float32, torch.bfloat16]
few = settings(max_examples=6, deadline=None)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def made(table, address: tuple[int, ...], rows: slice | Tensor, width: int) -> Tensor:
    return gpu_kernels.noise_of(address, noise._table_on(table, DEVICE), rows, width).cpu()


# ------------------------------------------------------------------------------- noise


@given(
    seed=st.integers(-(2**63), 2**64),
    step=st.integers(0, 2**40),
    tensor=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 11),
    start=st.integers(0, 2**33),
    count=st.integers(0, 3),
    width=st.integers(1, 530),
)
@few
def test_noise_has_the_bits_of_the_cpu(seed, step, tensor, stream, start, count, width):
    key, rows = Key(seed, step), slice(start, start + count)
    address = noise.address_of(key, tensor, stream)
    assert torch.equal(
        made(noise.sign_table, address, rows, width),
        noise.signs(key, tensor, stream, rows, width),
    )
    width = -(-width // 8)
    for table, draw in (
        (noise.normal_table, noise.normals),
        (noise.uniform_table, noise.uniform),
    ):
        wanted = draw(key, tensor, stream, rows, width)
        assert torch.equal(made(table, address, rows, width), wanted)


def test_rows_in_any_order_are_those_rows():
    address, rows = noise.address_of(KEY, 5, noise.DENSE), torch.tensor([70000, 3, 9])
    wanted = noise.signs(KEY, 5, noise.DENSE, rows, 257)
    assert torch.equal(made(noise.sign_table, address, rows, 257), wanted)


# ------------------------------------------------------------------------------- the forward


def _signed(width: int, slots: list[int], scale: float = 1.0) -> tuple[SignRows, Tensor]:
    """Signs that a kernel makes, and those signs."""
    numbers = torch.tensor(slots)
    drawn = SignRows(noise.address_of(KEY, 9, noise.ROW), numbers.to(DEVICE), width, scale)
    return drawn, scale * noise.signs(KEY, 9, noise.ROW, numbers, width).double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [3, 256, 301])
def test_signed_dots(dtype, width):
    n, generator = 19, torch.Generator().manual_seed(width)
    x = torch.randn(n, width, generator=generator).to(dtype)
    example = torch.randint(0, 3, (n,), generator=generator)
    side = torch.where(torch.arange(n) < 10, 0.5, -0.5).to(dtype)
    drawn, signs = _signed(width, [4, 0, 17], 3.0)
    out = gpu_kernels.signed_dots(*on_device(x, example, side), drawn).cpu()
    wanted = side.double() * (x.double() * signs[example]).sum(1)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize(("m", "k"), [(5, 3), (259, 0)])
def test_add_signed(dtype, read, m, k):
    n, generator = 17, torch.Generator().manual_seed(m)
    y, left, right, weight = (
        torch.randn(size, generator=generator) for size in ((n, m), (n, k), (k, m), (n,))
    )
    example = torch.randint(0, 2, (n,), generator=generator)
    drawn, signs = _signed(m, [6, 2], 0.25)
    whole = torch.zeros(n, m + 3, dtype=dtype, device=DEVICE)  # y is some of its columns
    whole[:, :m] = y.to(DEVICE)
    part, before = whole[:, :m], whole[:, :m].double().cpu()
    gpu_kernels.add_signed(part, *on_device(left, right, weight, example), drawn, read=read)
    wanted = left.double() @ right.double() + weight.double()[:, None] * signs[example]
    wanted += before if read else 0.0
    tolerance = 2**-8 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(part.double().cpu(), wanted, rtol=tolerance, atol=tolerance / 4)
    assert not whole[:, m:].any()
    gpu_kernels.add_signed(part, *on_device(left, right), read=False)
    wanted = left.double() @ right.double()
    torch.testing.assert_close(part.double().cpu(), wanted, rtol=tolerance, atol=tolerance / 4)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", [of("llama", "full"), of("gpt2", "lowrank+norms")], ids=str)
def test_losses_are_close_to_those_without_kernels(workshop, case, monkeypatch):
    model, batch = workshop.model(case), collate(make_examples("label", False)[:2], range(2))
    losses = []
    for with_kernels in (False, True):
        monkeypatch.setattr(gpu_kernels, "usable", lambda device, answer=with_kernels: answer)
        losses.append(model.losses(batch, model.probe(batch, KEY, SIGMA), sides=2)[0])
    assert not torch.equal(losses[1][0], losses[1][1])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- codes and planes

# Numbers at which rounding is hard: ties, ends of binades, the smallest and the largest.
HARD = [
    0.0,
    -0.0,
    1.0,
    1.00390625,
    1.01171875,
    -2.0,
    1.9999999,
    1e-38,
    2**-133,
    3e-41,
    -1e-45,
    3e38,
]


def _values(n: int, seed: int = 0) -> Tensor:
    """(n,) fp32 of all sizes, the hard ones first."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(-40, 40, (n,), generator=generator)
    drawn = torch.ldexp(torch.randn(n, generator=generator), size)
    drawn[: len(HARD)] = torch.tensor(HARD)[:n]
    return drawn


def test_a_plane_is_written_and_read_with_the_bits_of_the_cpu():
    values = _values(1500).reshape(3, 500)
    layout = Dense(torch.zeros(3, 500, dtype=torch.bfloat16), rounding="plane")
    layout.write(slice(0, 3), values)
    assert layout.low is not None
    high, low, read = on_device(layout.values * 0, layout.low * 0, values * 0)
    gpu_kernels.plane("write", values.to(DEVICE), high, low)
    assert torch.equal(high.cpu(), layout.values) and torch.equal(low.cpu(), layout.low)
    gpu_kernels.plane("read", high, low, read)
    assert torch.equal(read.cpu(), layout.read(slice(0, 3)))
    (snapped,) = on_device(values.clone())
    gpu_kernels.plane("snap", snapped)
    assert torch.equal(snapped.cpu(), layout.snap(values.clone(), KEY, 1, slice(0, 3)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_expanded_with_the_bits_of_the_cpu(dtype):
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(3))
    int8, int4 = Int8.quantise(weight), Int4.quantise(weight)
    out = torch.empty(6, 96, dtype=dtype, device=DEVICE)
    gpu_kernels.expand_int8(*on_device(int8.codes, int8.scale), out)
    assert torch.equal(out.cpu(), int8.expand(slice(0, 6), torch.empty(6, 96, dtype=dtype)))
    wanted = int4.expand(slice(0, 6), torch.empty(6, 96, dtype=dtype))
    for half, nibble in ((slice(0, 3), 0), (slice(3, 6), 4)):
        parts = on_device(int4.scale[half], int4.shift[half])
        gpu_kernels.expand_int4(int4.packed.to(DEVICE), nibble, *parts, out[half])
    assert torch.equal(out.cpu(), wanted)


# ------------------------------------------------------------------------------- updates


def _updated(directions: str, precision: str, cols: int, recipes: list[Recipe]) -> WeightStore:
    """A store with one trained matrix, after some steps."""
    weight = torch.randn(35, cols, generator=torch.Generator().manual_seed(cols)) * 0.1
    store = WeightStore(2**40 + 5, 8, DIRECTION_KINDS[directions], DEVICE)
    rounding = "plane" if precision == "bf16" else None
    layout = place(weight, precision, table=False, rounding=rounding, trained=True)
    store.train("w", moved(layout, DEVICE))
    store.apply(recipes)
    return store


def _recipes(size: int, decay: float) -> list[Recipe]:
    draw = np.random.default_rng(size)
    return [Recipe(3, exact_grid(draw.normal(size=size) * 1e-2), decay)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("directions", ["signs", "rademacher", "gaussian", "shared"])
def test_updates_have_the_bits_of_the_cpu(directions, precision, monkeypatch):
    cols, size, decay = (7, 19, 0.0) if precision == "fp32" else (260, 3, 1e-3)
    recipes = _recipes(size, decay)
    wanted = saved_tensors(_updated(directions, precision, cols, recipes))
    monkeypatch.setattr(gpu_kernels, "usable", lambda device: True)
    store = _updated(directions, precision, cols, recipes)
    assert fusible(store, store.trainables["w"], recipes)
    for one, other in zip(saved_tensors(store), wanted, strict=True):
        assert list(map(bytes, one.bytes())) == list(map(bytes, other.bytes()))
