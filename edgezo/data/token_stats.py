"""What a planner needs to know of rows: how many tokens they have, and how many of them are scored. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenStats:
    """What the planner needs to know about the data."""

    kind: str  # label, choice, completion or text
    tokens: tuple[int, ...]  # tokens of the longest to train on (all rows of each), descending
    scored: int  # most scored positions of one example
    label_words: int  # K; 0 where the whole vocabulary is scored
    mean: float = 0.0  # tokens of an example; 0: as the longest
    known: bool = True  # False: assumed, because no data was given
    evaluated: int = 0  # tokens of the longest to evaluate on
    # Of answers that the model writes: tokens at most (0: it writes none), and of the longest prompts that they follow.
    written: int = 0
    prompt: int = 0
    evaluated_prompt: int = 0
    examples: int | None = None  # to train on; None: not known

    def longest(self, examples: int) -> int:
        """Tokens of that many of the longest examples together; the longest repeats if need be."""
        found = self.tokens[:examples]
        return sum(found) + self.tokens[0] * (examples - len(found))

    def at_once(self, examples: int, most: int | None) -> int:
        """The same of what passes at once, where a micro-batch is split into pieces of ``most`` tokens."""
        longest = self.longest(examples)
        return longest if most is None else min(longest, max(most, self.tokens[0]))


KEPT_LENGTHS = 1024  # of the longest examples: as many as a batch can hold
