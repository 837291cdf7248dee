"""A model on the ONNX engine writes: tokens one after the other, each of which sees those before by what is kept.

    prompts  -> some tokens of each row at a time, whose keys and values are kept for every block
    a token  -> the graphs of all blocks over the last token of each row

Rows are padded at their ends: what is kept of padding is never seen. As network/generate.py and key_values.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgezo.errors import EdgezoError
from edgezo.machine.limits import WRITING_TOKENS
from edgezo.network.onnx_engine import OnnxModel, Perturbing
from edgezo.network.sampling import Sampler


@dataclass
class _Kept:
    """What is kept of the tokens so far: of each block keys and values (rows, kv heads, p, head_dim) fp32."""

    model: OnnxModel
    rows: int
    positions: np.ndarray = field(init=False)  # (rows, p) int64
    real: np.ndarray = field(init=False)  # (rows, p) bool: False of padding

    def __post_init__(self) -> None:
        shape = self.model.manifest.shape
        self.positions = np.zeros((self.rows, 0), np.int64)
        self.real = np.zeros((self.rows, 0), bool)
        empty = np.zeros((self.rows, shape.kv_heads, 0, shape.head_dim), np.float32)
        self._pairs = {number: (empty, empty) for number in range(len(self.model.manifest.blocks))}

    @property
    def width(self) -> int:
        """Of a state."""
        return self.model.manifest.shape.hidden

    def read(self, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Take in the tokens ``ids`` (rows, s) that are ``real``; their states (rows*s, hidden) behind all blocks."""
        model, (rows, s) = self.model, ids.shape
        before = self.real.shape[1]
        positions = self.real.sum(1)[:, None] + np.maximum(real.cumsum(1) - 1, 0)
        self.positions = np.concatenate([self.positions, positions], 1)
        self.real = np.concatenate([self.real, real], 1)
        places = np.arange(before + s)
        # A token of padding sees itself, since a row of scores has to have one.
        behind = places[None, None] <= (before + np.arange(s))[None, :, None]
        seen = behind & self.real[:, None]
        seen[:, np.arange(s), before + np.arange(s)] = True
        states = model.embedded(ids.reshape(-1))
        turns = model.turns(positions)
        every = np.arange(rows * s)
        plain = Perturbing.nothing(rows * s)
        for number, block in enumerate(model.manifest.blocks):
            inside = seen
            if block.window:
                inside = seen & (positions[:, :, None] - self.positions[:, None] < block.window)
            key, value = self._pairs[number]
            cosine, sine = turns[block.kind]
            states, *kept = model.sessions.run_all(
                block.writing,
                {
                    "states": states,
                    "cosine": cosine,
                    "sine": sine,
                    "seen": inside[:, None],
                    "padded": every,
                    "packed": every,
                    "past_key": key,
                    "past_value": value,
                    **model.inputs_of(number, plain),
                },
            )
            self._pairs[number] = (kept[0], kept[1])
        return states

    def keep(self, rows: np.ndarray) -> None:
        """Keep these rows, and drop the others."""
        self.rows = len(rows)
        self.positions, self.real = self.positions[rows], self.real[rows]
        for number, (key, value) in self._pairs.items():
            self._pairs[number] = (key[rows], value[rows])


def check_writes(model: OnnxModel) -> None:
    """Raise EdgezoError for graphs from before there were some for writing."""
    if not all(block.writing for block in model.manifest.blocks):
        raise EdgezoError(
            f"{model.manifest.path} has no graphs for writing: an earlier version of edgezo wrote it.\n"
            f"Write it again: edgezo export {model.manifest.base} --format onnx --trainable "
            f"--dtype {model.manifest.precision} --out DIR."
        )


def write_one(
    model: OnnxModel, prompt: Sequence[int], most: int, sampler: Sampler | None = None
) -> Iterator[int]:
    """The tokens that follow ``prompt``, each as soon as it is there: ``most`` of them, unless the caller stops.

    Without a sampler the most likely one follows. Raises EdgezoError for graphs that write nothing.
    """
    check_writes(model)
    kept = _Kept(model, 1)
    last = _chosen(model, _read_prompts(kept, [prompt]), sampler)
    for number in range(most):
        yield int(last[0])
        if number + 1 < most:
            last = _next(kept, last, sampler)


def write_all(
    model: OnnxModel,
    prompts: Sequence[Sequence[int]],
    most: int,
    over: Callable[[list[int]], bool],  # whether the tokens written so far are the whole answer
) -> list[list[int]]:
    """The likeliest tokens after each prompt: ``most``, or up to the one with which ``over`` was true."""
    check_writes(model)
    kept, live = _Kept(model, len(prompts)), np.arange(len(prompts))
    written: list[list[int]] = [[] for _ in prompts]
    ended = np.zeros(len(prompts), bool)
    last = _chosen(model, _read_prompts(kept, prompts), None)
    while True:
        for token, row in zip(last.tolist(), live.tolist(), strict=True):
            if not ended[row]:
                written[row].append(token)
                ended[row] = len(written[row]) == most or over(written[row])
        going = ~ended[live]
        if not going.any():
            return written
        if 2 * going.sum() <= len(live):
            kept.keep(np.flatnonzero(going))
            live, last = live[going], last[going]
        last = _next(kept, last, None)


def _read_prompts(kept: _Kept, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Take in the prompts; the state (rows, hidden) behind the last token of each."""
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), lengths.max()), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    real = np.arange(ids.shape[1]) < lengths[:, None]
    step = max(1, WRITING_TOKENS // len(prompts))
    ends: np.ndarray | None = None
    for start in range(0, ids.shape[1], step):
        part = slice(start, start + step)
        states = kept.read(ids[:, part], real[:, part]).reshape(len(prompts), -1, kept.width)
        ends = np.empty((len(prompts), kept.width), np.float32) if ends is None else ends
        inside = np.flatnonzero((lengths > start) & (lengths <= start + states.shape[1]))
        ends[inside] = states[inside, lengths[inside] - 1 - start]
    assert ends is not None
    return ends


def _next(kept: _Kept, last: np.ndarray, sampler: Sampler | None) -> np.ndarray:
    """The token that follows the last one of each row, (rows,) int64."""
    states = kept.read(last[:, None], np.ones((len(last), 1), bool))
    return _chosen(kept.model, states, sampler)


def _chosen(model: OnnxModel, states: np.ndarray, sampler: Sampler | None) -> np.ndarray:
    """Tokens (rows,) int64 by the states (rows, hidden) behind all blocks."""
    logits = model.vocabulary_logits(states)
    return np.asarray(logits.argmax(-1) if sampler is None else sampler(logits), np.int64)
