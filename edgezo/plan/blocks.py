"""Which blocks a request trains, and what of the frozen ones' output is kept on disk. Pure, as planner.py.

Where blocks are frozen, a row passes them once and its states at the cut are read from disk ever after
(weights/kept_states.py). So a request has two parts: the pass, with the frozen blocks alone in memory, and the
training, with the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from edgezo.data.token_stats import TokenStats
from edgezo.errors import UsageError
from edgezo.machine.limits import PASS_TOKENS
from edgezo.plan.budget import mb
from edgezo.plan.config import Batched
from edgezo.plan.data_fields import LOSS
from edgezo.plan.plan import Decision
from edgezo.plan.shapes import ModelShape

# Shares of the blocks that --blocks auto tries, the most wanted first. A linear probe may read best from the middle of
# a model (log: 2026-11-23-which-blocks-should-a-linear-probe-read), and trained factors do as well in the last third as
# everywhere (2026-11-23-which-blocks-should-low-rank-factors-train).
READ_SHARE, TRAINED_SHARE, FEWER_SHARES = 1 / 2, 1 / 3, (1 / 4, 1 / 6, 1 / 12)
LEAST_STATE_ROWS = 256  # fewer are no data set
STATE_BYTES = {"exact": 4, "bf16": 2, "int8": 1}  # of a state on disk, at most
ROW_HEAD_BYTES = 28  # beside its states (weights/kept_states.py)


class Number(NamedTuple):
    """How many of the last blocks may be trained, and why so many."""

    blocks: str  # a number, or all
    why: str


@dataclass(frozen=True)
class Blocks:
    """What became of --blocks, --states and --state-rows."""

    cfg: Batched  # the request with all three decided
    decisions: tuple[Decision, ...]
    first: int  # the first block that is trained


def decide(
    shape: ModelShape,
    cfg: Batched,
    tokens: TokenStats,
    room_bytes: int | None,
    number: Number,
) -> Blocks:
    """Decide which states of a request with ``number`` are kept; ``room_bytes`` may be taken of the disk.

    Raises UsageError for states that cannot be kept.
    """
    blocks, why = number
    settled = Batched.of(cfg, blocks=blocks)
    first = settled.first_trained(shape.layers)
    if not first:
        made_known = (Decision("blocks", "all", why),) if cfg.blocks == "auto" else ()
        return Blocks(Batched.of(cfg, blocks="all", states=None, state_rows=None), made_known, 0)
    made = [Decision("blocks", blocks, why)]
    obstacle = _obstacle(cfg, tokens)
    if obstacle and cfg.states not in (None, "none"):
        raise UsageError(f"--states {cfg.states}: {obstacle}. Give --states none.")
    states, reason = cfg.states or "bf16", "as given" if cfg.states else "half of what fp32 takes"
    if obstacle:
        states, reason = "none", obstacle
    rows = None
    if states != "none":
        rows, of_rows = _rows(shape, settled, tokens, states, room_bytes)
        if rows is None:
            states, reason = "none", of_rows
        else:
            made.append(Decision("state_rows", rows, of_rows))
    made.append(Decision("states", states, reason))
    return Blocks(Batched.of(settled, states=states, state_rows=rows), tuple(made), first)


def numbers(shape: ModelShape, cfg: Batched, tokens: TokenStats) -> list[Number]:
    """How many blocks the request may train, the most wanted first: several for --blocks auto, else one.

    Raises UsageError for more blocks than there are.
    """
    layers = shape.layers
    if cfg.blocks.isdigit():
        if int(cfg.blocks) > layers:
            raise UsageError(
                f"--blocks {cfg.blocks}: {shape.name} has {layers} blocks. Give 1 to {layers}, or all."
            )
        return [Number(cfg.blocks, f"as given: the last of {layers}, the others are frozen")]
    if cfg.blocks == "all":
        return [Number("all", "as given")]
    obstacle = _obstacle(cfg, tokens)
    if obstacle:
        return [Number("all", f"auto: {obstacle}")]
    reads = cfg.parts.readout and tokens.classes > 0
    share = READ_SHARE if reads else TRAINED_SHARE
    first = max(1, round(share * layers))
    where = (
        "a linear probe may read best from the middle on"
        if reads
        else "most of what is learned sits there"
    )
    made = [
        Number(
            str(first),
            f"auto: the last {first} of {layers}: {where}{_price(first / layers, cfg, tokens)}",
        )
    ]
    for fewer in sorted({max(1, round(share * layers)) for share in FEWER_SHARES}, reverse=True):
        if fewer < first:
            why = f"auto: the last {fewer} of {layers}: no more of them fit into the cap without the disk"
            made.append(Number(str(fewer), why + _price(fewer / layers, cfg, tokens)))
    return made


def _price(trained: float, cfg: Batched, tokens: TokenStats) -> str:
    """What the pass and the steps take where a share of the blocks is ``trained``, against steps on all of them."""
    if not cfg.steps:
        return ""
    seen = cfg.steps * cfg.batch_size
    passing = min(seen, tokens.examples or seen)
    of_all = trained + (1 - trained) * passing / (2 * seen)
    return f"; {seen / passing:.1f} epochs in about {of_all:.0%} of the time that all blocks take, the pass included"


def _obstacle(cfg: Batched, tokens: TokenStats) -> str:
    """Why states cannot be kept, or ''."""
    if tokens.written:
        return "answers are written, and each new token passes every block"
    if tokens.long_words:
        return "label words of several tokens are scored in a tree behind each prompt"
    if cfg.objective != LOSS and tokens.kind not in ("label", "choice"):
        return "the score of a text that is written needs every block"
    return ""


def _rows(
    shape: ModelShape,
    cfg: Batched,
    tokens: TokenStats,
    states: str,
    room_bytes: int | None,
) -> tuple[int | None, str]:
    """Training rows whose states are kept, and why so many; None where too few would have room or time."""
    seen = cfg.steps * cfg.batch_size if cfg.steps else None
    limits = (cfg.state_rows or seen, tokens.examples)
    wanted = min((n for n in limits if n is not None), default=LEAST_STATE_ROWS)
    length = tokens.mean or tokens.tokens[0]
    row_bytes = int(length * shape.hidden * STATE_BYTES[states]) + ROW_HEAD_BYTES
    evaluated = tokens.evaluations * tokens.evaluated  # no row is longer than the longest
    least = min(wanted, LEAST_STATE_ROWS)
    reason = "as many as the steps see"
    if cfg.state_rows is not None:
        reason = "as given"
    elif cfg.for_s:
        reason = "as many as pass in a third of --for, these at most"
    if room_bytes is not None and cfg.state_rows is None:
        room = room_bytes - evaluated * shape.hidden * STATE_BYTES[states]
        if room < least * row_bytes:
            need = mb(least * row_bytes - room + room_bytes)
            return None, f"the disk has room for {mb(room_bytes)} of states, and {need} are needed"
        if room < wanted * row_bytes:
            wanted = room // row_bytes
            reason = f"as many as have room in {mb(room_bytes)} of the disk"
    total = mb(wanted * row_bytes)
    return wanted, f"{reason}; about {total} on disk"


# ---------------------------------------------------------------------------------------------
# What the two parts hold


def above(shape: ModelShape, blocks: Blocks) -> ModelShape:
    """What is in memory while the request trains."""
    return replace(shape, layers=shape.layers - blocks.first)


def below(shape: ModelShape, blocks: Blocks) -> ModelShape:
    """What is in memory while rows pass the frozen blocks; no head is."""
    return replace(shape, layers=blocks.first, tied=True)


def passing_request(cfg: Batched) -> Batched:
    """The pass as a request: nothing is trained."""
    return Batched.of(
        cfg, train=("head",), estimator="grzo", credit="group", mask="none", rule="sgd"
    )


def passing_tokens(tokens: TokenStats) -> TokenStats:
    """The batch of a pass: half of it, since a footprint counts two sides where nothing is perturbed."""
    longest = max(PASS_TOKENS, tokens.tokens[0], tokens.evaluated)
    return TokenStats("label", (-(-longest // 2),), 1, 1)
