"""Baselines of ``bench speed``: a step of MeZO in place, and of GRZO in its published form, with stock PyTorch.

Batches are padded, and the head computes the logits of every position.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgezo.bench.alignment import plain_module
from edgezo.bench.memory_baselines import SIGMA, mezo_in_place
from edgezo.data.batches import Example
from edgezo.network.model import Model
from edgezo.run.session import Opened

PUBLISHED_STEPS = ("mezo-in-place", "grzo-hooks")


class Plain:
    """transformers' own module with the weights of a model of edgezo, and the baselines' steps on it.

    It computes in the dtype that the model computes in, which is bf16 where that is fast.
    """

    def __init__(self, opened: Opened, model: Model):
        self.module = plain_module(opened, model)
        self.module.set_attn_implementation("sdpa")
        self.dtype = model.context.dtype
        self.module.to(self.dtype)
        self.label_ids = torch.tensor(opened.dataset.label_ids)
        self.pad = opened.tokenizer.pad_token_id or 0
        self.linears = [m for n, m in self.module.named_modules() if _is_inner_linear(n, m)]
        self._mezo = mezo_in_place(
            list(self.module.parameters()), lambda group: self.losses(group).mean()
        )

    def time(self, name: str, group: Sequence[Example]) -> float:
        """Seconds of a baseline's step, ``name`` out of ``PUBLISHED_STEPS``."""
        begun_s = time.perf_counter()
        {"mezo-in-place": self._mezo, "grzo-hooks": self._hooked}[name](group)
        return time.perf_counter() - begun_s

    def losses(self, group: Sequence[Example]) -> Tensor:
        """Per-example losses (B,) fp32: cross-entropy over the label words."""
        rows = [torch.tensor(e.rows[0].ids) for e in group]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = self.module(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        words = logits[torch.arange(len(rows)), lengths - 1][:, self.label_ids].float()
        return F.cross_entropy(words, torch.tensor([e.label for e in group]), reduction="none")

    @torch.no_grad()
    def _hooked(self, group: Sequence[Example]) -> None:
        """GRZO's step as published (arXiv 2606.02857): y_i += sigma r_i * (U (s_i * x_i)) in a hook of every linear.

        U is as large as the weight. It is drawn again from its seed for each side and for the update.
        """
        generator = torch.Generator()
        b, seed = len(group), generator.seed()
        signs = {
            m: [torch.randint(0, 2, (b, n)).mul_(2).sub_(1).to(self.dtype) for n in m.weight.shape]
            for m in self.linears
        }

        def base(at: int, linear: nn.Linear) -> Tensor:
            return torch.empty_like(linear.weight).normal_(
                generator=generator.manual_seed(seed + at)
            )

        def hook(at: int, linear: nn.Linear, scale: float) -> Any:
            r, s = signs[linear]

            def change(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
                moved = F.linear(args[0] * s[:, None], base(at, linear))
                return out + scale * r[:, None] * moved

            return linear.register_forward_hook(change)

        losses = []
        for scale in (SIGMA, -SIGMA):
            hooks = [hook(at, linear, scale) for at, linear in enumerate(self.linears)]
            losses.append(self.losses(group))
            for each in hooks:
                each.remove()
        delta = (losses[0] - losses[1]) / 2
        a = (delta / (delta.std() + 1e-8)).to(self.dtype)
        for at, linear in enumerate(self.linears):
            r, s = signs[linear]
            g = base(at, linear).mul_((a[:, None] * r).T @ s)
            linear.weight.sub_(g, alpha=1e-9 / (2 * SIGMA * b))


def _is_inner_linear(name: str, module: nn.Module) -> bool:
    """Whether a module is a linear other than the head."""
    return isinstance(module, nn.Linear) and not name.endswith(("lm_head", "embed_out"))
