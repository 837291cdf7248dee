"""Per-example losses of one packed forward, and the gradients that come with them.

    label        cross entropy over the label words' logits at one position
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
from edgezo.machine.limits import head_rows, states_at_once
from edgezo.machine.transfers import uploaded
from edgezo.network.exact_head import ExactHead
from edgezo.network.grouped import Groups, choice
from edgezo.network.perturb import PerturbedHead
from edgezo.network.probe import Probe


@dataclass
class Scorer:
    """Losses of hidden states for one task on one model."""

    kind: str  # of the dataset
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
        d_hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses (sides, b) fp32 and predictions (sides, b) int64 (-1 where the kind has none).

        ``hidden`` (sides*P, d) are the states at the scored positions, side after side. With ``learn`` > 0, learn *
        (gradient of the summed losses) is added to the exact head's gradient, and by ``hidden`` to ``d_hidden``, fp32
        of the shape of ``hidden``, where it is given.
        """
        if self.kind == "label":
            return self._labels(hidden, batch, probe, sides, learn, d_hidden)
        b = len(batch.labels)
        if self.kind == "choice" and not len(
            batch.score_ids
        ):  # prompts alone: only their states are read
            return torch.full((sides, b), torch.nan), torch.full((sides, b), -1)
        ids = batch.score_ids.repeat(sides)
        state = _of_sides(batch.score_state, len(batch.score_index), sides)
        nll_of, gradient_of = self._vocabulary(hidden, state, ids, probe)
        added_up = self._added_up if hidden.device.type == "cpu" else self._added_up_there
        losses, predicted, of_token = added_up(nll_of(), batch, sides)
        if learn and (self.exact is not None or d_hidden is not None):
            gradient_of(of_token(learn), d_hidden)
        return losses, predicted

    def _added_up(
        self, nll: Tensor, batch: Batch, sides: int
    ) -> tuple[Tensor, Tensor, Callable[[float], Tensor]]:
        """Losses and predictions (sides, b), and each token's weight in the losses' sum, whose weight is given.

        ``nll`` is (sides*P,).
        """
        mean, count, token, option = self._option_means(nll, batch, sides)
        if self.kind == "choice":
            losses, predicted, weight = self._choice(-mean, batch, sides)
        else:
            losses, weight = mean.view(sides, -1), torch.ones(len(mean))
            predicted = torch.full(losses.shape, -1)
        return (
            losses,
            predicted,
            lambda learn: torch.zeros(len(nll)).index_add_(
                0, token, (weight / count)[option] * learn
            ),
        )

    def _added_up_there(
        self, nll: Tensor, batch: Batch, sides: int
    ) -> tuple[Tensor, Tensor, Callable[[float], Tensor]]:
        """What ``_added_up`` gives, on a GPU, which is not waited for (grouped.py)."""
        device, n = nll.device, sides * len(batch.option_example)
        token = _of_sides(batch.part_token, len(batch.score_ids), sides)
        option = _of_sides(batch.part_option, len(batch.option_example), sides)
        count = uploaded(torch.bincount(option, minlength=n).clamp(min=1), device)
        token_there, option_there = uploaded(token, device), uploaded(option, device)
        mean = Groups.of(option, n, device).sums(nll[token_there]) / count
        if self.kind == "choice":
            example = _of_sides(batch.option_example, len(batch.labels), sides)
            right = uploaded(batch.labels.repeat(sides), device)
            options = Groups.of(example, sides * len(batch.labels), device)
            losses, predicted, weight = choice(-mean, options, right, n)
            losses, predicted = losses.view(sides, -1), predicted.view(sides, -1)
        else:
            losses, weight = mean.view(sides, -1), torch.ones(n, device=device)
            predicted = torch.full(losses.shape, -1, device=device)

        def of_token(learn: float) -> Tensor:
            return Groups.of(token, len(nll), device).sums((weight / count)[option_there] * learn)

        return losses, predicted, of_token

    def _labels(
        self,
        hidden: Tensor,
        batch: Batch,
        probe: Probe | None,
        sides: int,
        learn: float,
        d_hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        features = self._features(hidden)
        capped = self.label_logits(hidden, probe, features)
        labels = uploaded(batch.labels.repeat(sides), hidden.device)
        losses = F.cross_entropy(capped, labels, reduction="none")
        if learn and (features is not None or d_hidden is not None):
            error = torch.softmax(capped, -1) - F.one_hot(labels, capped.shape[1])
            error = torch.where(torch.isfinite(losses)[:, None], error, 0.0)
            error = error * self._slope(capped) * learn
            if self.exact is not None and features is not None:
                self.exact.learn(slice(None), error, features)
            if d_hidden is not None:
                self._add_state_gradient(error, slice(None), self.label_ids, d_hidden)
        return losses.view(sides, -1), capped.argmax(-1).view(sides, -1)

    def label_logits(self, hidden: Tensor, probe: Probe | None, features: Tensor | None) -> Tensor:
        """Logits (P, K) fp32 of the label words at (P, d) states; ``features`` are those of the exact head."""
        logits = self.head.logits(hidden, self.label_ids, probe).float()
        if self.exact is not None and features is not None:
            logits = logits + features @ self.exact.delta.T
        return self._cap(logits)

    def answers(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What a prediction is made of: logits (S, K) fp32 of the label words, or (O,) each option's mean token
        log-probability, on the CPU. ``hidden`` (S, d) are the states that are read.
        """
        if self.kind == "label":
            return self.label_logits(hidden, None, self._features(hidden)).cpu()
        nll_of, _ = self._vocabulary(hidden, batch.score_state, batch.score_ids, None)
        return -self._option_means(nll_of().cpu(), batch)[0]

    @staticmethod
    def _option_means(
        nll: Tensor, batch: Batch, sides: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean of each option's tokens, (sides*O,), of ``nll`` (sides*P,); and how many tokens it has.

        Then the tokens of all options, as index into ``nll``, and the option that each belongs to. On the CPU.
        """
        token = _of_sides(batch.part_token, len(batch.score_ids), sides)
        option = _of_sides(batch.part_option, len(batch.option_example), sides)
        n = sides * len(batch.option_example)
        count = torch.zeros(n).index_add_(0, option, torch.ones(len(option)))
        mean = torch.zeros(n).index_add_(0, option, nll[token]) / count.clamp(min=1)
        return mean, count, token, option

    @staticmethod
    def _choice(scores: Tensor, batch: Batch, sides: int) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (sides, b), predictions (sides, b), and -dL/d(score) of each option (sides*O,)."""
        b, r = len(batch.labels), len(batch.option_example)
        losses, predicted = torch.empty(sides, b), torch.empty(sides, b, dtype=torch.int64)
        weight = torch.empty(sides * r)
        for side in range(sides):
            for example in range(b):
                options = (batch.option_example == example).nonzero()[:, 0] + side * r
                label = batch.labels[example]
                losses[side, example] = F.cross_entropy(scores[options], label)
                predicted[side, example] = scores[options].argmax()
                right = F.one_hot(label, len(options))
                weight[options] = right - torch.softmax(scores[options], -1)
        return losses, predicted, weight

    def _vocabulary(
        self, hidden: Tensor, state: Tensor, ids: Tensor, probe: Probe | None
    ) -> tuple[Callable[[], Tensor], Callable[[Tensor, Tensor | None], None]]:
        """Two passes over tiles of the vocabulary: the negative log-likelihoods (m,) of the tokens ``ids`` (m,), then
        the gradient of their weighted sum.

        ``state`` (m,) says which of the states each token follows; ascending, and no token twice behind one state. Both
        are on the CPU.
        """
        features = self._features(hidden)
        lse = torch.full((len(hidden),), float("-inf"), device=hidden.device)
        target = torch.zeros(len(ids), device=hidden.device)
        ends = torch.searchsorted(state, torch.arange(len(hidden) + 1)).tolist()
        state_there, ids_there = uploaded(state, hidden.device), uploaded(ids, hidden.device)

        def behind(rows: slice, chunk: slice) -> tuple[slice, Tensor, tuple[Tensor, Tensor]]:
            """Tokens behind a chunk of the states: which, whether each is in a tile of the vocabulary, and where."""
            part = slice(ends[chunk.start], ends[chunk.stop])
            column, n = ids_there[part] - rows.start, rows.stop - rows.start
            inside = (column >= 0) & (column < n)
            return part, inside, (state_there[part] - chunk.start, column.clamp_(0, n - 1))

        def nll() -> Tensor:
            for rows, chunk, logits in self._pieces(hidden, features, probe):
                part, inside, place = behind(rows, chunk)
                target[part] = torch.where(inside, logits[place], target[part])
                most = logits.amax(-1, keepdim=True)
                summed = logits.sub_(most).exp_().sum(-1).log_().add_(most[:, 0])
                lse[chunk] = torch.logaddexp(lse[chunk], summed)
            return lse[state_there] - target

        def gradient(weight: Tensor, d_hidden: Tensor | None) -> None:
            weight = torch.where(torch.isfinite(lse[state_there] - target), weight, 0.0)
            if weight.device.type == "cpu":
                of_state = torch.zeros(len(hidden)).index_add_(0, state, weight)
            else:  # a GPU adds to one place in any order
                of_state = Groups.of(state, len(hidden), hidden.device).sums(weight)
            for rows, chunk, logits in self._pieces(hidden, features, probe):
                slope = self._slope(logits)
                error = logits.sub_(lse[chunk][:, None]).exp_().mul_(of_state[chunk][:, None])
                part, inside, place = behind(rows, chunk)
                # -0.0 leaves any number as it is.
                error.index_put_(place, torch.where(inside, -weight[part], -0.0), accumulate=True)
                error.mul_(slope)
                if self.exact is not None and features is not None:
                    self.exact.learn(rows, error, features[chunk])
                if d_hidden is not None:
                    self._add_state_gradient(error, rows, rows, d_hidden[chunk])

        return nll, gradient

    def next_tokens(self, hidden: Tensor, probe: Probe | None) -> Tensor:
        """The most likely token after each of (n, d) states, (n,) int64; the first of equally likely ones."""
        features = self._features(hidden)
        best = torch.full((len(hidden),), float("-inf"), device=hidden.device)
        tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        for rows, chunk, logits in self._pieces(hidden, features, probe):
            value, place = logits.max(-1)
            better = value > best[chunk]
            tokens[chunk] = torch.where(better, place + rows.start, tokens[chunk])
            best[chunk] = torch.where(better, value, best[chunk])
        return tokens

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) fp32 after each of (n, d) states, on the CPU."""
        logits = torch.empty(len(hidden), self.head.matrix.layout.shape[0])
        for rows, chunk, piece in self._pieces(hidden, self._features(hidden), None):
            logits[chunk, rows] = piece.cpu()
        return logits

    def _features(self, hidden: Tensor) -> Tensor | None:
        return self.exact.features(hidden) if self.exact is not None else None

    def _pieces(
        self, hidden: Tensor, features: Tensor | None, probe: Probe | None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows of the vocabulary, slice of the states, their logits in fp32); each piece's logits reuse the memory."""
        vocab, d = self.head.matrix.layout.shape
        step = head_rows(vocab, d)
        part = min(states_at_once(step), len(hidden))
        memory = torch.empty(part * step, device=hidden.device)
        for start in range(0, vocab, step):
            rows = slice(start, min(start + step, vocab))
            for first in range(0, len(hidden), part):
                chunk = slice(first, min(first + part, len(hidden)))
                at = torch.arange(chunk.start, chunk.stop, device=hidden.device)
                probe_there = None if probe is None else probe.at(at)
                shape = (chunk.stop - chunk.start, rows.stop - rows.start)
                logits = memory[: shape[0] * shape[1]].view(shape)
                logits.copy_(self.head.logits(hidden[chunk], rows, probe_there))
                if features is not None and self.exact is not None:
                    logits.addmm_(features[chunk], self.exact.delta[rows].T)
                yield rows, chunk, self._cap(logits)

    def _add_state_gradient(
        self, error: Tensor, exact_rows: slice, rows: slice | Tensor, d_hidden: Tensor
    ) -> None:
        """Add to ``d_hidden`` (n, d) the gradient by the states of an error (n, k) of the logits of ``rows``.

        ``rows`` are numbered as the vocabulary, ``exact_rows`` are those rows as the exact head numbers them.
        """
        d_hidden.addmm_(error, self.head.matrix.tile(rows).float())
        if self.exact is not None:
            d_hidden.add_(self.exact.back(error, exact_rows))

    def _cap(self, logits: Tensor) -> Tensor:
        """The model's soft cap of logits (Gemma 2), in place."""
        return (
            logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
        )

    def _slope(self, capped: Tensor) -> Tensor | float:
        """d(capped)/d(logits)."""
        return 1.0 if self.softcap is None else (capped / self.softcap).square_().neg_().add_(1)


def _of_sides(places: Tensor, n: int, sides: int) -> Tensor:
    """``places`` (m,) among the ``n`` of one side, on each side: (sides*m,) among all."""
    return (places + n * torch.arange(sides)[:, None]).reshape(-1)
