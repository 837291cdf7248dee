"""Losses of hidden states in numpy, and the exact head: what network/losses.py and exact_head.py are with torch.

Logits of the whole vocabulary come from a graph, for some states at a time; those of label words are a product with a
few rows. tests/network/test_onnx_engine.py compares each of them with its twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from edgezo.data.batches import PackedRows
from edgezo.zo.adam import BETA1, BETA2, EPS
from edgezo.zo.bits import BASIS, Key, sign_rows, tensor_id

LOGITS_AT_ONCE_BYTES = 32 << 20  # more states at once: the head is expanded each time
VOCABULARY_PACE = 0.1  # share of the rate: every word's row moves in a step, most of them by noise


@dataclass
class PlainHead:
    """A trained change of the head and its Adam state, (rows, width) fp32 each; exact_head.py has the mathematics."""

    delta: np.ndarray
    basis: np.ndarray | None  # P (width, hidden) fp32; None: features are the hidden state itself
    pace: float = 1.0
    reach: float = 0.0  # mean ||features||_1 of the first step; 0: not measured yet
    steps: int = 0
    first: np.ndarray = field(init=False)
    second: np.ndarray = field(init=False)
    gradient: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second, self.gradient = (np.zeros_like(self.delta) for _ in range(3))
        self._norms: list[np.ndarray] = []

    @staticmethod
    def of_words(count: int, hidden: int) -> PlainHead:
        """A head that changes the rows of ``count`` label words."""
        return PlainHead(np.zeros((count, hidden), np.float32), None)

    @staticmethod
    def of_vocabulary(vocab: int, hidden: int, rank: int, seed: int) -> PlainHead:
        """A head that changes every word's row, along ``rank`` directions that the seed gives."""
        signs = sign_rows(Key(seed, 0), tensor_id("head"), BASIS, slice(0, rank), hidden)
        basis = signs.astype(np.float32) / np.float32(hidden**0.5)
        return PlainHead(np.zeros((vocab, rank), np.float32), basis, VOCABULARY_PACE)

    def features(self, ended: np.ndarray) -> np.ndarray:
        """What delta multiplies of states (n, hidden): (n, width)."""
        return ended if self.basis is None else ended @ self.basis.T

    def learn(self, error: np.ndarray, features: np.ndarray) -> None:
        """Add error^T features to the gradient; error (n, rows), features (n, width)."""
        self.gradient += error.T @ features
        if not self.reach:
            self._norms.append(np.abs(features).sum(1))

    def forget(self) -> None:
        """Drop the gradient that this step has added up."""
        self.gradient[:] = 0
        self._norms = []

    def update(self, rate: float) -> None:
        """Take one Adam step along the gradient and clear it. A gradient that is not finite moves nothing."""
        if np.isfinite(self.gradient).all():
            if not self.reach:
                self.reach = float(np.concatenate(self._norms).mean()) if self._norms else 1.0
            lr = rate * self.pace / max(self.reach, EPS)
            self.steps += 1
            self.first += (self.gradient - self.first) * np.float32(1 - BETA1)
            self.second += (np.square(self.gradient) - self.second) * np.float32(1 - BETA2)
            scale = np.sqrt(self.second / np.float32(1 - BETA2**self.steps)) + np.float32(EPS)
            self.delta -= self.first / scale * np.float32(lr / (1 - BETA1**self.steps))
        self.forget()

    def tensors(self) -> dict[str, np.ndarray]:
        """State that a snapshot keeps, named as the torch engine names it."""
        return {
            "head.delta": self.delta,
            "head.adam_first": self.first,
            "head.adam_second": self.second,
            "head.adam_steps": np.array([self.steps], np.int64),
            "head.reach": np.array([self.reach], np.float64),
        }

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Take over what ``tensors()`` gave. Raises KeyError and ValueError for others."""
        for name, values in (
            ("head.delta", self.delta),
            ("head.adam_first", self.first),
            ("head.adam_second", self.second),
        ):
            values[:] = tensors[name]
        self.steps = int(tensors["head.adam_steps"][0])
        self.reach = float(tensors["head.reach"][0])


@dataclass
class PlainScorer:
    """Losses of the states that the head reads, for one task."""

    kind: str  # of the dataset
    word_rows: Callable[[], np.ndarray]  # (K, hidden) fp32 of the head, of label words
    softcap: float | None
    logits_of: Callable[
        [np.ndarray], np.ndarray
    ]  # (p, hidden) -> (p, vocabulary), without a soft cap
    exact: PlainHead | None = None
    _rows: np.ndarray | None = field(default=None, init=False)

    def losses(
        self, ended: np.ndarray, batch: PackedRows, sides: int, learn: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses (sides, b) fp32 and predictions (sides, b) int64, -1 where the kind has none."""
        if self.kind == "label":
            return self._of_labels(ended, batch, sides, learn)
        nll = self._nll(ended, batch, sides, learn)
        mean = option_means(nll, batch, sides)
        if self.kind == "choice":
            return of_options(-mean, batch)
        return mean, np.full(mean.shape, -1, np.int64)

    def answers(self, ended: np.ndarray, batch: PackedRows) -> np.ndarray:
        """Logits (S, K) of the label words, or (O,) each option's mean token log-probability."""
        if self.kind == "label":
            return self._word_logits(ended)
        return -option_means(self._nll(ended, batch, 1, 0.0), batch, 1)[0]

    def logits(self, ended: np.ndarray) -> np.ndarray:
        """Logits (p, vocabulary) fp32 of the states (p, hidden) that the head reads."""
        return np.concatenate([logits for _, logits in self._pieces(ended)])

    def _word_logits(self, ended: np.ndarray) -> np.ndarray:
        if self._rows is None:
            self._rows = self.word_rows()
        logits = ended @ self._rows.T
        if self.exact is not None:
            logits += self.exact.features(ended) @ self.exact.delta.T
        return self._cap(logits)

    def _cap(self, logits: np.ndarray) -> np.ndarray:
        cap = self.softcap
        return logits if cap is None else np.tanh(logits / np.float32(cap)) * np.float32(cap)

    def _slope(self, capped: np.ndarray) -> np.ndarray | np.float32:
        """d(capped)/d(logits)."""
        one = np.float32(1)
        return one if self.softcap is None else one - np.square(capped / np.float32(self.softcap))

    def _of_labels(
        self, ended: np.ndarray, batch: PackedRows, sides: int, learn: float
    ) -> tuple[np.ndarray, np.ndarray]:
        capped = self._word_logits(ended)
        labels = np.tile(batch.labels, sides)
        losses = cross_entropies(capped, labels)
        if learn and self.exact is not None:
            error = softmax(capped)
            error[np.arange(len(labels)), labels] -= 1
            error[~np.isfinite(losses)] = 0
            error *= self._slope(capped) * np.float32(learn)
            self.exact.learn(error, self.exact.features(ended))
        return losses.reshape(sides, -1), capped.argmax(-1).reshape(sides, -1)

    def _nll(self, ended: np.ndarray, batch: PackedRows, sides: int, learn: float) -> np.ndarray:
        """The negative log-likelihoods (sides, P) of the scored tokens; with ``learn`` their gradient is added."""
        count = len(batch.score_index)
        state = (batch.score_state + count * np.arange(sides)[:, None]).reshape(-1)
        ids = np.tile(batch.score_ids, sides)
        weight = None
        if learn and self.exact is not None and self.kind != "choice":
            weight = np.tile(_token_weights(batch) * np.float32(learn), sides)
        nll = np.empty(len(ids), np.float32)
        for chunk, logits in self._pieces(ended):
            which = np.flatnonzero((state >= chunk.start) & (state < chunk.stop))
            line, column = state[which] - chunk.start, ids[which]
            most = logits.max(-1, keepdims=True)
            shares = np.exp(logits - most)
            total = shares.sum(-1, keepdims=True)
            nll[which] = (np.log(total) + most)[line, 0] - logits[line, column]
            if weight is not None and self.exact is not None:
                of_token = np.where(np.isfinite(nll[which]), weight[which], np.float32(0))
                of_state = np.zeros(len(logits), np.float32)
                np.add.at(of_state, line, of_token)
                shares *= of_state[:, None] / total
                np.subtract.at(shares, (line, column), of_token)
                shares *= self._slope(logits)
                self.exact.learn(shares, self.exact.features(ended[chunk]))
        return nll.reshape(sides, -1)

    def _pieces(self, ended: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """(slice of the states, their logits in fp32)."""
        at_once, start = 1, 0
        while start < len(ended):
            chunk = slice(start, min(start + at_once, len(ended)))
            logits = self.logits_of(ended[chunk])
            if self.exact is not None:
                logits = logits + self.exact.features(ended[chunk]) @ self.exact.delta.T
            if start == 0:  # the vocabulary is known now
                at_once = max(1, LOGITS_AT_ONCE_BYTES // (4 * logits.shape[1]))
            yield chunk, self._cap(logits)
            start = chunk.stop


def softmax(logits: np.ndarray) -> np.ndarray:
    """Shares (n, K) fp32."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shares / shares.sum(-1, keepdims=True))


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label] of each row, (n,) fp32."""
    most = logits.max(-1)
    total = np.log(np.exp(logits - most[:, None]).sum(-1)) + most
    return np.asarray(total - logits[np.arange(len(labels)), labels], np.float32)


def option_means(nll: np.ndarray, batch: PackedRows, sides: int) -> np.ndarray:
    """The mean of each option's tokens, (sides, O), of ``nll`` (sides, P)."""
    count = len(batch.option_example)
    tokens = np.bincount(batch.part_option, minlength=count)
    sums = np.zeros((sides, count), np.float32)
    for side in range(sides):
        np.add.at(sums[side], batch.part_option, nll[side][batch.part_token])
    return np.asarray(sums / np.maximum(tokens, 1).astype(np.float32), np.float32)


def of_options(scores: np.ndarray, batch: PackedRows) -> tuple[np.ndarray, np.ndarray]:
    """Losses (sides, b) and predictions (sides, b) of options' scores (sides, O)."""
    sides, b = len(scores), len(batch.labels)
    losses, predicted = np.empty((sides, b), np.float32), np.empty((sides, b), np.int64)
    for example in range(b):
        of_example = scores[:, batch.option_example == example]
        labels = np.full(sides, batch.labels[example])
        losses[:, example] = cross_entropies(of_example, labels)
        predicted[:, example] = of_example.argmax(-1)
    return losses, predicted


def _token_weights(batch: PackedRows) -> np.ndarray:
    """Each scored token's share (P,) of the loss of its example."""
    count = np.bincount(batch.part_option, minlength=len(batch.option_example))
    weights = np.zeros(len(batch.score_ids), np.float32)
    shares = (1 / np.maximum(count, 1)).astype(np.float32)
    np.add.at(weights, batch.part_token, shares[batch.part_option])
    return weights
