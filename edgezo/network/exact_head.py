"""The exact head: after the last block the gradient is free (design: "exact where it is free").

For logits z = H h the gradient of a row of H is (p - y) h^T at the scored positions, from the forward that GRZO
runs anyway, averaged over its two sides. What is trained is a change of H in fp32, by Adam (arXiv 1412.6980):

    label words   delta (K, hidden) on the K candidate rows
    completions   delta Q (vocab, rank) over a fixed basis P (rank, hidden): H + Q P

Adam moves every coordinate by up to its rate, so a score z moves by up to rate * ||h||_1 a step; ||h||_1 is 500 in one
model and 50,000 in another. The rate is therefore given in units of the score and divided by the mean ||h||_1 of the
first step's scored positions.

Its state has no seed form; the run keeps it as small snapshots (see ``train``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgezo.weights.layouts import CPU
from edgezo.zo import noise
from edgezo.zo.noise import Key

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
VOCABULARY_PACE = 0.1  # of the rate: all words move at once, most of them without a reason


@dataclass
class ExactHead:
    """A trained change of the output embedding and its Adam state, all (rows, width) fp32."""

    delta: Tensor
    basis: Tensor | None  # P (width, hidden) fp32, or None: the hidden state itself
    pace: float = 1.0
    reach: float = 0.0  # mean ||features||_1 of the first step; 0: not known yet
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.first = torch.zeros_like(self.delta)
        self.second = torch.zeros_like(self.delta)
        self.gradient = torch.zeros_like(self.delta)
        # ||features||_1 of this step's positions, while reach is not known
        self._seen: list[Tensor] = []

    @staticmethod
    def for_labels(count: int, hidden: int, device: torch.device = CPU) -> ExactHead:
        return ExactHead(torch.zeros(count, hidden, device=device), None)

    @staticmethod
    def for_vocabulary(
        vocab: int, hidden: int, rank: int, seed: int, device: torch.device = CPU
    ) -> ExactHead:
        key, tensor = Key(seed, 0), noise.tensor_id("head")
        signs = noise.signs(key, tensor, noise.BASIS, slice(0, rank), hidden).float()
        basis = (signs / hidden**0.5).to(device)
        return ExactHead(torch.zeros(vocab, rank, device=device), basis, VOCABULARY_PACE)

    def features(self, hidden: Tensor) -> Tensor:
        """What delta multiplies, (n, width) fp32."""
        hidden = hidden.float()
        return hidden if self.basis is None else hidden @ self.basis.T

    def learn(self, rows: slice, error: Tensor, features: Tensor) -> None:
        """Add error^T features to the gradient of ``rows``; error (n, rows), features (n, width)."""
        self.gradient[rows].addmm_(error.T, features)
        if not self.reach and rows.start in (0, None):
            self._seen.append(features.abs().sum(1))

    def forget(self) -> None:
        """Drop what this step has accumulated."""
        self.gradient.zero_()
        self._seen = []

    def update(self, rate: float) -> None:
        """One Adam step along the accumulated gradient, which is then cleared. Non-finite gradients are dropped.

        ``rate`` times ``pace`` is about how far a score may move in one step (of Adam itself where nothing was seen).
        """
        if bool(torch.isfinite(self.gradient).all()):
            if not self.reach:
                self.reach = float(torch.cat(self._seen).mean()) if self._seen else 1.0
            lr = rate * self.pace / max(self.reach, EPS)
            self.steps += 1
            self.first.lerp_(self.gradient, 1 - BETA1)
            self.second.lerp_(self.gradient.square(), 1 - BETA2)
            scale = (self.second / (1 - BETA2**self.steps)).sqrt_().add_(EPS)
            self.delta.addcdiv_(self.first, scale, value=-lr / (1 - BETA1**self.steps))
        self.forget()

    def back(self, error: Tensor, rows: slice | Tensor) -> Tensor:
        """What an error (n, k) of the logits of ``rows`` asks of the hidden states by way of delta, (n, hidden)."""
        found = error @ self.delta[rows]
        return found if self.basis is None else found @ self.basis

    def trained(self) -> dict[str, Tensor]:
        """What training has changed, by name."""
        return {"head.delta": self.delta}

    def nbytes(self) -> int:
        return 4 * self.delta.nbytes + (self.basis.nbytes if self.basis is not None else 0)

    def tensors(self) -> dict[str, Tensor]:
        """State that a snapshot keeps."""
        return {
            **self.trained(),
            "head.adam_first": self.first,
            "head.adam_second": self.second,
            "head.adam_steps": torch.tensor([self.steps]),
            "head.reach": torch.tensor([self.reach], dtype=torch.float64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.delta.copy_(tensors["head.delta"])
        self.first.copy_(tensors["head.adam_first"])
        self.second.copy_(tensors["head.adam_second"])
        self.steps = int(tensors["head.adam_steps"])
        self.reach = float(tensors["head.reach"])
