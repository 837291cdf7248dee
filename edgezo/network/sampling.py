"""Choosing a token: at random by its probability, with a seed, so that an answer can be had again."""

from __future__ import annotations

import torch
from torch import Tensor

from edgezo.errors import UsageError


class Sampler:
    """Draws tokens from a softmax at ``temperature``, of the likeliest tokens that have ``top_p`` together.

    The smallest set of tokens whose probability is at least ``top_p`` is kept (nucleus sampling, arXiv 1904.09751).
    Raises UsageError for numbers without a meaning.
    """

    def __init__(self, temperature: float, top_p: float, seed: int):
        if not 0 < temperature < float("inf"):
            raise UsageError(f"--temperature {temperature} is not above 0 (0 takes the likeliest)")
        if not 0 < top_p <= 1:
            raise UsageError(f"--top-p {top_p} is not above 0 and at most 1")
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (n,) int64 of logits (n, vocabulary) fp32, one for each row."""
        ordered, tokens = (logits / self.temperature).sort(stable=True, dim=-1, descending=True)
        probabilities = torch.softmax(ordered, -1)
        before = probabilities.cumsum(-1) - probabilities
        kept = probabilities.masked_fill(before >= self.top_p, 0.0)
        kept[:, 0] = probabilities[:, 0]
        place = torch.multinomial(kept, 1, generator=self._generator)
        return tokens.gather(-1, place)[:, 0]

    @staticmethod
    def of(temperature: float, top_p: float, seed: int) -> Sampler | None:
        """None at temperature 0: the likeliest token follows."""
        return Sampler(temperature, top_p, seed) if temperature != 0 else None
