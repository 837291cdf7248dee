"""``edgezo doctor --calibrate``: what a plan counts with for a GPU, measured on the user's card within a minute."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

import torch

from edgezo.errors import EdgezoError
from edgezo.machine.clock import now_s
from edgezo.machine.gpu_figures import GpuFigures, rounded_up
from edgezo.machine.hardware import Gpu

# Sizes of a laptop's card: everything together takes less than 300 MB of it.
_TOKENS, _WIDTH, _INNER = 2048, 2048, 8192
_COPIED_BYTES = 64 << 20
_LEAST_S = 0.5  # for so long each rate is measured
_LAUNCHES = 60  # kernels that a block of a step launches, about


def calibrated(gpu: Gpu) -> GpuFigures:
    """Measure the card. To be called before anything else has used it in this process.

    ``gpu.available_bytes`` is what was free before. Raises EdgezoError where PyTorch cannot use the card, or where it
    was used already.
    """
    if not torch.cuda.is_available():
        raise EdgezoError(
            f"PyTorch cannot use the {gpu.name}: nothing was measured. See edgezo doctor."
        )
    if torch.cuda.is_initialized():
        raise EdgezoError(
            "this process has used the GPU already, so the driver's context cannot be measured: call it in a new one."
        )
    device = torch.device("cuda", 0)
    x = torch.randn(_TOKENS, _WIDTH, device=device, dtype=torch.bfloat16)
    w = torch.randn(_INNER, _WIDTH, device=device, dtype=torch.bfloat16)
    before_bytes = torch.cuda.memory_allocated()
    y = x @ w.T
    workspace_bytes = torch.cuda.memory_allocated() - before_bytes - y.nbytes
    _load_kernels(x)
    context_bytes = _taken_by_driver(gpu)
    flops = 2 * _TOKENS * _WIDTH * _INNER
    flops_s = flops / _each_s(lambda: torch.mm(x, w.T, out=y))
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in streams:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    copying_bytes = max(0, _taken_by_driver(gpu) - context_bytes)
    copy_bytes_s = _COPIED_BYTES / _each_s(lambda: target.copy_(source, non_blocking=True))
    small = torch.zeros(1, device=device)
    return rounded_up(
        GpuFigures(
            card=gpu.name,
            source=f"{date.today()}, edgezo doctor --calibrate, torch {torch.__version__}",
            context_bytes=context_bytes,
            workspace_bytes=max(0, workspace_bytes),
            copying_bytes=copying_bytes,
            flops_s=flops_s,
            copy_bytes_s=copy_bytes_s,
            block_s=_LAUNCHES * _each_s(lambda: small.add_(1)),
        )
    )


def _load_kernels(x: torch.Tensor) -> None:
    """Run the operations of a step once: the driver keeps the code of each kernel that was used."""
    from edgezo.machine import gpu_kernels

    heads = x.view(1, _TOKENS, 32, -1).transpose(1, 2)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    for dtype in (torch.float32, torch.bfloat16):
        part = x[:64, :64].to(dtype).contiguous()
        part.addmm_(part, part).mul_(2).sub_(part).add_(1).float().exp().sum(-1)
        part.round().clamp_(-1, 1).abs().floor().sqrt()
        torch.where(part > 0, part, 0.0)
        part[torch.arange(3, device=x.device)].index_put_(
            (torch.zeros(1, dtype=torch.int64, device=x.device),), part[:1], accumulate=True
        )
        torch.nn.functional.silu(part).softmax(-1).argmax(-1)
    if gpu_kernels.usable(x.device):
        low = torch.zeros(64, 64, dtype=torch.int8, device=x.device)
        high = torch.zeros(64, 64, dtype=torch.bfloat16, device=x.device)
        gpu_kernels.plane("read", high, low, torch.empty(64, 64, device=x.device))
    torch.cuda.synchronize()


def _taken_by_driver(gpu: Gpu) -> int:
    """Bytes that this process takes of the card beside what PyTorch's allocator has reserved."""
    torch.cuda.synchronize()
    return gpu.available_bytes - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()


def _each_s(work: Callable[[], object]) -> float:
    """Seconds of one call, of as many as are made in ``_LEAST_S``."""
    work()
    torch.cuda.synchronize()
    begun_s, count = now_s(), 0
    while now_s() - begun_s < _LEAST_S:
        for _ in range(8):
            work()
        torch.cuda.synchronize()
        count += 8
    return max(now_s() - begun_s, 1e-9) / count
