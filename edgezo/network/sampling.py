"""Choosing a token: at random by its probability, with a seed, so that an answer can be had again."""

from __future__ import annotations

import numpy as np

from edgezo.errors import UsageError

_BITS = 53  # of a random number in [0, 1)


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
        # Raw bits: numpy may change what it makes of them, but not these.
        self._bits = np.random.Philox(key=seed % 2**64)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Tokens (n,) int64 of logits (n, vocabulary) fp32, one for each row."""
        order = np.argsort(-logits, axis=-1, kind="stable")
        ordered = np.take_along_axis(logits, order, -1).astype(np.float64) / self.temperature
        shares = np.exp(ordered - ordered[:, :1])
        shares /= shares.sum(-1, keepdims=True)
        kept = shares.cumsum(-1) - shares < self.top_p
        kept[:, 0] = True
        until = np.where(kept, shares, 0).cumsum(-1)
        drawn = (self._bits.random_raw(len(logits)) >> np.uint64(64 - _BITS)) / 2.0**_BITS
        place = (until <= (drawn * until[:, -1])[:, None]).sum(-1)
        place = np.minimum(place, kept.sum(-1) - 1)
        return np.asarray(order[np.arange(len(order)), place], np.int64)

    @staticmethod
    def of(temperature: float, top_p: float, seed: int) -> Sampler | None:
        """None at temperature 0: the likeliest token follows."""
        return Sampler(temperature, top_p, seed) if temperature != 0 else None
