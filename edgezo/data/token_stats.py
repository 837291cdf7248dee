"""What a planner needs to know of the data: how many tokens examples have, and how many of them are scored. Pure."""

from __future__ import annotations

from dataclasses import dataclass

KEPT_LENGTHS = 1024  # lengths of so many of the longest examples are kept: a batch has no more


@dataclass(frozen=True)
class TokenStats:
    """Token counts of a dataset."""

    kind: str  # label, choice, completion or text
    tokens: tuple[
        int, ...
    ]  # tokens of the longest training examples (all rows of each), descending
    scored: int  # most scored positions of one example
    label_words: int  # K; 0 where the whole vocabulary is scored
    mean: float = 0.0  # tokens of an example; 0: as many as the longest has
    known: bool = True  # False: assumed, because no data was given
    evaluated: int = 0  # tokens of the longest example to evaluate on
    # Where the model writes answers: most tokens of an answer (0: it writes none), and of the longest prompts.
    written: int = 0
    prompt: int = 0
    evaluated_prompt: int = 0
    examples: int | None = None  # to train on; None: not known
    stored_bytes: int = 0  # of all tokens, which stay in memory
    evaluations: int = 0  # examples to evaluate on; 0: not known
    evaluated_mean: float = 0.0  # tokens of one of them
    # Label words that are scored by all of their tokens (0: none are), and tokens of an example without them.
    long_words: int = 0
    prompt_mean: float = 0.0
    from_chars: bool = False  # estimated from the rows' characters, because there is no tokenizer

    @property
    def source(self) -> str:
        """Where ``tokens`` come from, in words."""
        if not self.known:
            return "no data given: --max-length each"
        return f"the longest of the data{', by their characters' if self.from_chars else ''}"

    @property
    def classes(self) -> int:
        """Classes that a linear probe tells apart; 0 of rows without label words."""
        return self.label_words or self.long_words

    def longest(self, examples: int) -> int:
        """Tokens of the ``examples`` longest examples together. The longest counts again where there are fewer."""
        tokens = self.tokens[:examples]
        return sum(tokens) + self.tokens[0] * (examples - len(tokens))

    def evaluated_at_once(self, most: int) -> int:
        """Most tokens of an evaluation batch, which is filled up to ``most`` or has one example."""
        batch = min(most, self.longest(KEPT_LENGTHS))
        if self.evaluations:
            batch = min(most, self.evaluations * self.evaluated)
        return max(batch, self.evaluated)

    def at_once(self, examples: int, most: int | None) -> int:
        """Most tokens that pass at once of such a micro-batch, which is split into pieces of ``most`` tokens."""
        longest = self.longest(examples)
        return longest if most is None else min(longest, max(most, self.tokens[0]))
