"""What answers are made of on every engine: scores of rows, and tokens that a model writes, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgezo.data.batches import Example, evaluation_batches
from edgezo.data.dataset import Dataset
from edgezo.machine.limits import EVAL_TOKENS
from edgezo.network.sampling import Sampler


class Answering(Protocol):
    """A model in memory that answers, on whatever engine."""

    @property
    def probed(self) -> bool:
        """Whether a linear probe answers, which writes nothing."""
        ...

    def scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Of each example the logits (K,) fp32 of its classes, or scores of its options."""
        ...

    def texts(self, examples: Sequence[Example], most: int) -> list[str]:
        """The answer that is written to each example, of at most so many tokens."""
        ...

    def tokens_after(
        self, prompt: Sequence[int], most: int, sampler: Sampler | None
    ) -> Iterator[int]:
        """The tokens that follow a prompt, each as soon as it is there; None: the likeliest ones."""
        ...

    def figures(self) -> dict[str, Any]:
        """The memory that it has taken beside that of the process."""
        ...


def scores_in_parts(
    examples: Sequence[Example], answered: Callable[[Sequence[Example]], np.ndarray]
) -> list[np.ndarray]:
    """Scores of each example, (K,) or one for each of its options. Batches are an evaluation's.

    ``answered`` makes (n, K) logits of n examples, or (O,) scores of the options of all of them.
    """
    scores: list[np.ndarray] = [np.empty(0)] * len(examples)
    for part in evaluation_batches(examples):
        chosen = [examples[i] for i in part]
        rows = chosen[0].whole_rows
        if len(chosen) == 1 and len(rows) > 1 and chosen[0].tokens > EVAL_TOKENS:
            options = [Example((row,), -1) for row in rows]
            scores[part[0]] = np.concatenate(scores_in_parts(options, answered))
            continue
        made = answered(chosen)
        if made.ndim == 2:
            pieces = list(made)
        else:
            ends = np.cumsum([len(example.whole_rows) for example in chosen])
            pieces = np.split(made, ends[:-1])
        for i, piece in zip(part, pieces, strict=True):
            scores[i] = piece
    return scores


@dataclass(frozen=True)
class AnswerText:
    """How the answers to the rows of one data set end."""

    dataset: Dataset
    tokenizer: Any
    ends: frozenset[int]  # tokens that end a text

    @staticmethod
    def ends_of(tokenizer: Any, ends: Sequence[int]) -> frozenset[int]:
        """The tokens that end a text: those of the model's configuration, and the tokenizer's own."""
        end_id = tokenizer.eos_token_id
        return frozenset(ends) | ({end_id} if end_id is not None else frozenset())

    def over(self, ids: Sequence[int]) -> bool:
        """Whether the tokens written so far are a whole answer."""
        return ids[-1] in self.ends or self._stop(self._text(ids)) is not None

    def answer(self, ids: Sequence[int], *, strip: bool = True) -> str:
        """The text of these tokens, up to the first stop."""
        text = self._text([i for i in ids if i not in self.ends])
        text = text[: self._stop(text)]
        return text.strip() if strip else text

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _stop(self, text: str) -> int | None:
        """Where the first stop begins."""
        assert self.dataset.generation is not None
        places = [text.find(stop) for stop in self.dataset.generation.stop]
        return min((at for at in places if at >= 0), default=None)


def evaluation_parts(rows: Sequence[Example], most: int, kept_tokens: int) -> list[list[int]]:
    """Groups of rows of like length that write at once. A group keeps at most ``kept_tokens``, or is one row."""
    lengths = [len(row.prompt) for row in rows]
    parts: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (-lengths[i], i)):
        room = lengths[parts[-1][0] if parts else i] + most  # of each row: the longest comes first
        if not parts or (len(parts[-1]) + 1) * room > kept_tokens:
            parts.append([])
        parts[-1].append(i)
    return parts
