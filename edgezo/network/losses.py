"""Per-example losses from one packed forward, and the exact head's gradient on the way.

    label        cross entropy over the candidates' logits at one position
    choice       cross entropy over the options' mean token log-probabilities
    completion   mean negative log-likelihood over an example's target tokens (also kind "text")

Logits exist only at scored positions. Full-vocabulary losses run over tiles of the vocabulary with a running
log-sum-exp, so neither the logits nor the expanded head are ever whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgezo.data.batches import Batch
from edgezo.machine.limits import TILE_BYTES
from edgezo.network.exact_head import ExactHead
from edgezo.network.perturb import PerturbedHead, Probe

_CHUNK_BYTES = TILE_BYTES // 2


@dataclass
class Scorer:
    """Losses of hidden states for one task on one model."""

    kind: str
    label_ids: Tensor  # (K,) int64, empty unless kind is "label"
    head: PerturbedHead
    softcap: float | None
    exact: ExactHead | None

    def __call__(
        self,
        hidden: Tensor,
        batch: Batch,
        probe: Probe | None,
        sides: int,
        learn: float,
        back: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses (sides, b) fp32 and predictions (sides, b) int64 (-1 where the kind has none).

        ``hidden`` (sides*P, d) are the states at the scored positions, side after side. ``learn`` > 0 adds
        learn * (gradient of the summed losses) to the exact head's gradient, and that by ``hidden`` to ``back``, fp32
        of the same shape, where it is given.
        """
        if self.kind == "label":
            return self._labels(hidden, batch, probe, sides, learn, back)
        ids = batch.score_ids.repeat(sides).to(hidden.device)
        nll_of, gradient_of = self._vocabulary(hidden, ids, probe)
        # A few numbers; added up on the CPU, because a GPU adds to one place in any order.
        nll = nll_of().cpu()
        row = torch.cat([batch.score_row + side * len(batch.lengths) for side in range(sides)])
        rows = sides * len(batch.lengths)
        count = torch.zeros(rows).index_add_(0, row, torch.ones(len(row)))
        mean = torch.zeros(rows).index_add_(0, row, nll) / count.clamp(min=1)
        if self.kind == "choice":
            losses, predicted, weight = self._choice(-mean, batch, sides)
        else:
            losses, weight = mean.view(sides, -1), torch.ones(rows)
            predicted = torch.full(losses.shape, -1)
        if learn and (self.exact is not None or back is not None):
            gradient_of(((weight / count)[row] * learn).to(hidden.device), back)
        return losses, predicted

    def _labels(
        self,
        hidden: Tensor,
        batch: Batch,
        probe: Probe | None,
        sides: int,
        learn: float,
        back: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logits = self.head.logits(hidden, self.label_ids, probe).float()
        features = self._features(hidden)
        if self.exact is not None and features is not None:
            logits = logits + features @ self.exact.delta.T
        capped = self._cap(logits)
        labels = batch.labels.repeat(sides).to(hidden.device)
        losses = F.cross_entropy(capped, labels, reduction="none")
        if learn and (features is not None or back is not None):
            error = torch.softmax(capped, -1) - F.one_hot(labels, capped.shape[1])
            error = torch.where(torch.isfinite(losses)[:, None], error, 0.0)
            error = error * self._slope(capped) * learn
            if self.exact is not None and features is not None:
                self.exact.learn(slice(None), error, features)
            if back is not None:
                self._send_back(error, slice(None), self.label_ids, back)
        return losses.view(sides, -1), capped.argmax(-1).view(sides, -1)

    @staticmethod
    def _choice(scores: Tensor, batch: Batch, sides: int) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, predictions and -dL/d(score) of each row."""
        b, r = len(batch.labels), len(batch.lengths)
        losses, predicted = torch.empty(sides, b), torch.empty(sides, b, dtype=torch.int64)
        weight = torch.empty(sides * r)
        for side in range(sides):
            for example in range(b):
                own = (batch.row_example == example).nonzero()[:, 0] + side * r
                label = batch.labels[example]
                losses[side, example] = F.cross_entropy(scores[own], label)
                predicted[side, example] = scores[own].argmax()
                weight[own] = F.one_hot(label, len(own)) - torch.softmax(scores[own], -1)
        return losses, predicted, weight

    def _vocabulary(
        self, hidden: Tensor, ids: Tensor, probe: Probe | None
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor | None], None]]:
        """Two passes over vocabulary tiles: negative log-likelihoods (m,), then their weighted gradient."""
        features = self._features(hidden)
        lse = torch.full((len(hidden),), float("-inf"), device=hidden.device)
        target = torch.zeros(len(hidden), device=hidden.device)

        def nll() -> Tensor:
            for rows, chunk, logits in self._pieces(hidden, features, probe):
                own = ids[chunk] - rows.start
                inside = (own >= 0) & (own < logits.shape[1])
                picked = logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                target[chunk] = torch.where(inside, picked, target[chunk])
                most = logits.amax(-1, keepdim=True)
                summed = logits.sub_(most).exp_().sum(-1).log_().add_(most[:, 0])
                lse[chunk] = torch.logaddexp(lse[chunk], summed)
            return lse - target

        def gradient(weight: Tensor, back: Tensor | None) -> None:
            weight = torch.where(torch.isfinite(lse - target), weight, 0.0)
            for rows, chunk, logits in self._pieces(hidden, features, probe):
                slope = self._slope(logits)
                error = logits.sub_(lse[chunk][:, None]).exp_()
                own = ids[chunk] - rows.start
                inside = ((own >= 0) & (own < logits.shape[1])).nonzero()[:, 0]
                error[inside, own[inside]] -= 1
                error.mul_(slope).mul_(weight[chunk][:, None])
                if self.exact is not None and features is not None:
                    self.exact.learn(rows, error, features[chunk])
                if back is not None:
                    self._send_back(error, rows, rows, back[chunk])

        return nll, gradient

    def next_tokens(self, hidden: Tensor, probe: Probe | None) -> Tensor:
        """The most likely token after each of (n, d) states, (n,) int64; of equal ones the first."""
        features = self._features(hidden)
        best = torch.full((len(hidden),), float("-inf"), device=hidden.device)
        found = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        for rows, chunk, logits in self._pieces(hidden, features, probe):
            value, place = logits.max(-1)
            better = value > best[chunk]
            found[chunk] = torch.where(better, place + rows.start, found[chunk])
            best[chunk] = torch.where(better, value, best[chunk])
        return found

    def _features(self, hidden: Tensor) -> Tensor | None:
        return self.exact.features(hidden) if self.exact is not None else None

    def _pieces(
        self, hidden: Tensor, features: Tensor | None, probe: Probe | None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows of the vocabulary, some of the states, and their logits, fp32; the next ones take the same memory."""
        vocab, d = self.head.matrix.layout.shape
        step = min(max(1, _CHUNK_BYTES // (4 * d)), vocab)
        part = min(max(1, _CHUNK_BYTES // (4 * step)), len(hidden))
        memory = torch.empty(part * step, device=hidden.device)
        for start in range(0, vocab, step):
            rows = slice(start, min(start + step, vocab))
            for first in range(0, len(hidden), part):
                chunk = slice(first, min(first + part, len(hidden)))
                at = torch.arange(chunk.start, chunk.stop, device=hidden.device)
                own = None if probe is None else probe.at(at)
                shape = (chunk.stop - chunk.start, rows.stop - rows.start)
                logits = memory[: shape[0] * shape[1]].view(shape)
                logits.copy_(self.head.logits(hidden[chunk], rows, own))
                if features is not None and self.exact is not None:
                    logits.addmm_(features[chunk], self.exact.delta[rows].T)
                yield rows, chunk, self._cap(logits)

    def _send_back(self, error: Tensor, own: slice, rows: slice | Tensor, back: Tensor) -> None:
        """Add to ``back`` (n, d) what an error (n, k) of the logits of the vocabulary's ``rows`` asks of hidden states.

        ``own``: the same rows as the exact head numbers them.
        """
        back.addmm_(error, self.head.matrix.tile(rows).float())
        if self.exact is not None:
            back.add_(self.exact.back(error, own))

    def _cap(self, logits: Tensor) -> Tensor:
        """In place."""
        return (
            logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
        )

    def _slope(self, capped: Tensor) -> Tensor | float:
        """d(capped)/d(logits)."""
        return 1.0 if self.softcap is None else (capped / self.softcap).square_().neg_().add_(1)
