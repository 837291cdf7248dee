"""The exact head: behind the last block the gradient needs no backward pass through the model.

For logits z = H h the gradient of a row of H is (p - y) h^T at the scored positions, from the forward that GRZO
runs anyway, averaged over its two sides. What is trained is a change of H in fp32, by Adam (arXiv 1412.6980):

    label words   delta (K, hidden) on the K candidate rows
    completions   delta Q (vocab, rank) over a fixed basis P (rank, hidden): H + Q P

Adam moves every coordinate by up to its rate, so a score z moves by up to rate * ||h||_1 a step; ||h||_1 is 500 in one
model and 50,000 in another. The rate is therefore given in units of the score and divided by the mean ||h||_1 of the
first step's scored positions.

No seed can rebuild its state, so a run keeps it in snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgezo.network.plain_losses import VOCABULARY_PACE
from edgezo.weights.layouts import CPU
from edgezo.zo import noise
from edgezo.zo.noise import Key
from edgezo.zo.rules import BETA1, BETA2, EPS


@dataclass
class ExactHead:
    """A trained change of the output embedding and its Adam state, all (rows, width) fp32."""

    delta: Tensor
    basis: Tensor | None  # P (width, hidden) fp32; None: features are the hidden state itself
    pace: float = 1.0  # share of the rate
    reach: float = 0.0  # mean ||features||_1 of the first step; 0: not measured yet
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.first = torch.zeros_like(self.delta)
        self.second = torch.zeros_like(self.delta)
        self.gradient = torch.zeros_like(self.delta)
        # ||features||_1 of this step's positions, while reach is not measured.
        self._norms: list[Tensor] = []

    @staticmethod
    def for_labels(count: int, hidden: int, device: torch.device = CPU) -> ExactHead:
        """A head that changes the rows of ``count`` label words."""
        return ExactHead(torch.zeros(count, hidden, device=device), None)

    @staticmethod
    def for_vocabulary(
        vocab: int, hidden: int, rank: int, seed: int, device: torch.device = CPU
    ) -> ExactHead:
        """A head that changes every word's row, along ``rank`` directions that the seed gives."""
        key, tensor = Key(seed, 0), noise.tensor_id("head")
        signs = noise.signs(key, tensor, noise.BASIS, slice(0, rank), hidden).float()
        basis = (signs / hidden**0.5).to(device)
        return ExactHead(torch.zeros(vocab, rank, device=device), basis, VOCABULARY_PACE)

    def features(self, hidden: Tensor) -> Tensor:
        """What delta multiplies of states (n, hidden): (n, width) fp32."""
        hidden = hidden.float()
        return hidden if self.basis is None else hidden @ self.basis.T

    def learn(self, rows: slice, error: Tensor, features: Tensor) -> None:
        """Add error^T features to the gradient of ``rows``; error (n, rows), features (n, width)."""
        self.gradient[rows].addmm_(error.T, features)
        if not self.reach and rows.start in (0, None):
            self._norms.append(features.abs().sum(1))

    def forget(self) -> None:
        """Drop the gradient that this step has added up."""
        self.gradient.zero_()
        self._norms = []

    def update(self, rate: float) -> None:
        """Take one Adam step along the added gradient and clear it. A gradient that is not finite moves nothing.

        ``rate`` times ``pace`` is about how far a score may move in one step, or Adam's rate where no position was
        scored.
        """
        if bool(torch.isfinite(self.gradient).all()):
            if not self.reach:
                self.reach = float(torch.cat(self._norms).mean()) if self._norms else 1.0
            lr = rate * self.pace / max(self.reach, EPS)
            self.steps += 1
            self.first.lerp_(self.gradient, 1 - BETA1)
            self.second.lerp_(self.gradient.square(), 1 - BETA2)
            scale = (self.second / (1 - BETA2**self.steps)).sqrt_().add_(EPS)
            self.delta.addcdiv_(self.first, scale, value=-lr / (1 - BETA1**self.steps))
        self.forget()

    def back(self, error: Tensor, rows: slice | Tensor) -> Tensor:
        """Gradient (n, hidden) by the hidden states, through delta, of an error (n, k) of the logits of ``rows``."""
        d_features = error @ self.delta[rows]
        return d_features if self.basis is None else d_features @ self.basis

    def trained(self) -> dict[str, Tensor]:
        """The trained tensor, by its name in files."""
        return {"head.delta": self.delta}

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
        """Take over what ``tensors()`` gave. Raises KeyError for a missing name, RuntimeError for another shape."""
        self.delta.copy_(tensors["head.delta"])
        self.first.copy_(tensors["head.adam_first"])
        self.second.copy_(tensors["head.adam_second"])
        self.steps = int(tensors["head.adam_steps"])
        self.reach = float(tensors["head.reach"])
