"""Greedy generation for packed rows, plain or perturbed: each side and example writes its text.

    prompts  -> one packed forward (in pieces), which keeps keys and values of every layer
    a token  -> one packed forward over the last token of each row, which attends to what was kept

A row that has ended goes on, and what it writes is ignored, until half of the rows have ended; then the kept rows are
moved together. The sides of an example stay together as long as one of them writes, so that sides have equal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgezo.data.batches import Batch, Example, collate, micro_batches
from edgezo.data.tasks import Generation
from edgezo.data.trees import Row
from edgezo.network.key_values import KeyValues

if TYPE_CHECKING:
    from edgezo.network.model import Model
    from edgezo.network.probe import Probe


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    limits: Generation,
    over: Callable[[list[int]], bool],  # whether the tokens written so far are the whole answer
    *,
    sides: int = 1,
    probe: Callable[[Batch], Probe | None] = lambda batch: None,
    slots: Sequence[int] | None = None,
    most_tokens: int | None = None,
) -> list[list[list[int]]]:
    """The tokens that each side writes after each prompt, by side and prompt: ``limits.most`` or fewer.

    The last token is the one with which ``over`` was true. ``probe`` makes the probe of packed rows, laid end to end
    once for each of ``sides``; ``slots`` are the slots of the prompts in their group. Prompts pass in pieces of
    ``most_tokens``.
    """
    n = len(prompts)
    slots = list(range(n)) if slots is None else list(slots)
    room = max(len(ids) for ids in prompts) + limits.most - 1
    model.heap.expect(n * sides)
    kept = KeyValues(n * sides, room, model.heap.apart)
    written: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(sides)]
    ended = torch.zeros(sides, n, dtype=torch.bool)
    live = torch.arange(n)  # prompts whose rows are kept
    now: Probe | None = None
    with torch.no_grad():
        last = _read_prompts(model, kept, prompts, slots, sides, probe, most_tokens)
        while True:
            for side in range(sides):
                for place, i in enumerate(live.tolist()):
                    if not ended[side, i]:
                        text = written[side][i]
                        text.append(int(last[side, place]))
                        ended[side, i] = len(text) == limits.most or over(text)
            going = ~ended.all(0)[live]
            if not going.any():
                return written
            if int(going.sum()) <= len(live) // 2:
                kept.keep(_of_sides(going.nonzero()[:, 0], len(live), sides))
                live, last = live[going], last[:, going]
                now = None
            batch = _single(last, [slots[i] for i in live.tolist()])
            if now is None:
                now = probe(batch)
            kept.expect(torch.arange(len(live) * sides))
            last = model.next_tokens(batch, kept, now, sides=sides, ids=last.reshape(-1))


def write_one(
    model: Model,
    prompt: Sequence[int],
    most: int,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[int]:
    """The tokens that follow ``prompt``, each as soon as it is there: ``most`` of them, unless the caller stops.

    ``choose`` makes tokens (1,) of logits (1, vocabulary); without it the most likely one follows.
    """
    model.heap.expect(1)
    kept = KeyValues(1, len(prompt) + most - 1, model.heap.apart)
    batch = collate([Example((Row(prompt, (len(prompt) - 1,), ()),), -1)], [0])
    kept.expect(torch.zeros(1, dtype=torch.int64), batch.lengths)
    for _ in range(most):
        last = model.next_tokens(batch, kept, choose=choose)
        yield int(last)
        batch = _single(last, [0])
        kept.expect(torch.zeros(1, dtype=torch.int64))


def _read_prompts(
    model: Model,
    kept: KeyValues,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    sides: int,
    probe: Callable[[Batch], Probe | None],
    most_tokens: int | None,
) -> Tensor:
    """Let ``kept`` take in the prompts; the token that each side writes first after each, (sides, n) int64."""
    n = len(prompts)
    rows = [Example((Row(ids, (len(ids) - 1,), ()),), -1) for ids in prompts]
    first = torch.empty(sides, n, dtype=torch.int64)
    for part in micro_batches(rows, n, most_tokens):
        batch = collate([rows[i] for i in part], [slots[i] for i in part])
        at = torch.tensor(part)
        kept.expect(_of_sides(at, n, sides), batch.lengths * sides)
        first[:, at] = model.next_tokens(batch, kept, probe(batch), sides=sides)
    return first


def _of_sides(rows: Tensor, n: int, sides: int) -> Tensor:
    """``rows`` (R,) of the first side, and those rows of each other side, where a side has ``n``: (sides*R,)."""
    return (rows + n * torch.arange(sides)[:, None]).reshape(-1)


def _single(last: Tensor, slots: Sequence[int]) -> Batch:
    """A batch of one token a row, the last one of the first side."""
    return collate([Example((Row((int(t),), (0,), ()),), -1) for t in last[0]], slots)
