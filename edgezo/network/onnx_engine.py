"""The ONNX engine: losses of a batch at theta +- sigma*D_i from the graphs of a trainable export, without torch.

``OnnxModel.losses(batch, probe) -> (sides, b)`` is the seam between engines: planner, noise, credit, journal and data
are the same above it. What it computes is what network/model.py computes with torch; tests compare the two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from edgezo.data.batches import PackedRows
from edgezo.data.trees import Tree
from edgezo.network.onnx_manifest import BlockGraph, Manifest
from edgezo.network.onnx_sessions import Sessions
from edgezo.network.plain_losses import PlainScorer
from edgezo.network.plain_readout import PlainReadout, unit_states
from edgezo.weights.plain_factors import PlainFactors
from edgezo.zo.bits import Key


class PlainProbe(NamedTuple):
    """How a step perturbs: the address of its directions, and how far along them."""

    key: Key
    sigma: float


@dataclass(frozen=True)
class PaddedRows:
    """How packed tokens lie in rows, all sides."""

    padded: (
        np.ndarray
    )  # (rows*s,) int64: the token at each place; padding repeats the row's first one
    packed: np.ndarray  # (n,) int64: where each token stands
    positions: np.ndarray  # (1 or rows, s) int64
    seen: np.ndarray  # (rows, 1, s, s) bool, without a window

    @staticmethod
    def of(lengths: Sequence[int], trees: Sequence[Tree | None]) -> PaddedRows:
        """PaddedRows of so many tokens each, of which some are trees."""
        size, count = max(lengths), len(lengths)
        place = np.arange(size)
        length = np.array(lengths)
        starts = np.cumsum(length) - length
        inside = place[None] < length[:, None]  # (rows, s)
        padded = starts[:, None] + np.where(inside, place[None], 0)
        seen = (place[None, :, None] >= place[None, None]) & inside[:, None, :]
        positions = place[None]
        if any(tree is not None for tree in trees):
            positions = np.repeat(positions, count, axis=0)
            for row, tree in enumerate(trees):
                if tree is not None:
                    n = len(tree.ids)
                    positions[row, :n] = tree.depths
                    seen[row, tree.trunk : n, :n] = tree.seen
        return PaddedRows(padded.reshape(-1), np.flatnonzero(inside), positions, seen[:, None])

    def within(self, window: int) -> np.ndarray:
        """``seen`` where attention looks back ``window`` tokens; 0: at all."""
        if not window:
            return self.seen
        behind = self.positions[:, :, None] - self.positions[:, None]
        return self.seen & (behind < window)[:, None]


@dataclass
class OnnxModel:
    """A frozen base in onnxruntime, what is trained beside it, and the task that it is scored by."""

    manifest: Manifest
    sessions: Sessions
    factors: PlainFactors
    kind: str  # of the dataset
    label_ids: tuple[int, ...] = ()
    first_trained: int = 0
    readout: PlainReadout | None = None
    # Gives the states of a batch at the first trained block, (n, hidden), where they are kept; None: blocks below run.
    kept_states: Callable[[PackedRows], np.ndarray] | None = None
    scorer: PlainScorer = field(init=False)
    _bases: dict[int, np.ndarray] = field(default_factory=dict)
    _mapped: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scorer = PlainScorer(self.kind, self._word_rows, self.manifest.softcap, self._logits)

    def _word_rows(self) -> np.ndarray:
        """PaddedRows of the head of the label words, (K, hidden) fp32."""
        ids = np.array(self.label_ids, np.int64)
        unique, rows = self._table_rows("head", ids)
        return self.sessions.run("rows.onnx", {"ids": unique, **rows}, keep=False)

    def _table_rows(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Where each of ``ids`` (n,) is among the rows of a table that are named, and these rows, from its file."""
        table = self.manifest.table(name)
        used, places = np.unique(ids, return_inverse=True)
        rows = {}
        with self.manifest.file(table.data).open("rb") as file:
            for weight in table.weights:
                dtype = np.dtype(weight.dtype)
                read = np.empty((len(used), *weight.shape[1:]), dtype)
                size = dtype.itemsize * int(np.prod(weight.shape[1:], dtype=np.int64))
                for number, row in enumerate(used.tolist()):
                    raw = os.pread(file.fileno(), size, weight.offset + row * size)
                    read[number] = np.frombuffer(raw, dtype).reshape(weight.shape[1:])
                rows[weight.name] = read
        return places.reshape(-1).astype(np.int64), rows

    # -- the seam -----------------------------------------------------------------------------------------

    def losses(
        self,
        batch: PackedRows,
        probe: PlainProbe | None = None,
        *,
        sides: int | None = None,
        learn: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses (sides, b) fp32 and predictions (sides, b) int64 of a packed batch.

        With a probe the sides are +sigma and -sigma; without one ``sides`` (1) plain ones. ``learn`` is the weight of
        these losses in the gradient of the exact head.
        """
        sides = 2 if probe is not None else sides or 1
        states, last = self._read(batch, probe, sides)
        if self.readout is not None:
            return self.readout.losses(
                [states[b] for b in self.readout.weights.blocks], batch, sides
            )
        return self.scorer.losses(states[last], batch, sides, learn)

    def answers(self, batch: PackedRows) -> np.ndarray:
        """Logits (b, K) fp32 of the classes; for other kinds (O,), each option's mean log-probability."""
        states, last = self._read(batch, None, 1)
        if self.readout is not None:
            return self.readout.weights.logits([states[b] for b in self.readout.weights.blocks])
        return self.scorer.answers(states[last], batch)

    def states_of(self, batch: PackedRows, blocks: Sequence[int]) -> dict[int, np.ndarray]:
        """The states of ``blocks`` at the scored positions at unit root mean square, and of the end (-1) as it is."""
        index = batch.score_index
        taken = self._through(batch, None, 1, blocks)
        return {
            **{block: unit_states(states[index]) for block, states in taken.items() if block >= 0},
            -1: self._ended(taken[-1], index),
        }

    # -- forwards -----------------------------------------------------------------------------------------

    @property
    def last_block(self) -> int:
        """The last block that runs: above what a linear probe reads none does."""
        if self.readout is not None:
            return max(self.readout.weights.blocks)
        return len(self.manifest.blocks) - 1

    def _read(
        self, batch: PackedRows, probe: PlainProbe | None, sides: int
    ) -> tuple[dict[int, np.ndarray], int]:
        """The states that losses are made of, at the scored positions of all sides, by block; -1: of the end."""
        n = len(batch.ids)
        index = np.concatenate([batch.score_index + side * n for side in range(sides)])
        if self.readout is not None:
            taken = self._through(batch, probe, sides, self.readout.weights.blocks)
            return {b: unit_states(x[index]) for b, x in taken.items() if b >= 0}, -1
        return {-1: self._ended(self._through(batch, probe, sides, ())[-1], index)}, -1

    def _ended(self, states: np.ndarray, index: np.ndarray) -> np.ndarray:
        return self.sessions.run("end.onnx", {"states": states, "index": index})

    def _through(
        self, batch: PackedRows, probe: PlainProbe | None, sides: int, taps: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """States (sides*n, hidden) behind the blocks ``taps``, and behind the last one that runs (-1)."""
        states = self.states_at_cut(batch)
        if sides > 1:
            states = np.concatenate([states] * sides)
        rows = PaddedRows.of(batch.lengths * sides, batch.trees * sides)
        taken: dict[int, np.ndarray] = {}
        perturbing = Perturbing.of(batch, probe, sides)
        turns = self.turns(rows.positions)
        for number in range(self.first_trained, self.last_block + 1):
            states = self._block(number, states, rows, turns, perturbing)
            if number in taps:
                taken[number] = states
        return {**taken, -1: states}

    def states_at_cut(self, batch: PackedRows) -> np.ndarray:
        """The states (n, hidden) of one side that the first trained block reads."""
        if self.kept_states is not None:
            return self.kept_states(batch)
        return self.below(batch)

    def below(self, batch: PackedRows, *, keep: bool = True) -> np.ndarray:
        """``states_at_cut`` by running what is below. ``keep``: its graphs stay in memory."""
        states = self.embedded(batch.ids, keep=keep)
        rows = PaddedRows.of(batch.lengths, batch.trees)
        turns, plain = self.turns(rows.positions), Perturbing.of(batch, None, 1)
        for number in range(self.first_trained):
            states = self._block(number, states, rows, turns, plain, keep=keep)
        return states

    def embedded(self, ids: np.ndarray, *, keep: bool = True) -> np.ndarray:
        """The states (n, hidden) of tokens (n,) before the first block."""
        places, table = self._table_rows("table", ids)
        return self.sessions.run("embed.onnx", {"input_ids": places, **table}, keep=keep)

    def vocabulary_logits(self, states: np.ndarray) -> np.ndarray:
        """Logits (n, vocabulary) fp32 of states (n, hidden) behind the last block."""
        return self.scorer.logits(self._ended(states, np.arange(len(states))))

    def turns(self, positions: np.ndarray) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Cosine and sine (1 or rows, 1, s, rotated) fp32 of positions (1 or rows, s), by kind."""
        turns = {}
        at = positions.astype(np.float32)[:, None, :, None]
        for kind, of_kind in self.manifest.rotary.items():
            inverse = np.array(of_kind["inverse"], np.float32)
            angles = at * np.concatenate([inverse, inverse])
            scaling = np.float32(of_kind["scaling"])
            turns[kind] = (np.cos(angles) * scaling, np.sin(angles) * scaling)
        return turns

    def _block(
        self,
        number: int,
        states: np.ndarray,
        rows: PaddedRows,
        turns: Mapping[str, tuple[np.ndarray, np.ndarray]],
        perturbing: Perturbing,
        *,
        keep: bool = True,
    ) -> np.ndarray:
        block = self.manifest.blocks[number]
        cosine, sine = turns[block.kind]
        inputs = {
            "states": states,
            "cosine": cosine,
            "sine": sine,
            "seen": rows.within(block.window),
            "padded": rows.padded,
            "packed": rows.packed,
            **self.inputs_of(number, perturbing, keep=keep),
        }
        return self.sessions.run(block.file, inputs)

    def inputs_of(
        self, number: int, perturbing: Perturbing, *, keep: bool = True
    ) -> dict[str, np.ndarray]:
        """The inputs of a block that are its weights, what is trained in it, and how that is perturbed."""
        block = self.manifest.blocks[number]
        trained = self._trained_inputs(number, block, perturbing)
        return {**self._weights_of(number, keep), **trained}

    def _weights_of(self, number: int, keep: bool) -> Mapping[str, np.ndarray]:
        """The frozen weights of a block, mapped from their file. ``keep``: they stay mapped for the next call."""
        weights = self._mapped.get(number)
        if weights is None:
            block = self.manifest.blocks[number]
            data = np.memmap(self.manifest.file(block.data), np.uint8, "r")
            weights = {}
            for weight in block.weights:
                dtype = np.dtype(weight.dtype)
                size = int(np.prod(weight.shape)) * dtype.itemsize
                raw = data[weight.offset : weight.offset + size]
                weights[weight.name] = np.asarray(raw).view(dtype).reshape(weight.shape)
            if keep:
                self._mapped[number] = weights
        return weights

    def drop_above(self, last: int) -> None:
        """Unmap what no loss depends on any more: the blocks above ``last``, and what the head needs."""
        self._mapped = {n: weights for n, weights in self._mapped.items() if n <= last}
        self.sessions.drop(["end.onnx", "head.onnx"])

    def _trained_inputs(
        self, number: int, block: BlockGraph, perturbing: Perturbing
    ) -> dict[str, np.ndarray]:
        """What is trained in a block, and how it is perturbed."""
        trained = number in self.factors.values
        rank = self.factors.rank if trained else 1
        if trained:
            values = self.factors.values[number]
            if number not in self._bases:
                self._bases[number] = self.factors.bases(block.linears)
            basis = self._bases[number]
        else:
            values = np.zeros((sum(x.rows for x in block.linears), 1), np.float32)
            basis = np.zeros((1, sum(x.cols for x in block.linears)), np.int8)
        if trained and perturbing.probe is not None:
            signs = self.factors.signs(perturbing.probe.key, number, perturbing.slots)
            row_signs, col_signs = signs.rows, signs.cols
            by_example, example = perturbing.by_example, perturbing.example
        else:
            row_signs = np.zeros((len(values), 1), np.int8)
            col_signs = np.zeros((1, len(block.linears), rank), np.float32)
            by_example = np.zeros((len(perturbing.example), 1), np.float32)
            example = np.zeros_like(perturbing.example)
        return {
            "factors": values,
            "row_signs": row_signs,
            "col_signs": col_signs,
            "basis": basis,
            "basis_scale": np.array([rank**-0.5], np.float32),
            "by_example": by_example,
            "example": example,
        }

    def _logits(self, ended: np.ndarray) -> np.ndarray:
        """Logits (p, vocabulary) fp32, without the model's soft cap."""
        return self.sessions.run("head.onnx", {"ended": ended})


class Perturbing(NamedTuple):
    """Which example each token belongs to, on which side."""

    probe: PlainProbe | None
    slots: tuple[int, ...]
    example: np.ndarray  # (n,) int64 index into slots
    by_example: np.ndarray  # (n, b) fp32: c in the column of a token's example

    @staticmethod
    def nothing(tokens: int) -> Perturbing:
        """Of so many tokens that are not perturbed."""
        example = np.zeros(tokens, np.int64)
        return Perturbing(None, (0,), example, np.zeros((0, 0), np.float32))

    @staticmethod
    def of(batch: PackedRows, probe: PlainProbe | None, sides: int) -> Perturbing:
        one = np.repeat(batch.row_example, np.array(batch.lengths))
        example = np.concatenate([one] * sides)
        if probe is None:
            return Perturbing(None, batch.slots, example, np.zeros((0, 0), np.float32))
        side = np.repeat(np.array([probe.sigma, -probe.sigma], np.float32), len(one))
        by_example = np.zeros((len(example), len(batch.slots)), np.float32)
        by_example[np.arange(len(example)), example] = side
        return Perturbing(probe, batch.slots, example, by_example)
