"""A model cut below the first block that is trained.

The blocks below the cut and the embeddings are frozen, so what they put out for a row never changes: a forward may run
only them (``below``), or begin with their output (``above``). Blocks keep their numbers in both, because families
choose windows and positions by the number of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgezo.network.loader import block_number

Half = Literal["whole", "below", "above"]  # what of a model is in memory


@dataclass
class Cut:
    """The cut of one model. ``blocks`` and ``tables`` (embeddings, the tokens' first) are wrapped once, when made."""

    blocks: Sequence[nn.Module]
    tables: Sequence[nn.Module]
    first: int  # number of the first block above the cut
    # What runs now: every block, or only those on one side of the cut.
    _running: Half = field(default="whole", init=False)
    _states: Tensor | None = field(default=None, init=False)  # (1, n, hidden) at the cut

    def __post_init__(self) -> None:
        for number, block in enumerate(self.blocks):
            block.forward = self._block(number, block.forward)
        for number, table in enumerate(self.tables):
            table.forward = self._table(table.forward, is_input=number == 0)

    @contextmanager
    def below(self) -> Iterator[None]:
        """Inside, forwards run only what is below the cut; ``take`` gives what it has put out."""
        self._running = "below"
        try:
            yield
        finally:
            self._running = "whole"

    def take(self) -> Tensor:
        """The states at the cut that the forward has left, (n, hidden)."""
        states, self._states = self._states, None
        assert states is not None
        return states[0]

    @contextmanager
    def above(self, states: Tensor) -> Iterator[None]:
        """Inside, forwards begin at the cut with ``states`` (n, hidden) of their n tokens."""
        self._running, self._states = "above", states[None]
        try:
            yield
        finally:
            self._running, self._states = "whole", None

    def _block(self, number: int, inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._running == "whole":
                return inner(*args, **kwargs)
            hidden, others = (
                (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            )  # families name it, or do not
            if self._running == "above":
                if number < self.first:
                    return hidden
                return inner(self._states if number == self.first else hidden, *others, **kwargs)
            if number < self.first:
                return inner(hidden, *others, **kwargs)
            if number == self.first:
                self._states = hidden
            return hidden

        return forward

    def _table(self, inner: Callable[..., Any], is_input: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._running != "above":
                return inner(*args, **kwargs)
            # Nothing reads it: the first block above the cut begins with the states.
            assert self._states is not None
            tokens = self._states.shape[1] if is_input else 1
            return self._states.new_zeros(1, tokens, self._width(inner))

        return forward

    def _width(self, inner: Callable[..., Any]) -> int:
        return int(inner.__self__.embedding_dim)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Halves:
    """Which modules are below the cut of a model, and which of them are not in memory."""

    module: nn.Module
    blocks_name: str  # where the module keeps its blocks
    first: int
    half: Half  # what is put together
    widths: tuple[int, int]  # of a state, and of a row of the embedding

    def is_below(self, name: str, sub: nn.Module) -> bool:
        """Whether a module runs before the first trained block, and so is frozen where there are blocks below that."""
        if not self.first:
            return False
        number = block_number(name, self.blocks_name)
        if number is not None:
            return number < self.first
        # Beside the tables: what stands with them, apart from the blocks (RoBERTa's norm), and what widens their rows
        # (OPT's projection).
        parent = self.module.get_submodule(name.rpartition(".")[0])
        blocks = self.module.get_submodule(self.blocks_name)
        with_tables = any(isinstance(child, nn.Embedding) for child in parent.children())
        with_blocks = any(child is blocks for child in parent.modules())
        weight = sub.weight
        assert isinstance(weight, Tensor)
        hidden, width = self.widths
        widens = width != hidden and tuple(weight.shape) == (hidden, width)
        return isinstance(sub, nn.Embedding) or (with_tables and not with_blocks) or widens

    def lacks(self, name: str, sub: nn.Module) -> bool:
        """Whether a block or a table belongs to the half that is not put together; what is small is in both."""
        if self.half == "whole" or self.is_below(name, sub) == (self.half == "below"):
            return False
        in_block = block_number(name, self.blocks_name) is not None
        return isinstance(sub, nn.Embedding) or in_block


def leave_out(sub: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Let a module that will not run have no weights: empty ones for code that asks for their dtype."""
    for name in list(sub._parameters):
        empty = torch.empty(0, dtype=dtype, device=device)
        sub._parameters[name] = nn.Parameter(empty, requires_grad=False)
