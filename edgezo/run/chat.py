"""A conversation with a model in memory, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edgezo.network.sampling import Sampler
from edgezo.run.predictor import Predictor


@dataclass
class Talk:
    """The turns so far. A model without a chat template completes each line by itself."""

    used: Predictor
    sampler: Sampler | None = None  # None: the likeliest token follows
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    most_written: int = 0  # tokens of the latest answer where it has as many as it may have; else 0

    @property
    def last(self) -> str:
        """The latest answer."""
        return self.turns[-1]["content"] if self.turns else ""

    def answer(self, line: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The pieces of the answer to a line; it ends where ``stopped`` says so, and is a turn as far as it went."""
        self.turns.append({"role": "user", "content": line})
        first = [{"role": "system", "content": self.system}] if self.system else []
        chats = bool(getattr(self.used.asker.how.tokenizer, "chat_template", None))
        pieces: list[str] = []
        self.most_written = 0
        try:
            prompt = [*first, *self.turns] if chats else line
            writing = self.used.write(prompt, None, self.sampler)
            for piece in writing:
                pieces.append(piece)
                yield piece
                if stopped():
                    break
            if not writing.ended and len(writing.tokens) == writing.most:
                self.most_written = writing.most
        finally:
            self.turns.append({"role": "assistant", "content": "".join(pieces).strip()})
