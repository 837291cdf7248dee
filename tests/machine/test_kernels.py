"""The C kernels: noise, codes and updates have torch's bits; forwards are equal but for rounding."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile
from workshop import KEY, SIGMA, Case, Workshop, make_examples, of

from edgezo.data.batches import collate
from edgezo.machine import kernel_library, kernels, limits, matmul
from edgezo.machine.hardware import kernels_library
from edgezo.network import packing
from edgezo.network.fused import FusedGate, FusedNorm, activation_of
from edgezo.weights.layouts import Dense, Int4, Int8
from edgezo.zo import noise
from edgezo.zo.noise import Key

with_library = pytest.mark.skipif(not kernels.loaded(), reason="installed without C kernels")
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], object]:
    """A function that runs what it is given without the C kernels."""

    def run(something: Callable[[], object]) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_library", lambda: None)
            return something()

    return run


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_what_was_compiled_is_of_this_source_and_loads():
    assert kernels.loaded() == (kernels_library() is not None)


@with_library
def test_what_was_compiled_of_another_source_is_left_alone(tmp_path, monkeypatch):
    library = kernels_library()
    assert library is not None
    for name, more in ((library.name, b""), ("kernels.c", b"/* changed */")):
        (tmp_path / name).write_bytes(library.with_name(name).read_bytes() + more)
    monkeypatch.setattr(kernel_library, "kernels_library", lambda: tmp_path / library.name)
    kernels._library.cache_clear()
    assert not kernels.loaded()
    kernels._library.cache_clear()


@with_library
def test_a_forked_child_makes_noise_alone(tmp_path):
    """Otherwise OpenMP would wait for the parent's threads for ever."""
    code = """
import os, torch
from edgezo.zo import noise
from edgezo.zo.noise import Key
torch.set_num_threads(2)
torch.ones(1000, 1000).add_(1)
def made():
    return noise.signs(Key(1, 2), 3, 4, slice(0, 200), 1000).numpy().tobytes()
before = made()
child = os.fork()
if not child:
    os._exit(made() != before)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@with_library
def test_another_default_dtype_changes_nothing():
    x, basis = torch.randn(300, 64), torch.randn(3, 64)
    wanted = (
        kernels.thin_product(x, basis),
        kernels.dots_by_example(x, basis, torch.zeros(300, dtype=torch.int64)),
    )
    torch.set_default_dtype(torch.float64)
    try:
        results = (
            kernels.thin_product(x, basis),
            kernels.dots_by_example(x, basis, torch.zeros(300, dtype=torch.int64)),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(results, wanted, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_the_environment_turns_them_off(monkeypatch):
    kernels._library.cache_clear()
    monkeypatch.setenv("EDGEZO_KERNELS", "0")
    assert not kernels.loaded()
    kernels._library.cache_clear()


# ------------------------------------------------------------------------------- equal bits


@with_library
@given(
    seed=st.integers(-(2**63), 2**64),
    step=st.integers(0, 2**40),
    first=st.integers(0, 2**33),
    count=st.integers(1, 70),
    width=st.sampled_from([1, 15, 16, 17, 64, 255, 256, 257, 576, 1500]),
)
def test_noise_has_the_bits_of_numpys_words(seed, step, first, count, width):
    rows, key = slice(first, first + count), Key(seed, step)
    for make in (noise.signs, noise.normals, noise.uniform):
        drawn = make(key, seed, noise.DENSE, rows, width)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_library", lambda: None)
            wanted = make(key, seed, noise.DENSE, rows, width)
        assert drawn.dtype == wanted.dtype and torch.equal(drawn, wanted)


@with_library
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize("rows", [slice(0, 300), slice(120, 171), torch.tensor([5, 0, 299])])
def test_codes_expand_to_the_same_bits(dtype, rows, without, threads):
    weight = torch.randn(300, 576, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3] *= 1e-36
    for layout in (Int8.quantise(weight), Int4.quantise(weight)):

        def expanded(layout: Int8 | Int4 = layout) -> Tensor:
            n = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
            return layout.expand(rows, torch.empty(n, 576, dtype=dtype))

        assert torch.equal(expanded(), without(expanded))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", [Int8, Int4])
def test_without_kernels_codes_expand_in_small_pieces(dtype, stored, without):
    # 4 MB in bf16; of a product of bf16 and fp32 torch makes fp32 copies, which would be 8 MB each.
    layout, out = stored.quantise(torch.randn(1024, 2048)), torch.empty(1024, 2048, dtype=dtype)
    with profile(profile_memory=True) as took:
        without(lambda: layout.expand(slice(0, 1024), out))
    taken = [event.cpu_memory_usage for event in took.events()]
    codes_bytes = 512 * 2048  # of int4 the half of the rows whose codes lie in the same bits
    assert max(taken) <= (
        codes_bytes if stored is Int4 else 4 * limits.TILE_BYTES // limits.EXPAND_BYTES
    )


def _hard_weights() -> Tensor:
    """Weights with zeros of both signs, denormals, powers of two, halves between bf16 values, and a wide range."""
    weight = torch.randn(40, 577, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0, :8] = torch.tensor([0.0, -0.0, 1.0, 1e-39, -1e-40, 2**-126, 1.00390625, 1.01171875])
    weight[1] *= 1e-37
    weight[2] *= 1e22
    return weight


@with_library
def test_planes_move_by_the_same_bits(without, threads):
    weight = _hard_weights()

    def moved() -> list[Tensor]:
        layout = Dense(weight.bfloat16(), rounding="plane")
        size = torch.Generator().manual_seed(1)
        for _ in range(10):
            for rows in (slice(0, 17), slice(17, 40), torch.tensor([3, 39, 1])):
                values = layout.read(rows)
                factor = 10 ** torch.randn(values.shape, generator=size).clamp(-2, 1)
                values = layout.snap(values.sub_(weight[rows] * factor * 1e-3), KEY, 3, rows)
                layout.write(rows, values)
                assert torch.equal(layout.read(rows), values)
        return list(layout.tensors().values())

    for ours, theirs in zip(moved(), without(moved), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# ------------------------------------------------------------------------- equal to rounding


def _off(result: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The largest distance from ``exact`` in roundings of ``dtype``; below 1 in roundings of numbers around 1."""
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=1)
    return float(((result.double() - exact) / unit).abs().max())


@with_library
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("each", [False, True], ids=["one weight", "a weight a row"])
def test_a_norm_is_off_by_one_rounding(dtype, each, threads):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 75, generator=generator).mul_(3).to(dtype)
    for weight_dtype in {dtype, torch.float32}:
        weight = torch.randn(*([700] if each else []), 75, generator=generator).to(weight_dtype)
        result = kernels.rms_norm(x[None], weight, 1e-5, 1.0)
        assert result is not None and result.shape == (1, *x.shape)
        exact = x.double() / x.double().pow(2).mean(1, keepdim=True).add(1e-5).sqrt()
        assert _off(result[0], exact * (weight.double() + 1), dtype) < 4


@with_library
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [0, 1])
def test_a_gate_is_off_by_one_rounding(dtype, activation, threads):
    x = torch.cat([torch.linspace(-100, 100, 90_001), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    x, up = x.to(dtype), torch.linspace(-3, 2, 90_005).to(dtype)
    exact = kernels.GATE_ACTIVATIONS[activation](x.double()) * up.double()
    result = kernels.gate(x, up.clone(), activation)
    assert _off(result, exact, dtype) < 4


@with_library
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 9), (False, 40)])
@pytest.mark.parametrize("heads, kv_heads, dim", [(6, 2, 8), (3, 3, 80), (4, 1, 64)])
def test_attention_is_that_of_each_row_alone(dtype, causal, window, heads, kv_heads, dim, threads):
    lengths = (1, 37, 4, 130, 33, 2, 32)
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 1), (kv_heads, 2), (kv_heads, 1)]  # keys scaled up: some weights near 0 and 1
    q, k, v = (
        torch.randn(sum(lengths), h, dim, generator=generator).mul_(s).to(dtype) for h, s in shapes
    )
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    # A row of the projection may be wider than the heads that are read.
    room = torch.zeros(len(q), heads + 3, dim, dtype=dtype)
    room[:, :heads] = q
    result = kernels.attention(room[:, :heads], k, v, starts, max(lengths), 0.3, causal, window)
    assert result is not None
    for row, length in enumerate(lengths):
        tokens = slice(int(starts[row]), int(starts[row + 1]))
        place = torch.arange(length)
        distance = place[:, None] - place
        seen = (distance >= 0) if causal else torch.ones(length, length, dtype=torch.bool)
        seen = seen & (distance.abs() < window) if window else seen

        def plain(dtype: torch.dtype, tokens: slice = tokens, seen: Tensor = seen) -> Tensor:
            rows = [t[tokens].to(dtype).transpose(0, 1) for t in (q, k, v)]
            how = {"attn_mask": seen, "scale": 0.3, "enable_gqa": True}
            return F.scaled_dot_product_attention(*rows, **how).transpose(0, 1)

        exact = plain(torch.float64)
        # fp32 inside: as far off as torch's fp32, and a rounding to bf16.
        inside = _off(plain(torch.float32), exact, torch.float32)
        allowed = 4 * inside + 2 if dtype is torch.float32 else 2
        assert _off(result[tokens], exact, dtype) < allowed


@with_library
@pytest.mark.parametrize("dtype", FLOATS)
def test_positions_turn_queries_in_place_by_one_rounding(dtype, threads):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(1, 700, 7, 24, generator=generator).to(dtype)
    x = wide[:, :, :5].transpose(1, 2)  # (1, heads, n, dim), beside what is not to be touched
    cos, sin = torch.randn(2, 1, 700, 24, generator=generator).to(dtype)
    one, two = x.double().chunk(2, -1)
    exact = x.double() * cos.double() + torch.cat([-two, one], -1) * sin.double()
    beside = wide[:, :, 5:].clone()
    assert kernels.rotate(x, cos, sin)
    assert _off(x, exact, dtype) < 4
    assert torch.equal(wide[:, :, 5:], beside)
    assert not kernels.rotate(x.contiguous(), cos, sin)  # head by head
    assert not kernels.rotate(x, cos[..., :12].contiguous(), sin[..., :12].contiguous())


@with_library
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "n, m, r", [(700, 75, 8), (5, 7, 3), (133, 576, 21), (64, 32, 8), (1, 1, 1)]
)
def test_sums_over_tokens_are_exact_to_fp32(dtype, n, m, r, threads):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, m, generator=generator).to(dtype)
    left = torch.randn(n, r, generator=generator)
    total = kernels.thin_sum(left, x)
    assert total is not None and total.shape == (r, m) and total.dtype is torch.float32
    exact = left.double().T @ x.double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(matmul.thin_sum(left, x), total)
    assert kernels.thin_sum(left.double(), x) is None


@with_library
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, d, m, k", [(700, 75, 96, 8), (5, 7, 5, 3), (33, 576, 100, 21)])
def test_thin_products_are_rounded_once(dtype, n, d, m, k, threads):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, basis, y = drawn(n, d), drawn(k, d), drawn(n, m)
    cols, rows, side = drawn(4, d).sign(), drawn(4, m).sign(), drawn(n, dtype=torch.float32)
    example = torch.randint(0, 4, (n,), generator=generator)
    left = kernels.thin_product(x, basis)
    assert left is not None and left.dtype is torch.float32
    torch.testing.assert_close(left.double(), x.double() @ basis.double().T, rtol=1e-5, atol=1e-4)
    by_example = matmul.dots_by_example(x, cols, example, torch.empty(0), side)
    assert isinstance(by_example, matmul.ByExample)
    exact_values = (x.double() * cols.double()[example]).sum(1) * side
    torch.testing.assert_close(by_example.values.double(), exact_values, rtol=1e-5, atol=1e-4)

    right, other = drawn(m, k, dtype=torch.float32).T, matmul.ByExample(side, example)
    terms: list[matmul.Term] = [(left, right), (by_example, rows), (other, rows)]
    for count, roundings in ((1, 1), (2, 1), (3, 2)):
        exact = y.double() + left.double() @ right.double()
        for term in (by_example, other)[: count - 1]:
            exact += term.values.double()[:, None] * rows.double()[example]
        result = y.clone()
        matmul.add_thin(result, terms[:count])
        if dtype is torch.bfloat16:
            assert _off(result, exact, dtype) < roundings
        else:
            torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-3)


def test_terms_without_kernels_are_one_product(without):
    generator = torch.Generator().manual_seed(0)
    x, cols, rows = (torch.randn(*s, generator=generator) for s in ((9, 20), (3, 20), (3, 12)))
    example = torch.randint(0, 3, (9,), generator=generator)
    side = torch.randn(9, generator=generator)
    mask = F.one_hot(example, 3) * side[:, None]

    def added() -> Tensor:
        y = torch.zeros(9, 12)
        left = torch.ones(9, 2)
        by_example = matmul.dots_by_example(x, cols, example, mask, side)
        matmul.add_thin(y, [(left, rows[:2]), (by_example, rows)])
        matmul.add_thin(y, [])
        return y

    exact = rows[:2].sum(0) + ((x @ cols.T) * mask) @ rows
    for result in (added(), without(added)):
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-5)


@with_library
def test_what_they_cannot_take_is_left_to_torch():
    x, w = torch.randn(4, 64), torch.randn(64)
    assert kernels.rms_norm(x.half(), w.half(), 1e-5, 0.0) is None
    assert kernels.rms_norm(torch.randn(64, 4).T, w, 1e-5, 0.0) is None
    assert kernels.rms_norm(x.requires_grad_(), w, 1e-5, 0.0) is None
    with torch.no_grad():
        assert kernels.rms_norm(x, w, 1e-5, 0.0) is not None
    rows = torch.randn(5, 2, 8, requires_grad=True)
    starts = torch.tensor([0, 5])
    assert kernels.attention(rows, rows, rows, starts, 5, 1.0, True, None) is None
    head_first = torch.randn(2, 5, 8).transpose(0, 1)
    assert kernels.attention(head_first, head_first, head_first, starts, 5, 1.0, True, None) is None
    up = torch.randn(4, 64, requires_grad=True)
    kernels.gate(torch.ones(4, 64), up, 0).sum().backward()
    assert up.grad is not None


# --------------------------------------------------------------------------- whole models


@with_library
@pytest.mark.parametrize("train", ["lowrank", "full"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "roberta"]
)
def test_losses_are_equal_to_rounding(family, train, workshop: Workshop, without, monkeypatch):
    case = of(family, train)
    called: set[str] = set()
    for name in ("rms_norm", "attention", "rotate", "thin_product"):
        kernel = getattr(kernels, name)

        def counted(
            *given: object, kernel: Callable[..., object] = kernel, name: str = name
        ) -> object:
            result = kernel(*given)
            called.update([] if result is None or result is False else [name])
            return result

        monkeypatch.setattr(kernels, name, counted)

    def losses() -> tuple[Tensor, ...]:
        model = workshop.model(case)
        batch = collate(
            examples := make_examples(case.kind, family == "roberta"), range(len(examples))
        )
        probe = model.probe(batch, KEY, SIGMA)
        return model.losses(batch)[0], model.losses(batch, probe, sides=2)[0]

    with_kernels, wanted = losses(), without(losses)
    for ours, theirs in zip(with_kernels, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    expected = {"rms_norm", "attention", "rotate"} | (
        {"thin_product"} if train == "lowrank" else set()
    )
    if family == "gemma2":  # its scores are capped
        expected -= {"attention"}
    if family == "roberta":  # layer norms, positions that are learned
        expected -= {"rms_norm", "rotate"}
    assert called == expected


@with_library
def test_which_parts_of_a_model_have_kernels(workshop: Workshop):
    def kinds(case: Case) -> dict[str, int]:
        modules = list(workshop.model(case).module.modules())
        gates = sum(isinstance(m, FusedGate) for m in modules)
        return {"gates": gates, "norms": sum(isinstance(m, FusedNorm) for m in modules)}

    assert kinds(of("llama", "lowrank")) == {"gates": 2, "norms": 5}
    assert kinds(of("gemma3_text", "lowrank")) == {"gates": 3, "norms": 3 * 6 + 1}
    assert kinds(of("opt", "lowrank")) == {"gates": 0, "norms": 0}


def test_a_part_that_does_more_is_no_gate():
    class Scaled(torch.nn.Module):
        def __init__(self, scale: float):
            super().__init__()
            self.gate_proj = self.up_proj = self.down_proj = torch.nn.Linear(2, 2)
            self.act_fn, self.scale = F.silu, scale

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.scale)

    assert activation_of(Scaled(1.0)) is None  # asks for what a gate does not have

    class Plain(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    part = Plain(1.0)
    assert activation_of(part) == 0
    part.act_fn = lambda x: F.gelu(x, approximate="tanh")
    assert activation_of(part) == 1
    part.act_fn = F.relu
    assert activation_of(part) is None
    assert activation_of(SimpleNamespace(act_fn=F.silu)) is None  # type: ignore[arg-type]


@with_library
def test_long_rows_are_left_to_torch(monkeypatch):
    lengths = (40, 12)
    monkeypatch.setattr(kernels, "LONGEST", 39)
    q = torch.randn(sum(lengths), 2, 16)
    with packing.packed(packing.Packing.of(lengths)):
        heads_first = q.transpose(0, 1)[None]
        module = torch.nn.Module()
        by_torch, _ = packing.packed_attention(module, heads_first, heads_first, heads_first, None)
        monkeypatch.setattr(kernels, "LONGEST", 40)
        by_kernel, _ = packing.packed_attention(module, heads_first, heads_first, heads_first, None)
    torch.testing.assert_close(by_torch, by_kernel, rtol=1e-5, atol=1e-5)


@given(st.binary(max_size=700), st.integers(0, 15), st.integers(0, 2**32 - 1))
def test_checksums_are_those_of_zlib_wherever_the_bytes_begin(data, offset, start):
    view = memoryview(bytearray(offset) + data)[offset:]
    assert kernels.crc32(view, start) == zlib.crc32(data, start)


@pytest.mark.parametrize("row_bytes", [0, 1, 4, 16, 63, 64, 130, 4096])
@pytest.mark.parametrize("library", [True, False])
def test_every_row_has_its_checksum(row_bytes, library, threads, without):
    rows = np.random.default_rng(0).integers(0, 256, (70, row_bytes), dtype=np.uint8)
    run = (lambda work: work()) if library else without
    sums = run(lambda: kernels.crc32_rows(rows))
    assert sums.dtype == np.uint32 and sums.tolist() == [zlib.crc32(row.tobytes()) for row in rows]
