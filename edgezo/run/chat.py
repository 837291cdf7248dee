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
        try:
            for piece in self.used.write(
                [*first, *self.turns] if chats else line, None, self.sampler
            ):
                pieces.append(piece)
                yield piece
                if stopped():
                    break
        finally:
            self.turns.append({"role": "assistant", "content": "".join(pieces).strip()})
