"""What the first computation brings into memory, brought before the process is measured.

The first product, softmax or exponential touches pages of PyTorch's libraries, starts threads and makes their buffers:
10 to 25 MB, by the processor, by the builds of PyTorch and its libraries, and by what lies in the page cache. A plan
that starts from the process after such a first use counts little of it by a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 64  # of the small tensors
PARALLEL = 1 << 16  # elements of which PyTorch gives each thread a share


def compute_once(dtype: torch.dtype) -> None:
    """Compute small tensors with the operations of a step, in fp32 and in ``dtype``. Leaves no tensor."""
    with torch.no_grad():
        torch.zeros(PARALLEL).add_(1)  # the threads
        for one in {torch.float32, dtype}:
            _block(torch.full((SIZE, SIZE), 0.5, dtype=one))
        _scores(torch.full((SIZE, SIZE), 0.5))


def _block(x: Tensor) -> None:
    """The operations of a block: norms, products, attention, activations."""
    (x.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * x).to(x.dtype)
    for product in (x @ x, x @ x.T):
        functional.silu(product).mul_(product)
    heads = x.reshape(1, 1, SIZE, SIZE)
    functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.cat([x[torch.arange(4)], functional.embedding(torch.arange(4), x)])


def _scores(x: Tensor) -> None:
    """The operations on scores: losses, their order, accuracy."""
    functional.cross_entropy(x, torch.arange(SIZE))
    torch.logsumexp(x, -1)
    torch.softmax(x, -1).argmax(-1)
    torch.topk(x, 2)
    torch.sort(x[0], stable=True)
