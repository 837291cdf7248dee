"""Small tensors on their way to a GPU: from locked memory, so that neither the process nor the GPU waits for them."""

from __future__ import annotations

import torch
from torch import Tensor


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """``x``, which lies in the RAM, on ``device``; on a GPU the copy is queued behind what is computed there."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
